"""Which files of a repository, or beside a model's file, make up a model, by their names alone.

In: names of files. Out: models with their quantizations, and the assistants and projectors that go with one. Reads
nothing, here or at the hub.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from ..errors import InputError

# The default of `REPO` alone: the first of these that the repository has.
PREFERRED = ("Q4_K_M", "Q4_0", "UD-Q4_K_XL", "Q8_0")
QUANT = re.compile(
    r"(?<![A-Z0-9])((?:UD-)?(?:I?Q\d(?:_(?:\d|K|NL|XXS|XS|S|M|L|XL|XXL))*|TQ\d_\d|BF16|F16|F32|MXFP4(?:_MOE)?|NVFP4))(?![A-Z0-9])"
)
# An assistant, which drafts for a model of the same repository: `mtp-*`, or `*-assistant-*`.
DRAFTER = re.compile(r"(?:.*/)?(?:mtp-[^/]*|[^/]*-assistant(?:-[^/]*)?)\.gguf", re.IGNORECASE)
# A projector, which makes a model of the same repository see or hear.
PROJECTOR = re.compile(r"(?:.*/)?[^/]*mmproj[^/]*\.gguf", re.IGNORECASE)
SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
# Files of a repository in MLX's or transformers' format that `load` reads.
FOLDER = re.compile(
    r"(?:config|generation_config|tokenizer|tokenizer_config|[\w.-]+\.index)\.json|[\w.-]+\.(?:safetensors|jinja)"
)


@dataclass(frozen=True)
class PullChoice:
    """One model of a repository: a file, or all parts of a split one in order."""

    quant: str  # "Q4_K_M"; "" if the name has none
    files: tuple[str, ...]  # paths in the repository
    complete: bool

    @property
    def title(self) -> str:
        return self.quant or self.files[0]


def choices(files: Sequence[str]) -> list[PullChoice]:
    """Return the models among a repository's files, split ones joined.

    Without projectors, importance matrices, and assistants, unless there is nothing else.
    """
    groups: dict[tuple[str, int], dict[int, str]] = {}
    for file in sorted(set(files) - set(best_drafters(files))) or sorted(files):
        base = file.rsplit("/", 1)[-1].lower()
        if base.endswith(".gguf") and not PROJECTOR.fullmatch(base) and "imatrix" not in base:
            split = SPLIT.fullmatch(file)
            key, part = ((split[1], int(split[3])), int(split[2])) if split else ((file[:-5], 1), 1)
            groups.setdefault(key, {})[part] = file
    found = []
    for (stem, count), parts in groups.items():
        label = QUANT.findall(stem.rsplit("/", 1)[-1].upper())
        whole = sorted(parts) == list(range(1, count + 1))
        found.append(PullChoice(label[-1] if label else "", tuple(parts[i] for i in sorted(parts)), whole))
    return found


def best_drafters(files: Iterable[str], model: str = "") -> list[str]:
    """Return the assistants among files, those first that are named most like a model, and of these Q8_0."""

    def rank(file: str) -> tuple[int, bool, str]:
        name = file.rsplit("/", 1)[-1].lower().removeprefix("mtp-")
        return -_alike(name, model.lower()), "q8_0" not in name, file

    return sorted((file for file in files if DRAFTER.fullmatch(file)), key=rank)


def best_projectors(files: Iterable[str], model: str = "") -> list[str]:
    """Return the projectors among files, those first that are named most like a model, and of these the smallest.

    But those of fewer than 16 bits come last: what they make of a picture or a sound suffers from it.
    """
    order = ("BF16", "F16", "F32", "")

    def rank(file: str) -> tuple[int, int, str]:
        name = file.rsplit("/", 1)[-1].upper()
        types = QUANT.findall(name)
        stem = re.sub(r"^[-_.]*|MMPROJ[-_.]*", "", QUANT.sub("", name))
        return -_alike(stem, model.upper()), order.index(types[-1] if types and types[-1] in order else ""), file

    return sorted((file for file in files if PROJECTOR.fullmatch(file)), key=rank)


def _alike(name: str, model: str) -> int:
    """Return how many characters two names begin with together."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(name, model, strict=False))))


def files_beside(path: Path, *folders: str) -> list[str]:
    """Return the GGUFs beside a model's file, or in `folders` there or one level up. A link's target counts too."""
    places = [path, path.parent / path.readlink()] if path.is_symlink() else [path]
    near = [place.parent / name for place in places for name in ("", *folders, *(f"../{name}" for name in folders))]
    return [str(file) for folder in near if folder.is_dir() for file in sorted(folder.glob("*.gguf"))]


def choose(repo: str, files: Sequence[str], quant: str) -> PullChoice:
    """Return the one model of a repository that `quant` (or, if empty, PREFERRED) means. Raises InputError."""
    found = choices(files)
    if not found:
        raise InputError(f"{repo}: has no GGUF file and no folder that can be loaded; name another repository")
    if quant:
        wanted = quant.upper()
        some = [c for c in found if c.quant == wanted] or [c for c in found if c.quant == f"UD-{wanted}"]
        some = some or [c for c in found if wanted in (f.upper() for f in (*c.files, c.files[0].rsplit("/", 1)[-1]))]
    else:
        ranked = ([c for c in found if c.quant == label] for label in PREFERRED)
        some = found if len(found) == 1 else next((group for group in ranked if group), [])
    if len(some) == 1:
        if not some[0].complete:
            raise InputError(f"{repo}: parts of {some[0].title} are missing there; take another: {_listed(found)}")
        return some[0]
    if some:
        names = ", ".join(c.files[0] for c in some)
        raise InputError(f"{repo}: {some[0].quant} means {names}; name one of them: {repo}:{some[0].files[0]}")
    what = f"has no {quant}" if quant else "has several models"
    raise InputError(f"{repo}: {what}; take one of {_listed(found)}, as in {repo}:{found[0].title}")


def _listed(found: Sequence[PullChoice]) -> str:
    return ", ".join(dict.fromkeys(c.title for c in found if c.complete)) or "none that is whole"


def folder_files(files: Sequence[str]) -> tuple[str, ...]:
    """Return the files that `load` reads of a repository of safetensors, weights last; () if it isn't one."""
    some = sorted((f for f in files if FOLDER.fullmatch(f)), key=lambda f: (f.endswith(".safetensors"), f))
    return tuple(some) if "config.json" in some and some[-1].endswith(".safetensors") else ()
