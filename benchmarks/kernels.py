"""Times the packed mat-vec on this machine's GPU at the models' real shapes, and checks it there.

    python benchmarks/kernels.py [--only Q4_K] [--tokens 1] [--rows N] [--tune] [--as-decoded]

In: nothing; random weights are made here. Out: a table (type, rows x length, error, microseconds, GB/s of file bytes),
MLX's own 4-bit product and a copy for comparison; the exit code is 1 if an error is over 1e-3. On NVIDIA launches wait
for each other in a CUDA graph, as in a decode step; all take turns over copies of the weight, so that no cache holds
it. `--tune` tries many cuts of each shape and names the best. `--as-decoded` launches what a decode step does, in place
of fp16 in and out.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import cache
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gemma4.doctor.verdict import MLX
from mlx_gemma4.gpu import cuda_graph
from mlx_gemma4.gpu.recording import Arena, Recording, recorded
from mlx_gemma4.gpu.recording import recorder as recording_maker
from mlx_gemma4.gpu.render import Launcher, cuda_launcher, default_launcher
from mlx_gemma4.ops.epilogue import FP32, PLAIN, SHRINK, Epilogue
from mlx_gemma4.ops.matvec import Tiling, matvec, tiling
from mlx_gemma4.quant.formats import FORMATS, Packed, dequantize

os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "20")  # the GPU begins while the host still hands over the rest

LIMIT = 1e-3
ROTATE = 300e6  # bytes of copies, several times the largest cache
LARGE = ((43008, 5376), (5376, 21504), (262144, 5376), (16384, 5376), (5376, 8192))  # of 31B: gate|up, down, head, q..
SHAPES = {
    "Q4_K": (*LARGE, (30720, 3840), (3840, 15360), (24576, 1536), (1536, 12288), (2560, 1536)),
    "Q6_K": LARGE,
    "Q5_K": LARGE[:3],
    "Q8_0": LARGE[:3],
    "Q4_0": LARGE[:3],
    "IQ4_XS": LARGE[:4],
    **dict.fromkeys(("Q5_0", "Q5_1", "Q4_1", "Q3_K", "Q2_K", "IQ4_NL", "MXFP4"), LARGE[:2]),
}


def random_words(*shape: int) -> mx.array:
    return mx.random.randint(-(2**31), 2**31 - 1, shape, mx.int32).view(mx.uint32)


def random_weight(name: str, n: int, k: int) -> Packed:
    """Random codes and scales; the values of fp16 scales and exponents are tame."""
    form = FORMATS[name]
    codes = random_words(n, k * form.bits // 32)
    group_scales = top = None
    if form.group_scale_bits:
        low, high = (118, 130) if form.group_scale_kind == "e8m0" else (0, 256)
        group_scales = mx.random.randint(low, high, (n, k // form.group * form.group_scale_bits // 8)).astype(mx.uint8)
    if form.scale_block:
        top = mx.random.uniform(0.001, 0.02, (n, k // form.scale_block, 1 + form.has_min)).astype(mx.float16)
    mx.eval(codes, [a for a in (group_scales, top) if a is not None])
    return Packed(form, (n, k), codes, group_scales, top)


def error(y: mx.array, x: mx.array, w: Packed) -> float:
    """||y - want|| / ||want|| over some rows, with want in double precision."""
    n = w.shape[0]
    rows = np.unique(np.r_[0:4, np.random.default_rng(0).integers(0, n, 40), n - 4 : n])
    values = np.array(dequantize(w, rows=mx.array(rows))).astype(np.float64)
    want = np.array(x.astype(mx.float32)).astype(np.float64) @ values.T
    got = np.array(y.astype(mx.float32)).astype(np.float64)[:, rows]
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def seconds(
    call: Callable[[mx.array, int, Launcher | None], Any], x: mx.array, launches: int, launcher: Launcher | None = None
) -> float:
    """Time of one of many launches in a row, by a launcher or stock; the median of five runs.

    On NVIDIA as a decode step makes them: recorded, each waiting for the one before, whose result it overwrites, in one
    CUDA graph. Elsewhere in a traced chain; there the device may run some at once.
    """
    if launcher is cuda_launcher:
        run = _recorded(call, x, launches)
    else:

        @mx.compile
        def chain(x: mx.array) -> list[mx.array]:
            return [call(x, i, launcher) for i in range(launches)]

        def run() -> None:
            mx.eval(chain(x))

    def timed() -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) / launches

    run()
    return median(timed() for _ in range(5))


def _recorded(call: Callable[[mx.array, int, Launcher | None], Any], x: mx.array, launches: int) -> Callable[[], None]:
    recording = Recording(Arena())
    number = recording.buffer((1,), mx.int32)
    with recorded(recording):
        for i in range(launches):
            call(x, i, recording_maker)
    _player().load(recording.launches, recording.arena.nbytes, 1, number.region)

    def run() -> None:
        _player().start(np.zeros(1, np.int32), False)
        _player().wait()

    return run


_player = cache(cuda_graph.Player)


def tilings(n: int, k: int) -> list[Tiling]:
    """What --tune tries."""
    every = itertools.product((8, 16, 32), (2, 4, 8), (1, 2, 3, 4, 6, 7, 8), (1, 2, 4))
    return [
        Tiling(lanes, rows, split, split * of) for lanes, rows, split, of in every if _sensible(lanes, split, of, k)
    ]


def _sensible(lanes: int, split: int, of: int, k: int) -> bool:
    steps = k / 32 / (lanes * split)
    return split * of <= 12 and steps >= 1 and steps / math.ceil(steps) > 0.8


def measure(name: str, n: int, k: int, tokens: int, launcher: Launcher, tune: bool, decoded: bool) -> float:
    """One line, or with `tune` one for each of the best cuts; gives the largest error."""
    first = random_weight(name, n, k)
    copies = [first] + [random_weight(name, n, k) for _ in range(min(64, int(ROTATE // first.nbytes)))]
    x = mx.random.normal((tokens, k)).astype(mx.float16)
    epilogue = PLAIN
    if decoded:  # 31B's gate and up lie in 43008 rows
        epilogue = Epilogue(glu=True, factor=SHRINK) if n == 43008 else FP32
    launches = max(10, min(200, int(20e9 / first.nbytes / 10)))
    results = []
    for config in tilings(n, k) if tune else [tiling(FORMATS[name], n, k, tokens)]:
        y = matvec(launcher, x, first, epilogue, config=config)
        wrong = 0.0 if epilogue.glu else error(y, x, first)  # tests hold GEGLU to its reference

        def launch(v: mx.array, i: int, launcher: Launcher | None, c: Tiling = config) -> Any:
            assert launcher is not None
            return matvec(launcher, v, copies[i % len(copies)], epilogue, config=c)

        t = seconds(launch, x, launches, launcher)
        results.append((t, wrong, config))
    for t, wrong, config in sorted(results, key=lambda r: r[0])[:5]:
        kind = f"{config.lanes} lanes x {config.rows} rows x {config.split} of {config.simdgroups}"
        print(
            f"{name:7} {n:>6} x {k:<6} {first.nbytes / 1e6:6.0f} MB  error {wrong:.1e}  {t * 1e6:7.1f} us  "
            f"{first.nbytes / t / 1e9:6.0f} GB/s  {kind}",
            flush=True,
        )
    return max(wrong for _, wrong, _ in results)


def stock(n: int, k: int) -> None:
    """MLX's own 4-bit product, groups of 32, of the same shape."""
    codes = [random_words(n, k // 8) for _ in range(3)]
    scales = [mx.random.uniform(0.001, 0.02, (n, k // 32)).astype(mx.float16) for _ in range(2)]
    x = mx.random.normal((1, k)).astype(mx.float16)
    mx.eval(codes, scales)
    nbytes = codes[0].nbytes + 2 * scales[0].nbytes

    def product(v: mx.array, i: int, _: Launcher | None) -> mx.array:
        return mx.quantized_matmul(v, codes[i % 3], scales[0], scales[1], group_size=32, bits=4)

    t = seconds(product, x, 50)
    print(
        f"MLX 4b  {n:>6} x {k:<6} {nbytes / 1e6:6.0f} MB{'':16} {t * 1e6:9.1f} us  {nbytes / t / 1e9:6.0f} GB/s  stock"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="one type")
    parser.add_argument("--rows", type=int, help="only the shape of so many rows")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--tune", action="store_true", help="try many tilings")
    parser.add_argument("--as-decoded", action="store_true", help="fp32 results, and GEGLU folded in")
    options = parser.parse_args()
    launcher = default_launcher()
    if launcher is None:
        print("no GPU: the kernels run on Metal, or on NVIDIA with MLX's cuda extra", file=sys.stderr)
        return 2
    info = mx.device_info() if hasattr(mx, "device_info") else {}
    print(f"{info.get('device_name', 'GPU')}, MLX {MLX}, Python {platform.python_version()}")
    block = random_words(256 << 20)
    mx.eval(block)
    t = seconds(lambda v, *_: v + 1, block, 1)
    print(f"copy {block.nbytes / 1e9:.1f} GB: {2 * block.nbytes / t / 1e9:.0f} GB/s read and written")
    del block
    worst = 0.0
    for name, shapes in SHAPES.items():
        if options.only in (None, name):
            for n, k in (shape for shape in shapes if options.rows in (None, shape[0])):
                worst = max(worst, measure(name, n, k, options.tokens, launcher, options.tune, options.as_decoded))
    for n, k in LARGE[: 0 if options.tune else 2]:
        stock(n, k)
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
