"""The kernels beside mat-vecs and attention: norms, routing, embedding, choice; each with its plain reference.

In and out: MLX arrays for one token, or a handful (T up to 8). A function launches one kernel (`argmax` two)
through a `Launcher` (kernels.py); the function named `.._twin` has the same arguments and result in stock
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

from typing import Any

import mlx.core as mx

from ..gpu.render import METAL_TYPES, Launcher, build, float_literal, render, result_defines
from . import stock
from .op import Op

# ---------------------------------------------------------------- residual and norms


def add_norm(
    launcher: Launcher,
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
        the new residual [T, K] in x's dtype; rms of it times next_norm, without next_norm the residual again.
    """
    tokens, k = x.shape
    simdgroups = min(32, -(-k // 256))
    outputs, share, norm1, norm2 = experts or (None,) * 4
    arrays = {"x": x, "h": h, "post": post, "experts": outputs, "share": share, "norm1": norm1, "norm2": norm2}
    arrays |= {"scale": scale, "next": next_norm}
    defines = {
        "R": METAL_TYPES[x.dtype],
        "K": k,
        "SG": simdgroups,
        "EPS": float_literal(eps),
        "EPS_H": float_literal(eps * shrunk**2),
    }
    defines |= {"BRANCHES": outputs is not None, "USED": 0 if outputs is None else outputs.shape[1]}
    defines |= {"SCALED": scale is not None, **result_defines(out or h.dtype)}
    kernel = render(
        "add_norm",
        "norms.metal",
        h.dtype,
        defines | {"NEXT": next_norm is not None},
        [name for name, a in arrays.items() if a is None] + (["normed"] if next_norm is None else []),
    )
    done = build(launcher, kernel)(
        inputs=[arrays[name] for name in kernel.inputs],
        grid=(32 * simdgroups, tokens, 1),
        threadgroup=(32 * simdgroups, 1, 1),
        output_shapes=[(tokens, k)] * len(kernel.outputs),
        output_dtypes=[x.dtype, out or h.dtype][: len(kernel.outputs)],
    )
    return done[0], done[-1]


def add_norm_reference(
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
) -> tuple[mx.array, mx.array]:
    """`add_norm` in stock MLX."""
    c = h.astype(mx.float32)
    if experts is not None:
        outputs, share, norm1, norm2 = experts
        e = (outputs.astype(mx.float32) * share[..., None]).sum(axis=1)
        c = stock.rms_norm(c, norm1, eps * shrunk**2) + stock.rms_norm(e, norm2, eps * shrunk**2)
    y = x.astype(mx.float32) + stock.rms_norm(c, post, eps if experts is not None else eps * shrunk**2)
    if scale is not None:
        y = y * scale[:1]
    new = y.astype(x.dtype)
    return new, new if next_norm is None else stock.within(stock.rms_norm(y, next_norm, eps), out or h.dtype)


ADD_NORM = Op("add_norm", add_norm, add_norm_reference)
