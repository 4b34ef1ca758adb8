"""One lock and one stream for everything that MLX executes in this process.

In: nothing. Out: `execution()`, held while a graph is built and scheduled. Threads may share a model: weights never
change, and each KV state belongs to one thread at a time.

MLX (all that pyproject.toml allows: 0.32) gives each thread default streams of its own, and refuses to evaluate in one
thread what another left unevaluated. A KV state may be made in one thread and continued in another, so all work goes to
one stream that any thread may use, and the lock keeps them from using it at once. Waiting for a result needs no lock.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

# By default MLX multiplies fp32 in TF32 (10 bits of mantissa) on GPUs that have it: NVIDIA's, M5 from macOS 26.2 on.
# What stays in fp32 here must be exact: references that kernels are held to, scores that choose experts. MLX reads this
# once, at its first product; here it stands before anything of MLX can run.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx.core as mx

# The most that MLX submits to a GPU at once; MLX reads it when it first uses one. Its default limits cut a decode step
# of a large model into dozens of command buffers (CUDA: graphs), and each costs the host and the GPU a pause. On Metal
# a buffer keeps all that its operations read until it is done, and what runs too long is ended; so there it ends after
# 200 "MB", by which MLX's Metal backend means 2^20 elements of whatever size (mlx #3192).
BUFFER_ELEMENTS = 200 << 20
os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "400")
os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", str(BUFFER_ELEMENTS >> 20) if sys.platform == "darwin" else "100000")

_guard = threading.Lock()  # of _last
_last = threading.Lock()  # held by the latest thread in the queue until it is done
_holder = (0, threading.Lock())  # the thread that executes, or did last, and a lock that it alone acquires meanwhile


@cache
def _stream(device: mx.DeviceType) -> Any:
    return mx.new_thread_unsafe_stream(mx.Device(device))


def host_stream() -> Any:
    """Return the stream on the CPU that threads share; where MLX computes on the CPU it is the one of `execution`."""
    return _stream(mx.DeviceType.cpu)


def cores() -> int:
    """Return how many cores this process may use; --threads sets MLX_GEMMA4_THREADS."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("MLX_GEMMA4_THREADS", "")
    return min(int(wanted), there) if wanted.isdecimal() and int(wanted) else there


def leave() -> None:
    """Free what MLX keeps for this thread: the last thing that one does which has computed, other than the main thread.

    MLX would free it itself, after the thread's last line and so after `join`, and takes Python's lock for it. Where
    the interpreter is ending by then, the process aborts: "terminate called without an active exception" (mlx #4110).
    """
    mx.clear_streams()


@contextmanager
def _turn() -> Iterator[None]:
    """Wait for the thread before in the queue, and hold a lock that the next one waits for.

    `with` acquires and releases these locks in C, so that Ctrl-C can't come between. KeyboardInterrupt is deferred
    while waiting: a thread that left the queue early would admit the next.
    """
    global _last, _holder
    interrupt: BaseException | None = None
    mine, held = threading.Lock(), threading.Lock()
    with mine:
        with _guard:
            before, _last = _last, mine
        while True:
            try:
                with before:
                    break
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt:
            raise interrupt
        with held:  # not `mine`: when that is released, the next one may have it before this thread goes on
            _holder = (threading.get_ident(), held)
            yield


@contextmanager
def execution() -> Iterator[bool]:
    """Hold the lock, on the shared stream; may be nested. Yields True if this entry is the outermost.

    Whoever holds the outermost one schedules (`mx.async_eval`) what it returns before releasing it.
    """
    thread, held = _holder
    if thread == threading.get_ident() and held.locked():
        yield False
        return
    with _turn(), mx.stream(_stream(mx.default_device().type)):
        yield True
