"""Which rows of a state's arrays a decode step reads and writes: numbers that follow from the position alone.

In: a state's layers. Out: `Spans`, which gives those numbers for this step and all that follow, until a tail is full
and segments change: for a traced step as MLX arrays, for a replayed one as numpy.

Each number is a `Linear`, max(position + slope, floor). An example: 70 tokens are read, segments end at 64, so the tail
holds the tokens 64 .. 69. The next token, at position 70, goes into row 6 of the tail: Linear(-64, 0).at(70) == 6.

    a global layer sees        all of the segment      Span(constant(0), constant(64))        .at(70) == (0, 64)
                               the tail with itself    Span(constant(0), Linear(-63, 0))      .at(70) == (0, 7)
    one with a window of 16    the tokens 55 .. 63     Span(Linear(-15, 0), constant(64))     .at(70) == (55, 64)
                               and the tail            Span(Linear(-79, 0), Linear(-63, 0))   .at(70) == (0, 7)

At position 80 the window begins in the tail: (64, 64), which is empty, and (1, 17).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..config import Config
from ..kv.segments import LayerKV, Segment

_FIXED = -(2**30)  # slope of a number that does not move with the position
CACHED = 8  # arrangements of segments whose arrays are kept: a conversation needs one at a time


class Linear(NamedTuple):
    """The number max(position + slope, floor)."""

    slope: int
    floor: int

    def at(self, position: int) -> int:
        return max(position + self.slope, self.floor)


def constant(number: int) -> Linear:
    return Linear(_FIXED, number)


class Span(NamedTuple):
    """Rows start..stop of one segment or tail."""

    start: Linear
    stop: Linear

    def at(self, position: int) -> tuple[int, int]:
        stop = self.stop.at(position)
        return min(self.start.at(position), stop), stop  # a segment may have gone out of sight


@dataclass(frozen=True)
class Spans:
    """All of a step's numbers."""

    count: Linear  # tokens in the tails
    parts: tuple[tuple[bool, tuple[Span, ...]], ...]  # by kind of layer: of each segment not quantized, and of the tail

    @cached_property
    def lengths(self) -> dict[bool, int]:
        """Number of spans, by kind of layer."""
        return {sliding: len(spans) for sliding, spans in self.parts}

    @cached_property
    def _table(self) -> np.ndarray:
        """Slopes and floors, int32 [2, rows, 2]; the first row is (position, count), the others are spans."""
        rows = [(Linear(0, 0), self.count), *(span for _, spans in self.parts for span in spans)]
        table: np.ndarray = np.moveaxis(np.array(rows, np.int32), 2, 0).copy()
        return table

    def at(self, position: int) -> np.ndarray:
        """Return the numbers for a step at a position, int32 [2 * rows]."""
        slopes, floors = self._table
        rows: np.ndarray = np.maximum(position + slopes, floors)
        np.minimum(rows[1:, 0], rows[1:, 1], out=rows[1:, 0])
        return rows.reshape(-1)

    @property
    def size(self) -> int:
        return self._table.size // 2


@lru_cache(CACHED)
def arrays_of(spans: Spans) -> tuple[mx.array, mx.array]:
    """Return slopes and floors as arrays, int32 [rows, 2], for `numbers_at`."""
    slopes, floors = spans._table
    return mx.array(slopes), mx.array(floors)


def numbers_at(position: mx.array, slopes: mx.array, floors: mx.array) -> mx.array:
    """Return the numbers as `Spans.at` does, of spans of which none is out of sight, for a position int32 [1]."""
    return mx.maximum(position + slopes, floors).reshape(-1)


@dataclass(frozen=True)
class Places:
    """A step's numbers where kernels read them."""

    position: mx.array  # int32 [1], tokens before the step
    count: mx.array  # int32 [1], those of them in the tails
    spans: dict[bool, mx.array]  # by kind of layer, int32 [parts, 2]: rows in use of each part, the tail last


def placed(numbers: mx.array, lengths: dict[bool, int]) -> Places:
    """Name the numbers, int32 [2 * rows]. `lengths`: `Spans.lengths`."""
    places, at = Places(numbers[0:1], numbers[1:2], {}), 2
    for sliding, n in lengths.items():
        places.spans[sliding] = numbers[at : at + 2 * n].reshape(-1, 2)
        at += 2 * n
    return places


def in_sight(kv: LayerKV, window: int | None) -> list[Segment]:
    """Return a layer's segments that the next token may see."""
    return [s for s in kv.segments if window is None or s.stop > kv.stop - window + 1]


def spans_of(config: Config, layers: dict[int, LayerKV], tokens: int) -> Spans:
    """Return the numbers of steps of so many tokens over a state's layers. All layers of a kind are cut alike."""
    kinds = {config.layers[i].sliding: kv for i, kv in layers.items()}
    some = next(iter(layers.values()))
    parts = ((sliding, _layer_spans(kv, config.window if sliding else None, tokens)) for sliding, kv in kinds.items())
    return Spans(Linear(some.count - some.stop, 0), tuple(parts))


def _layer_spans(kv: LayerKV, window: int | None, tokens: int) -> tuple[Span, ...]:
    tail, plain = kv.stop - kv.count, () if kv.quantizer else in_sight(kv, window)  # codes are in use from end to end

    def first(start: int, floor: int) -> Linear:
        """The first row in sight of what begins at a position."""
        return constant(floor) if window is None else Linear(1 - window - start, floor)

    segments = (Span(first(s.start, 0), constant(s.stop - s.start)) for s in plain)
    return (*segments, Span(first(tail, kv.skip), Linear(tokens - tail, 0)))
