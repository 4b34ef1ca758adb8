"""The operations a model is made of, in stock MLX: the plain references that every kernel is held to.

In: activations and weights: a dense `mx.array` [.., N, K], a `Packed` one straight from a GGUF's blocks, or an `Affine`
one from an MLX safetensors folder. Out: activations in the dtype they came in. Knows no model.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from typing import Any

import mlx.core as mx
import numpy as np

from ..kv import quantization
from ..kv.segments import KVView
from ..memory import on_cpu
from ..quant.formats import Packed, affine_parts, dequantize
from .cores import product

# Rows of a look-up-table type are expanded this many weights at a time, to bound the memory it takes.
_EXPAND = 1 << 26
SCORE_BYTES = 256 << 20  # of the scores that `attention` holds at once on Metal, in fp32


@dataclass(frozen=True)
class Affine:
    """A weight [.., N, K] quantized by MLX: scales * code + biases, one pair per `group` weights of a row."""

    codes: mx.array  # uint32 [.., N, K * bits / 32]
    scales: mx.array  # [.., N, K / group]
    biases: mx.array
    group: int
    bits: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.codes.shape[-1] * 32 // self.bits)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.biases.nbytes


Weight = mx.array | Packed | Affine


def rows_of(w: Weight, rows: range) -> Weight:
    """Return some rows of a weight [N, K], in the same memory."""
    some = slice(rows.start, rows.stop)
    if isinstance(w, Affine):
        made: Weight = replace(w, codes=w.codes[some], scales=w.scales[some], biases=w.biases[some])
    else:
        made = w[some]
    mx.eval([made] if isinstance(made, mx.array) else [a for a in vars(made).values() if isinstance(a, mx.array)])
    return made


def within(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """x in another float type; what fp16 can't hold becomes the largest number that it can."""
    return (mx.clip(x, -65504, 65504) if dtype == mx.float16 else x).astype(dtype)


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """x / sqrt(mean(x²) + eps) * weight over the last axis, summed in fp32."""
    return mx.fast.rms_norm(x, weight, eps)


def gelu(x: mx.array) -> mx.array:
    """GELU in its tanh form (Hendrycks and Gimpel, arXiv:1606.08415), as Gemma was trained with."""
    return 0.5 * x * (1 + mx.tanh(0.7978845608028654 * x * (1 + 0.044715 * x * x)))


def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up."""
    return gelu(gate) * up


@cache
def fused(f: Callable[..., Any], gpu: bool) -> Callable[..., Any]:
    """`f` in as few launches as MLX can; on a CPU that would call a compiler."""
    return mx.compile(f) if gpu else f


def fused_geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up, in one launch where MLX can."""
    y: mx.array = fused(geglu, not on_cpu())(gate, up)
    return y


def softcap(logits: mx.array, cap: float) -> mx.array:
    """cap * tanh(logits / cap): bends logits into (-cap, cap). 0 leaves them."""
    return cap * mx.tanh(logits / cap) if cap else logits


def linear(x: mx.array, w: Weight) -> mx.array:
    """x @ wᵀ for x [.., K] and w [N, K]: [.., N] in x's dtype."""
    if isinstance(w, mx.array):
        return _dense_matmul(x, w)
    if isinstance(w, Affine):
        return _affine_matmul(x, w).astype(x.dtype)
    if w.format.is_affine or w.format.name == "MXFP4":
        return _packed_matmul(x, w, None)
    return _in_pieces(lambda xi, wi: _packed_matmul(xi, wi, None), x, w)


def expert_linear(x: mx.array, w: Weight, chosen: mx.array) -> mx.array:
    """Each token through each of its experts.

    Args:
        x: [T, 1, K] (the same input for all its experts) or [T, E', K] (one each).
        w: [E, N, K].
        chosen: int [T, E'], the experts of each token.

    Returns:
        [T, E', N] in x's dtype.
    """
    rows = mx.broadcast_to(x, (*chosen.shape, x.shape[-1]))[..., None, :]  # [T, E', 1, K]
    if isinstance(w, mx.array):
        out = mx.gather_mm(rows.astype(w.dtype), w.swapaxes(-1, -2), rhs_indices=chosen)
    elif isinstance(w, Affine):
        out = _affine_matmul(rows, w, chosen)
    else:
        if chosen.size < w.shape[0]:  # few tokens: expand the scales of the chosen experts only
            w, chosen = w[chosen.reshape(-1)], mx.arange(chosen.size).reshape(chosen.shape)
        out = _packed_matmul(rows, w, chosen)
    return out.squeeze(-2).astype(x.dtype)


def embed(ids: mx.array, table: Weight, rows: range | None = None) -> mx.array:
    """Rows of a table [V, K], fp32 [T, K], for ids int [T]. `rows`: of a larger table, those of this; others are 0."""
    if rows is not None:
        there = (ids >= rows.start) & (ids < rows.stop)
        return mx.where(there[:, None], embed(mx.where(there, ids - rows.start, 0), table), 0)
    if isinstance(table, mx.array):
        return table[ids].astype(mx.float32)
    if isinstance(table, Affine):
        scales, biases = (a[ids].astype(mx.float32) for a in (table.scales, table.biases))
        return mx.dequantize(table.codes[ids], scales, biases, group_size=table.group, bits=table.bits)
    return dequantize(table, rows=ids)


def attention(
    q: mx.array,
    parts: Sequence[KVView],
    scale: float,
    position: int,
    window: int | None,
    last: mx.array | None = None,
    together: int = 1,
) -> mx.array:
    """softmax(scale * q kᵀ) v over keys and values in parts, each KV head serving heads / kv_heads query heads.

    Each part's scores and products are taken where they lie and summed under one maximum: the parts are never
    joined, except for many queries on NVIDIA, where MLX's fused attention wants them whole. On Metal it has none for
    most of Gemma's heads and would hold a score for each query and key, so there queries are taken a few at a time.

    Args:
        q: [1, heads, T, D], in the parts' dtype.
        parts: consecutive keys and values, [1, kv_heads, n, D], at least one; seen by no query where they follow
            it or lie `window` or more before it. With some in codes all is done in their space, in which they are
            expanded for the length of this call.
        position: of the first query.
        window: None: a query sees all before it.
        last: int [T], the last position that each query sees, at least its own; None: its own.
        together: calls that follow each other, one for each sequence of a batch: where numpy multiplies for several.

    Returns:
        [1, heads, T, D].
    """
    rotation = next((part.rotation for part in parts if part.rotation is not None), None)
    if rotation is not None:
        q, parts = _in_codes_space(q, parts, rotation)
        out = attention(q, parts, scale, position, window, last, together)
        return quantization.unrotate(out, rotation[1]).astype(q.dtype)
    if q.dtype == mx.float32 and _numpy_multiplies(q.shape[2] * together):
        return _numpy_attention(q, parts, scale, position, window, last)
    most = max(1, SCORE_BYTES // (4 * q.shape[1] * sum(part.keys.shape[2] for part in parts)))
    if q.shape[2] > most and mx.metal.is_available() and not on_cpu():
        tiles = []
        for i in range(0, q.shape[2], most):
            seen = None if last is None else last[i : i + most]
            tiles.append(attention(q[:, :, i : i + most], parts, scale, position + i, window, seen))
            mx.eval(tiles[-1])  # or all would be held until all are computed
        return mx.concatenate(tiles, axis=2)
    if len(parts) > 1 and q.shape[2] > 1 and not on_cpu() and not mx.metal.is_available():
        keys = mx.concatenate([part.keys for part in parts], axis=2)
        values = mx.concatenate([part.values for part in parts], axis=2)
        parts = [KVView(parts[0].start, keys, values)]
    masks = [_mask(q.shape[2], part, position, window, last) for part in parts]
    if len(parts) == 1:
        return mx.fast.scaled_dot_product_attention(q, parts[0].keys, parts[0].values, scale=scale, mask=masks[0])
    _, heads, t, d = q.shape
    groups = parts[0].keys.shape[1]
    rows = (q * scale).reshape(1, groups, heads // groups * t, d)
    scores = []
    for part, mask in zip(parts, masks, strict=True):
        s = (rows @ part.keys.swapaxes(-1, -2)).astype(mx.float32)  # [1, groups, heads / groups * T, n]
        if mask is not None:
            s = mx.where(mask, s.reshape(1, groups, -1, t, s.shape[-1]), -mx.inf).reshape(s.shape)
        scores.append(s)
    top = reduce(mx.maximum, (s.max(axis=-1, keepdims=True) for s in scores))
    weights = [mx.exp(s - top) for s in scores]
    total = reduce(mx.add, (w.sum(axis=-1, keepdims=True) for w in weights))
    out = reduce(mx.add, (w.astype(q.dtype) @ part.values for w, part in zip(weights, parts, strict=True)))
    return (out / total).astype(q.dtype).reshape(q.shape)


def _in_codes_space(q: mx.array, parts: Sequence[KVView], rotation: mx.array) -> tuple[mx.array, list[KVView]]:
    """Queries and parts in the space of the codes, where scores are the same: rotated or dequantized, in q's dtype."""
    made = []
    for part in parts:
        if part.rotation is None:
            pair = quantization.rotate_pair(part.keys, part.values, rotation)
        else:
            pair = quantization.dequantize((part.keys, part.values), rotation, q.dtype)
        made.append(KVView(part.start, *(a.astype(q.dtype) for a in pair)))
    return quantization.rotate(q, rotation[0]).astype(q.dtype), made


def _numpy_attention(
    q: mx.array, parts: Sequence[KVView], scale: float, position: int, window: int | None, last: mx.array | None
) -> mx.array:
    """`attention` where numpy multiplies; scores are worked on in place."""
    _, heads, t, d = q.shape
    groups = parts[0].keys.shape[1]
    rows = np.asarray(q).reshape(groups, heads // groups * t, d) * np.float32(scale)
    masks = [_mask(t, part, position, window, last) for part in parts]
    pairs = [(np.asarray(part.keys)[0], np.asarray(part.values)[0]) for part in parts]
    return mx.array(attend(rows, pairs, masks)).reshape(q.shape)


def attend(
    rows: np.ndarray, pairs: Sequence[tuple[np.ndarray, np.ndarray]], masks: Sequence[mx.array | None] | None
) -> np.ndarray:
    """softmax(rows kᵀ) v in numpy, over keys and values in parts.

    Args:
        rows: fp32 [G, R, D], the scaled queries of each KV head: query heads, and of each all its T tokens.
        pairs: keys and values, fp32 [G, n, D].
        masks: for each part, bool [T, n], which keys tokens see; None: all.

    Returns:
        fp32 [G, R, D].
    """
    scores = []
    for (keys, _), mask in zip(pairs, masks or [None] * len(pairs), strict=True):
        s = rows @ keys.swapaxes(-1, -2)  # [G, R, n]
        if mask is not None:
            by_query = s.reshape(len(s), -1, *mask.shape)
            by_query += np.where(np.asarray(mask), np.float32(0), np.float32(-np.inf))
        scores.append(s)
    top = reduce(np.maximum, (s.max(axis=-1, keepdims=True) for s in scores))
    for s in scores:
        np.exp(np.subtract(s, top, out=s), out=s)
    total = sum(s.sum(axis=-1, keepdims=True) for s in scores)
    out: np.ndarray = sum(s @ values for s, (_, values) in zip(scores, pairs, strict=True)) / total
    return out


def _mask(
    queries: int, part: KVView, position: int, window: int | None, last: mx.array | None = None
) -> mx.array | None:
    """The keys of a part that queries from `position` on see: bool [T, n]; None: all of them."""
    start, stop = part.start, part.start + part.keys.shape[2]
    if stop <= position + 1 and (window is None or start > position + queries - 1 - window):
        return None
    q = mx.arange(position, position + queries)[:, None]
    k = mx.arange(start, stop)[None]
    seen = k <= (q if last is None else last[:, None])
    return seen if window is None else seen & (k > q - window)


def _dense_matmul(x: mx.array, w: mx.array) -> mx.array:
    """x @ wᵀ for a dense [N, K]; a 16-bit weight is widened, some rows at a time, so that x keeps its precision."""
    if w.dtype == mx.float32 and _numpy_multiplies(x.size // x.shape[-1], w.size):
        rows = np.asarray(x.astype(mx.float32).reshape(-1, x.shape[-1]))
        return mx.array(product(rows, np.asarray(w))).reshape(*x.shape[:-1], -1).astype(x.dtype)
    if w.dtype == x.dtype:
        return x @ w.T
    return _in_pieces(lambda xi, wi: (xi.astype(mx.float32) @ wi.astype(mx.float32).T).astype(x.dtype), x, w)


def _in_pieces(product: Callable[[mx.array, Any], mx.array], x: mx.array, w: mx.array | Packed) -> mx.array:
    """A product that expands a weight [N, K] piece by piece.

    Each piece waits for the one before (`depends`), so that only one is ever wide.
    """
    rows = max(1, _EXPAND // w.shape[-1])
    pieces: list[mx.array] = []
    for start in range(0, w.shape[0], rows):
        xi = mx.depends([x], pieces[-1:])[0] if pieces else x
        pieces.append(product(xi, w[start : start + rows]))
    return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=-1)


def _numpy_multiplies(rows: int, weights: int = 0) -> bool:
    """Returns True if numpy multiplies so many rows by so many weights faster: MLX on Linux has a slow BLAS.

    numpy's is 40 times as fast on a prompt and twice on the head, on two cores; for a few rows of less, handing
    arrays over and back costs more than it gains (docs/log.md). On macOS MLX uses Accelerate.
    """
    return (rows >= 4 or weights >= 1 << 24) and sys.platform == "linux" and on_cpu()


def _affine_matmul(x: mx.array, w: Affine, chosen: mx.array | None = None) -> mx.array:
    """In fp32, as `_packed_matmul` and for its reason."""
    x, scales, biases = (a.astype(mx.float32) for a in (x, w.scales, w.biases))
    return _quantized_matmul(x, w.codes, scales, biases, chosen, bits=w.bits, group_size=w.group)


def _packed_matmul(x: mx.array, w: Packed, chosen: mx.array | None) -> mx.array:
    """x @ wᵀ for a packed weight, in fp32 (fp16 scales would cost accuracy): [N, K], or gathered experts."""
    out_dtype, x, bits = x.dtype, x.astype(mx.float32), w.format.bits
    if w.format.name == "MXFP4":
        assert w.group_scales is not None
        out = _quantized_matmul(x, w.codes, w.group_scales, None, chosen, bits=bits, mode="mxfp4")
    elif not w.format.is_affine:
        dense = dequantize(w)
        out = x @ dense.T if chosen is None else mx.gather_mm(x, dense.swapaxes(-1, -2), rhs_indices=chosen)
    elif w.format.group == 32:
        out = _quantized_matmul(x, w.codes, *affine_parts(w), chosen, bits=bits)
    else:
        # MLX has no groups of 16. The product over groups of 32 is taken twice, with the other
        # half of each group set to zero in x and with this half's scales: exact, nothing expanded.
        halves, both = x.reshape(*x.shape[:-1], -1, 2, 16), affine_parts(w)
        keep = mx.eye(2)[:, :, None]  # [half, half, 1]
        out = mx.zeros((), mx.float32)
        for half in range(2):
            scales, biases = (mx.contiguous(a[..., half::2]) for a in both)
            kept = (halves * keep[half]).reshape(x.shape)
            out = out + _quantized_matmul(kept, w.codes, scales, biases, chosen, bits=bits)
    return out.astype(out_dtype)


def _quantized_matmul(
    x: mx.array, codes: mx.array, scales: mx.array, biases: mx.array | None, chosen: mx.array | None, **options: Any
) -> mx.array:
    """MLX's own product, plain or gathered by expert; `options` are its bits, group_size (else 32) and mode."""
    options = {"transpose": True, "group_size": 32, "mode": "affine", **options}
    if chosen is None:
        return mx.quantized_matmul(x, codes, scales, biases, **options)
    return mx.gather_qmm(x, codes, scales, biases, rhs_indices=chosen, **options)
