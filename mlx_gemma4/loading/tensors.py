"""The tensors that a model of a configuration has, and what a file says of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from ..config import Config
from ..memory import Holding
from ..ops.dispatch import Kernels
from ..ops.stock import Weight


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
