"""What a product does beside multiplying: a norm before, GEGLU or a factor after; and its reference in stock MLX."""

from __future__ import annotations

import mlx.core as mx

from . import stock
from .stock import Weight

# GEGLU's results are stored so many times what they are, for fp16's sake; the norm after the down projection undoes it.
SHRINK = 1 / 16


def product_reference(
    x: mx.array,
    w: Weight,
    *,
    norm: mx.array | None = None,
    eps: float = 1e-6,
    glu: bool = False,
    factor: float = 1.0,
    times: mx.array | None = None,
    ids: mx.array | None = None,
    out: mx.Dtype | None = None,
) -> mx.array:
    """`matvec.matvec` in stock MLX, for any weight; the options mean what they mean there."""
    h = x.astype(mx.float32)
    h = h if norm is None else stock.rms_norm(h, norm, eps)
    if ids is None:
        y = stock.linear(h, w)
    else:
        shared = h.shape[0] == 1
        chosen = ids[None] if shared else ids[:, None]
        y = stock.expert_linear(h[:, None], w, chosen)[0 if shared else slice(None), slice(None) if shared else 0]
    if glu:
        gate, up = mx.split(y, 2, axis=-1)
        y = stock.geglu(gate, up)
    if times is not None:
        y = stock.gelu(y) * times.astype(mx.float32)
    return stock.within(y * factor, out or x.dtype)
