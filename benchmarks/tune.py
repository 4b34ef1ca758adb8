"""Times many tilings of the packed mat-vec on this machine's GPU, at the shapes that `mlx-gemma4 doctor` checks.

    python benchmarks/tune.py [--model 31B] [--type Q4_K] [--rows 43008]

In: nothing; random weights are made here. Out: for each shape the tiling that `matvec.tiling` takes and the five
fastest, in microseconds and GB/s of file bytes; the exit code is 1 if two tilings give different results. On NVIDIA
launches wait for each other in a CUDA graph, as in a decode step; copies of the weight take turns, so that no cache
holds them.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from statistics import median
from typing import Any

os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "20")  # the GPU begins while the host still hands over the rest

import mlx.core as mx
import numpy as np

from mlx_gemma4.doctor.table import real_sizes
from mlx_gemma4.doctor.verdict import MLX, device_name
from mlx_gemma4.gpu import cuda_graph
from mlx_gemma4.gpu.recording import Arena, Recording, recorded, recorder
from mlx_gemma4.gpu.render import Launcher, cuda_launcher, default_launcher
from mlx_gemma4.ops.cases import Product, product_inputs, weight
from mlx_gemma4.ops.matvec import Tiling, matvec, tiling
from mlx_gemma4.quant.formats import Packed

LIMIT = 1e-3  # of the difference of two tilings' results, as norms
COPIES = 300e6  # bytes of copies, several times the largest cache
SHOWN = 5

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


def tilings(k: int) -> list[Tiling]:
    """The tilings to try for rows of k weights."""

    def sensible(lanes: int, split: int, of: int) -> bool:
        steps = k / 32 / (lanes * split)
        return split * of <= 12 and steps >= 1 and steps / math.ceil(steps) > 0.8

    every = itertools.product((8, 16, 32), (2, 4, 8), (1, 2, 3, 4, 6, 7, 8), (1, 2, 4))
    return [Tiling(lanes, rows, split, split * of) for lanes, rows, split, of in every if sensible(lanes, split, of)]


def tune(model: str, p: Product, launcher: Launcher) -> float:
    """Print the lines of one shape. Return the largest difference from the default tiling's result."""
    x, w, epilogue, folded = product_inputs(p, None)
    assert isinstance(w, Packed)
    copies: list[Packed] = [w]
    for _ in range(min(64, int(COPIES // w.nbytes))):
        copy = weight(p.type, w.shape)
        assert isinstance(copy, Packed)
        copies.append(copy)
    mx.eval(x, [a for c in copies for a in (c.codes, c.group_scales, c.block_scales) if a is not None])
    own = tiling(w.format, p.shape[-2] * (p.used or 1), p.shape[-1], p.tokens)
    n_bytes = w.nbytes * p.used // w.shape[0] if p.used else w.nbytes
    want = matvec(launcher, x, w, epilogue, folded, config=own).astype(mx.float32)
    results: list[tuple[float, Tiling]] = []
    worst = 0.0
    for config in dict.fromkeys([own, *tilings(p.shape[-1])]):

        def call(launcher: Launcher, v: mx.array, i: int, config: Tiling = config) -> Any:
            return matvec(launcher, v, copies[i % len(copies)], epilogue, folded, config=config)

        got = call(launcher, x, 0).astype(mx.float32)
        difference: Any = (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item()
        worst = max(worst, difference)
        results.append((seconds(call, x, max(10, min(200, int(2e9 / n_bytes))), launcher), config))
    for took, config in [results[0], *sorted(results, key=lambda r: r[0])[:SHOWN]]:
        kind = f"{config.lanes} lanes x {config.rows} rows x {config.split} of {config.simdgroups}"
        mark = " (matvec.tiling)" if config == own else ""
        rate = f"{took * 1e6:7.1f} us {n_bytes / took / 1e9:6.0f} GB/s"
        print(f"{model:8} {p.type:7} {p!s:30} {n_bytes / 1e6:5.0f} MB {rate}  {kind}{mark}", flush=True)
    return worst


def main() -> int:
    sizes = real_sizes()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=lambda name: name if name == "any" else name.upper(), choices=sizes)
    parser.add_argument("--type", help="only weights of this GGUF type")
    parser.add_argument("--rows", type=int, help="only weights of so many rows")
    options = parser.parse_args()
    launcher = default_launcher()
    if launcher is None:
        print("no GPU: the kernels run on Metal, or on NVIDIA with MLX's cuda extra", file=sys.stderr)
        return 2
    print(f"{device_name()}, MLX {MLX}")
    worst = 0.0
    for name in [options.model] if options.model else sizes:
        for p in dict.fromkeys(sizes[name].packed):
            if options.type in (None, p.type) and options.rows in (None, p.shape[-2]):
                worst = max(worst, tune(name, p, launcher))
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
