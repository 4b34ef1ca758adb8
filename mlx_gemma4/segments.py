"""Keys and values of one layer in parts: immutable segments and a small tail.

In: keys and values of new tokens. Out: a new `LayerKV`; the old one stays as it is, and both share what they can.
Where segments begin and end follows from the number of tokens alone, so what attention computes does not depend on
how a state came to be. Nothing here knows tokens, marks or layers' order.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx


@dataclass(frozen=True)
class Layout:
    """How a sequence is cut. The attention kernel takes 8 parts: `tops` + 3 segments and the tail."""

    tail: int = 64  # tokens of the tail, and of a block, the unit of every segment
    fan: int = 8  # each level's segment is at most this many times as long as the next level's
    tops: int = 4  # segments of the largest size; beyond, that size doubles

    def ends(self, length: int) -> list[int]:
        """Where the segments of a global layer end once `length` tokens are sealed; the rest is the tail's.

        Up to `tops` segments of the largest size, then one a level, each a multiple of its level's size. With the
        defaults a token is copied 11 times as its sequence grows to 128K, and there are never over 7.
        """
        blocks = length // self.tail
        unit = self.fan
        while blocks // unit > self.tops:
            unit *= 2
        ends = list(range(unit, blocks + 1, unit))
        for step in (unit // self.fan, unit // self.fan**2, 1):
            end = blocks // max(step, 1) * max(step, 1)
            if end > (ends[-1] if ends else 0):
                ends.append(end)
        return [end * self.tail for end in ends]

    def sliding_unit(self, window: int) -> int:
        """Tokens of a sliding layer's segments: a quarter of the window, in whole blocks."""
        return self.tail * max(1, -(-window // (4 * self.tail)))

    def sliding_ends(self, length: int, window: int) -> list[int]:
        """As `ends`, for a sliding layer, from position 0 on: equal segments and what is sealed beyond them."""
        unit, sealed = self.sliding_unit(window), length // self.tail * self.tail
        ends = list(range(unit, sealed + 1, unit))
        return ends if sealed % unit == 0 else [*ends, sealed]


_serials = itertools.count()

# What became of consecutive segments when some state joined them: another that joins the same ones takes the same
# result, so that forks which grow side by side go on sharing. Read and written under the execution lock.
_joined: weakref.WeakValueDictionary[tuple[int, ...], Segment] = weakref.WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class Segment:
    """Keys and values of the tokens start..stop of one layer; never changes."""

    start: int
    stop: int
    keys: mx.array  # [1, kv_heads, at least stop - start, D]
    values: mx.array
    serial: int = field(default_factory=lambda: next(_serials))


class Part(NamedTuple):
    """What attention sees of a segment or tail."""

    start: int  # position of its first token
    keys: mx.array  # [1, kv_heads, n, D]
    values: mx.array


def cut(sources: Sequence[Segment], start: int, stop: int) -> Segment:
    """Tokens start..stop as one segment: an existing one where it fits exactly, else copied from several.

    Sources may overlap (then they agree); together they must hold all of start..stop.
    """
    used: list[Segment] = []
    at = start
    while at < stop:
        source = max(
            (s for s in sources if s.start <= at < s.stop),
            key=lambda s: (s.start == start and s.stop == stop, s.stop),
        )
        used.append(source)
        at = source.stop
    only = used[0]
    if (only.start, only.stop) == (start, stop) and only.keys.shape[2] == stop - start:
        return only
    serials = (start, stop, *(s.serial for s in used))
    known = _joined.get(serials)
    if known is None:
        keys, values = (_rows(used, start, stop, which) for which in ("keys", "values"))
        known = _joined[serials] = Segment(start, stop, keys, values)
    return known


def _rows(used: Sequence[Segment], start: int, stop: int, which: str) -> mx.array:
    """Tokens start..stop out of consecutive segments' keys or values, contiguous."""
    pieces, at = [], start
    for s in used:
        end = min(stop, s.stop)
        array: mx.array = getattr(s, which)
        pieces.append(array[:, :, at - s.start : end - s.start])
        at = end
    return mx.contiguous(pieces[0]) if len(pieces) == 1 else mx.concatenate(pieces, axis=2)


@dataclass(frozen=True, eq=False)
class LayerKV:
    """All that one layer keeps: segments in order, then a tail of which `count` tokens are filled.

    A tail is never written in place: it is replaced. A full one is sealed when the next token comes.
    """

    segments: tuple[Segment, ...]
    tail_keys: mx.array  # [1, kv_heads, Layout.tail, D]
    tail_values: mx.array
    count: int
    stop: int  # tokens read so far; the tail begins at stop - count

    @property
    def start(self) -> int:
        """Position of the first token that is kept."""
        return self.segments[0].start if self.segments else self.stop - self.count

    @property
    def pieces(self) -> tuple[Segment, ...]:
        """Segments and filled tail, as sources for `cut`."""
        if not self.count:
            return self.segments
        return (*self.segments, Segment(self.stop - self.count, self.stop, self.tail_keys, self.tail_values))

    def parts(self, first: int) -> list[Part]:
        """What holds the tokens from position `first` on."""
        found = []
        for s in self.pieces:
            if s.stop > first:
                skip, n = max(0, first - s.start), s.stop - s.start
                whole = skip == 0 and s.keys.shape[2] == n
                keys, values = (s.keys, s.values) if whole else (s.keys[:, :, skip:n], s.values[:, :, skip:n])
                found.append(Part(s.start + skip, keys, values))
        return found


def empty(kv_heads: int, head_dim: int, layout: Layout, dtype: mx.Dtype) -> LayerKV:
    """A layer that has read nothing."""
    tail = mx.zeros((1, kv_heads, layout.tail, head_dim), dtype)
    return LayerKV((), tail, tail, 0, 0)


def appended(kv: LayerKV, keys: mx.array, values: mx.array, layout: Layout, window: int | None) -> LayerKV:
    """A layer with the keys and values of the next tokens, [1, kv_heads, T, D].

    A sliding layer lets go of segments that those tokens' windows, and `layout.tail` tokens of slack, don't reach.
    """
    n = keys.shape[2]
    if kv.count + n <= layout.tail:  # a decode step: the tail alone changes
        at = mx.array([kv.count])
        tail_keys = mx.slice_update(kv.tail_keys, keys, at, axes=(2,))
        tail_values = mx.slice_update(kv.tail_values, values, at, axes=(2,))
        return LayerKV(kv.segments, tail_keys, tail_values, kv.count + n, kv.stop + n)
    if kv.count == layout.tail:  # seal it first, so that segments follow from lengths alone
        kv = arranged(kv.pieces, kv.stop, kv.tail_keys, layout, window, kv.stop)
        if n <= layout.tail:
            return appended(kv, keys, values, layout, window)
    sources = (*kv.pieces, Segment(kv.stop, kv.stop + n, keys, values))
    return arranged(sources, kv.stop + n, kv.tail_keys, layout, window, kv.stop)


def arranged(
    sources: Sequence[Segment], stop: int, like: mx.array, layout: Layout, window: int | None, oldest_query: int
) -> LayerKV:
    """A layer of `stop` tokens, cut as the layout says, out of whatever pieces hold them.

    Args:
        sources: pieces, which may overlap.
        like: a tail, for its shape and dtype.
        window: of a sliding layer; such a layer keeps what a query at position `oldest_query` needs, and
            `layout.tail` tokens more where the sources have them.
    """
    sealed = stop // layout.tail * layout.tail
    if window is None:
        start, ends = 0, layout.ends(stop)
    else:
        unit = layout.sliding_unit(window)
        start = max(0, oldest_query - window + 1 - layout.tail) // unit * unit
        start = max(start, covered_from(sources, stop))
        ends = [end for end in layout.sliding_ends(stop, window) if end > start]
    segments = []
    for end in ends:
        segments.append(cut(sources, start, end))
        start = end
    if stop == sealed:
        tail_keys = tail_values = mx.zeros_like(like)
    else:
        tail_keys, tail_values = _padded(cut(sources, sealed, stop), layout.tail)
    return LayerKV(tuple(segments), tail_keys, tail_values, stop - sealed, stop)


def covered_from(sources: Iterable[Segment], stop: int) -> int:
    """The first position from which on `sources` hold everything up to `stop`."""
    at = stop
    for s in sorted(sources, key=lambda s: s.stop, reverse=True):
        if s.start < at <= s.stop:
            at = s.start
    return at


def _padded(segment: Segment, size: int) -> tuple[mx.array, mx.array]:
    """Its keys and values, filled up with zeros to `size` tokens."""
    pad = [(0, 0), (0, 0), (0, size - (segment.stop - segment.start)), (0, 0)]
    n = segment.stop - segment.start
    return mx.pad(segment.keys[:, :, :n], pad), mx.pad(segment.values[:, :, :n], pad)
