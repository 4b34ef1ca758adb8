"""Which rows of a state's arrays a decode step reads and writes: numbers that follow from the position alone.

In: a state's layers. Out: `Spans`, which gives those numbers for the next step and all that follow it until a tail is
full and segments change. Each number is a `Linear`, max(position + slope, floor).

An example: 70 tokens are read and segments end at 64, so the tail holds the tokens 64 .. 69. The next token, at
position 70, goes into row 6 of the tail: Linear(-64, 0).at(70) == 6. It sees

    in a global layer         all of the segment     Span(Linear(FIXED, 0), Linear(FIXED, 64)).at(70) == (0, 64)
                              the tail with itself   Span(Linear(FIXED, 0), Linear(-63, 0)).at(70) == (0, 7)
    with a window of 16       the tokens 55 .. 63    Span(Linear(-15, 0), Linear(FIXED, 64)).at(70) == (55, 64)
                              the tail with itself   Span(Linear(-79, 0), Linear(-63, 0)).at(70) == (0, 7)

At position 80, the window of 16 begins in the tail: its spans are (64, 64), which is empty, and (1, 17).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..config import Config
from ..kv.segments import LayerKV, Segment

FIXED = -(2**30)  # slope of a number that does not move with the position


class Linear(NamedTuple):
    slope: int
    floor: int

    def at(self, position: int) -> int:
        return max(position + self.slope, self.floor)


class Span(NamedTuple):
    """Rows start..stop of one segment or tail."""

    start: Linear
    stop: Linear

    def at(self, position: int) -> tuple[int, int]:
        stop = self.stop.at(position)
        return min(self.start.at(position), stop), stop  # a segment may have gone out of sight


class Spans:
    """All of a step's numbers: position, count of tokens in the tails, and start and stop of each span."""

    def __init__(self, count: Linear, parts: dict[bool, list[Span]]) -> None:
        """`parts`, by kind of layer (True: sliding): of segments that are not quantized, then of the tail."""
        self.lengths = {sliding: len(spans) for sliding, spans in parts.items()}
        rows = [Span(Linear(0, 0), count), *(span for spans in parts.values() for span in spans)]
        self.slopes, self.floors = (np.array([[n[i] for n in row] for row in rows], np.int32) for i in (0, 1))
        self.arrays = mx.array(self.slopes), mx.array(self.floors)  # int32 [rows, 2]
        self.size = self.slopes.size

    def at(self, position: int) -> np.ndarray:
        """Return the numbers at a position, int32 [size]."""
        rows: np.ndarray = np.maximum(position + self.slopes, self.floors)
        np.minimum(rows[1:, 0], rows[1:, 1], out=rows[1:, 0])  # as in Span.at
        return rows.reshape(-1)


def numbers_at(position: mx.array, slopes: mx.array, floors: mx.array) -> mx.array:
    """Return what `Spans.at` does, by arrays, at a position, int32 [1], where no segment is out of sight."""
    return mx.maximum(position + slopes, floors).reshape(-1)


@dataclass(frozen=True)
class Places:
    """A step's numbers where kernels read them."""

    position: mx.array  # int32 [1], tokens before the step
    count: mx.array  # int32 [1], those of them in the tails
    spans: dict[bool, mx.array]  # by kind of layer, int32 [parts, 2]


def placed(numbers: mx.array, lengths: dict[bool, int]) -> Places:
    """Cut numbers, int32 [size], into what they are. `lengths`: `Spans.lengths`."""
    spans, at = {}, 2
    for sliding, n in lengths.items():
        spans[sliding] = numbers[at : at + 2 * n].reshape(-1, 2)
        at += 2 * n
    return Places(numbers[0:1], numbers[1:2], spans)


def in_sight(kv: LayerKV, window: int | None) -> list[Segment]:
    """Return a layer's segments that the next token may see."""
    return [s for s in kv.segments if window is None or s.stop > kv.stop - window + 1]


def spans_of(config: Config, layers: dict[int, LayerKV], tokens: int) -> Spans:
    """Return the numbers of steps of so many tokens over a state's layers. All layers of a kind are cut alike."""
    kinds: dict[bool, tuple[Any, ...]] = {}
    for i, kv in layers.items():
        if (sliding := config.layers[i].sliding) not in kinds:
            window = config.window if sliding else None
            plain = () if kv.quantizer else ((s.start, s.stop) for s in in_sight(kv, window))  # of codes all are in use
            kinds[sliding] = (sliding, window, kv.stop - kv.count, kv.skip, tuple(plain))
    return _spans(tokens, tuple(kinds.values()))


@lru_cache(8)  # a conversation needs one at a time
def _spans(tokens: int, kinds: tuple[tuple[Any, ...], ...]) -> Spans:
    parts = {}
    for sliding, window, tail, skip, plain in kinds:
        first = FIXED if window is None else 1 - window  # slope of the first token in sight
        segments = (Span(Linear(first - start, 0), Linear(FIXED, stop - start)) for start, stop in plain)
        parts[sliding] = [*segments, Span(Linear(first - tail, skip), Linear(tokens - tail, 0))]
    return Spans(Linear(-tail, 0), parts)
