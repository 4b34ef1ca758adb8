"""Keys and values in codes: how near they come, what they take, and attention over them as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import DTYPES, check, metal, normal, racing
from kernel_models import both
from recorded import kl, prompts

from mlx_gemma4.errors import InputError
from mlx_gemma4.kv import quantization
from mlx_gemma4.ops import quantized_attention
from mlx_gemma4.ops.op import OpKey
from mlx_gemma4.ops.parts import span_rows
from mlx_gemma4.ops.quantize_kv import quantize_kv
from mlx_gemma4.ops.quantized_attention import QuantizedLaunchConfig

KINDS = tuple(quantization.BITS)


def cosines(a: mx.array, b: mx.array) -> np.ndarray:
    x, y = (np.array(v).astype(np.float64) for v in (a, b))
    return np.asarray((x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1)))


def back(quantized: quantization.QuantizedKV, rotation: mx.array, dim: int) -> tuple[mx.array, mx.array]:
    """Keys and values out of codes, turned back."""
    k, v = quantization.dequantize(quantized, rotation)
    return quantization.hadamard(k) * (rotation[0] * dim**-0.5), quantization.unrotate(v, rotation[1])


# ---------------------------------------------------------------- codes


@pytest.mark.parametrize(("kind", "least"), [("q8", 0.99997), ("tq4", 0.995)])
@pytest.mark.parametrize("dim", [256, 512])
def test_vectors_come_back(kind: str, least: float, dim: int) -> None:
    rotation, (k, v) = quantization.rotations(dim), (normal(1, 2, 1000, dim, seed=s) for s in (1, 2))
    for x, y in zip((k, v), back(quantization.quantize(k, v, rotation, kind), rotation, dim), strict=True):
        assert cosines(x, y).mean() > least
        assert cosines(x, y).min() > least - 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_any_vector_is_as_good_as_a_gaussian_one(kind: str) -> None:
    """One number that is all, equal numbers, a constant with one far out: the rotation spreads them."""
    dim = 512
    x = mx.concatenate([mx.eye(dim)[:40], mx.full((1, dim), 3.0), 1 + 100 * mx.eye(dim)[:9]])[None, None]
    rotation = quantization.rotations(dim)
    _, y = back(quantization.quantize(x, x, rotation, kind), rotation, dim)
    assert cosines(x, y).min() > {"q8": 0.9999, "tq4": 0.985}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_and_scores_are_kept_on_average(kind: str) -> None:
    dim, rotation = 256, quantization.rotations(256)
    x = normal(1, 1, 4000, dim) * mx.exp(normal(1, 1, 4000, 1, seed=3))
    _, y = back(quantization.quantize(x, x, rotation, kind), rotation, dim)
    along = np.array((x * y).sum(-1) / (x * x).sum(-1))
    assert abs(along - 1).max() < 2e-3


@pytest.mark.parametrize("kind", KINDS)
def test_zero_stays_zero(kind: str) -> None:
    zero, rotation = mx.zeros((1, 1, 3, 64)), quantization.rotations(64)
    for a in quantization.dequantize(quantization.quantize(zero, zero, rotation, kind), rotation):
        assert not mx.any(a).item()


@pytest.mark.parametrize(("kind", "dim", "size"), [("tq4", 512, 258), ("tq4", 256, 130), ("q8", 512, 514)])
def test_sizes(kind: str, dim: int, size: int) -> None:
    x = normal(1, 4, 64, dim)
    quantized = quantization.quantize(x, x, quantization.rotations(dim), kind)
    assert [a.dtype for a in quantized] == [mx.uint32, mx.float16]
    assert sum(a.nbytes for a in quantized) == 2 * 4 * 64 * size
    assert quantization.vector_bytes(kind, dim, mx.float16) == size


@pytest.mark.parametrize("kind", KINDS)
def test_a_vectors_codes_are_its_own(kind: str) -> None:
    """The same alone as among others, to the bit: segments may be joined, and cut, at will."""
    rotation, (k, v) = quantization.rotations(64), (normal(1, 2, 70, 64, seed=s) for s in (1, 2))
    whole = quantization.quantize(k, v, rotation, kind)
    for rows in (slice(0, 1), slice(5, 60), slice(69, 70)):
        for a, b in zip(whole, quantization.quantize(k[:, :, rows], v[:, :, rows], rotation, kind), strict=True):
            assert mx.array_equal(a[:, :, rows], b)


def test_the_rotation_is_the_same_everywhere() -> None:
    """Saved files depend on it."""
    assert (quantization.signs(64) < 0).nonzero()[0].tolist() == [
        0,
        1,
        2,
        3,
        4,
        7,
        9,
        10,
        16,
        17,
        18,
        19,
        21,
        22,
        23,
        26,
        27,
        29,
        31,
        36,
        37,
        39,
        40,
        43,
        44,
        46,
        47,
        48,
        50,
        51,
        52,
        54,
        55,
        56,
        57,
        58,
        62,
    ]
    assert [int((quantization.signs(dim) < 0).sum()) for dim in (256, 512)] == [135, 249]


def test_a_balance_changes_no_score() -> None:
    rotation = quantization.rotations(128, 1 + 0.5 * normal(128, seed=1), mx.abs(normal(128, seed=2)) * 9)
    q, k = normal(5, 128, seed=3), normal(7, 128, seed=4)
    rotated = quantization.rotate(q, rotation[0]) @ quantization.rotate_pair(k, k, rotation)[0].T
    np.testing.assert_allclose(np.array(rotated), np.array(q @ k.T), atol=2e-3)
    assert mx.array_equal(
        rotation[0][:64] * rotation[1][:64], rotation[0][64:] * rotation[1][64:]
    )  # alike for what RoPE rotations together


@pytest.mark.parametrize("kind", KINDS)
def test_what_keys_have_in_common_costs_nothing(kind: str) -> None:
    """Keys far from zero and near each other: relative to what tells them apart, codes are as good as ever."""
    center, x = 30 * normal(2, 64, seed=5), normal(1, 2, 500, 64)
    rotation = quantization.rotations(64, center=center)
    k, v = back(quantization.quantize(x + center[:, None], x, rotation, kind), rotation, 64)
    assert abs(cosines(k - center[:, None], x).mean() - cosines(v, x).mean()) < 1e-5


def test_an_unknown_kind_and_odd_heads_are_refused() -> None:
    with pytest.raises(InputError, match="none of full, q8, tq4"):
        quantization.check_kind("q2", {512})
    with pytest.raises(InputError, match="this model has 36"):
        quantization.check_kind("tq4", {36})
    quantization.check_kind("full", {36})


# ---------------------------------------------------------------- the kernel


def attend(
    kind: str,
    heads: tuple[int, int],
    dim: int,
    lengths: list[int],
    *,
    tokens: int = 1,
    tail: tuple[int, int] = (0, 5),
    dtype: mx.Dtype = mx.float16,
    out: mx.Dtype | None = None,
    launcher: Any = metal,
    config: QuantizedLaunchConfig | None = None,
    factor: float = 1.0,
    centered: bool = True,
    room: int = 64,
) -> None:
    """Attention over quantized parts of these lengths and a tail with rows first to last in use, the others NaN."""
    h, g = heads
    q, center = normal(tokens, h, dim, dtype=dtype, seed=1), normal(g, dim, seed=2) if centered else None
    rotation = quantization.rotations(dim, 1 + 0.3 * normal(dim), mx.ones(dim), center)
    pairs = [(normal(1, g, n, dim, seed=10 + i), normal(1, g, n, dim, seed=20 + i)) for i, n in enumerate(lengths)]
    quantized = [quantization.quantize(k, v, rotation, kind) for k, v in pairs]
    used, nan = ((mx.arange(room) >= tail[0]) & (mx.arange(room) < tail[1]))[:, None], mx.array(float("nan"), dtype)
    k, v = (mx.where(used, normal(1, g, room, dim, dtype=dtype, seed=s), nan) for s in (30, 31))
    rest = (rotation, (k, v), span_rows([tail]))
    kwargs: dict[str, Any] = {"scale": 1.3 * dim**-0.5 * factor, "out": out}
    got = quantized_attention.quantized_attention(launcher, q, quantized, *rest, config=config, **kwargs)
    # Queries and weights are halves in the products: as good as fp16, whatever q is.
    check(got, quantized_attention.quantized_attention_reference(q, quantized, *rest, **kwargs), mx.float16, factor)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", quantized_attention.DIMS)
def test_attention_head_sizes(kind: str, dim: int) -> None:
    attend(kind, (8, 1), dim, [200, 64])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_dtypes(kind: str, dtype: mx.Dtype) -> None:
    attend(kind, (4, 2), 128, [100], dtype=dtype)
    attend(kind, (4, 2), 128, [100], dtype=dtype, out=mx.float32)


@pytest.mark.parametrize("gqa", [1, 2, 3, 8, 16])
def test_attention_shares_codes_among_heads(gqa: int) -> None:
    attend("tq4", (2 * gqa, 2), 64, [130])
    attend("q8", (2 * gqa, 2), 64, [30], centered=False)


@pytest.mark.parametrize("tokens", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_of_few_tokens(kind: str, tokens: int) -> None:
    attend(kind, (16, 2), 128, [90, 64], tokens=tokens, tail=(0, 6))


@pytest.mark.parametrize("count", [1, 15, 16, 17, 63, 64, 65, 128])
def test_attention_lengths_at_the_edges(count: int) -> None:
    attend("q8", (2, 1), 64, [count])
    attend("tq4", (2, 1), 128, [count])


def test_attention_over_seven_parts() -> None:
    attend("tq4", (4, 1), 128, [256, 128, 64, 64, 64, 100, 40], tail=(40, 64))


@pytest.mark.parametrize(
    "config",
    [
        QuantizedLaunchConfig(1, 1, 3),
        QuantizedLaunchConfig(2, 2, 1),
        QuantizedLaunchConfig(4, 1, 7),
        QuantizedLaunchConfig(4, 2, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_configurations(kind: str, config: QuantizedLaunchConfig) -> None:
    attend(kind, (16, 1), 256, [300, 64], config=config)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_of_two_tiles_not_full(kind: str) -> None:
    """As the heads of 12B are over a long context, and a draft's tokens."""
    attend(kind, (6, 1), 512, [70], tokens=2, config=QuantizedLaunchConfig(4, 2, 1))


@pytest.mark.parametrize("tail", [(0, 3), (70, 300), (500, 512), (0, 512)], ids=str)
@pytest.mark.parametrize("dim", [64, 512])
def test_attention_over_a_tail_in_pieces(dim: int, tail: tuple[int, int]) -> None:
    """As a replayed step has it: most of its pieces are empty, in front or behind, or few are."""
    attend("tq4", (8, 1), dim, [100], tail=tail, room=512)
    attend("q8", (4, 2), dim, [40], tail=tail, room=512, tokens=3)


@pytest.mark.parametrize("pieces", [100, 300])
@pytest.mark.parametrize("dim", [64, 128, 512])
def test_attention_of_many_pieces(dim: int, pieces: int) -> None:
    """More than the merge asks for at once; most have no tokens."""
    simdgroups = min(4, dim // 64)
    attend("tq4", (2, 1), dim, [16 * simdgroups * 70], config=QuantizedLaunchConfig(simdgroups, 1, pieces))


def test_attention_of_scores_far_apart() -> None:
    """Scores in the tens: the running maximum must carry them."""
    attend("q8", (4, 1), 64, [300], factor=30.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 64, 256, 512])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centered", [False, True])
def test_encoding_in_a_kernel(kind: str, dim: int, dtype: mx.Dtype, centered: bool) -> None:
    """The reference's codes, but for numbers on the edge of two."""
    rotation = quantization.rotations(
        dim, 1 + 0.3 * normal(dim), mx.ones(dim), normal(2, dim, seed=9) if centered else None
    )
    k, v = (mx.concatenate([normal(1, 2, 9, dim, seed=s), mx.zeros((1, 2, 1, dim))], axis=2) for s in (1, 2))
    got = quantize_kv(metal, k.astype(dtype), v.astype(dtype), rotation, kind)
    want = quantization.quantize(k.astype(dtype), v.astype(dtype), rotation, kind)
    check(got[1], want[1], mx.float16)
    assert (np.array(got[0]) == np.array(want[0])).mean() > 0.99
    for a, b in zip(quantization.dequantize(got, rotation), quantization.dequantize(want, rotation), strict=True):
        assert (mx.abs(a - b).mean() / mx.abs(b).mean()).item() < 2e-3
        assert centered or not mx.any(a[:, :, 9:]).item()


@pytest.mark.sanitize
def test_no_races_and_no_access_out_of_bounds() -> None:
    attend("tq4", (8, 1), 256, [100, 64], tokens=2, launcher=racing)
    attend("q8", (4, 1), 128, [70], launcher=racing, tail=(70, 300), room=512)
    for kind in KINDS:
        quantize_kv(racing, normal(1, 1, 3, 64), normal(1, 1, 3, 64), quantization.rotations(64), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decode_step_in_kernels(kind: str, tmp_path: Path) -> None:
    """The kernels' logits are the stock operations', and near those in full precision."""
    plain, fused = both("12b", "q8_0", tmp_path)
    ids = (prompts("12b")[1] * 20)[:140]
    states = [model.new_state(kv=k) for model, k in ((plain, kind), (fused, kind), (plain, "full"))]
    for state in states:
        plain.prefill(mx.array(ids[:130]), state)
    for step in ([ids[130]], ids[131:133], [ids[133]]):
        made = [m.forward(mx.array(step), s) for m, s in zip((plain, fused, plain), states, strict=True)]
        stock, kernel, full = (np.array(logits)[None] for logits in made)
        few = len(step) > 1  # go into products as halves (few_rows), as a prompt's do
        assert np.abs(stock - kernel).max() <= (1e-2 if few else 2e-3)
        assert kl(stock, kernel) <= (1e-6 if few else 1e-7)
        assert kl(full, stock) <= {"q8": 1e-4, "tq4": 2e-2}[kind]
    assert fused.kernels is not None and OpKey("quantized_attention") not in fused.kernels.off
