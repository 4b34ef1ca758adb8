"""Steps for several states at once: each row as it would be alone, whoever else is in the batch."""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from batched import alone, converse, read
from recorded import HERE, KINDS, prompts

from mlx_gemma4 import load
from mlx_gemma4.errors import InputError
from mlx_gemma4.model.batch import MAX_BATCH
from mlx_gemma4.model.model import Model

NEAR = 2e-4  # of logits: BLAS may group its sums by the number of rows


@functools.cache
def kept(kind: str, tag: str = "q4_k_m", weights: Any = "packed") -> Model:
    return load(HERE / f"{kind}-{tag}.gguf", weights=weights).model


@pytest.mark.parametrize("tag", ["q4_k_m", "f32"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_as_alone(kind: str, tag: str) -> None:
    """Of different lengths: empty, short, and past the window; greedy tokens are equal or a near tie."""
    model = kept(kind, tag, "packed" if tag != "f32" else "dense")
    texts = [[], prompts(kind)[0], prompts(kind)[1], prompts(kind)[2][:63], [2] * 5]
    together, solo = ([read(model, ids) for ids in texts] for _ in range(2))
    tokens = [2, 3, 4, 5, 6]
    for _ in range(5):
        got = np.array(model.batch_step(mx.array(tokens), together))
        want = np.stack([alone(model, *pair) for pair in zip(solo, tokens, strict=True)])
        np.testing.assert_allclose(got, want, atol=NEAR)
        tokens = want.argmax(axis=1).tolist()
        for row, token in zip(got, tokens, strict=True):
            assert row.max() - row[token] <= 2 * NEAR
    for a, b in zip(together, solo, strict=True):
        assert a.tokens == b.tokens and a.length == b.length
        for x, y in zip(a.arrays, b.arrays, strict=True):
            assert x.shape == y.shape


@pytest.mark.parametrize("kv", ["q8", "tq4"])
def test_quantized_states_step_beside_plain_ones(kv: str) -> None:
    model = kept("12b")
    kinds = [kv, "full", kv]
    together, solo = ([read(model, prompts("12b")[2][: 60 + n], kind) for n, kind in enumerate(kinds)] for _ in "ab")
    for i in range(8):  # past full tails
        got = np.array(model.batch_step([5 + i, 6, 7], together))
        want = np.stack([alone(model, s, t) for s, t in zip(solo, (5 + i, 6, 7), strict=True)])
        np.testing.assert_allclose(got, want, atol=NEAR)


@pytest.mark.parametrize("seed", range(3))
def test_states_come_and_go(seed: int) -> None:
    one, other = (converse(kept("e2b"), kept("e2b"), batched, seed, 60) for batched in (True, False))
    assert one[1] == other[1]
    for a, b in zip(one[0], other[0], strict=True):
        np.testing.assert_allclose(a, b, atol=NEAR)


def test_what_no_step_takes_is_refused() -> None:
    model = kept("e2b")
    state, full = model.new_state(), model.new_state(max_tokens=1)
    model.prefill(mx.array([2]), full)
    with pytest.raises(InputError, match="different states"):
        model.batch_step([2, 2], [state, state])
    with pytest.raises(InputError, match="1 to 32"):
        model.batch_step([], [])
    with pytest.raises(InputError, match="1 to 32"):
        model.batch_step([2] * (MAX_BATCH + 1), [model.new_state() for _ in range(MAX_BATCH + 1)])
    with pytest.raises(InputError, match="max_tokens"):
        model.batch_step([2, 2], [state, full])
    assert state.length == 0 and full.length == 1
