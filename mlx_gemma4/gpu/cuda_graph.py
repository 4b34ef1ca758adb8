"""Recorded launches as one CUDA graph on an NVIDIA GPU, which costs the host one launch.

In: the launches of a `Recording`. Out: a `Player` that replays them all at once, any number of times. MLX builds a
graph of its own for whatever it evaluates, each time anew: 10 us of the host's time a launch. This one is built once.
Its memory is an MLX array; the address of an MLX array comes from a kernel that gets it as an argument.
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
from .recording import STARTS, RecordedLaunch, Region, dependencies
from .render import Kernel, to_cuda_text

ROOM = 16 << 20  # bytes that the arena has to spare: attention in more pieces needs more
ROWS = 32  # tokens that a start may leave
WIDTH = 32  # arrays that a launch of `_WHERE` takes
_WHERE = "where_arrays_lie"
_WHERE_TEXT = f"""extern "C" __global__ void {_WHERE}(
  {", ".join(f"const void* a{i}" for i in range(WIDTH))}, unsigned long long* found) {{
  {" ".join(f"found[{i}] = (unsigned long long)a{i};" for i in range(WIDTH))}
}}
"""
_TAKE = "take_words"
_TAKE_TEXT = f"""extern "C" __global__ void {_TAKE}(const unsigned* arena, unsigned* out, int first, int n) {{
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i < n) out[i] = arena[first + i];
}}
"""
TEXTS = {_WHERE: _WHERE_TEXT, _TAKE: _TAKE_TEXT}


@cache  # `read` is called after each step of a sampled reply, and is not to hash a text and look for a file there
def module(name: str) -> bytes:
    """Return what MLX takes as one of these kernels."""
    return cuda_compiler.module(TEXTS[name], name)


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
        _enter()
        _do("cuStreamCreate", byref(self._stream), 1)  # waits for no other stream
        _do("cuMemHostAlloc", byref(self._tokens), c_uint64(4 * ROWS * STARTS), 0)
        self._done = [c_void_p() for _ in range(STARTS)]  # events
        for event in self._done:
            _do("cuEventCreate", byref(event), 2)  # no timing
        major = c_int()
        _do("cuDeviceGetAttribute", byref(major), 75, 0)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        self._early = major.value >= 9  # launches may begin before what they wait for ends
        self._starts = 0
        self._best, self._rows = 0, 1  # address and number of the likeliest tokens
        self._arena = mx.zeros(0, mx.uint8)
        self._base = 0  # address of the arena
        self._graph, self._executable = c_void_p(), c_void_p()
        self._nodes: list[c_void_p] = []
        self._calls: list[Call] = []
        self._waits: list[list[int]] = []
        self._arrays: list[mx.array] = []  # read by the launches
        self._room = 0  # of _numbers, for one start

    def load(self, launches: Sequence[RecordedLaunch], nbytes: int, numbers: int, best: Region) -> None:
        """Make a graph of launches, or change the present one into it.

        Until `forget`, the host must not read the arrays that they read: MLX would move them.

        Args:
            nbytes: of the arena.
            numbers: count of int32 numbers that each `start` writes to the arena's beginning.
            best: where the launches leave tokens, int32 [up to ROWS].
        """
        _enter()
        self.wait()
        if nbytes > self._arena.nbytes:
            self._arena = mx.zeros(nbytes + ROOM, mx.uint8)
            self._base = self._find([self._arena])[0]
        if numbers > self._room:
            if self._room:
                _do("cuMemFreeHost", self._numbers)
            _do("cuMemHostAlloc", byref(self._numbers), c_uint64(4 * numbers * STARTS), 0)
            self._room = numbers
        self._best, self._rows = self._base + best.start, best.nbytes // 4
        arrays = {id(a): a for launch in launches for a in launch.inputs if isinstance(a, mx.array)}
        self._arrays = list(arrays.values())
        addresses = dict(zip(arrays, self._find(self._arrays), strict=True))
        calls, waits = [self._call(launch, addresses) for launch in launches], dependencies(launches)
        if not (waits == self._waits and self._change(calls)):
            self._build(calls, waits)
        self._calls, self._waits = calls, waits

    def forget(self) -> None:
        """Let go of the arrays that the launches read, which must not start any more."""
        self.wait()
        self._arrays = []

    def write(self, regions: Sequence[Region], arrays: Sequence[mx.array]) -> None:
        """Copy arrays into the arena; waits until they are there."""
        _enter()
        for region, at in zip(regions, self._find(arrays), strict=True):
            to, size = c_uint64(self._base + region.start), c_uint64(region.nbytes)
            _do("cuMemcpyDtoDAsync_v2", to, c_uint64(at), size, self._stream)
        self.wait()

    def box(self, nbytes: int) -> tuple[int, list[int]]:
        """Take memory, all zeros, until this process ends; return its address, and what `opened` takes in others."""
        _enter()
        at, handle = c_uint64(), _Handle()
        _do("cuMemAlloc_v2", byref(at), c_uint64(nbytes))
        _do("cuMemsetD8_v2", at, c_ubyte(0), c_uint64(nbytes))
        _do("cuCtxSynchronize")
        _do("cuIpcGetMemHandle", byref(handle), at)
        return at.value, list(handle.numbers)

    def opened(self, handle: Sequence[int]) -> int:
        """Return the address here of another process's `box`, which may lie on another GPU of this machine."""
        _enter()
        at = c_uint64()
        _do("cuIpcOpenMemHandle_v2", byref(at), _Handle((c_int * 16)(*handle)), c_uint(1))  # peers are let in as needed
        return at.value

    def start(self, numbers: np.ndarray, chained: bool) -> int:
        """Make all launches, after those of the start before; return at once, with the argument for `best`.

        Args:
            numbers: int32 [n], which are copied to the arena's beginning first.
            chained: take the tokens that the start before leaves in place of as many of them, the first.
        """
        _enter()
        slot, skip = self._starts % STARTS, 4 * self._rows if chained else 0
        self._starts += 1
        _do("cuEventSynchronize", self._done[slot])
        at = self._numbers.value + 4 * self._room * slot  # type: ignore[operator]
        ctypes.memmove(at, numbers.ctypes.data, numbers.nbytes)
        if chained:
            _do("cuMemcpyDtoDAsync_v2", c_uint64(self._base), c_uint64(self._best), c_uint64(skip), self._stream)
        size = c_uint64(numbers.nbytes - skip)
        _do("cuMemcpyHtoDAsync_v2", c_uint64(self._base + skip), c_void_p(at + skip), size, self._stream)
        _do("cuGraphLaunch", self._executable, self._stream)
        left = c_void_p(self._tokens.value + 4 * ROWS * slot)  # type: ignore[operator]
        _do("cuMemcpyDtoHAsync_v2", left, c_uint64(self._best), c_uint64(4 * self._rows), self._stream)
        _do("cuEventRecord", self._done[slot], self._stream)
        return slot

    def best(self, start: int) -> list[int]:
        """Wait for one of the latest `STARTS` starts, and return the tokens that it left."""
        _enter()
        _do("cuEventSynchronize", self._done[start])
        left = ctypes.c_int32 * self._rows
        return list(left.from_address(self._tokens.value + 4 * ROWS * start))  # type: ignore[operator]

    def wait(self) -> None:
        """Wait until all that was started is done."""
        _enter()
        _do("cuStreamSynchronize", self._stream)

    def read(self, region: Region) -> mx.array:
        """Return a copy of a region of the arena, yet to be evaluated."""
        words = region.nbytes // 4
        (out,) = mx.fast.precompiled_cuda_kernel(
            name=_TAKE,
            compiled_source=module(_TAKE),
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
            _enter()
            _driver().cuStreamSynchronize(self._stream)
            _driver().cuGraphExecDestroy(self._executable)
            _driver().cuMemFreeHost(self._numbers)
            _driver().cuMemFreeHost(self._tokens)
            for event in self._done:
                _driver().cuEventDestroy_v2(event)
            _driver().cuStreamDestroy_v2(self._stream)

    def _call(self, launch: RecordedLaunch, addresses: dict[int, int]) -> Call:
        """Return a launch as CUDA takes it. `addresses`: of arrays, by id()."""
        pointers = [addresses[id(a)] if isinstance(a, mx.array) else self._base + a.start for a in launch.inputs]
        pointers += [self._base + region.start for region in launch.outputs]
        function = _function(*text_arguments(launch))
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
                if _driver().cuGraphExecKernelNodeSetParams(self._executable, node, byref(parameters)):
                    return False
        return True

    def _build(self, calls: list[Call], waits: list[list[int]]) -> None:
        """Build a new graph. Where driver and GPU can, launches begin early and wait inside (kernels/cuda.h)."""
        if self._executable:
            _do("cuGraphExecDestroy", self._executable)
            _do("cuGraphDestroy", self._graph)
        self._graph, self._executable, self._nodes = c_void_p(), c_void_p(), []
        _do("cuGraphCreate", byref(self._graph), 0)
        for call in calls:
            node, (parameters, _keep) = c_void_p(), call.node()
            _do("cuGraphAddKernelNode", byref(node), self._graph, None, c_uint64(0), byref(parameters))
            self._nodes.append(node)
        pairs = [(i, at) for at, before in enumerate(waits) for i in before]
        first, then = ((c_void_p * len(pairs))(*(self._nodes[p[end]] for p in pairs)) for end in (0, 1))
        edges = (_Edge * len(pairs))(*(_Edge(1, 0, 1) for _ in pairs if self._early))
        _do("cuGraphAddDependencies_v2", self._graph, first, then, edges, c_uint64(len(pairs)))
        if _driver().cuGraphInstantiateWithFlags(byref(self._executable), self._graph, c_uint64(0)):
            if not self._early:
                raise RuntimeError("CUDA's driver takes no graph of a decode step")
            self._early = False
            self._build(calls, waits)

    def _find(self, arrays: Sequence[mx.array]) -> list[int]:
        """Evaluate arrays, and return their addresses on the GPU. Raises RuntimeError if one is not contiguous."""
        found: list[tuple[mx.array, mx.array]] = []
        for at in range(0, len(arrays), WIDTH):
            some = [*arrays[at : at + WIDTH]]
            some += some[:1] * (WIDTH - len(some))
            found.append((_where(some, False), _where(some, True)))
        mx.eval(found)
        as_they_are, contiguous = ([int(at) for f in found for at in np.array(f[i])] for i in (0, 1))
        if as_they_are != contiguous:
            raise RuntimeError("an array of a decode step is not contiguous")
        return as_they_are[: len(arrays)]


def _where(arrays: list[mx.array], contiguous: bool) -> mx.array:
    """Return the arrays' addresses, uint64 [WIDTH]; with `contiguous`, those that are not are copied first."""
    (out,) = mx.fast.precompiled_cuda_kernel(
        name=_WHERE,
        compiled_source=module(_WHERE),
        inputs=arrays,
        output_shapes=[(WIDTH,)],
        output_dtypes=[mx.uint64],
        scalars=[],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        ensure_row_contiguous=contiguous,
    )
    return out


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
def _function(kernel: Kernel, types: tuple[mx.Dtype, ...], ranks: tuple[int, ...]) -> int:
    """Return a kernel's CUfunction."""
    module, function = c_void_p(), c_void_p()
    _do("cuModuleLoadData", byref(module), cuda_compiler.machine_code(text(kernel, types, ranks), kernel.name))
    _do("cuModuleGetFunction", byref(function), module, kernel.name.encode())
    assert function.value
    return function.value


def _do(name: str, *arguments: Any) -> None:
    """Call CUDA's driver. Raises RuntimeError if it refuses."""
    status = _driver()[name](*arguments)
    if status:
        raise RuntimeError(f"CUDA's driver refuses {name} (status {status})")


@cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError("libcuda.so.1, NVIDIA's driver, is missing") from error


@cache
def _context() -> c_void_p:
    """Return the context that MLX works in, through CUDA's runtime."""
    context = c_void_p()
    _do("cuInit", 0)
    _do("cuDevicePrimaryCtxRetain", byref(context), 0)
    return context


def _enter() -> None:
    """Make this thread's calls go to MLX's context."""
    _do("cuCtxSetCurrent", _context())
