"""Which rows of a state's arrays a decode step reads and writes: numbers that follow from the position alone.

In: a state's layers. Out: `Spans`, which gives those numbers for the next step and all that follow it until a tail is
full and segments change. Each number is max(position + slope, floor).

An example: 70 tokens are read and segments end at 64, so the tail holds the tokens 64 .. 69. The next token, at
position 70, goes into row 6 of the tail: slope -64, floor 0. It sees these rows (slopes and floors of start and stop):

    in a global layer         all of the segment      0 .. 64    (FIXED, FIXED), (0, 64)
                              the tail with itself    0 .. 7     (FIXED, -63), (0, 0)
    with a window of 16       the tokens 55 .. 63    55 .. 64    (-15, FIXED), (0, 64)
                              the tail with itself    0 .. 7     (-79, -63), (0, 0)

At position 80, the window of 16 begins in the tail: its spans are 64 .. 64, which is empty, and 1 .. 17.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import Config
from ..kv.segments import LayerKV, Segment
from ..ops.parts import MAX_PARTS

FIXED = -(2**30)  # slope of a number that does not move with the position


class Spans:
    """All of a step's numbers: position, count of tokens in the tails, and start and stop of each span."""

    def __init__(self, rows: list[tuple[tuple[int, int], tuple[int, int]]], lengths: dict[bool, int]) -> None:
        """
        Args:
            rows: slopes and floors: of position and count, then of each span.
            lengths: spans by kind of layer (True: sliding): of segments that are not quantized, then of the tail.
        """
        self.lengths = lengths
        self.slopes, self.floors = (np.array(numbers, np.int32) for numbers in zip(*rows, strict=True))
        self.arrays = mx.array(self.slopes), mx.array(self.floors)  # int32 [rows, 2]
        self.size = self.slopes.size

    def at(self, position: int) -> np.ndarray:
        """Return the numbers at a position, int32 [size]."""
        rows: np.ndarray = np.maximum(position + self.slopes, self.floors)
        np.minimum(rows[1:, 0], rows[1:, 1], out=rows[1:, 0])  # a segment may have gone out of sight
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
    rows, lengths = [((0, -kinds[0][2]), (0, 0))], {}
    for sliding, window, tail, skip, plain in kinds:
        first = FIXED if window is None else 1 - window  # slope of the first token in sight
        rows += [((first - start, FIXED), (0, stop - start)) for start, stop in plain]
        rows.append(((first - tail, tokens - tail), (skip, 0)))
        rows += [((FIXED, FIXED), (0, 0))] * (MAX_PARTS - len(plain) - 1)
        lengths[sliding] = MAX_PARTS
    return Spans(rows, lengths)
