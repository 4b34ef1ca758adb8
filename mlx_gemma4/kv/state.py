"""The KV state: everything that changes while tokens flow, held apart from the weights.

In: the keys and values of each layer for new tokens. Out: those that attention is to see. States fork, take marks and
rewind; all of these share the segments (segments.py) that hold their common past. A layer that shares another's keys
and values keeps nothing here. The design in pictures: docs/kv-state.md.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, cast

import mlx.core as mx

from ..config import Config
from ..errors import InputError
from ..execution import execution
from . import quantization, segments
from .segments import KVQuantizer, KVView, LayerKV, Segment, SegmentLayout


class PendingToken(Protocol):
    """A token that is still being computed."""

    def token(self) -> int: ...


class Borrower(Protocol):
    """Has checked out a state's tails, or all of it: steps go on in its copies (model/replay.py, kv/pool.py)."""

    def settle(self) -> None:
        """Check in what was checked out, as the steps since have left it."""

    def forget(self) -> None:
        """Let go of the state without checking anything in."""

    def rewinds(self, position: int) -> bool:
        """Return True if what was checked out goes on from there as it is, when the state is so long again."""

    @property
    def nbytes(self) -> int:
        """Bytes of what the state has there that it does not hold itself."""


@dataclass(frozen=True, eq=False)
class Mark:
    """A position that a state can rewind to: holds what the sliding layers' windows were there.

    Global layers keep all tokens, so a mark holds nothing of them.
    """

    position: int
    windows: dict[int, tuple[Segment, ...]] = field(repr=False)  # layer -> what its window holds there


class KVState:
    """Keys and values of one sequence, layer by layer, and its tokens.

    Global layers keep everything. Sliding layers keep their window, `layout.tail` tokens more (so that a step or
    a draft can always be taken back), and what a mark needs. Not to be used by two threads at once; different
    states of one model may.
    """

    def __init__(
        self,
        config: Config,
        dtype: mx.Dtype,
        max_tokens: int | None = None,
        layout: SegmentLayout | None = None,
        kv: str = "full",
        quantizers: Mapping[int, KVQuantizer] | None = None,
    ) -> None:
        """Make an empty state; `Model.new_state` is the usual way.

        Args:
            config: of the model.
            dtype: of keys and values in full precision.
            max_tokens: how many it may hold; None: any number.
            layout: where segments end.
            kv: one of `quantization.KINDS`.
            quantizers: for a quantized kind, one for each global layer with keys and values of its own.

        Raises:
            InputError: there is no such kind, or not for heads of this model's size.
        """
        quantization.check_kind(kv, {layer.head_dim for layer in config.layers if not layer.sliding})
        self.config, self.dtype, self.max_tokens, self.kv = config, dtype, max_tokens, kv
        self.layout = layout or SegmentLayout()
        self.closed = False
        self.wanted_marks: set[int] = set()  # positions that the next reading is asked to mark
        self._tokens: list[int] = []
        self._unread: list[int | mx.array | PendingToken] = []  # what follows _tokens, perhaps still being computed
        self._length = 0
        self._marks: dict[int, Mark] = {}
        self._layers: dict[int, LayerKV] = {}
        self._staged: dict[int, LayerKV] = {}  # of a forward pass that is not through yet
        self._reading: dict[int, list[KVView]] = {}  # what that pass sees of quantized layers, if it has many tokens
        self.borrower: Borrower | None = None  # who has the tails checked out; then those in _layers are out of date
        with execution():
            for i, shape in enumerate(config.layers):
                if shape.kv_layer == i:
                    tail = mx.zeros((1, shape.kv_heads, self.layout.tail, shape.head_dim), dtype)
                    self._layers[i] = LayerKV((), tail, tail, 0, 0, (quantizers or {}).get(i))

    # Tails that steps go on in elsewhere

    def checkout(self, layers: dict[int, LayerKV], borrower: Borrower) -> None:
        """Let steps go on in the borrower's copies of these tails, until anything asks for the layers."""
        self._layers, self.borrower = dict(layers), borrower
        self._staged, self._reading = {}, {}

    def checkin(self, tails: dict[int, tuple[mx.array, mx.array]]) -> None:
        """Take keys and values of the tails, [1, kv_heads, .., D], as the steps since have left them."""
        self._layers = {
            i: segments.grown(kv, *tails[i], self._length, self.layout, self._window(i))
            for i, kv in self._layers.items()
        }
        self.borrower = None

    def take_back(self, layers: dict[int, LayerKV]) -> None:
        """Take all that was checked out, as the steps since have left it."""
        self._layers, self.borrower = dict(layers), None

    def settle(self) -> None:
        """Have the tails checked in, if they are checked out."""
        if self.borrower is not None:
            self.borrower.settle()

    # What a model's forward pass uses

    def append(self, layer: int, k: mx.array, v: mx.array) -> None:
        """Add keys and values of the next tokens, [1, kv_heads, T, D], to a layer. They count from `advance` on."""
        self.settle()
        k, v, kv = k.astype(self.dtype), v.astype(self.dtype), self._layers[layer]
        self._staged[layer] = segments.appended(kv, k, v, self.layout, self._window(layer))
        if kv.quantizer and kv.count % self.layout.tail + k.shape[2] > self.layout.tail:
            self._reading[layer] = segments.reading(kv, k, v, self.layout)

    def view(self, layer: int, queries: int) -> list[KVView]:
        """Return what the last `queries` tokens may see of a layer, in at most 8 parts."""
        self.settle()
        if layer in self._reading:
            return self._reading[layer]
        kv = self._staged.get(layer) or self._layers[layer]
        window = self._window(layer)
        return kv.views(0 if window is None else max(0, kv.stop - queries - window + 1))

    def advance(self, ids: int | mx.array | PendingToken) -> None:
        """Count a token, or the tokens ids, int [T], whose keys and values every layer has been given."""
        if self._staged:
            self._layers = self._layers | self._staged
        self._staged, self._reading = {}, {}
        self._unread.append(ids)
        self._length += ids.size if isinstance(ids, mx.array) else 1

    def check_room(self, tokens: int) -> None:
        """Refuse `tokens` more where `max_tokens` forbids them, or where the state is closed."""
        if self.closed:
            raise InputError("this KV state is closed; make a new one with model.new_state()")
        if self.max_tokens is not None and self._length + tokens > self.max_tokens:
            raise InputError(
                f"the KV state holds {self._length} tokens and was made for {self.max_tokens}: {tokens} more don't "
                "fit; make one with a larger max_tokens"
            )

    # What a decode step uses, whose kernels write keys and values themselves; and the saved form

    @property
    def layers(self) -> dict[int, LayerKV]:
        """Segments and tail of each layer that keeps any, as of the last `advance`."""
        self.settle()
        return dict(self._layers)

    def stage(self, layer: int, kv: LayerKV) -> None:
        """Give a layer its next contents; they count from `advance` on."""
        self._staged[layer] = kv

    def fits_tail(self, tokens: int) -> bool:
        """Return True if the tails, once full ones are sealed, have room for so many tokens."""
        return self._length % self.layout.tail + tokens <= self.layout.tail

    def restore(self, layers: dict[int, LayerKV], tokens: list[int]) -> None:
        """Give an empty state all of its contents at once."""
        self._layers, self._tokens, self._length = dict(layers), list(tokens), len(tokens)

    # Public API

    @property
    def length(self) -> int:
        """Tokens read so far; the position of the next one."""
        return self._length

    @property
    def tokens(self) -> list[int]:
        """The tokens read so far."""
        self._know_tokens()
        return list(self._tokens)

    def _know_tokens(self) -> None:
        if self._unread:
            with execution():
                for ids in self._unread:
                    if isinstance(ids, mx.array):
                        self._tokens += cast("list[int]", ids.tolist())
                    else:
                        self._tokens.append(ids if isinstance(ids, int) else ids.token())
                self._unread = []

    @property
    def marks(self) -> list[Mark]:
        """The marks it holds, by position."""
        return [self._marks[p] for p in sorted(self._marks)]

    @property
    def arrays(self) -> list[mx.array]:
        """All keys and values, each array once, to evaluate or to measure them."""
        self.settle()
        return self._held()

    def _held(self) -> list[mx.array]:
        held = [s for kv in self._layers.values() for s in kv.segments]
        # A list first: whoever asks how much there is may be in another thread than who marks.
        held += [s for mark in [*self._marks.values()] for window in mark.windows.values() for s in window]
        pairs = [(kv.tail_keys, kv.tail_values) for kv in self._layers.values()] + [(s.keys, s.values) for s in held]
        return list({id(a): a for pair in pairs for a in pair}.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all it holds, marks included, each segment once."""
        return total_nbytes([self])

    def fork(self) -> KVState:
        """Return another state with the same past and marks. Copies no keys or values."""
        self.check_room(0)
        self.settle()
        other = copy.copy(self)
        other.wanted_marks, other._marks = set(self.wanted_marks), dict(self._marks)
        other._tokens, other._unread = list(self._tokens), list(self._unread)
        other._layers, other._staged, other._reading = dict(self._layers), {}, {}
        return other

    def mark(self, position: int | None = None) -> Mark:
        """Make a position (by default the end) one that `rewind` can go back to, however much is read after it.

        Raises:
            InputError: the sliding windows at that position are gone already.
        """
        self.check_room(0)
        position = self._length if position is None else position
        self._require(position, "mark")
        if position not in self._marks:
            # Where there is slack, the mark takes it along: it covers the tokens just before it too.
            low, windows = self._needed_from(position) - self.layout.tail, {}
            for i in self._sliding:
                used: list[Segment] = []
                for s in sorted(self._pieces(i), key=lambda s: (s.start, -s.stop)):
                    stop = min(s.stop, position)  # what follows may be rewound and read anew
                    if s.start < stop and stop > low and (not used or stop > used[-1].stop):
                        used.append(s if stop == s.stop else Segment(s.start, stop, s.keys, s.values))
                windows[i] = tuple(used)
            self._marks[position] = Mark(position, windows)
        return self._marks[position]

    def unmark(self, mark: Mark) -> None:
        """Let go of a mark and of what only it needs."""
        if self._marks.get(mark.position) is mark:
            del self._marks[mark.position]

    def adopt(self, other: KVState) -> None:
        """Take over the marks of a state whose tokens are the beginning of this one's, and a mark at its end."""
        if not other.closed and other.tokens == self.tokens[: other.length]:
            end = other.mark()
            self._marks = {**other._marks, end.position: end, **self._marks}

    def take_over(self, other: KVState, position: int) -> None:
        """Hold what another state of the same kind does up to a position that it can go back to, in place of all that
        this one held. Copies no keys or values.

        Raises:
            InputError: the other can't go back there. This state stays as it was.
        """
        self.check_room(position - self._length)
        fork = KVState.fork(other)
        KVState.rewind(fork, position)
        self.settle()
        self._layers, self._marks, self._staged, self._reading = fork._layers, fork._marks, {}, {}
        self._tokens, self._unread, self._length = fork._tokens, fork._unread, fork._length

    def reach(self, limit: int) -> int:
        """Return the last position, at most `limit`, that `rewind` can go to: none within a picture read at once."""
        limit = self._uncut(min(limit, self._length))
        if self._covers(limit):
            return limit
        # Below a mark nothing is held but its own slack; what was read first may still be whole.
        from_start = 0
        for s in sorted(self._pieces(self._sliding[0]), key=lambda s: s.start):
            from_start = max(from_start, s.stop) if s.start <= from_start else from_start
        return max([*(p for p in self._marks if p < limit), self._uncut(min(limit, from_start))])

    def rewind(self, to: Mark | int) -> None:
        """Go back to a mark, or to a length that a mark or the present windows cover, as if nothing had followed.

        With quantized keys and values, tokens that were sealed stay quantized: up to 63 before a position that is no
        multiple of 64, where a state that had never read on would have them in full precision.

        Raises:
            InputError: no mark covers that position; says how far back it can go. The state stays as it was.
        """
        self.check_room(0)
        if isinstance(to, Mark) and self._marks.get(to.position) is not to:
            raise InputError(f"the mark at {to.position} is not one of this state's, or was rewound past")
        position = to.position if isinstance(to, Mark) else to
        if self.borrower is not None and position <= self._length and self.borrower.rewinds(position):
            self._know_tokens()
            del self._tokens[position:]
            self._length, self._marks = position, {p: m for p, m in self._marks.items() if p <= position}
            return
        self._require(position, "rewind")
        if position == self._length:
            return
        self._know_tokens()
        if all(position > kv.stop - kv.count + kv.skip for kv in self._layers.values()):  # as after drafts: a count
            del self._tokens[position:]
            back, self._length = self._length - position, position
            self._layers = {i: replace(kv, count=kv.count - back, stop=position) for i, kv in self._layers.items()}
            self._staged, self._reading = {}, {}
            self._marks = {p: m for p, m in self._marks.items() if p <= position}
            return
        with execution():
            layers = {
                i: segments.arranged(self._pieces(i), position, kv, self.layout, self._window(i), position)
                for i, kv in self._layers.items()
            }
            self._layers, self._staged, self._reading = layers, {}, {}
            self._tokens, self._length = self._tokens[:position], position
            self._marks = {p: m for p, m in self._marks.items() if p <= position}
            mx.eval(self.arrays)  # what is cut off can go at once

    def start_over(self) -> None:
        """Forget everything, as if nothing had been read. Looks at none of its arrays: they may have failed."""
        self.check_room(0)
        shapes = {i: (kv.tail_keys.shape, kv.quantizer) for i, kv in self._layers.items()}
        KVState.close(self)
        self.closed = False
        with execution():
            for i, (shape, quantizer) in shapes.items():
                tail = mx.zeros(shape, self.dtype)
                self._layers[i] = LayerKV((), tail, tail, 0, 0, quantizer)

    def close(self) -> None:
        """Let go of everything. Forks and marks of others keep what they share."""
        if self.borrower is not None:
            self.borrower.forget()
        self.closed, self.borrower = True, None
        self._layers, self._staged, self._reading, self._marks = {}, {}, {}, {}
        self._tokens, self._unread, self._length = [], [], 0

    # Internals

    def _window(self, layer: int) -> int | None:
        return self.config.window if self.config.layers[layer].sliding else None

    @property
    def _sliding(self) -> list[int]:
        return [i for i in self._layers if self.config.layers[i].sliding]

    def _pieces(self, layer: int) -> tuple[Segment, ...]:
        """Return all that is held of a layer's past, the marks' windows included. They may overlap."""
        marked = (s for mark in self._marks.values() for s in mark.windows.get(layer, ()))
        return (*self._layers[layer].pieces, *marked)

    def _uncut(self, position: int) -> int:
        """Return `Config.uncut` of the tokens so far."""
        if self.config.sees_ahead and position < self._length:
            self._know_tokens()
            return self.config.uncut(self._tokens, position)
        return position

    def _needed_from(self, position: int) -> int:
        """First position that sliding layers must hold to go on at another: the window's, or the tail's if lower."""
        return min(max(0, position - self.config.window + 1), position // self.layout.tail * self.layout.tail)

    def _covers(self, position: int) -> bool:
        """Return True if the state can go on at a position. All sliding layers hold the same positions."""
        self.settle()
        if position == self._length or not self._sliding:
            return True
        return segments.covered_from(self._pieces(self._sliding[0]), position) <= self._needed_from(position)

    def _require(self, position: int, verb: str) -> None:
        """Raise InputError for a position that lies ahead or is not covered."""
        if not 0 <= position <= self._length:
            raise InputError(f"can't {verb} position {position}: the state holds {self._length} tokens")
        if (start := self._uncut(position)) < position:
            raise InputError(f"can't {verb} position {position}: a picture begins at {start}, and is read at once")
        if self._covers(position):
            return
        marks = ", ".join(map(str, sorted(self._marks))) or "none"
        low = self._length
        while low > 0 and self._covers(low - 1):
            low -= 1
        raise InputError(
            f"can't {verb} position {position} of {self._length}: the sliding windows of {self.config.window} tokens "
            f"there are gone and no mark covers it; it can go back to {low}, and before that to "
            f"{self.reach(position)} (marks: {marks})"
        )


def total_nbytes(states: Iterable[KVState]) -> int:
    """Return the bytes that several states hold together; what they share counts once.

    What is checked out stays so: tails count as they were then, pages as they are.
    """
    states = list(states)
    borrowed = sum(borrower.nbytes for state in states if (borrower := state.borrower) is not None)
    return borrowed + sum({id(a): a.nbytes for state in states for a in state._held()}.values())


def kv_bytes(
    config: Config, dtype: mx.Dtype, tokens: int, chunk: int = 0, layout: SegmentLayout | None = None, kv: str = "full"
) -> int:
    """Return the most bytes that a state of so many tokens holds without marks.

    Args:
        chunk: tokens that are read at once; sliding layers keep them until the next are read.
        kv: how global layers are held, one of `kv.quantization.KINDS`.
    """
    layout, total = layout or SegmentLayout(), 0
    for i, shape in enumerate(config.layers):
        if shape.kv_layer == i:
            rows, kind = tokens, kv
            if shape.sliding:
                kind = "full"
                rows = min(tokens, config.window + 2 * layout.tail + layout.sliding_unit(config.window) + chunk)
            sealed = rows * quantization.vector_bytes(kind, shape.head_dim, dtype)
            total += 2 * shape.kv_heads * (sealed + layout.tail * dtype.size * shape.head_dim)
    return total


def window_bytes(config: Config, dtype: mx.Dtype, layout: SegmentLayout | None = None) -> int:
    """Return the most bytes that a mark holds beside its state: a window of each sliding layer, in whole segments."""
    layout = layout or SegmentLayout()
    rows = config.window + 2 * layout.tail + 2 * layout.sliding_unit(config.window)
    own = [s for i, s in enumerate(config.layers) if s.kv_layer == i and s.sliding]
    return sum(2 * dtype.size * s.kv_heads * s.head_dim * rows for s in own)
