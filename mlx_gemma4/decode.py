"""The decode step on a GPU: a forward pass for one token, or a few, in fused kernels.

In: token ids, a `KVState`, weights. Out: logits. It computes what `Model` does with stock operations, its twin, in
9 launches a layer instead of 20 to 30: which, stands in `fused`. An operation whose kernel `doctor` has switched
off, or that no kernel takes, runs as its own twin.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from . import attention, coded_attention, fused, kernels, ops, tiles
from .config import LayerConfig
from .ops import Weight
from .quant import Packed
from .segments import LayerKV, sealed

if TYPE_CHECKING:
    from .model import Layer, Model
    from .state import KVState

log = logging.getLogger("mlx_gemma4")

MAX_TOKENS = kernels.MAX_TOKENS
TRACES = 8  # kept of a model's steps: a conversation needs one at a time


@dataclass
class Kernels:
    """Runs operations as kernels on one backend, or as twins.

    A kernel that raises costs a warning: from then on, its operation runs as its twin.
    """

    maker: kernels.Maker
    # Names of operations that run as their twins; "matvec" means all formats, "matvec Q4_K" that one.
    off: frozenset[str] = frozenset()
    traced: bool = False  # steps are traced and replayed; takes a maker whose launches are lazy

    def __call__(self, name: str, *args: Any, **options: Any) -> Any:
        """The operation `name` of `fused` or `attention`."""
        module: Any = attention if name in ("qkv_post", "attention") else fused
        if name == "coded_attention":
            module = coded_attention
        twin: Callable[..., Any] = getattr(module, f"{name}_twin")
        if any(isinstance(a, ops.Affine) for a in args):  # a table that no kernel reads
            return twin(*args, **options)
        kernel: Callable[..., Any] = getattr(module, name)
        return self._run((name,), lambda: kernel(*args, self.maker, **options), lambda: twin(*args, **options))

    def product(self, x: mx.array, w: Weight, factor: float = 1.0, **options: Any) -> mx.array:
        """A mat-vec with whatever is folded into it, times a factor: options are those of `kernels.matvec`."""

        def times_factor(y: mx.array) -> mx.array:
            return y if factor == 1.0 else y * factor

        def twin() -> mx.array:
            return times_factor(product_twin(x, w, **options))

        done: mx.array
        if isinstance(w, mx.array) and _dense_takes(w, options):
            done = self._run(("dense",), lambda: fused.dense(x, w, self.maker, factor=factor, **options), twin)
        elif isinstance(w, Packed) and kernels.takes(w, x.shape[0]):
            names = ("matvec", f"matvec {w.format.name}")
            done = self._run(names, lambda: times_factor(kernels.matvec(x, w, self.maker, **options)), twin)
        else:
            done = twin()
        return done

    def linear(self, x: mx.array, w: Weight) -> mx.array:
        """`ops.linear` for x [T, K] of any T: a few rows by mat-vecs, many by tiles."""

        def twin() -> mx.array:
            return ops.linear(x, w)

        if not tiles.takes(w):
            return twin()
        assert not isinstance(w, ops.Affine)
        if isinstance(w, Packed) and x.shape[0] < tiles.MANY_ROWS and kernels.takes(w, 1):
            names = ("matvec", f"matvec {w.format.name}")
            done: mx.array = self._run(names, lambda: tiles.few_rows(x, w, self.maker), twin)
        else:
            done = self._run(_expand_names(w), lambda: tiles.linear(x, w, self.maker), twin)
        return done

    def expert_linear(self, x: mx.array, w: Weight, chosen: mx.array) -> mx.array:
        """`ops.expert_linear`, likewise."""

        def twin() -> mx.array:
            return ops.expert_linear(x, w, chosen)

        if not tiles.takes(w):
            return twin()
        assert not isinstance(w, ops.Affine)
        few = chosen.size < tiles.MANY_ROWS_AN_EXPERT * w.shape[0]
        if isinstance(w, Packed) and few and kernels.takes(w, 1):
            names = ("matvec", f"matvec {w.format.name}")
            done: mx.array = self._run(names, lambda: tiles.few_expert_rows(x, w, chosen, self.maker), twin)
        else:
            done = self._run(_expand_names(w), lambda: tiles.expert_linear(x, w, chosen, self.maker), twin)
        return done

    def _run(self, names: Sequence[str], kernel: Callable[[], Any], twin: Callable[[], Any]) -> Any:
        if self.off.isdisjoint(names):
            try:
                return kernel()
            except Exception as error:  # whatever a backend's compiler or launch raises
                self.off |= {names[-1]}
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                log.warning("Kernel %s fails here and is off, stock operations run instead: %s", names[-1], reason)
        return twin()


def _expand_names(w: Packed | mx.array) -> tuple[str, ...]:
    return ("expand", f"expand {w.format.name}") if isinstance(w, Packed) else ("expand",)


def _dense_takes(w: mx.array, options: dict[str, Any]) -> bool:
    return w.ndim == 2 and w.shape[-1] % 8 == 0 and not options.get("glu")


def product_twin(
    x: mx.array,
    w: Weight,
    *,
    norm: mx.array | None = None,
    eps: float = 1e-6,
    glu: bool = False,
    shrink: float = 1.0,
    times: mx.array | None = None,
    ids: mx.array | None = None,
    out: mx.Dtype | None = None,
) -> mx.array:
    """`kernels.matvec` in stock MLX, for any weight; the options mean what they mean there."""
    h = x.astype(mx.float32)
    h = h if norm is None else ops.rms_norm(h, norm, eps)
    if ids is None:
        y = ops.linear(h, w)
    else:
        shared = h.shape[0] == 1
        chosen = ids[None] if shared else ids[:, None]
        y = ops.expert_linear(h[:, None], w, chosen)[0 if shared else slice(None), slice(None) if shared else 0]
    if glu:
        gate, up = mx.split(y, 2, axis=-1)
        y = ops.geglu(gate, up) * shrink
    return ops.within(y if times is None else ops.gelu(y) * times.astype(mx.float32), out or x.dtype)


def can_step(model: Model, tokens: int) -> bool:
    """Whether `step` takes so many tokens of this model: its vectors load 8 numbers at a time."""
    c = model.config
    most = 1 if c.experts else MAX_TOKENS  # experts are chosen token by token
    return tokens <= most and c.hidden % 8 == 0 and all(layer.head_dim % 16 == 0 for layer in c.layers)


# What a step reads of a KV state: arrays only, in the same places while the state's segments stay the same, so that a
# trace of the step serves until a tail is full.
#   position, count  int32 [1]: tokens before the step; those of them in the tails
#   spans            {sliding or not: int32 [parts, 2]}: the rows in use of each part that is not in codes, the tail
#                    the last of them
#   segments         {layer with keys and values of its own: [(keys, values), ..]}: what is in sight before the tail;
#                    in a global layer perhaps [(codes, scales), ..]
#   tails            {such a layer: (keys, values)}
#   turns            {such a layer, where it is in codes: `kv_codes.turns`}
Inputs = dict[str, Any]


def make_step(
    model: Model, run: Kernels, wavelengths: Callable[[LayerConfig], mx.array]
) -> Callable[[mx.array, KVState], mx.array]:
    """The function that reads a few tokens into a state: (ids int [T], state) -> fp32 logits [T, vocab].

    T as `can_step` allows. Building a step's hundreds of launches takes the host longer than a GPU takes to run
    them, so each arrangement of a state's segments is traced once (`mx.compile`) and replayed until the next.

    Args:
        model: its weights and configuration.
        run: the backend's kernels.
        wavelengths: of a layer's RoPE, fp32 [D / 2].
    """
    traced: OrderedDict[Any, Callable[..., Any]] = OrderedDict()  # the least recently used first
    kinds = _first_of_kinds(model)

    def step(ids: mx.array, state: KVState) -> mx.array:
        tokens, window = ids.size, model.config.window
        opened = {i: _with_room(kv, state, model.config.layers[i].sliding, window) for i, kv in state.layers.items()}
        inputs = _inputs(model, opened, state.length, tokens)
        forward: Callable[..., Any] = partial(_forward, model, run, wavelengths)
        if run.traced:
            shapes = (tuple(k.shape for k, _ in inputs["segments"][i]) for i in kinds)
            key = (run.off, tokens, *shapes)
            forward = traced[key] = traced.pop(key) if key in traced else mx.compile(forward)
            if len(traced) > TRACES:
                traced.popitem(last=False)
        logits, tails = forward(ids.astype(mx.int32), inputs)
        for (i, kv), (keys, values) in zip(opened.items(), tails, strict=True):
            count, stop = kv.count + tokens, kv.stop + tokens
            state.stage(i, replace(kv, tail_keys=keys, tail_values=values, count=count, stop=stop))
        state.advance(ids)
        return cast(mx.array, logits)

    return step


def _forward(
    model: Model, run: Kernels, wavelengths: Callable[[LayerConfig], mx.array], ids: mx.array, inputs: Inputs
) -> tuple[mx.array, list[attention.Part]]:
    """The step itself, a function of arrays: fp32 logits [T, vocab], and the new tails."""
    c, w = model.config, model.weights
    x = run("embed", ids, w.token_embd, math.sqrt(c.hidden))  # [T, hidden], fp32 throughout
    per_layer = None
    if w.per_layer_token_embd is not None and w.per_layer_model_proj is not None:
        projected = run.product(x, w.per_layer_model_proj)
        per_layer = run(
            "ple_inputs", ids, projected, w.per_layer_proj_norm, w.per_layer_token_embd, c.hidden**-0.5, eps=c.eps
        )  # [layers, T, P]
    tails: dict[int, attention.Part] = {}
    for i, layer in enumerate(w.layers):
        shape = c.layers[i]
        h = _attention(run, model, i, x, inputs, tails, wavelengths(shape))
        x, _ = run("add_norm", x, h, layer.post_attention_norm, eps=c.eps)
        scale = layer.layer_output_scale
        last = scale if per_layer is None else None  # where the layer ends with what follows
        if layer.ffn_gate_inp is None:
            h = _mlp(run, layer, x, c.eps)
            x, _ = run("add_norm", x, h, layer.post_ffw_norm, eps=c.eps, scale=last)
        else:
            h, experts = _mlp(run, layer, x, c.eps), _experts(run, model, layer, x)
            x, _ = run("add_norm", x, h, layer.post_ffw_norm, eps=c.eps, scale=last, experts=experts)
        if per_layer is not None:
            assert layer.inp_gate is not None and layer.proj is not None
            h = run.product(run.product(x, layer.inp_gate, times=per_layer[i]), layer.proj)
            x, _ = run("add_norm", x, h, layer.post_norm, eps=c.eps, scale=scale)
    logits = run.product(x, w.output, norm=w.output_norm, eps=c.eps)
    return ops.softcap(logits, c.softcap), list(tails.values())


def _attention(
    run: Kernels,
    model: Model,
    i: int,
    x: mx.array,
    inputs: Inputs,
    tails: dict[int, attention.Part],
    wavelengths: mx.array,
) -> mx.array:
    """What layer i's attention adds to x [T, hidden], before its norm; its new tail goes into `tails`."""
    c, layer, shape = model.config, model.weights.layers[i], model.config.layers[i]
    norm: dict[str, Any] = {"norm": layer.attn_norm, "eps": c.eps}
    q_weight = layer.attn_q if layer.attn_qk is None else layer.attn_qk
    assert q_weight is not None
    q = run.product(x, q_weight, **norm)
    k = v = None
    own = shape.kv_layer == i
    joined_v = layer.attn_qk is not None and q.shape[1] > (shape.heads + shape.kv_heads) * shape.head_dim
    if own:
        k = None if layer.attn_k is None else run.product(x, layer.attn_k, **norm)
        v = None if layer.attn_v is None else run.product(x, layer.attn_v, **norm)
    q, tail_keys, tail_values = run(
        "qkv_post",
        q,
        k,
        v,
        layer.attn_q_norm,
        layer.attn_k_norm,
        wavelengths,
        inputs["position"],
        inputs["tails"][i] if own else None,
        inputs["count"] if own else None,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        eps=c.eps,
        dtype=model.kv_dtype,
        value_norm=c.value_norm,
        v_is_k=own and v is None and not joined_v,
    )
    if own:
        tails[i] = tail_keys, tail_values
    parts = [*inputs["segments"][shape.kv_layer], tails[shape.kv_layer]]
    window = c.window if shape.sliding else 0
    spans = inputs["spans"][shape.sliding]
    if parts[0][0].dtype == mx.uint32:  # codes; only a global layer has them
        *coded, tail = parts
        turn = inputs["turns"][shape.kv_layer]
        out = run("coded_attention", q, coded, turn, tail, spans, scale=c.attention_scale, out=mx.float32)
    else:
        out = run("attention", q, parts, spans, scale=c.attention_scale, window=window, out=mx.float32)
    return run.product(out, layer.attn_output)


def _mlp(run: Kernels, layer: Layer, x: mx.array, eps: float) -> mx.array:
    """down(gelu(gate(x)) * up(x)), x [T, hidden] before its norm."""
    norm: dict[str, Any] = {"norm": layer.ffn_norm, "eps": eps}
    if layer.ffn_gate_up is not None:
        h = run.product(x, layer.ffn_gate_up, glu=True, **norm)
    else:
        assert layer.ffn_gate is not None and layer.ffn_up is not None
        h = run.product(x, layer.ffn_gate, times=run.product(x, layer.ffn_up, **norm), **norm)
    return run.product(h, layer.ffn_down)


def _experts(
    run: Kernels, model: Model, layer: Layer, x: mx.array
) -> tuple[mx.array, mx.array, mx.array | None, mx.array | None]:
    """The chosen experts' outputs for one token, their shares, and the norms of both branches: for add_norm."""
    c = model.config
    assert layer.ffn_gate_inp is not None and layer.ffn_down_exps is not None
    scores = run.product(x, layer.ffn_gate_inp, norm=layer.ffn_gate_inp_scale, eps=c.eps, factor=c.hidden**-0.5)
    chosen, share = run("top_k", scores, c.experts_used, scale=layer.ffn_down_exps_scale)
    norm: dict[str, Any] = {"norm": layer.pre_ffw_norm_2, "eps": c.eps, "ids": chosen[0]}
    if layer.ffn_gate_up_exps is not None:
        h = run.product(x, layer.ffn_gate_up_exps, glu=True, **norm)  # [used, F]
    else:
        assert layer.ffn_gate_exps is not None and layer.ffn_up_exps is not None
        h = ops.geglu(run.product(x, layer.ffn_gate_exps, **norm), run.product(x, layer.ffn_up_exps, **norm))
    out = run.product(h, layer.ffn_down_exps, ids=chosen[0])  # [used, hidden]
    return out[None], share, layer.post_ffw_norm_1, layer.post_ffw_norm_2


def _with_room(kv: LayerKV, state: KVState, sliding: bool, window: int) -> LayerKV:
    """A layer's keys and values with room for the step's tokens in the tail: a full one is sealed."""
    if kv.count < state.layout.tail:
        return kv
    return sealed(kv, state.layout, window if sliding else None)


def _first_of_kinds(model: Model) -> list[int]:
    """The first sliding and the first global layer, as far as there are any. All of a kind are cut alike."""
    kinds = [layer.sliding for layer in model.config.layers]
    return [kinds.index(sliding) for sliding in (True, False) if sliding in kinds]


def _inputs(model: Model, opened: dict[int, LayerKV], length: int, tokens: int) -> Inputs:
    """What a step of so many tokens reads of a state that holds `length`."""
    segments: dict[int, list[attention.Part]] = {}
    spans = {}
    for i, kv in opened.items():
        sliding = model.config.layers[i].sliding
        first = max(0, length - model.config.window + 1) if sliding else 0  # position of the first token in sight
        seen = [s for s in kv.segments if s.stop > first]
        segments[i] = [(s.keys, s.values) for s in seen]
        if sliding not in spans:
            # Codes are in use from the first to the last.
            rows = [] if kv.coder else [(max(0, first - s.start), s.stop - s.start) for s in seen]
            begin = max(kv.skip, first - kv.stop + kv.count)
            spans[sliding] = mx.array([*rows, (begin, kv.count + tokens)], mx.int32)
    count = next(iter(opened.values())).count
    return {
        "position": mx.array([length], mx.int32),
        "count": mx.array([count], mx.int32),
        "spans": spans,
        "segments": segments,
        "tails": {i: (kv.tail_keys, kv.tail_values) for i, kv in opened.items()},
        "turns": {i: kv.coder.turn for i, kv in opened.items() if kv.coder},
    }
