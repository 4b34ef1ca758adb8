"""RoPE, the norms of q, k and v, and the write to the KV tail: qkv.metal, each kernel beside its reference.

In and out: MLX arrays for one token, or a handful (T up to 8). Knows no model and no KV state.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from ..gpu.render import Launcher, absent, prepare, render
from . import stock
from .cases import COUNT, EPS, Case, Check, Heads, Sizes, case, cases, norm_weight, normal, random_kv, state_dtype
from .op import Op
from .paged import PAGE, pool_case, write_rows
from .parts import TAIL, KVPart


def rotations(
    launcher: Launcher, position: mx.array, wavelengths: mx.array, *, tokens: int, by_row: bool = False
) -> Any:
    """RoPE's rotations of a step's tokens, for all layers of a kind.

    Args:
        position: int32 [1], of the first token; with `by_row` [tokens, ..], of which each row's first counts.
        wavelengths: fp32 [D / 2], tokens per radian of each pair of dimensions; inf: does not turn.

    Returns:
        cosines and sines, fp32 [tokens, 2, D / 2].
    """
    half = wavelengths.size
    kernel = render("rotations", "qkv.metal", mx.float32, {"HALF": half, "BY_ROW": by_row})
    launch = prepare(launcher, kernel, (-(-half // 32), tokens, 1), 32, ((tokens, 2, half), mx.float32))
    return launch(position, wavelengths)[0]


def rotations_reference(position: mx.array, wavelengths: mx.array, *, tokens: int, by_row: bool = False) -> mx.array:
    """`rotations` in stock MLX."""
    positions = (position[:, 0] if by_row else position + mx.arange(tokens)).astype(mx.float32)
    angles = positions[:, None] * (1 / wavelengths)
    return mx.stack([mx.cos(angles), mx.sin(angles)], axis=1)


ROTATIONS = Op("rotations", rotations, rotations_reference)


class QKVArrays(NamedTuple):
    """The arrays that `qkv_post` takes."""

    q: mx.array  # [T, H D]; with a tail and no k (and v) these stand behind it: [T, (H + G) D] or [T, (H + 2 G) D]
    k: mx.array | None  # [T, G D], as v
    v: mx.array | None
    q_norm: mx.array  # fp32 [D], as k_norm
    k_norm: mx.array | None
    rope: mx.array  # fp32 [T, 2, D / 2], what `rotations` gives
    # Keys and values [1, G, room, D] in the results' dtype. Neither this nor a pool: the layer makes q alone.
    tail: KVPart | None = None
    in_tail: mx.array | None = None  # int32 [1], tokens of the tail in use; with T more at most its room
    # Or a pool [pages, G, page, D] of several sequences, each of which has one of the tokens: paged.py.
    pool: KVPart | None = None
    places: mx.array | None = None  # int32 [T, ..]: that token's is the last place of its row


class QKVOptions(NamedTuple):
    """Sizes and kinds for `qkv_post`."""

    heads: int
    kv_heads: int
    eps: float
    dtype: mx.Dtype  # of the results
    value_norm: bool = True  # values go through RMSNorm (without a weight)
    v_is_k: bool = False  # there is no v: values are the raw keys


def qkv_post(launcher: Launcher, given: QKVArrays, options: QKVOptions) -> tuple[Any, Any, Any]:
    """Norms and RoPE on the raw products of q, k and v, and the new keys and values behind those of the tail.

    Returns:
        q [T, H, D], and the new tail's keys and values (None without a tail), of which the first in_tail + T tokens
        are defined; or the pool's, which this writes in place: they are to be read after q.
    """
    (q, k, v, q_norm, k_norm, rope, tail, count, pool, places) = given
    heads, kv_heads, eps, dtype, value_norm, v_is_k = options
    tokens, dim = q.shape[0], q_norm.size
    has_kv = tail is not None or pool is not None
    flags: dict[str, Any] = {"KV": has_kv, "VALUE_NORM": value_norm, "V_IS_K": v_is_k and has_kv}
    flags |= {"JOINED_K": has_kv and k is None, "JOINED_V": has_kv and v is None and not v_is_k}
    tail_shape = tail[0].shape if tail is not None else (0, 0, 0)
    capacity = tail_shape[-2]
    defines: dict[str, Any] = {"C": dtype, "C_BYTES": dtype.size, "H": heads, "G": kv_heads, "D": dim}
    arrays = {"q": q, "k": k, "v": v, "q_norm": q_norm, "k_norm": k_norm, "rope": rope}
    arrays |= {"tail_k": tail and tail[0], "tail_v": tail and tail[1], "count": count}
    arrays |= {"places": places, "pool_k": pool and pool[0], "pool_v": pool and pool[1]}
    missing = absent(arrays) + (["new_k", "new_v"] if tail is None else [])
    flags |= {"POOL": pool is not None, "PAGE": PAGE if pool is None else pool[0].shape[2]}
    kernel = render("qkv_post", "qkv.metal", q.dtype, defines | flags | {"EPS": eps}, missing)
    groups = -(-tokens * (heads + 2 * kv_heads * has_kv) // 4)
    if tail is not None and isinstance(tail[0], mx.array):  # a recorded step's tail is written where it lies
        groups += -(-kv_heads * capacity * dim * dtype.size // 16 // 128)
    results = ((tokens, heads, dim), dtype), (tail_shape, dtype), (tail_shape, dtype)
    out = prepare(launcher, kernel, (groups, 1, 1), 128, *results[: len(kernel.outputs)]).by_name(arrays)
    return (out[0], *pool) if pool is not None else (out[0], out[1], out[2]) if has_kv else (out[0], None, None)


def qkv_post_reference(given: QKVArrays, options: QKVOptions) -> tuple[mx.array, mx.array | None, mx.array | None]:
    """`qkv_post` in stock MLX."""
    (q, k, v, q_norm, k_norm, rope, tail, count, pool, places) = given
    heads, kv_heads, eps, dtype, value_norm, v_is_k = options
    tokens, dim = q.shape[0], q_norm.size

    def apart(x: mx.array, n: int) -> mx.array:  # fp32 [1, n, T, D]
        return x.astype(mx.float32).reshape(1, tokens, n, dim).swapaxes(1, 2)

    def turned(x: mx.array) -> mx.array:
        (a, b), (c, s) = mx.split(x, 2, axis=-1), (rope[:, 0], rope[:, 1])
        return mx.concatenate([a * c - b * s, b * c + a * s], axis=-1)

    if k_norm is None or (tail is None and pool is None):
        made = turned(stock.rms_norm(apart(q, heads), q_norm, eps))
        return made[0].swapaxes(0, 1).astype(dtype), None, None
    ends = [heads * dim, (heads + (k is None) * kv_heads) * dim]
    q, joined_k, joined_v = mx.split(q, ends, axis=1)
    k = apart(joined_k if k is None else k, kv_heads)
    v = k if v_is_k else apart(joined_v if v is None else v, kv_heads)
    if value_norm:
        v = stock.rms_norm(v, None, eps)
    made = turned(stock.rms_norm(apart(q, heads), q_norm, eps))
    k, v = turned(stock.rms_norm(k, k_norm, eps)).astype(dtype), v.astype(dtype)
    if pool is not None and places is not None:
        return made[0].swapaxes(0, 1).astype(dtype), *write_rows(pool, places, (k, v))
    assert tail is not None and count is not None
    rows = mx.broadcast_to((count + mx.arange(tokens))[:, None], k.shape)
    new = [
        mx.put_along_axis(old.reshape(1, *old.shape[-3:]), rows, x, axis=2).reshape(old.shape)
        for old, x in zip(tail, (k, v), strict=True)
    ]
    return made[0].swapaxes(0, 1).astype(dtype), new[0], new[1]


QKV_POST = Op("qkv_post", qkv_post, qkv_post_reference)


# ---------------------------------------------------------------- cases

POSITION = 5000  # angles must be right far from 0


def rope_wavelengths(dim: int, window: int) -> mx.array:
    """Wavelengths of RoPE; a global head rotates only in part."""
    rotates = mx.arange(dim // 2) < (dim // 2 if window else dim // 8)
    return mx.where(rotates, 10000 ** (mx.arange(dim // 2) * 2 / dim), mx.inf)


@cases
def rotations_cases(s: Sizes) -> Iterator[Check]:
    def make(dim: int, window: int) -> Case:
        wavelengths = rope_wavelengths(dim, window)
        return case(ROTATIONS, 3 * wavelengths.nbytes, mx.array([POSITION], mx.int32), wavelengths, tokens=1)

    def by_row(dim: int, window: int) -> Case:
        wavelengths, position = rope_wavelengths(dim, window), mx.arange(48, dtype=mx.int32).reshape(4, 12) * 77
        return case(ROTATIONS, 12 * wavelengths.nbytes, position, wavelengths, tokens=4, by_row=True)

    for dim, window in dict.fromkeys((h.dim, h.window) for h in s.heads):
        kind = f"heads of {dim}, {'sliding' if window else 'global'}"
        yield Check(ROTATIONS.key, kind, partial(make, dim, window))
        yield Check(ROTATIONS.key, f"{kind}, several", partial(by_row, dim, window))


@cases
def qkv_post_cases(s: Sizes) -> Iterator[Check]:
    """For a tail, and for three rows of a pool, of which what is written is compared."""

    def make(h: Heads, rows: int) -> Case:
        dtype, dim, tokens = state_dtype(), h.dim, rows or 1
        behind = {"kv": 2, "k": 1, "": 0}[h.joined] * h.kv_heads if h.has_kv else 0
        q = normal(tokens, (h.heads + behind) * dim)
        apart = [h.joined == "" and h.has_kv, h.joined != "kv" and not h.v_is_k and h.has_kv]
        k, v = (normal(tokens, h.kv_heads * dim) if there else None for there in apart)
        rope = rotations_reference(mx.array([POSITION], mx.int32), rope_wavelengths(dim, h.window), tokens=tokens)
        n_bytes, options = q.nbytes + tokens * h.heads * dim * dtype.size, (h.heads, h.kv_heads, EPS, dtype)
        given = QKVArrays(q, k, v, norm_weight(dim), norm_weight(dim) if h.has_kv else None, rope)
        if rows:
            (keys, values), places = pool_case(replace(h, window=0), (7, 129, 300)[:rows], dtype, 1)
            pool = mx.zeros_like(keys), mx.zeros_like(values)
            mx.eval(pool)
            given = given._replace(pool=pool, places=places)
            n_bytes += 2 * tokens * h.kv_heads * dim * dtype.size
        elif h.has_kv:
            given = given._replace(tail=random_kv(h, TAIL, dtype), in_tail=mx.array([COUNT], mx.int32))
            n_bytes += 2 * h.kv_heads * dim * dtype.size * (2 * COUNT + 1)
        made = case(QKV_POST, n_bytes, given, QKVOptions(*options, h.value_norm, h.v_is_k))
        if rows:  # a pool is written once q is there
            return replace(made, compared=lambda y: [y[0], *(a + 0 * _once(y[0], a.dtype) for a in y[1:])])
        return replace(made, compared=lambda y: [y[0], *(a[..., : COUNT + 1, :] for a in y[1:])])

    for h in dict.fromkeys(s.heads):
        kinds = ("q alone" if not h.has_kv else f"q+{h.joined} joined" if h.joined else "q k v") + ", k=v" * h.v_is_k
        for rows in (0, 3) if h.has_kv else (0,):
            several = f", {rows} rows of a pool" * (rows > 0)
            shape = f"{h}, {kinds}" + ", raw v" * (not h.value_norm) + several
            yield Check(QKV_POST.key, shape, partial(make, h, rows))


def _once(q: mx.array, dtype: mx.Dtype) -> mx.array:
    """A number that is there once q is."""
    return mx.isfinite(q).all().astype(dtype)
