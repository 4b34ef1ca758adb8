"""The models: Gemma 4 (dense, mixture of experts, per-layer embeddings) and Gemma 3, in the order of a forward pass.

In: token ids and a `KVState`. Out: logits. A `Model` never changes once it is loaded and may serve any
number of states. Shapes beside the lines: T tokens, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..config import Config, LayerConfig
from ..execution import execution
from ..kv import quantization
from ..kv.file import load_state, save_state
from ..kv.segments import KVQuantizer, SegmentLayout
from ..kv.state import KVState
from ..memory import on_cpu
from ..ops import stock
from ..ops.dispatch import REPLAY, Kernels
from ..ops.quantize_kv import QUANTIZE_KV
from ..ops.routing import Routing
from ..ops.stock import Weight
from .decode import can_step, make_step
from .replay import Done, Pending, Replay
from .weights import Layer, Loaded, Weights


class Model:
    """Weights with the procedure that turns tokens into logits. Immutable."""

    def __init__(self, config: Config, weights: Weights, kernels: Kernels | None = None) -> None:
        """`kernels` run decode steps; None: stock operations run everything."""
        self.config = config
        self.weights = weights
        self.kernels = kernels
        self.loaded = Loaded(config, weights, self.kv_dtype)
        self._linear = kernels.linear if kernels else stock.linear
        self._geglu = stock.fused_geglu if kernels else stock.geglu
        self._wavelengths = {
            (layer.sliding, layer.head_dim): _rope_wavelengths(config, layer, weights.rope_freqs)
            for layer in config.layers
        }
        mx.eval(list(self._wavelengths.values()))
        self._step: Callable[[mx.array, KVState], mx.array] | None = None
        self._replay: Replay | None = None
        if kernels:
            self._step, self._replay = make_step(self.loaded, kernels, self._rope_of)

    def new_state(
        self,
        max_tokens: int | None = None,
        kv: str = "full",
        *,
        layout: SegmentLayout | None = None,
        dtype: mx.Dtype | None = None,
    ) -> KVState:
        """Make an empty KV state for this model.

        Args:
            max_tokens: how many it may hold; None: any number.
            kv: how global layers' keys and values are held: "full", or quantized: "q8" (8 bits), "tq4" (4 bits).
            layout: where segments end.
            dtype: of keys and values in full precision; None: fp32 on a CPU, fp16 on a GPU.
        """
        return KVState(self.config, dtype or self.kv_dtype, max_tokens, layout, kv, self.quantizers(kv))

    def quantizers(self, kv: str) -> dict[int, KVQuantizer]:
        """What quantizes the segments of each global layer with keys and values of its own; {} for "full"."""
        if kv not in quantization.BITS:
            return {}
        kernels = self.kernels
        quantize = quantization.quantize if kernels is None else lambda *args: kernels(QUANTIZE_KV, *args)
        return {i: KVQuantizer(kv, rotation, quantize) for i, rotation in self.rotations.items()}

    def save_state(self, state: KVState, path: str | Path) -> None:
        """Write a state of this model to a file, without its marks. Raises InputError."""
        save_state(state, path, self.fingerprint)

    def load_state(self, path: str | Path) -> KVState:
        """Read a state of this model that `save_state` wrote. Raises InputError."""
        return load_state(
            path, self.fingerprint, lambda kv, dtype, layout: self.new_state(None, kv, layout=layout, dtype=dtype)
        )

    @cached_property
    def fingerprint(self) -> str:
        """Tells models apart that would make different keys and values: shape, norms, and some rows of the weights.

        The same however the weights are held. Hex, 64 digits.
        """
        digest = hashlib.sha256(repr(self.config).encode())
        with execution():
            rows = [
                stock.embed(mx.arange(0, self.config.vocab, max(1, self.config.vocab // 16)), self.weights.token_embd)
            ]
            for layer in self.weights.layers:
                rows.append(layer.attn_norm)
                for weight in (layer.attn_q, layer.attn_k, layer.attn_output, layer.ffn_down):
                    if weight is not None:
                        rows.append(stock.embed(mx.array([0]), weight))
            # Copies: on NVIDIA what the host reads moves, and a replayed step may know where it lies (cuda_graph.py).
            rows = [row.astype(mx.float32) * 1 for row in rows]
            mx.eval(rows)
        for row in rows:
            digest.update(np.array(row).tobytes())
        return digest.hexdigest()

    @cached_property
    def rotations(self) -> dict[int, mx.array]:
        """For keys and values in codes: `kv.quantization.rotations` of each global layer that has any.

        What keys have in common is found by reading a few tokens of no meaning: it is the layer's, not the text's.
        """
        with execution():
            state = self.new_state()
            ids = np.random.PCG64(0).random_raw(state.layout.tail) % self.config.vocab
            self.prefill(mx.array(ids.astype(np.int32)), state)
            made = {}
            for i, kv in state.layers.items():
                shape, layer = self.config.layers[i], self.weights.layers[i]
                if not shape.sliding:
                    center = kv.tail_keys[0].astype(mx.float32).mean(axis=1)
                    made[i] = quantization.rotations(shape.head_dim, layer.attn_q_norm, layer.attn_k_norm, center)
            mx.eval(list(made.values()))
        return made

    @property
    def kv_dtype(self) -> mx.Dtype:
        """Of keys and values on this device."""
        return mx.float32 if on_cpu() else mx.float16

    def forward(self, ids: mx.array, state: KVState, *, all_logits: bool = False) -> mx.array:
        """Read tokens into the state.

        Args:
            ids: int [T], T at least 1, the tokens that follow those in `state`.
            state: what came before; takes the new keys and values. Scheduled on return, unless the caller
                holds `execution()` and does so itself.
            all_logits: give logits for each token, not for the last alone.

        Returns:
            fp32 logits for the next token, [vocab], or [T, vocab] with `all_logits`.
        """
        with execution() as outermost:
            state.check_room(ids.size)
            replay = self._replaying if ids.size == 1 else None
            replayed = None if replay is None else replay.begin(int(ids), state)
            if replayed is not None:
                logits = replayed.logits()[None]
            else:
                logits = self._read(ids, state, ids.size if all_logits else 1)
            logits = logits if all_logits else logits[-1]
            if outermost:
                mx.async_eval(logits, [] if state.borrower else state.arrays)
        return logits

    @property
    def replays(self) -> bool:
        """Whether `begin` starts a step that nobody waits for."""
        return self._replaying is not None

    @property
    def _replaying(self) -> Replay | None:
        """What replays steps; None: it can't here, or `doctor` has switched it off."""
        if self._replay is None or self._replay.broken or self.kernels is None or REPLAY in self.kernels.off:
            return None
        return self._replay

    def begin(self, token: int | Pending | Done, state: KVState) -> Pending | Done:
        """`forward` of one token, whose logits or likeliest token are asked for later.

        Where steps are replayed, the next may begin with the token of the one that is still under way: then that one's
        logits can't be asked for any more.
        """
        with execution():
            state.check_room(1)
            replay = self._replaying
            replayed = None if replay is None else replay.begin(token, state)
            if replayed is not None:
                return replayed
            ids = mx.array([token if isinstance(token, int) else token.best()])
            return Done(self._read(ids, state, 1)[-1])

    def _read(self, ids: mx.array, state: KVState, wanted: int) -> mx.array:
        """Logits of the last `wanted` tokens, or of all: a step that is not replayed, or all layers as in a prompt."""
        logits = self._stepped(ids, state)
        return self._head(self._layers(ids, state, wanted)) if logits is None else logits

    def _stepped(self, ids: mx.array, state: KVState) -> mx.array | None:
        """Logits of all tokens, read in one step; None: no step takes them."""
        if self._step and can_step(self.config, ids.size) and state.fits_tail(ids.size):
            return self._step(ids, state)
        return None

    def prefill(self, ids: mx.array, state: KVState) -> None:
        """Read tokens, int [T], into the state and want no logits: only keys and values are made."""
        with execution() as outermost:
            state.check_room(ids.size)
            if self._stepped(ids, state) is None:  # a step's logits are never computed here
                self._layers(ids, state, 0)
            if outermost:
                mx.async_eval(state.arrays)

    def _layers(self, ids: mx.array, state: KVState, wanted: int) -> mx.array:
        """All layers; gives the last `wanted` tokens' hidden state, [wanted, hidden], before the last norm.

        Nothing after the last keys and values depends on any but the wanted tokens, so from there on
        only those are computed (and with none wanted, the pass ends).
        """
        x = stock.embed(ids, self.weights.token_embd) * math.sqrt(self.config.hidden)  # [T, hidden]
        before = x
        per_layer = self._per_layer_inputs(ids, x)
        last_kv = self.config.own_kv_layers - 1
        for i, layer in enumerate(self.weights.layers):
            shape = self.config.layers[i]
            h = stock.rms_norm(x, layer.attn_norm, self.config.eps)
            q, k, v = self._qkv(layer, shape, h)
            if k is not None and v is not None:
                self._write_kv(i, layer, shape, k, v, state)
            if i == last_kv:
                if wanted == 0:
                    break
                q, x = q[-wanted:], x[-wanted:]
                per_layer = None if per_layer is None else per_layer[-wanted:]
            h = self._attention(layer, shape, q, state, ids.size)
            x = x + stock.rms_norm(h, layer.post_attention_norm, self.config.eps)
            h = self._mlp(layer, x) if layer.ffn_gate_inp is None else self._mlp_and_experts(layer, x)
            x = x + stock.rms_norm(h, layer.post_ffw_norm, self.config.eps)
            if per_layer is not None:
                x = x + self._per_layer_step(layer, x, per_layer[:, i])
            if layer.layer_output_scale is not None:
                x = x * layer.layer_output_scale
            if self.kernels:  # what a GPU has not got to yet holds memory: at most a layer ahead
                mx.async_eval(x)
                mx.eval(before)
                before = x
        state.advance(ids)
        return x

    def _per_layer_inputs(self, ids: mx.array, x: mx.array) -> mx.array | None:
        """What each layer adds of the token itself: [T, layers, P], from the token and its embedding x."""
        w, c = self.weights, self.config
        if w.per_layer_token_embd is None or w.per_layer_model_proj is None:
            return None
        shape = (ids.size, len(c.layers), c.ple)
        own = stock.embed(ids, w.per_layer_token_embd).reshape(shape) * math.sqrt(c.ple)
        projected = self._linear(x, w.per_layer_model_proj).reshape(shape) * c.hidden**-0.5
        return (stock.rms_norm(projected, w.per_layer_proj_norm, c.eps) + own) * 2**-0.5

    def _qkv(self, layer: Layer, shape: LayerConfig, h: mx.array) -> tuple[mx.array, mx.array | None, mx.array | None]:
        """The raw queries [T, H * D], keys and values [T, G * D] of h [T, hidden]; no keys: another layer's serve."""
        q_rows, kv_rows = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        if layer.attn_qk is not None:
            q, k, v = mx.split(self._linear(h, layer.attn_qk), [q_rows, q_rows + kv_rows], axis=-1)
            if v.size:
                return q, k, v
        else:
            assert layer.attn_q is not None
            q = self._linear(h, layer.attn_q)
            if layer.attn_k is None:
                return q, None, None
            k = self._linear(h, layer.attn_k)
        return q, k, k if layer.attn_v is None else self._linear(h, layer.attn_v)

    def _write_kv(self, i: int, layer: Layer, shape: LayerConfig, k: mx.array, v: mx.array, state: KVState) -> None:
        """Raw keys and values, [T, G * D], of new tokens into the state."""
        k, v = _heads(k, shape.kv_heads), _heads(v, shape.kv_heads)  # [1, G, T, D]
        if self.config.value_norm:
            v = stock.rms_norm(v, None, self.config.eps)
        k = self._rope(stock.rms_norm(k, layer.attn_k_norm, self.config.eps), shape, state.length)
        state.append(i, k, v)

    def _attention(self, layer: Layer, shape: LayerConfig, q: mx.array, state: KVState, new: int) -> mx.array:
        """The raw queries q [Tq, H * D] of the last tokens of `new` ones attend to all they may see."""
        queries = q.shape[0]
        first = state.length + new - queries  # position of the first query
        q = stock.rms_norm(_heads(q, shape.heads), layer.attn_q_norm, self.config.eps)
        q = self._rope(q, shape, first)  # [1, H, Tq, D]
        parts = state.view(shape.kv_layer, queries)
        window = self.config.window if shape.sliding else None
        out = stock.attention(q.astype(state.dtype), parts, self.config.attention_scale, first, window)
        out = out.swapaxes(1, 2).reshape(queries, -1)  # [Tq, H * D]
        return self._linear(out.astype(mx.float32), layer.attn_output)

    def _rope(self, x: mx.array, shape: LayerConfig, position: int) -> mx.array:
        """Turn heads [1, heads, T, D] by their positions, dimension i with i + D/2."""
        return mx.fast.rope(
            x, shape.head_dim, traditional=False, base=None, scale=1.0, offset=position, freqs=self._rope_of(shape)
        )

    def _rope_of(self, shape: LayerConfig) -> mx.array:
        return self._wavelengths[shape.sliding, shape.head_dim]

    def _mlp(self, layer: Layer, x: mx.array) -> mx.array:
        """down(gelu(gate(x)) * up(x)), on x [T, hidden] before its norm."""
        h = stock.rms_norm(x, layer.ffn_norm, self.config.eps)
        if layer.ffn_gate_up is not None:
            gate, up = mx.split(self._linear(h, layer.ffn_gate_up), 2, axis=-1)
        else:
            assert layer.ffn_gate is not None and layer.ffn_up is not None
            gate, up = self._linear(h, layer.ffn_gate), self._linear(h, layer.ffn_up)
        return self._linear(self._geglu(gate, up), layer.ffn_down)

    def _mlp_and_experts(self, layer: Layer, x: mx.array) -> mx.array:
        """The dense MLP and the chosen experts, each under its own norm, summed: [T, hidden]."""
        eps = self.config.eps
        dense = stock.rms_norm(self._mlp(layer, x), layer.post_ffw_norm_1, eps)
        chosen, share = self._route(layer, x)
        routing = Routing(chosen, self.config.experts)
        h = stock.rms_norm(x, layer.pre_ffw_norm_2, eps)[:, None]  # [T, 1, hidden]
        if layer.ffn_gate_up_exps is not None:
            h = self._expert_linear(h, layer.ffn_gate_up_exps, routing, glu=True)
        else:
            assert layer.ffn_gate_exps is not None and layer.ffn_up_exps is not None
            h = self._geglu(*(self._expert_linear(h, w, routing) for w in (layer.ffn_gate_exps, layer.ffn_up_exps)))
        assert layer.ffn_down_exps is not None
        out = self._expert_linear(h, layer.ffn_down_exps, routing)  # [T, used, hidden]
        experts = (out * share[..., None]).sum(axis=1)
        return dense + stock.rms_norm(experts, layer.post_ffw_norm_2, eps)

    def _route(self, layer: Layer, x: mx.array) -> tuple[mx.array, mx.array]:
        """Choose experts for x [T, hidden]: their numbers and shares, both [T, used]."""
        c = self.config
        assert layer.ffn_gate_inp is not None and layer.ffn_gate_inp_scale is not None
        h = stock.rms_norm(x, None, c.eps) * (c.hidden**-0.5) * layer.ffn_gate_inp_scale
        scores = self._linear(h, layer.ffn_gate_inp)  # [T, E]
        chosen = self._choose(scores)
        share = mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1, precise=True)
        if layer.ffn_down_exps_scale is not None:
            share = share * layer.ffn_down_exps_scale[chosen]
        return chosen, share

    def _choose(self, scores: mx.array) -> mx.array:
        """The experts of the highest scores [T, E], in any order: [T, used]."""
        used = self.config.experts_used
        return mx.argpartition(-scores, kth=used - 1, axis=-1)[:, :used]

    def _expert_linear(self, x: mx.array, w: Weight, routing: Routing, glu: bool = False) -> mx.array:
        """`ops.expert_linear`, in kernels where there are any; with glu, of gate and up."""
        if self.kernels:
            return self.kernels.expert_linear(x, w, routing, glu)
        y = stock.expert_linear(x, w, routing.chosen)
        return self._geglu(*mx.split(y, 2, axis=-1)) if glu else y

    def _per_layer_step(self, layer: Layer, x: mx.array, p: mx.array) -> mx.array:
        """What the per-layer embedding p [T, P] adds to x [T, hidden]."""
        assert layer.inp_gate is not None and layer.proj is not None
        h = stock.gelu(self._linear(x, layer.inp_gate)) * p
        return stock.rms_norm(self._linear(h, layer.proj), layer.post_norm, self.config.eps)

    def _head(self, x: mx.array) -> mx.array:
        """Logits, fp32 [T, vocab], of hidden states [T, hidden]."""
        h = stock.rms_norm(x, self.weights.output_norm, self.config.eps)
        return stock.softcap(self._linear(h, self.weights.output).astype(mx.float32), self.config.softcap)


def _heads(x: mx.array, heads: int) -> mx.array:
    """[T, heads * D] -> [1, heads, T, D]."""
    return x.reshape(1, x.shape[0], heads, -1).swapaxes(1, 2)


def _rope_wavelengths(config: Config, layer: LayerConfig, rope_freqs: mx.array | None) -> mx.array:
    """Radians per token, inverted, of each pair of dimensions of a head: fp32 [D / 2].

    theta^(2i/D) (Su et al., arXiv:2104.09864). Global layers divide positions by `rope_scale`; Gemma 4
    turns only the first frequencies of its global heads: its `rope_freqs` are 1e30 elsewhere.
    """
    half = layer.head_dim // 2
    theta = config.rope_theta_sliding if layer.sliding else config.rope_theta
    wavelengths = mx.array([theta ** (2 * i / layer.head_dim) for i in range(half)], mx.float32)
    if layer.sliding:
        return wavelengths
    if rope_freqs is not None:
        return wavelengths * rope_freqs.astype(mx.float32)
    turning = round(half * (1.0 if config.rope_rotated is None else config.rope_rotated))
    return mx.where(mx.arange(half) < turning, wavelengths * config.rope_scale, mx.inf)
