"""What towers have in common: products with weights of any float type, and the projection into the text model.

In: activations in fp32. Out: fp32. On a GPU products run in the weights' own type, 16 bits as a rule.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from ..memory import on_cpu
from ..ops.cores import product

Weights = Mapping[str, mx.array]  # of a tower, by GGUF name: vectors fp32, matrices [N, K] fp32, fp16 or bf16

EPS = 1e-6  # of every RMS norm in towers
LARGE = 16384.0  # fp16 holds up to 65504


def linear(x: mx.array, w: mx.array) -> mx.array:
    """x @ wᵀ in fp32, [.., N], of x fp32 [.., K] and w [N, K]; on a CPU by numpy: MLX takes 40 times as long there."""
    if on_cpu():
        return mx.array(product(np.asarray(x), np.asarray(w)))
    if w.dtype != mx.float16:
        return (x.astype(w.dtype) @ w.T).astype(mx.float32)
    # A row that fp16 can't hold is made smaller first; a product's own sum may still need fp32.
    scale = mx.maximum(mx.abs(x).max(axis=-1, keepdims=True) / LARGE, 1)
    return ((x / scale).astype(w.dtype) @ w.T).astype(mx.float32) * scale


def clipped_linear(x: mx.array, weights: Weights, name: str) -> mx.array:
    """Do as `linear` with the weight NAME.weight, x and the product held within the bounds that a file may give."""
    x = _clipped(x, weights, f"{name}.input")
    return _clipped(linear(x, weights[f"{name}.weight"]), weights, f"{name}.output")


def _clipped(x: mx.array, weights: Weights, name: str) -> mx.array:
    if (low := weights.get(f"{name}_min")) is not None:
        x = mx.maximum(x, low)
    if (high := weights.get(f"{name}_max")) is not None:
        x = mx.minimum(x, high)
    return x


def project(x: mx.array, w: mx.array) -> mx.array:
    """Return soft tokens, fp32 [n, hidden], of a tower's rows, fp32 [n, K]: a norm without weight, and a product."""
    return linear(mx.fast.rms_norm(x, None, EPS), w)
