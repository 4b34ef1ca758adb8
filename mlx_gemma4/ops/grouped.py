"""Many rows, each through its experts, in one launch: grouped.metal and its reference.

Experts have tens of rows each, too few for a matmul of their own: the kernel takes them all, and expands each weight
where it multiplies it.
"""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..gpu.render import Kernel, Launcher, prepare, render, result_defines
from ..quant.formats import FORMATS, Packed, dequantize
from . import stock
from .cases import Case, Check, Product, Sizes, cases, normal, weight
from .halve import halve
from .op import Op, OpKey
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
    defines: dict[str, Any] = {"TOKENS": TOKENS, "USED": shared, "GLU": glu, **result_defines(out), "PLAIN": not name}
    defines |= format_defines(FORMATS[name], 32, k) if name else {"W_TYPE": w_dtype}
    absent = absent_planes(FORMATS[name]) if name else PLANES[1:]
    return render("grouped", "grouped.metal", mx.float16, defines, absent)


def grouped_reference(x: mx.array, w: Weight, routing: Routing, glu: bool = False) -> mx.array:
    """`grouped` in stock MLX, for any weight."""
    y = stock.expert_linear(x, w, routing.chosen)
    return stock.fused_geglu(*mx.split(y, 2, axis=-1)) if glu else y


GROUPED = Op("grouped", grouped, grouped_reference)


@cases
def grouped_cases(s: Sizes) -> Iterator[Check]:
    rows_of_experts = (70, 0, 3, 31)  # two tiles, none, few
    mixed = np.random.default_rng(0).permutation(np.repeat(np.arange(4), rows_of_experts))

    def make(p: Product, chosen: np.ndarray) -> Case:
        n, k = p.shape[-2:]
        w = weight(p.type, (len(rows_of_experts), min(n, s.rows or n), k))
        x, routing = normal(len(chosen), p.used if p.own_x else 1, k), Routing(mx.array(chosen), w.shape[0])

        def reference() -> mx.array:
            each = np.array(mx.broadcast_to(x, (*chosen.shape, k))).reshape(-1, k)
            y = np.zeros((chosen.size, w.shape[1]), np.float32)
            for e in np.unique(chosen).tolist():  # not all: MLX on CUDA crashes over a product of no rows
                one, rows = w[e : e + 1], chosen.reshape(-1) == e
                plain = dequantize(one, mx.float32) if isinstance(one, Packed) else one.astype(mx.float32)
                y[rows] = np.array(mx.array(each[rows]) @ plain[0].T)
            done = mx.array(y.reshape(*chosen.shape, -1))
            return stock.geglu(*mx.split(done, 2, axis=-1)) if p.glu else done

        return Case(lambda launcher: grouped(launcher, x, w, routing, p.glu), reference, w.nbytes + x.nbytes)

    for p in dict.fromkeys((*s.products, *s.prompts)):
        if p.used:
            chosen = mixed[: mixed.size // p.used * p.used].reshape(-1, p.used)
            shape = f"{p.shape[-2]}x{p.shape[-1]}, {chosen.size} rows" + " glu" * p.glu
            yield Check(OpKey(GROUPED.name, p.type * (p.type in FORMATS)), shape, partial(make, p, chosen))
