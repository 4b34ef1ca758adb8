"""The decode step on a GPU: a forward pass for one token, or a few, in fused kernels.

In: token ids, a `KVState`, weights. Out: logits. It computes what forward.py, its reference, does in stock operations,
in 9 to 13 launches a layer instead of 20 to 30. An operation whose kernel `doctor` has switched off, or that no kernel
takes, runs as its own reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, TypedDict, cast

import mlx.core as mx

from ..config import Config, LayerConfig
from ..kv.segments import LayerKV, sealed
from ..kv.state import KVState
from ..ops import matvec, parts, stock
from ..ops.choose import TOP_K
from ..ops.dispatch import Kernels
from ..ops.embed import EMBED, PLE_INPUTS
from ..ops.epilogue import ADDED, FP32, SHRINK, Epilogue, Folded
from ..ops.few_rows import MAX_ROWS
from ..ops.norms import ADD_NORM, NormOptions
from ..ops.qkv import QKV_POST, ROTATIONS, QKVArrays, QKVOptions
from ..ops.quantized_attention import QUANTIZED_ATTENTION
from ..ops.stock import Weight
from .exchange import RecordedPart
from .forward import rows_by_rank, summed
from .spans import Places, Spans, in_sight, numbers_at, placed, spans_of
from .weights import Layer, Loaded

MAX_TOKENS = matvec.MAX_TOKENS
MAX_CHECKED = 8  # of a step that checks drafts: as many as attention takes
TRACES = 8  # kept of a model's steps: a conversation needs one at a time
Tails = dict[int, parts.KVPart]  # by layer with keys and values of its own
Experts = tuple[mx.array, mx.array, mx.array, mx.array]  # `NormOptions.experts`
# A layer's attention: its number, raw products q, k, v (the latter None as in `QKVArrays`), options -> [T, H D].
Attend = Callable[[int, mx.array, "mx.array | None", "mx.array | None", QKVOptions], mx.array]


def can_step(c: Config, tokens: int) -> bool:
    """Return True if a step takes so many tokens of such a model: its vectors load 8 numbers at a time."""
    most = 1 if c.experts else MAX_TOKENS  # experts are chosen token by token
    return tokens <= most and c.hidden % 8 == 0 and all(layer.head_dim % 16 == 0 for layer in c.layers)


class Inputs(TypedDict):
    """What a step reads of a KV state. A dict, which `mx.compile` takes.

    All but position and tails stays as it is as long as the state's segments do: a trace serves until a tail is full.
    """

    position: mx.array  # int32 [1], tokens before the step
    spans: tuple[mx.array, mx.array]  # `Spans.arrays`
    lengths: dict[bool, int]  # `Spans.lengths`
    segments: dict[int, list[parts.KVPart]]  # by layer with keys and values of its own: those in sight before the tail
    tails: Tails
    rotations: dict[int, mx.array]  # by such a layer whose segments are quantized: `kv.quantization.rotations`


@dataclass(frozen=True)
class Constants:
    """What steps read beside weights."""

    scales: list[mx.array | None]  # of layers; [4], for MLX keeps less than that in the host's memory (CUDA)
    nothing: mx.array  # zeros fp32 [hidden]

    @classmethod
    def of(cls, model: Loaded) -> Constants:
        scales = [layer.layer_output_scale for layer in model.weights.layers]
        wide = [None if s is None else mx.contiguous(mx.broadcast_to(s, (4,))) for s in scales]
        made = cls(wide, mx.zeros(model.config.hidden))
        mx.eval([s for s in made.scales if s is not None], made.nothing)
        return made


def make_step(model: Loaded, run: Kernels) -> Callable[[mx.array, KVState], tuple[mx.array, mx.array]]:
    """Return the function that reads a few tokens, ids int [T], into a state.

    It returns logits, fp32 [T, vocab], and hidden rows after the last norm, [T, hidden]. T as `can_step` allows, or up
    to MAX_CHECKED. Building a step's hundreds of launches takes the host longer than a GPU takes to run them, so each
    arrangement of a state's segments is traced once (`mx.compile`) and its trace is used until the next.
    """
    constants = Constants.of(model)
    kinds = {layer.sliding: i for i, layer in reversed(list(enumerate(model.config.layers)))}  # the first of each

    def traceable(ids: mx.array, inputs: Inputs) -> tuple[mx.array, mx.array, list[parts.KVPart]]:
        numbers = numbers_at(inputs["position"], *inputs["spans"])
        attend, tails = over_parts(model, run, inputs, placed(numbers, inputs["lengths"]), ids.size)
        logits, hidden = forward(model, run, constants, ids, attend)
        return stock.softcap(logits, model.config.softcap), hidden, list(tails.values())

    @lru_cache(TRACES)
    def traced(_: Any) -> Callable[..., Any]:
        return mx.compile(partial(traceable))  # a function of its own: MLX keeps traces by function

    def step(ids: mx.array, state: KVState) -> tuple[mx.array, mx.array]:
        tokens, layers = ids.size, with_room(model, state)
        inputs, _ = inputs_of(model, layers, tokens)
        shapes = (tuple(k.shape for k, _ in inputs["segments"][i]) for i in kinds.values())
        run_it = traced((run.off, tokens, *shapes)) if run.traced and not run.eager else traceable
        logits, hidden, tails = run_it(ids.astype(mx.int32), inputs)
        for (i, kv), (keys, values) in zip(layers.items(), tails, strict=True):
            count, stop = kv.count + tokens, kv.stop + tokens
            state.stage(i, replace(kv, tail_keys=keys, tail_values=values, count=count, stop=stop))
        state.advance(ids)
        return logits, hidden

    return step


def forward(
    model: Loaded, run: Kernels, constants: Constants, ids: mx.array, attend: Attend
) -> tuple[mx.array, mx.array]:
    """Return fp32 logits [T, vocab] before any softcap, of a part those of its rows, and the head's input, [T, hidden].

    The step itself, a function of arrays. Nothing but our kernels touches what it makes, so that their launches are all
    there is to it (replay.py records them). x, the residual, is fp32 throughout; what a norm gives, h, has the dtype of
    the KV state: fp16 on a GPU.
    """
    c, w, part = model.config, model.weights, model.part
    handed = part.receive(ids.size, c.hidden) if part and part.receives else None
    x, per_layer = _inputs(run, model, ids) if handed is None or c.ple else (handed, [])
    x = x if handed is None else handed
    h = through_layers(model, run, constants, x, attend, per_layer)
    return run.product(h, w.output, FP32), h


def through_layers(
    model: Loaded, run: Kernels, constants: Constants, x: mx.array, attend: Attend, per_layer: Sequence[mx.array] = ()
) -> mx.array:
    """Return the residual x, fp32 [T, hidden], after all layers and the last norm, [T, hidden] in the KV's dtype.

    per_layer: of each layer, its embeddings of the tokens [T, P]; (): there are none.
    """
    c, w, part = model.config, model.weights, model.part
    # x + rms(x) 0, which is x, and the first norm of it
    x, h = run(ADD_NORM, x, x, constants.nothing, NormOptions(c.eps, w.layers[0].attn_norm, out=model.kv_dtype))
    eps, out = c.eps, model.kv_dtype
    for i, layer in enumerate(w.layers):
        a = _attention(run, model, i, h, attend)
        options = NormOptions(eps, layer.ffn_norm, out=out)
        x, h = _summed_norm(run, model, "attention", i, x, a, layer.post_attention_norm, options)
        experts = None if layer.ffn_gate_inp is None else _experts(run, model, layer, x)
        m, norm, what = _mlp(run, layer, h, FP32 if part else ADDED), layer.post_ffw_norm, "mlp"
        if experts is not None and part is not None:
            (m, experts), what = _summed_experts(model, i, m, experts), ""
        if per_layer:
            assert layer.post_norm is not None
            options = NormOptions(eps, shrunk=SHRINK, out=out, copied=SHRINK)
            x, h = _summed_norm(run, model, what, i, x, m, norm, options)
            m, norm, what = _per_layer(run, layer, h, per_layer[i]), layer.post_norm, ""
        following, scale = w.layers[i + 1].attn_norm if i + 1 < len(w.layers) else w.output_norm, constants.scales[i]
        x, h = _summed_norm(run, model, what, i, x, m, norm, NormOptions(eps, following, scale, experts, SHRINK, out))
    if part and part.shard.kind == "layers":
        h = part.of_last(h, part.hand_on(x) if part.sends else None)
    return h


def _summed_norm(
    run: Kernels, model: Loaded, what: str, i: int, x: mx.array, h: mx.array, post: mx.array, options: NormOptions
) -> tuple[mx.array, mx.array]:
    """Return `add_norm` of a product of layer i, summed over ranks where each has a part of it; `what` "": none has."""
    part = model.part
    if part is None or not what or i not in part.split[what]:
        return run(ADD_NORM, x, h, post, options)
    if isinstance(part, RecordedPart):
        return part.exchange.normed(run, x, h, post, options)
    return run(ADD_NORM, x, part.sums(h)[0], post, options)


def _inputs(run: Kernels, model: Loaded, ids: mx.array) -> tuple[mx.array, list[mx.array]]:
    """Return the embeddings of tokens, fp32 [T, hidden], and what they add in each layer, [T, P]; [] for nothing."""
    c, w, part = model.config, model.weights, model.part
    own = w.per_layer_token_embd
    if part is None or part.shard.kind == "layers":
        x = run(EMBED, ids, w.token_embd, math.sqrt(c.hidden))
    else:
        tables = [w.token_embd] if own is None else [w.token_embd, own]
        factors = {id(w.token_embd): math.sqrt(c.hidden)}

        def look(ids: mx.array, table: Weight, rows: range | None) -> mx.array:
            return run(EMBED, ids, table, factors.get(id(table), 1.0), rows=rows)

        x, *found = rows_by_rank(part, ids, tables, look)
        if found:
            own, ids = found[0], mx.arange(MAX_ROWS, dtype=mx.int32)[: ids.size]
    if own is None or w.per_layer_model_proj is None:
        return x, []
    assert w.per_layer_proj_norm is not None
    projected = run.product(x, w.per_layer_model_proj, Epilogue(out=model.kv_dtype))
    made = run(PLE_INPUTS, ids, projected, w.per_layer_proj_norm, own, c.hidden**-0.5, eps=c.eps)  # [layers, T, P]
    return x, [made[i : i + 1].reshape(*made.shape[1:]) for i in range(len(w.layers))]  # made[i] would gather


def _summed_experts(model: Loaded, i: int, m: mx.array, experts: Experts) -> tuple[mx.array, Experts]:
    """Return the dense MLP's output and what add_norm takes of experts in layer i, both summed over ranks in one go."""
    outputs, share, norm1, norm2 = experts
    part = model.part
    assert part is not None
    if i not in part.split["experts"]:  # whole on each rank
        return summed(model, "mlp", i, m), experts
    both, mixed = part.sums_with_experts(m, outputs, share)
    m = both if i in part.split["mlp"] else m
    ones = mx.ones((MAX_ROWS, 1))[: m.shape[0]]  # MLX keeps less than 4 numbers in the host's memory (CUDA)
    return m, (mixed.reshape(-1, 1, mixed.shape[-1]), ones, norm1, norm2)


def _attention(run: Kernels, model: Loaded, i: int, h: mx.array, attend: Attend) -> mx.array:
    """Return layer i's attention, fp32 [T, hidden] or in parts (ADDED), of h [T, hidden] after its norm."""
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
    options = QKVOptions(
        shape.heads, shape.kv_heads, c.eps, model.kv_dtype, c.value_norm, own and v is None and not joined_v
    )
    return run.product(attend(i, q, k, v, options), layer.attn_output, FP32 if model.part else ADDED)


def over_parts(model: Loaded, run: Kernels, inputs: Inputs, places: Places, tokens: int) -> tuple[Attend, Tails]:
    """Return attention of one state's tokens over its segments and tails, and where their new tails will be."""
    c, tails = model.config, cast(Tails, {})
    waves = model.wavelengths.items()
    rope = {kind: run(ROTATIONS, places.position, lengths, tokens=tokens) for kind, lengths in waves}

    def attend(i: int, q: mx.array, k: mx.array | None, v: mx.array | None, options: QKVOptions) -> mx.array:
        shape, layer = c.layers[i], model.weights.layers[i]
        given = QKVArrays(q, k, v, layer.attn_q_norm, layer.attn_k_norm, rope[shape.sliding])
        if shape.kv_layer == i:
            given = given._replace(tail=inputs["tails"][i], in_tail=places.count)
        q, tail_keys, tail_values = run(QKV_POST, given, options)
        if tail_keys is not None and tail_values is not None:
            tails[i] = tail_keys, tail_values
        return attend_parts(run, c, shape, q, inputs, tails[shape.kv_layer], places)

    return attend, tails


def attend_parts(
    run: Kernels, c: Config, shape: LayerConfig, q: mx.array, inputs: Inputs, tail: parts.KVPart, places: Places
) -> mx.array:
    """Let queries [T, H, D] of such a layer attend to the segments and the tail that it reads: [T, H D]."""
    seen = [*inputs["segments"][shape.kv_layer], tail]
    spans, scale = places.spans[shape.sliding], c.attention_scale
    if seen[0][0].dtype == mx.uint32:  # quantized: a global layer
        rotation = inputs["rotations"][shape.kv_layer]
        return run(QUANTIZED_ATTENTION, q, seen[:-1], rotation, tail, spans, scale=scale)
    return run.attention(q, seen, spans, scale=scale, window=c.window if shape.sliding else 0)


def _mlp(run: Kernels, layer: Layer, h: mx.array, out: Epilogue) -> mx.array:
    """Return down(gelu(gate(h)) * up(h)) times SHRINK, fp32 as `out` says, of h [T, hidden] after its norm."""
    joined, gate, up = layer.ffn_gate_up, layer.ffn_gate, layer.ffn_up
    if isinstance(joined, mx.array):  # `dense` takes one after the other
        gate, up = mx.split(joined, 2)
    if gate is not None and up is not None:
        product = run.product(h, gate, Epilogue(factor=SHRINK), Folded(times=run.product(h, up)))
    else:
        assert joined is not None
        product = run.product(h, joined, Epilogue(glu=True, factor=SHRINK))
    return run.product(product, layer.ffn_down, out)


def _per_layer(run: Kernels, layer: Layer, h: mx.array, p: mx.array) -> mx.array:
    """Return SHRINK times what the layer's embedding of the tokens, p [T, P], adds to the residual, before its norm.

    h [T, hidden] is SHRINK times the residual.
    """
    assert layer.inp_gate is not None and layer.proj is not None
    gated = run.product(h, layer.inp_gate, Epilogue(factor=SHRINK, given=SHRINK), Folded(times=p))
    return run.product(gated, layer.proj, FP32)


def _experts(run: Kernels, model: Loaded, layer: Layer, x: mx.array) -> Experts:
    """Return what add_norm takes of experts: chosen ones' outputs times SHRINK, their shares, norms of both branches.

    x [T, hidden] is the residual: router and experts have norms of their own, folded into their products.
    """
    c = model.config
    assert layer.ffn_gate_inp is not None and layer.ffn_down_exps is not None
    router = Epilogue(factor=c.hidden**-0.5, eps=c.eps)
    scores = run.product(x, layer.ffn_gate_inp, router, Folded(layer.ffn_gate_inp_scale))
    chosen, share = run(TOP_K, scores, c.experts_used, scale=layer.ffn_down_exps_scale)
    ids = chosen if x.shape[0] > 1 else chosen.reshape(-1)  # of the one token
    norm, small = layer.pre_ffw_norm_2, Epilogue(factor=SHRINK, out=model.kv_dtype, eps=c.eps)
    if layer.ffn_gate_up_exps is not None:
        h = run.product(
            x, layer.ffn_gate_up_exps, small._replace(glu=True), Folded(norm, ids=ids)
        )  # [T, used, F], of one token [used, F]
    else:
        assert layer.ffn_gate_exps is not None and layer.ffn_up_exps is not None
        up = run.product(x, layer.ffn_up_exps, Epilogue(eps=c.eps), Folded(norm, ids=ids))
        h = run.product(x, layer.ffn_gate_exps, small, Folded(norm, up, ids))
    out = run.product(h, layer.ffn_down_exps, FP32, Folded(ids=ids))  # likewise of hidden
    assert layer.post_ffw_norm_1 is not None and layer.post_ffw_norm_2 is not None
    return out if x.shape[0] > 1 else out[None], share, layer.post_ffw_norm_1, layer.post_ffw_norm_2


def with_room(model: Loaded, state: KVState) -> dict[int, LayerKV]:
    """Return a state's layers, each with room for a step's tokens in its tail: a full one is sealed."""
    c, layout = model.config, state.layout
    return {
        i: kv if kv.count < layout.tail else sealed(kv, layout, c.window if c.layers[i].sliding else None)
        for i, kv in state.layers.items()
    }


def inputs_of(model: Loaded, layers: dict[int, LayerKV], tokens: int) -> tuple[Inputs, Spans]:
    """Return what a step of so many tokens reads of a state's layers, and its numbers."""
    c, spans = model.config, spans_of(model.config, layers, tokens)
    seen = {i: in_sight(kv, c.window if c.layers[i].sliding else None) for i, kv in layers.items()}
    inputs: Inputs = {
        "position": mx.array([next(iter(layers.values())).stop], mx.int32),
        "spans": spans.arrays,
        "lengths": spans.lengths,
        "segments": {i: [(s.keys, s.values) for s in segments] for i, segments in seen.items()},
        "tails": {i: (kv.tail_keys, kv.tail_values) for i, kv in layers.items()},
        "rotations": {i: kv.quantizer.rotation for i, kv in layers.items() if kv.quantizer},
    }
    return inputs, spans
