"""Marks, and which positions a state can go back to.

In: what a state's sliding layers hold, and its marks. Out: the positions that are covered, and the windows of a new
mark. Global layers keep all tokens, so they cover every position and are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import InputError
from .segments import LayerKV, Segment, SegmentLayout, covered_from


@dataclass(frozen=True, eq=False)
class Mark:
    """A position that a state can rewind to: holds what the sliding layers' windows were there.

    Global layers keep all tokens, so a mark holds nothing of them.
    """

    position: int
    windows: dict[int, tuple[Segment, ...]] = field(repr=False)  # layer -> what its window holds there


class Past(NamedTuple):
    """What of a state's past is held."""

    sliding: Mapping[int, LayerKV]  # its sliding layers
    marks: Mapping[int, Mark]  # by position
    layout: SegmentLayout
    window: int
    length: int


def pieces(kv: LayerKV, layer: int, marks: Mapping[int, Mark]) -> tuple[Segment, ...]:
    """Return all that is held of a layer's past, the marks' windows included. They may overlap."""
    return (*kv.pieces, *(s for mark in marks.values() for s in mark.windows.get(layer, ())))


def covered(past: Past, position: int) -> bool:
    """Return True if a state can go on at a position."""
    if position == past.length or not past.sliding:
        return True
    return covered_from(_first_pieces(past), position) <= _needed_from(past, position)


def reach(past: Past, limit: int) -> int:
    """Return the last covered position, at most `limit`."""
    limit = min(limit, past.length)
    if covered(past, limit):
        return limit
    # Below a mark nothing is held but its own slack; what was read first may still be whole.
    from_start = 0
    for s in sorted(_first_pieces(past), key=lambda s: s.start):
        from_start = max(from_start, s.stop) if s.start <= from_start else from_start
    return max([*(p for p in past.marks if p < limit), min(limit, from_start)])


def require(past: Past, position: int, verb: str) -> None:
    """Raise InputError for a position that lies ahead or is not covered."""
    if not 0 <= position <= past.length:
        raise InputError(f"can't {verb} position {position}: the state holds {past.length} tokens")
    if covered(past, position):
        return
    marks = ", ".join(map(str, sorted(past.marks))) or "none"
    low = past.length
    while low > 0 and covered(past, low - 1):
        low -= 1
    raise InputError(
        f"can't {verb} position {position} of {past.length}: the sliding windows of {past.window} tokens "
        f"there are gone and no mark covers it; it can go back to {low}, and before that to "
        f"{reach(past, position)} (marks: {marks})"
    )


def marked(past: Past, position: int) -> Mark:
    """Make a mark at a covered position."""
    windows = {}
    for i, kv in past.sliding.items():
        # Where there is slack, the mark takes it along: it covers the tokens just before it too.
        low = _needed_from(past, position) - past.layout.tail
        used: list[Segment] = []
        for s in sorted(pieces(kv, i, past.marks), key=lambda s: (s.start, -s.stop)):
            stop = min(s.stop, position)  # what follows may be rewound and read anew
            if s.start < stop and stop > low and (not used or stop > used[-1].stop):
                used.append(s if stop == s.stop else Segment(s.start, stop, s.keys, s.values))
        windows[i] = tuple(used)
    return Mark(position, windows)


def _first_pieces(past: Past) -> tuple[Segment, ...]:
    """Return the pieces of one sliding layer: all of them hold the same positions."""
    layer, kv = next(iter(past.sliding.items()))
    return pieces(kv, layer, past.marks)


def _needed_from(past: Past, position: int) -> int:
    """First position that a sliding layer must hold to go on at another: its window's, or the tail's if lower."""
    return min(max(0, position - past.window + 1), position // past.layout.tail * past.layout.tail)
