"""Sums of many rows over ranks whose GPUs share memory: exchange_many.metal. Their reference is `Part.sums`, by MLX.

In: arrays of this rank, and where the ranks' boxes are (model/exchange.py has them). Out: their sums, on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..gpu.render import Launcher, prepare, render
from .exchange import Boxes

THREADS, GROUPS = 1024, 64  # of a threadgroup; always so many, which are on the GPU all at once
ROOM = 16 << 10  # words of 16 bytes that a threadgroup sends at once


def box_bytes(ranks: int) -> int:
    """Bytes of a rank's box."""
    return _head(ranks) + 2 * ranks * GROUPS * ROOM * 16


def _head(ranks: int) -> int:
    return -(-4 * GROUPS * (1 + 2 * ranks) // 256) * 256


def exchange_many(launcher: Launcher, arrays: Sequence[mx.array], boxes: Boxes) -> list[mx.array]:
    """The sums over ranks of one array or two, [T, any] each, of one dtype: many rows, outside of recorded steps.

    Launches follow each other on all ranks: each depends on the one before, or belongs to a later evaluation.
    """
    dtype, (rows, width) = arrays[0].dtype, arrays[0].shape
    wide = all(a.shape[1] * dtype.size % 16 == 0 for a in arrays)
    defines = {"RANK": boxes.rank, "RANKS": boxes.ranks, "GROUPS": GROUPS, "THREADS": THREADS, "WIDE": wide}
    defines |= {"ROOM": boxes.room, "HEAD": _head(boxes.ranks), "KX": width}
    defines |= {"KY": arrays[1].shape[1] if arrays[1:] else 0}
    missing = [] if arrays[1:] else ["y", "out_y"]
    kernel = render("exchange_many", "exchange_many.metal", dtype, defines, missing)
    results = [((rows, a.shape[1]), dtype) for a in arrays]
    return [*prepare(launcher, kernel, (GROUPS, 1, 1), THREADS, *results)(*arrays, boxes.addresses)]
