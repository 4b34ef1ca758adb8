"""Recorded launches as one CUDA graph on an NVIDIA GPU, which costs the host one launch.

In: the launches of a `Recording`. Out: a `Player` that replays them all at once, any number of times. MLX builds a
graph of its own for whatever it evaluates, each time anew: 10 us of the host's time a launch. This one is built once.
Its memory is an MLX array.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_int, c_ubyte, c_uint, c_uint64, c_void_p, cast
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from . import cuda_compiler
from .cuda_driver import addresses, do, driver, enter, module
from .recording import STARTS, RecordedLaunch, Region, dependencies
from .render import Kernel, to_cuda_text

ROOM = 16 << 20  # bytes that the arena has to spare: attention in more pieces needs more
ROWS = 32  # tokens that a start may leave
# Percent of a multiprocessor's first-level memory that is threadgroup memory, where kernels differ in what they ask
# for: from one division to another it must run empty first, some microseconds a launch.
SHARED = 60
TAKE = "take_words"
TAKE_TEXT = f"""extern "C" __global__ void {TAKE}(const unsigned* arena, unsigned* out, int first, int n) {{
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i < n) out[i] = arena[first + i];
}}
"""


class _Edge(ctypes.Structure):
    """CUgraphEdgeData of cuda.h. All zeros: a node waits for the end of another."""

    _fields_ = (
        ("from_port", c_ubyte),  # 1: CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC
        ("to_port", c_ubyte),
        ("type", c_ubyte),  # 1: CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
        ("reserved", c_ubyte * 5),
    )


class _Node(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v1 of cuda.h."""

    _fields_ = (
        ("function", c_void_p),
        *((f"{what}_{axis}", c_uint) for what in ("grid", "block") for axis in "xyz"),
        ("shared_bytes", c_uint),
        ("arguments", POINTER(c_void_p)),
        ("extra", c_void_p),
    )


class _Handle(ctypes.Structure):
    """CUipcMemHandle of cuda.h, which CUDA takes by value."""

    _fields_ = (("numbers", c_int * 16),)


@dataclass(frozen=True)
class Call:
    """A launch as CUDA takes it."""

    function: int
    blocks: tuple[int, ...]
    threads: tuple[int, ...]
    pointers: tuple[int, ...]
    sizes: tuple[int, ...]  # of shaped inputs, after the pointers

    def node(self) -> tuple[_Node, Any]:
        """Return a node's parameters, and what these point to, to be kept alive."""
        values = [*map(c_uint64, self.pointers), *map(c_int, self.sizes)]
        pointers = (c_void_p * len(values))(*(cast(byref(v), c_void_p) for v in values))
        node = _Node(self.function, *self.blocks, *self.threads, 0, cast(pointers, POINTER(c_void_p)), None)
        return node, (values, pointers)


class Player:
    """One graph on a stream of its own, and the memory that it works in. To be called under the execution lock.

    Raises:
        RuntimeError: for whatever CUDA refuses.
    """

    def __init__(self) -> None:
        self._stream, self._numbers, self._tokens = c_void_p(), c_void_p(), c_void_p()
        enter()
        do("cuStreamCreate", byref(self._stream), 1)  # waits for no other stream
        do("cuMemHostAlloc", byref(self._tokens), c_uint64(4 * 2 * ROWS * STARTS), 0)
        self._done = [c_void_p() for _ in range(STARTS)]  # events
        for event in self._done:
            do("cuEventCreate", byref(event), 2)  # no timing
        major = c_int()
        do("cuDeviceGetAttribute", byref(major), 75, 0)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        self._early = major.value >= 9  # launches may begin before what they wait for ends
        self._starts = 0
        self._best, self._rows, self._words = 0, 1, 1  # of what starts leave: address, tokens, words in all
        self._arena = mx.zeros(0, mx.uint8)
        self._base = 0  # address of the arena
        self._graph, self._executable = c_void_p(), c_void_p()
        self._nodes: list[c_void_p] = []
        self._calls: list[Call] = []
        self._waits: list[list[int]] = []
        self._arrays: list[mx.array] = []  # read by the launches
        self._room = 0  # of _numbers, for one start

    def load(
        self, launches: Sequence[RecordedLaunch], nbytes: int, numbers: int, best: Region, several: bool = False
    ) -> None:
        """Make a graph of launches, or change the present one into it.

        Until `forget`, the host must not read the arrays that they read: MLX would move them.

        Args:
            nbytes: of the arena.
            numbers: count of int32 numbers that each `start` writes to the arena's beginning.
            best: where the launches leave tokens, int32 [up to ROWS], or [2, up to ROWS] with other words behind them.
            several: they are a step of several rows: all kernels get SHARED.
        """
        enter()
        self.wait()
        if nbytes > self._arena.nbytes:
            self._arena = mx.zeros(nbytes + ROOM, mx.uint8)
            self._base = addresses([self._arena])[0]
        if numbers > self._room:
            if self._room:
                do("cuMemFreeHost", self._numbers)
            do("cuMemHostAlloc", byref(self._numbers), c_uint64(4 * numbers * STARTS), 0)
            self._room = numbers
        self._best, self._rows, self._words = self._base + best.start, best.shape[-1], best.nbytes // 4
        arrays = {id(a): a for launch in launches for a in launch.inputs if isinstance(a, mx.array)}
        self._arrays = list(arrays.values())
        found = dict(zip(arrays, addresses(self._arrays), strict=True))
        shared = SHARED if several else None
        calls, waits = [self._call(launch, found, shared) for launch in launches], dependencies(launches)
        if not (waits == self._waits and self._change(calls)):
            self._build(calls, waits)
        self._calls, self._waits = calls, waits

    def forget(self) -> None:
        """Let go of the arrays that the launches read, which must not start any more."""
        self.wait()
        self._arrays = []

    def write(self, regions: Sequence[Region], arrays: Sequence[mx.array]) -> None:
        """Copy arrays into the arena; waits until they are there."""
        enter()
        for region, at in zip(regions, addresses(arrays), strict=True):
            to, size = c_uint64(self._base + region.start), c_uint64(region.nbytes)
            do("cuMemcpyDtoDAsync_v2", to, c_uint64(at), size, self._stream)
        self.wait()

    def box(self, nbytes: int) -> tuple[int, list[int]]:
        """Take memory, all zeros, until this process ends; return its address, and what `opened` takes in others."""
        enter()
        at, handle = c_uint64(), _Handle()
        do("cuMemAlloc_v2", byref(at), c_uint64(nbytes))
        do("cuMemsetD8_v2", at, c_ubyte(0), c_uint64(nbytes))
        do("cuCtxSynchronize")
        do("cuIpcGetMemHandle", byref(handle), at)
        return at.value, list(handle.numbers)

    def opened(self, handle: Sequence[int]) -> int:
        """Return the address here of another process's `box`, which may lie on another GPU of this machine."""
        enter()
        at = c_uint64()
        do("cuIpcOpenMemHandle_v2", byref(at), _Handle((c_int * 16)(*handle)), c_uint(1))  # peers are let in as needed
        return at.value

    def copy(self, to: Region, other: Player, of: Region) -> None:
        """Copy what another player's latest start, whose end has been waited for, has left, before the next start."""
        enter()
        at, there = c_uint64(self._base + to.start), c_uint64(other._base + of.start)
        do("cuMemcpyDtoDAsync_v2", at, there, c_uint64(of.nbytes), self._stream)

    def start(self, numbers: np.ndarray, chained: bool, after: Player | None = None) -> int:
        """Make all launches, after those of the start before; return at once, with the argument for `best`.

        Args:
            numbers: int32 [n], which are copied to the arena's beginning first.
            chained: take the tokens that the start before leaves in place of as many of them, the first.
            after: wait, on the device, for this player's latest start, and take the tokens that it leaves in place of
                as many of them, behind the first. It must not start again before this start is done.
        """
        enter()
        slot, skip = self._starts % STARTS, 4 * self._rows if chained else 0
        self._starts += 1
        do("cuEventSynchronize", self._done[slot])
        at = self._numbers.value + 4 * self._room * slot  # type: ignore[operator]
        ctypes.memmove(at, numbers.ctypes.data, numbers.nbytes)
        if chained:
            do("cuMemcpyDtoDAsync_v2", c_uint64(self._base), c_uint64(self._best), c_uint64(skip), self._stream)
        size = c_uint64(numbers.nbytes - skip)
        do("cuMemcpyHtoDAsync_v2", c_uint64(self._base + skip), c_void_p(at + skip), size, self._stream)
        if after is not None:
            do("cuStreamWaitEvent", self._stream, after._done[(after._starts - 1) % STARTS], 0)
            of, size = c_uint64(after._best), c_uint64(4 * after._rows)
            do("cuMemcpyDtoDAsync_v2", c_uint64(self._base + 4), of, size, self._stream)
        do("cuGraphLaunch", self._executable, self._stream)
        left = c_void_p(self._tokens.value + 4 * 2 * ROWS * slot)  # type: ignore[operator]
        do("cuMemcpyDtoHAsync_v2", left, c_uint64(self._best), c_uint64(4 * self._words), self._stream)
        do("cuEventRecord", self._done[slot], self._stream)
        return slot

    def best(self, start: int) -> list[int]:
        """Wait for one of the latest `STARTS` starts, and return the words that it left, tokens first."""
        enter()
        do("cuEventSynchronize", self._done[start])
        left = ctypes.c_int32 * self._words
        return list(left.from_address(self._tokens.value + 4 * 2 * ROWS * start))  # type: ignore[operator]

    def wait(self) -> None:
        """Wait until all that was started is done."""
        enter()
        do("cuStreamSynchronize", self._stream)

    def read(self, region: Region) -> mx.array:
        """Return a copy of a region of the arena, yet to be evaluated."""
        words = region.nbytes // 4
        (out,) = mx.fast.precompiled_cuda_kernel(
            name=TAKE,
            compiled_source=module(TAKE_TEXT, TAKE),
            inputs=[self._arena],
            output_shapes=[region.shape],
            output_dtypes=[region.dtype],
            scalars=[region.start // 4, words],
            grid=(256 * -(-words // 256), 1, 1),
            threadgroup=(256, 1, 1),
        )
        return out

    def __del__(self) -> None:
        if self._stream:  # a half-made one has none
            enter()
            driver().cuStreamSynchronize(self._stream)
            driver().cuGraphExecDestroy(self._executable)
            driver().cuMemFreeHost(self._numbers)
            driver().cuMemFreeHost(self._tokens)
            for event in self._done:
                driver().cuEventDestroy_v2(event)
            driver().cuStreamDestroy_v2(self._stream)

    def _call(self, launch: RecordedLaunch, found: dict[int, int], shared: int | None) -> Call:
        """Return a launch as CUDA takes it. `found`: addresses of arrays, by id()."""
        pointers = [found[id(a)] if isinstance(a, mx.array) else self._base + a.start for a in launch.inputs]
        pointers += [self._base + region.start for region in launch.outputs]
        function = _function(*text_arguments(launch), shared)
        shaped = cuda_compiler.shaped_inputs(launch.kernel.inputs, launch.kernel.source)
        sizes = tuple(n for i in shaped for n in launch.inputs[i].shape)
        blocks = tuple(-(-g // t) for g, t in zip(launch.grid, launch.threadgroup, strict=True))
        threads = tuple(map(min, launch.threadgroup, launch.grid))
        return Call(function, blocks, threads, tuple(pointers), sizes)

    def _change(self, calls: list[Call]) -> bool:
        """Change those launches of the graph that differ; return False if CUDA refuses."""
        for node, before, call in zip(self._nodes, self._calls, calls, strict=True):
            if call != before:
                parameters, _keep = call.node()
                if driver().cuGraphExecKernelNodeSetParams(self._executable, node, byref(parameters)):
                    return False
        return True

    def _build(self, calls: list[Call], waits: list[list[int]]) -> None:
        """Build a new graph. Where driver and GPU can, launches begin early and wait inside (kernels/cuda.h)."""
        if self._executable:
            do("cuGraphExecDestroy", self._executable)
            do("cuGraphDestroy", self._graph)
        self._graph, self._executable, self._nodes = c_void_p(), c_void_p(), []
        do("cuGraphCreate", byref(self._graph), 0)
        for call in calls:
            node, (parameters, _keep) = c_void_p(), call.node()
            do("cuGraphAddKernelNode", byref(node), self._graph, None, c_uint64(0), byref(parameters))
            self._nodes.append(node)
        pairs = [(i, at) for at, before in enumerate(waits) for i in before]
        first, then = ((c_void_p * len(pairs))(*(self._nodes[p[end]] for p in pairs)) for end in (0, 1))
        edges = (_Edge * len(pairs))(*(_Edge(1, 0, 1) for _ in pairs if self._early))
        do("cuGraphAddDependencies_v2", self._graph, first, then, edges, c_uint64(len(pairs)))
        if driver().cuGraphInstantiateWithFlags(byref(self._executable), self._graph, c_uint64(0)):
            if not self._early:
                raise RuntimeError("CUDA's driver takes no graph of a decode step")
            self._early = False
            self._build(calls, waits)


def text_arguments(launch: RecordedLaunch) -> tuple[Kernel, tuple[mx.Dtype, ...], tuple[int, ...]]:
    """Return the arguments of `text` for a launch."""
    shaped = cuda_compiler.shaped_inputs(launch.kernel.inputs, launch.kernel.source)
    types = tuple(a.dtype for a in (*launch.inputs, *launch.outputs))
    return launch.kernel, types, tuple(len(launch.inputs[i].shape) for i in shaped)


def text(kernel: Kernel, types: tuple[mx.Dtype, ...], ranks: tuple[int, ...]) -> str:
    """Return a kernel as a whole CUDA text, for arrays of these types and shaped inputs of these ranks."""
    source, header = to_cuda_text(kernel.source, kernel.header)
    return cuda_compiler.text(kernel.name, kernel.inputs, kernel.outputs, source, header, types, ranks)


@cache
def _function(kernel: Kernel, types: tuple[mx.Dtype, ...], ranks: tuple[int, ...], shared: int | None) -> int:
    """Return a kernel's CUfunction."""
    module, function = c_void_p(), c_void_p()
    do("cuModuleLoadData", byref(module), cuda_compiler.machine_code(text(kernel, types, ranks), kernel.name))
    do("cuModuleGetFunction", byref(function), module, kernel.name.encode())
    assert function.value
    if shared is not None:
        do("cuFuncSetAttribute", function, c_int(9), c_int(shared))  # ..PREFERRED_SHARED_MEMORY_CARVEOUT
    return function.value
