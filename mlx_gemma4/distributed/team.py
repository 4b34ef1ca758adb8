"""Brings a model up on all ranks: the same file everywhere, one split, a shard each; then rank 0 leads, others follow.

In: the place of this process, and how models are loaded (conversation/language_model.py). Out: on rank 0 the split and
the model that leads; the other ranks follow until rank 0 is done, and end.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from ..errors import InputError
from ..files.gguf import open_gguf, split_paths
from ..loading.loader import open_model
from ..model.model import Model
from ..shard import Kind, Shard
from .link import Follower, Leader
from .mirror import LedModel, follow
from .place import Place
from .split import choose, measure_link, measure_machine, token_of

log = logging.getLogger("mlx_gemma4")

Split = Literal["auto", "tensor", "layers"]
PIECES, PIECE = 64, 1 << 16  # of a file that a digest reads, beside its first bytes
HEAD = 1 << 20  # of them: metadata and directory

_leading: list[Leader] = []  # one for a process


def files_of(path: Path) -> list[Path]:
    """Return the files of a model: all parts of a split GGUF, or those of a folder that make its numbers."""
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".json", ".model", ".jinja"))
    with open_gguf(path) as gguf:
        return split_paths(path, gguf.metadata)


def digest(path: Path) -> str:
    """Return a hash of a model's files, in hex: of their sizes, of their beginnings, and of pieces all through them.

    A second for 20 GB. It tells files apart, not a file from one of damaged bits; `hosts check` compares all bytes.
    """
    hashed = hashlib.sha256()
    for file in files_of(path):
        size = file.stat().st_size
        hashed.update(f"{file.name if path.is_dir() else ''} {size}\n".encode())
        with file.open("rb") as opened:
            hashed.update(opened.read(HEAD))
            for start in range(HEAD, size, max(PIECE, (size - HEAD) // PIECES)):
                opened.seek(start)
                hashed.update(opened.read(PIECE))
    return hashed.hexdigest()


def portable(path: Path) -> str:
    """Return a path as other machines may have it: below a home folder by its place there."""
    path = path.absolute()
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


def gather(place: Place, path: Path, name: str, split: Split, given: dict[str, Any]) -> Shard:
    """Have all ranks find the model, and load its shards, which `lead` waits for. Returns rank 0's.

    Args:
        name: what the others find the model by (`portable`); "": the built-in one.
        given: what they load it with.

    Raises:
        InputError: another rank lacks the file, or has another file, another version of this program or of MLX.
    """
    if _leading:
        raise InputError("several ranks run one model, and this process has loaded one; start another process")
    if place.backend == "nccl":
        if split == "layers":
            raise InputError(
                "--split layers: MLX sends no messages over NCCL; leave it out, or start with --backend ring"
            )
        split = "tensor"
    leader = Leader(place)
    _leading.append(leader)
    atexit.register(leader.close)
    leader.tell("model", name=name, digest=digest(path), given=given)
    leader.answers()
    kind = cast(Kind, split)
    if split == "auto":
        with open_model(path) as (config, source, _):
            token = token_of(config, {name: entry.n_bytes for name, entry in source.entries.items()})
        leader.tell("measure")
        link = measure_link(leader.group)
        best, line = choose(token, measure_machine(), place.size, link)
        kind = cast(Kind, best)
        log.warning("%s", line)
    leader.tell("shard", kind=kind)
    return Shard(0, place.size, kind, leader.group)


def lead(model: Model) -> Model:
    """Return rank 0's model, once the others have loaded theirs, as one that leads them. Raises InputError."""
    _leading[0].answers()
    return LedModel(model, _leading[0])


def follow_rank_0(
    place: Place,
    find: Callable[[str], Path],
    load: Callable[[Path, Shard, dict[str, Any]], Model],
    joined: Callable[[], None] = lambda: None,
) -> NoReturn:
    """Find and load what rank 0 says, make its calls until it is done, and end this process.

    Args:
        find: the path of a model by the name that rank 0 gives.
        load: (path, shard, given) -> this rank's model.
        joined: called when rank 0 has been found.
    """
    logging.getLogger().setLevel(logging.ERROR)  # rank 0 says it
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what Ctrl-C means is rank 0's to say
    follower = Follower(place)
    joined()
    try:
        model = _loaded(follower, find, load)
        if model is not None:
            follow(model, follower)
    except Exception as error:
        follower.fail(error)
    sys.exit(0)


def _loaded(
    follower: Follower, find: Callable[[str], Path], load: Callable[[Path, Shard, dict[str, Any]], Model]
) -> Model | None:
    """Return this rank's model; None: rank 0 has ended."""
    path, given, place = Path(), {}, follower.place
    for message in follower.calls():
        try:
            if message["op"] == "model":
                path, given = find(message["name"]), message["given"]
                if digest(path) != message["digest"]:
                    raise InputError(
                        f"{path}: is another file than rank 0's; copy that one here (mlx-gemma4 hosts check does)"
                    )
                follower.answer("same")
            elif message["op"] == "measure":
                measure_link(follower.group)
            else:
                model = load(path, Shard(place.rank, place.size, message["kind"], follower.group), given)
                follower.answer("loaded")
                return model
        except (InputError, OSError) as error:
            follower.refuse(error)
    return None
