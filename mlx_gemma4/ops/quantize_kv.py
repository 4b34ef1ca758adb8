"""The quantization of keys and values in one launch; its reference is `kv.quantization.quantize`."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from ..gpu.render import Kernel, Launcher, float_literal, prepare, render
from ..kv import quantization
from ..kv.quantization import LEVELS
from .op import Op


def quantize_kv(launcher: Launcher, keys: mx.array, values: mx.array, rotation: mx.array, kind: str) -> Any:
    """Codes and scales of keys and values [1, G, n, D]: `kv.quantization.quantize` in one launch."""
    _, heads, n, dim = keys.shape
    results = ((1, heads, n, 2, dim * quantization.BITS[kind] // 32), mx.uint32), ((1, heads, n, 2), mx.float16)
    kernel = _kernel(kind, dim, keys.dtype, rotation.shape[0] > 2)
    launch = prepare(launcher, kernel, (-(-heads * n // 4), 1, 1), 256, *results)
    codes, scales = launch(keys.reshape(-1, dim), values.reshape(-1, dim), rotation)
    return codes, scales


@lru_cache
def _kernel(kind: str, dim: int, dtype: mx.Dtype, centered: bool) -> Kernel:
    defines = {"D": dim, "BITS": quantization.BITS[kind], "CENTERED": centered, **code_book()}
    for name, numbers in (("MAGNITUDES", LEVELS), ("BOUNDS", quantization.BOUNDS)):
        defines[name] = f"{{{', '.join(map(float_literal, numbers))}}}"
    return render("quantize_kv", "quantize_kv.metal", dtype, defines)


@cache
def code_book() -> dict[str, Any]:
    """The levels of 4 bits as constants: as halves, and their low and high bytes four a word."""
    halves = np.array(LEVELS, np.float16)
    low, high = halves.view(np.uint8).reshape(8, 2).T.copy().view(np.uint32).tolist()
    words = {f"{name}_{i}": f"{word:#x}u" for name, two in (("LOW", low), ("HIGH", high)) for i, word in enumerate(two)}
    return {"LEVELS": ", ".join(f"{bits:#x}u" for bits in halves.view(np.uint16).tolist()), **words}


QUANTIZE_KV = Op("quantize_kv", quantize_kv, quantization.quantize)
