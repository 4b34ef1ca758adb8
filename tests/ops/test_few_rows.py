"""Products of a few rows on the Metal simulator, as Metal and as CUDA see the text, against numpy in double precision.

x is exact in fp16 here but where it says so. Then k-quants without wide scales are exact up to fp32's sums, and other
weights are rounded to fp16 once: 1e-6 and 5e-4 of the result, as norms.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import as_cuda, exact, metal, racing, random, weight

from mlx_gemma4.gpu.recording import Arena, Recording, recorded, recorder
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.epilogue import FP32, PLAIN, Epilogue, Folded, product_reference
from mlx_gemma4.ops.few_rows import MAX_ROWS, RowsTiling, few_rows, rows_tiling
from mlx_gemma4.ops.halve import halve, halve_reference
from mlx_gemma4.ops.routing import route, route_reference
from mlx_gemma4.ops.tuning import Tuning
from mlx_gemma4.quant.formats import FORMATS

LAUNCHERS = pytest.mark.parametrize("launcher", [metal, as_cuda], ids=["metal", "cuda"])
EXACT = {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "MXFP4", "NVFP4", "Q2_0", "TQ2_0"} | {n for n, f in FORMATS.items() if f.rule}
TILINGS = [  # by turns, so that every kind of tiling meets several formats; the rows of x that go with each
    (RowsTiling(1, 2), 3),
    (RowsTiling(2, 1), 13),
    (RowsTiling(1, 3), 31),
    (RowsTiling(3, 2), 8),
    (RowsTiling(4, 2), 16),
    (RowsTiling(2, 3), 27),
]

AHEAD = [(RowsTiling(2, 2, ahead=True), 5), (RowsTiling(1, 2, ahead=True), 13), (RowsTiling(3, 1, True, ahead=True), 2)]
PARTS = [(RowsTiling(2, 2, parts=3), 4), (RowsTiling(1, 1, parts=2, ahead=True), 13), (RowsTiling(3, 2, parts=4), 2)]
RACING_CUDA = partial(as_cuda, base=racing)


def near(got: mx.array, want: np.ndarray, limit: float = 5e-4) -> None:
    assert got.shape == want.shape
    error = np.linalg.norm(exact(got) - want) / np.linalg.norm(want)
    assert error <= limit, f"relative error {error:.1e}"


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


@LAUNCHERS
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, launcher: Any) -> None:
    """Rows that fill no block, lengths that fill no step."""
    turn = list(FORMATS).index(name) * 2 + (launcher is metal)
    w, values = weight(name, 37, 352 // size * size if (size := FORMATS[name].layout.size) < 256 else 768)
    for config, rows in (TILINGS[turn % 6], TILINGS[(turn + 3) % 6]):
        x = random(1, rows, w.shape[-1], dtype=mx.float16)
        got = few_rows(launcher, x, w, FP32, config=config)
        near(got, exact(x) @ values.T, 1e-6 if name in EXACT else 5e-4)


@pytest.mark.parametrize(("config", "rows"), TILINGS)
def test_tilings(config: RowsTiling, rows: int) -> None:
    """A type with mins under each; results in fp16."""
    w, values = weight("Q4_K", 69, 1280)
    x = random(2, rows, 1280, dtype=mx.float16)
    near(few_rows(metal, x, w, config=config), exact(x) @ values.T)


@LAUNCHERS
@pytest.mark.parametrize("name", [name for name, f in FORMATS.items() if f.scale_block == 256 and not f.rule])
def test_scales_before_the_product(name: str, launcher: Any) -> None:
    """Scales and mins go into weights, which are rounded to fp16."""
    w, values = weight(name, 69, 768)
    for config, rows in ((RowsTiling(4, 2, True), 31), (RowsTiling(2, 1, True), 16)):
        x = random(8, rows, 768, dtype=mx.float16)
        near(few_rows(launcher, x, w, FP32, config=config), exact(x) @ values.T)


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_step_reads_comes_a_step_ahead(name: str) -> None:
    """On CUDA, over several steps, the last of which some simdgroups don't have."""
    turn, size = list(FORMATS).index(name), FORMATS[name].layout.size
    w, values = weight(name, 37, 1376 // size * size if size < 256 else 1280)
    config, rows = AHEAD[turn % 3]
    x = random(1, rows, w.shape[-1], dtype=mx.float16)
    got = few_rows(as_cuda, x, w, FP32, config=config)
    near(got, exact(x) @ values.T, 1e-6 if name in EXACT and not config.fold else 5e-4)


@LAUNCHERS
@pytest.mark.parametrize(("config", "rows"), PARTS)
def test_parts(config: RowsTiling, rows: int, launcher: Any) -> None:
    """Threadgroups that share rows leave sums of their own, also where one has nothing to do."""
    for name, k in (("Q4_K", 1280), ("Q6_K", 512), ("Q8_0", 352)):
        w, values = weight(name, 69, k)
        x = random(2, rows, k, dtype=mx.float16)
        got = few_rows(launcher, x, w, FP32, config=config)
        assert got.shape == (config.parts, rows, 69)
        near(got.sum(axis=0), exact(x) @ values.T)


@LAUNCHERS
@pytest.mark.parametrize(("name", "k"), [("Q4_K", 2816), ("Q6_K", 5376), ("Q5_0", 704), ("Q8_0", 2112), ("Q5_1", 96)])
def test_lengths_of_real_rows(name: str, k: int, launcher: Any) -> None:
    """In the tiling that is chosen; 704, 2112 and 96 are no multiples of 128."""
    w, values = weight(name, 33, k)
    for rows in (2, 9):
        x = random(3, rows, k, dtype=mx.float16)
        near(few_rows(launcher, x, w, FP32), exact(x) @ values.T)


@LAUNCHERS
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_gate_up_under_a_norm(name: str, dtype: mx.Dtype, launcher: Any) -> None:
    """RMSNorm, gate and up, GEGLU, a factor: rows from 1e-4 to 3e5, which fp16 has not, become halves first."""
    w, values = weight(name, 2 * 35, 512)
    x = (random(4, 5, 512) * mx.array([[1e-2], [1.0], [30.0], [1e5], [3e5]])).astype(dtype)
    norm = mx.abs(random(5, 512)) * 20 + 0.5
    gate, up = np.split(rms(exact(x), exact(norm)) @ values.T / 20, 2, axis=-1)
    small = Epilogue(glu=True, factor=1 / 16, out=mx.float32)
    got = few_rows(launcher, x, w, small, Folded(norm / 20), config=RowsTiling(2, 2))
    near(got, gelu(gate) * up / 16, 2e-3)


@LAUNCHERS
def test_gelu_times(launcher: Any) -> None:
    """The gate of per-layer embeddings, from fp32: GELU, times the token's own embedding."""
    w, values = weight("Q5_K", 40, 512)
    x, times = random(9, 11, 512), random(10, 11, 40)
    got = few_rows(launcher, x, w, folded=Folded(times=times), config=RowsTiling(1, 2))
    near(got, gelu(exact(x) @ values.T) * exact(times), 1e-3)
    given = few_rows(launcher, (x / 16).astype(mx.float16), w, FP32._replace(given=1 / 16), Folded(times=times))
    near(given, gelu(exact(x) @ values.T) * exact(times), 1e-3)


@LAUNCHERS
def test_mins_meet_sums_that_fp16_has_not(launcher: Any) -> None:
    """Groups of x that sum up to 1e5, and to a thousandth of their numbers."""
    w, values = weight("Q4_K", 20, 512)
    x = np.array(random(6, 4, 512))
    x[0] = 3000
    x[1, ::2], x[1, 1::2] = 800.5, -800
    got = few_rows(launcher, mx.array(x).astype(mx.float16), w, FP32)
    for row, want in zip(got, exact(mx.array(x).astype(mx.float16)) @ values.T, strict=True):
        near(row, want, 1e-6)


def test_results_within_fp16() -> None:
    w, values = weight("Q8_0", 20, 64)
    x = random(7, 3, 64, dtype=mx.float16) * 20000
    want = exact(x) @ values.T
    assert np.abs(want).max() > 65504
    near(few_rows(metal, x, w), np.clip(want, -65504, 65504))


def choose(tokens: int, experts: int, used: int) -> np.ndarray:
    rng = np.random.default_rng(tokens)
    return np.stack([rng.permutation(experts)[:used] for _ in range(tokens)]).astype(np.int32)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "launcher"), [("Q4_K", metal), ("Q5_0", as_cuda), ("IQ4_NL", metal)])
def test_experts(name: str, launcher: Any) -> None:
    """Expert 0 has more rows than a tile, most have few; one input for all experts of a token, and one for each."""
    k = 256 if name == "Q4_K" else 160
    w, values = weight(name, 12, 2 * 20, k)
    chosen = choose(13, 12, 3)
    chosen[:11, 1] = 0
    ids = mx.array(chosen)
    for shape in ((13, k), (13, 3, k)):
        x = random(5, *shape, dtype=mx.float16)
        each = exact(x) if len(shape) == 3 else np.broadcast_to(exact(x)[:, None], (13, 3, k))
        want = np.einsum("tenk,tek->ten", values[chosen], each)
        near(few_rows(launcher, x, w, FP32, Folded(ids=ids), config=RowsTiling(1, 2)), want)
        gate, up = np.split(want, 2, axis=-1)
        got = few_rows(launcher, x, w, Epilogue(glu=True), Folded(ids=ids), config=RowsTiling(2, 1))
        near(got, gelu(gate) * up, 1e-3)
        times = random(6, 13, 3, 40, dtype=mx.float16)
        near(few_rows(launcher, x, w, PLAIN, Folded(ids=ids, times=times)), gelu(want) * exact(times), 1e-3)


def test_experts_under_a_norm() -> None:
    w, values = weight("Q4_K", 6, 24, 256)
    chosen, norm = choose(3, 6, 2), mx.abs(random(8, 256)) + 0.5
    x = random(7, 3, 256) * 1e5
    want = np.einsum("tenk,tk->ten", values[chosen], rms(exact(x), exact(norm)))
    near(few_rows(metal, x, w, FP32, Folded(norm, ids=mx.array(chosen))), want)


@pytest.mark.parametrize(("tokens", "experts", "used"), [(2, 128, 8), (32, 128, 8), (32, 9, 4), (1, 5, 1), (100, 7, 7)])
def test_route(tokens: int, experts: int, used: int) -> None:
    """Every row in one tile of its expert, as the reference has them."""
    chosen = choose(tokens, experts, used)
    order, tiles = (np.array(a) for a in route(metal, mx.array(chosen), experts))
    want_order, want_tiles = (np.array(a) for a in route_reference(mx.array(chosen), experts))
    assert sorted(order) == list(range(chosen.size))
    assert (chosen.reshape(-1)[order] == chosen.reshape(-1)[want_order]).all()
    full = tiles[:, 1] < tiles[:, 2]
    assert (full == (want_tiles[:, 1] < want_tiles[:, 2])).all()
    assert (tiles[full] == want_tiles[full]).all() and not tiles[~full].any()


@pytest.mark.parametrize("k", [264, 2816])
def test_halves_of_normalised_rows(k: int) -> None:
    x, norm = random(3, 5, k) * mx.array([[1e-6], [1.0], [0.0], [300.0], [1e5]]), random(4, k) * 50
    got, want = halve(metal, x, norm), halve_reference(x, norm)
    assert mx.abs(got[0]).max() < 2 and mx.array_equal(got[0], want[0])
    near(got[1], exact(want[1]), 1e-6)
    near((got[0] * got[1])[1], rms(exact(x), exact(norm))[1])


@pytest.mark.parametrize("name", ["Q4_K", "IQ4_XS", "Q6_K"])
def test_races_and_bounds(name: str) -> None:
    """Sums are added up in threadgroup memory, tables lie there."""
    w, values = weight(name, 37, 512)
    x = random(5, 19, 512, dtype=mx.float16)
    near(few_rows(racing, x, w, FP32, config=RowsTiling(1, 2)), exact(x) @ values.T)
    few = few_rows(RACING_CUDA, x[:7], w, FP32, config=RowsTiling(1, 2, ahead=True))
    near(few, exact(x[:7]) @ values.T)


def test_routes_have_no_race() -> None:
    chosen = mx.array(choose(32, 12, 4))
    got, want = route(racing, chosen, 12), route_reference(chosen, 12)
    assert mx.array_equal(chosen.reshape(-1)[got[0]], chosen.reshape(-1)[want[0]])


def test_tilings_fit_threadgroup_memory() -> None:
    for fmt in FORMATS.values():
        for n, k in itertools.product((256, 1536, 2816, 5376, 43008, 262144), (96, 256, 704, 1536, 2112, 5376, 21504)):
            for rows, used in ((8, 0), (8, 8), (16, 0), (32, 0)):
                tiling = rows_tiling(fmt, n, k, rows, used, glu=True)
                assert tiling.room(rows, fmt) <= 32 << 10 and tiling.blocks % 2 == 0
                tiling = rows_tiling(fmt, n, k, rows, used)
                assert tiling.room(rows, fmt) <= 32 << 10
                assert tiling.split == 1 or 256 * tiling.split <= k + 255  # two steps or so
                early = rows_tiling(fmt, n, k, rows, used, added=True, gpu=Tuning(rows_parts=4, rows_ahead=True))
                assert early.room(rows, fmt) <= 48 << 10 and early.ahead == (rows == 8 and not used and fmt.bits <= 5)
                shares = early.split * early.parts
                assert early.parts == 1 or (rows == 8 and not used and n < 16896 and 256 * shares <= k + 255)


@pytest.mark.parametrize("rows", [1, 2, 5, MAX_ROWS, MAX_ROWS + 1])
def test_dispatch(rows: int) -> None:
    """Any number of rows: the mat-vec, this kernel, or stock operations."""
    run = Kernels(metal, strict=True)
    w, _ = weight("Q4_K", 40, 256)
    x = random(6, rows, 256, dtype=mx.float16)
    near(run.product(x, w, FP32), exact(product_reference(x, w, FP32)))
    near(run.linear(x, w), exact(product_reference(x, w, FP32)), 2e-3)
    experts, _ = weight("Q4_K", 6, 40, 256)
    folded = Folded(ids=mx.array(choose(rows, 6, 2)))
    near(run.product(x, experts, FP32, folded), exact(product_reference(x, experts, FP32, folded)))


def test_products_of_the_same_experts_sort_them_once() -> None:
    """Recorded, so that nothing but kernels touches what they make."""
    run, recording = Kernels(recorder, strict=True), Recording(Arena())
    w, down = weight("Q4_K", 6, 2 * 64, 256)[0], weight("Q5_0", 6, 256, 64)[0]
    ids = mx.array(choose(4, 6, 2))
    with recorded(recording):
        x = recording.buffer((4, 256), mx.float32)
        small = Epilogue(glu=True, out=mx.float16)
        h: Any = run.product(x, w, small, Folded(mx.ones(256), ids=ids))  # type: ignore[arg-type]
        out = run.product(h, down, FP32, Folded(ids=ids))
    assert h.shape == (4, 2, 64) and out.shape == (4, 2, 256)
    assert [launch.kernel.name.rsplit("_", 1)[0] for launch in recording.launches] == [
        "route",
        "halve",
        "few_rows",
        "few_rows",
    ]
