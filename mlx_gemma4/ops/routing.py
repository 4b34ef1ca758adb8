"""The rows of a prompt sorted by expert and cut into tiles, all on the GPU.

In: the experts chosen for each token. Out: an order of rows and tiles of it, for a kernel that takes a tile at a time
(`grouped`). Nothing waits for the host, which knows only how many tiles there are at most. Knows no weights and no
activations.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from ..gpu.render import Launcher, prepare, render
from .cases import Case, Check, Sizes, case, cases
from .op import Op

TOKENS = 64  # rows of a tile
ROWS = 8  # of a tile of `route`
MOST = 1024  # rows (chosen experts of all tokens) that it takes


@dataclass
class Routing:
    """The experts of each token, sorted once for all products that take the same."""

    chosen: mx.array  # int [T, E']
    experts: int
    rows: int = TOKENS  # of a tile, at most

    @cached_property
    def order(self) -> mx.array:
        """int32 [T E']: numbers of the chosen experts, as if in one row, expert after expert."""
        return mx.argsort(self.chosen.reshape(-1)).astype(mx.int32)

    @cached_property
    def tiles(self) -> mx.array:
        """int32 [tiles, 3]: expert, first and one past the last of `order`; both alike in tiles that are left over."""
        rows = self.chosen.size
        numbers = mx.arange(self.experts).astype(self.chosen.dtype)
        counts = (self.chosen.reshape(1, -1) == numbers[:, None]).sum(axis=1).astype(mx.int32)
        each = (counts + (self.rows - 1)) // self.rows
        ends = mx.cumsum(each)  # of each expert's tiles
        # Each expert that is chosen at all may have a tile that is not full.
        tile = mx.arange(min(rows, rows // self.rows + self.experts)).astype(mx.int32)[:, None]
        past, begun = ends <= tile, ends - each <= tile  # [tiles, experts]
        before = mx.where(past, counts, 0).sum(axis=1)  # rows of experts before this tile's
        first = before + (tile[:, 0] - mx.where(past, each, 0).sum(axis=1)) * self.rows
        last = mx.minimum(first + self.rows, mx.where(begun, counts, 0).sum(axis=1))
        expert = mx.minimum(past.sum(axis=1).astype(mx.int32), self.experts - 1)
        return mx.stack([expert, mx.minimum(first, last), last], axis=1).astype(mx.int32)


def most_tiles(chosen: int, experts: int) -> int:
    """Tiles of `route` that so many chosen experts can take: each of them may have one that is not full."""
    return min(chosen, chosen // ROWS + experts)


def route(launcher: Launcher, ids: mx.array, experts: int) -> tuple[Any, Any]:
    """`Routing` of a few rows in one launch: `order` and `tiles`, of at most ROWS rows.

    Args:
        ids: int32 [T, E'], at most MOST in all.
    """
    tiles = most_tiles(ids.size, experts)
    kernel = render("route", "routing.metal", mx.float32, {"EXPERTS": experts, "MOST": MOST, "ROWS": ROWS, "SG": 8})
    launch = prepare(launcher, kernel, (1, 1, 1), 256, ((ids.size,), mx.int32), ((tiles, 3), mx.int32))
    order, cut = launch(ids)
    return order, cut


def route_reference(ids: mx.array, experts: int) -> tuple[mx.array, mx.array]:
    """`route` in stock MLX."""
    routing = Routing(ids, experts, ROWS)
    return routing.order, routing.tiles


ROUTE = Op("route", route, route_reference)


@cases
def route_cases(s: Sizes) -> Iterator[Check]:
    rows = 32

    def make() -> Case:
        rng = np.random.default_rng(0)
        ids = mx.array(np.stack([rng.permutation(s.experts)[: s.used] for _ in range(rows)]).astype(np.int32))

        def by_expert(made: Sequence[mx.array]) -> list[mx.array]:  # the rows of one are in any order
            order, tiles = made
            return [ids.reshape(-1)[order], mx.sort(order), mx.where(tiles[:, 1:2] < tiles[:, 2:], tiles, 0)]

        return replace(case(ROUTE, 4 * ids.size, ids, s.experts), compared=by_expert)

    if s.experts:
        yield Check(ROUTE.key, f"{rows} x {s.used} of {s.experts}", make)
