"""One lock and one stream around everything that MLX executes for this process.

In: nothing. Out: `execution()`, held while a graph is built and scheduled. Threads may share a model, for nothing
else they share ever changes: weights are immutable, and each KV state belongs to one of them at a time.

MLX gives each thread default streams of its own and refuses to evaluate, in one thread, what another left
unevaluated. A KV state may be made in one thread and continued in another, so all work goes to one stream that any
thread may use, and the lock keeps them from using it at once. Waiting for a result needs no lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.core as mx

# What MLX hands to a GPU at once, which it reads when it first uses one. Its own limits cut a decode step of a large
# model into dozens of command buffers (CUDA: graphs), each of which costs the host and the GPU a pause.
os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "400")
os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "100000")

_guard = threading.Lock()  # of _last
_last = threading.Lock()  # what the latest to come holds until it is done
_holder = (0, _last)  # the thread whose turn it is or was, and its lock


@cache
def _stream(device: mx.DeviceType) -> Any:
    # Before MLX 0.31 or so, every stream was free for all threads.
    make = getattr(mx, "new_thread_unsafe_stream", mx.new_stream)
    return make(mx.Device(device))


@contextmanager
def _turn() -> Iterator[None]:
    """Wait for the one who came before, and hold a lock that the one who comes next waits for.

    `with` takes and gives back these locks in C, so that Ctrl-C can't come between; while waiting it is put off, for
    who leaves the queue early would let the next one in.
    """
    global _last, _holder
    interrupt: BaseException | None = None
    mine = threading.Lock()
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
        _holder = (threading.get_ident(), mine)
        yield


@contextmanager
def execution() -> Iterator[bool]:
    """Hold the lock, on the shared stream; may be nested. Gives whether this entry is the outermost.

    Whoever holds the outermost one schedules (`mx.async_eval`) what it hands out before letting go.
    """
    thread, lock = _holder
    if thread == threading.get_ident() and lock.locked():
        yield False
        return
    with _turn(), mx.stream(_stream(mx.default_device().type)):
        yield True
