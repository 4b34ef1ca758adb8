"""Many rows, each through its experts, in one launch: grouped.metal and its reference.

Experts have tens of rows each, too few for a matmul of their own: the kernel takes them all, and expands each weight
where it multiplies it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

from ..gpu.render import Kernel, Launcher, prepare, render, result_defines
from ..quant.formats import FORMATS, Packed
from . import stock
from .halve import halve
from .op import Op
from .packed import PLANES, absent_planes, format_defines, planes
from .routing import TOKENS, Routing
from .stock import Weight


def grouped(launcher: Launcher, x: mx.array, w: Weight, routing: Routing, glu: bool = False) -> Any:
    """Each token through each of its experts.

    Args:
        x: [T, 1, K] or [T, E', K].
        w: [E, N, K], packed or of 16-bit floats.
        glu: w holds gate's rows, then up's; the result is gelu(gate x) * (up x).

    Returns:
        [T, E', N], or [T, E', N / 2] with glu, in x's dtype.
    """
    assert not isinstance(w, stock.Affine)
    (tokens, used), (_, n, k) = routing.chosen.shape, w.shape
    h, scale = halve(launcher, x.reshape(-1, k))
    shared = used if x.shape[1] == 1 else 1  # rows of the result that one of x is for
    if isinstance(w, Packed):
        kernel, arrays = _kernel(w.format.name, k, mx.float16, x.dtype, shared, glu), planes(w)
    else:
        kernel, arrays = _kernel("", k, w.dtype, x.dtype, shared, glu), {"codes": w}
    result = (tokens, used, n // 2 if glu else n), x.dtype
    launch = prepare(launcher, kernel, (-(-n // 128), routing.tiles.shape[0], 1), 128, result)
    return launch.by_name({"x": h, "scale": scale, "order": routing.order, "tiles": routing.tiles, **arrays})[0]


@cache
def _kernel(name: str, k: int, w_dtype: mx.Dtype, out: mx.Dtype, shared: int, glu: bool) -> Kernel:
    """The kernel for a format; "": none, but a dtype."""
    defines: dict[str, Any] = {"TOKENS": TOKENS, "USED": shared, "GLU": glu, **result_defines(out)}
    if name:
        defines |= {"PLAIN": False, "CHUNK": 32, **format_defines(FORMATS[name], 32, k)}
    else:
        defines |= {"PLAIN": True, "W_TYPE": w_dtype}
    absent = absent_planes(FORMATS[name]) if name else PLANES[1:]
    return render("grouped", "grouped.metal", mx.float16, defines, absent)


def grouped_reference(x: mx.array, w: Weight, routing: Routing, glu: bool = False) -> mx.array:
    """`grouped` in stock MLX, for any weight."""
    y = stock.expert_linear(x, w, routing.chosen)
    return stock.fused_geglu(*mx.split(y, 2, axis=-1)) if glu else y


GROUPED = Op("grouped", grouped, grouped_reference)
