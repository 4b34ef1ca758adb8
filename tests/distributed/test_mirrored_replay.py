"""Recorded steps of a model that leads, made on one that follows: here both in one process, without a link."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from host_player import HostPlayer
from kernel_cases import metal
from mirrored import Pair, same
from recorded import path, prompts

from mlx_gemma4 import load
from mlx_gemma4.conversation.language_model import LanguageModel
from mlx_gemma4.distributed.link import RECORDING, Follower
from mlx_gemma4.model.model import Model
from mlx_gemma4.model.replay import ReplayedStep
from mlx_gemma4.ops.dispatch import REPLAY, Kernels
from mlx_gemma4.ops.op import OpKey
from mlx_gemma4.ops.sample import LIKELIEST, Draw


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    lm = load(path("12b", "q8_0", tmp_path), weights="packed")
    HostPlayer.made.clear()

    def recording() -> LanguageModel:
        kernels = Kernels(metal, frozenset([OpKey("expand")]), player=HostPlayer)
        return replace(lm, model=Model(lm.config, lm.model.weights, kernels))

    return Pair(recording(), monkeypatch, recording())


def test_followers_replay_what_rank_0_does(pair: Pair) -> None:
    """Steps that know their token, that take it from the step before, that draw; a batch; then steps in turns."""
    model = pair.model
    state = model.new_state()
    model.prefill(mx.array(prompts("12b")[0][:20]), state)
    first = model.step(5, state)
    second = model.step(first, state, Draw(0.8, 20, seed=2**63 + 5))
    third = model.step(second.token(), state)
    assert isinstance(third, ReplayedStep)
    assert third.logits().shape == (model.config.vocab,)
    other = state.fork()
    together = model.batch([8, 9], [state, other])
    chained = model.batch(together, [state, other], [LIKELIEST, Draw(1.0, 5, seed=3)])
    assert len(chained.tokens()) == 2
    steps = [model.step(7, some) for some in (state, other, state, other)]  # not all recorded: states take turns
    assert [step.token() for step in steps]
    asked = model.step(7, state, Draw(0.7, 0, 0.9)).logits()  # no kernel draws so
    assert asked.shape == (model.config.vocab,)
    pair.end()
    for some in (state, other):
        same(some, pair.states[some.key])  # type: ignore[attr-defined]
    mine, theirs = ([p.tokens for p in HostPlayer.made[i::2]] for i in (0, 1))
    assert sorted(map(str, mine)) == sorted(map(str, theirs))
    assert [player.chained for player in HostPlayer.made].count(1) == 4  # one of a state and one of a batch, twice


def test_a_recording_is_no_hang(pair: Pair) -> None:
    """The first step of a kind, of one state or of so many rows, may take longer than what counts as hung."""
    state = pair.model.new_state()
    other = state.fork()
    for states in ([state], [state, other], [state], [state, other]):
        pair.model.batch([5] * len(states), states).tokens() if len(states) > 1 else pair.model.step(5, state).token()
    pair.end()
    assert pair.link.allowed == [RECORDING, RECORDING, 0, 0]


def test_time_allowed_is_not_under_way() -> None:
    follower = object.__new__(Follower)
    follower._made, follower._under_way, follower.later = 0, deque(), lambda task: None
    with follower.at_work(1, RECORDING):
        assert follower._how()["since"] == 0
    with follower.at_work(0):
        time.sleep(0.02)
        assert 0.02 <= follower._how()["since"] < RECORDING


def test_rank_0_alone_decides(pair: Pair) -> None:
    """A step that it does not replay is none on the others, though they could."""
    state = pair.model.new_state()
    pair.model.step(5, state).token()
    assert pair.model.kernels is not None
    pair.model.kernels.off |= {REPLAY}
    pair.model.step(6, state).token()
    pair.model.batch([7], [state]).tokens()
    pair.end()
    assert [len(player.tokens) for player in HostPlayer.made] == [1, 1]
