"""Recorded steps for several states, their launches made by the Metal simulator, as each state steps alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batched import alone, few_rows_in_fp32, read
from host_player import HostPlayer
from kernel_cases import metal
from recorded import path, prompts

from mlx_gemma4 import load
from mlx_gemma4.kv.pool import first_bytes
from mlx_gemma4.loading.loader import load_model, open_model
from mlx_gemma4.memory import Room, kv_dtype
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops import paged
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.op import OpKey
from mlx_gemma4.ops.sample import LIKELIEST, Draw

NEAR = 1e-3
OFF = frozenset([OpKey("expand")])  # tiles of a prompt, which round to fp16


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "PAGE", 32)


@pytest.fixture
def _in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    few_rows_in_fp32(monkeypatch)


def both(kind: str, folder: Path, tag: str = "q8_0") -> tuple[Model, Model]:
    """A model with stock operations, and the same weights with steps that are replayed."""
    plain = load(path(kind, tag, folder), weights="packed").model
    HostPlayer.made.clear()
    return plain, Model(plain.config, plain.weights, Kernels(metal, OFF, player=HostPlayer))


def greedy(model: Model, state: Any, token: int, steps: int) -> list[int]:
    found = []
    for _ in range(steps):
        token = int(alone(model, state, token).argmax())
        found.append(token)
    return found


@pytest.mark.usefixtures("_in_fp32")
@pytest.mark.parametrize("kind", ["12b", "e2b", "gemma3"])
def test_rows_are_as_alone(kind: str, tmp_path: Path) -> None:
    plain, replayed = both(kind, tmp_path)
    texts = [prompts(kind)[1], [], prompts(kind)[2][:31]]
    together, solo = ([read(plain, ids) for ids in texts] for _ in "ab")
    for step in range(3):
        tokens = [5 + step, 2, 7]
        got = np.array(replayed.batch_step(tokens, together))
        want = np.stack([alone(plain, *pair) for pair in zip(solo, tokens, strict=True)])
        np.testing.assert_allclose(got, want, atol=NEAR)
    (player,) = HostPlayer.made
    assert (player.loads, player.chained, len(player.tokens)) == (1, 0, 3)
    for a, b in zip(together, solo, strict=True):
        assert a.tokens == b.tokens
        for x, y in zip(a.arrays, b.arrays, strict=True):
            np.testing.assert_allclose(np.array(x), np.array(y), atol=NEAR)
    assert not player.loaded  # nobody is in, so the pool is gone


@pytest.mark.usefixtures("_in_fp32")
def test_steps_chain_and_states_come_and_go(tmp_path: Path) -> None:
    """Without a new recording, but where the number of rows is another's. Tokens are those of each alone."""
    plain, replayed = both("12b", tmp_path)
    texts = [prompts("12b")[1], [2], prompts("12b")[2][:31], [2, 3]]
    first = [5, 6, 7, 8]
    want = [greedy(plain, read(plain, text), token, 12) for text, token in zip(texts, first, strict=True)]
    states = [read(plain, text) for text in texts]
    found: list[list[int]] = [[] for _ in states]

    def run(step: Any, who: list[int], times: int) -> Any:
        for _ in range(times):
            step = replayed.batch(step, [states[n] for n in who])
            for n, token in zip(who, step.tokens(), strict=True):
                found[n].append(token)
        return step

    step = run(first[:3], [0, 1, 2], 4)
    (player,) = HostPlayer.made
    assert (player.loads, player.chained) == (1, 3)
    step = run([*step.tokens(), first[3]], [0, 1, 2, 3], 3)  # one joins
    step = run([step.tokens()[n] for n in (3, 1, 0)], [3, 1, 0], 3)  # one leaves, others change places
    assert (player.loads, player.chained) == (1, 7)
    assert states[2].tokens == [*texts[2], first[2], *found[2][:-1]]
    step = run(step.tokens()[:2], [3, 1], 2)
    assert [p.loads for p in HostPlayer.made] == [1, 1]
    logits = np.array(step.logits())
    for n, tokens in enumerate(found):
        assert tokens == want[n][: len(tokens)]
    for row, n in zip(logits, [3, 1], strict=True):
        state = read(plain, texts[n])
        for token in [first[n], *found[n][:-2]]:
            alone(plain, state, token)
        np.testing.assert_allclose(row, alone(plain, state, found[n][-2]), atol=NEAR)


@pytest.mark.usefixtures("_in_fp32")
def test_tokens_are_kept_for_whoever_asks_late(tmp_path: Path) -> None:
    """More steps under way than a player keeps tokens of; then a state leaves before anybody has asked."""
    plain, replayed = both("12b", tmp_path)
    want = [greedy(plain, read(plain, [2, n]), 5, 7) for n in range(2)]
    states = [read(plain, [2, n]) for n in range(2)]
    steps, step = [], [5, 5]
    for _ in range(7):
        step = replayed.batch(step, states)  # type: ignore[assignment, arg-type]
        steps.append(step)
    assert states[0].tokens == [2, 0, 5, *want[0][:-1]]
    assert [list(pair) for pair in zip(*want, strict=True)] == [s.tokens() for s in steps]  # type: ignore[attr-defined]
    assert np.array(steps[-1].logits()).argmax(axis=1).tolist() == [w[-1] for w in want]  # type: ignore[attr-defined]


@pytest.mark.usefixtures("_in_fp32")
def test_a_pool_that_grows_is_recorded_anew(tmp_path: Path) -> None:
    plain, replayed = both("12b", tmp_path)
    states = [read(plain, [2] * n) for n in (200, 900)]
    want = [greedy(plain, state.fork(), 5, 3) for state in states]
    step = replayed.batch([5], states[:1])
    (player,) = HostPlayer.made
    tokens = step.tokens()
    both_steps = [replayed.batch([5, 5], [states[1], read(plain, [2])])]
    assert not player.loaded and len(HostPlayer.made) == 2
    step = replayed.batch(tokens, states[:1])
    assert player.loads == 2
    assert [*tokens, *step.tokens()] == want[0][:2]
    assert both_steps[0].tokens()[0] == want[1][0]


@pytest.mark.parametrize("kind", ["31b", "26b-a4b", "e4b"])
def test_more_rows_than_states(kind: str, tmp_path: Path) -> None:
    """Eight of five, as on a GPU but for fp32 between kernels: products of few rows round these to fp16."""
    plain, replayed = both(kind, tmp_path)
    together, solo = ([read(plain, [2] * n) for n in (1, 40, 3, 90, 17)] for _ in "ab")
    for step in range(2):
        tokens = [5 + step, 2, 7, 9, 11]
        got = np.array(replayed.batch_step(tokens, together))
        want = np.stack([alone(plain, *pair) for pair in zip(solo, tokens, strict=True)])
        np.testing.assert_allclose(got, want, atol=2e-2)
    assert [len(player.tokens[0]) for player in HostPlayer.made if player.loads] == [16]  # a lead beside each token


@pytest.mark.usefixtures("_in_fp32")
def test_what_cannot_be_recorded_steps_the_other_way(tmp_path: Path) -> None:
    plain, replayed = both("12b", tmp_path)
    replayed.kernels.off |= {OpKey("rotations")}  # type: ignore[union-attr]
    states, solo = ([read(plain, [2, n]) for n in range(2)] for _ in "ab")
    for token in (5, 6):
        got = np.array(replayed.batch_step([token, token], states))
        np.testing.assert_allclose(got, np.stack([alone(plain, s, token) for s in solo]), atol=NEAR)
    assert not HostPlayer.made or not HostPlayer.made[-1].loads


@pytest.mark.usefixtures("_in_fp32")
def test_rows_draw_as_alone(tmp_path: Path) -> None:
    """Greedy and with filters, within recorded steps that chain and after others have joined."""
    plain, replayed = both("12b", tmp_path)
    kinds = [LIKELIEST, Draw(1.0, 64, 0.95, seed=7), Draw(1.3, seed=2**40 + 5)]
    texts, first = [prompts("12b")[0], [2], [2, 3, 4]], [5, 6, 7]
    want = []
    for text, token, kind in zip(texts, first, kinds, strict=True):
        state, drawn = read(plain, text), [token]
        for position in range(5):
            drawn.append(plain.step(drawn[-1], state, kind._replace(position=position)).token())
        want.append(drawn[1:])
    states, found = [read(plain, text) for text in texts], []
    step: Any = first[:2]
    for position in range(5):
        draws = [kind._replace(position=position) for kind in kinds]
        if position < 2:
            step = replayed.batch(step, states[:2], draws[:2])
            found.append([*step.tokens(), None])
        else:  # the third joins
            step = [*step.tokens(), first[2]] if position == 2 else step
            draws[2] = kinds[2]._replace(position=position - 2)
            step = replayed.batch(step, states, draws)
            found.append(step.tokens())
    columns = [[token for token in column if token is not None] for column in zip(*found, strict=True)]
    assert columns == [want[0], want[1], want[2][:3]]
    assert sum(player.chained for player in HostPlayer.made) == 3


@pytest.mark.usefixtures("_in_fp32")
def test_rows_that_the_pool_does_not_take_draw_as_well(tmp_path: Path) -> None:
    plain, replayed = both("26b-a4b", tmp_path)
    draws = [Draw(1.0, 64, 0.95, seed=7), LIKELIEST, Draw(1.3, seed=9), Draw(1.0, 20, seed=11)]
    states, solo = ([plain.new_state(kv=kv) for kv in ("full", "tq4", "full", "full")] for _ in "ab")
    got = replayed.batch([5, 6, 7, 8], states, draws).tokens()
    steps = [plain.step(5 + n, state, draw) for n, (state, draw) in enumerate(zip(solo, draws, strict=True))]
    assert got == [step.token() for step in steps]
    assert [player.loads for player in HostPlayer.made] == [1]


def test_what_the_pool_begins_with_is_planned_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where steps are replayed, since drafts' checks put even a single state there; states in 4 bits never are."""
    monkeypatch.setattr(paged, "PAGE", 128)
    _, replayed = both("12b", tmp_path)
    replayed.batch_step([5, 6], [replayed.new_state() for _ in range(2)])
    assert replayed.batcher is not None
    assert replayed.batcher.pool.nbytes == first_bytes(replayed.config, replayed.kv_dtype, 128)
    kernels, plans = Kernels(metal, OFF, player=HostPlayer), []
    for run, kind in ((kernels, "full"), (kernels, "tq4"), (Kernels(metal, OFF), "full")):
        with open_model(path("12b", "f32", tmp_path)) as (config, source, _):
            plans.append(load_model(config, source, kernels=run, room=Room(64, kind))[1].kv)
    assert plans[0] == first_bytes(config, kv_dtype(), 128) > max(plans[1:])
