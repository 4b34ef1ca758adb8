"""Drafts of replies that step together: how many each has, and that all say what they say alone."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from constraints import Alternating
from drafters import KnowingAll
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_state import SmallModel, small_model
from threaded import together

from mlx_gemma4.generation import batch_drafts, drafting
from mlx_gemma4.generation.batch_drafts import BatchDrafts, Offer, allotted
from mlx_gemma4.generation.decoding import Statistics
from mlx_gemma4.generation.drafting import GAIN, Drafting, Drafts, learn
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.generation.sampling import Sampling
from mlx_gemma4.generation.scheduler import Scheduler
from mlx_gemma4.kv.segments import SegmentLayout
from mlx_gemma4.kv.state import KVState
from mlx_gemma4.model.batch import rows_for
from mlx_gemma4.model.decode import MAX_CHECKED
from mlx_gemma4.model.step import BatchStep, Tokens
from mlx_gemma4.ops.dispatch import REPLAY
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
    plain: list[int]  # of each step without drafts of several states, how many with drafts were before it

    @property
    def replays(self) -> bool:
        return True

    def checks_replayed(self, state: KVState, rows: int = MAX_CHECKED) -> bool:
        return state.kv == "full"

    def most_checked(self, state: KVState) -> int:
        return min(MAX_CHECKED, state.layout.tail - state.length % state.layout.tail)

    def replayed_check(
        self, ids: Sequence[Sequence[int]], states: Sequence[KVState], draws: Sequence[Draw] = (), queued: Any = None
    ) -> Any:
        assert queued is None
        self.rows.append([len(some) for some in ids])
        return Checked(self, ids, states, draws)

    def batch(
        self, tokens: Tokens, states: Sequence[KVState], draws: Sequence[Draw] | None = None, replay: bool = True
    ) -> BatchStep:
        self.plain.append(len(self.rows))
        return super().batch(tokens, states, draws, replay)


@pytest.fixture(scope="module")
def model() -> Checking:
    return checking()


@cache
def checking() -> Checking:
    small = small_model("e2b", 64, SegmentLayout())
    made = Checking(small.config, small.weights)
    made.layout, made._numpy_step, made.rows, made.plain = small.layout, None, [], []
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


@pytest.mark.slow
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
    # On a busy machine the first may be over before the last has come.
    at_once = max(map(len, model.rows))
    assert count // 2 < at_once <= count and max(map(sum, model.rows)) > at_once


@pytest.mark.slow
@pytest.mark.parametrize("right", [0.5, 1.0])
def test_by_measurement(model: Checking, right: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows cost nothing: by a model and by repetition, as many as there is room for, and equal replies."""
    monkeypatch.setattr(BatchDrafts, "costs", lambda self: [1.0] * 6)
    monkeypatch.setattr(BatchDrafts, "stepped", lambda self, replies, drafted: None)
    want = [alone(i, i, 40) for i in range(6)]
    knows = KnowingAll({100 + i: prompt(i) + w[0] for i, w in enumerate(want)}, right)
    for drafter in (knows, None):
        drafts = Drafts(drafter=drafter)
        model.rows.clear()
        with Scheduler(model, 8, drafts=drafts) as scheduler:
            assert scheduler._drafts is not None
            scheduler._drafts.plain = dict.fromkeys((1, 2, 4, 8), 1.0)
            got = together([lambda i=i: made(model, i, i, 40, scheduler.generate_tokens) for i in range(6)])
        assert [g[:3] for g in got] == want
        assert max(map(sum, model.rows)) > 8 and max(map(sum, model.rows)) <= 32
        assert sum(g[3].accepted_tokens for g in got) > 9
        assert drafts.accepted and all(kind == "model" or kind[:5] == "alike" for kind in drafts.accepted)


def test_states_that_are_not_in_pages_have_none(model: Checking) -> None:
    """Quantized ones: then nobody beside them has, and all say what they say alone."""
    want = [alone(i, 0, 20) for i in range(2)]
    quantized = [t.id for t in generate_tokens(model, model.new_state(kv="q8"), prompt(2), GREEDY, 60)]
    knows = KnowingAll({100 + i: prompt(i) + w[0] for i, w in enumerate([*want, (quantized,)])}, 1.0)
    model.rows.clear()
    with Scheduler(model, 8, drafts=Drafts(depth=3, drafter=knows, least_alike=NEVER)) as scheduler:
        generate = scheduler.generate_tokens
        other = generate(model.new_state(kv="q8"), prompt(2), GREEDY, 60)
        first = [next(other).id]
        tasks = [lambda i=i: made(model, i, 0, 20, generate) for i in range(2)]
        *got, rest = together([*tasks, lambda: [t.id for t in other]])
    assert [g[:3] for g in got] == want and first + rest == quantized
    assert not model.rows


def test_near_ties_take_a_row_of_their_own(model: Checking, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each place is one, drafts gain nothing, every second step has none, and replies are the same."""
    monkeypatch.setattr(drafting, "NEAR", 1e9)
    model.plain.clear()
    want = [alone(i, 0, 30) for i in range(3)]
    knows = KnowingAll({100 + i: prompt(i) + w[0] for i, w in enumerate(want)}, 1.0)
    model.rows.clear()
    with Scheduler(model, 8, drafts=Drafts(depth=3, drafter=knows, least_alike=NEVER)) as scheduler:
        got = together([lambda i=i: made(model, i, 0, 30, scheduler.generate_tokens) for i in range(3)])
    assert [g[:3] for g in got] == want and not any(g[3].accepted_tokens for g in got)
    pairs = enumerate(pairwise(model.rows), 1)
    three = [(a, b) for n, (a, b) in pairs if len(a) == len(b) == 3 and n not in model.plain]
    assert any(len(rows) == 3 and max(rows) > 1 for rows in model.rows)
    assert not any(before > 1 and after > 1 for a, b in three for before, after in zip(a, b, strict=True))


@pytest.mark.parametrize("broken", ["start", "tokens"])
def test_an_error_in_a_step_costs_no_token(model: Checking, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it starts, and when its tokens are asked for: all is read again."""
    want = [alone(i, 0, 24) for i in range(3)]
    kernels = SimpleNamespace(off=frozenset(), one_by_one=nullcontext, eager=False)
    knows = KnowingAll({100 + i: prompt(i) + w[0] for i, w in enumerate(want)}, 0.8)
    real, count = model.replayed_check, itertools.count()

    def fails(ids: Any, states: Any, draws: Any = ()) -> Any:
        if len(ids) < 3 or next(count) != 3:
            return real(ids, states, draws)
        monkeypatch.setattr(model, "kernels", kernels)
        if broken == "start":
            raise RuntimeError("no such kernel")
        step = real(ids, states, draws)
        step.tokens = tokens_fail
        return step

    def tokens_fail() -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(model, "replayed_check", fails)
    with Scheduler(model, 8, drafts=Drafts(depth=3, drafter=knows, least_alike=NEVER)) as scheduler:
        got = together([lambda i=i: made(model, i, 0, 24, scheduler.generate_tokens) for i in range(3)])
    assert [g[:3] for g in got] == want
    assert next(count) > 3 and REPLAY in kernels.off


ONE = st.tuples(st.integers(0, 7), st.integers(1, 25), st.integers(0, 30), st.integers(0, 30))


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(
    replies=st.lists(ONE, min_size=2, max_size=8), right=st.sampled_from([0.2, 0.6, 0.9, 1.0]), depth=st.integers(1, 7)
)
def test_they_join_and_leave_at_any_token(replies: list[tuple[int, int, int, int]], right: float, depth: int) -> None:
    """Replies of any sampling that begin when so many tokens have been made, and are left after so many."""
    model = checking()
    want = [alone(i, way, n) for i, (way, n, _, _) in enumerate(replies)]
    knows = KnowingAll({100 + i: prompt(i) + w[0] for i, w in enumerate(want)}, right, needs_hidden=depth % 2 == 1)
    with Scheduler(model, 8, drafts=Drafts(depth=depth, drafter=knows)) as scheduler:

        def one(i: int) -> None:
            way, n, take, when = replies[i]
            end = time.monotonic() + 0.2
            while scheduler.steps < when and time.monotonic() < end:
                time.sleep(0.001)
            tokens, held, _, _ = made(model, i, way, n, scheduler.generate_tokens, take)
            assert tokens == want[i][0][:take]
            assert held[: len(prompt(i) + tokens)] == prompt(i) + tokens and len(held) <= len(prompt(i) + tokens) + 1

        assert together([lambda i=i: one(i) for i in range(len(replies))]) == [None] * len(replies)


def plain_search(offers: list[Offer]) -> float:
    """The most tokens a second that any numbers of drafts make."""
    best = len(offers) / STEPS[rows_for(len(offers))]
    for counts in itertools.product(*(range(len(offer.shares) + 1) for offer in offers)):
        tokens = len(offers) + sum(
            offer.chance * sum(itertools.accumulate(offer.shares[:n], lambda a, b: a * b))
            for offer, n in zip(offers, counts, strict=True)
        )
        seconds = STEPS[rows_for(len(offers) + sum(counts))] + sum(
            sum(offer.seconds[:n]) for offer, n in zip(offers, counts, strict=True)
        )
        best = max(best, tokens / seconds)
    return best


def test_numbers_of_drafts_are_the_best() -> None:
    """Of replies whose drafts cost the same, all numbers tried; others within what the order of adding loses."""
    costs = [*STEPS.values()]
    chance = random.Random(0)
    for _ in range(60):
        offers = [
            Offer([chance.choice([0.2, 0.5, 0.7, 0.9])] * chance.randrange(5), chance=chance.choice([1.0, 0.6]))
            for _ in range(chance.choice([1, 2, 3, 4]))
        ]
        plain = STEPS[rows_for(len(offers))]
        counts, rate = allotted(offers, plain, costs)
        best = plain_search(offers)
        if any(counts):
            assert rate == pytest.approx(best) and all(n <= len(o.shares) for n, o in zip(counts, offers, strict=True))
        else:
            assert best <= GAIN * len(offers) / plain * 1.000001


def test_numbers_of_drafts() -> None:
    costs = [*STEPS.values()]
    sure, half, never = Offer([0.9] * 7), Offer([0.5] * 7), Offer([0.02] * 7)
    assert allotted([sure, sure], 10.2, costs)[0] == [7, 7]
    assert allotted([Offer([0.7] * 7, [0.25] * 7)] * 4, 10.5, costs)[0] == [3, 3, 3, 3]
    assert allotted([sure, never], 10.2, costs)[0] == [6, 0]
    assert allotted([never, never, half], 10.5, costs)[0] == [0, 0, 5]
    assert allotted([Offer(), Offer()], 10.2, costs)[0] == [0, 0]
    counts, _ = allotted([sure] * 8, 11.1, costs)
    assert sum(counts) == 24 and min(counts) == 3
    assert allotted([Offer([0.5] * 7, [0.3] * 7)] * 8, 11.1, costs)[0] == [0] * 8
    assert allotted([half] * 8, 11.1, costs)[0] == [1] * 8


class Clock:
    """Time as the steps below take it."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def learning(count: int) -> tuple[BatchDrafts, list[Any]]:
    """What is known of drafts before any was made, and so many replies that have them from a model."""
    drafts, model = Drafts(drafter=KnowingAll({}, 1.0), least_alike=NEVER), SimpleNamespace(recordings=1)
    model.checks_replayed, model.most_checked = lambda *_: True, lambda _: MAX_CHECKED
    replies: list[Any] = []
    for _ in range(count):
        drafting_of = Drafting(drafts)
        drafting_of.begun = True
        some: dict[str, Any] = {"drafting": drafting_of, "state": None, "ids": [5, 6], "sure": True, "stopped": False}
        replies.append(SimpleNamespace(**some, produced=0, max_tokens=1000))
    return BatchDrafts(cast(Any, model), drafts), replies


def test_one_draft_tells_of_more() -> None:
    """12B on an H200, ms: what a probe of one has shown lets both replies have three, not one after the other."""
    known, replies = learning(2)
    known.plain, known.checks, known.making = {2: 3.74}, {4: 4.79, 8: 4.81, 16: 7.65}, {1: 0.62}
    assert known.making_each(3) == pytest.approx([0.62, 0.23, 0.23], abs=0.002)
    for right in (0.6, 0.7):
        known.drafts.accepted["model"] = [right]
        assert known.plan(replies) == [("model", 3)] * 2
    known.making[3] = 2.5
    assert known.making_each(4) == pytest.approx([0.62, 0.23, 1.65, 0.53], abs=0.005)
    assert known.plan(replies)[0][1] < 3


# Of a reply's drafts, ms: the first one, and each further one in its terms. The last is 31B's assistant on an H200.
MAKING = [(0.0, 0.0), (0.25, 1.0), (0.34, 0.63)]


@pytest.mark.parametrize(("first", "further"), MAKING)
@pytest.mark.parametrize("count", [2, 4, 8, 16, 31])
def test_drafts_never_cost_more_than_3_percent(
    count: int, first: float, further: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With steps as one H200 makes them, whatever is right and whatever drafts take; where most is, they gain."""
    clock = Clock()
    monkeypatch.setattr(batch_drafts, "time", clock)
    for share in (0.0, 0.3, 0.5, 0.9):
        (known, replies), chance = learning(count), random.Random(1)
        tokens, start, drafted = 0, clock.now, False
        for _ in range(600):
            before, drafted = drafted, known.wanted(replies)
            if drafted:
                clock.now += 0 if before else STEPS[rows_for(count)] / 2  # the step under way
                plan = known.plan(replies)
                known._rows = count + sum(n for _, n in plan)
                for n in [n for _, n in plan if n]:
                    took = first * (1 + further * (n - 1))
                    known._making += took
                    learn(known.making, n, took)
                clock.now += known._making + STEPS[rows_for(known._rows)] + 0.5
                for kind, n in plan:
                    right = next((i for i in range(n) if chance.random() >= share), n)
                    tokens += 1 + right
                    if n:
                        known.drafts.found(kind, right, n)
            else:
                clock.now, tokens = clock.now + STEPS[rows_for(count)], tokens + count
            known.stepped(replies, drafted)
        gain = tokens / (clock.now - start) * STEPS[rows_for(count)] / count
        assert gain > 0.97, (share, gain)
        assert gain > 1.8 or share < 0.9 or count > 4
