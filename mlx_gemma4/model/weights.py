"""A model's weights, under their GGUF names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from ..config import Config
from ..ops.dispatch import Kernels
from ..ops.stock import Weight
from ..shard import Part


@dataclass(frozen=True)
class Layer:
    """The weights of one layer, under their GGUF names. None: this kind of layer has none."""

    attn_norm: mx.array  # norms: [hidden]
    attn_q_norm: mx.array  # [D]
    attn_output: Weight  # [hidden, H * D]
    post_attention_norm: mx.array
    ffn_norm: mx.array
    ffn_down: Weight  # [hidden, ffn]
    post_ffw_norm: mx.array
    attn_qk: Weight | None = None  # q's rows, k's and perhaps v's: [(H + G or 2 G) * D, hidden]; None: apart, below
    attn_q: Weight | None = None  # [H * D, hidden]
    attn_k: Weight | None = None  # [G * D, hidden]
    attn_v: Weight | None = None  # none of the three: values are the keys before norm and RoPE
    attn_k_norm: mx.array | None = None  # [D]; None: shares another layer's keys and values
    ffn_gate_up: Weight | None = None  # [2 * ffn, hidden], gate's rows first; None: apart, below
    ffn_gate: Weight | None = None  # [ffn, hidden]
    ffn_up: Weight | None = None
    layer_output_scale: mx.array | None = None  # [1]; None: 1
    # per-layer embeddings (E2B, E4B), P wide
    inp_gate: Weight | None = None  # [P, hidden]
    proj: Weight | None = None  # [hidden, P]
    post_norm: mx.array | None = None
    # experts (26B-A4B), E of them, F wide, beside the dense MLP
    ffn_gate_inp: Weight | None = None  # [E, hidden], the router
    ffn_gate_inp_scale: mx.array | None = None  # [hidden]
    ffn_gate_up_exps: Weight | None = None  # [E, 2 * F, hidden]; None: apart
    ffn_gate_exps: Weight | None = None  # [E, F, hidden]
    ffn_up_exps: Weight | None = None
    ffn_down_exps: Weight | None = None  # [E, hidden, F]
    ffn_down_exps_scale: mx.array | None = None  # [E]; None: 1
    pre_ffw_norm_2: mx.array | None = None
    post_ffw_norm_1: mx.array | None = None
    post_ffw_norm_2: mx.array | None = None


@dataclass(frozen=True)
class Weights:
    """All weights of a model."""

    token_embd: Weight  # [vocab, hidden]
    output: Weight  # the head, [vocab, hidden]; the embedding itself where they are tied
    output_norm: mx.array
    layers: tuple[Layer, ...]
    rope_freqs: mx.array | None = None  # [D / 2], divides the frequencies of global layers
    per_layer_token_embd: Weight | None = None  # [vocab, layers * P]
    per_layer_model_proj: Weight | None = None  # [layers * P, hidden]
    per_layer_proj_norm: mx.array | None = None  # [P]


@dataclass(frozen=True)
class Loaded:
    """A model as its forward passes read it."""

    config: Config
    weights: Weights
    kv_dtype: mx.Dtype  # of keys and values, and of activations between kernels
    wavelengths: Mapping[bool, mx.array]  # of RoPE, fp32 [D / 2]; True: of sliding layers, False: of global ones
    kernels: Kernels | None = None  # None: stock operations run everything
    part: Part | None = None  # of the model, where several processes run it; None: all of it is here
