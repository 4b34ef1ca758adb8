"""Steps that check drafts in kernels, on the Metal simulator: near single steps, and replies are as without drafts."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from drafters import Knowing
from kernel_models import both
from recorded import prompts

from mlx_gemma4 import Sampling
from mlx_gemma4.generation import drafting
from mlx_gemma4.generation.decoding import Statistics
from mlx_gemma4.generation.drafting import Drafts
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.model.model import Model

GREEDY = Sampling(temperature=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["12b", "26b-a4b"])
def test_rows_are_near_those_of_single_steps(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp16, as on a GPU: by far less than what counts as a near tie. Keys and values too, of tq4 as well."""
    monkeypatch.setattr(Model, "kv_dtype", mx.float16)
    _, model = both(kind, "q4_k_m", tmp_path)
    for kv in ("full", "tq4") if kind == "12b" else ("full",):
        one, several = model.new_state(kv=kv), model.new_state(kv=kv)
        for state in (one, several):
            model.prefill(mx.array(prompts(kind)[1]), state)
        for n in (8, 3):
            tokens = [5 + 7 * i for i in range(n)]
            logits, hidden = model.check(tokens, several)
            want = np.stack([np.array(model.forward(mx.array([token]), one)) for token in tokens])
            np.testing.assert_allclose(np.array(logits), want, atol=drafting.NEAR / 4)
            assert hidden.shape == (n, model.config.hidden) and hidden.dtype == mx.float32
        assert one.tokens == several.tokens


@pytest.mark.slow
@pytest.mark.parametrize("near", [None, 1e9])
def test_a_greedy_reply_is_as_without_drafts(
    near: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where every row is taken for a near tie: then each token is decided by a step of its own."""
    monkeypatch.setattr(Model, "kv_dtype", mx.float16)
    if near is not None:
        monkeypatch.setattr(drafting, "NEAR", near)
    _, model = both("12b", "q4_k_m", tmp_path)
    prompt = prompts("12b")[0]
    want = [t.id for t in generate_tokens(model, model.new_state(), prompt, GREEDY, 14)]
    knows, statistics, state = Knowing(prompt + want, 0.8), Statistics(), model.new_state()
    drafts = Drafts(drafter=knows, depth=3)
    got = [t.id for t in generate_tokens(model, state, prompt, GREEDY, 14, drafts=drafts, statistics=statistics)]
    assert got == want and state.tokens == prompt + want and statistics.drafted_tokens > 5
    assert (statistics.accepted_tokens == 0) == (near is not None)
