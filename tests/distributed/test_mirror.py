"""Calls on a model that leads are made on one that follows, whatever the order: here both in one process."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from mirrored import Pair, same
from pictured import encoded
from recorded import HERE

from mlx_gemma4 import LanguageModel, load
from mlx_gemma4.distributed.mirror import CHECKED, LedState
from mlx_gemma4.errors import InputError


@pytest.fixture(scope="module")
def small() -> LanguageModel:
    return load(HERE / "31b-f32.gguf")


@pytest.fixture
def pair(small: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    pair = Pair(small, monkeypatch)
    yield pair
    if pair.thread.is_alive():
        pair.end()


@pytest.mark.parametrize("seed", range(2))
def test_random_calls(pair: Pair, seed: int) -> None:
    rng, model = random.Random(seed), pair.model
    states = [model.new_state(), model.new_state()]
    for _ in range(40):
        state, what = rng.choice(states), rng.randrange(11)
        ids = [rng.randrange(5, 200) for _ in range(rng.randint(1, 70))]
        if what == 0:
            model.prefill(mx.array(ids), state)
        elif what == 1:
            model.forward(mx.array(ids), state, all_logits=rng.random() < 0.5)
        elif what == 2:
            step = model.step(ids[0], state)
            assert step.token() == int(mx.argmax(step.logits()))
            model.step(step, state)
        elif what == 3 and len(states) > 1:
            model.batch(mx.array([5 + i for i in range(len(states))]), states).tokens()
        elif what == 4:
            model.check(ids[: model.most_checked(state)][:4], state)
        elif what == 5 and len(states) < 4:
            states.append(state.fork())
        elif what == 6:
            state.mark()
        elif what == 7 and state.length:
            state.rewind(state.reach(rng.randrange(state.length)))
        elif what == 8 and state.marks:
            rng.choice(states).adopt(state)
            state.unmark(rng.choice(state.marks))
        elif what == 9 and len(states) > 2:
            states.remove(state)
            rng.choice((state.close, state.start_over))()
        elif what == 10:
            other = rng.choice(states)
            state.take_over(other, other.reach(max(0, other.length - rng.randint(0, 9))))
    pair.end()
    for state in states:
        assert isinstance(state, LedState)
        same(state, pair.states[state.key])
    assert pair.link.failed == []


def test_states_that_nobody_has_are_dropped(pair: Pair) -> None:
    state = pair.model.new_state()
    fork = state.fork()
    del state
    gc.collect()
    assert isinstance(fork, LedState)
    fork.mark()
    pair.end()
    assert list(pair.states) == [fork.key]


def test_saved_and_loaded_in_parts(pair: Pair, tmp_path: Path) -> None:
    state = pair.model.new_state(kv="full")
    pair.model.prefill(mx.array([*range(5, 80)]), state)
    pair.model.save_state(state, tmp_path / "talk.kv")
    loaded = pair.model.load_state(tmp_path / "talk.kv")
    assert loaded.tokens == state.tokens
    (tmp_path / "talk.kv.rank1").unlink()
    with pytest.raises(InputError, match=r"talk\.kv\.rank1"):
        pair.model.load_state(tmp_path / "talk.kv")
    with pytest.raises(InputError, match="no such file"):
        pair.model.load_state(tmp_path / "nothing.kv")
    pair.model.prefill(mx.array([5, 6]), loaded)
    pair.end()
    assert isinstance(loaded, LedState)
    same(loaded, pair.states[loaded.key])


@pytest.mark.parametrize("drift", [False, True])
def test_states_are_compared_every_so_often(pair: Pair, drift: bool) -> None:
    state = pair.model.new_state()
    pair.model.prefill(mx.array([5 + i % 90 for i in range(CHECKED - 2)]), state)
    if drift:  # a rank read something else
        other = pair.model.new_state()
        pair.model.prefill(mx.array([6 + i % 70 for i in range(CHECKED - 2)]), other)
        assert isinstance(state, LedState) and isinstance(other, LedState)
        state.key = other.key
    for token in (7, 8, 9):
        pair.model.step(token, state).token()
    pair.end()
    assert [f"by token {CHECKED};" in line for line in pair.link.failed] == [True] * drift


def test_what_cannot_be_is_refused_before_others_hear_of_it(pair: Pair) -> None:
    with pytest.raises(InputError):
        pair.model.new_state(kv="nonsense")


def test_pictures_and_texts_that_are_scored(pair: Pair) -> None:
    """Soft tokens are read as their rows, also as the last one before states are compared; and hidden rows count."""
    model, hidden = pair.model, pair.model.config.hidden
    made = encoded(b"cat", 9, hidden)
    model.soft.add(made)
    state = model.new_state()
    for ids in ([5, 6, *made.ids[:8]], [*made.ids[8:], 7], [5] * (CHECKED - 20), made.ids):
        model.prefill(mx.array(ids), state, soft=model.soft.rows(ids))
    logits = model.forward(mx.array(made.ids), state, soft=model.soft.rows(made.ids))
    assert not mx.allclose(logits, model.forward(mx.array([8]), state.fork()))
    rows = model.hidden(mx.array([5, 6, 7]), state)
    assert mx.array_equal(model.logits(rows)[-1], model.inner.logits(rows[-1:])[0])
    pair.end()
    assert isinstance(state, LedState)
    same(state, pair.states[state.key])
    assert pair.link.failed == []
