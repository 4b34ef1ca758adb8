"""Keys and values of the states that step together, in pages of one pool, so that one launch finds them all.

In: states, and the numbers of their new tokens. Out: for each kind of layer the places of a step's rows, as
`ops.paged` has them; states get their keys and values back as segments whenever anybody looks at them (`Borrower`).
Nothing may run that reads or writes the pool while states join or leave. Knows no model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx

from ..config import Config
from ..execution import execution
from .segments import LayerKV, Segment, arranged
from .state import KVState

Pair = tuple[mx.array, mx.array]
# Puts rows of keys and values into pages: (rows, pool, (the first of them, the tokens from .. to that they become,
# counted from the first page's beginning), pages) -> the pool, and what is computed when it has been written.
Fill = Callable[[Pair, Pair, tuple[int, int, int], Sequence[int]], tuple[Pair, mx.array]]

SOME = 32  # pages that a pool begins with
AT_ONCE = 256 << 20  # bytes of a state that are on their way out of the pool, about


@dataclass(eq=False)
class Seat:
    """A state's pages."""

    pool: Pool
    state: weakref.ref[KVState]
    pages: dict[bool, list[int]]  # by kind of layer (True: sliding), in order
    first: dict[bool, int]  # the page of the sequence that stands first there
    start: dict[bool, int]  # position of the first token that is there
    segments: dict[int, list[weakref.ref[Segment]]] = field(default_factory=dict)  # by layer; others may share them
    joined: int = 0  # length of the state then

    @property
    def nbytes(self) -> int:
        """Bytes of its pages."""
        shapes = [self.pool.config.layers[i] for i in self.pool.layers]
        rows = [len(self.pages[s.sliding]) * self.pool.page * s.kv_heads * s.head_dim for s in shapes]
        return 2 * self.pool.dtype.size * sum(rows)

    def settle(self) -> None:
        """Give the state its keys and values back."""
        self.pool.leave(self)

    def forget(self) -> None:
        """Give the pages back, with nothing kept of them."""
        self.pool.free(self)

    def rewinds(self, position: int) -> bool:
        """True for what was written here since it joined, as far as pages are kept for (`Pool._first`)."""
        state = self.state()
        return state is not None and max(self.joined, state.length - state.layout.tail) <= position


def first_bytes(config: Config, dtype: mx.Dtype, page: int) -> int:
    """Return the bytes that a pool takes as soon as a state is in it."""
    own = [shape for i, shape in enumerate(config.layers) if shape.kv_layer == i]
    return sum(2 * SOME * page * shape.kv_heads * shape.head_dim * dtype.size for shape in own)


class Pool:
    """Pages of all layers with keys and values of their own. To be used under the execution lock."""

    def __init__(
        self, config: Config, dtype: mx.Dtype, fill: Fill, page: int, idle: Callable[[bool], None], kept: int = 0
    ) -> None:
        """
        Args:
            dtype: of keys and values.
            fill: copies some of a sequence's keys and values into pages.
            page: tokens of one.
            idle: waits until nothing reads or writes the pool; called before states join or leave, with True before
                its arrays go or others take their place.
            kept: bytes of arrays, at most, that stay when the last state leaves, and with them what was recorded.
        """
        self.config, self.dtype, self.page, self.kept = config, dtype, page, kept
        self._fill, self._idle = fill, idle
        self.layers = [i for i, shape in enumerate(config.layers) if shape.kv_layer == i]
        self.kinds = list(dict.fromkeys(config.layers[i].sliding for i in self.layers))
        self.arrays: dict[int, Pair] = {}  # by layer: keys and values [pages, G, page, D]; page 0 is nobody's
        self._free: dict[bool, list[int]] = {kind: [] for kind in self.kinds}
        self._seats: dict[int, Seat] = {}  # by id of the state

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for pair in self.arrays.values() for a in pair)

    @property
    def seats(self) -> list[Seat]:
        """Those of states that are in."""
        return list(self._seats.values())

    def takes(self, state: KVState) -> bool:
        """Return True if a state's keys and values can be in pages: those in full precision."""
        return state.kv == "full" and state.dtype == self.dtype

    def seat(self, state: KVState, tokens: int = 1) -> Seat:
        """Return a state's pages with room for its next tokens; a state that has none joins."""
        seat = self._seats.get(id(state))
        if seat is None or state.borrower is not seat:
            seat = self._join(state)
        for kind in self.kinds:
            first, needed = self._first(kind, state), (state.length + tokens - 1) // self.page + 1
            while seat.first[kind] < first and seat.pages[kind]:
                self._free[kind].append(seat.pages[kind].pop(0))
                seat.first[kind] += 1
            while seat.first[kind] + len(seat.pages[kind]) < needed:
                if not self._free[kind]:
                    self._grow(kind, 1)
                seat.pages[kind].append(self._free[kind].pop())
        return seat

    def row(self, seat: Seat, kind: bool, length: int) -> tuple[int, int, list[int]]:
        """Return what a state's next token sees, first and one past the last, of the pages that follow."""
        seen = max(0, length + 1 - self.config.window) if kind else 0
        skipped = seen // self.page
        at = skipped * self.page
        return seen - at, length + 1 - at, seat.pages[kind][skipped - seat.first[kind] :]

    def most_pages(self, kind: bool, length: int) -> int:
        """Return how many pages the next token of a state of so many may see, at most."""
        return -(-self.config.window // self.page) + 1 if kind else length // self.page + 1

    def leave(self, seat: Seat) -> None:
        """Give a state its keys and values back as segments."""
        with execution():
            state = seat.state()
            if state is None or state.borrower is not seat:
                return
            self._idle(False)
            layers, some = {}, list[mx.array]()
            for i in self.layers:
                kind, length = self.config.layers[i].sliding, state.length
                window = self.config.window if kind else None
                begin = seat.first[kind] * self.page
                start = max(seat.start[kind], begin)
                pages = mx.array(seat.pages[kind], mx.int32)
                keys, values = (
                    a[pages].swapaxes(0, 1).reshape(1, a.shape[1], -1, a.shape[3])[:, :, start - begin : length - begin]
                    for a in self.arrays[i]
                )
                shared = [s for s in (ref() for ref in seat.segments[i]) if s is not None]
                pieces = (*shared, Segment(start, length, keys, values)) if length > start else tuple(shared)
                layers[i] = arranged(pieces, length, self._empty(i, state), state.layout, window, length)
                kv = layers[i]
                some += [kv.tail_keys, kv.tail_values, *(a for s in kv.segments for a in (s.keys, s.values))]
                if sum(a.nbytes for a in some) > AT_ONCE or i == self.layers[-1]:
                    mx.eval(some)
                    some = []
            self.free(seat)
            state.take_back(layers)

    def free(self, seat: Seat) -> None:
        """Take a seat's pages back; the last one to go takes the pool along, if it is large."""
        self._vacate(seat)
        if not self._seats and self.nbytes > self.kept:
            self._idle(True)
            self.arrays = {}
            self._free = {kind: [] for kind in self.kinds}

    def _vacate(self, seat: Seat | None = None) -> None:
        """Take back the pages of a seat, and of states that are no more."""
        for key, other in list(self._seats.items()):
            if other is seat or other.state() is None:
                del self._seats[key]
                for kind, pages in other.pages.items():
                    self._free[kind] += pages
                    other.pages[kind] = []

    def _join(self, state: KVState) -> Seat:
        layers = state.layers  # whoever else has it settles
        self._idle(False)
        self._vacate()
        seat = Seat(self, weakref.ref(state), {kind: [] for kind in self.kinds}, {}, {}, joined=state.length)
        try:
            self._move_in(seat, layers, state)
        except BaseException:  # too little memory, or a kernel that fails here
            for kind, pages in seat.pages.items():
                self._free[kind] += pages
            raise
        state.checkout({i: replace(self._empty(i, state), stop=state.length) for i in layers}, seat)
        self._seats[id(state)] = seat
        return seat

    def _move_in(self, seat: Seat, layers: dict[int, LayerKV], state: KVState) -> None:
        """Give a seat pages, and copy the state's layers into them."""
        for kind in self.kinds:
            i = next(i for i in self.layers if self.config.layers[i].sliding == kind)
            held = min((s.start for s in layers[i].pieces), default=state.length)
            seat.first[kind] = self._first(kind, state)
            seat.start[kind] = max(held, seat.first[kind] * self.page)
            needed = state.length // self.page + 1 - seat.first[kind]
            if len(self._free[kind]) < needed:
                self._grow(kind, needed - len(self._free[kind]))
            seat.pages[kind] = [self._free[kind].pop() for _ in range(needed)]
        written: list[mx.array] = []
        for i, kv in layers.items():
            kind = self.config.layers[i].sliding
            begin = seat.first[kind] * self.page
            for piece in kv.pieces:
                first = max(piece.start, seat.start[kind])
                if piece.stop > first:
                    place, pair = (first - piece.start, first - begin, piece.stop - begin), (piece.keys, piece.values)
                    self.arrays[i], done = self._fill(pair, self.arrays[i], place, seat.pages[kind])
                    written.append(done)
            seat.segments[i] = [weakref.ref(s) for s in kv.segments]
        mx.eval(written, list(self.arrays.values()))

    def _first(self, kind: bool, state: KVState) -> int:
        """The first page that a state keeps: of a sliding layer as much as it keeps in segments (`arranged`)."""
        unit = state.layout.sliding_unit(self.config.window)
        oldest = max(0, state.length - self.config.window + 1 - state.layout.tail) // unit * unit
        return oldest // self.page if kind else 0

    def _empty(self, i: int, state: KVState) -> LayerKV:
        """A layer without tokens, whose tail is never computed unless it is used."""
        shape = self.config.layers[i]
        tail = mx.zeros((1, shape.kv_heads, state.layout.tail, shape.head_dim), self.dtype)
        return LayerKV((), tail, tail, 0, 0)

    def _grow(self, kind: bool, needed: int) -> None:
        """Make room for so many pages more, or half as many again as there are."""
        mine = [i for i in self.layers if self.config.layers[i].sliding == kind]
        size = self.arrays[mine[0]][0].shape[0] if mine[0] in self.arrays else 0
        more = max(needed + (size == 0), size // 2, SOME if size == 0 else 1)
        self._idle(True)
        for i in mine:
            shape = self.config.layers[i]
            size_of = (more, shape.kv_heads, self.page, shape.head_dim)
            made = [mx.zeros(size_of, self.dtype) for _ in "kv"]
            if i in self.arrays:
                made = [mx.concatenate([*pair]) for pair in zip(self.arrays[i], made, strict=True)]
            mx.eval(made)
            self.arrays[i] = made[0], made[1]
        self._free[kind] += range(max(size, 1), size + more)  # page 0 is nobody's
