"""Products of many rows: the kernel that expands a tile, run by the Metal simulator, and what is built on it.

Held to numpy in double precision. The products round x and their results to fp16, the CPU its sums too: 2e-3 of the
norm.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import DTYPES, check, exact, metal, racing, random, weight
from recorded import KINDS, kl, path, prompts

from mlx_gemma4 import load
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops import expand, grouped, halve, many_rows, stock
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.op import OpKey
from mlx_gemma4.ops.routing import Routing
from mlx_gemma4.quant.formats import FORMATS, Packed


def near(got: mx.array, want: np.ndarray, limit: float = 2e-3) -> None:
    assert got.shape == want.shape
    error = np.linalg.norm(exact(got) - want) / np.linalg.norm(want)
    assert error <= limit, f"relative error {error:.1e}"


@pytest.mark.parametrize("name", FORMATS)
def test_expand_gives_the_numbers_bit_for_bit(name: str) -> None:
    for shape in ((8, 256), (9, 768), (2, 5, 512)):
        w, values = weight(name, *shape)
        assert np.array_equal(exact(expand.expand(metal, w, mx.float32)), values)


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.layout.size == 32])
@pytest.mark.parametrize("k", [32, 96, 704])
def test_expand_rows_of_any_32s(name: str, k: int) -> None:
    w, values = weight(name, 9, k)
    assert np.array_equal(exact(expand.expand(metal, w, mx.float32)), values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0"])
def test_expand_into_any_float(name: str, dtype: mx.Dtype) -> None:
    w, _ = weight(name, 9, 256)
    check(expand.expand(metal, w, dtype), expand.expand_reference(w, dtype), dtype)


def test_expand_races_and_bounds() -> None:
    w, values = weight("Q3_K", 4, 768)
    assert np.array_equal(exact(expand.expand(racing, w, mx.float32)), values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [8, 264, 2304, 5376])
def test_rows_become_halves(k: int, dtype: mx.Dtype) -> None:
    """To the bit, rows of zeros, of tiny and of huge numbers too."""
    sizes = mx.array([1.0, 0.0, 1e-6, 1e4, 2.0, 4.0])[:, None]
    x = (random(3, 6, k) * sizes).astype(dtype)
    got, want = halve.halve(metal, x), halve.halve_reference(x)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and mx.array_equal(a, b)
    assert mx.abs(got[0]).max() < 2


def test_halves_have_no_race() -> None:
    x = random(4, 2, 2304)
    for a, b in zip(halve.halve(racing, x), halve.halve_reference(x), strict=True):
        assert mx.array_equal(a, b)


@pytest.mark.parametrize(("name", "n", "k"), [("Q4_K", 517, 512), ("Q6_K", 33, 256), ("Q5_0", 300, 704)])
def test_linear_in_tiles(name: str, n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w, values = weight(name, n, k)
    x = random(1, 19, k)
    for size in (many_rows.TILE, 1 << 12):
        monkeypatch.setattr(many_rows, "TILE", size)
        near(many_rows.linear(metal, x, w), exact(x) @ values.T)


def test_linear_of_magnitudes_that_fp16_has_not() -> None:
    """Rows from 1e-20 to 1e20 are each as exact as the others; a row of zeros gives zeros."""
    w, values = weight("Q4_K", 40, 256)
    x = random(2, 6, 256) * mx.array([1e-20, 1e-6, 1.0, 1e6, 1e20, 0.0])[:, None]
    got = many_rows.linear(metal, x, w)
    for row, want in zip(got, exact(x) @ values.T, strict=True):
        if want.any():
            near(row, want)
        else:
            assert not exact(row).any()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_linear_of_unpacked_weights(dtype: mx.Dtype) -> None:
    """x keeps its precision, whatever the weight's is."""
    w, x = random(3, 70, 96, dtype=dtype), random(4, 20, 96)
    near(many_rows.linear(metal, x, w), exact(x) @ exact(w).T)


def through_experts(x: mx.array, values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """[T, E', N], in double precision."""
    each = np.broadcast_to(exact(x), (*chosen.shape, x.shape[-1]))
    return np.stack(
        [[values[e] @ row for e, row in zip(*token, strict=True)] for token in zip(chosen, each, strict=True)]
    )


@pytest.mark.parametrize("each", [False, True], ids=["one input", "an input each"])
@pytest.mark.parametrize("name", FORMATS)
def test_experts(name: str, each: bool) -> None:
    """Expert 3 of 6 is chosen by nobody, expert 5 by all; rows of W fill no threadgroup."""
    k = max(FORMATS[name].layout.size, 32) * (2 if FORMATS[name].layout.size > 32 else 5)
    w, values = weight(name, 6, 40, k)
    others = np.random.default_rng(0).choice([0, 1, 2, 4], 23)
    chosen = np.stack([others, np.full(23, 5)], axis=1)
    x = random(5, 23, 2 if each else 1, k)
    want = through_experts(x, values, chosen)
    near(grouped.grouped(metal, x, w, Routing(mx.array(chosen), 6)), want)
    near(many_rows.few_expert_rows(metal, x, w, mx.array(chosen)), want)


@pytest.mark.parametrize(
    "counts",
    [[0, 0, 70, 0, 0, 0], [16, 17, 15, 16, 1, 0], [63, 64, 65, 128, 129, 1]],
    ids=["all to one", "no tile full", "about full tiles"],
)
@pytest.mark.parametrize("glu", [False, True], ids=["plain", "gate and up"])
def test_experts_of_any_counts(counts: list[int], glu: bool) -> None:
    """Rows in any order; over 128 rows of W, of which the last threadgroup has few."""
    w, values = weight("Q5_0", 6, 140, 96)
    chosen = np.random.default_rng(0).permutation(np.repeat(np.arange(6), counts)).reshape(-1, 1)
    x = random(5, len(chosen), 1, 96)
    want = through_experts(x, values, chosen)
    if glu:
        want = exact(stock.geglu(*(mx.array(half.astype(np.float32)) for half in np.split(want, 2, axis=-1))))
    near(grouped.grouped(metal, x, w, Routing(mx.array(chosen), 6), glu), want)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_experts_of_unpacked_weights(dtype: mx.Dtype) -> None:
    w, x = random(3, 6, 40, 96, dtype=dtype), random(4, 30, 1, 96)
    chosen = np.stack([np.arange(30) % 6, np.arange(30) % 5], axis=1)
    near(grouped.grouped(metal, x, w, Routing(mx.array(chosen), 6)), through_experts(x, exact(w), chosen))


@pytest.mark.parametrize("name", ["Q4_K", "IQ4_NL"])
def test_experts_races_and_bounds(name: str) -> None:
    w, values = weight(name, 3, 140, 256)
    chosen = np.repeat([0, 2], [70, 7]).reshape(-1, 1)
    x = random(5, 77, 1, 256)
    near(grouped.grouped(racing, x, w, Routing(mx.array(chosen), 3)), through_experts(x, values, chosen))


def test_rows_of_any_magnitude_keep_their_scale_among_experts() -> None:
    w, values = weight("Q5_0", 6, 40, 160)
    chosen = np.stack([np.arange(24) % 6, np.arange(24) % 5], axis=1)
    x = random(2, 24, 1, 160) * mx.array([1e-20, 1e-6, 1.0, 1e6, 1e20, 3.0] * 4)[:, None, None]
    got = grouped.grouped(metal, x, w, Routing(mx.array(chosen), 6))
    for row, want in zip(got, through_experts(x, values, chosen), strict=True):
        near(row, want)


@pytest.mark.parametrize("rows", [1, 4, 5, 9])
def test_few_rows(rows: int) -> None:
    w, values = weight("Q4_K", 40, 256)
    x = random(6, rows, 256)
    near(many_rows.few_linear(metal, x, w), exact(x) @ values.T)


def test_fused_geglu_is_the_reference_on_a_cpu() -> None:
    gate, up = random(8, 3, 50), random(9, 3, 50)
    assert mx.array_equal(stock.fused_geglu(gate, up), stock.geglu(gate, up))


def test_supports() -> None:
    w, _ = weight("Q4_0", 1, 32)  # planes of less than 8 elements are not in device memory
    assert not many_rows.supports(w)
    assert many_rows.supports(weight("Q4_0", 1, 2048)[0])
    assert many_rows.supports(random(0, 2, 8, dtype=mx.bfloat16))
    assert not many_rows.supports(random(0, 2, 8))  # MLX multiplies fp32 as it is


@pytest.mark.parametrize(
    ("kind", "tag"), [(kind, "q4_k_m") for kind in KINDS] + [("31b", "rare"), ("26b-a4b", "split-mix"), ("e4b", "ud")]
)
def test_a_prompt_in_tiles_gives_the_stock_logits(kind: str, tag: str, tmp_path: Path) -> None:
    """Prompts of 7 rows (mat-vecs) and 45 (tiles), all logits."""
    plain = load(path(kind, tag, tmp_path), weights="packed").model
    fast = Model(plain.config, plain.weights, Kernels(metal))
    for prompt in (prompts(kind)[0], prompts(kind)[-1]):
        want, got = (
            np.array(model.forward(mx.array(prompt), model.new_state(), all_logits=True)) for model in (plain, fast)
        )
        assert kl(want, got) <= 1e-4


def test_a_tile_that_fails_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(**_: object) -> object:
        raise RuntimeError("no compiler")

    plain = load(path("12b", "q4_k_m", tmp_path), weights="packed").model
    w = next(w for layer in plain.weights.layers if isinstance(w := layer.ffn_down, Packed))
    x = random(7, 40, w.shape[-1])
    run = Kernels(broken)
    assert mx.array_equal(run.linear(x, w), Kernels(metal, frozenset([OpKey("expand"), OpKey("matvec")])).linear(x, w))
    assert run.off == {OpKey("expand", w.format.name)}
    assert "no compiler" in caplog.text
