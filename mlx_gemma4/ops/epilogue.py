"""What a product does beside multiplying: a norm before, GEGLU or a factor after; and its reference in stock MLX."""

from typing import NamedTuple

import mlx.core as mx

from . import stock
from .stock import Weight

# GEGLU's results are stored times this, for fp16's range; the norm after the down projection undoes it.
SHRINK = 1 / 16


class Epilogue(NamedTuple):
    """The options of a product that are no arrays; part of the keys of caches."""

    glu: bool = False  # w holds gate's rows, then up's; the result is gelu(gate x) * (up x)
    factor: float = 1.0  # of the result
    out: mx.Dtype | None = None  # of the result, x's by default; what fp16 can't hold becomes its largest number
    eps: float = 1e-6  # of the norm of x, where there is one
    given: float = 1.0  # x is so many times its true value
    added: bool = False  # who takes the result adds up parts of it, should it come in some: [parts, T, N]

    @property
    def factors(self) -> dict[str, float]:
        """Constants of kernels: what multiplies x, and each result."""
        return {"GROW": 1 / self.given, "FACTOR": float(self.factor)}


class Folded(NamedTuple):
    """The arrays that a product takes beside x and the weight."""

    norm: mx.array | None = None  # fp32 [K]: x goes through RMSNorm with this weight first
    times: mx.array | None = None  # as the result, in x's dtype: this is gelu(x wᵀ) * times
    ids: mx.array | None = None  # int32 [E'], the experts that one token takes, or [T, E'], those of each
    routed: tuple[mx.array, mx.array] | None = None  # `routing.route` of such, if it is known


PLAIN = Epilogue()
FP32 = Epilogue(out=mx.float32)
ADDED = Epilogue(out=mx.float32, added=True)
ALONE = Folded()


def product_reference(x: mx.array, w: Weight, epilogue: Epilogue = PLAIN, folded: Folded = ALONE) -> mx.array:
    """`matvec.matvec` and `few_rows.few_rows` in stock MLX, for any weight."""
    h, (norm, times, ids, _) = x.astype(mx.float32), folded
    h = h if norm is None else stock.rms_norm(h, norm, epilogue.eps)
    if ids is None:
        y = stock.linear(h, w)
    elif ids.ndim == 2:
        y = stock.expert_linear(h if h.ndim == 3 else h[:, None], w, ids)
    else:
        shared = h.shape[0] == 1
        chosen = ids[None] if shared else ids[:, None]
        y = stock.expert_linear(h[:, None], w, chosen)[0 if shared else slice(None), slice(None) if shared else 0]
    y = y / epilogue.given
    if epilogue.glu:
        y = stock.geglu(*mx.split(y, 2, axis=-1))
    if times is not None:
        y = stock.gelu(y) * times.astype(mx.float32)
    return stock.within(y * epilogue.factor, epilogue.out or x.dtype)
