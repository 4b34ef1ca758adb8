"""From a file to a model: account for every tensor, fuse gate and up, pack, and let the file go.

In: a GGUF, or a folder of safetensors. Out: a `Model` whose weights are MLX arrays. This is the one way in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from . import packing, quant
from .config import Config
from .decode import Kernels
from .errors import InputError
from .gguf_file import GGUFFile, TensorInfo
from .memory import Holding, Plan, make_plan, on_cpu
from .model import Layer, Model, Weights
from .ops import Weight

log = logging.getLogger("mlx_gemma4")

Progress = Callable[[int, int], None]  # bytes read, bytes in all


@dataclass(frozen=True)
class Spec:
    """A tensor that a configuration calls for."""

    shape: tuple[int, ...]  # rows first; experts [E, N, K]
    role: Literal["vector", "matrix", "table"]  # a vector stays fp32; a table is only looked up in
    optional: bool = False


@dataclass(frozen=True)
class Entry:
    """A tensor that a file has."""

    shape: tuple[int, ...]
    type: str  # two tensors may be joined when their types are equal
    n_bytes: int


@dataclass(frozen=True)
class Source:
    """Where tensors come from, by GGUF name."""

    name: str
    entries: Mapping[str, Entry]
    # Reads tensors of equal type as one weight, their rows joined in the order named; kernels may help.
    read: Callable[[list[str], Spec, Holding, Kernels | None], Weight]
    packed_bytes: Callable[[str, Spec], int]


def load_model(
    config: Config,
    source: Source,
    holding: Literal["auto", "packed", "dense"] = "auto",
    fuse: bool = True,
    progress: Progress | None = None,
    kernels: Kernels | None = None,
) -> tuple[Model, Plan]:
    """Read every tensor that the configuration calls for and build the model.

    Args:
        config: what the file's metadata says.
        source: the file's tensors.
        holding: "packed" keeps quantized blocks as they are, "dense" expands them to fp32; "auto" decides
            by device and memory.
        fuse: join gate and up, and q, k and v, where their types allow it (tests compare).
        progress: called as bytes are read.
        kernels: pack weights and run the model; None: stock operations run everything.

    Raises:
        InputError: a tensor is missing, has another shape or a type that can't be read; too little memory.
    """
    specs = tensor_specs(config)
    present = _account(source, specs)
    packed, dense = _sizes(source, present)
    plan = make_plan(packed, dense, holding, source.name, _kv_bytes_per_token(config))
    log.info("Memory plan: %s", plan.describe())
    joined = _fusions(source, present, len(config.layers)) if fuse else {}

    total, done = sum(source.entries[name].n_bytes for name in present), 0
    weights: dict[str, Weight] = {}
    parts_of = {part: target for target, parts in joined.items() for part in parts}
    for name, spec in present.items():
        target = parts_of.get(name, name)
        if target in weights:
            continue  # went in with its other half
        parts = joined.get(target, [name])
        weights[target] = source.read(parts, spec, plan.holding, kernels)
        done += sum(source.entries[part].n_bytes for part in parts)
        if progress:
            progress(done, total)
    packing.done()
    return Model(config, _assemble(config, weights), kernels), plan


def tensor_specs(config: Config) -> dict[str, Spec]:
    """Every tensor that a configuration calls for, by GGUF name, in the order of the forward pass."""
    c, specs = config, {}

    def add(
        name: str, *shape: int, role: Literal["vector", "matrix", "table"] | None = None, opt: bool = False
    ) -> None:
        kind: Literal["vector", "matrix", "table"] = role or ("vector" if len(shape) == 1 else "matrix")
        specs[name] = Spec(shape, kind, opt)

    add("token_embd.weight", c.vocab, c.hidden)
    if c.ple:
        add("per_layer_token_embd.weight", c.vocab, len(c.layers) * c.ple, role="table")
        add("per_layer_model_proj.weight", len(c.layers) * c.ple, c.hidden)
        add("per_layer_proj_norm.weight", c.ple)
    global_dims = [layer.head_dim for layer in c.layers if not layer.sliding]
    if c.architecture == "gemma4" and global_dims:
        add("rope_freqs.weight", global_dims[0] // 2, opt=c.rope_rotated is not None)
    for i, layer in enumerate(c.layers):
        blk, q, kv = f"blk.{i}.", layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        add(blk + "attn_norm.weight", c.hidden)
        add(blk + "attn_q.weight", q, c.hidden)
        add(blk + "attn_q_norm.weight", layer.head_dim)
        if layer.kv_layer == i:
            add(blk + "attn_k.weight", kv, c.hidden)
            # Gemma 4's larger models have no value projection on global layers: values are the keys.
            add(blk + "attn_v.weight", kv, c.hidden, opt=c.architecture == "gemma4" and not layer.sliding)
            add(blk + "attn_k_norm.weight", layer.head_dim)
        add(blk + "attn_output.weight", c.hidden, q)
        add(blk + "post_attention_norm.weight", c.hidden)
        add(blk + "ffn_norm.weight", c.hidden)
        add(blk + "ffn_gate.weight", layer.ffn, c.hidden)
        add(blk + "ffn_up.weight", layer.ffn, c.hidden)
        add(blk + "ffn_down.weight", c.hidden, layer.ffn)
        add(blk + "post_ffw_norm.weight", c.hidden)
        if c.experts:
            add(blk + "ffn_gate_inp.weight", c.experts, c.hidden)
            add(blk + "ffn_gate_inp.scale", c.hidden)
            add(blk + "pre_ffw_norm_2.weight", c.hidden)
            # Either joined in the file already, or apart; `_account` settles which.
            add(blk + "ffn_gate_up_exps.weight", c.experts, 2 * c.expert_ffn, c.hidden, opt=True)
            add(blk + "ffn_gate_exps.weight", c.experts, c.expert_ffn, c.hidden, opt=True)
            add(blk + "ffn_up_exps.weight", c.experts, c.expert_ffn, c.hidden, opt=True)
            add(blk + "ffn_down_exps.weight", c.experts, c.hidden, c.expert_ffn)
            add(blk + "ffn_down_exps.scale", c.experts, opt=True)
            add(blk + "post_ffw_norm_1.weight", c.hidden)
            add(blk + "post_ffw_norm_2.weight", c.hidden)
        if c.ple:
            add(blk + "inp_gate.weight", c.ple, c.hidden)
            add(blk + "proj.weight", c.hidden, c.ple)
            add(blk + "post_norm.weight", c.hidden)
        if c.architecture == "gemma4":
            add(blk + "layer_output_scale.weight", 1, opt=True)
    add("output_norm.weight", c.hidden)
    add("output.weight", c.vocab, c.hidden, opt=True)  # absent: the embedding is the head too
    return specs


def _account(source: Source, specs: dict[str, Spec]) -> dict[str, Spec]:
    """Match the file's tensors with what is called for; name those that nothing uses.

    Returns:
        the specs that the file has, the embedding as a table where another tensor is the head.
    """
    needed = dict(specs)
    for name in specs:
        # Experts' gate and up: whichever form the file has must be whole.
        if name.endswith("ffn_gate_up_exps.weight") and name not in source.entries:
            for half in ("gate", "up"):
                apart = name.replace("gate_up", half)
                needed[apart] = Spec(specs[apart].shape, specs[apart].role)
        elif name.endswith("ffn_gate_up_exps.weight"):
            for half in ("gate", "up"):
                del needed[name.replace("gate_up", half)]
    missing = [name for name, spec in needed.items() if not spec.optional and name not in source.entries]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(
            f"{source.name}: {'tensors' if missing[1:] else 'tensor'} {', '.join(missing[:3])}{more} missing; "
            "the file is incomplete, download it again"
        )
    present = {name: spec for name, spec in needed.items() if name in source.entries}
    for name, spec in present.items():
        shape = source.entries[name].shape
        if shape != spec.shape and not (spec.shape == (1,) and shape == ()):
            raise InputError(
                f"{source.name}: tensor {name} is {_by(shape)}, but the configuration calls for {_by(spec.shape)}; "
                "the file is damaged or was converted wrongly"
            )
    unused = [name for name in source.entries if name not in present]
    if unused:
        log.info("Unused tensors (%d): %s", len(unused), ", ".join(unused))
    if "output.weight" in present:
        present["token_embd.weight"] = Spec(present["token_embd.weight"].shape, "table")
    return present


def _sizes(source: Source, present: dict[str, Spec]) -> tuple[int, int]:
    """Bytes of all weights held packed, and held dense."""
    packed = dense = 0
    for name, spec in present.items():
        kept = source.packed_bytes(name, spec)
        packed += kept
        dense += kept if spec.role == "table" else 4 * prod(spec.shape)
    return packed, dense


def _kv_bytes_per_token(config: Config) -> int:
    """Bytes of fp32 keys and values that a token adds to the layers that keep all of them."""
    own = [layer for i, layer in enumerate(config.layers) if layer.kv_layer == i and not layer.sliding]
    return sum(2 * 4 * layer.kv_heads * layer.head_dim for layer in own)


def _fusions(source: Source, present: dict[str, Spec], layers: int) -> dict[str, list[str]]:
    """Which tensors are joined, in the order of their rows: target name -> [gate, up] or [q, k] or [q, k, v].

    Rows of different types can't share an array, so those joined agree in type and in the length of a row.
    """
    joined: dict[str, list[str]] = {}

    def alike(*names: str) -> bool:
        return len({(source.entries[name].type, source.entries[name].shape[-1]) for name in names}) == 1

    for suffix, what in ((".weight", "MLP layers"), ("_exps.weight", "expert layers")):
        fused = apart = 0
        for i in range(layers):
            gate, up = (f"blk.{i}.ffn_{half}{suffix}" for half in ("gate", "up"))
            if gate not in present or up not in present:
                continue
            if alike(gate, up) and present[gate].shape == present[up].shape:
                joined[f"blk.{i}.ffn_gate_up{suffix}"] = [gate, up]
                fused += 1
            else:
                apart += 1
        if fused or apart:
            log.info("Fused gate+up on %d %s (%d left unfused)", fused, what, apart)
    for i in range(layers):
        q, k, v = (f"blk.{i}.attn_{x}.weight" for x in "qkv")
        if k in present and alike(q, k):
            joined[f"blk.{i}.attn_qk.weight"] = [q, k, v] if v in present and alike(k, v) else [q, k]
    return joined


def _assemble(config: Config, weights: dict[str, Weight]) -> Weights:
    """Sort weights by GGUF name into the model's fields, which carry the same names."""
    top: dict[str, Any] = {}
    per_layer: list[dict[str, Any]] = [{} for _ in config.layers]
    for name, weight in weights.items():
        if name.startswith("blk."):
            _, i, field = name.split(".", 2)
            per_layer[int(i)][field.removesuffix(".weight").replace(".", "_")] = weight
        else:
            top[name.removesuffix(".weight")] = weight
    top.setdefault("output", top["token_embd"])
    return Weights(layers=tuple(Layer(**fields) for fields in per_layer), **top)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape) or "a single number"


# The tensors of a GGUF


def gguf_source(file: GGUFFile) -> Source:
    """The tensors of an open GGUF: rows of raw blocks are joined, then packed or expanded, then let go."""

    def read(names: list[str], spec: Spec, holding: Holding, kernels: Kernels | None) -> Weight:
        infos = [file.tensors[name] for name in names]
        for info in infos:
            quant.check_supported(info, file.path)
        weight = _read_blocks(file, infos, spec, holding, kernels)
        if isinstance(weight, mx.array):
            mx.eval(weight)
        for name in names:
            file.release(name)
        return weight

    def packed_bytes(name: str, spec: Spec) -> int:
        info = file.tensors[name]
        widened = info.type not in quant.FORMATS and spec.role == "matrix" and on_cpu()
        return 4 * prod(spec.shape) if widened else info.n_bytes

    entries = {name: Entry(t.shape, t.type, t.n_bytes) for name, t in file.tensors.items()}
    return Source(str(file.path), entries, read, packed_bytes)


def _read_blocks(
    file: GGUFFile, infos: list[TensorInfo], spec: Spec, holding: Holding, kernels: Kernels | None
) -> Weight:
    """One weight from the raw rows of one tensor, or of several of the same type and row length."""
    first, shape, raw = infos[0], infos[0].shape, file.raw(infos[0].name)
    parts = [raw]
    if len(infos) > 1:
        # Experts are joined one by one: [E, N, bytes], not all gates before all ups.
        parts = [file.raw(info.name).reshape(*info.shape[:-1], info.row_bytes) for info in infos]
        shape = (*shape[:-2], sum(info.shape[-2] for info in infos), shape[-1])
    if first.type in quant.FORMATS and (holding == "packed" or spec.role == "table"):
        # A tensor may be half the file: its pages go as they are read, where there is one.
        let_go = partial(file.release, first.name) if len(infos) == 1 else None
        return packing.pack(parts, first.type, shape, kernels, let_go)
    if len(parts) > 1:
        raw = np.concatenate(parts, axis=-2).reshape(-1, first.row_bytes)
    if spec.role == "vector" or holding == "dense" or (spec.role == "matrix" and on_cpu()):
        return quant.dense(raw, first.type, shape, np.float32)
    return quant.dense(raw, first.type, shape, None)
