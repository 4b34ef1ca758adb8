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
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from ..config import Config
from ..errors import InputError
from ..files.gguf import open_gguf, split_paths
from ..generation.drafting import Drafts
from ..loading.assistant import assistant_beside
from ..loading.loader import account, open_model
from ..loading.parts import PartPlan, plan_part
from ..loading.tensors import Source, tensor_specs
from ..model.assistant import Assistant
from ..model.model import Model
from ..shard import Kind, Shard
from .following import follow
from .link import Follower, Leader, Message
from .mirror import LedAssistant, LedModel
from .place import Place
from .split import choose, measure_link, measure_machine, token_of

log = logging.getLogger("mlx_gemma4")

Split = Literal["auto", "tensor", "layers"]
Load = Callable[[Path, Shard, "Path | None", dict[str, Any]], "tuple[Model, Assistant | None]"]
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


def gather(
    place: Place, path: Path, name: str, split: Split, draft: str | Path | None, given: dict[str, Any]
) -> tuple[Shard, Path | None]:
    """Have all ranks find the model, and load its shards, which `lead` waits for. Returns rank 0's, and the assistant.

    Args:
        name: what the others find the model by (`portable`); "": the built-in one.
        draft: the assistant's file; "auto": one beside the model, if all ranks have the same there; None: none.
        given: what they load the model with.

    Raises:
        InputError: another rank lacks a file, or has another file, another version of this program or of MLX; the model
            can't be split over so many ranks.
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
    with open_model(path) as (config, source, _):
        token = token_of(config, {name: entry.n_bytes for name, entry in source.entries.items()})
        leader.tell("model", name=name, digest=digest(path), given=given)
        leader.answers()
        drafter = _same_assistant(leader, path, config, draft)
        kind = cast(Kind, split)
        if split == "auto":
            leader.tell("measure")
            link = measure_link(leader.group)
            kinds, line = choose(token, measure_machine(), place.size, link)
            log.warning("%s", line)
            kind = possible(kinds, lambda kind: plan(config, source, Shard(0, place.size, kind)))
    leader.tell("shard", kind=kind, draft=drafter is not None)
    return Shard(0, place.size, kind, leader.group), drafter


def plan(config: Config, source: Source, shard: Shard) -> PartPlan:
    """Plan a part of a model, whose tensors are not read. Raises InputError: the model can't be split so."""
    found = plan_part(config, source.entries, account(config, source, tensor_specs(config))[0], shard)
    if shard.kind == "tensor" and not any(found.part.split.values()):
        raise InputError(f"{shard.size} ranks: no layer has enough heads or blocks for so many")
    return found


def possible(kinds: Sequence[Kind], plan: Callable[[Kind], object]) -> Kind:
    """Return the first kind that can be planned, or the last one; say why none before."""
    for kind, other in pairwise(kinds):
        try:
            plan(kind)
            return kind
        except InputError as error:
            log.warning("%s; so --split %s", error, other)
    return kinds[-1]


def _same_assistant(leader: Leader, path: Path, config: Config, draft: str | Path | None) -> Path | None:
    """Return the assistant that all ranks have. Raises InputError if one that was named is not everywhere."""
    beside = str(draft) == "auto"
    file = assistant_beside(path, config) if beside else draft and Path(draft)
    if not file:
        return None
    leader.tell("assistant", name=portable(file), digest=digest(file))
    try:
        leader.answers()
    except InputError as error:
        if not beside:
            raise
        log.warning("No drafts: %s", error)
        return None
    return file


def lead(model: Model, drafts: Drafts | None = None) -> Model:
    """Return rank 0's model, once the others have loaded theirs, as one that leads them. Raises InputError."""
    leader = _leading[0]
    leader.answers()
    if drafts and isinstance(drafts.drafter, Assistant):
        drafts.drafter = LedAssistant(drafts.drafter, leader)
    return LedModel(model, leader)


def follow_rank_0(
    place: Place,
    find: Callable[[str], Path],
    load: Load,
    joined: Callable[[], None] = lambda: None,
) -> NoReturn:
    """Find and load what rank 0 says, make its calls until it is done, and end this process.

    Args:
        find: the path of a model by the name that rank 0 gives.
        load: (path, shard, assistant's file, given) -> this rank's model, and assistant.
        joined: called when rank 0 has been found.
    """
    logging.getLogger().setLevel(logging.ERROR)  # rank 0 says it
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what Ctrl-C means is rank 0's to say
    follower = Follower(place)
    joined()
    try:
        loaded = _loaded(follower, find, load)
        if loaded is not None:
            follow(loaded[0], follower, assistant=loaded[1])
    except Exception as error:
        follower.fail(error)
    sys.exit(0)


def _loaded(follower: Follower, find: Callable[[str], Path], load: Load) -> tuple[Model, Assistant | None] | None:
    """Return this rank's model, and assistant; None: rank 0 has ended."""
    path, draft, given, place = Path(), None, {}, follower.place
    for message in follower.calls():
        try:
            if message["op"] == "model":
                path, given = _same(find(message["name"]), message), message["given"]
                follower.answer("same")
            elif message["op"] == "assistant":
                draft = _same(find(message["name"]), message)
                follower.answer("same")
            elif message["op"] == "measure":
                measure_link(follower.group)
            else:
                shard = Shard(place.rank, place.size, message["kind"], follower.group)
                loaded = load(path, shard, draft if message["draft"] else None, given)
                follower.answer("loaded")
                return loaded
        except (InputError, OSError) as error:
            follower.refuse(error)
    return None


def _same(path: Path, message: Message) -> Path:
    """Return the path of a file that is rank 0's. Raises InputError."""
    if digest(path) != message["digest"]:
        raise InputError(f"{path}: is another file than rank 0's; copy that one here (mlx-gemma4 hosts check does)")
    return path
