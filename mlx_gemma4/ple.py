"""The end of a layer with per-layer embeddings (E2B, E4B) in one launch.

In and out: MLX arrays for one token, or a few. It stands for four launches: the add_norm behind the MLP, the gate's
mat-vec, the projection's, and the last add_norm. None of them is much work for a GPU: it saves the host's time.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from . import ops
from .kernels import _DEVICE, _TYPES, MAX_TOKENS, Maker, _build, _f, _traits, is_metal, render, result_type
from .quant import Format, Packed

SIMDGROUPS = 32
ROOM = 32 << 10  # bytes of threadgroup memory that Metal has


def takes(gate: Any, proj: Any, tokens: int, maker: Maker) -> bool:
    """Whether `ple` can do it, and is worth it: both weights packed in one format, few tokens, sizes that fit.

    On Apple GPUs the four launches stay: there a launch costs less, and one core's share of the matrix products more.
    """
    if not (isinstance(gate, Packed) and isinstance(proj, Packed) and gate.format is proj.format):
        return False
    p, k = gate.shape
    arrays = [a for w in (gate, proj) for a in (w.codes, w.sub, w.super) if a is not None]
    worth = not is_metal(maker)
    there = all(a.size >= _DEVICE for a in arrays)
    return worth and there and tokens <= MAX_TOKENS and proj.shape == (k, p) and fits(gate.format, k, p)


def fits(fmt: Format, k: int, p: int) -> bool:
    """Whether the kernel has room for gate [p, k] and projection [k, p]."""
    if k % 32 or p % 32 or not 0 < p <= 16 * SIMDGROUPS:
        return False
    groups = 4 * sum(-(-n // (4 * fmt.group)) for n in (k, p))
    results = max(k, SIMDGROUPS // (p // 16) * p)
    table = 256 if fmt.lut is not None else 0
    return 4 * (groups * fmt.group + 2 * groups + results + table + SIMDGROUPS + 4) <= ROOM


def ple(
    x: mx.array,
    h: mx.array,
    post: mx.array,
    gate: Packed,
    p: mx.array,
    proj: Packed,
    post_norm: mx.array,
    maker: Maker,
    *,
    eps: float,
    next_norm: mx.array,
    scale: mx.array | None = None,
    shrunk: float = 1.0,
    out: mx.Dtype | None = None,
) -> tuple[Any, Any]:
    """With y = x + rms(h) post: y + rms(proj (gelu(gate y) * p)) post_norm, times the layer's scalar; and its norm.

    Args:
        x: [T, K], the residual.
        h: [T, K], the MLP's result, in any float type.
        post, post_norm, next_norm: fp32 [K].
        gate: [P, K]. proj: [K, P]; as `takes` says.
        p: [T, P], the per-layer embedding.
        scale: fp32 [1 or more], of which the first counts.
        shrunk: h is so many times what it means, which its norm's eps follows.
        out: dtype of the second result, h's by default. What fp16 can't hold becomes the largest number that it can.

    Returns:
        the new residual [T, K] in x's dtype; rms of it times next_norm.
    """
    (tokens, k), fmt = x.shape, gate.format
    arrays = {"x": x, "h": h, "post": post, "p": p, "post_norm": post_norm, "scale": scale, "next": next_norm}
    arrays |= {"gate": gate.codes, "gate_sub": gate.sub, "gate_super": gate.super}
    arrays |= {"proj": proj.codes, "proj_sub": proj.sub, "proj_super": proj.super}
    threads = 32 * SIMDGROUPS
    defines = _traits(fmt, fmt.group, k) | result_type(out or h.dtype)
    defines |= {
        "CHUNK": fmt.group,
        "R": _TYPES[x.dtype],
        "K": k,
        "P": gate.shape[0],
        "SG": SIMDGROUPS,
        "THREADS": threads,
    }
    defines |= {"EPS": _f(eps), "EPS_H": _f(eps * shrunk**2), "SCALED": scale is not None}
    kernel = render("ple", "ple.metal", h.dtype, defines, [name for name, a in arrays.items() if a is None])
    done = _build(maker, kernel)(
        inputs=[arrays[name] for name in kernel.inputs],
        grid=(threads, tokens, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(tokens, k)] * 2,
        output_dtypes=[x.dtype, out or h.dtype],
    )
    return done[0], done[1]


def ple_twin(
    x: mx.array,
    h: mx.array,
    post: mx.array,
    gate: Packed,
    p: mx.array,
    proj: Packed,
    post_norm: mx.array,
    *,
    eps: float,
    next_norm: mx.array,
    scale: mx.array | None = None,
    shrunk: float = 1.0,
    out: mx.Dtype | None = None,
) -> tuple[mx.array, mx.array]:
    """`ple` in stock MLX."""
    y = x.astype(mx.float32) + ops.rms_norm(h.astype(mx.float32), post, eps * shrunk**2)
    z = ops.linear(ops.gelu(ops.linear(y, gate)) * p.astype(mx.float32), proj)
    y = y + ops.rms_norm(z, post_norm, eps)
    if scale is not None:
        y = y * scale[:1]
    return y.astype(x.dtype), ops.within(ops.rms_norm(y, next_norm, eps), out or h.dtype)
