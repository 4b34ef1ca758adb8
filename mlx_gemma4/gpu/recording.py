"""Records launches of kernels instead of making them, so that they can be replayed.

In: code that launches kernels through a `Launcher` (render.py): `recorder` is one that launches nothing. Out: a
`Recording`: the launches in order, with what each reads and writes. Results are `Buffer`s: allocations in one piece of
memory, an arena, with a shape and a dtype but no contents yet.
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

STARTS = 4  # latest steps whose tokens a player keeps
ALIGNED = 256  # bytes; every allocation in an arena begins at a multiple
# Results that are written where an input lies: the kernel copies its old rows there, unless they are there already.
# A pool of several sequences' keys and values is no result at all: kernels/paged.metal.
IN_PLACE = {"new_k": "tail_k", "new_v": "tail_v"}


class Arena:
    """Divides one piece of memory into allocations. One is free again when nothing refers to it."""

    def __init__(self) -> None:
        self.nbytes = 0  # size of the memory
        self._starts: dict[int, list[int]] = defaultdict(list)  # by size, of all allocations there have been
        self._used: dict[int, int] = defaultdict(int)  # by size, how many of these since the last reset
        self._free: dict[int, deque[int]] = defaultdict(deque)  # by size, those used that are free again

    def reset(self) -> None:
        """Take everything back, so that the same demands get the same allocations again."""
        self._used, self._free = defaultdict(int), defaultdict(deque)

    def allocate(self, nbytes: int) -> Allocation:
        """Return so many bytes: those that were free for longest, as reuse makes launches wait."""
        size = -(-max(nbytes, 1) // ALIGNED) * ALIGNED
        free, starts = self._free[size], self._starts[size]
        if not free:
            if self._used[size] == len(starts):
                starts.append(self.nbytes)
                self.nbytes += size
            free.append(starts[self._used[size]])
            self._used[size] += 1
        return Allocation(free.popleft(), free)


class Allocation:
    """Bytes of an arena in use, from `start` on, until nothing refers to this."""

    def __init__(self, start: int, free: deque[int]) -> None:
        self.start, self._free = start, free

    def __del__(self) -> None:
        self._free.append(self.start)


class Region(NamedTuple):
    """An array's place in an arena; does not keep others from using it."""

    start: int  # bytes from the arena's beginning
    allocation: int  # start of the allocation that it is in
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.size


@dataclass(frozen=True, eq=False)
class Buffer:
    """An array in an arena, contiguous. Has what kernels ask of an array, no more."""

    allocation: Allocation
    shape: tuple[int, ...]
    dtype: mx.Dtype
    start: int  # in the arena, bytes

    @property
    def region(self) -> Region:
        return Region(self.start, self.allocation.start, self.shape, self.dtype)

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
        return Buffer(self.allocation, shape, self.dtype, self.start)

    def __getitem__(self, i: int | slice | None) -> Buffer:
        """Return a row, rows first..stop, or with None the array as one row."""
        if i is None:
            return self.reshape(1, *self.shape)
        first, stop = (i, i + 1) if isinstance(i, int) else i.indices(self.shape[0])[:2]
        row = prod(self.shape[1:]) * self.dtype.size
        shape = self.shape[1:] if isinstance(i, int) else (stop - first, *self.shape[1:])
        return Buffer(self.allocation, shape, self.dtype, self.start + first * row)


@dataclass(frozen=True, eq=False)
class RecordedLaunch:
    """One launch, as a `Launcher`'s kernel is called."""

    kernel: Kernel
    inputs: tuple[mx.array | Region, ...]
    outputs: tuple[Region, ...]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]


class Player(Protocol):
    """Replays recorded launches; `cuda_graph.Player` documents the methods."""

    def load(
        self, launches: Sequence[RecordedLaunch], nbytes: int, numbers: int, best: Region, several: bool = False
    ) -> None: ...
    def write(self, regions: Sequence[Region], arrays: Sequence[mx.array]) -> None: ...
    def box(self, nbytes: int) -> tuple[int, list[int]]: ...
    def opened(self, handle: Sequence[int]) -> int: ...
    def copy(self, to: Region, other: Any, of: Region) -> None: ...
    def start(self, numbers: np.ndarray, chained: bool, after: Any = None) -> int: ...
    def best(self, start: int) -> list[int]: ...
    def wait(self) -> None: ...
    def read(self, region: Region) -> mx.array: ...
    def forget(self) -> None: ...


class Recording:
    """Launches in order, with their results in an arena."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.launches: list[RecordedLaunch] = []

    def buffer(self, shape: tuple[int, ...], dtype: mx.Dtype) -> Buffer:
        """Return a new array; its memory is its own while anything refers to it or its views."""
        allocation = self.arena.allocate(prod(shape) * dtype.size)
        return Buffer(allocation, tuple(shape), dtype, allocation.start)


def dependencies(launches: Sequence[RecordedLaunch]) -> list[list[int]]:
    """Return for each launch the earlier ones that it must wait for, but not those that these wait for anyway.

    A launch waits for those that wrote what it reads, and for those that read or wrote what it overwrites.
    """
    writer: dict[int, int] = {}
    readers: dict[int, list[int]] = defaultdict(list)
    behind: list[int] = []  # for each launch, a bit for each that must be done before it
    found = []
    for at, launch in enumerate(launches):
        read = {region.allocation for region in launch.inputs if isinstance(region, Region)}
        written = {region.allocation for region in launch.outputs}
        waits = {writer[allocation] for allocation in read | written if allocation in writer}
        waits.update(i for allocation in written for i in readers[allocation])
        all_behind = needed = 0
        for i in sorted(waits, reverse=True):
            if not all_behind >> i & 1:
                needed |= 1 << i
                all_behind |= behind[i] | 1 << i
        behind.append(all_behind)
        found.append([i for i in sorted(waits) if needed >> i & 1])
        for allocation in read:
            readers[allocation].append(at)
        for allocation in written:
            writer[allocation], readers[allocation] = at, []
    return found


_current: list[Recording] = []  # the one that is being made; under the execution lock


@contextmanager
def recorded(recording: Recording) -> Iterator[None]:
    """Put launches by `recorder` into the recording."""
    _current.append(recording)
    try:
        yield
    finally:
        _current.pop()


def recorder(
    name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str
) -> Callable[..., Sequence[Buffer]]:
    """Build a kernel, as a `Launcher` does, whose launches go into the recording that is being made."""
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
        read = tuple(a.region if isinstance(a, Buffer) else a for a in inputs)
        written = tuple(b.region for b in outputs)
        recording.launches.append(RecordedLaunch(kernel, read, written, grid, threadgroup))
        return outputs

    return call
