"""Checks and times the way of a file's blocks to this machine's GPU and into the layout that kernels read.

    python benchmarks/upload.py [--gigabytes 2] [--folder /tmp] [--quick]

In: nothing. Out: first, for every type, whether tensors in several pieces, joined ones and experts are packed to the
bit as on a CPU, and those of 16 bits arrive; the exit code is 1 if not. Then GB/s of a mapped file of Q4_K blocks, in
the system's cache, for sizes of pieces, of what a thread copies, and numbers of threads; of the copy alone, of all; and
of MLX's own way. The file is removed at the end.
"""

from __future__ import annotations

import argparse
import itertools
import mmap
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np

from mlx_gemma4.doctor.verdict import MLX, device_name, usable_kernels
from mlx_gemma4.ops import pack
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.quant import repack
from mlx_gemma4.quant.formats import FLOATS, FORMATS, Packed, pack_on_cpu

MB = 1 << 20
ROW = 15360  # weights


@contextmanager
def sizes(piece: int, copy: int, threads: int) -> Iterator[None]:
    """Pack in pieces of so many bytes, and copy in stretches of so many, by so many threads."""
    pack.done()
    repack.pool.cache_clear()
    with patch.multiple(pack, PIECE=piece, COPY=copy), patch.object(repack, "THREADS", threads):
        yield
        pack.done()
    repack.pool.cache_clear()


def bits(a: mx.array | None) -> bytes:
    return b"" if a is None else np.array(a.view(mx.uint8)).tobytes()


def same(a: Packed, b: Packed) -> bool:
    """True if two packed weights are equal to the bit."""
    planes = ("codes", "group_scales", "block_scales")
    return a.shape == b.shape and all(bits(getattr(a, name)) == bits(getattr(b, name)) for name in planes)


def wrong(run: Kernels, piece: int) -> list[str]:
    """Return what differs from the CPU's result."""
    found, rng = [], np.random.default_rng(0)
    for type, form in FORMATS.items():
        size, n_bytes = form.layout.size, form.layout.n_bytes
        rows = 3 * piece // (4 * n_bytes) + 1  # of 4 blocks
        whole = rng.integers(0, 256, (rows, 4 * n_bytes), np.uint8)
        parts = [whole[: rows // 3], whole[rows // 3 : rows // 2], whole[rows // 2 :]]
        experts = whole[: rows // 8 * 8].reshape(8, -1, 4 * n_bytes)
        halves = [np.ascontiguousarray(experts[:, : experts.shape[1] // 2]), experts[:, experts.shape[1] // 2 :]]
        halves[1] = np.ascontiguousarray(halves[1])
        want = pack_on_cpu(whole, type, (rows, 4 * size))
        shape = (8, experts.shape[1], 4 * size)
        tried = {
            "one": same(pack.pack_on_gpu([whole], type, want.shape, run), want),
            "joined": same(pack.pack_on_gpu(parts, type, want.shape, run), want),
            "experts": same(pack.pack_on_gpu(halves, type, shape, run), pack_on_cpu(experts, type, shape)),
            "small": same(
                pack.pack_on_gpu([whole[:5]], type, (5, 4 * size), run), pack_on_cpu(whole[:5], type, (5, 4 * size))
            ),
        }
        found += [f"{type} {name}" for name, right in tried.items() if not right]
    for type in ("F16", "BF16"):
        raw = rng.integers(0, 256, (3 * piece // 2000 + 1, 2000), np.uint8)
        sent = pack.floats_on_gpu([raw], type, (len(raw), 1000), run)
        if sent is None:
            print(f"{type}: MLX's own way")
        elif sent.dtype != FLOATS[type] or bits(sent) != raw.tobytes():
            found.append(type)
    return [*found, *(f"{key} is off" for key in sorted(map(str, run.off)))]


def rate(raw: np.ndarray, run: Kernels) -> tuple[float, float]:
    """GB/s of packing some rows of Q4_K: of the copy to where the kernel reads alone, and of all."""
    copied, copies = pack.copied, []

    def timed(*arguments: Any) -> mx.array:
        start = time.perf_counter()
        made = copied(*arguments)
        copies.append(time.perf_counter() - start)
        return made

    rates = []
    with patch.object(pack, "copied", timed):
        for i in range(4):  # the first makes what is kept
            copies.clear()
            start = time.perf_counter()
            for rows in np.array_split(raw, max(1, raw.nbytes // (60 * MB))):  # as tensors are
                pack.pack_on_gpu([rows], "Q4_K", (len(rows), ROW), run)
            if i:
                rates.append((raw.nbytes / sum(copies) / 1e9, raw.nbytes / (time.perf_counter() - start) / 1e9))
    return median(r[0] for r in rates), median(r[1] for r in rates)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--folder", type=Path, help="for the file; by default the system's for temporary files")
    parser.add_argument("--quick", action="store_true", help="time the program's own sizes alone")
    options = parser.parse_args()
    run = usable_kernels()
    if run is None:
        print("no GPU: the kernels run on Metal, or on NVIDIA with MLX's cuda extra", file=sys.stderr)
        return 2
    print(f"{device_name()}, MLX {MLX}")
    with sizes(MB, MB // 8, repack.THREADS):
        faults = wrong(run, MB)
        print(f"{len(FORMATS)} types packed: {'; '.join(faults) or 'each to the bit'}", flush=True)
    n_bytes = ROW // 256 * 144
    rows = max(1, int(options.gigabytes * 1e9) // n_bytes)
    with tempfile.NamedTemporaryFile(dir=options.folder) as file:
        some = np.random.default_rng(0).integers(0, 256, (min(rows, 3001), n_bytes), np.uint8)
        for at in range(0, rows, len(some)):
            file.write(some[: rows - at].data)
        file.flush()
        raw = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8).reshape(rows, n_bytes)
        own = (pack.PIECE, pack.COPY, repack.THREADS)
        tried = (
            [] if options.quick else itertools.product((16 * MB, 32 * MB, 64 * MB), (MB, 2 * MB, 4 * MB), (4, 8, 16))
        )
        for piece, copy, threads in dict.fromkeys([own, *tried]):
            with sizes(piece, copy, threads):
                alone, all_of_it = rate(raw, run)
            print(
                f"pieces of {piece // MB:3} MB, {copy // MB} MB by each of {threads:2} threads: "
                f"copy {alone:5.1f} GB/s, all {all_of_it:5.1f} GB/s",
                flush=True,
            )
        with sizes(*own), patch.object(pack, "places", lambda _: [pack.Place(np.empty(pack.PIECE, np.uint8))]):
            print(f"MLX's own way: copy {(both := rate(raw, run))[0]:5.1f} GB/s, all {both[1]:5.1f} GB/s")
        del raw
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
