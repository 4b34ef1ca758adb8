"""A few tokens through an unpacked weight: dense.metal and its reference."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..gpu.render import METAL_TYPES, Launcher, build, float_literal, render, result_defines
from .epilogue import product_reference
from .op import Op

FOUR_ROWS_FROM = 4096  # from which on a simdgroup takes four, and reads x once for them
FEW_ROWS = 512  # of an unpacked weight, for which all simdgroups of a threadgroup share a row


# ---------------------------------------------------------------- unpacked weights


def dense(
    launcher: Launcher,
    x: mx.array,
    w: mx.array,
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
    split, rows = 4 if n <= FEW_ROWS else 1, 4 if n >= FOUR_ROWS_FROM else 1
    defines = {**result_defines(out or x.dtype), "W_TYPE": METAL_TYPES[w.dtype], "SG": 4, "SPLIT": split, "ROWS": rows}
    defines |= {"EPS": float_literal(eps), "FACTOR": float_literal(factor)}
    kernel = render(
        "dense",
        "dense.metal",
        x.dtype,
        defines | {"NORM": norm is not None, "TIMES": times is not None},
        [name for name, a in arrays.items() if a is None],
    )
    return build(launcher, kernel)(
        inputs=[arrays[name] for name in kernel.inputs],
        grid=(128 * -(-n * split // (4 * rows)), tokens, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(tokens, n)],
        output_dtypes=[out or x.dtype],
    )[0]


DENSE = Op("dense", dense, product_reference)
