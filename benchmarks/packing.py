"""How fast a tensor of each type becomes packed MLX arrays, in GB/s of file bytes.

    python benchmarks/packing.py [--mb 256] [--types Q4_K,Q6_K]

The bytes are random. "arrange" is the rearrangement alone, into memory that is already there; "pack" is all that a
load does, with the allocation of the result (whose pages the system hands out and clears for the first time).
The best of several runs each.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import numpy as np

from mlx_gemma4 import quant
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


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--mb", type=int, default=256, help="file bytes per tensor, in MB")
    args.add_argument("--types", default=",".join(quant.FORMATS))
    args.add_argument("--runs", type=int, default=4)
    opts = args.parse_args()
    noise = np.random.default_rng(0).integers(0, 256, opts.mb * 1_000_000, dtype=np.uint8)
    print(f"{opts.mb} MB a tensor, {os.cpu_count()} cores")
    print(f"{'type':8} {'arrange GB/s':>12} {'pack GB/s':>10}")
    for name in opts.types.split(","):
        layout = quant.FORMATS[name].layout
        row_bytes = K // layout.size * layout.n_bytes
        rows = noise.size // row_bytes
        raw = noise[: rows * row_bytes].reshape(rows, row_bytes)
        arrange = best_of(opts.runs, arranging(raw.reshape(-1), layout))
        pack = best_of(opts.runs, lambda: quant.pack(raw, name, (rows, K)))  # noqa: B023
        print(f"{name:8} {raw.nbytes / arrange / 1e9:12.2f} {raw.nbytes / pack / 1e9:10.2f}", flush=True)


if __name__ == "__main__":
    main()
