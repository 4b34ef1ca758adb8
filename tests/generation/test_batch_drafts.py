"""Drafts of replies that step together: how many each has, and that all say what they say alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from constraints import Alternating
from drafters import KnowingAll
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_state import SmallModel, small_model

from mlx_gemma4.generation.batch_drafts import BatchDrafts, Offer, allotted
from mlx_gemma4.generation.decoding import Statistics
from mlx_gemma4.generation.drafting import GAIN, Drafts
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.generation.sampling import Sampling
from mlx_gemma4.generation.scheduler import Scheduler
from mlx_gemma4.kv.segments import SegmentLayout
from mlx_gemma4.kv.state import KVState
from mlx_gemma4.model.batch import rows_for
from mlx_gemma4.model.decode import MAX_CHECKED
from mlx_gemma4.ops.sample import LIKELIEST, Draw, drawn

NEVER = 1 << 30  # tokens alike from which on repetition drafts
GREEDY = Sampling(temperature=0)
STEPS = {1: 7.6, 2: 10.2, 4: 10.5, 8: 11.1, 16: 14.8, 32: 22.0}  # ms, 31B on an H200


class Checked:
    """A step that checks drafts of several states, made of steps of one token, each to the bit what it is alone."""

    def __init__(self, model: SmallModel, ids: Sequence[Sequence[int]], states: Sequence[KVState], draws: Any) -> None:
        made = [model.check(some, state) for some, state in zip(ids, states, strict=True)]
        self._logits, self._hidden = (mx.concatenate([*column]) for column in zip(*made, strict=True))
        self._tokens = drawn(None, self._logits, draws or [LIKELIEST] * len(self._logits)).tolist()
        top = np.sort(np.array(self._logits), axis=1)
        self._leads = (top[:, -1] - top[:, -2]).tolist()

    def tokens(self) -> list[int]:
        return cast("list[int]", self._tokens)

    def leads(self) -> list[float]:
        return cast("list[float]", self._leads)

    def logits(self) -> mx.array:
        return self._logits

    def hidden(self, row: int) -> mx.array:
        return self._hidden[row]


class Checking(SmallModel):
    """A model that steps as where checks are replayed."""

    rows: list[list[int]]  # of each step that checked drafts, by state

    @property
    def replays(self) -> bool:
        return True

    def checks_replayed(self, state: KVState, rows: int = MAX_CHECKED) -> bool:
        return state.kv == "full"

    def most_checked(self, state: KVState) -> int:
        return min(MAX_CHECKED, state.layout.tail - state.length % state.layout.tail)

    def replayed_check(
        self, ids: Sequence[Sequence[int]], states: Sequence[KVState], draws: Sequence[Draw] = ()
    ) -> Any:
        self.rows.append([len(some) for some in ids])
        return Checked(self, ids, states, draws)


@pytest.fixture(scope="module")
def model() -> Checking:
    return checking()


@cache
def checking() -> Checking:
    small = small_model("e2b", 64, SegmentLayout())
    made = Checking(small.config, small.weights)
    made.layout, made._numpy_step, made.rows = small.layout, None, []
    return made


WAYS = [
    (GREEDY, {}),
    (Sampling(temperature=1, seed=3, top_k=40, top_p=0.9), {}),
    (Sampling(temperature=0.7, seed=4, min_p=0.05, repetition_penalty=1.2), {}),
    (GREEDY, {"logprobs": 2}),
    (Sampling(temperature=0.9, seed=8), {"constraint": 11}),
    (GREEDY, {"stop_ids": frozenset(range(110, 140))}),
    (Sampling(temperature=0, frequency_penalty=0.5, logit_bias={7: 2.0}), {"constraint": 30}),
    (Sampling(seed=9), {}),
]


def asked(way: int) -> tuple[Sampling, dict[str, Any]]:
    sampling, more = WAYS[way]
    return sampling, {k: Alternating(v) if k == "constraint" else v for k, v in more.items()}


def prompt(i: int) -> list[int]:
    return [2, 100 + i, *np.random.default_rng(i).integers(110, 317, 9 + 7 * i).tolist()]


@cache
def alone(i: int, way: int, n: int) -> tuple[list[int], list[int], tuple[Any, ...]]:
    return made(checking(), i, way, n, lambda *args, **more: generate_tokens(checking(), *args, **more))[:3]


def made(model: Checking, i: int, way: int, n: int, generate: Any, take: int = 1000) -> tuple[Any, ...]:
    """The first `take` tokens of a reply of n, what the state holds, and figures."""
    state, statistics = model.new_state(), Statistics()
    sampling, more = asked(way)
    reply = generate(state, prompt(i), sampling, n, statistics=statistics, **more)
    tokens = [token.id for token, _ in zip(reply, range(take), strict=False)]
    reply.close()
    return tokens, state.tokens, (statistics.reply_tokens, statistics.stop_reason), statistics


def together(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    found: list[Any] = [None] * len(tasks)

    def run(i: int) -> None:
        try:
            found[i] = tasks[i]()
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return found


@pytest.mark.parametrize("right", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_each_is_as_alone(model: Checking, count: int, right: float) -> None:
    """Of all samplings and lengths, constrained, stopped, with a drafter that needs hidden rows."""
    lengths = [12 + 5 * (i * 5 % 7) for i in range(count)]
    want = [alone(i, (i + count) % 8, n) for i, n in enumerate(lengths)]
    knows = KnowingAll({100 + i: prompt(i) + w[0] for i, w in enumerate(want)}, right, needs_hidden=True)
    model.rows.clear()
    with Scheduler(model, 8, drafts=Drafts(depth=3, drafter=knows, least_alike=NEVER)) as scheduler:
        generate = scheduler.generate_tokens
        got = together([lambda i=i, n=n: made(model, i, (i + count) % 8, n, generate) for i, n in enumerate(lengths)])
    for i in range(count):
        assert got[i][:3] == want[i], i
    figures = [g[3] for g in got]
    assert all(f.drafted_tokens >= f.accepted_tokens for f in figures)
    assert all((f.accepted_tokens > 0) == (right > 0) for f in figures if f.reply_tokens > 8)
    assert max(map(len, model.rows)) == count and max(map(sum, model.rows)) > count
