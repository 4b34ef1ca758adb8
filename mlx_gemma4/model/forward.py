"""The forward pass in stock operations, in its order: Gemma 4 (dense, experts, per-layer embeddings) and Gemma 3.

In: token ids and a `KVState`, which takes the new keys and values. Out: hidden states, then logits. It reads prompts on
every device, with products in kernels where there are any; decode.py is the same pass in fused kernels, for a token or
a few. Several states read one token each (batch.py). Shapes beside the lines: T tokens, of all states together, H query
heads, G key/value heads, D head size.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx

from ..config import Config, LayerConfig
from ..kv.state import KVState
from ..ops import stock
from ..ops.embed import EMBED, embed_reference
from ..ops.prompt_attention import prompt_attention_reference
from ..ops.routing import Routing
from ..ops.stock import Weight
from ..shard import Part
from .soft import SoftRows
from .weights import Layer, Loaded

PAD = 0  # id of the padding token
AHEAD = 1  # layers of a prompt that a GPU has not got to yet: they hold memory


def run_layers(
    m: Loaded, ids: mx.array, states: Sequence[KVState], wanted: int, soft: SoftRows | None = None
) -> mx.array:
    """Run all layers; return the last `wanted` tokens' hidden states, [wanted, hidden], before the last norm.

    One state reads all tokens, or each of several reads one, and then all are wanted. Nothing after the last keys and
    values depends on any but the wanted tokens, so from there on only those are computed (and with none wanted, the
    pass ends). `soft`: of one state's tokens.
    """
    x, per_layer = inputs(m, ids, soft)
    ahead, part = deque([x]), m.part
    last_kv = -1 if part and part.sends else m.config.own_kv_layers - 1  # the next rank reads all tokens
    for i, layer in enumerate(m.weights.layers):
        shape = m.config.layers[i]
        h = stock.rms_norm(x, layer.attn_norm, m.config.eps)
        q, k, v = qkv(m, layer, shape, h)
        if k is not None and v is not None:
            write_kv(m, i, layer, shape, k, v, states)
        if i == last_kv:
            if wanted == 0:
                break
            q, x = q[-wanted:], x[-wanted:]
            per_layer = None if per_layer is None else per_layer[-wanted:]
        h = attention(m, layer, shape, q, states, ids.size, soft.last if soft and shape.sliding else None)
        h = summed(m, "attention", i, h)
        x = x + stock.rms_norm(h, layer.post_attention_norm, m.config.eps)
        h = summed(m, "mlp", i, mlp(m, layer, x)) if layer.ffn_gate_inp is None else mlp_and_experts(m, i, layer, x)
        x = x + stock.rms_norm(h, layer.post_ffw_norm, m.config.eps)
        if per_layer is not None:
            x = x + per_layer_step(m, layer, x, per_layer[:, i])
        if layer.layer_output_scale is not None:
            x = x * layer.layer_output_scale
        if m.kernels:
            mx.async_eval(x)
            ahead.append(x)
            if len(ahead) > AHEAD:
                mx.eval(ahead.popleft())
    for n, state in enumerate(states):
        state.advance(ids if len(states) == 1 else ids[n : n + 1])
    if part is None or part.shard.kind != "layers":
        return x
    sent = part.hand_on(x) if part.sends else None
    if sent is not None:
        mx.async_eval(sent)
        x = x[-wanted:]
    return part.of_last(x, sent) if wanted else x


def inputs(m: Loaded, ids: mx.array, soft: SoftRows | None = None) -> tuple[mx.array, mx.array | None]:
    """Return the residual before the first layer here, [T, hidden], and `per_layer_inputs`.

    Soft tokens have rows of their own, and the padding token's row where per-layer embeddings are looked up.
    """
    w, part = m.weights, m.part
    tables = [table for table in (w.token_embd, w.per_layer_token_embd) if table is not None]
    known = ids if soft is None else mx.maximum(ids, PAD)
    look = partial(scaled_rows, m)  # lazy: nothing is looked up where nothing comes of it
    x, *own = rows_by_rank(part, known, tables, look)
    if soft is not None:
        x[soft.places] = soft.rows.astype(x.dtype)
    per_layer = per_layer_inputs(m, own[0], x) if own else None
    return part.receive(ids.size, m.config.hidden) if part and part.receives else x, per_layer


def rows_by_rank(
    part: Part | None,
    ids: mx.array,
    tables: Sequence[Weight],
    look: Callable[[mx.array, Weight, range | None], mx.array],
) -> list[mx.array]:
    """Return what `look` finds of tokens, int [T], in tables, fp32 [T, K] each; of tables in parts, in one sum.

    look: (ids, table, `stock.embed`'s `rows`).
    """
    if part is None or part.shard.kind == "layers":
        return [look(ids, table, None) for table in tables]
    return part.sums(*(look(ids, table, part.rows) for table in tables))


def scaled_rows(m: Loaded, ids: mx.array, table: Weight, rows: range | None) -> mx.array:
    """Return rows of one of the model's two tables, fp32 [T, K], times the root of how many a layer takes of each."""
    factor = math.sqrt(m.config.hidden if table is m.weights.token_embd else m.config.ple)
    if m.kernels is None:
        return embed_reference(ids, table, factor, rows=rows)
    return m.kernels(EMBED, ids.astype(mx.int32), table, factor, rows=rows)


def summed(m: Loaded, what: str, i: int, x: mx.array) -> mx.array:
    """Return a product of layer i, [T, hidden], summed over ranks where each has a part of it."""
    return m.part.sums(x)[0] if m.part is not None and i in m.part.split[what] else x


def per_layer_inputs(m: Loaded, own: mx.array, x: mx.array) -> mx.array:
    """Return the per-layer embeddings, [T, layers, P], of tokens' `scaled_rows` and their embeddings x."""
    w, c = m.weights, m.config
    assert w.per_layer_model_proj is not None
    shape = (x.shape[0], len(c.layers), c.ple)
    own = own.reshape(shape)
    projected = linear(m, x, w.per_layer_model_proj).reshape(shape) * c.hidden**-0.5
    return (stock.rms_norm(projected, w.per_layer_proj_norm, c.eps) + own) * 2**-0.5


def qkv(m: Loaded, layer: Layer, shape: LayerConfig, h: mx.array) -> tuple[mx.array, mx.array | None, mx.array | None]:
    """Return raw queries [T, H * D], keys and values [T, G * D] of h [T, hidden]; no keys: another layer's serve."""
    q_rows, kv_rows = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if layer.attn_qk is not None:
        q, k, v = mx.split(linear(m, h, layer.attn_qk), [q_rows, q_rows + kv_rows], axis=-1)
        if v.size:
            return q, k, v
    else:
        assert layer.attn_q is not None
        q = linear(m, h, layer.attn_q)
        if layer.attn_k is None:
            return q, None, None
        k = linear(m, h, layer.attn_k)
    return q, k, k if layer.attn_v is None else linear(m, h, layer.attn_v)


def write_kv(
    m: Loaded, i: int, layer: Layer, shape: LayerConfig, k: mx.array, v: mx.array, states: Sequence[KVState]
) -> None:
    """Give the states the raw keys and values, [T, G * D], of new tokens."""
    k, v = (split_heads(a, shape.kv_heads, len(states)) for a in (k, v))  # [states, G, T of a state, D]
    if m.config.value_norm:
        v = stock.rms_norm(v, None, m.config.eps)
    k = rope(m, stock.rms_norm(k, layer.attn_k_norm, m.config.eps), shape, [state.length for state in states])
    for n, state in enumerate(states):
        state.append(i, k[n : n + 1], v[n : n + 1])


def attention(
    m: Loaded,
    layer: Layer,
    shape: LayerConfig,
    q: mx.array,
    states: Sequence[KVState],
    new: int,
    last: mx.array | None = None,
) -> mx.array:
    """Let raw queries q [Tq, H * D], of the last of `new` tokens, attend to all they may see: [Tq, hidden].

    `last`: int32 [new], of those tokens the last one that each sees; None: itself.
    """
    queries = q.shape[0] // len(states)  # of a state
    firsts = [state.length + new // len(states) - queries for state in states]  # positions of first queries
    q = stock.rms_norm(split_heads(q, shape.heads, len(states)), layer.attn_q_norm, m.config.eps)
    q = rope(m, q, shape, firsts).astype(states[0].dtype)  # [states, H, Tq of a state, D]
    window = m.config.window if shape.sliding else None
    reference = partial(prompt_attention_reference, together=len(states))
    attend = m.kernels.prompt_attention if m.kernels else reference
    scale, done = m.config.attention_scale, []
    if last is not None:
        last = last[-queries:] + states[0].length
    for n, state in enumerate(states):
        parts = state.view(shape.kv_layer, queries)
        done.append(attend(q[n : n + 1], parts, scale=scale, position=firsts[n], window=window, last=last))
    return linear(m, done[0] if len(done) == 1 else mx.concatenate(done), layer.attn_output)  # of [Tq, H * D]


def mlp(m: Loaded, layer: Layer, x: mx.array) -> mx.array:
    """Return down(gelu(gate(h)) * up(h)), [T, hidden], h being x after its norm."""
    h = stock.rms_norm(x, layer.ffn_norm, m.config.eps)
    if layer.ffn_gate_up is not None:
        gate, up = mx.split(linear(m, h, layer.ffn_gate_up), 2, axis=-1)
    else:
        assert layer.ffn_gate is not None and layer.ffn_up is not None
        gate, up = linear(m, h, layer.ffn_gate), linear(m, h, layer.ffn_up)
    return linear(m, geglu(m, gate, up), layer.ffn_down)


def mlp_and_experts(m: Loaded, i: int, layer: Layer, x: mx.array) -> mx.array:
    """Return the dense MLP and the chosen experts of layer i, each under its own norm, summed: [T, hidden]."""
    eps = m.config.eps
    dense = mlp(m, layer, x)
    chosen, share = route(m, layer, x)
    routing = Routing(chosen, m.config.experts)
    h = stock.rms_norm(x, layer.pre_ffw_norm_2, eps)[:, None]  # [T, 1, hidden]
    if layer.ffn_gate_up_exps is not None:
        h = expert_linear(m, h, layer.ffn_gate_up_exps, routing, glu=True)
    else:
        assert layer.ffn_gate_exps is not None and layer.ffn_up_exps is not None
        h = geglu(m, *(expert_linear(m, h, w, routing) for w in (layer.ffn_gate_exps, layer.ffn_up_exps)))
    assert layer.ffn_down_exps is not None
    out = expert_linear(m, h, layer.ffn_down_exps, routing)  # [T, used, hidden]
    experts = (out * share[..., None]).sum(axis=1)
    dense, experts = both_summed(m, i, dense, experts)
    return stock.rms_norm(dense, layer.post_ffw_norm_1, eps) + stock.rms_norm(experts, layer.post_ffw_norm_2, eps)


def both_summed(m: Loaded, i: int, dense: mx.array, experts: mx.array) -> list[mx.array]:
    """Return the dense MLP's and the experts' outputs of layer i, [T, hidden] each, summed over ranks in one go."""
    if m.part is not None and all(i in m.part.split[what] for what in ("mlp", "experts")):
        return m.part.sums(dense, experts)
    return [summed(m, "mlp", i, dense), summed(m, "experts", i, experts)]


def route(m: Loaded, layer: Layer, x: mx.array) -> tuple[mx.array, mx.array]:
    """Choose experts for x [T, hidden]; return their numbers and shares, both [T, used]."""
    c = m.config
    assert layer.ffn_gate_inp is not None and layer.ffn_gate_inp_scale is not None
    h = stock.rms_norm(x, None, c.eps) * (c.hidden**-0.5) * layer.ffn_gate_inp_scale
    scores = linear(m, h, layer.ffn_gate_inp)  # [T, E]
    chosen = choose_experts(scores, c.experts_used)
    share = mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1, precise=True)
    if layer.ffn_down_exps_scale is not None:
        share = share * layer.ffn_down_exps_scale[chosen]
    return chosen, share


def choose_experts(scores: mx.array, used: int) -> mx.array:
    """Return the experts of the highest scores [T, E], in any order: [T, used]."""
    return mx.argpartition(-scores, kth=used - 1, axis=-1)[:, :used]


def per_layer_step(m: Loaded, layer: Layer, x: mx.array, p: mx.array) -> mx.array:
    """Return what the per-layer embedding p [T, P] adds to x [T, hidden]."""
    assert layer.inp_gate is not None and layer.proj is not None
    h = stock.gelu(linear(m, x, layer.inp_gate)) * p
    return stock.rms_norm(linear(m, h, layer.proj), layer.post_norm, m.config.eps)


def head(m: Loaded, x: mx.array) -> mx.array:
    """Return logits, fp32 [T, vocab], of hidden states [T, hidden]; of a part, those of its rows."""
    return logits_of(m, stock.rms_norm(x, m.weights.output_norm, m.config.eps))


def logits_of(m: Loaded, h: mx.array) -> mx.array:
    """Return logits, fp32 [T, vocab], of hidden states after the last norm, [T, hidden]."""
    return stock.softcap(linear(m, h, m.weights.output).astype(mx.float32), m.config.softcap)


def linear(m: Loaded, x: mx.array, w: Weight) -> mx.array:
    """Return `stock.linear`'s result, by kernels where there are any."""
    return m.kernels.linear(x, w) if m.kernels else stock.linear(x, w)


def geglu(m: Loaded, gate: mx.array, up: mx.array) -> mx.array:
    """Return gelu(gate) * up."""
    return stock.fused_geglu(gate, up) if m.kernels else stock.geglu(gate, up)


def expert_linear(m: Loaded, x: mx.array, w: Weight, routing: Routing, glu: bool = False) -> mx.array:
    """Return `stock.expert_linear`'s result, by kernels where there are any; with glu, geglu of its halves."""
    if m.kernels:
        return m.kernels.expert_linear(x, w, routing, glu)
    y = stock.expert_linear(x, w, routing.chosen)
    return geglu(m, *mx.split(y, 2, axis=-1)) if glu else y


def rope(m: Loaded, x: mx.array, shape: LayerConfig, positions: Sequence[int]) -> mx.array:
    """Apply RoPE to heads [states, heads, T, D], each from its position on; dimension i goes with i + D / 2."""
    offset = positions[0] if len(positions) == 1 else mx.array([*positions])
    return mx.fast.rope(
        x, shape.head_dim, traditional=False, base=None, scale=1.0, offset=offset, freqs=m.wavelengths[shape.sliding]
    )


def split_heads(x: mx.array, heads: int, states: int) -> mx.array:
    """Return x [T, heads * D], the tokens of so many states, as [states, heads, T of a state, D]."""
    return x.reshape(states, x.shape[0] // states, heads, -1).swapaxes(1, 2)


def rope_wavelengths(config: Config, layer: LayerConfig, rope_freqs: mx.array | None) -> mx.array:
    """Return tokens per radian of each pair of dimensions of a head: fp32 [D / 2].

    theta^(2i/D) (Su et al., arXiv:2104.09864). Global layers divide positions by `rope_scale`; Gemma 4
    rotates only the first pairs of its global heads: its `rope_freqs` are 1e30 elsewhere.
    """
    half = layer.head_dim // 2
    theta = config.rope_theta_sliding if layer.sliding else config.rope_theta
    wavelengths = mx.array([theta ** (2 * i / layer.head_dim) for i in range(half)], mx.float32)
    if layer.sliding:
        return wavelengths
    if rope_freqs is not None:
        return wavelengths * rope_freqs.astype(mx.float32)
    rotated = round(half * (1.0 if config.rope_rotated is None else config.rope_rotated))
    return mx.where(mx.arange(half) < rotated, wavelengths * config.rope_scale, mx.inf)
