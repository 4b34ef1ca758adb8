"""What towers have in common: products with weights of any float type, and the projection into the text model.

In: activations in fp32. Out: fp32. On a GPU `linear` runs in the weights' own type, 16 bits as a rule. On a CPU all
products are numpy's, which take a fortieth of the time of MLX's there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar

import mlx.core as mx
import numpy as np

from ..execution import execution
from ..memory import on_cpu
from ..ops.cores import product

Weights = Mapping[str, mx.array]  # of a tower, by GGUF name: vectors fp32, matrices [N, K] fp32, fp16 or bf16
Linear = Callable[[mx.array, mx.array], mx.array]

# Raises where nobody waits any more for what this thread encodes.
go_on: ContextVar[Callable[[], None]] = ContextVar("go_on", default=lambda: None)

EPS = 1e-6  # of every RMS norm in towers
LARGE = 16384.0  # fp16 holds up to 65504


def linear(x: mx.array, w: mx.array) -> mx.array:
    """x @ wᵀ in fp32, [.., N], of x fp32 [.., K] and w [N, K]."""
    if on_cpu():
        return exact_linear(x, w)
    if w.dtype != mx.float16:
        return (x.astype(w.dtype) @ w.T).astype(mx.float32)
    # A row that fp16 can't hold is made smaller first; a product's own sum may still need fp32.
    scale = mx.maximum(mx.abs(x).max(axis=-1, keepdims=True) / LARGE, 1)
    return ((x / scale).astype(w.dtype) @ w.T).astype(mx.float32) * scale


def exact_linear(x: mx.array, w: mx.array) -> mx.array:
    """Do as `linear`, in fp32 whatever the type of w is."""
    if on_cpu():
        return mx.array(product(np.asarray(x), np.asarray(w.astype(mx.float32))))
    return x @ w.T


def clipped_linear(x: mx.array, weights: Weights, name: str, linear: Linear = linear) -> mx.array:
    """Do as `linear` with the weight NAME.weight, x and the product held within the bounds that a file may give."""
    x = _clipped(x, weights, f"{name}.input")
    return _clipped(linear(x, weights[f"{name}.weight"]), weights, f"{name}.output")


def _clipped(x: mx.array, weights: Weights, name: str) -> mx.array:
    if (low := weights.get(f"{name}_min")) is not None:
        x = mx.maximum(x, low)
    if (high := weights.get(f"{name}_max")) is not None:
        x = mx.minimum(x, high)
    return x


def project(x: mx.array, w: mx.array, linear: Linear = linear) -> mx.array:
    """Return soft tokens, fp32 [n, hidden], of a tower's rows, fp32 [n, K]: a norm without weight, and a product."""
    return linear(mx.fast.rms_norm(x, None, EPS), w)


def by_layers(layers: Iterator[mx.array]) -> mx.array:
    """Compute what a tower yields, and return the last. Between two layers others may execute, so that replies go on,
    and `go_on` is asked."""
    made = before = None
    while True:
        go_on.get()()
        with execution():
            x = next(layers, None)
            if x is None:
                assert made is not None
                mx.eval(made)
                return made
            mx.async_eval(x)
            if before is not None:
                mx.eval(before)  # at most a layer waits on the device
            before, made = made, x
