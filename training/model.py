"""Gemma 4 in the E2B shape, in plain PyTorch, for training: read it top to bottom, in the order of the forward pass.

In: token ids (B, T). Out: logits (B, T, V) in fp32, softcapped. Every tensor has the name and the orientation that it
has in a GGUF file, so that export is a loop over the state dict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    vocab: int = 4096
    hidden: int = 256
    layers: int = 10  # four sliding, one global, twice
    shared: int = 5  # the last ones use the keys and values of earlier layers
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 64  # sliding
    head_dim_global: int = 128
    ffn: int = 256  # twice that on the kv-shared layers
    ple: int = 128  # width of the per-layer embedding; times `layers` a multiple of 256
    window: int = 256
    context: int = 2048
    softcap: float = 30.0
    eps: float = 1e-6
    theta: float = 1e4
    theta_global: float = 1e6
    rotary_part: float = 0.25  # of a global head's frequencies that turn

    def is_sliding(self, layer: int) -> bool:
        return layer % 5 != 4

    def owns_kv(self, layer: int) -> bool:
        return layer < self.layers - self.shared

    def kv_source(self, layer: int) -> int:
        """The layer whose keys and values `layer` attends to."""
        own = self.layers - self.shared
        return layer if layer < own else own - (2 if self.is_sliding(layer) else 1)

    def dim(self, layer: int) -> int:
        return self.head_dim if self.is_sliding(layer) else self.head_dim_global

    def ffn_width(self, layer: int) -> int:
        return self.ffn if self.owns_kv(layer) else 2 * self.ffn


def rope_freqs(shape: Shape) -> Tensor:
    """Divisors of a global head's frequencies (head_dim_global / 2,): 1 for those that turn, 1e30 for the others."""
    half = shape.head_dim_global // 2
    turning = int(half * shape.rotary_part)
    return torch.cat([torch.ones(turning), torch.full((half - turning,), 1e30)])


def rope_table(shape: Shape, sliding: bool, length: int) -> Tensor:
    """Cosines and sines (2, length, dim / 2) of one kind of layer."""
    dim = shape.head_dim if sliding else shape.head_dim_global
    theta = shape.theta if sliding else shape.theta_global
    divisor = theta ** (torch.arange(0, dim, 2).float() / dim)
    if not sliding:
        divisor = divisor * rope_freqs(shape)
    angles = torch.arange(length).float()[:, None] / divisor
    return torch.stack([angles.cos(), angles.sin()])


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm in fp32; `weight` multiplies as it is (no 1 +)."""
    return F.rms_norm(x.float(), x.shape[-1:], weight, eps).type_as(x)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """RoPE on (B, H, T, D), pairs (i, i + D/2)."""
    cos, sin = table[0].type_as(x), table[1].type_as(x)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Gemma4(nn.Module):
    """All weights in one flat dict of parameters, `w`, under their GGUF names with dots as underscores."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape, self.drop = shape, dropout
        self.w = nn.ParameterDict({name.replace(".", "/"): p for name, p in initial(shape).items()})
        self.register_buffer("rope_sliding", rope_table(shape, True, shape.context), persistent=False)
        self.register_buffer("rope_global", rope_table(shape, False, shape.context), persistent=False)

    def get(self, name: str) -> Tensor:
        return self.w[name.replace(".", "/")]

    def attention(self, i: int, x: Tensor, mask: Tensor, kv: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        s, (b, t, _), d = self.shape, x.shape, self.shape.dim(i)
        table = (self.rope_sliding if s.is_sliding(i) else self.rope_global)[:, :t]
        heads = lambda y: y.view(b, t, -1, d).transpose(1, 2)  # noqa: E731  (B, H, T, D)
        q = rotate(rms(heads(F.linear(x, self.get(f"blk.{i}.attn_q"))), self.get(f"blk.{i}.attn_q_norm"), s.eps), table)
        if s.owns_kv(i):
            k = rms(heads(F.linear(x, self.get(f"blk.{i}.attn_k"))), self.get(f"blk.{i}.attn_k_norm"), s.eps)
            v = rms(heads(F.linear(x, self.get(f"blk.{i}.attn_v"))), None, s.eps)
            kv[i] = (rotate(k, table), v)
        k, v = (y.expand(b, s.heads, t, d) for y in kv[s.kv_source(i)])  # one kv head
        if s.is_sliding(i):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        return F.linear(out.transpose(1, 2).reshape(b, t, -1), self.get(f"blk.{i}.attn_output"))

    def block(self, i: int, x: Tensor, ple: Tensor, mask: Tensor, kv: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        """One layer. ple is (B, T, ple)."""
        w = lambda name: self.get(f"blk.{i}.{name}")  # noqa: E731
        norm = lambda y, name: rms(y, w(name), self.shape.eps)  # noqa: E731
        drop = lambda y: F.dropout(y, self.drop, self.training)  # noqa: E731
        x = x + drop(norm(self.attention(i, norm(x, "attn_norm"), mask, kv), "post_attention_norm"))
        y = norm(x, "ffn_norm")
        y = F.gelu(F.linear(y, w("ffn_gate")), approximate="tanh") * F.linear(y, w("ffn_up"))
        x = x + drop(norm(F.linear(drop(y), w("ffn_down")), "post_ffw_norm"))
        y = F.gelu(F.linear(x, w("inp_gate")), approximate="tanh") * ple
        x = x + drop(norm(F.linear(drop(y), w("proj")), "post_norm"))
        return x * w("layer_output_scale").type_as(x)

    def hidden(self, tokens: Tensor, kv: dict[int, tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """(B, T) -> (B, T, hidden), normed. `kv` takes each layer's own keys and values."""
        s, (b, t) = self.shape, tokens.shape
        x = F.embedding(tokens, self.get("token_embd")) * math.sqrt(s.hidden)
        if torch.is_autocast_enabled():
            x = x.to(torch.bfloat16)
        x = F.dropout(x, self.drop, self.training)
        ple = F.linear(x, self.get("per_layer_model_proj")).view(b, t, s.layers, s.ple) * s.hidden**-0.5
        ple = rms(ple, self.get("per_layer_proj_norm"), s.eps)
        own = F.embedding(tokens, self.get("per_layer_token_embd")).view(b, t, s.layers, s.ple) * math.sqrt(s.ple)
        ple = (ple + F.dropout(own.type_as(ple), self.drop, self.training)) / math.sqrt(2)
        back = torch.arange(t, device=tokens.device)[:, None] - torch.arange(t, device=tokens.device)
        mask = (back >= 0) & (back < s.window)
        kv = {} if kv is None else kv
        for i in range(s.layers):
            x = self.block(i, x, ple[:, :, i], mask, kv)
        return rms(x, self.get("output_norm"), s.eps)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = F.linear(self.hidden(tokens), self.get("token_embd")).float()
        return self.shape.softcap * torch.tanh(logits / self.shape.softcap)


def initial(s: Shape) -> dict[str, nn.Parameter]:
    """Fresh parameters by GGUF name (without `.weight`)."""
    made: dict[str, nn.Parameter] = {}

    def matrix(name: str, rows: int, columns: int, std: float | None = None) -> None:
        made[name] = nn.Parameter(torch.randn(rows, columns) * (std or columns**-0.5))

    def vector(name: str, size: int, value: float) -> None:
        made[name] = nn.Parameter(torch.full((size,), value))

    late = (3 * s.layers) ** -0.5  # what a branch adds at first, so that the sum keeps its size
    matrix("token_embd", s.vocab, s.hidden, s.hidden**-0.5)
    matrix("per_layer_token_embd", s.vocab, s.layers * s.ple, s.ple**-0.5)
    matrix("per_layer_model_proj", s.layers * s.ple, s.hidden)
    vector("per_layer_proj_norm", s.ple, 1.0)
    vector("output_norm", s.hidden, 0.3)  # tied head: a token would else predict itself at first
    for i in range(s.layers):
        b, d = f"blk.{i}.", s.dim(i)
        matrix(b + "attn_q", s.heads * d, s.hidden)
        matrix(b + "attn_output", s.hidden, s.heads * d)
        vector(b + "attn_q_norm", d, d**-0.25)  # scores start with the usual 1 / sqrt(d)
        if s.owns_kv(i):
            matrix(b + "attn_k", s.kv_heads * d, s.hidden)
            matrix(b + "attn_v", s.kv_heads * d, s.hidden)
            vector(b + "attn_k_norm", d, d**-0.25)
        matrix(b + "ffn_gate", s.ffn_width(i), s.hidden)
        matrix(b + "ffn_up", s.ffn_width(i), s.hidden)
        matrix(b + "ffn_down", s.hidden, s.ffn_width(i))
        matrix(b + "inp_gate", s.ple, s.hidden)
        matrix(b + "proj", s.hidden, s.ple)
        for name in ("attn_norm", "ffn_norm"):
            vector(b + name, s.hidden, 1.0)
        for name in ("post_attention_norm", "post_ffw_norm", "post_norm"):
            vector(b + name, s.hidden, late)
        vector(b + "layer_output_scale", 1, 1.0)
    return made


def state(model: Gemma4) -> dict[str, Tensor]:
    """Weights by GGUF name, with `.weight`."""
    return {name.replace("/", ".") + ".weight": p.detach() for name, p in model.w.items()}
