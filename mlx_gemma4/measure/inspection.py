"""Describe a model file and the memory it will take, from its header alone: nothing is loaded.

In: the path of a GGUF or of a folder of safetensors. Out: a `Report`, and the lines that `mlx-gemma4 inspect` prints.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from textwrap import wrap

import mlx.core as mx

from ..config import Config
from ..doctor.verdict import usable_kernels
from ..errors import InputError, one_line
from ..loading.loader import account, open_model
from ..loading.tensors import Entry, tensor_specs
from ..media.projector import check_tensors, is_projector, media_beside, open_towers
from ..memory import DEFAULT_CONTEXT, Needs, available_memory, kv_dtype
from ..model.costs import PREFILL_CHUNK, kv_per_token, needs_of, own_attention, weights_per_token


@dataclass(frozen=True)
class TypeRow:
    """The tensors of one type."""

    type: str
    tensors: int
    weights: int
    n_bytes: int


@dataclass(frozen=True)
class Memory:
    """Memory of a state as long as the context, with one `--kv`. Sizes in bytes."""

    kv: str
    state: int
    with_weights: int  # the state, the weights, and what reading a prompt takes
    fits: bool  # in `Report.available`
    longest: int  # context in tokens that fits; 0: not even the weights do
    read_per_token: int  # weights and KV that a token decoded there reads, KV in fp16


@dataclass(frozen=True)
class Report:
    """Everything that `inspect` prints. Sizes in bytes."""

    path: str
    n_bytes: int  # of the tensors
    name: str
    config: Config
    types: list[TypeRow]
    unused: list[str]  # tensors that the model does not use
    problems: list[str]  # why it can't be loaded, if it can't
    context: int  # tokens that `memory` is computed for
    available: int  # memory free on this machine
    weights_per_token: int
    memory: list[Memory]
    mmproj: str  # the projector beside it, or ""
    media: list[str]  # what that takes


@dataclass(frozen=True)
class ProjectorReport:
    """Everything that `inspect` prints of a projector. Sizes in bytes."""

    path: str
    n_bytes: int  # of the tensors
    name: str
    hidden: int  # of the text model
    towers: list[str]
    types: list[TypeRow]


def inspect(path: Path, context: int | None = None) -> Report | ProjectorReport:
    """Read a file's header and compute its report.

    Args:
        path: a GGUF file, any part of a split one, or a folder of safetensors; or a projector.
        context: tokens to plan memory for; None: DEFAULT_CONTEXT, or as many as the model takes.

    Raises:
        InputError: the file can't be read, or the context is longer than the model's.
    """
    if is_projector(path):
        return _projector(path)
    config, entries, name, problems = _header(path)
    context = context or min(DEFAULT_CONTEXT, config.context)
    if context > config.context:
        raise InputError(f"--context {context}: the model's own is {config.context}; take no more")
    wanted = tensor_specs(config)
    used = {name: entry.n_bytes for name, entry in entries.items() if name in wanted}
    weights, available = sum(used.values()), available_memory()
    per_token = weights_per_token(config, used)
    needs = needs_of(config, kv_dtype(), PREFILL_CHUNK, own_attention(usable_kernels()))
    beside = media_beside(path, config)
    held = weights + (beside.unread if beside else 0)
    memory = [_memory(config, needs, kv, context, held, available, per_token) for kv in needs.kinds]
    return Report(
        str(path),
        sum(e.n_bytes for e in entries.values()),
        name,
        config,
        _types(entries),
        [name for name in entries if name not in wanted],
        problems,
        context,
        available,
        per_token,
        memory,
        str(beside.path) if beside else "",
        sorted(beside.kinds) if beside else [],
    )


def _types(entries: Mapping[str, Entry]) -> list[TypeRow]:
    rows = []
    for type in dict.fromkeys(entry.type for entry in entries.values()):
        some = [entry for entry in entries.values() if entry.type == type]
        rows.append(TypeRow(type, len(some), sum(prod(e.shape) for e in some), sum(e.n_bytes for e in some)))
    return sorted(rows, key=lambda r: -r.n_bytes)


def _projector(path: Path) -> ProjectorReport:
    with open_towers(path) as (towers, source):
        made = (source.entries.get(each.tower.projection) for each in towers)
        hidden = max((each.shape[0] for each in made if each), default=1)
        check_tensors(path, towers, source, hidden)
        about = [f"{each.type}: {each.tower.kind}, {each.read.count('embedding_length')} wide" for each in towers]
        layers = [each.read.count("block_count", 0, least=0) for each in towers]
        about = [text + f", {n} layers" * (n > 0) for text, n in zip(about, layers, strict=True)]
        size = sum(e.n_bytes for e in source.entries.values())
        name = one_line(str(towers[0].read.metadata.get("general.name", "")))
        return ProjectorReport(str(path), size, name, hidden, about, _types(source.entries))


def _header(path: Path) -> tuple[Config, Mapping[str, Entry], str, list[str]]:
    """Return the configuration, the tensors by GGUF name, its name ("" for a folder), and why it can't be loaded."""
    problems = []
    with open_model(path) as (config, source, metadata):
        try:
            account(config, source, tensor_specs(config))
        except InputError as error:
            problems.append(str(error).removeprefix(f"{source.name}: "))
        return config, source.entries, one_line(str(metadata.get("general.name", ""))), problems


def _memory(
    config: Config, needs: Needs, kv: str, context: int, weights: int, available: int, per_token: int
) -> Memory:
    *larger, smallest = needs.chunks()

    def in_all(tokens: int, chunk: int = smallest) -> int:
        return weights + needs.beside(tokens, kv, chunk)

    chunk = next((n for n in larger if in_all(context, n) <= available), smallest)
    needed = in_all(context, chunk)
    longest = bisect_right(range(1, config.context + 1), available, key=in_all)  # so many lengths fit
    read = per_token + kv_per_token(config, kv, context, mx.float16)
    return Memory(kv, needs.kv(context, kv), needed, needed <= available, longest, read)


# ---------------------------------------------------------------- for people


def lines(r: Report | ProjectorReport, chip: str) -> Iterator[str]:
    """The report as text; `chip` is this machine's, as MLX names it."""
    yield f"{r.path}: {r.name or 'no name'}, {r.n_bytes / 1e9:.2f} GB of tensors"
    if isinstance(r, ProjectorReport):
        yield f"A projector (mmproj) for models of hidden size {r.hidden}"
        yield from r.towers
        yield from _table(r.types)
        return
    c = r.config
    yield from wrap(f"{c.architecture}: {', '.join(_shape(c))}", 110)
    yield from _table(r.types)
    for problem in r.problems:
        yield f"CAN'T BE LOADED: {problem}"
    if r.unused:
        yield f"Unused tensors: {', '.join(r.unused[:5])}{' ...' if r.unused[5:] else ''}"
    if r.mmproj:
        yield f"Takes {', '.join(r.media)} with {r.mmproj}"
    yield ""
    yield f"Memory for {r.context:,} tokens of context; {_gb(r.available)} are free here ({chip})"
    yield _row("--kv", "state", "in all", "fits", "longest context")
    for m in r.memory:
        yield _row(m.kv, _gb(m.state), _gb(m.with_weights), "yes" if m.fits else "no", f"{m.longest:,}")
    yield ""
    reads = ", ".join(f"{_gb(m.read_per_token)} with --kv {m.kv}" for m in r.memory)
    yield f"A token decoded behind them reads {_gb(r.weights_per_token)} of weights; keys and values included,"
    yield f"{reads}."
    yield "A chip's memory bandwidth over those bytes bounds the tokens a second; `mlx-gemma4 bench` measures them."


def _table(types: list[TypeRow]) -> Iterator[str]:
    yield ""
    yield _row("type", "tensors", "weights", "size", "bits/weight")
    total = TypeRow("all", *(sum(getattr(t, key) for t in types) for key in ("tensors", "weights", "n_bytes")))
    for t in (*types, total):
        bits = f"{8 * t.n_bytes / max(t.weights, 1):.2f}"
        yield _row(t.type.removeprefix("mlx.core."), str(t.tensors), f"{t.weights / 1e6:,.1f} M", _gb(t.n_bytes), bits)


def _shape(c: Config) -> Iterator[str]:
    sliding = [layer for layer in c.layers if layer.sliding]
    shared = len(c.layers) - c.own_kv_layers
    yield f"{len(c.layers)} layers" + (f" ({len(sliding)} with a window of {c.window})" if sliding else "")
    if shared:
        yield f"{shared} share keys and values"
    yield f"hidden {c.hidden}"
    yield f"MLP {_range(layer.ffn for layer in c.layers)}"
    if c.experts:
        yield f"{c.experts} experts of {c.expert_ffn}, {c.experts_used} used"
    if c.ple:
        yield f"per-layer embeddings of {c.ple}"
    for kind, some in (("sliding", sliding), ("global", [layer for layer in c.layers if not layer.sliding])):
        if some:
            heads, kv = _range(s.heads for s in some), _range(s.kv_heads for s in some)
            yield f"{kind} heads {heads}, {kv} of keys, {_range(s.head_dim for s in some)} wide"
    yield f"vocabulary {c.vocab:,}"
    yield f"context {c.context:,}"


def _range(values: Iterator[int]) -> str:
    some = sorted(set(values))
    return str(some[0]) if len(some) == 1 else f"{some[0]} to {some[-1]}"


def _gb(n: float) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.2f} MB"


def _row(first: str, *others: str) -> str:
    return f"{first:<22}" + "".join(f"{cell:>16}" for cell in others)
