"""Sums and rows over ranks inside of a recorded step: exchange.metal. Their references are collectives of MLX's engine.

In: arrays of this rank, and where the ranks' boxes are (model/exchange.py has them). Out: what all ranks then have.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import mlx.core as mx

from ..gpu.render import Launcher, absent, prepare, render

THREADS, GROUPS = 256, 256  # of a threadgroup; at most so many, which are on the GPU all at once


class Boxes(NamedTuple):
    """Memory on each rank's GPU that the others write to."""

    addresses: mx.array  # uint32 [ranks or more, 2]: low and high half
    rank: int
    ranks: int
    room: int  # numbers that a rank may send at once; for many rows words of each threadgroup

    def defines(self, count: int) -> dict[str, int]:
        """Constants of kernels that exchange so many numbers. Raises ValueError: these are too many."""
        if count > self.room:
            raise ValueError(f"{count} numbers do not go into a box of {self.room}")
        return {"RANK": self.rank, "RANKS": self.ranks, "CAP": self.room}


def exchange_sum(launcher: Launcher, x: Any, flag: Any, boxes: Boxes, after: Any, outputs: Any = None) -> Any:
    """The sum of x, fp32 [T, K], over ranks.

    Args:
        flag: int32 [1], the number of this exchange.
        after: the result of the one before; None: this is a step's first.
        outputs: of experts, (fp32 [T, used, K], their shares fp32 [T, used]): the sum of their mixture comes with x's.

    Returns:
        fp32 [T, K], or [2, T, K] with `outputs`.
    """
    outputs, share = outputs or (None, None)
    shape = tuple(x.shape) if outputs is None else (2, *x.shape)
    defines = {"USED": 0 if outputs is None else outputs.shape[1], "K": shape[-1], "COUNT": prod(shape)}
    arrays = {"x": x, "outputs": outputs, "share": share, "flag": flag, "after": after}
    return _launched(launcher, "exchange_sum", boxes, defines, arrays, shape)


def exchange_rows(launcher: Launcher, x: Any, flag: Any, boxes: Boxes, after: Any, columns: int) -> Any:
    """All columns, fp32 [T, columns], of which this rank has x [T, some] and others, by `shard.shares`, the rest."""
    defines, arrays = {"ALL": columns, "COLUMNS": x.shape[1], "COUNT": x.size}, {"x": x, "flag": flag, "after": after}
    return _launched(launcher, "exchange_rows", boxes, defines, arrays, (x.shape[0], columns))


def _launched(
    launcher: Launcher, name: str, boxes: Boxes, defines: dict[str, int], arrays: dict[str, Any], shape: tuple[int, ...]
) -> Any:
    groups, arrays = min(GROUPS, -(-defines["COUNT"] // THREADS)), {**arrays, "boxes": boxes.addresses}
    defines |= boxes.defines(defines["COUNT"]) | {"THREADS": THREADS, "STEP": THREADS * groups}
    kernel = render(name, "exchange.metal", mx.float32, defines, absent(arrays))
    return prepare(launcher, kernel, (groups, 1, 1), THREADS, (shape, mx.float32)).by_name(arrays)[0]
