"""Tokens drawn on the device: the kernels token for token as the reference, and both as the definitions have it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import DTYPES, metal, normal, racing

from mlx_gemma4.generation.sampling import Sampler, Sampling, choose
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.sample import LIKELIEST, MOST, SAMPLE, Draw, draws_of, likeliest, threefry

DRAWS = [
    LIKELIEST,
    Draw(0.8, seed=5),
    Draw(1.3, seed=5, softcap=4.0),
    Draw(1.0, 64, 0.95, seed=6),
    Draw(1.0, 64, 0.95, seed=6, position=1),
    Draw(1.5, MOST, 1.0, 0.01, seed=7),
    Draw(0.7, 1, seed=3),
    Draw(2.0, 3, 0.5, 0.1, seed=1 << 40 | 9, position=70_000, softcap=30.0),
    Draw(1e-38, 20, seed=8),
    Draw(1e-38, seed=8),
]
LOGITS = np.array([2.0, 1.5, 1.4, 0.2, -0.5, -3.0, 1.1, -0.1], np.float32)


def random_logits(rows: int, vocab: int, ties: bool) -> mx.array:
    x = np.random.default_rng([vocab, ties]).normal(0, 3, (rows, vocab)).astype(np.float32)
    return mx.array(np.round(x) if ties else x)


@pytest.mark.parametrize("ties", [False, True], ids=["apart", "ties"])
@pytest.mark.parametrize("vocab", [1, 5, 300, 2048, 2049, 9000])
def test_kernels_draw_what_the_reference_draws(vocab: int, ties: bool) -> None:
    """With ties many logits equal the k-th largest, and -0 equals 0."""
    logits, draws = random_logits(len(DRAWS), vocab, ties), draws_of(DRAWS)
    assert SAMPLE.kernel(metal, logits, draws).tolist() == SAMPLE.reference(logits, draws).tolist()


@pytest.mark.slow
def test_a_whole_vocabulary() -> None:
    logits, draws = random_logits(4, 262_144, False), draws_of(DRAWS[:4])
    assert SAMPLE.kernel(metal, logits, draws).tolist() == SAMPLE.reference(logits, draws).tolist()


def test_half_precision() -> None:
    logits, draws = random_logits(len(DRAWS), 3000, False).astype(mx.float16), draws_of(DRAWS)
    assert SAMPLE.kernel(metal, logits, draws).tolist() == SAMPLE.reference(logits, draws).tolist()


def greedy(logits: mx.array) -> list[int]:
    return SAMPLE.kernel(metal, logits, draws_of([LIKELIEST] * logits.shape[0])).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_greedy(dtype: mx.Dtype) -> None:
    for tokens, n in ((1, 1), (2, 1023), (3, 5000), (1, 40000)):
        logits = normal(tokens, n, dtype=dtype) * 8  # 16-bit logits are full of ties
        assert greedy(logits) == mx.argmax(logits, axis=-1).tolist()


def test_greedy_takes_the_lowest_of_equals() -> None:
    for n in (700, 9000):
        assert greedy(mx.full((1, n), -3.5)) == [0]
        logits = mx.zeros((1, n))
        logits[0, [n - 1, n // 2, n // 3]] = 2.0
        assert greedy(logits) == [n // 3]


@pytest.mark.parametrize("draw", [*DRAWS[:4], DRAWS[5]], ids=str)
def test_masked_tokens_are_not_drawn(draw: Draw) -> None:
    """Also where fewer tokens are left than top_k keeps."""
    logits = np.array(random_logits(6, 3000, False))
    left = np.arange(6)[:, None] * 400 + np.arange(0, 900, 300)
    masked = np.full_like(logits, -np.inf)
    np.put_along_axis(masked, left, np.take_along_axis(logits, left, 1), 1)
    draws = draws_of([draw._replace(softcap=0.0, position=i) for i in range(6)])
    got = SAMPLE.kernel(metal, mx.array(masked), draws).tolist()
    assert all(token in row for token, row in zip(got, left, strict=True))
    assert got == SAMPLE.reference(mx.array(masked), draws).tolist()


@pytest.mark.sanitize
def test_no_races() -> None:
    logits, draws = random_logits(len(DRAWS), 2100, True), draws_of(DRAWS)
    assert SAMPLE.kernel(racing, logits, draws).tolist() == SAMPLE.reference(logits, draws).tolist()


def test_threefry_as_published() -> None:
    """Known answers of Random123, and MLX's own."""
    ones = 0xFFFFFFFF
    assert threefry((0, 0), (0, 0)) == (0x6B200159, 0x99BA4EFE)
    assert threefry((ones, ones), (ones, ones)) == (0x1CB996FC, 0xBB002BE7)
    assert threefry((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3)) == (0xC4923A9C, 0x483DF7A0)
    uniform = mx.random.uniform(key=mx.array([3, 4], mx.uint32))
    assert float(uniform) == float(np.float32(threefry((3, 4), (0, 0))[0]) * np.float32(2**-32))


@pytest.mark.parametrize("k", [1, 5, 64, 300, 1000])
def test_the_likeliest(k: int) -> None:
    """Of equal logits the lowest first, at the cut as well."""
    for ties in (False, True):
        logits = random_logits(1, 1000, ties)[0]
        want = np.argsort(-np.array(logits), kind="stable")[:k]
        np.testing.assert_array_equal(np.array(likeliest(logits, k)), want)


def chi_square(tokens: np.ndarray, p: np.ndarray) -> float:
    return float(((np.bincount(tokens, minlength=p.size) - p * tokens.size) ** 2 / (p * tokens.size)).sum())


@pytest.mark.parametrize("by", ["position", "seed", "high word"])
@pytest.mark.parametrize("top_k", [0, 8])
def test_draws_have_the_distribution(top_k: int, by: str) -> None:
    """A chi-square of 7 degrees of freedom, for temperature 1.25; and tokens drawn next to each other have no bond."""
    n, draw = 600, Draw(1.25, top_k)
    made = {
        "position": [draw._replace(seed=12, position=i) for i in range(n)],
        "seed": [draw._replace(seed=i) for i in range(n)],
        "high word": [draw._replace(seed=i << 32) for i in range(n)],
    }[by]
    rows = mx.array(np.tile(LOGITS, (n, 1)))
    tokens = np.array((SAMPLE.reference if top_k else lambda *a: SAMPLE.kernel(metal, *a))(rows, draws_of(made)))
    p = np.exp(LOGITS / 1.25) / np.exp(LOGITS / 1.25).sum()
    assert chi_square(tokens, p) < 24.3  # 0.999
    pairs = np.outer(p, p).ravel()
    likely = pairs * n > 5
    counts = np.bincount(tokens[:-1] * p.size + tokens[1:], minlength=pairs.size)
    found = (((counts - pairs * n) ** 2) / (pairs * n))[likely].sum()
    assert found < likely.sum() + 4 * np.sqrt(2 * likely.sum())


KINDS = [
    Sampling(temperature=0),
    Sampling(seed=1),
    Sampling(seed=1, top_k=64, top_p=0.95),
    Sampling(seed=2, top_k=40, min_p=0.02, temperature=0.8),
    Sampling(seed=3, repetition_penalty=1.4, frequency_penalty=0.3),
    Sampling(seed=4, logit_bias={7: 3.0}, top_k=5),
    Sampling(seed=5, top_p=0.9),
]


@pytest.mark.parametrize("kernels", [None, Kernels(metal, strict=True)], ids=["stock", "kernels"])
def test_a_reply_is_the_same_in_any_batch(kernels: Kernels | None) -> None:
    """Its tokens follow from its own logits, seed and positions: alone, among others, in any order."""
    rng, vocab, steps = np.random.default_rng(5), 400, 5
    logits = rng.normal(0, 2, (len(KINDS), steps, vocab)).astype(np.float32)
    masks = [None] * 6 + [rng.integers(0, 1 << 32, 13, np.uint32)]
    alone = []
    for row, sampling, mask in zip(logits, KINDS, masks, strict=True):
        sampler = Sampler(sampling, [3, 4], vocab, kernels=kernels)
        alone.append([int(sampler(mx.array(x), mask).token) for x in row])
    for order in ([6, 2, 0, 1, 3, 5, 4], [0, 1, 2, 3], [3, 2]):
        samplers = [Sampler(KINDS[i], [3, 4], vocab, kernels=kernels) for i in order]
        for step in range(steps):
            samples = choose(samplers, mx.array(logits[order, step]), [masks[i] for i in order])
            assert [int(sample.token) for sample in samples] == [alone[i][step] for i in order]


def test_one_op_for_all_rows() -> None:
    """Default sampling takes two launches, whatever the number of rows."""
    launched: list[str] = []

    def noting(name: str, **declared: object) -> object:
        kernel = metal(name=name, **declared)

        def call(**arguments: object) -> object:
            launched.append(name.rsplit("_", 1)[0])
            return kernel(**arguments)

        return call

    kernels = Kernels(noting, strict=True)
    samplers = [Sampler(Sampling(top_k=64, top_p=0.95, temperature=t), [0], 100, kernels=kernels) for t in (0, 1, 2)]
    choose(samplers, random_logits(3, 100, False), [None] * 3)
    assert launched == ["sample_pieces", "sample_merge"]


def test_a_skipped_token_is_as_one_drawn() -> None:
    logits = random_logits(1, 50, False)[0]
    one, other = (Sampler(Sampling(seed=9), [0], 50) for _ in "ab")
    for _ in range(3):
        other.skip(int(one(logits).token))
    assert [int(one(logits).token) for _ in range(5)] == [int(other(logits).token) for _ in range(5)]


@pytest.mark.parametrize("vocab", [5, 300, 2049, 9000])
@pytest.mark.parametrize("ties", [False, True], ids=["apart", "ties"])
def test_leads(vocab: int, ties: bool) -> None:
    """By how much a greedy row's best is above the next, which may be as good; rows that are drawn have none."""
    some = [LIKELIEST, Draw(1.0, 64, 0.95, seed=6), LIKELIEST._replace(softcap=4.0), LIKELIEST, Draw(1.3, seed=5)]
    logits, draws = random_logits(len(some), vocab, ties), draws_of(some)
    logits[3, vocab // 2] = logits[3].max() + 0.25
    got, want = (
        np.array(a)
        for a in (SAMPLE.kernel(metal, logits, draws, leads=True), SAMPLE.reference(logits, draws, leads=True))
    )
    assert got[0].tolist() == want[0].tolist() == SAMPLE.kernel(metal, logits, draws).tolist()
    leads = got[1].view(np.float32)
    np.testing.assert_allclose(leads, want[1].view(np.float32), rtol=1e-5, atol=1e-6)
    top = np.sort(np.array(logits), axis=1)[:, -2:]
    assert (
        leads[0] == top[0, 1] - top[0, 0] and leads[3] == np.float32(0.25) + np.float32(0) and min(leads[[1, 4]]) > 1e38
    )


@pytest.mark.parametrize("draw", DRAWS[:4], ids=str)
def test_tokens_before(draw: Draw) -> None:
    """Stand before that of one row, so that the next launch finds it behind them."""
    logits, before = random_logits(1, 3000, False), mx.array([5, 9, 2], mx.int32)
    got = SAMPLE.kernel(metal, logits, draws_of([draw]), before=before).tolist()
    assert got == SAMPLE.reference(logits, draws_of([draw]), before=before).tolist()
    assert got == [5, 9, 2, *SAMPLE.kernel(metal, logits, draws_of([draw])).tolist()]
