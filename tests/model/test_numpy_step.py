"""The decode step in numpy beside forward.py, whose operations it repeats for one token."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from recorded import HERE, KINDS, prompts

from mlx_gemma4 import load
from mlx_gemma4.kv.state import KVState
from mlx_gemma4.model.forward import head, run_layers
from mlx_gemma4.model.model import Model
from mlx_gemma4.model.numpy_step import numpy_steps
from mlx_gemma4.ops import cores

NEAR = 1e-4  # of logits


def stock(model: Model, token: int, state: KVState) -> np.ndarray:
    return np.array(head(model.loaded, run_layers(model.loaded, mx.array([token]), [state], 1))[0])


def compare(model: Model, tokens: list[int], ours: KVState, reference: KVState) -> None:
    for token in tokens:
        got = np.array(model.step(token, ours).logits())
        np.testing.assert_allclose(got, stock(model, token, reference), atol=NEAR)


@pytest.mark.parametrize(
    ("kind", "weights"), [*((kind, "dense") for kind in KINDS), ("e2b", "packed"), ("26b-a4b", "packed")]
)
def test_logits_are_those_of_the_forward_pass(kind: str, weights: Any) -> None:
    """From an empty state, past two full tails and the window, and on from where a fork and a rewind leave it."""
    model = load(HERE / f"{kind}-q4_k_m.gguf", weights=weights).model
    tokens = (prompts(kind)[2] * 3)[:135]
    assert len(tokens) > 2 * 64
    ours, reference = model.new_state(), model.new_state()
    assert numpy_steps([ours])
    compare(model, tokens, ours, reference)
    fork = ours.fork()
    compare(model, tokens[:3], ours, reference.fork())
    compare(model, tokens[7:10], fork, reference)  # as if the other had not gone on
    for state in (fork, reference):
        state.rewind(130)
    compare(model, tokens[:5], fork, reference)
    assert fork.tokens == reference.tokens


def test_quantized_keys_and_values_are_left_to_the_forward_pass() -> None:
    model = load(HERE / "12b-q4_0.gguf").model
    ours, reference = model.new_state(kv="q8"), model.new_state(kv="q8")
    assert not numpy_steps([ours])
    compare(model, prompts("12b")[0][:5], ours, reference)


@pytest.mark.parametrize("rows", [(), (1,), (9,)])
def test_cores_share_a_product(rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where parts are not equally long, and in several threads at once."""
    monkeypatch.setattr(cores, "SHARED", 0)
    monkeypatch.setattr(cores, "cores", lambda: 3)
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((*rows, 64), np.float32), rng.standard_normal((1003, 64), np.float32)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: cores.product(x, w), range(8)):
            np.testing.assert_allclose(got, x.astype(np.float64) @ w.T.astype(np.float64), atol=1e-4)
