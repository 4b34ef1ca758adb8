"""The kernels beside mat-vecs and attention: norms, routing, embedding, choice; each with its plain twin.

In and out: MLX arrays for one token, or a handful (T up to 8). A function launches one kernel (`argmax` two)
through a `Maker` (kernels.py); the function named `.._twin` has the same arguments and result in stock
MLX. Nothing here knows a model. Weights of norms are fp32.

Launches of a layer at one token, a mat-vec (matvec.metal, RMSNorm of its input folded in) counting as one:

    dense    q|k|v mat-vec, qkv_post, attention, merge, output mat-vec, add_norm,
             gate|up mat-vec with GEGLU, down mat-vec, add_norm                                         9
    E2B/E4B  the same, then gate mat-vec with GELU times p, projection mat-vec, add_norm               12
    experts  q|k|v, qkv_post, attention, merge, output, add_norm; gate|up, down; router (dense),
             top_k, experts' gate|up, experts' down, add_norm of both branches                         13

Attention over at most `attention.SHORT` tokens needs no merge: one less. A layer whose q, k and v differ in type has
a mat-vec for each type. Before the layers: rotations for each kind of layer, embed, and for E2B/E4B
per_layer_model_proj and ple_inputs. After them: the head's mat-vec with the last norm folded in, and argmax's two.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from . import ops
from .kernels import _TYPES, Maker, _build, _f, _traits, render, result_type
from .quant import Packed

MANY_ROWS = 4096  # from which on a simdgroup takes four, and reads x once for them
FEW_ROWS = 512  # of an unpacked weight, for which all simdgroups of a threadgroup share a row

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
    shrunk: float = 1.0,
    out: mx.Dtype | None = None,
) -> tuple[Any, Any]:
    """x + rms(h) post, times the layer's scalar, and that under the next norm.

    Args:
        x: [T, K], the residual; K a multiple of 8.
        h: [T, K], in any float type.
        post, next_norm: fp32 [K].
        scale: fp32 [1 or more], of which the first counts.
        experts: (outputs [T, used, K] in h's dtype, their shares fp32 [T, used], norm1, norm2): in place of h stands
            rms(h) norm1 + rms(sum of share * output) norm2.
        shrunk: h and the experts' outputs are so many times what they mean, which their norms' eps follows.
        out: dtype of the second result, h's by default. What fp16 can't hold becomes the largest number that it can.

    Returns:
        the new residual [T, K] in x's dtype; rms of it times next_norm (None without next_norm).
    """
    tokens, k = x.shape
    simdgroups = min(32, -(-k // 256))
    outputs, share, norm1, norm2 = experts or (None,) * 4
    arrays = {"x": x, "h": h, "post": post, "experts": outputs, "share": share, "norm1": norm1, "norm2": norm2}
    arrays |= {"scale": scale, "next": next_norm}
    defines = {"R": _TYPES[x.dtype], "K": k, "SG": simdgroups, "EPS": _f(eps), "EPS_H": _f(eps * shrunk**2)}
    defines |= {"BRANCHES": outputs is not None, "USED": 0 if outputs is None else outputs.shape[1]}
    defines |= {"SCALED": scale is not None, **result_type(out or h.dtype)}
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
        output_dtypes=[x.dtype, out or h.dtype][: len(kernel.outputs)],
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
    shrunk: float = 1.0,
    out: mx.Dtype | None = None,
) -> tuple[mx.array, mx.array | None]:
    """`add_norm` in stock MLX."""
    c = h.astype(mx.float32)
    if experts is not None:
        outputs, share, norm1, norm2 = experts
        e = (outputs.astype(mx.float32) * share[..., None]).sum(axis=1)
        c = ops.rms_norm(c, norm1, eps * shrunk**2) + ops.rms_norm(e, norm2, eps * shrunk**2)
    y = x.astype(mx.float32) + ops.rms_norm(c, post, eps if experts is not None else eps * shrunk**2)
    if scale is not None:
        y = y * scale[:1]
    normed = None if next_norm is None else ops.within(ops.rms_norm(y, next_norm, eps), out or h.dtype)
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
        norm: fp32 [K]: x goes through RMSNorm with this weight first.
        factor: of the result.
        times: [T, N] in x's dtype: the result is gelu(x wᵀ) * times.
        out: dtype of the result, x's by default.

    Returns:
        [T, N]
    """
    tokens, n = x.shape[0], w.shape[0]
    arrays = {"x": x, "w": w, "norm": norm, "times": times}
    split, rows = 4 if n <= FEW_ROWS else 1, 4 if n >= MANY_ROWS else 1
    defines = {**result_type(out or x.dtype), "W_TYPE": _TYPES[w.dtype], "SG": 4, "SPLIT": split, "ROWS": rows}
    defines |= {"EPS": _f(eps), "FACTOR": _f(factor)}
    kernel = render(
        "dense",
        "dense.metal",
        x.dtype,
        defines | {"NORM": norm is not None, "TIMES": times is not None},
        [name for name, a in arrays.items() if a is None],
    )
    return _build(maker, kernel)(
        inputs=[arrays[name] for name in kernel.inputs],
        grid=(128 * -(-n * split // (4 * rows)), tokens, 1),
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
        h = ops.rms_norm(h, norm, eps)
    y = h @ w.astype(mx.float32).T
    if times is not None:
        y = ops.gelu(y) * times.astype(mx.float32)
    return ops.within(y * factor, out or x.dtype)


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
