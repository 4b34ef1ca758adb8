"""Sums and rows over ranks inside of a recorded step: exchange.metal. Their references are collectives of MLX's engine.

In: arrays of this rank, and where the ranks' boxes are (model/exchange.py has them). Out: what all ranks then have.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import mlx.core as mx

from ..gpu.render import Defines, Launcher, absent, prepare, render

THREADS, GROUPS = 256, 256  # of a threadgroup; at most so many, which are on the GPU all at once


class Boxes(NamedTuple):
    """Memory on each rank's GPU that the others write to."""

    addresses: mx.array  # uint32 [ranks or more, 2]: low and high half
    rank: int
    ranks: int
    room: int  # numbers that a rank may send at once


def exchange_sum(launcher: Launcher, x: Any, flag: Any, boxes: Boxes, after: Any, outputs: Any = None) -> Any:
    """The sum of x, fp32 [T, K], over ranks.

    Args:
        flag: int32 [1], the number of this exchange.
        after: the result of the one before; None: this is a step's first.
        outputs: of experts, (fp32 [T, used, K], their shares fp32 [T, used]): the sum of their mixture comes with x's.

    Returns:
        fp32 [T, K], or [2, T, K] with `outputs`.
    """
    shape, (outputs, share) = tuple(x.shape), outputs or (None, None)
    defines: Defines = {"USED": 0, "K": shape[-1]}
    if outputs is not None:
        shape, defines = (2, *shape), {"USED": outputs.shape[1], "K": shape[-1]}
    arrays = {"x": x, "outputs": outputs, "share": share, "flag": flag, "boxes": boxes.addresses, "after": after}
    return _launched(launcher, "exchange_sum", prod(shape), boxes, defines, arrays, shape)


def exchange_rows(launcher: Launcher, x: Any, flag: Any, boxes: Boxes, after: Any, columns: int) -> Any:
    """All columns, fp32 [T, columns], of which this rank has x [T, some] and others, by `shard.shares`, the rest."""
    tokens, mine = x.shape
    arrays = {"x": x, "flag": flag, "boxes": boxes.addresses, "after": after}
    shape = tokens, columns
    return _launched(launcher, "exchange_rows", x.size, boxes, {"ALL": columns, "COLUMNS": mine}, arrays, shape)


def _launched(
    launcher: Launcher,
    name: str,
    count: int,
    boxes: Boxes,
    defines: Defines,
    arrays: dict[str, Any],
    shape: tuple[int, ...],
) -> Any:
    if count > boxes.room:
        raise ValueError(f"{count} numbers do not go into a box of {boxes.room}")
    groups = min(GROUPS, -(-count // THREADS))
    constants = {"RANK": boxes.rank, "RANKS": boxes.ranks, "CAP": boxes.room, "COUNT": count}
    constants |= {"THREADS": THREADS, "STEP": THREADS * groups}
    kernel = render(name, "exchange.metal", mx.float32, {**constants, **defines}, absent(arrays))
    return prepare(launcher, kernel, (groups, 1, 1), THREADS, (shape, mx.float32)).by_name(arrays)[0]
