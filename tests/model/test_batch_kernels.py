"""Steps for several states in kernels over a pool of pages, run by the Metal simulator: as each state steps alone."""

from __future__ import annotations

import gc
import random
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import metal
from kernel_models import BUDGET, UNIFORM, both
from recorded import prompts

from mlx_gemma4.model.model import Model
from mlx_gemma4.ops import paged

NEAR = 1e-3


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that fixtures' prompts take several, and windows leave some behind."""
    monkeypatch.setattr(paged, "PAGE", 32)


def read(model: Model, ids: list[int], kv: str = "full") -> Any:
    state = model.new_state(kv=kv)
    if ids:
        model.prefill(mx.array(ids), state)
    return state


def alone(model: Model, state: Any, token: int) -> np.ndarray:
    return np.array(model.forward(mx.array([token]), state))


@pytest.mark.parametrize("kind", BUDGET)
def test_rows_are_as_alone(kind: str, tmp_path: Path) -> None:
    """Of different lengths, among them none, and one past the window; then they have all that they would have alone."""
    plain, fused = both(kind, "q4_k_m", tmp_path)
    texts = [prompts(kind)[1], [], prompts(kind)[2][:31]]
    together, solo = ([read(plain, ids) for ids in texts] for _ in "ab")
    for step in range(3):
        tokens = [5 + step, 2, 7]
        got = np.array(fused.batch_step(tokens, together))
        want = np.stack([alone(plain, *pair) for pair in zip(solo, tokens, strict=True)])
        np.testing.assert_allclose(got, want, atol=NEAR)
    assert fused.batcher is not None and len(fused.batcher.pool.arrays) == fused.config.own_kv_layers
    for a, b in zip(together, solo, strict=True):
        assert a.borrower is not None and a.tokens == b.tokens and a.length == b.length
        assert [(s.start, s.stop) for kv in a.layers.values() for s in kv.segments] == [
            (s.start, s.stop) for kv in b.layers.values() for s in kv.segments
        ]
        assert a.borrower is None
        for x, y in zip(a.arrays, b.arrays, strict=True):
            np.testing.assert_allclose(np.array(x), np.array(y), atol=NEAR)
    assert not fused.batcher.pool.arrays  # nobody is in
