"""One lock and one stream around everything that MLX executes for this process.

In: nothing. Out: `execution()`, held while a graph is built and scheduled. Threads may share a model, for nothing
else they share ever changes: weights are immutable, and each KV state belongs to one of them at a time.

MLX gives each thread default streams of its own and refuses to evaluate, in one thread, what another left
unevaluated. A KV state may be made in one thread and continued in another, so all work goes to one stream that any
thread may use, and the lock keeps them from using it at once. Waiting for a result needs no lock.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.core as mx

_lock = threading.RLock()
_depth = 0  # how often the thread that holds the lock has entered


@cache
def _stream(device: mx.DeviceType) -> Any:
    # Before MLX 0.31 or so, every stream was free for all threads.
    make = getattr(mx, "new_thread_unsafe_stream", mx.new_stream)
    return make(mx.Device(device))


@contextmanager
def execution() -> Iterator[bool]:
    """Hold the lock, on the shared stream; may be nested. Gives whether this entry is the outermost.

    Whoever holds the outermost one schedules (`mx.async_eval`) what it hands out before letting go.
    """
    global _depth
    with _lock, mx.stream(_stream(mx.default_device().type)):
        _depth += 1
        try:
            yield _depth == 1
        finally:
            _depth -= 1
