"""Drafts where steps are replayed: checks are recorded too, a reply never falls back to tracing and is as without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import make_synthetic
import mlx.core as mx
import numpy as np
import pytest
from drafters import Knowing
from host_player import HostPlayer
from kernel_cases import metal
from recorded import path, prompts

from mlx_gemma4 import Sampling, load
from mlx_gemma4.conversation.language_model import demo_path
from mlx_gemma4.generation.decoding import Statistics
from mlx_gemma4.generation.drafting import MOST, Drafts
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.loading.assistant import load_assistant
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops import dispatch, matvec, paged
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.op import OpKey
from mlx_gemma4.ops.sample import Draw
from mlx_gemma4.ops.tuning import this_gpu

GREEDY = Sampling(temperature=0)
OFF = frozenset([OpKey("expand")])  # tiles of a prompt, which round to fp16


stepped: list[int] = []  # lengths of states before steps that were not replayed


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """And products of up to 4 rows by mat-vecs, in fp32: few_rows.py rounds rows to fp16."""
    monkeypatch.setattr(paged, "PAGE", 32)
    monkeypatch.setattr(dispatch, "this_gpu", lambda: replace(this_gpu(), few_rows_from=matvec.MAX_TOKENS + 1))


def pair(kind: str, folder: Path, tag: str = "q8_0") -> tuple[Model, Model]:
    """A model with stock operations, and the same weights with steps that are replayed."""
    plain = load(path(kind, tag, folder), weights="packed").model
    HostPlayer.made.clear()
    replayed = Model(plain.config, plain.weights, Kernels(metal, OFF, player=HostPlayer))
    real, _ = replayed._step, stepped.clear()
    assert real is not None
    replayed._step = lambda ids, state: (stepped.append(state.length), real(ids, state))[1]
    return plain, replayed


def reply(
    model: Model, prompt: list[int], n: int, drafts: Drafts | None, sampling: Sampling = GREEDY, **more: Any
) -> tuple[list[int], Any, Statistics]:
    state, statistics = more.pop("state", None) or model.new_state(), Statistics()
    made = generate_tokens(model, state, prompt, sampling, n, drafts=drafts, statistics=statistics, **more)
    return [token.id for token in made], state, statistics


def held(state: Any) -> list[np.ndarray]:
    """Keys and values of all layers, as far as attention sees them."""
    views = [kv.views(max(0, state.length - state.config.window)) for kv in state.layers.values()]
    return [np.concatenate([np.array(part[i]) for part in parts], axis=2) for parts in views for i in (1, 2)]


def starts() -> list[tuple[int, int]]:
    """Rows and starts of each player that was loaded."""
    return sorted((p.best_region.shape[-1], len(p.tokens)) for p in HostPlayer.made if p.loads)


@pytest.mark.parametrize("kind", ["12b", "31b", "gemma3", "e2b", "e4b"])
def test_rows_of_one_state_are_single_steps(kind: str, tmp_path: Path) -> None:
    """Logits, hidden rows, tokens, leads, keys and values: over the borders of pages, behind the window's edge."""
    plain, replayed = pair(kind, tmp_path)
    window = plain.config.window
    for before in (0, 30, window - 2, window + 61):
        one, several = plain.new_state(), replayed.new_state()
        ids = (prompts(kind)[0] * (before + 1))[:before]
        for state in (one, several):
            if ids:
                plain.prefill(mx.array(ids), state)
        for n in (4, 3):
            tokens = [5 + 7 * i + n for i in range(n)]
            step = replayed.replayed_check([tokens], [several])
            assert step is not None
            logits = np.array(step.logits())
            rows = [np.array(plain.forward(mx.array([token]), one)) for token in tokens]
            np.testing.assert_allclose(logits, np.stack(rows), atol=2e-3)
            assert step.tokens() == logits.argmax(axis=1).tolist()
            top = np.sort(logits, axis=1)[:, -2:]
            np.testing.assert_allclose(step.leads(), top[:, 1] - top[:, 0], atol=1e-4)
            several.rewind(several.length - 1)
            one.rewind(one.length - 1)
        assert replayed.batcher is not None and replayed.batcher.holds(several)
        fork = several.fork()
        assert not replayed.batcher.holds(several) and fork.tokens == several.tokens == one.tokens
        for x, y in zip(held(one), held(several), strict=True):
            np.testing.assert_allclose(x, y, atol=2e-3)


KINDS = ("12b", "26b-a4b", "31b", "e2b", "e4b", "gemma3")


@pytest.mark.slow
@pytest.mark.parametrize("depth", range(1, MOST + 1))
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_replies_are_as_without_drafts(kind: str, depth: int, tmp_path: Path) -> None:
    """Over page borders, tails' ends and the window's edge; nothing is traced, and nothing recorded twice."""
    plain, replayed = pair(kind, tmp_path)
    n, window = 20, plain.config.window
    prompt = [2, *(3 + (7 * i + i * i) % 199 for i in range((22, window - 10, window + 56)[depth % 3]))]
    want, _, _ = reply(replayed, prompt, n, None)
    HostPlayer.made.clear()
    for right in (0.0, 0.7, 1.0):
        knows = Knowing(prompt + want, right, depth, needs_hidden=right == 0.7)
        got, state, statistics = reply(replayed, prompt, n, Drafts(drafter=knows, depth=depth))
        assert got == want and state.tokens == prompt + want
        assert statistics.drafted_tokens >= depth and statistics.accepted_tokens >= 7 * (right == 1)
        assert all(before < len(prompt) for before in stepped) and {n for n, _ in starts()} <= {1, 2, 4, 8}
        assert all(p.loads <= 3 for p in HostPlayer.made), "recorded twice in a reply"


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["gemma4-assistant", "gemma4_assistant"])
def test_an_assistants_drafts_are_replayed(spelling: str, tmp_path: Path) -> None:
    """A dense head and centroids; the hidden row where the target's step left it, or as an array; drawn and not."""
    file = tmp_path / "mtp.gguf"
    make_synthetic.write("DEMO", file, spelling=spelling)
    plain = load(demo_path(), weights="packed", draft=None).model
    HostPlayer.made.clear()
    replayed = Model(plain.config, plain.weights, Kernels(metal, OFF, player=HostPlayer), plain.plan)
    theirs, mine = (load_assistant(file, model) for model in (plain, replayed))
    ids = [2, *np.random.default_rng(3).integers(300, 4000, 40).tolist()]
    one, several = plain.new_state(), replayed.new_state()
    for state in (one, several):
        plain.prefill(mx.array(ids[:-4]), state)
    rows = plain.check(ids[-4:-1], one)[1]
    step = replayed.replayed_check([ids[-4:-1]], [several])
    assert step is not None
    step.tokens()
    for draws in ([], [Draw(1.0, 40, 0.95, seed=7), Draw(1.0, 40, 0.95, seed=7, position=1)]):
        want = theirs.draft(ids, one, rows[2], 3, draws)
        assert mine.draft(ids, several, step.hidden(2), 3, draws) == want
        assert mine.draft(ids, several, rows[2], 3, draws) == want
    assert len(HostPlayer.made) == 2 and HostPlayer.made[1].loads == 1 and len(HostPlayer.made[1].tokens) == 4
    assert replayed.batcher is not None and replayed.batcher.holds(several) and step.hidden(0).there
    np.testing.assert_allclose(np.array(step.hidden(1).array()), np.array(rows[1]), atol=1e-2)
    replayed.step(5, several)
    replayed.replayed_check([[5, 6, 7]], [several])
    assert not step.hidden(0).there
