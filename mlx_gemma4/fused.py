"""The kernels beside the mat-vecs: norms, RoPE, attention, routing, embedding, choice; each with its plain twin.

In and out: MLX arrays for one token, or a handful (T up to 8). A function launches one kernel (`attention` up to two,
`argmax` two) through a `Maker` (kernels.py); the function named `.._twin` has the same arguments and result in stock
MLX. Nothing here knows a model. Weights of norms are fp32.

Launches of a layer at one token, a mat-vec (matvec.metal, RMSNorm of its input folded in) counting as one:

    dense    q|k|v mat-vec, qkv_post, attention, merge, output mat-vec, add_norm,
             gate|up mat-vec with GEGLU, down mat-vec, add_norm                                         9
    E2B/E4B  the same, then gate mat-vec with GELU times p, projection mat-vec, add_norm               12
    experts  q|k|v, qkv_post, attention, merge, output, add_norm; gate|up, down; router (dense),
             top_k, experts' gate|up, experts' down, add_norm of both branches                         13

Attention over at most `SHORT` tokens needs no merge: one less. A layer whose q, k and v differ in type has a mat-vec
for each type. Before the layers: embed, and for E2B/E4B per_layer_model_proj and ple_inputs. After them: the head's
mat-vec with the last norm folded in, and argmax's two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from . import ops
from .kernels import _TYPES, Maker, _build, _traits, render
from .quant import Packed

TAIL = 64  # tokens that the mutable end of a layer's keys and values can hold
SHORT = 512  # tokens up to which attention is one launch
MAX_PARTS = 8  # of keys and values; Metal takes 31 buffers a kernel, and a part needs three

Part = tuple[mx.array, mx.array]  # keys and values, [G, capacity, D] or [1, G, capacity, D] each


def _f(x: float) -> str:
    """A number as a float literal of C."""
    return f"{float(x)!r}f"


# ---------------------------------------------------------------- queries, keys and values


def qkv_post(
    q: mx.array,
    k: mx.array | None,
    v: mx.array | None,
    q_norm: mx.array,
    k_norm: mx.array | None,
    wavelengths: mx.array,
    position: mx.array,
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
        wavelengths: fp32 [D / 2], tokens per radian of each pair of dimensions; inf: does not turn.
        position: int32 [1], of the first token.
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
    arrays = {"q": q, "k": k, "v": v, "q_norm": q_norm, "k_norm": k_norm, "wavelengths": wavelengths}
    arrays |= {"position": position, "tail_k": tail and tail[0], "tail_v": tail and tail[1], "count": count}
    kernel = render(
        "qkv_post",
        "qkv.metal",
        q.dtype,
        defines | flags | {"EPS": _f(eps)},
        [name for name, a in arrays.items() if a is None] + ([] if has_kv else ["new_k", "new_v"]),
    )
    groups = -(-tokens * (heads + 2 * kv_heads * has_kv) // 8)
    groups += -(-kv_heads * capacity * dim * width // 16 // 256)
    out = _build(maker, kernel)(
        inputs=[arrays[name] for name in kernel.inputs],
        grid=(256 * groups, 1, 1),
        threadgroup=(256, 1, 1),
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
    wavelengths: mx.array,
    position: mx.array,
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

    def rope(x: mx.array) -> mx.array:
        return mx.fast.rope(x, dim, traditional=False, base=None, scale=1.0, offset=position[0], freqs=wavelengths)

    if tail is None or k_norm is None or count is None:
        made = rope(ops.rms_norm(apart(q, heads), q_norm, eps))
        return made[0].swapaxes(0, 1).astype(dtype), None, None
    ends = [heads * dim, (heads + (k is None) * kv_heads) * dim]
    q, joined_k, joined_v = mx.split(q, ends, axis=1)
    k = apart(joined_k if k is None else k, kv_heads)
    v = k if v_is_k else apart(joined_v if v is None else v, kv_heads)
    if value_norm:
        v = ops.rms_norm(v, None, eps)
    made = rope(ops.rms_norm(apart(q, heads), q_norm, eps))
    rows = mx.broadcast_to((count + mx.arange(tokens))[:, None], k.shape)
    new = [
        mx.put_along_axis(old.reshape(1, *old.shape[-3:]), rows, x.astype(dtype), axis=2).reshape(old.shape)
        for old, x in zip(tail, (rope(ops.rms_norm(k, k_norm, eps)), v), strict=True)
    ]
    return made[0].swapaxes(0, 1).astype(dtype), new[0], new[1]


# ---------------------------------------------------------------- attention


def _pieces(length: int, rows: int, kv_heads: int, block: int) -> int:
    """Into how many pieces the length is cut: enough threadgroups for a large GPU, each at least two blocks long."""
    return max(1, min(-(-length // (2 * block)), 384 // (rows * kv_heads)))


def attention(
    q: mx.array,
    parts: Sequence[Part],
    spans: mx.array,
    maker: Maker,
    *,
    scale: float,
    window: int = 0,
    out: mx.Dtype | None = None,
) -> Any:
    """A few new tokens attend to all that came before and to themselves.

    Args:
        q: [T, H, D], T up to 8, D a multiple of 32.
        parts: up to MAX_PARTS of keys and values in q's dtype, in the order of the tokens; the last ends with
            the T tokens themselves.
        spans: int32 [parts, 2]: first and one past the last token in use, of each part.
        scale: of the scores.
        window: each token sees only the last `window` ones, itself included; 0: all. Spans may be wider.
        out: dtype of the result, q's by default.

    Returns:
        [T, H D]
    """
    tokens, heads, dim = q.shape
    kv_heads = parts[0][0].shape[-3]
    length = sum(k.shape[-2] for k, _ in parts)
    rows = heads // kv_heads * tokens
    short = length <= SHORT
    most = 2 if short else 8
    tiles = -(-rows // most)
    per_tile = -(-rows // tiles)
    simdgroups, keys = (16, 4) if short else (4, 4)
    pieces = 1 if short else _pieces(length, tiles, kv_heads, 4 * keys * simdgroups)
    split = pieces > 1
    out = out or q.dtype
    defines = {"D": dim, "GQA": heads // kv_heads, "ROWS": per_tile, "SG": simdgroups, "KEYS": keys}
    defines |= {"PARTS": len(parts), "WINDOW": window, "SPLIT": split}
    absent = [f"{kv}{i}" for i in range(len(parts), MAX_PARTS) for kv in "kv"]
    kernel = render(
        "attention",
        "attention.metal",
        q.dtype,
        defines | {"U": _TYPES[out], "SCALE": _f(scale)},
        absent + (["out"] if split else ["sums", "stats"]),
    )
    total = tokens * heads
    done = _build(maker, kernel)(
        inputs=[q, spans, *(a.reshape(a.shape[-3:]) for part in parts for a in part)],
        grid=(32 * simdgroups * tiles, pieces, kv_heads),
        threadgroup=(32 * simdgroups, 1, 1),
        output_shapes=[(total, pieces, dim), (total, pieces, 2)] if split else [(tokens, heads * dim)],
        output_dtypes=[mx.float32] * 2 if split else [out],
    )
    if not split:
        return done[0]
    merge = render("merge", "attention.metal", q.dtype, {"U": _TYPES[out], "D": dim, "SG": 8})
    return _build(maker, merge)(
        inputs=list(done),
        grid=(256, -(-dim // 128), total),
        threadgroup=(256, 1, 1),
        output_shapes=[(tokens, heads * dim)],
        output_dtypes=[out],
    )[0]


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


# ---------------------------------------------------------------- residual and norms


def add_norm(
    x: mx.array,
    h: mx.array,
    post: mx.array,
    maker: Maker,
    *,
    eps: float,
    next_norm: mx.array | None = None,
    scale: mx.array | None = None,
    experts: tuple[mx.array, mx.array, mx.array, mx.array] | None = None,
) -> tuple[Any, Any]:
    """x + rms(h) post, times the layer's scalar, and that under the next norm.

    Args:
        x: [T, K], the residual; K a multiple of 8.
        h: [T, K], in any float type.
        post, next_norm: fp32 [K].
        scale: fp32 [1].
        experts: (outputs [T, used, K] in h's dtype, their shares fp32 [T, used], norm1, norm2): in place of h stands
            rms(h) norm1 + rms(sum of share * output) norm2.

    Returns:
        the new residual [T, K] in x's dtype; rms of it times next_norm, in h's dtype (None without next_norm).
    """
    tokens, k = x.shape
    simdgroups = min(32, -(-k // 256))
    outputs, share, norm1, norm2 = experts or (None,) * 4
    arrays = {"x": x, "h": h, "post": post, "experts": outputs, "share": share, "norm1": norm1, "norm2": norm2}
    arrays |= {"scale": scale, "next": next_norm}
    defines = {"R": _TYPES[x.dtype], "K": k, "SG": simdgroups, "EPS": _f(eps), "BRANCHES": outputs is not None}
    defines |= {"USED": 0 if outputs is None else outputs.shape[1], "SCALED": scale is not None}
    kernel = render(
        "add_norm",
        "norms.metal",
        h.dtype,
        defines | {"NEXT": next_norm is not None},
        [name for name, a in arrays.items() if a is None] + (["normed"] if next_norm is None else []),
    )
    done = _build(maker, kernel)(
        inputs=[arrays[name] for name in kernel.inputs],
        grid=(32 * simdgroups, tokens, 1),
        threadgroup=(32 * simdgroups, 1, 1),
        output_shapes=[(tokens, k)] * len(kernel.outputs),
        output_dtypes=[x.dtype, h.dtype][: len(kernel.outputs)],
    )
    return done[0], done[1] if next_norm is not None else None


def add_norm_twin(
    x: mx.array,
    h: mx.array,
    post: mx.array,
    *,
    eps: float,
    next_norm: mx.array | None = None,
    scale: mx.array | None = None,
    experts: tuple[mx.array, mx.array, mx.array, mx.array] | None = None,
) -> tuple[mx.array, mx.array | None]:
    """`add_norm` in stock MLX."""
    c = h.astype(mx.float32)
    if experts is not None:
        outputs, share, norm1, norm2 = experts
        e = (outputs.astype(mx.float32) * share[..., None]).sum(axis=1)
        c = ops.rms_norm(c, norm1, eps) + ops.rms_norm(e, norm2, eps)
    y = x.astype(mx.float32) + ops.rms_norm(c, post, eps)
    if scale is not None:
        y = y * scale
    normed = None if next_norm is None else ops.rms_norm(y, next_norm, eps).astype(h.dtype)
    return y.astype(x.dtype), normed


# ---------------------------------------------------------------- unpacked weights


def dense(
    x: mx.array,
    w: mx.array,
    maker: Maker,
    *,
    norm: mx.array | None = None,
    eps: float = 1e-6,
    factor: float = 1.0,
    times: mx.array | None = None,
    out: mx.Dtype | None = None,
) -> Any:
    """A few tokens through an unpacked weight.

    Args:
        x: [T, K], K a multiple of 8.
        w: [N, K], any float type.
        norm: fp32 [K]: x goes through RMSNorm with this weight first, times `factor`.
        times: [T, N] in x's dtype: the result is gelu(x wᵀ) * times.
        out: dtype of the result, x's by default.

    Returns:
        [T, N]
    """
    tokens, n = x.shape[0], w.shape[0]
    arrays = {"x": x, "w": w, "norm": norm, "times": times}
    defines = {"U": _TYPES[out or x.dtype], "W_TYPE": _TYPES[w.dtype], "SG": 4, "EPS": _f(eps), "FACTOR": _f(factor)}
    kernel = render(
        "dense",
        "dense.metal",
        x.dtype,
        defines | {"NORM": norm is not None, "TIMES": times is not None},
        [name for name, a in arrays.items() if a is None],
    )
    return _build(maker, kernel)(
        inputs=[arrays[name] for name in kernel.inputs],
        grid=(128 * -(-n // 4), tokens, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(tokens, n)],
        output_dtypes=[out or x.dtype],
    )[0]


def dense_twin(
    x: mx.array,
    w: mx.array,
    *,
    norm: mx.array | None = None,
    eps: float = 1e-6,
    factor: float = 1.0,
    times: mx.array | None = None,
    out: mx.Dtype | None = None,
) -> mx.array:
    """`dense` in stock MLX."""
    h = x.astype(mx.float32)
    if norm is not None:
        h = ops.rms_norm(h, norm, eps) * factor
    y = h @ w.astype(mx.float32).T
    if times is not None:
        y = ops.gelu(y) * times.astype(mx.float32)
    return y.astype(out or x.dtype)


# ---------------------------------------------------------------- choices


def top_k(scores: mx.array, used: int, maker: Maker, *, scale: mx.array | None = None) -> tuple[Any, Any]:
    """The experts of each token.

    Args:
        scores: fp32 [T, E].
        used: how many to choose, up to 32.
        scale: fp32 [E]: multiplies the shares.

    Returns:
        int32 [T, used], best first; their softmax among themselves, fp32 [T, used].
    """
    tokens, n = scores.shape
    defines: dict[str, object] = {"E": n, "USED": used, "SCALED": scale is not None}
    kernel = render("top_k", "choose.metal", mx.float32, defines, [] if scale is not None else ["scale"])
    done = _build(maker, kernel)(
        inputs=[scores] if scale is None else [scores, scale],
        grid=(32, tokens, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(tokens, used)] * 2,
        output_dtypes=[mx.int32, mx.float32],
    )
    return done[0], done[1]


def top_k_twin(scores: mx.array, used: int, *, scale: mx.array | None = None) -> tuple[mx.array, mx.array]:
    """`top_k` in stock MLX."""
    ids = mx.argsort(-scores, axis=-1)[:, :used].astype(mx.int32)
    share = mx.softmax(mx.take_along_axis(scores, ids, axis=-1), axis=-1, precise=True)
    return ids, share if scale is None else share * scale[ids]


def argmax(logits: mx.array, maker: Maker) -> Any:
    """The largest of each row, the lowest of equals. The softcap never changes the order, so it is not needed.

    Args:
        logits: [T, V].

    Returns:
        int32 [T]
    """
    tokens, n = logits.shape
    pieces = max(1, min(128, n // 1024))
    first = render("argmax_pieces", "choose.metal", logits.dtype, {"SG": 8})
    best, at = _build(maker, first)(
        inputs=[logits],
        grid=(256 * pieces, tokens, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(tokens, pieces)] * 2,
        output_dtypes=[mx.float32, mx.int32],
    )
    second = render("argmax_merge", "choose.metal", logits.dtype, {})
    return _build(maker, second)(
        inputs=[best, at],
        grid=(32, tokens, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(tokens,)],
        output_dtypes=[mx.int32],
    )[0]


def argmax_twin(logits: mx.array) -> mx.array:
    """`argmax` in stock MLX."""
    return mx.argmax(logits, axis=-1).astype(mx.int32)


# ---------------------------------------------------------------- embeddings


def _table(table: mx.array | Packed) -> tuple[dict[str, object], list[Any], list[str]]:
    """A table for embed.metal: constants, arrays, absent inputs."""
    if isinstance(table, mx.array):
        return {"PACKED": 0, "K": table.shape[-1]}, [table], ["sub", "super"]
    planes = {"codes": table.codes, "sub": table.sub, "super": table.super}
    defines = {"PACKED": 1, **_traits(table.format, 32, table.shape[-1]), "K": table.shape[-1]}
    arrays = [a for a in planes.values() if a is not None]
    return defines, arrays, [name for name, a in planes.items() if a is None]


def embed(ids: mx.array, table: mx.array | Packed, factor: float, maker: Maker, *, out: mx.Dtype = mx.float32) -> Any:
    """Rows of a table, times a factor.

    Args:
        ids: int32 [T].
        table: [V, K].

    Returns:
        [T, K] in `out`.
    """
    k = table.shape[-1]
    defines, arrays, absent = _table(table)
    defines |= {"U": _TYPES[out], "FACTOR": _f(factor)}
    kernel = render("embed", "embed.metal", out, defines, absent)
    return _build(maker, kernel)(
        inputs=[ids, *arrays],
        grid=(256 * -(-k // 256), ids.size, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(ids.size, k)],
        output_dtypes=[out],
    )[0]


def embed_twin(ids: mx.array, table: mx.array | Packed, factor: float, *, out: mx.Dtype = mx.float32) -> mx.array:
    """`embed` in stock MLX."""
    return (ops.embed(ids, table) * factor).astype(out)


def ple_inputs(
    ids: mx.array, proj: mx.array, norm: mx.array, table: mx.array | Packed, factor: float, maker: Maker, *, eps: float
) -> Any:
    """What each layer adds of the token itself: (rms(proj factor) norm + table[ids] sqrt(P)) / sqrt(2).

    Args:
        ids: int32 [T].
        proj: [T, layers P], the tokens' embeddings through per_layer_model_proj.
        norm: fp32 [P].
        table: [V, layers P].
        factor: of proj (it matters beside eps).

    Returns:
        [layers, T, P] in proj's dtype.
    """
    tokens, width, p = ids.size, table.shape[-1], norm.size
    defines, arrays, absent = _table(table)
    defines |= {"U": _TYPES[proj.dtype], "FACTOR": _f(math.sqrt(p)), "PROJ_FACTOR": _f(factor), "P": p, "EPS": _f(eps)}
    kernel = render("ple_inputs", "embed.metal", proj.dtype, defines, absent)
    return _build(maker, kernel)(
        inputs=[ids, proj, norm, *arrays],
        grid=(128 * -(-(width // p) // 4), tokens, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(width // p, tokens, p)],
        output_dtypes=[proj.dtype],
    )[0]


def ple_inputs_twin(
    ids: mx.array, proj: mx.array, norm: mx.array, table: mx.array | Packed, factor: float, *, eps: float
) -> mx.array:
    """`ple_inputs` in stock MLX."""
    shape = (ids.size, -1, norm.size)
    projected = ops.rms_norm(proj.astype(mx.float32).reshape(shape) * factor, norm, eps)
    p = (projected + ops.embed(ids, table).reshape(shape) * math.sqrt(norm.size)) * 2**-0.5
    return p.swapaxes(0, 1).astype(proj.dtype)
