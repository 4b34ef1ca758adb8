"""The decode step on a CPU: forward.py for a token of each of a few states, in numpy.

In: tokens, and a `KVState` for each. Out: logits. MLX's Linux wheels multiply by a reference BLAS, and each of its
operations costs some 10 us to build and to schedule: a step of a small model is mostly that. numpy shares MLX's memory,
so weights, keys and values are read where they lie. Weights that stayed packed, where memory is short, are left to
`stock`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from ..config import LayerConfig
from ..kv.segments import LayerKV, SegmentLayout, sealed
from ..kv.state import KVState
from ..ops import cores, stock
from ..ops.stock import Weight
from .weights import Layer, Loaded

Pair = tuple[np.ndarray, np.ndarray]


def numpy_steps(states: Sequence[KVState]) -> bool:
    """Return True if a step can go on in these states: their keys and values are fp32."""
    return all(state.kv == "full" and state.dtype == mx.float32 for state in states)


class NumpyStep:
    """A model's fp32 weights as numpy sees them, and the step."""

    def __init__(self, model: Loaded) -> None:
        self.model, self.config = model, model.config
        self.views: dict[int, np.ndarray] = {}  # by id of the weight, which the model keeps
        for holder in (model.weights, *model.weights.layers):
            for weight in vars(holder).values():
                if isinstance(weight, mx.array) and weight.dtype == mx.float32:
                    self.views[id(weight)] = np.asarray(weight)
        self.frequencies = {kind: 1 / np.asarray(waves) for kind, waves in model.wavelengths.items()}

    def run(self, tokens: Sequence[int], states: Sequence[KVState]) -> tuple[mx.array, mx.array]:
        """Read a token into each of B states that `numpy_steps` takes.

        Returns:
            Logits, fp32 [B, vocab], and hidden states after the last norm, fp32 [B, hidden].
        """
        hidden = self.norm(self.read(tokens, states), self.model.weights.output_norm)
        logits, cap = self.product(hidden, self.model.weights.output), np.float32(self.config.softcap)
        if cap:
            logits = np.tanh(logits / cap) * cap
        return mx.array(logits), mx.array(hidden)

    def read(self, tokens: Sequence[int], states: Sequence[KVState], wanted: bool = True) -> np.ndarray:
        """Read the tokens; return their hidden states before the last norm, [B, hidden].

        Not `wanted`: only keys and values are, and the layers after the last that makes some are left out.
        """
        c, w, layers = self.config, self.model.weights, [state.layers for state in states]
        x: np.ndarray = self.rows(w.token_embd, tokens) * np.float32(math.sqrt(c.hidden))  # [B, hidden]
        per_layer = self.per_layer_inputs(tokens, x)
        positions = [state.length for state in states]
        turns = {kind: _turn(positions, waves) for kind, waves in self.frequencies.items()}
        for i, layer in enumerate(w.layers):
            shape = c.layers[i]
            q, k, v = self.qkv(layer, shape, self.norm(x, layer.attn_norm))
            if k is not None and v is not None:
                k = _rotate(self.norm(k, layer.attn_k_norm), turns[shape.sliding])
                v = self.norm(v, None) if c.value_norm else v
                for n, state in enumerate(states):
                    window = c.window if shape.sliding else None
                    layers[n][i] = _appended(layers[n][i], k[n], v[n], state.layout, window)
                    state.stage(i, layers[n][i])
            if i == c.own_kv_layers - 1 and not wanted:
                break
            q = _rotate(self.norm(q, layer.attn_q_norm), turns[shape.sliding])
            h = np.stack([self.attention(q[n], kv[shape.kv_layer], shape) for n, kv in enumerate(layers)])
            x = x + self.norm(self.product(h, layer.attn_output), layer.post_attention_norm)
            h = self.mlp(layer, x) if layer.ffn_gate_inp is None else self.mlp_and_experts(layer, x)
            x = x + self.norm(h, layer.post_ffw_norm)
            if per_layer is not None:
                assert layer.inp_gate is not None and layer.proj is not None
                h = _gelu(self.product(x, layer.inp_gate)) * per_layer[:, i]
                x = x + self.norm(self.product(h, layer.proj), layer.post_norm)
            if layer.layer_output_scale is not None:
                x = x * self.views[id(layer.layer_output_scale)]
        for token, state in zip(tokens, states, strict=True):
            state.advance(token)
        return x

    def norm(self, x: np.ndarray, weight: mx.array | None) -> np.ndarray:
        """`stock.rms_norm` over the last axis."""
        mean = np.einsum("...i,...i->...", x, x)[..., None] / np.float32(x.shape[-1])
        y: np.ndarray = x / np.sqrt(mean + np.float32(self.config.eps))
        return y if weight is None else y * self.views[id(weight)]

    def product(self, x: np.ndarray, w: Weight | None) -> np.ndarray:
        """`stock.linear`: x [B, K], w [N, K] -> [B, N]."""
        assert w is not None
        view = self.views.get(id(w))
        return np.asarray(stock.linear(mx.array(x), w)) if view is None else cores.product(x, view)

    def rows(self, table: Weight, tokens: Sequence[int]) -> np.ndarray:
        """Return rows of a table [V, K], fp32 [B, K]."""
        view = self.views.get(id(table))
        rows: np.ndarray = np.asarray(stock.embed(mx.array([*tokens]), table)) if view is None else view[[*tokens]]
        return rows

    def per_layer_inputs(self, tokens: Sequence[int], x: np.ndarray) -> np.ndarray | None:
        """Return the per-layer embeddings, [B, layers, P], of tokens and their embeddings x."""
        w, c = self.model.weights, self.config
        if w.per_layer_token_embd is None:
            return None
        shape = (len(tokens), len(c.layers), c.ple)
        own = self.rows(w.per_layer_token_embd, tokens).reshape(shape) * np.float32(math.sqrt(c.ple))
        projected = self.product(x, w.per_layer_model_proj).reshape(shape) * np.float32(c.hidden**-0.5)
        both: np.ndarray = (self.norm(projected, w.per_layer_proj_norm) + own) * np.float32(2**-0.5)
        return both

    def qkv(
        self, layer: Layer, shape: LayerConfig, h: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Return raw queries [B, H, D], keys and values [B, G, D]; no keys: another layer's serve."""
        heads = (len(h), -1, shape.head_dim)
        if layer.attn_qk is not None:
            ends = [shape.heads, shape.heads + shape.kv_heads]
            q, k, v = np.split(self.product(h, layer.attn_qk).reshape(heads), ends, axis=1)
            if v.size:
                return q, k, v
        else:
            q = self.product(h, layer.attn_q).reshape(heads)
            if layer.attn_k is None:
                return q, None, None
            k = self.product(h, layer.attn_k).reshape(heads)
        return q, k, k if layer.attn_v is None else self.product(h, layer.attn_v).reshape(heads)

    def attention(self, q: np.ndarray, kv: LayerKV, shape: LayerConfig) -> np.ndarray:
        """Let queries [H, D] attend to all that a layer's last token sees: [H * D]."""
        first = max(0, kv.stop - self.config.window) if shape.sliding else 0
        rows = q.reshape(shape.kv_heads, -1, shape.head_dim) * np.float32(self.config.attention_scale)
        return stock.attend(rows, _seen(kv, first), None).reshape(-1)

    def mlp(self, layer: Layer, x: np.ndarray) -> np.ndarray:
        h = self.norm(x, layer.ffn_norm)
        if layer.ffn_gate_up is not None:
            gate, up = np.split(self.product(h, layer.ffn_gate_up), 2, axis=-1)
        else:
            gate, up = self.product(h, layer.ffn_gate), self.product(h, layer.ffn_up)
        return self.product(_gelu(gate) * up, layer.ffn_down)

    def mlp_and_experts(self, layer: Layer, x: np.ndarray) -> np.ndarray:
        """Return the dense MLP and the chosen experts, each under its own norm, summed: [B, hidden]."""
        c = self.config
        dense = self.norm(self.mlp(layer, x), layer.post_ffw_norm_1)
        scale = self.views[id(layer.ffn_gate_inp_scale)]
        scores = self.product(self.norm(x, None) * np.float32(c.hidden**-0.5) * scale, layer.ffn_gate_inp)
        chosen = np.argpartition(-scores, c.experts_used - 1)[:, : c.experts_used]  # [B, E']
        share = np.take_along_axis(scores, chosen, axis=-1)
        share = np.exp(share - share.max(axis=-1, keepdims=True))
        share /= share.sum(axis=-1, keepdims=True)
        if layer.ffn_down_exps_scale is not None:
            share = share * self.views[id(layer.ffn_down_exps_scale)][chosen]
        h = np.repeat(self.norm(x, layer.pre_ffw_norm_2)[:, None], c.experts_used, axis=1)
        if layer.ffn_gate_up_exps is not None:
            gate, up = np.split(self.experts(h, layer.ffn_gate_up_exps, chosen), 2, axis=-1)
        else:
            gate, up = (self.experts(h, w, chosen) for w in (layer.ffn_gate_exps, layer.ffn_up_exps))
        out = (share[..., None] * self.experts(_gelu(gate) * up, layer.ffn_down_exps, chosen)).sum(axis=1)
        both: np.ndarray = dense + self.norm(out, layer.post_ffw_norm_2)
        return both

    def experts(self, x: np.ndarray, w: Weight | None, chosen: np.ndarray) -> np.ndarray:
        """`stock.expert_linear`: each row of x [B, E', K] through its expert of w [E, N, K]: [B, E', N]."""
        assert w is not None
        view = self.views.get(id(w))
        if view is None:
            return np.asarray(stock.expert_linear(mx.array(x), w, mx.array(chosen.astype(np.int32))))
        out = np.empty((*chosen.shape, w.shape[1]), np.float32)
        for e in np.unique(chosen):
            rows = chosen == e
            out[rows] = x[rows] @ view[e].T
        return out


def _gelu(x: np.ndarray) -> np.ndarray:
    """`stock.gelu`."""
    inner = np.float32(0.7978845608028654) * x * (1 + np.float32(0.044715) * x * x)
    y: np.ndarray = np.float32(0.5) * x * (1 + np.tanh(inner))
    return y


def _turn(positions: Sequence[int], frequencies: np.ndarray) -> Pair:
    """Return cosines and sines of RoPE at positions, [B, 1, D / 2]."""
    angles = np.array(positions, np.float32)[:, None, None] * frequencies
    return np.cos(angles), np.sin(angles)


def _rotate(heads: np.ndarray, turn: Pair) -> np.ndarray:
    """Apply RoPE to heads [.., D]; dimension i goes with i + D / 2."""
    cos, sin = turn
    a, b = np.split(heads, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _appended(kv: LayerKV, k: np.ndarray, v: np.ndarray, layout: SegmentLayout, window: int | None) -> LayerKV:
    """Return a layer with a token's keys and values, [G, D], added: a copy of its tail with a row more."""
    if kv.count == layout.tail:
        kv = sealed(kv, layout, window)
    tails = []
    for tail, row in ((kv.tail_keys, k), (kv.tail_values, v)):
        copy = mx.array(np.asarray(tail))
        np.asarray(copy)[0, :, kv.count] = row
        tails.append(copy)
    return replace(kv, tail_keys=tails[0], tail_values=tails[1], count=kv.count + 1, stop=kv.stop + 1)


def _seen(kv: LayerKV, first: int) -> list[Pair]:
    """Return keys and values [G, n, D] of a layer's tokens from `first` on."""
    pieces = [(s.start, s.stop, s.keys, s.values) for s in kv.segments]
    pieces.append((kv.stop - kv.count, kv.stop, kv.tail_keys, kv.tail_values))
    seen = []
    for start, stop, keys, values in pieces:
        if stop > first:
            rows = slice(max(0, first - start), stop - start)
            seen.append((np.asarray(keys)[0, :, rows], np.asarray(values)[0, :, rows]))
    return seen
