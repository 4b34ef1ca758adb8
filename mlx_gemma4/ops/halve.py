"""Rows as fp16 and their scales: halve.metal and its reference.

fp16 keeps 11 bits but reaches only from 6e-8 to 65504. So each row is divided by the power of two below its largest
magnitude, and results are multiplied by it again: exact both ways.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import mlx.core as mx

from ..gpu.render import DEVICE_ELEMENTS, Launcher, absent, prepare, render
from ..memory import on_cpu
from .cases import Case, Check, Sizes, case, cases, norm_weight, normal
from .op import Op
from .stock import fused


def halve(launcher: Launcher, x: mx.array, norm: mx.array | None = None, eps: float = 1e-6) -> tuple[Any, Any]:
    """Rows as fp16, and the scales that undo it.

    Args:
        x: [T, K] of any float type.
        norm: fp32 [K]: of rows RMS-normalised with this weight. They are x * norm until their scale is applied.

    Returns:
        x / scale, fp16 [T, K] with magnitudes under 2; scale, fp32 [T, 1]: a row's power of two at or below its largest
        magnitude, at least 2^-100.
    """
    rows, k = x.shape
    if k % 8 or x.size < DEVICE_ELEMENTS:  # loads are of 8 numbers, from device memory
        return halve_reference(x, norm, eps)
    simdgroups = min(8, -(-k // 256))
    options = {"SG": simdgroups, "NORM": norm is not None, "EPS": eps}
    kernel = render("halve", "halve.metal", x.dtype, options, absent({"norm": norm}))
    results = ((rows, k), mx.float16), ((rows, 1), mx.float32)
    launch = prepare(launcher, kernel, (1, rows, 1), 32 * simdgroups, *results)
    h, scale = launch.by_name({"x": x, "norm": norm})
    return h, scale


def halve_reference(x: mx.array, norm: mx.array | None = None, eps: float = 1e-6) -> tuple[mx.array, mx.array]:
    """`halve` in stock MLX."""
    if norm is None:
        halved: tuple[mx.array, mx.array] = fused(_halved, not on_cpu())(x)
        return halved
    h, scale = halve_reference(x.astype(mx.float32) * norm)
    return h, scale * mx.rsqrt((x.astype(mx.float32) ** 2).mean(axis=-1, keepdims=True) + eps)


def _halved(x: mx.array) -> tuple[mx.array, mx.array]:
    top = mx.abs(x.astype(mx.float32)).max(axis=-1, keepdims=True)
    # The exponent's bits alone are the power of two.
    scale = mx.maximum((top.view(mx.uint32) & 0x7F800000).view(mx.float32), 2.0**-100)
    return (x / scale).astype(mx.float16), scale


def unhalved(y: mx.array, scale: mx.array) -> mx.array:
    """A product of halved rows times their scales, fp32."""
    z: mx.array = fused(_scaled, not on_cpu())(y, scale)
    return z


def _scaled(y: mx.array, scale: mx.array) -> mx.array:
    return y.astype(mx.float32) * scale


HALVE = Op("halve", halve, halve_reference)


@cases
def halve_cases(s: Sizes) -> Iterator[Check]:
    rows = 64

    def make(k: int, norm: bool) -> Case:
        x = normal(rows, k) * mx.exp(3 * normal(rows, 1))
        return case(HALVE, 6 * rows * k, x, norm_weight(k) if norm else None)

    for k, norm in dict.fromkeys((p.shape[-1], norm) for p in s.packed for norm in {False, p.norm}):
        yield Check(HALVE.key, f"{rows}x{k}" + " norm" * norm, partial(make, k, norm))
