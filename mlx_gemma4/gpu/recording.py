"""Launches taken down instead of made, to be made again and again.

In: code that launches kernels through a `Launcher` (kernels.py): `launcher` is one that makes none. Out: a `Recording`:
its launches in order, what each reads and writes. Results lie in one piece of memory, an arena, and are `Buffer`s:
places in it, with a shape and a dtype. What follows from them is known; what is in them is not.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from .render import Kernel

STARTS = 4  # steps whose tokens a player keeps
ALIGNED = 256  # bytes; every place in an arena begins at a multiple
# Results that are written where an input lies: the kernel copies its old rows there, unless it finds them there.
IN_PLACE = {"new_k": "tail_k", "new_v": "tail_v"}


class Arena:
    """Cuts one piece of memory into places. A place is free again when nothing refers to it."""

    def __init__(self) -> None:
        self.nbytes = 0  # handed out at most
        self._places: dict[int, list[int]] = defaultdict(list)  # all of a size, in order
        self._used: dict[int, int] = defaultdict(int)  # how many of them since the last reset
        self._free: dict[int, deque[int]] = defaultdict(deque)  # those used that are free again

    def reset(self) -> None:
        """Take all places back, so that the same demands get the same places again."""
        self._used, self._free = defaultdict(int), defaultdict(deque)

    def place(self, nbytes: int) -> Allocation:
        """A place of so many bytes: the one that was free for longest, for reuse makes launches wait."""
        size = -(-max(nbytes, 1) // ALIGNED) * ALIGNED
        free, places = self._free[size], self._places[size]
        if not free:
            if self._used[size] == len(places):
                places.append(self.nbytes)
                self.nbytes += size
            free.append(places[self._used[size]])
            self._used[size] += 1
        return Allocation(free.popleft(), free)


class Allocation:
    """Where something lies in an arena, in bytes from its beginning."""

    def __init__(self, start: int, free: deque[int]) -> None:
        self.start, self._free = start, free

    def __del__(self) -> None:
        self._free.append(self.start)


class Region(NamedTuple):
    """What lies where in an arena; keeps nothing free of others."""

    start: int  # bytes from the arena's beginning
    place: int  # where the place begins that it is in
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.size


@dataclass(frozen=True, eq=False)
class Buffer:
    """An array in an arena, contiguous. Has what kernels ask of an array, no more."""

    place: Allocation
    shape: tuple[int, ...]
    dtype: mx.Dtype
    start: int  # in the arena, bytes

    @property
    def spot(self) -> Region:
        return Region(self.start, self.place.start, self.shape, self.dtype)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def reshape(self, *shape: int) -> Buffer:
        known = -prod(shape)
        shape = tuple(self.size // known if n == -1 else n for n in shape)
        assert prod(shape) == self.size
        return Buffer(self.place, shape, self.dtype, self.start)

    def __getitem__(self, i: int | slice | None) -> Buffer:
        """A row, rows first..stop, or with None the array as one row."""
        if i is None:
            return self.reshape(1, *self.shape)
        first, stop = (i, i + 1) if isinstance(i, int) else i.indices(self.shape[0])[:2]
        row = prod(self.shape[1:]) * self.dtype.size
        shape = self.shape[1:] if isinstance(i, int) else (stop - first, *self.shape[1:])
        return Buffer(self.place, shape, self.dtype, self.start + first * row)


@dataclass(frozen=True, eq=False)
class RecordedLaunch:
    """One launch, as a `Launcher`'s kernel is told of it."""

    kernel: Kernel
    inputs: tuple[mx.array | Region, ...]
    outputs: tuple[Region, ...]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]


class Player(Protocol):
    """What makes recorded launches; `cuda_graph.Player` says what its methods do."""

    def load(self, launches: Sequence[RecordedLaunch], nbytes: int, numbers: int, best: Region) -> None: ...
    def write(self, spots: Sequence[Region], arrays: Sequence[mx.array]) -> None: ...
    def start(self, numbers: np.ndarray, chained: bool) -> int: ...
    def best(self, start: int) -> int: ...
    def wait(self) -> None: ...
    def read(self, spot: Region) -> mx.array: ...
    def forget(self) -> None: ...


class Recording:
    """Launches in order, whose results lie in an arena."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.launches: list[RecordedLaunch] = []

    def buffer(self, shape: tuple[int, ...], dtype: mx.Dtype) -> Buffer:
        """A new array; its place is nobody else's while anything refers to it or its views."""
        place = self.arena.place(prod(shape) * dtype.size)
        return Buffer(place, tuple(shape), dtype, place.start)


def dependencies(launches: Sequence[RecordedLaunch]) -> list[list[int]]:
    """For each launch, the earlier ones that it must wait for, but not those that these wait for anyway.

    A launch waits for whoever wrote what it reads, and for whoever read or wrote what it overwrites.
    """
    writer: dict[int, int] = {}
    readers: dict[int, list[int]] = defaultdict(list)
    behind: list[int] = []  # a bit for each launch that must be through before
    found = []
    for at, launch in enumerate(launches):
        read = {spot.place for spot in launch.inputs if isinstance(spot, Region)}
        written = {spot.place for spot in launch.outputs}
        waits = {writer[place] for place in read | written if place in writer}
        waits.update(i for place in written for i in readers[place])
        all_behind = needed = 0
        for i in sorted(waits, reverse=True):
            if not all_behind >> i & 1:
                needed |= 1 << i
                all_behind |= behind[i] | 1 << i
        behind.append(all_behind)
        found.append([i for i in sorted(waits) if needed >> i & 1])
        for place in read:
            readers[place].append(at)
        for place in written:
            writer[place], readers[place] = at, []
    return found


_current: list[Recording] = []  # the one that is being made; under the execution lock


@contextmanager
def recorded(recording: Recording) -> Iterator[None]:
    """Launches by `launcher` go into the recording."""
    _current.append(recording)
    try:
        yield
    finally:
        _current.pop()


def recorder(
    name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str
) -> Callable[..., Sequence[Buffer]]:
    """A `Launcher` whose kernels are taken down by the recording that is being made."""
    kernel = Kernel(name, tuple(input_names), tuple(output_names), header, source)

    def call(
        inputs: Sequence[mx.array | Buffer],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> Sequence[Any]:
        recording = _current[-1]
        outputs = []
        for key, shape, dtype in zip(kernel.outputs, output_shapes, output_dtypes, strict=True):
            at = inputs[kernel.inputs.index(IN_PLACE[key])] if key in IN_PLACE else None
            outputs.append(at if isinstance(at, Buffer) else recording.buffer(shape, dtype))
        read = tuple(a.spot if isinstance(a, Buffer) else a for a in inputs)
        written = tuple(b.spot for b in outputs)
        recording.launches.append(RecordedLaunch(kernel, read, written, grid, threadgroup))
        return outputs

    return call
