"""A folder of models: what it holds by name, links to models of the hub's cache, and their deletion.

In: a folder of somebody's own. Out: paths by name. A name that comes from elsewhere is only ever looked up among those
found, never made a path; a link is deleted with what it points to only in the hub's cache. Knows not what files hold.
"""

import os
from contextlib import suppress
from pathlib import Path

from ..errors import InputError
from .hub import NAME, cache_root
from .repository import FOLDER, SPLIT, choices

DEPTH = 3  # folders within folders that are looked into, as OWNER/REPOSITORY/QUANTIZATION
HUBS = ("hf.co/", "huggingface.co/")


def find_models(folder: Path, inside: str = "", depth: int = DEPTH) -> dict[str, Path]:
    """Return the models in a folder by name: the path within it, without ".gguf" or the number of a part."""
    found: dict[str, Path] = {}
    try:
        names = sorted(entry.name for entry in os.scandir(folder / inside) if not entry.name.startswith("."))
    except OSError:
        return {}
    here = folder / inside
    files = [name for name in names if (here / name).is_file()]
    if inside and "config.json" in files and any(name.endswith(".safetensors") for name in files):
        return {inside.rstrip("/"): here}
    for choice in choices(files):
        if choice.complete:
            split = SPLIT.fullmatch(choice.files[0])
            found[inside + (split[1] if split else choice.files[0][:-5])] = here / choice.files[0]
    for name in names if depth else ():
        if name.upper() != "MTP" and (here / name).is_dir():  # assistants, which draft for models
            found |= find_models(folder, f"{inside}{name}/", depth - 1)
    return found


def look_up(name: str, names: list[str]) -> str | None:
    """Return the one of `names` that a client means: itself, its last part or REPO[:QUANT], with ":latest" or not."""
    wanted = name.removesuffix(":latest").lower()
    for hub in HUBS:
        wanted = wanted.removeprefix(hub)
    wanted = wanted.removesuffix(".gguf")
    repo, _, quant = wanted.partition(":")
    some = [one for one in names if one.lower() == wanted]
    some = some or [one for one in names if one.lower().rsplit("/", 1)[-1] == wanted]
    some = some or [
        one for one in names if f"{one.lower()}/".startswith(f"{repo}/") and quant in one.lower()[len(repo) :]
    ]
    return some[0] if len(some) == 1 else None


def repository(name: str) -> tuple[str, str]:
    """Return the repository and the quantization ("": any) that a name to pull means. Raises InputError."""
    for hub in HUBS:
        name = name.removeprefix(hub)
    match = NAME.fullmatch(name.removesuffix(":latest"))
    if match is None:
        raise InputError(f"{name[:80]!r}: no name of a repository on Hugging Face; pull OWNER/NAME or OWNER/NAME:QUANT")
    return match["repo"], match["quant"] or ""


def link_model(folder: Path, repo: str, path: Path) -> None:
    """Make a model of the hub's cache one of the folder's, by links under its repository's name. Raises InputError."""
    home = folder / repo
    links = {home: path} if path.is_dir() else {home / part.name: part for part in _parts(path)}
    try:
        for link, target in links.items():
            link.parent.mkdir(parents=True, exist_ok=True)
            if link.is_symlink():
                link.unlink()
            link.symlink_to(target.absolute())
    except OSError as error:
        raise InputError(
            f"{error.filename}: no link can be made there ({error.strerror}); move what is there"
        ) from None


def delete_model(folder: Path, path: Path) -> None:
    """Delete a model of the folder, and folders that become empty. Raises InputError."""
    cache = cache_root().resolve()
    try:
        files = [p for p in path.iterdir() if FOLDER.fullmatch(p.name)] if path.is_dir() else _parts(path)
        for file in files:
            chain = [file]
            while chain[-1].is_symlink():
                chain.append(chain[-1].parent / os.readlink(chain[-1]))
            cached = cache in chain[-1].resolve().parents
            for step in chain if cached else chain[:1]:
                step.unlink(missing_ok=True)
        if path.is_symlink():
            path.unlink()
    except OSError as error:
        raise InputError(f"{error.filename}: can't be deleted ({error.strerror})") from None
    for parent in (path, *path.parents):
        if folder not in parent.parents or not parent.is_dir():
            continue
        with suppress(OSError):  # it isn't empty
            parent.rmdir()


def _parts(path: Path) -> list[Path]:
    """All files of a model, of which `path` is the first."""
    split = SPLIT.fullmatch(path.name)
    if split is None:
        return [path]
    return [path.with_name(f"{split[1]}-{i:05}-of-{split[3]}.gguf") for i in range(1, int(split[3]) + 1)]
