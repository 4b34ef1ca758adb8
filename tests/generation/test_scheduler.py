"""The scheduler: replies of several threads, each as it is alone; who comes, leaves, waits and fails."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from constraints import Alternating
from plain_state import SmallModel, small_model
from threaded import together

from mlx_gemma4.errors import InputError
from mlx_gemma4.generation.decoding import Decoding, Statistics
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.generation.sampling import Sampling
from mlx_gemma4.generation.scheduler import AHEAD, Scheduler
from mlx_gemma4.kv.segments import SegmentLayout

GREEDY = Sampling(temperature=0)
WAYS = [
    GREEDY,
    Sampling(temperature=1, seed=3, top_k=40, top_p=0.9),
    Sampling(temperature=0.7, seed=4, min_p=0.05, repetition_penalty=1.2),
    Sampling(temperature=0, frequency_penalty=0.5, logit_bias={7: 2.0}),
]


@pytest.fixture(scope="module")
def model() -> SmallModel:
    return small_model("e2b", 64, SegmentLayout())


@pytest.fixture(params=[False, True], ids=["together", "exact"])
def scheduler(model: SmallModel, request: pytest.FixtureRequest) -> Iterator[Scheduler]:
    with Scheduler(model, 8, exact=request.param) as made:
        yield made
        assert until(lambda: not (made.waiting or made.rows)), "something is left behind"


def until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def some_tokens(n: int, seed: int = 0) -> list[int]:
    return [2, *np.random.default_rng(seed).integers(110, 317, n - 1).tolist()]


def made(generate: Any, model: SmallModel, i: int, n: int, **more: Any) -> tuple[Any, ...]:
    """A reply to the i-th prompt: its tokens with log-probabilities, what the state holds, and its figures."""
    state, statistics = model.new_state(kv=("full", "q8", "tq4")[i % 3 if i > 3 else 0]), Statistics()
    tokens = list(generate(state, some_tokens(20 + 9 * i, i), WAYS[i % len(WAYS)], n, statistics=statistics, **more))
    figures = statistics.prompt_tokens, statistics.reply_tokens, statistics.stop_reason
    return [t.id for t in tokens], [t.top for t in tokens], state.tokens, figures


def alone(model: SmallModel) -> Any:
    return lambda *args, **more: generate_tokens(model, *args, **more)


def asked(i: int) -> dict[str, Any]:
    """Options of the i-th reply."""
    return [{}, {"logprobs": 2}, {"constraint": Alternating(9)}, {"stop_ids": frozenset(range(110, 140))}][i % 4]


def test_each_is_as_alone(model: SmallModel, scheduler: Scheduler) -> None:
    """Of any sampling, with log-probabilities, constraints, stop tokens, quantized KV; some short, some long."""
    want = [made(alone(model), model, i, 6 + 7 * i, **asked(i)) for i in range(8)]
    generate = scheduler.generate_tokens
    got = together([lambda i=i: made(generate, model, i, 6 + 7 * i, **asked(i)) for i in range(8)])
    for i in range(8):
        assert (got[i][0], got[i][2:]) == (want[i][0], want[i][2:]), i
        for (id_a, a), (id_b, b) in zip(sum(got[i][1], ()), sum(want[i][1], ()), strict=True):
            assert id_a == id_b and a == pytest.approx(b, abs=1e-4)
    if not scheduler.exact:
        assert scheduler.steps < sum(len(w[0]) for w in want) / 2


def test_exact_is_exact(model: SmallModel) -> None:
    """To the bit: what the states hold gives the same logits."""

    def logits(generate: Any, i: int) -> np.ndarray:
        state = model.new_state()
        list(generate(state, some_tokens(200 + i, i), GREEDY, 10 + i))
        return np.array(model.forward(mx.array([3]), state))

    with Scheduler(model, 4, exact=True) as scheduler:
        got = together([lambda i=i: logits(scheduler.generate_tokens, i) for i in range(4)])
    for i in range(4):
        np.testing.assert_array_equal(got[i], logits(alone(model), i))


def test_they_join_and_leave_at_any_token(model: SmallModel, scheduler: Scheduler) -> None:
    """One goes on from alone to many and back; what the others took is in their states, and no token more."""
    long = some_tokens(30)
    want = [t.id for t in generate_tokens(model, model.new_state(), long, GREEDY, 120)]
    got: list[int] = []

    def leaves(i: int) -> None:
        until(lambda: len(got) > 8 * i)
        state, statistics = model.new_state(), Statistics()
        reply = scheduler.generate_tokens(state, some_tokens(25, i), WAYS[i % 4], 50, statistics=statistics)
        taken = [next(reply).id for _ in range(i)]
        reply.close()
        assert state.tokens == some_tokens(25, i) + taken
        assert statistics.reply_tokens == i

    def stays() -> None:
        got.extend(t.id for t in scheduler.generate_tokens(model.new_state(), long, GREEDY, 120))

    assert together([stays, *(lambda i=i: leaves(i) for i in range(1, 9))]) == [None] * 9
    assert got == want


def counted(model: SmallModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each chunk of a prompt that is read from now on."""
    sizes: list[int] = []
    real = Decoding.read_chunk

    def noted(self: Decoding, most: int) -> None:
        before = self.state.length
        real(self, most)
        sizes.append(self.state.length - before)

    monkeypatch.setattr(Decoding, "read_chunk", noted)
    return sizes


@pytest.mark.parametrize("kv", ["full", "q8", "tq4"])
def test_what_prompts_begin_with_is_read_once(model: SmallModel, kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the first that comes, also where others come while it is read or answered, and of what they go on with."""
    common = some_tokens(1300, 7)
    prompts = [common[: 1300 - 150 * (i % 3)] + some_tokens(9 + i, i)[1:] for i in range(6)]
    want = [[t.id for t in generate_tokens(model, model.new_state(kv=kv), ids, GREEDY, 30)] for ids in prompts]
    sizes = counted(model, monkeypatch)
    figures = [Statistics() for _ in prompts]
    with Scheduler(model, 8) as scheduler:
        beside = scheduler.generate_tokens(model.new_state(kv=kv), prompts[0], GREEDY, 30, statistics=figures[0])
        got = [[next(beside).id]]

        def ask(i: int) -> list[int]:
            state = model.new_state(kv=kv)
            made = [t.id for t in scheduler.generate_tokens(state, prompts[i], GREEDY, 30, statistics=figures[i])]
            assert state.tokens[: len(prompts[i])] == prompts[i]
            return made

        got += together([lambda i=i: ask(i) for i in range(1, 6)])
        got[0] += [t.id for t in beside]
    assert got == want
    assert sum(sizes) == sum(f.prompt_tokens for f in figures)
    assert all(f.prompt_tokens + f.reused_tokens == len(ids) for f, ids in zip(figures, prompts, strict=True))
    assert sum(sizes) < len(common) + 100


def test_nobody_waits_for_one_that_has_left(model: SmallModel) -> None:
    common = some_tokens(1500, 8)
    with Scheduler(model, 8) as scheduler:
        gone = scheduler.generate_tokens(model.new_state(), [*common, 200], GREEDY, 5, on_prompt=lambda *n: 1 / 0)
        others = [lambda: [t.id for t in scheduler.generate_tokens(model.new_state(), [*common, 201], GREEDY, 5)]] * 3
        left, *got = together([lambda: next(gone), *others])
    assert isinstance(left, ZeroDivisionError)
    assert got == [[t.id for t in generate_tokens(model, model.new_state(), [*common, 201], GREEDY, 5)]] * 3


def test_who_takes_no_tokens_holds_nobody_up(model: SmallModel, scheduler: Scheduler) -> None:
    state = model.new_state()
    slow = scheduler.generate_tokens(state, some_tokens(10), GREEDY, 400)
    next(slow)
    list(scheduler.generate_tokens(model.new_state(), some_tokens(10, 1), GREEDY, 60))
    assert until(lambda: not scheduler.rows)
    assert state.length <= 10 + 1 + AHEAD + 1
    rest = [t.id for t in itertools.islice(slow, 100)]
    assert rest == [t.id for t in generate_tokens(model, model.new_state(), some_tokens(10), GREEDY, 101)][1:]
    slow.close()
    assert state.length == 10 + 101


def test_a_prompt_is_read_in_pieces_while_others_are_answered(model: SmallModel) -> None:
    """And whole ones while nobody is. Its progress is told, and whoever tells it may end the reply."""
    seen: list[tuple[int, int]] = []
    prompt = some_tokens(1500, 5)
    with Scheduler(model, 8) as scheduler:
        list(scheduler.generate_tokens(model.new_state(), prompt, GREEDY, 2, on_prompt=lambda *n: seen.append(n)))
        assert seen == [(1024, 1500), (1500, 1500)]
        beside = scheduler.generate_tokens(model.new_state(), some_tokens(10), GREEDY, 400)
        next(beside)
        thread = threading.Thread(target=lambda: list(beside))
        thread.start()
        seen.clear()
        scheduler._rate = 1500.0
        list(scheduler.generate_tokens(model.new_state(), prompt, GREEDY, 2, on_prompt=lambda *n: seen.append(n)))
        assert thread.is_alive() and seen[0] == (128, 1500) and seen[-1] == (1500, 1500)
        state = model.new_state()

        def enough(done: int, total: int) -> None:
            raise KeyError(done)

        with pytest.raises(KeyError) as told:
            next(scheduler.generate_tokens(state, prompt, GREEDY, 2, on_prompt=enough))
        assert told.value.args[0] < 1500  # how much more is read depends on when the scheduler hears of it
        assert state.tokens == prompt[: state.length]
        thread.join()


def test_short_prompts_are_read_together_while_there_is_time(
    model: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several between two steps, unless those who are answered would wait too long."""
    reads: list[int] = []
    real = Scheduler._read_chunk

    def noted(self: Scheduler, job: Any, most: int) -> None:
        reads.append(self.steps)
        if len(reads) == 1:
            assert until(lambda: self._inbox.qsize() + self.waiting == 8)
        real(self, job, most)

    monkeypatch.setattr(Scheduler, "_read_chunk", noted)

    def ask(scheduler: Scheduler, i: int) -> None:
        list(scheduler.generate_tokens(model.new_state(), some_tokens(9, i), GREEDY, 200))

    for wait, at_once in ((100.0, range(4, 9)), (0.0, range(1, 2))):
        monkeypatch.setattr("mlx_gemma4.generation.scheduler.WAIT", wait)
        reads.clear()
        with Scheduler(model, 8) as scheduler:
            together([partial(ask, scheduler, i) for i in range(8)])
        assert len(reads) == 8 and max(reads.count(n) for n in reads) in at_once


def test_marks_are_left(model: SmallModel, scheduler: Scheduler) -> None:
    def marks(generate: Any) -> list[int]:
        state = model.new_state()
        list(generate(state, [*some_tokens(100), 106, *some_tokens(30, 3)], GREEDY, 5, turn_ends=frozenset([106])))
        return [mark.position for mark in state.marks]

    assert marks(scheduler.generate_tokens) == marks(alone(model)) == [101, 131]


def test_more_than_may_be_answered_wait(model: SmallModel) -> None:
    with Scheduler(model, 2) as scheduler:
        tasks = [lambda i=i: made(scheduler.generate_tokens, model, 0, 5 + i)[0] for i in range(7)]
        got = together(tasks)  # type: ignore[arg-type]
    whole = made(alone(model), model, 0, 11)[0]
    assert got == [whole[: 5 + i] for i in range(7)]


def test_mistakes_come_to_who_made_them(model: SmallModel, scheduler: Scheduler) -> None:
    class Broken(Alternating):
        def mask(self) -> np.ndarray:
            if len(self.seen) == 3:
                raise KeyError("no mask")
            return super().mask()

    def ask(prompt: list[int], sampling: Sampling = GREEDY, **more: Any) -> list[int]:
        return [t.id for t in scheduler.generate_tokens(model.new_state(), prompt, sampling, 30, **more)]

    got = together(
        [
            lambda: ask([]),
            lambda: ask(some_tokens(9), constraint=Broken(20)),
            lambda: ask(some_tokens(9), Sampling(logit_bias={10**7: 1.0})),
            lambda: ask(some_tokens(9)),
        ]
    )
    assert isinstance(got[0], InputError) and isinstance(got[2], InputError) and isinstance(got[1], KeyError)
    assert got[3] == [t.id for t in generate_tokens(model, model.new_state(), some_tokens(9), GREEDY, 30)]
    assert not list(scheduler.generate_tokens(model.new_state(), some_tokens(9), GREEDY, 0))


def test_closing_ends_all(model: SmallModel) -> None:
    scheduler = Scheduler(model, 2)
    replies = [scheduler.generate_tokens(model.new_state(), some_tokens(9, i), GREEDY, 400) for i in range(3)]
    close = lambda: until(lambda: scheduler.steps > 3) and scheduler.close()  # noqa: E731
    got = together([*(lambda r=r: list(r) for r in replies), close])
    assert [type(error) for error in got[:3]] == [RuntimeError] * 3 and got[3] is True
    with pytest.raises(RuntimeError, match="closed"):
        next(scheduler.generate_tokens(model.new_state(), some_tokens(9), GREEDY, 4))
    with pytest.raises(ValueError, match="33"):
        Scheduler(model, 33)


ENDING = """
import mlx.core as mx

from mlx_gemma4.generation.scheduler import Scheduler

class Compiling(Scheduler):
    def _round(self):
        for i in range(200):  # each is freed with Python's lock
            compiled.append(mx.compile(lambda x, i=i: [x + i]))
            compiled[-1](mx.zeros(3))
        return False

class Nothing:
    kernels = None

compiled = []
schedulers = [Compiling(Nothing()) for _ in range(4)]
for scheduler in schedulers:
    assert scheduler.close()
"""


def test_python_ends_after_it_was_closed() -> None:
    """Without waiting: what MLX keeps for the scheduler's thread is freed by then."""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
