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
from .parts import TAIL, KVPart


def rotations(launcher: Launcher, position: mx.array, wavelengths: mx.array, *, tokens: int) -> Any:
    """RoPE's rotations of a step's tokens, for all layers of a kind.

    Args:
        position: int32 [1], of the first token.
        wavelengths: fp32 [D / 2], tokens per radian of each pair of dimensions; inf: does not turn.

    Returns:
        cosines and sines, fp32 [tokens, 2, D / 2].
    """
    half = wavelengths.size
    kernel = render("rotations", "qkv.metal", mx.float32, {"HALF": half})
    launch = prepare(launcher, kernel, (-(-half // 32), tokens, 1), 32, ((tokens, 2, half), mx.float32))
    return launch(position, wavelengths)[0]


def rotations_reference(position: mx.array, wavelengths: mx.array, *, tokens: int) -> mx.array:
    """`rotations` in stock MLX."""
    positions = (position + mx.arange(tokens)).astype(mx.float32)
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
    # Keys and values [1, G, room, D] in the results' dtype. None: the layer has none and makes q alone.
    tail: KVPart | None
    in_tail: mx.array | None  # int32 [1], tokens of the tail in use; with T more at most its room


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
        are defined.
    """
    (q, k, v, q_norm, k_norm, rope, tail, count), (heads, kv_heads, eps, dtype, value_norm, v_is_k) = given, options
    tokens, dim = q.shape[0], q_norm.size
    has_kv = tail is not None
    flags = {"KV": has_kv, "VALUE_NORM": value_norm, "V_IS_K": v_is_k and has_kv}
    flags |= {"JOINED_K": has_kv and k is None, "JOINED_V": has_kv and v is None and not v_is_k}
    tail_shape = tail[0].shape if tail is not None else (0, 0, 0)
    capacity = tail_shape[-2]
    defines: dict[str, Any] = {"C": dtype, "C_BYTES": dtype.size, "H": heads, "G": kv_heads, "D": dim}
    arrays = {"q": q, "k": k, "v": v, "q_norm": q_norm, "k_norm": k_norm, "rope": rope}
    arrays |= {"tail_k": tail and tail[0], "tail_v": tail and tail[1], "count": count}
    missing = absent(arrays) + ([] if has_kv else ["new_k", "new_v"])
    kernel = render("qkv_post", "qkv.metal", q.dtype, defines | flags | {"EPS": eps}, missing)
    groups = -(-tokens * (heads + 2 * kv_heads * has_kv) // 4)
    if tail is not None and isinstance(tail[0], mx.array):  # a recorded step's tail is written where it lies
        groups += -(-kv_heads * capacity * dim * dtype.size // 16 // 128)
    results = ((tokens, heads, dim), dtype), (tail_shape, dtype), (tail_shape, dtype)
    out = prepare(launcher, kernel, (groups, 1, 1), 128, *results[: len(kernel.outputs)]).by_name(arrays)
    return (out[0], out[1], out[2]) if has_kv else (out[0], None, None)


def qkv_post_reference(given: QKVArrays, options: QKVOptions) -> tuple[mx.array, mx.array | None, mx.array | None]:
    """`qkv_post` in stock MLX."""
    (q, k, v, q_norm, k_norm, rope, tail, count), (heads, kv_heads, eps, dtype, value_norm, v_is_k) = given, options
    tokens, dim = q.shape[0], q_norm.size

    def apart(x: mx.array, n: int) -> mx.array:  # fp32 [1, n, T, D]
        return x.astype(mx.float32).reshape(1, tokens, n, dim).swapaxes(1, 2)

    def turned(x: mx.array) -> mx.array:
        (a, b), (c, s) = mx.split(x, 2, axis=-1), (rope[:, 0], rope[:, 1])
        return mx.concatenate([a * c - b * s, b * c + a * s], axis=-1)

    if tail is None or k_norm is None or count is None:
        made = turned(stock.rms_norm(apart(q, heads), q_norm, eps))
        return made[0].swapaxes(0, 1).astype(dtype), None, None
    ends = [heads * dim, (heads + (k is None) * kv_heads) * dim]
    q, joined_k, joined_v = mx.split(q, ends, axis=1)
    k = apart(joined_k if k is None else k, kv_heads)
    v = k if v_is_k else apart(joined_v if v is None else v, kv_heads)
    if value_norm:
        v = stock.rms_norm(v, None, eps)
    made = turned(stock.rms_norm(apart(q, heads), q_norm, eps))
    rows = mx.broadcast_to((count + mx.arange(tokens))[:, None], k.shape)
    new = [
        mx.put_along_axis(old.reshape(1, *old.shape[-3:]), rows, x.astype(dtype), axis=2).reshape(old.shape)
        for old, x in zip(tail, (turned(stock.rms_norm(k, k_norm, eps)), v), strict=True)
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

    for dim, window in dict.fromkeys((h.dim, h.window) for h in s.heads):
        yield Check(ROTATIONS.key, f"heads of {dim}, {'sliding' if window else 'global'}", partial(make, dim, window))


@cases
def qkv_post_cases(s: Sizes) -> Iterator[Check]:
    def make(h: Heads) -> Case:
        dtype, dim = state_dtype(), h.dim
        behind = {"kv": 2, "k": 1, "": 0}[h.joined] * h.kv_heads if h.has_kv else 0
        q = normal(1, (h.heads + behind) * dim)
        apart = [h.joined == "" and h.has_kv, h.joined != "kv" and not h.v_is_k and h.has_kv]
        k, v = (normal(1, h.kv_heads * dim) if there else None for there in apart)
        rope = rotations_reference(mx.array([POSITION], mx.int32), rope_wavelengths(dim, h.window), tokens=1)
        n_bytes, k_norm, tail, count = q.nbytes + h.heads * dim * dtype.size, None, None, None
        if h.has_kv:
            tail, count, k_norm = random_kv(h, TAIL, dtype), mx.array([COUNT], mx.int32), norm_weight(dim)
            n_bytes += 2 * h.kv_heads * dim * dtype.size * (2 * COUNT + 1)
        given = QKVArrays(q, k, v, norm_weight(dim), k_norm, rope, tail, count)
        made = case(QKV_POST, n_bytes, given, QKVOptions(h.heads, h.kv_heads, EPS, dtype, h.value_norm, h.v_is_k))
        return replace(made, compared=lambda y: [y[0], *(a[..., : COUNT + 1, :] for a in y[1:])])

    for h in dict.fromkeys(s.heads):
        kinds = ("q alone" if not h.has_kv else f"q+{h.joined} joined" if h.joined else "q k v") + ", k=v" * h.v_is_k
        yield Check(QKV_POST.key, f"{h}, {kinds}" + ", raw v" * (not h.value_norm), partial(make, h))
