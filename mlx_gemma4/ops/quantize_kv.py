"""The quantization of keys and values in one launch; its reference is `kv.quantization.quantize`."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..gpu.render import Kernel, Launcher, float_literal, prepare, render
from ..kv import quantization
from ..kv.quantization import LEVELS
from .cases import Case, Check, Heads, Sizes, case, cases, normal, random_kv, state_dtype
from .op import Op
from .parts import TAIL

DIMS = (64, 128, 256, 512)  # of heads that the kernels of quantized KV take


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


@cases
def quantize_kv_cases(s: Sizes) -> Iterator[Check]:
    def make(h: Heads, kind: str) -> Case:
        rotation = quantization.rotations(h.dim, center=normal(h.kv_heads, h.dim))
        k, v = random_kv(h, TAIL, state_dtype())

        def along(made: Sequence[mx.array]) -> Sequence[mx.array]:
            """Lengths of the dequantized vectors along the originals: a number between two levels may take either."""
            found = quantization.dequantize((made[0], made[1]), rotation)
            pairs = zip(found, quantization.rotate_pair(k, v, rotation), strict=True)
            return [(a * b).sum(axis=-1) / (b * b).sum(axis=-1) for a, b in pairs]

        return replace(case(QUANTIZE_KV, k.nbytes + v.nbytes, k, v, rotation, kind), compared=along)

    for h in {(h.kv_heads, h.dim): h for h in s.heads if not h.window and h.dim in DIMS}.values():
        for kind in quantization.BITS:
            yield Check(QUANTIZE_KV.key, f"{h.kv_heads} heads of {h.dim} to {kind}", partial(make, h, kind))
