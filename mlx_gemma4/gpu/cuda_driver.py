"""NVIDIA's driver, called beside MLX: where its arrays lie, and bytes of the host sent straight into them.

In: MLX arrays. Out: their addresses on the GPU, as a kernel finds them that gets them as arguments; and `Upload`. What
MLX itself makes of numpy's arrays on NVIDIA is managed memory, copied by one thread and moved at the first launch that
reads it: 1.4 to 1.7 GB/s on an H200 (2026-11-29).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_ubyte, c_uint64, c_void_p
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from . import cuda_compiler

WIDTH = 32  # arrays that a launch of `WHERE` takes
WHERE = "where_arrays_lie"
WHERE_TEXT = f"""extern "C" __global__ void {WHERE}(
  {", ".join(f"const void* a{i}" for i in range(WIDTH))}, unsigned long long* found) {{
  {" ".join(f"found[{i}] = (unsigned long long)a{i};" for i in range(WIDTH))}
}}
"""
TRIED = 100_003  # bytes that an `Upload` sends first, to see where they arrive


@cache  # a reply's steps call this, and are not to look for a file
def module(text: str, name: str) -> bytes:
    """Return what MLX takes as a kernel of a whole CUDA text."""
    return cuda_compiler.module(text, name)


@cache
def driver() -> Any:
    """Return NVIDIA's driver. Raises RuntimeError if it is missing."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError("libcuda.so.1, NVIDIA's driver, is missing") from error


def do(name: str, *arguments: Any) -> None:
    """Call CUDA's driver. Raises RuntimeError if it refuses."""
    status = getattr(driver(), name)(*arguments)  # which keeps it: an index looks for it anew
    if status:
        raise RuntimeError(f"CUDA's driver refuses {name} (status {status})")


@cache
def _context() -> c_void_p:
    """Return the context that MLX works in, through CUDA's runtime."""
    context = c_void_p()
    do("cuInit", 0)
    do("cuDevicePrimaryCtxRetain", byref(context), 0)
    return context


def enter() -> None:
    """Make this thread's calls go to MLX's context."""
    do("cuCtxSetCurrent", _context())


def addresses(arrays: Sequence[mx.array]) -> list[int]:
    """Evaluate arrays, and return their addresses on the GPU. Raises RuntimeError if one is not contiguous."""
    found: list[tuple[mx.array, mx.array]] = []
    for at in range(0, len(arrays), WIDTH):
        some = [*arrays[at : at + WIDTH]]
        some += some[:1] * (WIDTH - len(some))
        found.append((_where(some, False), _where(some, True)))
    mx.eval(found)
    as_they_are, contiguous = ([int(at) for f in found for at in np.array(f[i])] for i in (0, 1))
    if as_they_are != contiguous:
        raise RuntimeError("an array whose address is wanted is not contiguous")
    return as_they_are[: len(arrays)]


def _where(arrays: list[mx.array], contiguous: bool) -> mx.array:
    """Return the arrays' addresses, uint64 [WIDTH]; with `contiguous`, those that are not are copied first."""
    (out,) = mx.fast.precompiled_cuda_kernel(
        name=WHERE,
        compiled_source=module(WHERE_TEXT, WHERE),
        inputs=arrays,
        output_shapes=[(WIDTH,)],
        output_dtypes=[mx.uint64],
        scalars=[],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        ensure_row_contiguous=contiguous,
    )
    return out


class Upload:
    """Pinned memory of the host, and a stream on which any threads send parts of it into MLX's arrays.

    stage: that memory, uint8 [nbytes]. It is to be used as long as the `Upload` is there, not longer.

    Raises:
        RuntimeError: for whatever CUDA refuses, and if what is sent isn't what MLX sees.
    """

    def __init__(self, nbytes: int) -> None:
        self._stream, self._memory = c_void_p(), c_void_p()
        enter()
        do("cuStreamCreate", byref(self._stream), 1)  # waits for no other stream
        do("cuMemHostAlloc", byref(self._memory), c_uint64(nbytes), 0)
        assert self._memory.value
        self.stage = np.ctypeslib.as_array((c_ubyte * nbytes).from_address(self._memory.value))
        tried, (array, address) = min(TRIED, nbytes), self.array((TRIED,))
        self.stage[:tried] = np.random.default_rng(0).integers(0, 256, tried, np.uint8)
        self.send(address, 0, tried)
        self.wait()
        if not mx.array_equal(array[:tried], mx.array(self.stage[:tried])).item():
            raise RuntimeError("what CUDA's driver is sent does not arrive in MLX's arrays")

    def array(self, shape: tuple[int, ...], dtype: mx.Dtype = mx.uint8) -> tuple[mx.array, int]:
        """Return a new array, and its address. The host must not read it: MLX would move it."""
        made = mx.zeros(shape, dtype)
        return made, addresses([made])[0]

    def send(self, address: int, at: int, nbytes: int) -> None:
        """Send bytes of `stage` from `at` on to an address, and return at once.

        No launch that reads or writes that memory may be under way; both places belong to the GPU until `wait`.
        """
        enter()
        source, size = c_void_p(self._memory.value + at), c_uint64(nbytes)  # type: ignore[operator]
        do("cuMemcpyHtoDAsync_v2", c_uint64(address), source, size, self._stream)

    def wait(self) -> None:
        """Wait until all that was sent has arrived."""
        enter()
        do("cuStreamSynchronize", self._stream)

    def __del__(self) -> None:
        if self._stream:  # a half-made one has none
            enter()
            driver().cuStreamSynchronize(self._stream)
            driver().cuMemFreeHost(self._memory)
            driver().cuStreamDestroy_v2(self._stream)
