"""How fast a tensor of each type becomes packed MLX arrays, in GB/s of file bytes.

    python benchmarks/packing.py [--mb 256] [--types Q4_K,Q6_K] [--piece 33554432]

The bytes are random. "arrange" is the rearrangement alone, into memory that is already there; "pack" is all that a
load does on a CPU, with the allocation of the result (whose pages the system hands out and clears for the first time).
With a GPU: "launch" is the kernel alone, on blocks that are there; "kernel" is all that a load does, from a mapped file
(in the page cache) to arrays in the GPU's memory; and it is checked that both ways give the same. The best of several
runs each.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from mlx_gemma4 import packing, quant
from mlx_gemma4.decode import Kernels
from mlx_gemma4.kernels import Maker, default_maker
from mlx_gemma4.quant_pack import Layout, rearrange

K = 4096


def best_of(n: int, work: Callable[[], object]) -> float:
    """Seconds of the fastest of n runs."""
    times = []
    for _ in range(n):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def arranging(raw: np.ndarray, layout: Layout) -> Callable[[], None]:
    """The rearrangement of raw blocks into arrays that were written before."""
    blocks = raw.size // layout.n_bytes
    codes = np.ones((blocks, layout.size * layout.bits // 8), np.uint8)
    sub = np.ones((blocks, layout.sub_bytes), np.uint8) if layout.sub else None
    super_ = np.ones((blocks, 2 * len(layout.super)), np.uint8) if layout.super else None
    return lambda: rearrange(layout, raw, codes, sub, super_)


@contextmanager
def mapped(raw: np.ndarray) -> Iterator[np.ndarray]:
    """The same bytes in a file."""
    with tempfile.NamedTemporaryFile() as file:
        raw.tofile(file.name)
        yield np.memmap(file.name, np.uint8, "r", shape=raw.shape)


def on_gpu(raw: np.ndarray, name: str, maker: Maker, runs: int) -> tuple[float, float]:
    """Seconds of a launch and of a whole load by the kernel."""
    run, shape = Kernels(maker), (len(raw), K)
    with mapped(raw) as rows:
        load = best_of(runs, lambda: packing.pack([rows], name, shape, run))
        got, want = packing.pack([rows], name, shape, run), quant.pack(raw, name, shape)
    assert not run.off
    for plane in ("codes", "sub", "super"):
        a, b = getattr(got, plane), getattr(want, plane)
        assert a is None or mx.array_equal(a.view(mx.uint8), b.view(mx.uint8)), f"{name}: {plane} differs"
    del got, want
    there = mx.array(raw[: packing.PIECE // raw.shape[1]].reshape(-1))
    times = 20
    launch = best_of(runs, lambda: mx.eval([packing.launch(there, name, maker) for _ in range(times)]))
    packing.done()
    return launch / times * raw.nbytes / there.nbytes, load


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--mb", type=int, default=256, help="file bytes per tensor, in MB")
    args.add_argument("--types", default=",".join(quant.FORMATS))
    args.add_argument("--runs", type=int, default=4)
    args.add_argument("--piece", type=int, default=packing.PIECE, help="bytes that go to a GPU at once")
    opts = args.parse_args()
    packing.PIECE = opts.piece
    maker = default_maker()
    noise = np.random.default_rng(0).integers(0, 256, opts.mb * 1_000_000, dtype=np.uint8)
    print(f"{opts.mb} MB a tensor, {os.cpu_count()} cores")
    gpu = f" {'launch GB/s':>12} {'kernel GB/s':>12}" if maker else ""
    print(f"{'type':8} {'arrange GB/s':>12} {'pack GB/s':>10}{gpu}")
    for name in opts.types.split(","):
        layout = quant.FORMATS[name].layout
        row_bytes = K // layout.size * layout.n_bytes
        rows = noise.size // row_bytes
        raw = noise[: rows * row_bytes].reshape(rows, row_bytes)
        arrange = best_of(opts.runs, arranging(raw.reshape(-1), layout))
        pack = best_of(opts.runs, lambda: quant.pack(raw, name, (rows, K)))  # noqa: B023
        line = f"{name:8} {raw.nbytes / arrange / 1e9:12.2f} {raw.nbytes / pack / 1e9:10.2f}"
        if maker:
            launch, load = on_gpu(raw, name, maker, opts.runs)
            line += f" {raw.nbytes / launch / 1e9:12.0f} {raw.nbytes / load / 1e9:12.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
