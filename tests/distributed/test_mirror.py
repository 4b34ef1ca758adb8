"""Calls on a model that leads are made on one that follows, whatever the order: here both in one process."""

from __future__ import annotations

import gc
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from pictured import encoded
from recorded import HERE

from mlx_gemma4 import LanguageModel, load
from mlx_gemma4.distributed import mirror
from mlx_gemma4.distributed.mirror import CHECKED, LedModel, LedState, follow
from mlx_gemma4.distributed.place import Place
from mlx_gemma4.errors import InputError
from mlx_gemma4.kv.state import KVState


class Both:
    """Both ends of a link without sockets, and what goes over MLX's own."""

    place, group = Place(1, 2, "ring", "127.0.0.1", 1), None

    def __init__(self) -> None:
        self.dropped: deque[int] = deque()
        self.told: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self.ids: SimpleQueue[mx.array] = SimpleQueue()
        self.replies: SimpleQueue[Any] = SimpleQueue()
        self.on_checked: Callable[[int, dict[str, Any]], None] = lambda rank, theirs: None
        self.failed: list[str] = []
        self.error: BaseException | None = None

    def tell(self, op: str, *states: int, **given: Any) -> None:
        gone = [self.dropped.popleft() for _ in range(len(self.dropped))]
        if gone:
            self.told.put({"op": "drop", "states": gone})
        self.told.put({"op": op, "states": list(states), **given})

    def calls(self) -> Iterator[dict[str, Any]]:
        while (message := self.told.get())["op"] != "bye":
            yield message

    def answers(self) -> list[Any]:
        answer = self.replies.get(timeout=60)
        if isinstance(answer, Exception):
            raise InputError(str(answer))
        return [answer]

    def answer(self, value: Any) -> None:
        self.replies.put(value)

    refuse = answer

    @contextmanager
    def at_work(self, tokens: int) -> Iterator[None]:
        yield

    def later(self, task: Callable[[], object]) -> None:
        task()

    def checked(self, **values: Any) -> None:
        self.on_checked(1, values)

    def name(self, rank: int) -> str:
        return f"rank {rank}"

    def fail(self, line: str) -> None:
        self.failed.append(line)

    def shared(self, ids: mx.array, group: Any) -> mx.array:
        if threading.current_thread().name == "follower":
            return self.ids.get(timeout=60)
        self.ids.put(ids)
        return ids


class Pair:
    """A model that leads, and the states of the one that follows."""

    def __init__(self, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.link, self.states = Both(), {}
        monkeypatch.setattr(mirror, "_shared", self.link.shared)
        self.model = LedModel(lm.model, self.link)  # type: ignore[arg-type]
        self.thread = threading.Thread(target=self._follow, args=(lm,), name="follower")
        self.thread.start()

    def _follow(self, lm: LanguageModel) -> None:
        try:
            follow(lm.model, self.link, self.states)  # type: ignore[arg-type]
        except BaseException as error:
            self.link.error = error

    def end(self) -> None:
        self.link.told.put({"op": "bye", "states": []})
        self.thread.join(60)
        assert self.link.error is None
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def small() -> LanguageModel:
    return load(HERE / "31b-f32.gguf")


@pytest.fixture
def pair(small: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    pair = Pair(small, monkeypatch)
    yield pair
    if pair.thread.is_alive():
        pair.end()


def same(a: KVState, b: KVState) -> None:
    assert a.tokens == b.tokens
    assert [mark.position for mark in a.marks] == [mark.position for mark in b.marks]
    for i, kv in a.layers.items():
        other = b.layers[i]
        assert kv.count == other.count
        for mine, theirs in zip(kv.pieces, other.pieces, strict=True):
            assert (mine.start, mine.stop) == (theirs.start, theirs.stop)
            n = mine.stop - mine.start
            assert np.array_equal(np.array(mine.keys[:, :, :n]), np.array(theirs.keys[:, :, :n]))


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
