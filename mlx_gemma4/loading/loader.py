"""From a file or folder to a model: open it, account for every tensor, fuse gate and up, pack, and release the file.

In: the path of a GGUF file or of a folder of safetensors. Out: its `Config` and its `Source` of tensors (from_gguf or
from_safetensors), and from these a `Model` whose weights are MLX arrays. Every model is loaded here.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Literal, cast

import mlx.core as mx

from ..config import Config, config_from_gguf, config_from_json
from ..errors import InputError
from ..files.gguf import open_gguf
from ..kv.pool import first_bytes
from ..memory import DEFAULT_CONTEXT, SOME_ROOM, Holding, MemoryPlan, Room, kv_dtype, limit_memory, make_plan, on_cpu
from ..model.costs import largest_chunk, needs_of, own_attention
from ..model.model import Model
from ..model.weights import Layer, Weights
from ..ops import pack, paged
from ..ops.dispatch import Kernels
from ..ops.stock import Weight, rows_of
from ..paths import read_object
from ..quant.formats import FORMATS, SUPPORTED, Packed, row_factors
from ..shard import Part, Shard
from .from_gguf import GGUFSource
from .from_safetensors import FolderSource
from .parts import part_of
from .tensors import Source, Spec, tensor_specs, unused

log = logging.getLogger("mlx_gemma4")

FLOATING = ("F32", "F16", "BF16")  # types of scales

Progress = Callable[[int, int], None]  # bytes read, bytes in all


@contextmanager
def open_model(path: Path) -> Iterator[tuple[Config, Source, Mapping[str, Any]]]:
    """Yield the configuration, the tensors unread, and a GGUF's metadata ({} for a folder). Raises InputError."""
    if path.is_dir():
        file = path / "config.json"
        if (path / "adapter_config.json").is_file():
            raise InputError(f"{path}: is a LoRA adapter, which belongs to a model; give the model's folder")
        if not file.is_file():
            raise InputError(f"{path}: this folder has no config.json; give a .gguf file or a model's folder")
        contents = read_object(file)
        config, quantization = config_from_json(contents, str(file)), contents.get("quantization")
        yield config, FolderSource(path, config, quantization if isinstance(quantization, Mapping) else {}), {}
    else:
        with open_gguf(path) as gguf:
            if not gguf.tensors and "tokenizer.ggml.tokens" in gguf.metadata:
                raise InputError(f"{path}: holds a vocabulary without a model; give the model's file")
            config = config_from_gguf(gguf.metadata, str(path))
            yield config, GGUFSource(gguf, config), gguf.metadata


def load_model(
    config: Config,
    source: Source,
    holding: Literal["auto", "packed", "dense"] = "auto",
    fuse: bool = True,
    progress: Progress | None = None,
    kernels: Kernels | None = None,
    room: Room = SOME_ROOM,
    shard: Shard | None = None,
) -> tuple[Model, MemoryPlan]:
    """Read every tensor that the configuration calls for and build the model.

    Args:
        config: from the file's metadata.
        source: the file's tensors.
        holding: "packed" keeps quantized blocks as they are, "dense" expands them to fp32; "auto" decides
            by device and memory.
        fuse: join gate and up, and q, k and v, where their types allow it (tests compare).
        progress: called as bytes are read.
        kernels: pack the weights and run the model; None: stock operations do.
        room: for keys and values, that must be there beside the weights.
        shard: read only this rank's part.

    Raises:
        InputError: a tensor is missing, has another shape or a type that can't be read; too little memory.
    """
    present, scales = account(config, source, tensor_specs(config))
    part = None
    if shard is not None:
        mine, source, present = part_of(config, source, present, shard)
        config, part = mine.config, mine.part
        scales = {name: scales[of] for name, (of, _) in mine.tensors.items() if of in scales}
    packed, dense = sizes(source, present)
    chunk = largest_chunk(config, kernels)
    largest = max(source.entries[name].n_bytes for name in present)
    needs = needs_of(config, kv_dtype(), chunk, own_attention(kernels), largest if on_cpu() else 4 * pack.PIECE)
    if kernels is not None and kernels.player and room.kind == "full":  # checks of drafts put a state into the pool
        room = replace(room, n_bytes=max(room.n_bytes, first_bytes(config, kv_dtype(), paged.PAGE)))
    plan = make_plan(packed, dense, holding, source.name, needs, room)
    _tell(plan, chunk, min(room.context or DEFAULT_CONTEXT, config.context))
    # A scale is one tensor's; rows that have factors of their own may be joined all the same.
    apart = {name: spec for name, spec in present.items() if name not in scales or _has_factors(source, name)}
    joined = fusions(source, apart, len(config.layers)) if fuse else {}
    weights = read_weights(source, present, joined, scales, plan.holding, kernels, progress)
    limit_memory(plan)
    return Model(config, assemble(config, weights, part), kernels, plan, part), plan


def read_weights(
    source: Source,
    present: dict[str, Spec],
    joined: dict[str, list[str]],
    scales: Mapping[str, str],
    holding: Holding,
    kernels: Kernels | None,
    progress: Progress | None = None,
) -> dict[str, Weight]:
    """Read tensors, by name; those to be joined go by their target's. `scales`: names of factors, by whose they are."""
    total = sum(source.entries[name].n_bytes for name in present)
    parts_of = {part: target for target, parts in joined.items() for part in parts}
    vectors = [name for name, spec in present.items() if spec.role == "vector"]
    # First, so that all are checked at once, before anything large is read.
    weights: dict[str, Weight] = {name: source.read([name], present[name], holding, kernels) for name in vectors}
    odd = [mx.isnan(cast("mx.array", weights[name])).any() for name in vectors]
    mx.eval(odd)
    for name in (name for name, nan in zip(vectors, odd, strict=True) if nan.item()):
        raise InputError(f"{source.name}: tensor {name} has values that are no numbers (NaN); download it again")
    done = sum(source.entries[name].n_bytes for name in vectors)
    try:
        for name, spec in present.items():
            target = parts_of.get(name, name)
            if target in weights:
                continue  # a vector, or joined to an earlier tensor
            parts = joined.get(target, [name])
            weights[target] = source.read(parts, spec, holding, kernels)
            if any(part in scales for part in parts):
                factors = _factors_of_rows(source, parts, present, scales)
                weight = weights[target]
                if isinstance(weight, Packed):
                    factors = row_factors(factors)
                    weights[target] = replace(weight, block_scales=factors)
                else:
                    weights[target] = factors = cast("mx.array", weight).astype(mx.float32) * factors[..., None]
                mx.eval(factors)
            done += sum(source.entries[part].n_bytes for part in parts)
            if progress:
                progress(done, total)
    finally:
        pack.done()
    return weights


def _has_factors(source: Source, name: str) -> bool:
    """Return True if a tensor's type has a factor for each row, and room for a scale therefore."""
    form = FORMATS.get(source.entries[name].type)
    return form is not None and form.per_row


def _factors_of_rows(source: Source, parts: list[str], present: dict[str, Spec], scales: Mapping[str, str]) -> mx.array:
    """Return the factor of each row of tensors that are joined, fp32 [.., N]: their scales, one number or one for each
    expert, or 1."""
    made = []
    for part in parts:
        factor = mx.ones(1)
        if part in scales:
            factor = cast("mx.array", source.read([scales[part]], Spec((1,), "vector"), "packed", None))
        shape = present[part].shape[:-1]
        made.append(mx.broadcast_to(factor.reshape(-1, *[1] * (len(shape) - 1)), shape))
    return mx.concatenate(made, axis=-1)


def _tell(plan: MemoryPlan, chunk: int, context: int) -> None:
    """Log a plan, and with a warning each, what will be slower or shorter for lack of memory."""
    log.info("Memory plan: %s", plan.describe())
    if plan.chunk < chunk:
        log.warning("Memory is short: prompts are read %d tokens at a time, not %d, and slower", plan.chunk, chunk)
    if plan.context < context:
        log.warning("Memory is short: planned for %d tokens of context, not %d", plan.context, context)
    if plan.total > plan.idle:
        log.warning(
            "%.1f GB are wanted and other programs leave %.1f GB idle: macOS has to move theirs away; close some if "
            "replies are slow",
            plan.total / 1e9,
            plan.idle / 1e9,
        )


def account(config: Config, source: Source, specs: dict[str, Spec]) -> tuple[dict[str, Spec], dict[str, str]]:
    """Return the specs of the tensors that the file has, and the names of their scales; log what else it has.

    Raises InputError before any tensor is read: one is missing, can't be read, or changes the result and isn't known.
    """
    needed = dict(specs)
    for joined in (name for name in specs if name.endswith("ffn_gate_up_exps.weight")):
        # Experts' gate and up: whichever form the file has must be whole.
        for apart in (joined.replace("gate_up", half) for half in ("gate", "up")):
            if joined in source.entries:
                del needed[apart]
            else:
                needed[apart] = replace(specs[apart], optional=False)
    present = {name: spec for name, spec in needed.items() if name in source.entries}
    scales = {name: name.removesuffix("weight") + "scale" for name, spec in present.items() if spec.role != "vector"}
    scales = {name: scale for name, scale in scales.items() if scale in source.entries and scale not in specs}
    left, odd = unused(config, [n for n in source.entries if n not in present and n not in scales.values()])
    missing = [name for name, spec in needed.items() if not spec.optional and name not in source.entries]
    if odd:
        lacks = f" and lacks {missing[0]}" if missing else ""
        raise InputError(
            f"{source.name}: has tensor {odd[0]}{f' and {len(odd) - 1} more' if odd[1:] else ''}{lacks}, which nothing "
            "here knows how to use; update mlx-gemma4, or take another file of this model"
        )
    present = check_present(source, needed)
    for name, scale in scales.items():
        entry, shape = source.entries[scale], source.entries[scale].shape
        held = not source.entries[name].quantized or _has_factors(source, name)
        if entry.type not in FLOATING or not held or name.startswith("token_embd"):
            raise InputError(f"{source.name}: tensor {scale} scales {name}, whose type has no scale; convert it again")
        if shape not in ((), (1,), (present[name].shape[0],) if len(present[name].shape) == 3 else ()):
            raise InputError(f"{source.name}: tensor {scale} is {_by(shape)}, not a single number; convert it again")
    if left:
        log.info("Unused tensors (%d): %s", len(left), ", ".join(left))
    if "output.weight" in present:  # the embedding is not the head too
        present["token_embd.weight"] = Spec(present["token_embd.weight"].shape, "table")
    return present, scales


def check_present(source: Source, specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """Return the specs of those tensors that are there.

    Raises InputError before any is read: one that is not optional is missing, can't be read or has another shape.
    """
    missing = [name for name, spec in specs.items() if not spec.optional and name not in source.entries]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(
            f"{source.name}: {'tensors' if missing[1:] else 'tensor'} {', '.join(missing[:3])}{more} missing; "
            "the file is incomplete, download it again"
        )
    present = {name: spec for name, spec in specs.items() if name in source.entries}
    for name, spec in present.items():
        shape = source.entries[name].shape
        if not source.entries[name].readable:
            raise InputError(
                f"{source.name}: tensor {name} is {source.entries[name].type}, which can't be loaded yet; "
                f"take a file in one of {', '.join(sorted(SUPPORTED))}"
            )
        if shape != spec.shape and not (spec.shape == (1,) and shape == ()):
            raise InputError(
                f"{source.name}: tensor {name} is {_by(shape)}, but the configuration calls for {_by(spec.shape)}; "
                "the file is damaged or was converted wrongly"
            )
    return present


def sizes(source: Source, present: dict[str, Spec]) -> tuple[int, int]:
    """Return the bytes of all weights held packed, and held dense."""
    packed = dense = 0
    for name, spec in present.items():
        entry = source.entries[name]
        widened = not entry.quantized and spec.role == "matrix" and on_cpu()
        kept = 4 * prod(spec.shape) if widened else entry.n_bytes
        packed += kept
        dense += kept if spec.role == "table" else 4 * prod(spec.shape)
    return packed, dense


def fusions(source: Source, present: dict[str, Spec], layers: int) -> dict[str, list[str]]:
    """Return the tensors to join, in the order of their rows: target name -> [gate, up] or [q, k] or [q, k, v].

    Rows of different types can't share an array. Those of gate and up are equally long, and those of q, k and v.
    """
    joined: dict[str, list[str]] = {}
    types = {name: source.entries[name].type for name in present}
    for suffix, what in ((".weight", "MLP layers"), ("_exps.weight", "expert layers")):
        pairs = [[f"blk.{i}.ffn_{half}{suffix}" for half in ("gate", "up")] for i in range(layers)]
        pairs = [pair for pair in pairs if all(name in types for name in pair)]
        fused = {gate.replace("gate", "gate_up"): [gate, up] for gate, up in pairs if types[gate] == types[up]}
        joined |= fused
        if pairs:
            log.info("Fused gate+up on %d %s (%d left unfused)", len(fused), what, len(pairs) - len(fused))
    for i in range(layers):
        q, k, v = (f"blk.{i}.attn_{x}.weight" for x in "qkv")
        if q in types and types.get(k) == types[q]:
            joined[f"blk.{i}.attn_qk.weight"] = [q, k, v] if types.get(v) == types[q] else [q, k]
    return joined


def assemble(config: Config, weights: dict[str, Weight], part: Part | None = None) -> Weights:
    """Put weights into the model's fields, which are named after the GGUF's tensors."""
    top: dict[str, Any] = {}
    per_layer: list[dict[str, Any]] = [{} for _ in config.layers]
    for name, weight in weights.items():
        if name.startswith("blk."):
            _, i, field = name.split(".", 2)
            per_layer[int(i)][field.removesuffix(".weight").replace(".", "_")] = weight
        else:
            top[name.removesuffix(".weight")] = weight
    if "output" not in top:  # tied; a rank with the whole table has its rows of the head there
        table: Weight = top["token_embd"]
        top["output"] = table if part is None or table.shape[0] == len(part.rows) else rows_of(table, part.rows)
    top.setdefault("token_embd", top["output"])  # a rank that embeds no tokens
    return Weights(layers=tuple(Layer(**fields) for fields in per_layer), **top)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape) or "a single number"
