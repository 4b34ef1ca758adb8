"""The tensors that a configuration calls for, those that a file has, and the interface to read them.

In: a `Config`. Out: the name, shape and role of every tensor.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ..config import Config
from ..memory import Holding
from ..ops.dispatch import Kernels
from ..ops.stock import Weight

# What no model may have and not use, by GGUF names and by those of Hugging Face that have none.
OWN = re.compile(
    r"(blk\.|output|token_embd|per_layer).*|(model\.|language_model\.)*(layers\.|embed_tokens|lm_head|norm\.).*"
)
# But these: llama.cpp ignores the first too, and layers that share keys and values may carry along what they don't use.
IDLE = re.compile(r".*\.input_scale|.*rotary_emb\.inv_freq")
SHARED = re.compile(r"blk\.(\d+)\.attn_(k|v|k_norm)\.weight")

Role = Literal["vector", "matrix", "table"]


@dataclass(frozen=True)
class Spec:
    """A tensor that a configuration calls for."""

    shape: tuple[int, ...]  # rows first; experts [E, N, K]
    role: Role  # a vector stays fp32; a table is only looked up in
    optional: bool = False


@dataclass(frozen=True)
class Entry:
    """A tensor that a file has."""

    shape: tuple[int, ...]
    type: str  # two tensors may be joined when their types are equal
    n_bytes: int
    quantized: bool = False  # otherwise a matrix is widened to fp32 on a CPU
    readable: bool = True  # its type is one that can be loaded
    block: int = 1  # numbers of a row that are quantized together


@dataclass(frozen=True)
class Cut:
    """The part of a tensor to read: ranges of rows, one after the other, and of columns. Empty, None: all."""

    rows: tuple[range, ...] = ()
    columns: range | None = None

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the part of a tensor [.., N, K]."""
        shape = list(whole)
        if self.rows:
            shape[-2] = sum(map(len, self.rows))
        if self.columns is not None:
            shape[-1] = len(self.columns)
        return tuple(shape)


class Source(Protocol):
    """A file or folder with tensors, which go by their GGUF names. `name` is the path, for errors."""

    name: str
    entries: dict[str, Entry]

    def read(
        self, names: Sequence[str], spec: Spec, holding: Holding, kernels: Kernels | None, cuts: Sequence[Cut] = ()
    ) -> Weight:
        """Read tensors of equal type, once each, as one weight: their rows joined in this order.

        Args:
            names: one tensor, or several whose rows agree in type and length.
            holding: "packed" keeps quantized blocks, "dense" expands them to fp32; tables stay packed either way.
            kernels: pack on the GPU; None: on the CPU.
            cuts: the part of each to read; empty: all of all.
        """


def unused(config: Config, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return which of the names that no spec has may be left out, and which would change the result."""
    free: list[str] = []
    missed: list[str] = []
    for name in names:
        shared = SHARED.fullmatch(name)
        idle = (
            shared and int(shared[1]) < len(config.layers) and config.layers[int(shared[1])].kv_layer != int(shared[1])
        )
        (missed if OWN.fullmatch(name) and not IDLE.fullmatch(name) and not idle else free).append(name)
    return free, missed


def tensor_specs(config: Config) -> dict[str, Spec]:
    """Return every tensor that a configuration calls for, by GGUF name, in the order of the forward pass."""
    c, specs = config, {}

    def add(name: str, *shape: int, role: Role | None = None, opt: bool = False) -> None:
        specs[name] = Spec(shape, role or ("vector" if len(shape) == 1 else "matrix"), opt)

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
            # Either joined in the file already, or apart; `account` settles which.
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
