"""Times products of many rows (a prompt's) on this machine's GPU, by tiles and by mat-vecs, one checked by the other.

    python benchmarks/products.py

In: nothing; random weights are made here. Out: for weights of 31B and for the experts of 26B-A4B, milliseconds by
number of rows; where the columns cross, `tiles.MANY_ROWS` belongs. The exit code is 1 if they differ by over 2e-3.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import mlx.core as mx

from kernels import random_weight
from mlx_gemma4 import tiles
from mlx_gemma4.doctor import MLX
from mlx_gemma4.kernels import Maker, default_maker
from mlx_gemma4.quant import Packed
from mlx_gemma4.routing import Routing

LIMIT = 2e-3
SHAPES = (("Q4_K", 43008, 5376), ("Q6_K", 5376, 21504), ("Q4_K", 16384, 5376))
ROWS = (4, 8, 16, 32, 64, 512, 1024, 2048)
EXPERTS = (("Q4_K", 128, 1408, 2816), ("Q5_0", 128, 2816, 704))
FEW = 64  # rows up to which mat-vecs are timed


def milliseconds(call: Callable[[], mx.array], times: int = 5) -> float:
    """Time of one call among several in a row; the median of three runs."""

    def run() -> float:
        start, done = time.perf_counter(), call()
        for _ in range(times - 1):
            done = mx.depends([call()], [done])[0]
        mx.eval(done)
        return (time.perf_counter() - start) / times * 1e3

    run()
    return median(run() for _ in range(3))


def report(name: str, rows: int, by_tiles: Callable[[], mx.array], by_rows: Callable[[], mx.array] | None) -> float:
    """One line; gives how far the two are apart."""
    line = f"{name:22} {rows:5} rows   tiles {milliseconds(by_tiles):8.3f} ms"
    apart = 0.0
    if by_rows:
        a, b = by_tiles(), by_rows()
        apart = float(mx.linalg.norm(a - b) / mx.linalg.norm(b))
        line += f"   mat-vecs {milliseconds(by_rows):8.3f} ms   apart {apart:.1e}"
    print(line, flush=True)
    return apart


def plain(name: str, n: int, k: int, maker: Maker) -> float:
    w, worst = random_weight(name, n, k), 0.0
    for rows in ROWS:
        x = mx.random.normal((rows, k))
        few = partial(tiles.few_rows, x, w, maker) if rows <= FEW else None
        apart = report(f"{name} {n} x {k}", rows, partial(tiles.linear, x, w, maker), few)
        worst = max(worst, apart)
    return worst


def experts(name: str, e: int, n: int, k: int, maker: Maker) -> float:
    """Eight of the experts for each row."""
    flat, worst = random_weight(name, e * n, k), 0.0
    planes = (None if a is None else a.reshape(e, n, *a.shape[1:]) for a in (flat.codes, flat.sub, flat.super))
    codes, sub, top = planes
    assert codes is not None
    w = Packed(flat.format, (e, n, k), codes, sub, top)
    for rows in ROWS:
        x, chosen = mx.random.normal((rows, 1, k)), mx.argsort(mx.random.normal((rows, e)), axis=-1)[:, :8]
        few = (lambda x=x, c=chosen: tiles.few_expert_rows(x, w, c, maker)) if rows <= FEW else None
        many = lambda x=x, c=chosen: tiles.expert_linear(x, w, Routing(c, e), maker)  # noqa: E731
        worst = max(worst, report(f"{name} {e} x {n} x {k}", rows, many, few))
    return worst


def main() -> int:
    maker = default_maker()
    if maker is None:
        print("no GPU: the kernels run on Metal, or on NVIDIA with MLX's cuda extra", file=sys.stderr)
        return 2
    print(f"MLX {MLX}, {mx.device_info().get('device_name', 'GPU')}")
    worst = max(plain(*shape, maker) for shape in SHAPES)
    worst = max([worst, *(experts(*shape, maker) for shape in EXPERTS)])
    print(f"largest peak of memory: {mx.get_peak_memory() / 1e9:.2f} GB")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
