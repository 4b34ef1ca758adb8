"""The models in huggingface_hub's cache: which are there, their deletion, and what to pull where a file is missing.

In: the cache, which other programs use too; names as `pull` takes them. Out: paths by name. Knows not what files hold.
"""

import re
import shutil
from difflib import get_close_matches
from pathlib import Path

from .folder import delete_model
from .hub import cache_folder_of, cache_root, is_whole, latest_version
from .repository import DRAFTER, PROJECTOR, QUANT, choices

SIZE = re.compile(r"(?<![A-Z0-9])(?:E2B|E4B|12B|26B(?:-A4B)?|31B)(?![A-Z0-9])")


def cached_models() -> dict[str, Path]:
    """Return all complete models of the cache, whatever they are, by the name that `pull` takes."""
    found: dict[str, Path] = {}
    for home in sorted(cache_root().glob("models--*--*")):
        repo = home.name.removeprefix("models--").replace("--", "/")
        try:
            snapshot, files = latest_version(repo)
            for choice in (some := choices(files)):
                name = choice.quant if [one.quant for one in some].count(choice.quant) == 1 else choice.files[0]
                if choice.complete and not DRAFTER.fullmatch(choice.files[0]):
                    found[f"{repo}:{name or choice.files[0]}"] = snapshot / choice.files[0]
            if not some and is_whole(snapshot, files):
                found[repo] = snapshot
        except (OSError, ValueError):
            continue
    return found


def broken_off() -> dict[str, int]:
    """Return the bytes there are of downloads that have not ended, by repository."""
    found: dict[str, int] = {}
    for part in sorted(cache_root().glob("models--*--*/blobs/*.part")):
        repo = part.parts[-3].removeprefix("models--").replace("--", "/")
        found[repo] = found.get(repo, 0) + part.stat().st_size
    return found


def where_to_get(path: Path) -> str:
    """Return what to do where there is no such file: one that is named alike, or what to pull."""
    near = get_close_matches(path.name, [file.name for file in path.parent.glob("*.gguf")], 1, 0.7)
    size = SIZE.search(path.name.upper().replace("_", "-"))
    label = size[0].replace("26B-A4B", "26B").replace("26B", "26B-A4B") if size else "E2B"
    quant = QUANT.search(path.name.upper())
    name = f"ggml-org/gemma-4-{label}-it-GGUF:{quant[0] if quant else 'Q4_K_M'}"
    file = f"do you mean {near[0]}? Else " if near else ""
    return f"{file}download {'it' if size else 'one'}: mlx-gemma4 pull {name} (`mlx-gemma4 list` shows what is here)"


def in_cache(name: str, names: list[str]) -> str | None:
    """Return the one of `names`, OWNER/NAME[:QUANT], that a user means, who may leave out owner and quantization."""
    wanted = name.lower()
    some = [one for one in names if one.lower() == wanted]
    some = some or [one for one in names if wanted in _spellings(one.lower())]
    return some[0] if len(some) == 1 else None


def _spellings(name: str) -> tuple[str, ...]:
    repo = name.partition(":")[0]
    return name.partition("/")[2], repo, repo.partition("/")[2]


def delete_cached(repo: str, model: Path | None) -> None:
    """Delete a model of the hub's cache in all versions, or parts of downloads (None). Raises InputError.

    What came with the last model of its repository, assistants and projectors, goes with it.
    """
    home = cache_folder_of(repo)
    for part in () if model else home.glob("blobs/*.part"):
        part.unlink(missing_ok=True)
    inside = Path(*model.relative_to(home).parts[2:]) if model else None
    for version in list(home.glob("snapshots/*")) if inside else ():
        delete_model(cache_root(), version / str(inside))
    left = [file.name for kind in ("snapshots/*/**/*", "blobs/*.part") for file in home.glob(kind) if file.is_file()]
    if all(DRAFTER.fullmatch(name) or PROJECTOR.fullmatch(name) for name in left):
        shutil.rmtree(home, ignore_errors=True)
