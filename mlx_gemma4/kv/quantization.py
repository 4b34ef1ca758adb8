"""Keys and values in 8 or 4 bits: TurboQuant (Zandieh et al., arXiv:2504.19874) with one scale per vector.

In: keys and values, [1, kv_heads, n, D]. Out: codes and scales of both, and back. A vector x is rotated by a fixed
random rotation, y = H (signs * x), H being the Walsh-Hadamard matrix: whatever x is, the D numbers of y are nearly
Gaussian, with |x| for their standard deviation. So one code book serves all of them, with one scale per vector:

    tq4   y ~ scale * LEVELS[code]      16 levels (Lloyd-Max), 4 bits * 512 / 8 + 2 = 258 bytes for D = 512
    q8    y ~ scale * (code - 128)      equal steps, 514 bytes

Attention works on y: rotating q and the result costs little, and the cache is never rotated back.
"""

import itertools
import math
from collections.abc import Callable
from functools import cache

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..memory import on_cpu

KINDS = ("full", "q8", "tq4")
BITS = {"q8": 8, "tq4": 4}
_SEED = 2504_19874  # of the signs; the same in every process, and in saved files

# The best 16 levels for a normal distribution (Max, "Quantizing for minimum distortion", 1960; here by 5,000 steps of
# Lloyd's iteration), as fp16 has them: 8 magnitudes; bit 3 of a code is the sign. Mean squared error 0.0095.
LEVELS = tuple(n / 4096 for n in (526, 1589, 2690, 3860, 5144, 6628, 8472, 11192))
_LEAST = 1e-3  # of the largest weight of a norm: in `rotations`, smaller ones are taken for this
BOUNDS = tuple((a + b) / 2 for a, b in itertools.pairwise(LEVELS))

# Codes uint32 [1, G, n, 2, D * bits / 32] and scales fp16 [1, G, n, 2] of n tokens' keys and values.
QuantizedKV = tuple[mx.array, mx.array]


def check_kind(kind: str, head_dims: set[int]) -> None:
    """Raise InputError for an unknown kind, or one that heads of these sizes can't have."""
    if kind not in KINDS:
        raise InputError(f"kv {kind!r} is none of {', '.join(KINDS)}; choose one of these")
    if kind not in allowed_kinds(head_dims):
        odd = sorted(d for d in head_dims if d < 32 or d & (d - 1))
        raise InputError(f"kv {kind} takes heads of 32, 64, 128 .. numbers and this model has {odd[0]}; use kv full")


def allowed_kinds(head_dims: set[int]) -> list[str]:
    """Return the kinds that heads of these sizes can have."""
    return [kind for kind in KINDS if kind == "full" or all(d >= 32 and not d & (d - 1) for d in head_dims)]


def vector_bytes(kind: str, dim: int, dtype: mx.Dtype) -> int:
    """Return the bytes that one key, or one value, takes."""
    return dim * dtype.size if kind == "full" else dim * BITS[kind] // 8 + 2


@cache
def signs(dim: int) -> np.ndarray:
    """Return the rotation's signs: fp32 [D] of 1 and -1."""
    words = np.random.PCG64(_SEED).random_raw(dim // 32).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8)[: dim // 8], bitorder="little")
    made: np.ndarray = np.where(bits, np.float32(-1), np.float32(1))
    return made


def hadamard(x: mx.array) -> mx.array:
    """Return H x over the last axis, D a power of two; H has entries 1 and -1 (Sylvester's order)."""
    shape, half = x.shape, 1
    while half < shape[-1]:
        x = x.reshape(*shape[:-1], -1, 2, half)
        a, b = x[..., 0, :], x[..., 1, :]
        x = mx.stack([a + b, a - b], axis=-2)
        half *= 2
    return x.reshape(shape)


def rotations(
    dim: int, q_norm: mx.array | None = None, k_norm: mx.array | None = None, center: mx.array | None = None
) -> mx.array:
    """Return a layer's rotation, fp32 [2 or 2 + G, D], which takes queries, keys and values to the space of the codes.

    Row 0 holds signs and factors of queries; keys take 1 / that. Row 1 holds the signs of values. The others, if any,
    are subtracted from the keys of each KV head before they are quantized.

    Two things reduce the error of quantized keys and change no score. The error of a score is proportional to |q| |k|:
    moving a factor from one to the other, the same for both dimensions that RoPE rotates together, makes it least where
    both have equal shapes, which follow from the weights of their norms. And keys have much in common: without that,
    they are smaller, and so is their error. On Gemma 3 270M, the first divides KL by 3 to 6, the second q8's by 3 more.

    Args:
        q_norm, k_norm: weights of the norms, [D].
        center: [G, D], about the mean of the layer's keys.
    """
    sign = mx.array(signs(dim))
    rows = [] if center is None else [center.astype(mx.float32)]
    if q_norm is None or k_norm is None:
        return mx.concatenate([mx.stack([sign, sign]), *rows])
    q, k = (mx.sqrt((w.astype(mx.float32).reshape(2, -1) ** 2).sum(axis=0)) for w in (q_norm, k_norm))
    q, k = mx.maximum(q, _LEAST * q.max()), mx.maximum(k, _LEAST * k.max())
    factor = mx.sqrt(k / q)
    factor = mx.tile(factor * (q.size / factor.sum()), 2)
    return mx.concatenate([mx.stack([sign * factor, sign]), *rows])


def rotate(x: mx.array, rotation: mx.array) -> mx.array:
    """Return x in the space of the codes, fp32 [.., D]; `rotation` [D] is a row of `rotations`, or 1 / that."""
    return hadamard(x.astype(mx.float32) * rotation) * float(x.shape[-1] ** -0.5)


def rotate_pair(keys: mx.array, values: mx.array, rotation: mx.array) -> tuple[mx.array, mx.array]:
    """Return keys and values [.., D] in the space of the codes; their scores with a rotated q are the same."""
    return rotate(keys, 1 / rotation[0]), rotate(values, rotation[1])


def unrotate(x: mx.array, rotation: mx.array) -> mx.array:
    """Undo `rotate`, the rotation being signs."""
    return hadamard(x.astype(mx.float32)) * (rotation * float(x.shape[-1] ** -0.5))


def quantize(keys: mx.array, values: mx.array, rotation: mx.array, kind: str) -> QuantizedKV:
    """Return codes and scales of keys and values [1, G, n, D]; `rotation` is a layer's `rotations`."""
    dim = keys.shape[-1]
    if rotation.shape[0] > 2:
        keys = keys.astype(mx.float32) - rotation[2:, None]
    y = mx.stack(list(rotate_pair(keys, values, rotation)), axis=3) * math.sqrt(dim)  # [1, G, n, 2, D]
    size = mx.abs(y)
    if kind == "q8":
        scale = (size.max(axis=-1, keepdims=True) / 127).astype(mx.float16)
        codes = (mx.clip(mx.round(y / _divisor(scale)), -127, 127) + 128).astype(mx.uint32)
    else:
        norm = mx.sqrt((y * y).mean(axis=-1, keepdims=True))
        unit = size / _divisor(norm)
        codes = mx.zeros(y.shape, mx.uint32)
        for bound in BOUNDS:
            codes = codes + (unit > bound)
        # So that the dequantized vector is as long along y as y: scores come out neither too large nor too small.
        along = (size * mx.array(LEVELS)[codes]).sum(axis=-1, keepdims=True)
        scale = ((y * y).sum(axis=-1, keepdims=True) / _divisor(along)).astype(mx.float16)
        codes = codes | ((y < 0).astype(mx.uint32) << 3)
    bits = BITS[kind]
    shifts = mx.arange(32 // bits, dtype=mx.uint32) * bits
    words = (codes.reshape(*codes.shape[:-1], -1, 32 // bits) << shifts).sum(axis=-1)
    return words.astype(mx.uint32), scale.squeeze(-1)


def _divisor(x: mx.array) -> mx.array:
    """Return x in fp32, with 1 for 0."""
    return mx.where(x > 0, x, 1).astype(mx.float32)


def bits_of(quantized: QuantizedKV, dim: int) -> int:
    """Return the bits of a code, `dim` being the size of a head."""
    return quantized[0].shape[-1] * 32 // dim


def dequantize(quantized: QuantizedKV, rotation: mx.array, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, mx.array]:
    """Return keys and values in the space of the codes: [1, G, n, D]."""
    (codes, scales), dim = quantized, rotation.shape[-1]
    bits = bits_of(quantized, dim)
    shifts = mx.arange(32 // bits, dtype=mx.uint32) * bits
    y = _decoder(bits, dim, dtype)(codes[..., None], shifts, scales[..., None, None]).reshape(*codes.shape[:-1], dim)
    keys, values = y[..., 0, :], y[..., 1, :]
    if rotation.shape[0] > 2:
        keys = keys + rotate(rotation[2:], 1 / rotation[0])[:, None].astype(dtype)
    return keys, values


@cache
def _decoder(bits: int, dim: int, dtype: mx.Dtype) -> Callable[..., mx.array]:
    """Return the function (words [.., 1], shifts of a word's codes [32 / bits], scales) -> dtype [.., 32 / bits]."""

    def values(words: mx.array, shifts: mx.array, scales: mx.array) -> mx.array:
        code = (words >> shifts) & ((1 << bits) - 1)
        if bits == 8:
            level = code.astype(mx.float32) - 128
        else:
            level = mx.full((), LEVELS[0], mx.float32)
            for i, magnitude in enumerate(LEVELS[1:], 1):
                level = mx.where((code & 7) >= i, magnitude, level)
            level = mx.where(code >= 8, -level, level)
        return (level * (scales.astype(mx.float32) * float(dim**-0.5))).astype(dtype)

    # Compiled, a GPU does it in one pass. On a CPU that would take a C++ compiler.
    return values if on_cpu() else mx.compile(values, shapeless=True)
