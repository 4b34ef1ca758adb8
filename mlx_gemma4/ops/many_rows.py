"""Products of many rows on a GPU: a weight becomes fp16 a tile at a time, for MLX's own matmul.

In: activations and packed (or dense) weights. Out: activations, as `stock.linear` and `stock.expert_linear`, the
references, give them. A prompt's product reads a weight once for hundreds of rows, so the matrix units count, which
want plain numbers. One launch expands a tile, the next multiplies it, and each tile waits for the product before, so
that one or two are alive at a time, never a second copy of a weight. Experts go through `grouped`; a few rows of either
through `few_rows`.

Rows of x go in as fp16 with a scale each (halve.py). Of weights, magnitudes over 65504 are out of reach; no model has
them.
"""

from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..gpu.render import Launcher
from ..quant.formats import Packed
from .epilogue import FP32, Folded
from .expand import expand
from .few_rows import few_rows
from .halve import halve, unhalved
from .packed import is_readable
from .stock import Weight

TILE = 1 << 25  # weights of a tile, 64 MB of fp16: enough rows to fill the matrix units, little beside a model
GROUPED_ROWS_FROM = 4  # the same for experts and `grouped`, in rows (chosen experts of all tokens) for each expert


def linear(launcher: Launcher, x: mx.array, w: Packed | mx.array) -> mx.array:
    """x @ wᵀ for x [.., K] and w [N, K]: [.., N] in x's dtype."""
    n, k = w.shape
    h, scale = halve(launcher, x.reshape(-1, k))
    done: list[mx.array] = []
    for start, stop in _tiles(n, k):
        tile = _tile(launcher, w, start, stop, [h, *done[-1:]])
        done.append(h @ tile.T)
    y = done[0] if len(done) == 1 else mx.concatenate(done, axis=-1)
    return unhalved(y, scale).astype(x.dtype).reshape(*x.shape[:-1], n)


def few_linear(launcher: Launcher, x: mx.array, w: Packed) -> mx.array:
    """x @ wᵀ for x [T, K], up to MAX_ROWS rows."""
    h, scale = halve(launcher, x)
    return unhalved(few_rows(launcher, h, w, FP32), scale).astype(x.dtype)


def few_expert_rows(launcher: Launcher, x: mx.array, w: Packed, chosen: mx.array, routed: Any = None) -> mx.array:
    """`grouped` for a few rows of each expert, of chosen [T, E'] experts of each token."""
    rows = mx.contiguous(mx.broadcast_to(x, (*chosen.shape, x.shape[-1])).reshape(chosen.size, -1))
    h, scale = halve(launcher, rows)
    ids = chosen.astype(mx.int32)
    y = few_rows(launcher, h.reshape(*chosen.shape, -1), w, FP32, Folded(ids=ids, routed=routed))
    return unhalved(y, scale.reshape(*chosen.shape, 1)).astype(x.dtype)


def supports(w: Weight) -> bool:
    """Returns True if a weight can be expanded: 16-bit floats, or packed and readable."""
    if isinstance(w, mx.array):
        return w.dtype != mx.float32  # which is multiplied as it is
    return isinstance(w, Packed) and is_readable(w)


def _tiles(count: int, size: int) -> list[tuple[int, int]]:
    """Ranges of `count` rows of `size` weights, in tiles alike, of a multiple of 256 rows where there are several."""
    tiles = -(-count * size // TILE)
    each = max(1, -(-count // tiles))
    if tiles > 1:
        each = -(-each // 256) * 256
    return [(start, min(start + each, count)) for start in range(0, count, each)]


def _tile(launcher: Launcher, w: Packed | mx.array, start: int, stop: int, after: list[mx.array]) -> mx.array:
    """Rows of a weight as fp16, not before `after` is computed."""
    if isinstance(w, mx.array):
        rows: mx.array = mx.depends([w[start:stop]], after)[0]
        return rows.astype(mx.float16)
    part = w[start:stop]
    tile: mx.array = expand(launcher, replace(part, codes=mx.depends([part.codes], after)[0]))
    return tile
