"""A packed weight's numbers, for a matmul of MLX's own: expand.metal and its reference."""

from collections.abc import Iterator
from functools import cache, partial
from math import prod
from typing import Any

import mlx.core as mx

from ..gpu.render import Kernel, Launcher, prepare, render
from ..quant.formats import FORMATS, Packed, dequantize
from .cases import Case, Check, Sizes, case, cases, weight
from .op import Op, OpKey
from .packed import absent_planes, format_defines, planes


def expand(launcher: Launcher, w: Packed, dtype: mx.Dtype = mx.float16) -> Any:
    """The numbers of a packed weight, of its shape, in any float type; computed in fp32."""
    kernel = _kernel(w.format.name, w.shape[-1], dtype)
    # The planes' leading axes are rows, one after the other. `block_scales` has blocks and numbers in a row.
    kept = {"codes": 1, "group_scales": 1, "block_scales": 2, "grid": 1}
    flat = {name: a.reshape(-1, *a.shape[-kept[name] :]) for name, a in planes(w).items() if a is not None}
    return prepare(launcher, kernel, (-(-prod(w.shape) // 2048), 1, 1), 256, (w.shape, dtype)).by_name(flat)[0]


@cache  # a prompt launches hundreds, and the GPU must not wait for the host
def _kernel(name: str, k: int, dtype: mx.Dtype) -> Kernel:
    form = FORMATS[name]
    return render("expand", "expand.metal", dtype, {**format_defines(form, 32, k), "K": k}, absent_planes(form))


def expand_reference(w: Packed, dtype: mx.Dtype = mx.float16) -> mx.array:
    """`expand` in stock MLX."""
    return dequantize(w, dtype)


EXPAND = Op("expand", expand, expand_reference)


@cases
def expand_cases(s: Sizes) -> Iterator[Check]:
    rows = s.rows or 4096

    def make(type: str, k: int) -> Case:
        w = weight(type, (rows, k))
        assert isinstance(w, Packed)
        return case(EXPAND, w.nbytes + 2 * rows * k, w)

    for type, k in dict.fromkeys((p.type, p.shape[-1]) for p in s.packed):
        yield Check(OpKey(EXPAND.name, type), f"{rows}x{k}", partial(make, type, k))
