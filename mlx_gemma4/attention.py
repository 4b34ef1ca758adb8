"""The attention kernels: norms and RoPE of q, k and v with the write to the KV tail, and attention itself; with twins.

In and out: MLX arrays for one token, or a handful (T up to 8). `rotations` and `qkv_post` launch one kernel through a
`Maker` (kernels.py), `attention` one or two; the function named `.._twin` has the same arguments and result in stock
MLX. Nothing here knows a model or a KV state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import mlx.core as mx

from . import long_attention, ops
from .kernels import _TYPES, CORES, Maker, _build, _f, render

TAIL = 64  # tokens that the mutable end of a layer's keys and values can hold
SHORT = 64  # tokens up to which attention is one launch

Part = tuple[mx.array, mx.array]  # keys and values, [G, capacity, D] or [1, G, capacity, D] each
Launch = tuple[Callable[..., Sequence[Any]], dict[str, Any]]  # a kernel and its arguments but for the inputs


# ---------------------------------------------------------------- queries, keys and values


def rotations(position: mx.array, wavelengths: mx.array, maker: Maker, *, tokens: int) -> Any:
    """What RoPE turns a step's tokens by in all layers of a kind.

    Args:
        position: int32 [1], of the first token.
        wavelengths: fp32 [D / 2], tokens per radian of each pair of dimensions; inf: does not turn.

    Returns:
        cosines and sines, fp32 [tokens, 2, D / 2].
    """
    half = wavelengths.size
    return _build(maker, render("rotations", "qkv.metal", mx.float32, {"HALF": half}))(
        inputs=[position, wavelengths],
        grid=(32 * -(-half // 32), tokens, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(tokens, 2, half)],
        output_dtypes=[mx.float32],
    )[0]


def rotations_twin(position: mx.array, wavelengths: mx.array, *, tokens: int) -> mx.array:
    """`rotations` in stock MLX."""
    positions = (position + mx.arange(tokens)).astype(mx.float32)
    angles = positions[:, None] * (1 / wavelengths)
    return mx.stack([mx.cos(angles), mx.sin(angles)], axis=1)


def qkv_post(
    q: mx.array,
    k: mx.array | None,
    v: mx.array | None,
    q_norm: mx.array,
    k_norm: mx.array | None,
    rope: mx.array,
    tail: Part | None,
    count: mx.array | None,
    maker: Maker,
    *,
    heads: int,
    kv_heads: int,
    eps: float,
    dtype: mx.Dtype,
    value_norm: bool = True,
    v_is_k: bool = False,
) -> tuple[Any, Any, Any]:
    """Norms and RoPE on the raw products of q, k and v, and the new keys and values behind those of the tail.

    Args:
        q: [T, H D], or with `k` (and `v`) None and a tail: those stand behind it in its rows, [T, (H + G) D] or
            [T, (H + 2 G) D].
        k, v: [T, G D] or None.
        q_norm, k_norm: fp32 [D].
        rope: fp32 [T, 2, D / 2], what `rotations` gives.
        tail: keys and values [G, TAIL, D] or [1, G, TAIL, D] in `dtype`; None: the layer has none of its own and
            makes q alone.
        count: int32 [1], tokens in the tail; count + T is at most TAIL.
        dtype: of the results.
        value_norm: values go through RMSNorm (without a weight).
        v_is_k: there is no v: values are the raw keys.

    Returns:
        q [T, H, D], and the new tail's keys and values (None without a tail), of which only the first count + T tokens
        are defined.
    """
    tokens, dim = q.shape[0], q_norm.size
    has_kv = tail is not None
    width = 2 if dtype != mx.float32 else 4
    flags = {"KV": has_kv, "VALUE_NORM": value_norm, "V_IS_K": v_is_k and has_kv}
    flags |= {"JOINED_K": has_kv and k is None, "JOINED_V": has_kv and v is None and not v_is_k}
    tail_shape = tail[0].shape if tail is not None else (0, 0, 0)
    capacity = tail_shape[-2]
    defines = {"C": _TYPES[dtype], "C_BYTES": width, "H": heads, "G": kv_heads, "D": dim, "TAIL": capacity}
    arrays = {"q": q, "k": k, "v": v, "q_norm": q_norm, "k_norm": k_norm, "rope": rope}
    arrays |= {"tail_k": tail and tail[0], "tail_v": tail and tail[1], "count": count}
    kernel = render(
        "qkv_post",
        "qkv.metal",
        q.dtype,
        defines | flags | {"EPS": _f(eps)},
        [name for name, a in arrays.items() if a is None] + ([] if has_kv else ["new_k", "new_v"]),
    )
    groups = -(-tokens * (heads + 2 * kv_heads * has_kv) // 4)
    if tail is not None and isinstance(tail[0], mx.array):  # else a recorded step's, which is written where it lies
        groups += -(-kv_heads * capacity * dim * width // 16 // 128)
    out = _build(maker, kernel)(
        inputs=[arrays[name] for name in kernel.inputs],
        grid=(128 * groups, 1, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(tokens, heads, dim)] + [tail_shape] * 2 * has_kv,
        output_dtypes=[dtype] * (1 + 2 * has_kv),
    )
    return (out[0], out[1], out[2]) if has_kv else (out[0], None, None)


def qkv_post_twin(
    q: mx.array,
    k: mx.array | None,
    v: mx.array | None,
    q_norm: mx.array,
    k_norm: mx.array | None,
    rope: mx.array,
    tail: Part | None,
    count: mx.array | None,
    *,
    heads: int,
    kv_heads: int,
    eps: float,
    dtype: mx.Dtype,
    value_norm: bool = True,
    v_is_k: bool = False,
) -> tuple[mx.array, mx.array | None, mx.array | None]:
    """`qkv_post` in stock MLX."""
    tokens, dim = q.shape[0], q_norm.size

    def apart(x: mx.array, n: int) -> mx.array:  # fp32 [1, n, T, D]
        return x.astype(mx.float32).reshape(1, tokens, n, dim).swapaxes(1, 2)

    def turned(x: mx.array) -> mx.array:
        (a, b), (c, s) = mx.split(x, 2, axis=-1), (rope[:, 0], rope[:, 1])
        return mx.concatenate([a * c - b * s, b * c + a * s], axis=-1)

    if tail is None or k_norm is None or count is None:
        made = turned(ops.rms_norm(apart(q, heads), q_norm, eps))
        return made[0].swapaxes(0, 1).astype(dtype), None, None
    ends = [heads * dim, (heads + (k is None) * kv_heads) * dim]
    q, joined_k, joined_v = mx.split(q, ends, axis=1)
    k = apart(joined_k if k is None else k, kv_heads)
    v = k if v_is_k else apart(joined_v if v is None else v, kv_heads)
    if value_norm:
        v = ops.rms_norm(v, None, eps)
    made = turned(ops.rms_norm(apart(q, heads), q_norm, eps))
    rows = mx.broadcast_to((count + mx.arange(tokens))[:, None], k.shape)
    new = [
        mx.put_along_axis(old.reshape(1, *old.shape[-3:]), rows, x.astype(dtype), axis=2).reshape(old.shape)
        for old, x in zip(tail, (turned(ops.rms_norm(k, k_norm, eps)), v), strict=True)
    ]
    return made[0].swapaxes(0, 1).astype(dtype), new[0], new[1]


# ---------------------------------------------------------------- attention


@dataclass(frozen=True)
class Cut:
    """How attention is cut; see attention.metal."""

    rows: int  # queries that a threadgroup holds
    simdgroups: int = 4  # of a threadgroup
    keys: int = 4  # tokens a lane scores at once
    threadgroups: int = 0  # that share the length, at most about so many; 0: it is one piece, which needs no merge

    @property
    def block(self) -> int:
        """Tokens that a threadgroup takes at a time."""
        return 4 * self.keys * self.simdgroups

    def blocks(self, lengths: Sequence[int], share: int = 1) -> int:
        """Pieces of `share` blocks in parts with room for so many tokens: none lies in two parts."""
        return sum(-(-length // (self.block * share)) for length in lengths)

    def share(self, lengths: Sequence[int], across: int) -> int:
        """Blocks of a piece, for `across` threadgroups to work on each piece."""
        if self.blocks(lengths) * across <= self.threadgroups:
            return 1
        most = max(self.threadgroups // across, 2 * len(lengths))
        share = -(-self.blocks(lengths) // most)
        while self.blocks(lengths, share) > most:  # parts' last pieces are short
            share += 1 + share // 16
        return share

    def pieces(self, lengths: Sequence[int], across: int) -> int:
        """Of the length, likewise."""
        return self.blocks(lengths, self.share(lengths, across)) if self.threadgroups else 1


def attention_cut(lengths: Sequence[int], rows: int, kv_heads: int, threadgroups: int = 384) -> Cut:
    """The cut for `rows` queries a KV head over parts of up to so many tokens.

    A threadgroup waits for memory twice a block, so as many as a large GPU holds at once share the blocks; only where
    there would be more does one take several, and where there are too few, blocks are small and queries apart. A tail
    alone is one piece: there is nothing to merge.
    """
    if sum(lengths) <= SHORT:
        return Cut(min(rows, 2), simdgroups=16, keys=1)
    cut = Cut(-(-rows // -(-rows // 8)), threadgroups=threadgroups)
    if cut.rows > 4:
        cut = replace(cut, keys=2)  # more would leave room for fewer threadgroups, by their registers
    while cut.blocks(lengths) * -(-rows // cut.rows) * kv_heads < CORES:
        if cut.keys > 2:
            cut = replace(cut, keys=2)
        elif cut.rows > 2:
            cut = replace(cut, rows=-(-cut.rows // 2))
        else:
            break
    return cut


def attention(
    q: mx.array,
    parts: Sequence[Part],
    spans: mx.array,
    maker: Maker,
    *,
    scale: float,
    window: int = 0,
    out: mx.Dtype | None = None,
    cut: Cut | None = None,
) -> Any:
    """A few new tokens attend to all that came before and to themselves.

    Many fp16 keys and values go to `long_attention`, unless a cut says how this kernel is to be cut.

    Args:
        q: [T, H, D], T up to 8, D a multiple of 32.
        parts: up to `long_attention.MAX_PARTS` of keys and values in q's dtype, in the order of the tokens; the last
            ends with the T tokens themselves.
        spans: int32 [parts, 2]: first and one past the last token in use, of each part.
        scale: of the scores.
        window: each token sees only the last `window` ones, itself included; 0: all. Spans may be wider.
        out: dtype of the result, q's by default.
        cut: instead of `attention_cut`'s.

    Returns:
        [T, H D]
    """
    if cut is None and long_attention.takes(q, parts, window):
        return long_attention.long_attention(q, parts, spans, maker, scale=scale, out=out)
    done, merge = _launched(q, parts, spans, maker, scale, window, out, cut, False)
    return done[0] if merge is None else merge[0](inputs=list(done), **merge[1])[0]


def attention_sums(q: mx.array, parts: Sequence[Part], spans: mx.array, maker: Maker, *, scale: float) -> Any:
    """`attention` whose pieces are not yet added up, nor divided: for those who have more to add.

    Returns:
        sums fp32 [T H, pieces, D] and stats fp32 [T H, pieces, 2]: maximum of the scores over ln 2, sum of
        2^(score - maximum); of a piece without tokens -1e30 and 0.
    """
    return _launched(q, parts, spans, maker, scale, 0, None, None, True)[0]


def _launched(
    q: mx.array,
    parts: Sequence[Part],
    spans: mx.array,
    maker: Maker,
    scale: float,
    window: int,
    out: mx.Dtype | None,
    cut: Cut | None,
    undivided: bool,
) -> tuple[Sequence[Any], Launch | None]:
    """What attention's own kernel gives, and the merge that is to follow."""
    lengths = tuple(k.shape[-2] for k, _ in parts)
    dims = tuple(k.ndim for k, _ in parts)
    cached = (q.shape, q.dtype, parts[0][0].shape[-3], lengths, dims, maker, scale, window, out, cut, undivided)
    run, launch, merge = _prepared_attention(*cached)
    return run(inputs=[q, spans, *(a for part in parts for a in part)], **launch), merge


@lru_cache(maxsize=4096)  # hundreds of launches a token: the GPU must not wait for this to be worked out
def _prepared_attention(
    shape: tuple[int, int, int],
    dtype: mx.Dtype,
    kv_heads: int,
    lengths: tuple[int, ...],
    dims: tuple[int, ...],
    maker: Maker,
    scale: float,
    window: int,
    out: mx.Dtype | None,
    cut: Cut | None,
    undivided: bool,
) -> tuple[Callable[..., Sequence[Any]], dict[str, Any], Launch | None]:
    """The kernel, its arguments but for the inputs, and the same of the merge if there is one."""
    tokens, heads, dim = shape
    rows, total = heads // kv_heads * tokens, tokens * heads
    cut = cut or attention_cut(lengths, rows, kv_heads)
    across = -(-rows // cut.rows)
    pieces = cut.pieces(lengths, across * kv_heads)
    split = undivided or cut.threadgroups > 0
    out = out or dtype
    defines = {"D": dim, "GQA": heads // kv_heads, "ROWS": cut.rows, "SG": cut.simdgroups, "KEYS": cut.keys}
    defines |= {"WINDOW": window, "SPLIT": split, "WHOLE": cut.threadgroups == 0}
    defines |= {"SHARE": cut.share(lengths, across * kv_heads) if cut.threadgroups else 1}
    described, absent = long_attention.describe_parts(dims)
    kernel = render(
        "attention",
        "attention.metal",
        dtype,
        defines | described | {"U": _TYPES[out], "SCALE": _f(scale)},
        absent + (["out"] if split else ["sums", "stats"]),
    )
    launch: dict[str, Any] = {
        "grid": (32 * cut.simdgroups * across, pieces, kv_heads),
        "threadgroup": (32 * cut.simdgroups, 1, 1),
        "output_shapes": [(total, pieces, dim), (total, pieces, 2)] if split else [(tokens, heads * dim)],
        "output_dtypes": [mx.float32] * 2 if split else [out],
    }
    if undivided or not split:
        return _build(maker, kernel), launch, None
    return _build(maker, kernel), launch, long_attention.merge(shape, dtype, out, 8, maker)


def attention_twin(
    q: mx.array,
    parts: Sequence[Part],
    spans: mx.array,
    *,
    scale: float,
    window: int = 0,
    out: mx.Dtype | None = None,
) -> mx.array:
    """`attention` in stock MLX, over whole capacities under a mask."""
    tokens, heads, dim = q.shape
    places = [mx.arange(k.shape[-2]) for k, _ in parts]
    used = mx.concatenate([(p >= spans[i, 0]) & (p < spans[i, 1]) for i, p in enumerate(places)])  # [S]
    k, v = (mx.concatenate([part[i].reshape(1, *part[i].shape[-3:]) for part in parts], axis=2) for i in range(2))
    k, v = (mx.where(used[:, None], a, 0).astype(mx.float32) for a in (k, v))  # what is unused may be NaN
    after = mx.cumsum(used[::-1].astype(mx.int32))[::-1]  # 1 for the last token, 2 for the one before ..
    ahead = after[None] - (tokens - mx.arange(tokens))[:, None]  # tokens behind each query's own
    seen = used[None] & (ahead >= 0)
    if window:
        seen = seen & (ahead < window)
    queries = q.astype(mx.float32).swapaxes(0, 1)[None]
    x = mx.fast.scaled_dot_product_attention(queries, k, v, scale=scale, mask=seen)
    return x[0].swapaxes(0, 1).reshape(tokens, heads * dim).astype(out or q.dtype)
