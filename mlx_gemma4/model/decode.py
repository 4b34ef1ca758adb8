"""The decode step on a GPU: a forward pass for one token, or a few, in fused kernels.

In: token ids, a `KVState`, weights. Out: logits. It computes what `Model` does with stock operations, its reference, in
9 to 13 launches a layer instead of 20 to 30: which, stands in `fused`. An operation whose kernel `doctor` has switched
off, or that no kernel takes, runs as its own reference.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..config import Config, LayerConfig
from ..gpu import recording
from ..kv.segments import LayerKV, sealed
from ..kv.state import KVState
from ..ops import matvec, parts, stock
from ..ops.choose import ARGMAX, TOP_K
from ..ops.dispatch import Kernels
from ..ops.embed import EMBED, PLE_INPUTS
from ..ops.epilogue import FP32, SHRINK, Epilogue
from ..ops.norms import ADD_NORM
from ..ops.qkv import QKV_POST, ROTATIONS
from ..ops.quantized_attention import QUANTIZED_ATTENTION
from .replay import Replay, Step
from .weights import Layer, Loaded

log = logging.getLogger("mlx_gemma4")

MAX_TOKENS = matvec.MAX_TOKENS
FIXED = -(2**30)  # slope of a place that doesn't move with the position
TRACES = 8  # kept of a model's steps: a conversation needs one at a time


def can_step(c: Config, tokens: int) -> bool:
    """Whether `step` takes so many tokens of such a model: its vectors load 8 numbers at a time."""
    most = 1 if c.experts else MAX_TOKENS  # experts are chosen token by token
    return tokens <= most and c.hidden % 8 == 0 and all(layer.head_dim % 16 == 0 for layer in c.layers)


# What a step reads of a KV state, in the same places while the state's segments stay the same, so that a trace of the
# step serves until a tail is full.
#   position         int32 [1]: tokens before the step
#   places           two of int32 [n, 2], constant as long: the numbers of all places are max(position + slope, least)
#   parts            {sliding or not: how many}
#   segments         {layer with keys and values of its own: [(keys, values), ..]}: what is in sight before the tail;
#                    in a global layer perhaps [(codes, scales), ..]
#   tails            {such a layer: (keys, values)}
#   rotations            {such a layer, where it is in codes: `kv.quantization.rotations`}
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Constants:
    """What steps read beside weights."""

    wavelengths: Callable[[LayerConfig], mx.array]  # of a layer's RoPE, fp32 [D / 2]
    scales: list[mx.array | None]  # of layers; [4], for MLX keeps less than that in the host's memory (CUDA)
    nothing: mx.array  # zeros fp32 [hidden]


def make_step(
    model: Loaded, run: Kernels, wavelengths: Callable[[LayerConfig], mx.array]
) -> tuple[Callable[[mx.array, KVState], mx.array], Replay | None]:
    """The function that reads a few tokens into a state: (ids int [T], state) -> fp32 logits [T, vocab].

    T as `can_step` allows. Building a step's hundreds of launches takes the host longer than a GPU takes to run
    them, so each arrangement of a state's segments is traced once (`mx.compile`) and replayed until the next.

    Args:
        model: its weights and configuration.
        run: the backend's kernels.
        wavelengths: of a layer's RoPE, fp32 [D / 2].

    Returns:
        that function, and what replays steps of one token where `run.player` can: whoever is in no hurry for the
        logits asks it first.
    """
    kinds = _first_of_kinds(model)
    scales = [layer.layer_output_scale for layer in model.weights.layers]
    wide = [None if s is None else mx.contiguous(mx.broadcast_to(s, (4,))) for s in scales]
    constants = Constants(wavelengths, wide, mx.zeros(model.config.hidden))
    mx.eval([s for s in constants.scales if s is not None], constants.nothing)

    def traceable(ids: mx.array, inputs: Inputs) -> tuple[mx.array, list[parts.KVPart]]:
        slope, least = inputs["places"]
        rows = mx.maximum(inputs["position"] + slope, least).reshape(-1)
        logits, tails = _forward(model, run, constants, ids, inputs | _placed(rows, inputs["parts"]))
        return stock.softcap(logits, model.config.softcap), tails

    @lru_cache(TRACES)
    def traced(_: Any) -> Callable[..., Any]:
        return mx.compile(traceable)

    @lru_cache(TRACES)
    def places(where: tuple[Any, ...]) -> list[mx.array]:
        return [mx.array(a, mx.int32) for a in where]

    def step(ids: mx.array, state: KVState) -> mx.array:
        tokens, opened = ids.size, _opened(model, state)
        inputs, where = _inputs(model, opened, state.length, tokens)
        inputs["places"] = places(where)
        shapes = (tuple(k.shape for k, _ in inputs["segments"][i]) for i in kinds)
        forward = traced((run.off, tokens, *shapes)) if run.traced else traceable
        logits, tails = forward(ids.astype(mx.int32), inputs)
        for (i, kv), (keys, values) in zip(opened.items(), tails, strict=True):
            count, stop = kv.count + tokens, kv.stop + tokens
            state.stage(i, replace(kv, tail_keys=keys, tail_values=values, count=count, stop=stop))
        state.advance(ids)
        return cast(mx.array, logits)

    def arranged(state: KVState) -> Step:
        opened, recorder = _opened(model, state), Kernels(recording.recorder, run.off, strict=True)
        inputs, (slopes, least) = _inputs(model, opened, state.length, 1)

        def record(ids: Any, rows: Any, tails: Any) -> Any:
            here = inputs | _placed(rows, inputs["parts"]) | {"tails": tails}
            logits, _ = _forward(model, recorder, constants, ids, here)
            return logits, recorder(ARGMAX, logits)  # the softcap leaves the order as it is

        return Step(opened, np.array(slopes), np.array(least), record)

    finished = mx.compile(lambda logits: stock.softcap(logits, model.config.softcap).squeeze(0))
    return step, Replay(run.player, arranged, finished) if run.player and can_step(model.config, 1) else None


def _forward(
    model: Loaded, run: Kernels, constants: Constants, ids: mx.array, inputs: Inputs
) -> tuple[mx.array, list[parts.KVPart]]:
    """The step itself, a function of arrays: fp32 logits [T, vocab] before any softcap, and the new tails.

    Nothing but kernels of ours touches what it makes, so that their launches are all there is to it. x, the residual,
    is fp32 throughout; what a norm gives, h, has the dtype of the KV state: fp16 on a GPU.
    """
    c, w = model.config, model.weights
    kinds = {c.layers[i].sliding: constants.wavelengths(c.layers[i]) for i in _first_of_kinds(model)}
    rope = {kind: run(ROTATIONS, inputs["position"], w, tokens=ids.size) for kind, w in kinds.items()}
    x = run(EMBED, ids, w.token_embd, math.sqrt(c.hidden))  # [T, hidden]
    per_layer: list[mx.array] = []
    if w.per_layer_token_embd is not None and w.per_layer_model_proj is not None:
        assert w.per_layer_proj_norm is not None
        projected = run.product(x, w.per_layer_model_proj)
        made = run(
            PLE_INPUTS, ids, projected, w.per_layer_proj_norm, w.per_layer_token_embd, c.hidden**-0.5, eps=c.eps
        )  # [layers, T, P]
        per_layer = [made[i : i + 1].reshape(*made.shape[1:]) for i in range(len(w.layers))]  # made[i] would gather
    # x + rms(x) 0, which is x, and the first norm of it
    x, h = run(ADD_NORM, x, x, constants.nothing, next_norm=w.layers[0].attn_norm, eps=c.eps, out=model.kv_dtype)
    tails: dict[int, parts.KVPart] = {}
    for i, layer in enumerate(w.layers):
        norm: dict[str, Any] = {"eps": c.eps, "out": model.kv_dtype}
        shape, scale = c.layers[i], constants.scales[i]
        following = w.layers[i + 1].attn_norm if i + 1 < len(w.layers) else w.output_norm
        a = _attention(run, model, i, h, inputs, tails, rope[shape.sliding])
        x, h = run(ADD_NORM, x, a, layer.post_attention_norm, next_norm=layer.ffn_norm, **norm)
        experts = None if layer.ffn_gate_inp is None else _experts(run, model, layer, x)
        end: dict[str, Any] = {"next_norm": following, "scale": scale, **norm}  # of the layer
        m = _mlp(run, layer, h)
        if per_layer:
            x, h = _per_layer(run, layer, x, m, per_layer[i], **end)
        else:
            x, h = run(ADD_NORM, x, m, layer.post_ffw_norm, experts=experts, shrunk=SHRINK, **end)
    logits = run.product(h, w.output, FP32)
    return logits, list(tails.values())


def _placed(rows: mx.array, parts: dict[bool, int]) -> Inputs:
    """Where the step's tokens go and what they see, out of the numbers of all places, int32 [2 n].

    position, count: int32 [1], tokens before the step, and those of them in the tails; spans: by kind of layer, int32
    [parts, 2], the rows in use of each part that is not in codes, the tail the last of them.
    """
    found: Inputs = {"position": rows[0:1], "count": rows[1:2], "spans": {}}
    at = 2
    for kind, n in parts.items():
        found["spans"][kind] = rows[at : at + 2 * n].reshape(-1, 2)
        at += 2 * n
    return found


def _attention(
    run: Kernels,
    model: Loaded,
    i: int,
    h: mx.array,
    inputs: Inputs,
    tails: dict[int, parts.KVPart],
    rope: mx.array,
) -> mx.array:
    """Layer i's attention, fp32 [T, hidden], of h [T, hidden], after its norm; its new tail goes into `tails`."""
    c, layer, shape = model.config, model.weights.layers[i], model.config.layers[i]
    q_weight = layer.attn_q if layer.attn_qk is None else layer.attn_qk
    assert q_weight is not None
    q = run.product(h, q_weight, FP32)
    k = v = None
    own = shape.kv_layer == i
    joined_v = layer.attn_qk is not None and q.shape[1] > (shape.heads + shape.kv_heads) * shape.head_dim
    if own:
        k = None if layer.attn_k is None else run.product(h, layer.attn_k, FP32)
        v = None if layer.attn_v is None else run.product(h, layer.attn_v, FP32)
    q, tail_keys, tail_values = run(
        QKV_POST,
        q,
        k,
        v,
        layer.attn_q_norm,
        layer.attn_k_norm,
        rope,
        inputs["tails"][i] if own else None,
        inputs["count"] if own else None,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        eps=c.eps,
        dtype=model.kv_dtype,
        value_norm=c.value_norm,
        v_is_k=own and v is None and not joined_v,
    )
    if tail_keys is not None and tail_values is not None:
        tails[i] = tail_keys, tail_values
    parts = [*inputs["segments"][shape.kv_layer], tails[shape.kv_layer]]
    window = c.window if shape.sliding else 0
    spans = inputs["spans"][shape.sliding]
    if parts[0][0].dtype == mx.uint32:  # codes; only a global layer has them
        *quantized, tail = parts
        rotation = inputs["rotations"][shape.kv_layer]
        out = run(QUANTIZED_ATTENTION, q, quantized, rotation, tail, spans, scale=c.attention_scale)
    else:
        out = run.attention(q, parts, spans, scale=c.attention_scale, window=window)
    return run.product(out, layer.attn_output, FP32)


def _mlp(run: Kernels, layer: Layer, h: mx.array) -> mx.array:
    """down(gelu(gate(h)) * up(h)) times SHRINK, fp32 [T, hidden], of h [T, hidden], after its norm."""
    joined, gate, up = layer.ffn_gate_up, layer.ffn_gate, layer.ffn_up
    if isinstance(joined, mx.array):  # `dense` takes one after the other
        gate, up = mx.split(joined, 2)
    if gate is not None and up is not None:
        product = run.product(h, gate, Epilogue(factor=SHRINK), times=run.product(h, up))
    else:
        assert joined is not None
        product = run.product(h, joined, Epilogue(glu=True, factor=SHRINK))
    return run.product(product, layer.ffn_down, FP32)


def _per_layer(
    run: Kernels, layer: Layer, x: mx.array, m: mx.array, p: mx.array, **end: Any
) -> tuple[mx.array, mx.array]:
    """The residual and the next norm's result, of the residual x and the MLP's result m.

    p [T, P] is the layer's embedding of the tokens; end: what the last add_norm is told.
    """
    assert layer.inp_gate is not None and layer.proj is not None and layer.post_norm is not None
    x, _ = run(ADD_NORM, x, m, layer.post_ffw_norm, eps=end["eps"], shrunk=SHRINK)
    z = run.product(run.product(x, layer.inp_gate, times=p), layer.proj)
    return run(ADD_NORM, x, z, layer.post_norm, **end)


def _experts(run: Kernels, model: Loaded, layer: Layer, x: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """The chosen experts' outputs times SHRINK for one token, their shares, the norms of both branches: for add_norm.

    x [1, hidden] is the residual: router and experts have norms of their own, folded into their products.
    """
    c = model.config
    assert layer.ffn_gate_inp is not None and layer.ffn_down_exps is not None
    router = Epilogue(factor=c.hidden**-0.5, eps=c.eps)
    scores = run.product(x, layer.ffn_gate_inp, router, norm=layer.ffn_gate_inp_scale)
    chosen, share = run(TOP_K, scores, c.experts_used, scale=layer.ffn_down_exps_scale)
    ids = chosen.reshape(-1)  # of the one token
    norm, small = layer.pre_ffw_norm_2, Epilogue(factor=SHRINK, out=model.kv_dtype, eps=c.eps)
    if layer.ffn_gate_up_exps is not None:
        h = run.product(x, layer.ffn_gate_up_exps, small._replace(glu=True), norm=norm, ids=ids)  # [used, F]
    else:
        assert layer.ffn_gate_exps is not None and layer.ffn_up_exps is not None
        up = run.product(x, layer.ffn_up_exps, Epilogue(eps=c.eps), norm=norm, ids=ids)
        h = run.product(x, layer.ffn_gate_exps, small, norm=norm, times=up, ids=ids)
    out = run.product(h, layer.ffn_down_exps, FP32, ids=ids)  # [used, hidden]
    assert layer.post_ffw_norm_1 is not None and layer.post_ffw_norm_2 is not None
    return out[None], share, layer.post_ffw_norm_1, layer.post_ffw_norm_2


def _opened(model: Loaded, state: KVState) -> dict[int, LayerKV]:
    """A state's layers, each with room for a step's tokens in its tail."""
    shapes, window = model.config.layers, model.config.window
    return {i: _with_room(kv, state, shapes[i].sliding, window) for i, kv in state.layers.items()}


def _with_room(kv: LayerKV, state: KVState, sliding: bool, window: int) -> LayerKV:
    """A layer's keys and values with room for the step's tokens in the tail: a full one is sealed."""
    if kv.count < state.layout.tail:
        return kv
    return sealed(kv, state.layout, window if sliding else None)


def _first_of_kinds(model: Loaded) -> list[int]:
    """The first sliding and the first global layer, as far as there are any. All of a kind are cut alike."""
    kinds = [layer.sliding for layer in model.config.layers]
    return [kinds.index(sliding) for sliding in (True, False) if sliding in kinds]


def _inputs(model: Loaded, opened: dict[int, LayerKV], length: int, tokens: int) -> tuple[Inputs, tuple[Any, ...]]:
    """What a step of so many tokens reads of a state that holds `length`; its places yet to be made into arrays.

    A place is max(position + slope, least): a pair of slopes and a pair of what is least for each row.
    """
    segments: dict[int, list[parts.KVPart]] = {}
    count = next(iter(opened.values())).count
    slopes, least, parts = [(0, count - length)], [(0, 0)], {}
    for i, kv in opened.items():
        sliding, window = model.config.layers[i].sliding, model.config.window
        seen = [s for s in kv.segments if not sliding or s.stop > length - window + 1]
        segments[i] = [(s.keys, s.values) for s in seen]
        if sliding not in parts:
            rows = [] if kv.quantizer else seen  # codes are in use from the first to the last
            tail, first = kv.stop - kv.count, 1 - window if sliding else FIXED  # slope of the first token in sight
            slopes += [*((first - s.start, FIXED) for s in rows), (first - tail, tokens - tail)]
            least += [*((0, s.stop - s.start) for s in rows), (kv.skip, 0)]
            parts[sliding] = len(rows) + 1
    inputs = {
        "position": mx.array([length], mx.int32),
        "parts": parts,
        "segments": segments,
        "tails": {i: (kv.tail_keys, kv.tail_values) for i, kv in opened.items()},
        "rotations": {i: kv.quantizer.rotation for i, kv in opened.items() if kv.quantizer},
    }
    return inputs, (tuple(slopes), tuple(least))
