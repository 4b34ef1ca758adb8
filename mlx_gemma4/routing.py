"""Which rows of a prompt go through which expert, cut into few products: several experts at once, as many rows of each.

In: the experts chosen for each token, and how many experts are expanded at a time (a tile). Out: on the host, products
and places: where a row lies among those products' rows, so that one gather puts all rows there and another fetches
their results. Of weights and activations it knows nothing.

A product an expert would be 256 of them a layer of 26B-A4B, each of a shape that may be new, which an NVIDIA GPU's host
pays for (docs/log.md, 2026-11-24). So a tile's experts take one number of rows in common, one of few numbers, and
padding makes up what they lack. An expert with far more rows than the others of its tile would pad them all: what it
has beyond the common number goes through a product of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx
import numpy as np

# Rows of padding that are worth a product more. By reckoning, not measured: 512 rows of 26B's gate and up are 4 GFLOP,
# some 8 us of an H100; a product and the copy of its result are two launches, some 20 us of its host.
OWN = 512
# Numbers of rows are multiples of this, and of a quarter of the power of two below them: from 64 on at most a fifth is
# padding, and up to 2,048 there are 24 numbers.
LEAST = 16


@dataclass(frozen=True)
class Product:
    """Experts of a tile, counted from its first, and the rows that each of them takes."""

    first: int
    last: int
    rows: int


@dataclass(frozen=True)
class Layout:
    """Products, and the places of rows: product after product, in each expert after expert."""

    products: list[list[Product]]  # of each tile
    sources: np.ndarray  # int32 [places], which of the T * E' chosen experts a place is for; of padding: any
    places: np.ndarray  # int32 [T * E'], the other way


@dataclass
class Routing:
    """The experts of each token, for all products that take the same: they are sorted once, after one wait."""

    chosen: mx.array  # int [T, E']
    meanwhile: mx.array | None = None  # what the GPU may do while the host waits and sorts
    _layouts: dict[tuple[int, int], Layout] = field(default_factory=dict)

    @cached_property
    def on_host(self) -> np.ndarray:
        """[T * E']. Waits for the GPU."""
        if self.meanwhile is not None:  # behind what is waited for
            mx.async_eval(self.chosen)
            mx.async_eval(self.meanwhile)
        return np.array(self.chosen).reshape(-1)

    def layout(self, experts: int, tile: int) -> Layout:
        """For so many experts, a tile of them at a time."""
        if (experts, tile) not in self._layouts:
            self._layouts[experts, tile] = lay_out(self.on_host, experts, tile)
        return self._layouts[experts, tile]


def lay_out(chosen: np.ndarray, experts: int, tile: int) -> Layout:
    """The layout of rows whose experts are `chosen` [rows]."""
    tiles = -(-experts // tile)
    order = np.argsort(chosen.astype(np.uint16), kind="stable")  # of 16 bits it is a radix sort
    counts = np.zeros((tiles, tile), np.int64)
    counts.reshape(-1)[:experts] = np.bincount(chosen, minlength=experts)
    width = np.minimum(tile, experts - tile * np.arange(tiles))  # of each tile

    # What a tile's experts have in common: none, or what one of them has, whichever costs least.
    common = np.concatenate([np.zeros((tiles, 1), np.int64), padded(counts)], axis=1)
    beyond = padded(np.maximum(counts[:, None] - common[..., None], 0))  # [tiles, what is common, tile]
    cost = common * width[:, None] + OWN * (common > 0) + (beyond + OWN * (beyond > 0)).sum(axis=2)
    best = np.arange(tiles), cost.argmin(axis=1)
    common, beyond = common[best][:, None], beyond[best]  # [tiles, 1], [tiles, tile]
    products = [
        [Product(0, w, c)] * (c > 0) + [Product(e, e + 1, r) for e, r in enumerate(own) if r]
        for w, c, own in zip(width.tolist(), common[:, 0].tolist(), beyond.tolist(), strict=True)
    ]

    # Where an expert's rows begin, those in common and those beyond, and how many they are: [tiles, tile, 2].
    shared = common[:, 0] * width
    sizes = shared + beyond.sum(axis=1)
    start = (np.cumsum(sizes) - sizes)[:, None]
    own = start + shared[:, None] + np.cumsum(beyond, axis=1) - beyond
    starts = np.stack([start + common * np.arange(tile), own], axis=-1).reshape(-1)
    lengths = np.stack([np.minimum(counts, common), np.maximum(counts - common, 0)], axis=-1).reshape(-1)
    at = np.arange(chosen.size) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
    places, sources = np.empty(chosen.size, np.int32), np.zeros(sizes.sum(), np.int32)
    places[order], sources[at] = at, order
    return Layout(products, sources, places)


def padded(counts: np.ndarray) -> np.ndarray:
    """Numbers of rows, rounded up to one of few."""
    above = np.exp2(np.ceil(np.log2(np.maximum(counts, 1)))).astype(np.int64)  # a power of two
    step = np.maximum(above // 8, LEAST)
    rounded: np.ndarray = -(-counts // step) * step
    return rounded
