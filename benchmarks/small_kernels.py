"""Holds each kernel beside the mat-vecs to its twin on this machine's GPU, at the models' real shapes, and times it.

    python benchmarks/small_kernels.py [--tune] [--only NAME]

In: nothing; random numbers are made here. Out: a table (kernel, shape, error, time of a launch, GB/s); the exit code
is 1 if an error is over its limit. Times are of launches that wait for each other, so a small kernel's is mostly the
launch; GB/s counts what must be read and written once. `--tune` tries other cuts of attention.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from statistics import median
from typing import Any

os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "20")  # the GPU begins while the host still hands over the rest

import mlx.core as mx
import numpy as np

from mlx_gemma4 import attention as att
from mlx_gemma4 import fused, quant
from mlx_gemma4.doctor import MLX
from mlx_gemma4.gguf_file import TENSOR_TYPES
from mlx_gemma4.kernels import default_maker
from mlx_gemma4.segments import Layout

HALF, FLOAT, BFLOAT, INT = mx.float16, mx.float32, mx.bfloat16, mx.int32
LIMITS = {FLOAT: 1e-5, HALF: 1e-3, BFLOAT: 8e-3}  # bf16: one unit in the last place


@dataclass(frozen=True)
class Case:
    """One kernel at one shape: `call` and `twin` take the first input, the others are bound."""

    name: str
    shape: str
    first: mx.array
    call: Callable[[mx.array], Any]
    twin: Callable[[mx.array], Any]
    nbytes: int
    limit: float
    launches: int = 200
    defined: Callable[[list[mx.array]], list[mx.array]] = list  # what of the results is to be compared


def normal(*shape: int, dtype: mx.Dtype = FLOAT) -> mx.array:
    return mx.random.normal(shape).astype(dtype)


def arrays(result: Any) -> list[mx.array]:
    return [a for a in (result if isinstance(result, tuple) else (result,)) if a is not None]


def error(case: Case) -> float:
    """Largest difference, relative to the largest value. Integers must be equal."""
    worst = 0.0
    pairs = (case.defined(arrays(f(case.first))) for f in (case.call, case.twin))
    for got, want in zip(*pairs, strict=True):
        a, b = (np.array(x.astype(FLOAT)).astype(np.float64) for x in (got, want))
        difference = np.abs(a - b).max() / np.abs(b).max() if got.dtype != INT else float((a != b).any())
        worst = max(worst, difference if np.isfinite(difference) else np.inf)
    return worst


def seconds(case: Case) -> float:
    """Time of one launch among many, each of which waits for the one before."""

    @mx.compile  # traced, as a decode step is: else building each launch takes the host longer than the kernel runs
    def chain(first: mx.array) -> list[mx.array]:
        done = arrays(case.call(first))
        for _ in range(1, case.launches):
            done = arrays(case.call(mx.depends([first], done)[0]))
        return done

    def run() -> float:
        start = time.perf_counter()
        mx.eval(chain(case.first))
        return (time.perf_counter() - start) / case.launches

    run()
    return median(run() for _ in range(5))


# ---------------------------------------------------------------- cases


def attention_case(
    name: str,
    maker: Any,
    heads: tuple[int, int],
    dim: int,
    parts: list[Any],
    *,
    tokens: int = 1,
    dtype: mx.Dtype = HALF,
    window: int = 0,
    cut: att.Cut | None = None,
    cold: bool = False,
) -> Case:
    """Attention over parts, lengths or (capacity, start, end); `cold`: copies take turns, so that no cache has them."""
    h, g = heads
    sizes = [p if isinstance(p, tuple) else (p, 0, p) for p in parts]
    made = [(normal(g, n, dim, dtype=dtype), normal(g, n, dim, dtype=dtype)) for n, _, _ in sizes]
    nbytes = sum(2 * g * (end - start) * dim * dtype.size for _, start, end in sizes)
    launches = 50
    copies = [made]
    if cold:  # of 300 MB, six times an H100's cache, where that doesn't take too many
        copies += [[(k * 1, v * 1) for k, v in made] for _ in range(min(199, int(300e6 / nbytes)))]
        launches = max(launches, len(copies))
    spans = mx.array([[start, end] for _, start, end in sizes], INT)
    q = normal(tokens, h, dim, dtype=dtype) * 0.2
    mx.eval(copies, spans, q)
    scale = 0.5 if dim == 256 else 0.3
    turn = itertools.cycle(copies)

    def call(q: mx.array) -> Any:
        return att.attention(q, next(turn), spans, maker, scale=scale, window=window, cut=cut)

    def twin(q: mx.array) -> mx.array:
        return att.attention_twin(q, made, spans, scale=scale, window=window)

    total = sum(end - start for _, start, end in sizes)
    shape = f"{h}/{g} heads of {dim}, {total} in {len(sizes)}" + f", T={tokens}" * (tokens > 1) + ", cold" * cold
    return Case(name, f"{shape}, {dtype_name(dtype)}", q, call, twin, nbytes, LIMITS[dtype], launches)


def decode_parts(length: int, window: int = 0) -> list[Any]:
    """Parts of a state that holds `length` tokens, as a decode step's attention sees them."""
    layout = Layout()
    sealed = (length - 1) // layout.tail * layout.tail
    first, start, parts = max(0, length - window) if window else 0, 0, []
    for end in layout.sliding_ends(sealed, window) if window else layout.ends(sealed):
        if end > first:
            parts.append((end - start, max(0, first - start), end - start))
        start = end
    return [*parts, (layout.tail, 0, length - sealed)]


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def attention_cases(maker: Any) -> Iterator[Case]:
    for lengths in ([32768 - 64, 64], [8192 - 64, 64], [2048 - 64, 64], [8192, 8192, 8192, 4096, 2048, 1024, 960, 64]):
        yield attention_case("attention 31B global", maker, (32, 4), 512, lengths)
    yield attention_case("attention 31B sliding", maker, (32, 16), 256, [1024 - 40, 64], window=1024)
    yield attention_case("attention 12B global", maker, (16, 1), 512, [32768 - 64, 64])
    yield attention_case("attention 26B global", maker, (16, 2), 512, [32768 - 64, 64])
    yield attention_case("attention E4B global", maker, (8, 2), 512, [32768 - 64, 64])
    yield attention_case("attention E2B global", maker, (8, 1), 512, [8192 - 64, 64])
    yield attention_case("attention E2B sliding", maker, (8, 1), 256, [448, 64], window=512)
    yield attention_case("attention E4B sliding", maker, (8, 2), 256, [448, 64], window=512)
    yield attention_case("attention 31B global", maker, (32, 4), 512, [8192 - 64, 64], dtype=BFLOAT)
    yield attention_case("attention 31B global", maker, (32, 4), 512, [8192 - 64, 64], dtype=FLOAT)
    yield attention_case("attention 31B global", maker, (32, 4), 512, [8192 - 64, 64], tokens=4)


Shape = tuple[str, tuple[int, int], int, int, int]
DECODE: tuple[Shape, ...] = (  # name, heads, their size, tokens, window
    ("31B sliding", (32, 16), 256, 5000 - 33, 1024),
    ("E2B sliding", (8, 1), 256, 5000 - 33, 512),
    *(("31B global", (32, 4), 512, n - 33, 0) for n in (512, 2048, 8192, 32768)),
    *(("E2B global", (8, 1), 512, n - 33, 0) for n in (2048, 8192)),
)


def decode_case(maker: Any, shape: Shape, cut: att.Cut | None = None) -> Case:
    name, heads, dim, length, window = shape
    name = f"decode {name} {length}" if cut is None else f"{name} {length} {astuple(cut)}"
    return attention_case(name, maker, heads, dim, decode_parts(length, window), window=window, cut=cut, cold=True)


def decode_cases(maker: Any) -> Iterator[Case]:
    for shape in DECODE:
        yield decode_case(maker, shape)


def tuning_cases(maker: Any) -> Iterator[Case]:
    """The cuts are (rows, simdgroups, keys, threadgroups)."""
    sliding = [(2, 4, 4), (2, 4, 2), (2, 2, 4), (2, 8, 2), (2, 8, 4), (1, 4, 4)]
    narrow = [
        (2, 4, 2),
        (1, 4, 2),
        (2, 4, 1),
        (1, 4, 1),
        (4, 4, 2),
        (4, 4, 1),
        (8, 4, 2),
        (2, 8, 1),
        (2, 2, 2),
        (2, 4, 4),
    ]
    wide = [(8, 4, 2), (4, 4, 2), (4, 4, 4), (2, 4, 2), (2, 4, 4), (4, 8, 1), (8, 8, 1)]
    for shape in DECODE:
        name, _, dim, length, _ = shape
        cuts = (sliding if name[0] == "3" else narrow) if dim == 256 else wide
        counts: tuple[int, ...] = (384,)
        counts = (384, 768) if name == "31B sliding" else (264, 384, 512) if length > 4000 and dim == 512 else counts
        yield decode_case(maker, shape)
        for cut, threadgroups in itertools.product(cuts, counts):
            yield decode_case(maker, shape, att.Cut(*cut, threadgroups))


def qkv_cases(maker: Any) -> Iterator[Case]:
    for name, (h, g), dim, dtype in (
        ("31B sliding", (32, 16), 256, HALF),
        ("31B global", (32, 4), 512, HALF),
        ("31B global", (32, 4), 512, BFLOAT),
        ("E2B sliding", (8, 1), 256, HALF),
    ):
        wavelengths = mx.array([1e4 ** (2 * i / dim) for i in range(dim // 2)], FLOAT)
        rope = att.rotations_twin(mx.array([1234], INT), wavelengths, tokens=1)
        tail = (normal(g, att.TAIL, dim, dtype=HALF), normal(g, att.TAIL, dim, dtype=HALF))
        count = 32
        x = normal(1, (h + 2 * g) * dim, dtype=dtype)
        norms = (normal(dim), normal(dim))
        bound: tuple[Any, ...] = (None, None, *norms, rope, tail, mx.array([count], INT))
        mx.eval(x, bound)
        options = {"heads": h, "kv_heads": g, "eps": 1e-6, "dtype": HALF}

        def call(x: mx.array, bound: Any = bound, options: Any = options) -> Any:
            return att.qkv_post(x, *bound, maker, **options)  # type: ignore[call-arg]

        def twin(x: mx.array, bound: Any = bound, options: Any = options) -> Any:
            return att.qkv_post_twin(x, *bound, **options)

        def defined(made: list[mx.array], count: int = count) -> list[mx.array]:
            return [made[0], *(a[:, : count + 1] for a in made[1:])]

        nbytes = x.nbytes + h * dim * 2 + 4 * g * dim * 2 * count
        shape = f"{h}/{g} heads of {dim}, {count} in the tail, {dtype_name(dtype)}"
        yield Case(f"qkv_post {name}", shape, x, call, twin, nbytes, 5e-3, defined=defined)


def rotations_cases(maker: Any) -> Iterator[Case]:
    for dim in (256, 512):
        position, wavelengths = mx.array([1234], INT), mx.array([1e4 ** (2 * i / dim) for i in range(dim // 2)], FLOAT)
        mx.eval(position, wavelengths)

        def call(position: mx.array, wavelengths: mx.array = wavelengths) -> Any:
            return att.rotations(position, wavelengths, maker, tokens=1)

        def twin(position: mx.array, wavelengths: mx.array = wavelengths) -> Any:
            return att.rotations_twin(position, wavelengths, tokens=1)

        yield Case("rotations", f"a head of {dim}", position, call, twin, 3 * wavelengths.nbytes, LIMITS[HALF])


def norm_cases(maker: Any) -> Iterator[Case]:
    for name, k, dtype, experts in (
        ("31B", 5376, HALF, 0),
        ("31B", 5376, BFLOAT, 0),
        ("12B", 3840, FLOAT, 0),
        ("E2B", 1536, HALF, 0),
        ("26B experts", 2816, HALF, 8),
    ):
        x, h = normal(1, k) * 20, normal(1, k, dtype=dtype)
        w = [normal(k) for _ in range(4)]
        options: dict[str, Any] = {"eps": 1e-6, "next_norm": w[1], "scale": mx.array([0.5])}
        if experts:
            options["experts"] = (normal(1, experts, k, dtype=dtype), normal(1, experts) * 0.2, w[2], w[3])
        mx.eval(x, h, w, options)

        def call(x: mx.array, h: mx.array = h, w: Any = w, options: Any = options) -> Any:
            return fused.add_norm(x, h, w[0], maker, **options)

        def twin(x: mx.array, h: mx.array = h, w: Any = w, options: Any = options) -> Any:
            return fused.add_norm_twin(x, h, w[0], **options)

        nbytes = x.nbytes * 2 + h.nbytes * (2 + experts) + k * 4 * (4 if experts else 2)
        yield Case(f"add_norm {name}", f"{k}, {dtype_name(dtype)}", x, call, twin, nbytes, LIMITS[dtype])


def small_cases(maker: Any) -> Iterator[Case]:
    x, router, w = normal(1, 2816, dtype=HALF), normal(128, 2816), normal(2816)
    options: dict[str, Any] = {"norm": w, "factor": 2816**-0.5, "out": FLOAT}
    yield Case(
        *("dense router 26B", "128 x 2816 float32", x),
        lambda x: fused.dense(x, router, maker, **options),
        lambda x: fused.dense_twin(x, router, **options),
        *(router.nbytes, 1e-3),  # the twin's product is in TF32 on NVIDIA
    )
    proj, x2 = normal(8960, 1536, dtype=BFLOAT), normal(1, 1536, dtype=HALF)
    yield Case(
        *("dense per_layer_model_proj E2B", "8960 x 1536 bfloat16", x2),
        lambda x: fused.dense(x, proj, maker),
        lambda x: fused.dense_twin(x, proj),
        *(proj.nbytes, 2e-3),
    )
    scores, scale = normal(1, 128) * 3, normal(128)
    yield Case(
        *("top_k 26B", "8 of 128", scores),
        lambda s: fused.top_k(s, 8, maker, scale=scale),
        lambda s: fused.top_k_twin(s, 8, scale=scale),
        *(scores.nbytes, 1e-5),
    )
    for dtype in (HALF, FLOAT):
        logits = normal(1, 262144, dtype=dtype)
        yield Case(
            *("argmax", f"262144 {dtype_name(dtype)}", logits),
            lambda a: fused.argmax(a, maker),
            lambda a: fused.argmax_twin(a),
            *(logits.nbytes, 0.0),
        )


def table(name: str, rows: int, k: int) -> quant.Packed:
    """Random blocks; fp16 scales kept small."""
    kind = next(t for t in TENSOR_TYPES.values() if t.name == name)
    raw = np.random.default_rng(0).integers(0, 256, (rows * k // kind.block_size, kind.block_bytes), np.uint8)
    for at in quant.FORMATS[name].layout.super:
        raw[:, at : at + 2].view(np.float16)[:] = 0.01
    return quant.pack(raw.reshape(rows, -1), name, (rows, k))


def embedding_cases(maker: Any) -> Iterator[Case]:
    ids = mx.array([77], INT)
    for name in ("Q6_K", "Q4_0", "Q8_0"):
        rows = table(name, 100, 5376)

        def call(ids: mx.array, rows: Any = rows) -> Any:
            return fused.embed(ids, rows, 73.3, maker)

        def twin(ids: mx.array, rows: Any = rows) -> Any:
            return fused.embed_twin(ids, rows, 73.3)

        yield Case("embed 31B", f"5376 {name}", ids, call, twin, rows.nbytes // 100, 1e-5)
    rows, proj, norm = table("Q6_K", 100, 8960), normal(1, 8960, dtype=HALF), normal(256)
    yield Case(
        *("ple_inputs E2B", "35 x 256 Q6_K", ids),
        lambda ids: fused.ple_inputs(ids, proj, norm, rows, 0.025, maker, eps=1e-6),
        lambda ids: fused.ple_inputs_twin(ids, proj, norm, rows, 0.025, eps=1e-6),
        *(rows.nbytes // 100 + 2 * proj.nbytes, 1e-3),
    )


GROUPS = (attention_cases, decode_cases, qkv_cases, rotations_cases, norm_cases, small_cases, embedding_cases)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="try other cuts of attention, instead")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    maker = default_maker()
    if maker is None:
        print("small_kernels.py needs a GPU: MLX's default device here is a CPU", file=sys.stderr)
        return 2
    mx.random.seed(0)
    print(f"{mx.device_info().get('device_name', '?')}, MLX {MLX}, Python {platform.python_version()}")
    print(f"{'kernel':<52} {'shape':<48} {'error':>8} {'us':>8} {'GB/s':>7}")
    failed = 0
    for group in (tuning_cases,) if args.tune else GROUPS:
        for case in group(maker):
            if args.only not in case.name:
                continue
            try:
                e, s = error(case), seconds(case)
            except Exception as problem:  # a kernel that doesn't compile must not hide the others
                print(f"{case.name:<52} {case.shape:<48} FAILED: {str(problem)[:2000]}", flush=True)
                failed += 1
                continue
            bad = not e <= case.limit
            failed += bad
            numbers = f"{e:8.1e} {s * 1e6:8.1f} {case.nbytes / s / 1e9:7.0f}"
            print(f"{case.name:<52} {case.shape:<48} {numbers}{'  WRONG' * bad}", flush=True)
    print(f"{failed} failed" if failed else "all within their limits")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
