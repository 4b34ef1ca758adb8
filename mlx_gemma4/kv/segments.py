"""Keys and values of one layer in parts: immutable segments and a small tail.

In: keys and values of new tokens. Out: a new `LayerKV`; the old one stays as it is, and both share what they can.
Where segments begin and end follows from the number of tokens alone, so what attention computes does not depend on
how a state came to be. A layer may keep its segments quantized (kv/quantization.py): each token is quantized once, when
it is sealed. Nothing here knows token ids, marks or the order of layers.
"""

import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import mlx.core as mx

from . import quantization


@dataclass(frozen=True)
class SegmentLayout:
    """Where a sequence's segments end. The attention kernel takes 8 parts: `tops` + 3 segments and the tail."""

    tail: int = 64  # tokens of the tail, and of a block, the unit of every segment
    fan: int = 8  # each level's segment is at most this many times as long as the next level's
    tops: int = 4  # segments of the largest size; beyond, that size doubles

    def ends(self, length: int) -> list[int]:
        """Return where the segments of a global layer end that has `length` tokens; the rest is the tail's.

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
        """Return the tokens of a sliding layer's segment: a quarter of the window, in whole blocks."""
        return self.tail * max(1, -(-window // (4 * self.tail)))

    def sliding_ends(self, length: int, window: int) -> list[int]:
        """Return what `ends` does, for a sliding layer: equal segments from position 0 on, and a shorter last one."""
        unit, sealed = self.sliding_unit(window), length // self.tail * self.tail
        ends = list(range(unit, sealed + 1, unit))
        return ends if sealed % unit == 0 else [*ends, sealed]


_serials = itertools.count()


@dataclass(frozen=True, eq=False)
class Segment:
    """Keys and values of the tokens start..stop of one layer; never changes."""

    start: int
    stop: int
    keys: mx.array  # [1, kv_heads, at least stop - start, D]; quantized: codes of both (`quantization.QuantizedKV`)
    values: mx.array  # as keys; quantized: scales of both
    serial: int = field(default_factory=lambda: next(_serials))

    @property
    def quantized(self) -> bool:
        """True if it holds codes and scales."""
        return bool(self.keys.dtype == mx.uint32)


@dataclass(frozen=True, eq=False)
class KVQuantizer:
    """Quantizes a layer's segments."""

    kind: str  # of kv.quantization.KINDS, not "full"
    rotation: mx.array  # `kv.quantization.rotations` of the layer
    quantize: Callable[..., quantization.QuantizedKV] = quantization.quantize  # (keys, values, rotation, kind)

    def quantized(self, s: Segment) -> Segment:
        """Return a segment quantized; the segment itself if it is."""
        if s.quantized:
            return s
        n = s.stop - s.start
        codes, scales = self.quantize(s.keys[:, :, :n], s.values[:, :, :n], self.rotation, self.kind)
        return replace(s, keys=codes, values=scales)


class KVView(NamedTuple):
    """The part of a segment or tail that attention sees."""

    start: int  # position of its first token
    keys: mx.array  # [1, kv_heads, n, D], or codes
    values: mx.array  # or scales
    rotation: mx.array | None = None  # of codes: `kv.quantization.rotations` of the layer


# Results of joining consecutive segments, by their serials: another state that joins the same ones takes the same
# result, so that forks which grow side by side go on sharing. Read and written under the execution lock.
_joined: weakref.WeakValueDictionary[tuple[int, ...], Segment] = weakref.WeakValueDictionary()


def gather(sources: Sequence[Segment], start: int, stop: int, quantizer: KVQuantizer | None = None) -> Segment:
    """Return tokens start..stop as one segment: an existing one where it fits exactly, else copied from several.

    Sources may overlap (then they agree); together they must hold all of start..stop. With a quantizer, the result is
    quantized: sources that are quantized keep their codes.
    """
    used: list[Segment] = []
    at = start
    while at < stop:
        source = max(
            (s for s in sources if s.start <= at < s.stop), key=lambda s: (s.start == start and s.stop == stop, s.stop)
        )
        used.append(source)
        at = source.stop
    only = used[0]
    fits = (only.start, only.stop) == (start, stop) and only.keys.shape[2] == stop - start
    if fits and (quantizer is None or only.quantized):
        return only
    serials = (start, stop, *(s.serial for s in used))
    known = _joined.get(serials)
    if known is None:
        pieces, at = [], start
        for s in used:
            end = min(stop, s.stop)
            rows = slice(at - s.start, end - s.start)
            piece = Segment(at, end, s.keys[:, :, rows], s.values[:, :, rows], s.serial)
            pieces.append(quantizer.quantized(piece) if quantizer else piece)
            at = end
        keys, values = _joint([p.keys for p in pieces]), _joint([p.values for p in pieces])
        known = _joined[serials] = Segment(start, stop, keys, values)
    return known


def _joint(arrays: list[mx.array]) -> mx.array:
    return mx.contiguous(arrays[0]) if len(arrays) == 1 else mx.concatenate(arrays, axis=2)


@dataclass(frozen=True, eq=False)
class LayerKV:
    """All that one layer keeps: segments in order, then a tail of which `count` rows are in use.

    A tail is never written in place: it is replaced. A full one is sealed when the next token comes.
    """

    segments: tuple[Segment, ...]
    tail_keys: mx.array  # [1, kv_heads, SegmentLayout.tail, D]
    tail_values: mx.array
    count: int
    stop: int  # tokens read so far; the tail begins at stop - count
    quantizer: KVQuantizer | None = None  # of the segments; None: they are plain
    skip: int = 0  # first rows of the tail not in use: the last segment has their tokens, quantized

    @property
    def pieces(self) -> tuple[Segment, ...]:
        """Segments and the tail's rows in use, as sources for `gather`."""
        if self.count == self.skip:
            return self.segments
        start, rows = self.stop - self.count + self.skip, slice(self.skip, None)
        keys, values = (a[:, :, rows] if self.skip else a for a in (self.tail_keys, self.tail_values))
        return (*self.segments, Segment(start, self.stop, keys, values))

    def views(self, first: int) -> list[KVView]:
        """Return what holds the tokens from position `first` on."""
        found = []
        for s in self.pieces:
            if s.stop > first:
                skip, n = max(0, first - s.start), s.stop - s.start
                whole = skip == 0 and s.keys.shape[2] == n
                keys, values = (s.keys, s.values) if whole else (s.keys[:, :, skip:n], s.values[:, :, skip:n])
                rotation = self.quantizer.rotation if self.quantizer and s.quantized else None
                found.append(KVView(s.start + skip, keys, values, rotation))
        return found


def appended(kv: LayerKV, keys: mx.array, values: mx.array, layout: SegmentLayout, window: int | None) -> LayerKV:
    """Return a layer with the keys and values of the next tokens, [1, kv_heads, T, D], added.

    A sliding layer lets go of segments that those tokens' windows, and `layout.tail` tokens of slack, don't reach.
    """
    n = keys.shape[2]
    if kv.count + n <= layout.tail:  # a decode step: the tail alone changes
        at = mx.array([kv.count])
        tail_keys = mx.slice_update(kv.tail_keys, keys, at, axes=(2,))
        tail_values = mx.slice_update(kv.tail_values, values, at, axes=(2,))
        return replace(kv, tail_keys=tail_keys, tail_values=tail_values, count=kv.count + n, stop=kv.stop + n)
    if kv.count == layout.tail:  # seal it first, so that segments follow from lengths alone
        kv = sealed(kv, layout, window)
        if n <= layout.tail:
            return appended(kv, keys, values, layout, window)
    sources = (*kv.pieces, Segment(kv.stop, kv.stop + n, keys, values))
    return arranged(sources, kv.stop + n, kv, layout, window, kv.stop)


def reading(kv: LayerKV, keys: mx.array, values: mx.array, layout: SegmentLayout) -> list[KVView]:
    """Return what many new tokens see of a quantized layer: codes of what was sealed before them, all else plain."""
    if kv.count == layout.tail:
        kv = sealed(kv, layout, None)
    views, plain = kv.views(0), KVView(kv.stop, keys, values)
    if kv.count > kv.skip:
        tail = views.pop()
        pairs = ([tail.keys, keys], [tail.values, values])
        plain = KVView(tail.start, *(mx.concatenate(pair, axis=2) for pair in pairs))
    return [*views, plain]


def sealed(kv: LayerKV, layout: SegmentLayout, window: int | None) -> LayerKV:
    """Return a layer whose tail is full with its tail in a segment and an empty one in its place."""
    return arranged(kv.pieces, kv.stop, kv, layout, window, kv.stop)


def grown(
    kv: LayerKV, keys: mx.array, values: mx.array, stop: int, layout: SegmentLayout, window: int | None
) -> LayerKV:
    """Return a layer of `stop` tokens, its tail grown to keys and values [1, kv_heads, .., D], perhaps past its end."""
    count, n = kv.count + stop - kv.stop, layout.tail
    if count <= n:
        tail_keys, tail_values = (mx.contiguous(a[:, :, :n]) for a in (keys, values))
        return replace(kv, tail_keys=tail_keys, tail_values=tail_values, count=count, stop=stop)
    rows = slice(kv.skip, count)
    new = Segment(stop - count + kv.skip, stop, keys[:, :, rows], values[:, :, rows])
    return arranged((*kv.segments, new), stop, kv, layout, window, stop)


def arranged(
    sources: Sequence[Segment], stop: int, like: LayerKV, layout: SegmentLayout, window: int | None, oldest_query: int
) -> LayerKV:
    """Return a layer of `stop` tokens, cut as the layout says, out of whatever pieces hold them.

    Args:
        sources: pieces, which may overlap.
        like: the layer before, for its tail's shape and dtype and its quantizer.
        window: of a sliding layer; such a layer keeps what a query at position `oldest_query` needs, and
            `layout.tail` tokens more where the sources have them.
    """
    whole = stop // layout.tail * layout.tail  # tokens in full blocks
    # Tokens of the open block of which there are only codes stay quantized, in the last segment.
    skip = max(0, min(stop, max((s.stop for s in sources if s.quantized), default=0)) - whole)
    if window is None:
        start, ends = 0, layout.ends(stop)
        if skip:
            ends = [*ends[:-1], whole + skip]
    else:
        unit = layout.sliding_unit(window)
        start = max(0, oldest_query - window + 1 - layout.tail) // unit * unit
        start = max(start, covered_from(sources, stop))
        ends = [end for end in layout.sliding_ends(stop, window) if end > start]
    segments = []
    for end in ends:
        segments.append(gather(sources, start, end, like.quantizer))
        start = end
    if stop == whole + skip:
        tail_keys = tail_values = mx.zeros_like(like.tail_keys)
    else:
        rest, n = gather(sources, whole + skip, stop), stop - whole - skip
        pad = [(0, 0), (0, 0), (skip, layout.tail - skip - n), (0, 0)]
        tail_keys, tail_values = mx.pad(rest.keys[:, :, :n], pad), mx.pad(rest.values[:, :, :n], pad)
    return LayerKV(tuple(segments), tail_keys, tail_values, stop - whole, stop, like.quantizer, skip)


def covered_from(sources: Iterable[Segment], stop: int) -> int:
    """Return the first position from which on `sources` hold everything up to `stop`."""
    at = stop
    for s in sorted(sources, key=lambda s: s.stop, reverse=True):
        if s.start < at <= s.stop:
            at = s.start
    return at
