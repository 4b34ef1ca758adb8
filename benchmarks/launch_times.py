"""Times launches of a kernel as a decode step makes them: what benchmarks of single kernels share."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gemma4.gpu import cuda_graph
from mlx_gemma4.gpu.recording import Arena, Recording, recorded, recorder
from mlx_gemma4.gpu.render import Launcher, cuda_launcher

Call = Callable[[Launcher, mx.array, int], Any]  # (launcher, x, number of the launch)


def seconds(call: Call, x: mx.array, launches: int, launcher: Launcher) -> float:
    """Time one of many launches in a row; the median of five runs.

    On NVIDIA as a decode step makes them: recorded, each waiting for the one before, whose result it overwrites, in one
    CUDA graph. Elsewhere in a traced chain; there the device may run some at once.
    """
    if launcher is cuda_launcher:
        run = _recorded(call, x, launches)
    else:

        @mx.compile
        def chain(x: mx.array) -> list[mx.array]:
            return [call(launcher, x, i) for i in range(launches)]

        def run() -> None:
            mx.eval(chain(x))

    def timed() -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) / launches

    run()
    return median(timed() for _ in range(5))


def _recorded(call: Call, x: mx.array, launches: int) -> Callable[[], None]:
    recording = Recording(Arena())
    number = recording.buffer((1,), mx.int32)
    with recorded(recording):
        for i in range(launches):
            call(recorder, x, i)
    _player().load(recording.launches, recording.arena.nbytes, 1, number.region)

    def run() -> None:
        _player().start(np.zeros(1, np.int32), False)
        _player().wait()

    return run


_player = cache(cuda_graph.Player)
