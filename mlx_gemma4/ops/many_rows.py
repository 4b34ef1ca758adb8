"""Products of many rows on a GPU: a weight becomes fp16 a tile at a time, for MLX's own matmul; experts' don't.

In: activations and packed (or dense) weights. Out: activations, what `ops.linear` and `ops.expert_linear`, the
references, give. A prompt's product reads a weight once for hundreds of rows, so what counts is the matrix units: they
want plain numbers. One launch expands a tile, the next multiplies it, and each tile waits for the product before, so
that one or two are alive at a time, never a second copy of a weight. Experts have tens of rows each, too few for a
product of their
own: a kernel of ours takes them all, and makes each weight's numbers where it multiplies them.

fp16 keeps 11 bits, of x and of the result (sums are fp32 within), but reaches only from 6e-8 to 65504. So each row of x
goes in divided by the power of two below its largest magnitude, and its results are multiplied by it again: exact both
ways. Of weights, magnitudes over 65504 are out of reach; no model has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

import mlx.core as mx

from ..gpu.render import DEVICE_ELEMENTS, METAL_TYPES, Launcher, build, render, result_defines
from ..memory import on_cpu
from ..quant import formats
from ..quant.formats import FORMATS, Packed
from . import matvec, stock
from .packed import format_defines
from .routing import TOKENS, Routing
from .stock import Weight

# Weights of a tile, 64 MB of fp16: enough rows to fill the matrix units, little beside a model.
TILE = 1 << 25
# Rows from which on tiles pay; fewer go through the mat-vec, MAX_TOKENS at a time.
TILED_ROWS_FROM = 17
# The same for experts, in rows (chosen experts of all tokens) for each expert there is.
GROUPED_ROWS_FROM = 4


def expand(launcher: Launcher, w: Packed, dtype: mx.Dtype = mx.float16) -> Any:
    """The numbers of a packed weight, of its shape, in any float type; computed in fp32."""
    # The planes' leading axes are rows, one after the other. `block_scales` has blocks and numbers in a row.
    planes = {"codes": (w.codes, 1), "group_scales": (w.group_scales, 1), "block_scales": (w.block_scales, 2)}
    flat = {name: a.reshape(-1, *a.shape[-kept:]) for name, (a, kept) in planes.items() if a is not None}
    inputs, run = _expander(w.format.name, w.shape[-1], dtype, launcher)
    return run(
        inputs=[flat[name] for name in inputs],
        grid=(256 * -(-prod(w.shape) // 2048), 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[w.shape],
        output_dtypes=[dtype],
    )[0]


@cache  # a prompt launches hundreds, and the GPU must not wait for this to be worked out
def _expander(
    name: str, k: int, dtype: mx.Dtype, launcher: Launcher
) -> tuple[tuple[str, ...], Callable[..., Sequence[Any]]]:
    """The inputs of the kernel for a format and a row length, and what launches it."""
    form = FORMATS[name]
    absent = [
        plane
        for plane, there in (("group_scales", form.group_scale_bits), ("block_scales", form.scale_block))
        if not there
    ]
    kernel = render("expand", "expand.metal", dtype, {**format_defines(form, 32, k), "K": k}, absent)
    return kernel.inputs, build(launcher, kernel)


def expand_reference(w: Packed, dtype: mx.Dtype = mx.float16) -> mx.array:
    """`expand` in stock MLX."""
    return formats.dequantize(w, dtype)


def halve(launcher: Launcher, x: mx.array) -> tuple[Any, Any]:
    """Rows as fp16, and what undoes it.

    Args:
        x: [T, K] of any float type.

    Returns:
        x / scale, fp16 [T, K] with magnitudes under 2; scale, fp32 [T, 1]: a row's power of two at or below its largest
        magnitude, at least 2^-100.
    """
    rows, k = x.shape
    if k % 8 or x.size < DEVICE_ELEMENTS:  # loads are of 8 numbers, from device memory
        return halve_reference(x)
    run, simdgroups = _halver(x.dtype, k, launcher)
    h, scale = run(
        inputs=[x],
        grid=(32 * simdgroups, rows, 1),
        threadgroup=(32 * simdgroups, 1, 1),
        output_shapes=[(rows, k), (rows, 1)],
        output_dtypes=[mx.float16, mx.float32],
    )
    return h, scale


@cache
def _halver(dtype: mx.Dtype, k: int, launcher: Launcher) -> tuple[Callable[..., Sequence[Any]], int]:
    simdgroups = min(8, -(-k // 256))
    return build(launcher, render("halve", "halve.metal", dtype, {"SG": simdgroups})), simdgroups


def halve_reference(x: mx.array) -> tuple[mx.array, mx.array]:
    """`halve` in stock MLX."""
    h: tuple[mx.array, mx.array] = _compiled(_scaled, not on_cpu())(x)
    return h


def linear(launcher: Launcher, x: mx.array, w: Packed | mx.array) -> mx.array:
    """x @ wᵀ.

    Args:
        x: [.., K].
        w: [N, K].

    Returns:
        [.., N] in x's dtype.
    """
    n, k = w.shape
    h, scale = halve(launcher, x.reshape(-1, k))
    done: list[mx.array] = []
    for start, stop in _tiles(n, k, 256):
        tile = _tile(w, start, stop, [h, *done[-1:]], launcher)
        done.append(h @ tile.T)
    y = done[0] if len(done) == 1 else mx.concatenate(done, axis=-1)
    return _from_half(y, scale).astype(x.dtype).reshape(*x.shape[:-1], n)


def expert_linear(launcher: Launcher, x: mx.array, w: Packed | mx.array, routing: Routing, glu: bool = False) -> Any:
    """Each token through each of its experts, in one launch.

    Args:
        x: [T, 1, K] or [T, E', K].
        w: [E, N, K], packed or of 16-bit floats.
        glu: w holds gate's rows, then up's; the result is gelu(gate x) * (up x).

    Returns:
        [T, E', N], or [T, E', N / 2] with glu, in x's dtype.
    """
    (tokens, used), (_, n, k) = routing.chosen.shape, w.shape
    h, scale = halve(launcher, x.reshape(-1, k))
    shared = used if x.shape[1] == 1 else 1  # rows of the result that one of x is for
    name = w.format.name if isinstance(w, Packed) else ""
    dtypes = (mx.float16 if isinstance(w, Packed) else w.dtype, x.dtype)
    inputs, run = _grouped(name, k, dtypes, shared, glu, launcher)
    planes = (
        {"codes": w.codes, "group_scales": w.group_scales, "block_scales": w.block_scales}
        if isinstance(w, Packed)
        else {"codes": w}
    )
    arrays = {"x": h, "scale": scale, "order": routing.order, "tiles": routing.tiles, **planes}
    outs = n // 2 if glu else n
    return run(
        inputs=[arrays[name] for name in inputs],
        grid=(128 * -(-n // 128), routing.tiles.shape[0], 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(tokens, used, outs)],
        output_dtypes=[x.dtype],
    )[0]


@cache
def _grouped(
    name: str, k: int, dtypes: tuple[mx.Dtype, mx.Dtype], shared: int, glu: bool, launcher: Launcher
) -> tuple[tuple[str, ...], Callable[..., Sequence[Any]]]:
    """The inputs of the kernel for a format ("": none, but a dtype), and what launches it."""
    defines: dict[str, object] = {"TOKENS": TOKENS, "USED": shared, "GLU": glu, **result_defines(dtypes[1])}
    absent = ["group_scales", "block_scales"]
    if name:
        form = FORMATS[name]
        defines |= {"PLAIN": False, "CHUNK": 32, **format_defines(form, 32, k)}
        absent = [
            plane
            for plane, there in (("group_scales", form.group_scale_bits), ("block_scales", form.scale_block))
            if not there
        ]
    else:
        defines |= {"PLAIN": True, "W_TYPE": METAL_TYPES[dtypes[0]]}
    kernel = render("grouped", "grouped.metal", mx.float16, defines, absent)
    return kernel.inputs, build(launcher, kernel)


def few_rows(launcher: Launcher, x: mx.array, w: Packed) -> mx.array:
    """x @ wᵀ for x [T, K] by the mat-vec, `kernels.MAX_TOKENS` rows at a time, in fp16 too."""
    h, scale = halve(launcher, x)
    step = matvec.MAX_TOKENS
    done = [matvec.matvec(launcher, h[i : i + step], w, out=mx.float32) for i in range(0, x.shape[0], step)]
    y = done[0] if len(done) == 1 else mx.concatenate(done)
    return _from_half(y, scale).astype(x.dtype)


def few_expert_rows(launcher: Launcher, x: mx.array, w: Packed, chosen: mx.array) -> mx.array:
    """`expert_linear` by the mat-vec, a row for each chosen [T, E'] expert of each token."""
    rows = mx.contiguous(mx.broadcast_to(x, (*chosen.shape, x.shape[-1])).reshape(chosen.size, -1))
    h, scale = halve(launcher, rows)
    y = matvec.matvec(launcher, h, w, ids=chosen.reshape(-1).astype(mx.int32), out=mx.float32)
    return _from_half(y, scale).astype(x.dtype).reshape(*chosen.shape, -1)


def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up, in one launch where MLX can."""
    y: mx.array = _compiled(stock.geglu, not on_cpu())(gate, up)
    return y


def supports(w: Weight) -> bool:
    """Whether a weight can be expanded: of 16-bit floats, or packed in rows of whole 32s, in device memory."""
    if isinstance(w, mx.array):
        return w.dtype != mx.float32  # which is multiplied as it is
    if not isinstance(w, Packed):
        return False
    arrays = [a for a in (w.codes, w.group_scales, w.block_scales) if a is not None]
    return w.shape[-1] % 32 == 0 and all(a.size >= DEVICE_ELEMENTS for a in arrays)


def _tiles(count: int, size: int, multiple: int) -> list[tuple[int, int]]:
    """Ranges of `count` rows of `size` weights, in tiles alike, of a multiple of rows where there are several."""
    tiles = -(-count * size // TILE)
    each = max(1, -(-count // tiles))
    if tiles > 1:
        each = -(-each // multiple) * multiple
    return [(start, min(start + each, count)) for start in range(0, count, each)]


def _tile(w: Packed | mx.array, start: int, stop: int, after: list[mx.array], launcher: Launcher) -> mx.array:
    """Rows of a weight as fp16, not before `after` is there."""
    if isinstance(w, mx.array):
        rows: mx.array = mx.depends([w[start:stop]], after)[0]
        return rows.astype(mx.float16)
    part = w[start:stop]
    part = replace(part, codes=mx.depends([part.codes], after)[0])
    tile: mx.array = expand(launcher, part)
    return tile


def _scaled(x: mx.array) -> tuple[mx.array, mx.array]:
    top = mx.abs(x.astype(mx.float32)).max(axis=-1, keepdims=True)
    # The exponent's bits alone are the power of two.
    scale = mx.maximum((top.view(mx.uint32) & 0x7F800000).view(mx.float32), 2.0**-100)
    return (x / scale).astype(mx.float16), scale


def _unscaled(y: mx.array, scale: mx.array) -> mx.array:
    return y.astype(mx.float32) * scale


@cache
def _compiled(f: Callable[..., Any], gpu: bool) -> Callable[..., Any]:
    """`f` in as few launches as MLX can; on a CPU that would call a compiler."""
    return mx.compile(f) if gpu else f


def _from_half(y: mx.array, scale: mx.array) -> mx.array:
    """fp32 y * scale."""
    z: mx.array = _compiled(_unscaled, not on_cpu())(y, scale)
    return z
