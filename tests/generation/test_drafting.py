"""Drafts change how many steps a reply takes, and nothing else."""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from constraints import Alternating
from drafters import Knowing
from plain_state import LAYOUTS, SmallModel, small_model, some_tokens

from mlx_gemma4 import Sampling
from mlx_gemma4.generation.decoding import Statistics
from mlx_gemma4.generation.drafting import MOST, Drafts, Lookup
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.generation.sampling import Token
from mlx_gemma4.generation.scheduler import Scheduler
from mlx_gemma4.model.model import Model

GREEDY = Sampling(temperature=0)
KINDS = ("12b", "26b-a4b", "31b", "e2b", "e4b", "gemma3")


def reply(
    model: Model, prompt: list[int], n: int, drafts: Drafts | None = None, sampling: Sampling = GREEDY, **more: Any
) -> tuple[list[Token], Any]:
    """Tokens of a reply, and its state."""
    state = model.new_state(kv=more.pop("kv", "full"))
    return list(generate_tokens(model, state, prompt, sampling, n, drafts=drafts, **more)), state


def ids(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


def same_kv(a: Any, b: Any) -> bool:
    """Whether two states hold the same tokens, keys and values, to the bit."""
    views = [
        (mine.views(0), theirs.views(0)) for mine, theirs in zip(a.layers.values(), b.layers.values(), strict=True)
    ]
    pairs = [(p[i], q[i]) for mine, theirs in views for p, q in zip(mine, theirs, strict=True) for i in (1, 2)]
    return a.tokens == b.tokens and bool(mx.all(mx.stack([mx.array_equal(p, q) for p, q in pairs])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv", ["full", "tq4"])
def test_rows_that_are_checked_are_to_the_bit_those_of_single_steps(kind: str, kv: str) -> None:
    """At every place of a tail and of the window, in every number."""
    model = small_model(kind, 13, LAYOUTS[2])
    one, several = model.new_state(kv=kv), model.new_state(kv=kv)
    for state in (one, several):
        model.prefill(mx.array(some_tokens(5)), state)
    for i in range(9):
        tokens = some_tokens(2 + i % MOST, i)[: model.most_checked(several)]
        logits, hidden = model.check(tokens, several)
        want = mx.stack([model.step(token, one).logits() for token in tokens])
        assert mx.array_equal(logits, want) and hidden.shape == (len(tokens), model.config.hidden)
    assert same_kv(one, several)


@functools.cache
def coming(model: SmallModel, seed: int, kv: str = "full") -> tuple[list[int], list[int], Any]:
    prompt = some_tokens(1 + random.Random(seed).randrange(16), seed)
    tokens, state = reply(model, prompt, 6, kv=kv)
    return prompt, ids(tokens), state


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_500_prompts_get_the_same_replies_with_drafts(kind: str) -> None:
    """At each depth; replies cross the ends of tails and segments and the edge of the window."""
    accepted = drafted = 0
    for seed in range(84):
        model, depth = small_model(kind, (5, 13, 33)[seed % 3], LAYOUTS[seed // 3 % 3]), 1 + seed % MOST
        prompt, want, state = coming(model, seed)
        knows = Knowing(prompt + want, (0.0, 0.5, 0.8, 1.0)[seed // 7 % 4], seed, needs_hidden=seed % 2 == 1)
        statistics = Statistics()
        got, after = reply(model, prompt, 6, Drafts(drafter=knows, depth=depth), statistics=statistics)
        assert ids(got) == want and (seed % 4 or same_kv(after, state)), f"prompt {seed}, {depth} drafts"
        accepted, drafted = accepted + statistics.accepted_tokens, drafted + statistics.drafted_tokens
    assert 0.3 * drafted < accepted < 0.9 * drafted


WAYS: list[tuple[Sampling, dict[str, Any]]] = [
    (GREEDY, {"kv": "tq4"}),
    (Sampling(seed=1), {}),
    (Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=2), {"kv": "q8"}),
    (Sampling(seed=3, repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.1), {}),
    (Sampling(seed=4, logit_bias={7: 3.0}), {"logprobs": 3}),
    (GREEDY, {"stop_ids": frozenset(range(3, 300, 9))}),
    (Sampling(seed=5), {"stop_ids": frozenset(range(3, 300, 9))}),
]


@pytest.mark.parametrize("depth", [1, 4, MOST])
@pytest.mark.parametrize("way", range(len(WAYS)))
def test_equal_seeds_give_equal_replies_whatever_else_is_asked(way: int, depth: int) -> None:
    sampling, more = WAYS[way]
    model, prompt = small_model("12b", 13, LAYOUTS[2]), some_tokens(20, way)
    want, state = reply(model, prompt, 24, sampling=sampling, **more)
    stop = list(state.tokens[20 + len(want) :])
    for right in (0.6, 1.0):
        knows, statistics = Knowing(prompt + ids(want) + stop, right, way), Statistics()
        got, after = reply(
            model, prompt, 24, Drafts(drafter=knows, depth=depth), sampling, statistics=statistics, **more
        )
        assert got == want and same_kv(after, state)
        assert (statistics.stop_reason == "stop") == bool(stop)
        assert statistics.drafted_tokens or len(want) < 3


def test_drafts_are_masked_first_under_a_constraint() -> None:
    model, prompt = small_model("e2b", 13, LAYOUTS[2]), some_tokens(20)
    for sampling in (GREEDY, Sampling(seed=1)):
        want, state = reply(model, prompt, 30, sampling=sampling, constraint=Alternating(17))
        knows, statistics = Knowing(prompt + ids(want), 0.8), Statistics()
        drafts = Drafts(drafter=knows, depth=5)
        more: dict[str, Any] = {"constraint": Alternating(17), "statistics": statistics}
        got, after = reply(model, prompt, 30, drafts, sampling, **more)
        assert got == want and same_kv(after, state) and statistics.stop_reason == "stop"
        # A draft that is wrong is of the other kind as often as not, and then no row is spent on it or those after it.
        assert statistics.accepted_tokens > 0.6 * statistics.drafted_tokens


def test_a_reply_that_is_left_holds_what_was_received() -> None:
    model, prompt = small_model("12b", 13, LAYOUTS[0]), some_tokens(20)
    want = ids(reply(model, prompt, 20)[0])
    for n in range(1, 12):
        state = model.new_state()
        made = generate_tokens(
            model, state, prompt, GREEDY, 20, drafts=Drafts(drafter=Knowing(prompt + want, 1), depth=4)
        )
        got = [next(made).id for _ in range(n)]
        made.close()
        assert got == want[:n] and state.tokens == prompt + got
        assert ids(list(generate_tokens(model, state, want[n : n + 1], GREEDY, 4))) == want[n + 1 : n + 5]


@pytest.mark.slow
def test_sampled_replies_are_distributed_as_without_drafts() -> None:
    """Two tokens over a vocabulary of 4, against the model's own probabilities: chi-square at 99.9%."""
    model, prompt, eight = small_model("12b", 13, LAYOUTS[2]), some_tokens(9), [5, 9, 40, 77]
    n = 200
    sampling = Sampling(temperature=1.5, logit_bias=dict.fromkeys(eight, 60.0), seed=0)
    first = mx.array(eight)

    def shares(tokens: list[int]) -> np.ndarray:
        logits = model.forward(mx.array(prompt + tokens), model.new_state())[first]
        return np.array(mx.softmax(logits / 1.5))

    counts = np.zeros((4, 4))
    for seed in range(n):
        knows = Knowing([*prompt, 5, 9, 40], 1.0)  # always the same drafts, likely or not
        drafts = Drafts(drafter=knows, depth=2)
        made = reply(model, prompt, 2, drafts, replace(sampling, seed=seed))[0]
        counts[eight.index(made[0].id), eight.index(made[1].id)] += 1
    want = n * shares([])[:, None] * np.stack([shares([i]) for i in eight])
    cells = want > 4  # the others together
    rest = (counts[~cells].sum() - want[~cells].sum()) ** 2 / max(1e-9, want[~cells].sum())
    chi = float(((counts - want)[cells] ** 2 / want[cells]).sum() + rest)
    df = int(cells.sum())
    assert df >= 5 and chi < df + 3.1 * (2 * df) ** 0.5 + 7, (chi, df)


def test_lookup_goes_on_where_most_is_alike() -> None:
    lookup = Lookup()
    tokens = [1, 2, 3, 4, 5, 6, 7, 9, 2, 3, 4, 8, 1, 2, 3, 4]
    assert lookup.search(tokens) == 4 and lookup.draft(tokens, count=3) == [5, 6, 7]
    assert lookup.search([*tokens, 5]) == 5
    assert lookup.search(tokens) == 4 and lookup.draft(tokens, count=2) == [5, 6]  # as before it had seen more
    assert lookup.search([*tokens, 5, 99]) == 0 and lookup.draft([*tokens, 5, 99], count=3) == []
    assert Lookup().draft([1, 2, 7, 7, 7, 7], count=4) == [7, 7, 7, 7]  # what repeats itself goes on
    assert Lookup().draft([4, 1, 2, 1, 2, 1, 2], count=5) == [1, 2, 1, 2, 1]
    assert [Lookup().search(some_tokens(n)) for n in (1, 2, 3)] == [0, 0, 0]


def test_a_repetitive_reply_takes_fewer_steps() -> None:
    """Nobody drafts but repetition."""
    model, prompt = small_model("31b", 13, LAYOUTS[2]), some_tokens(30) * 2
    want, _ = reply(model, prompt, 40)
    statistics = Statistics()
    got, _ = reply(model, prompt, 40, Drafts(depth=MOST), statistics=statistics)
    assert got == want and statistics.accepted_tokens > 10 and statistics.tokens_per_step > 1.3


def test_depth_follows_cost_and_acceptance() -> None:
    drafts = Drafts()
    for rows in range(1, 9):
        drafts.took(rows, 1 + 0.1 * (rows - 1))
    for _ in range(100):
        drafts.found("good", 7, 7)
        drafts.found("bad", 0, 1)
    assert drafts.depth("good") == MOST and drafts.depth("bad") == 0 and Drafts(most=2).depth("new") == 2
    probes = sum(drafts.probe("bad") for _ in range(10_000))
    assert 10 <= probes <= 40, "a draft that does not pay is tried seldom"
    for _ in range(60):
        drafts.found("bad", 1, 1)
    assert drafts.depth("bad") > 0
    for _ in range(40):
        for rows in range(2, 9):
            drafts.took(rows, rows * 1.2)  # rows got dear
    assert drafts.depth("good") == 0 and not max(drafts.rates("good", 7)) > 1.02 * drafts.rates("good", 0)[0]


def test_what_was_learned_is_kept_by_model_and_machine(tmp_path: Any) -> None:
    file = tmp_path / "new" / "drafts.json"
    drafts = Drafts()
    drafts.keep(file, "a")
    for _ in range(32):
        drafts.took(3, 0.5)
        drafts.found("alike 4", 2, 2)
    drafts.write()
    again, other = Drafts(), Drafts()
    again.keep(file, "a")
    other.keep(file, "b")
    assert again.seconds == drafts.seconds and again.accepted == drafts.accepted and not other.seconds
    file.write_text('{"a": {"seconds": {"1": -3}, "accepted": {}}}')
    broken = Drafts()
    broken.keep(file, "a")
    assert not broken.seconds


def test_nothing_is_lost_where_nothing_repeats() -> None:
    """The loop starts each step before its token is known, as without drafts, and the search costs microseconds."""
    model, prompt = small_model("12b", 13, LAYOUTS[2]), some_tokens(9)
    statistics = Statistics()
    want, _ = reply(model, prompt, 30, sampling=Sampling(seed=1, temperature=3.0))
    got, _ = reply(model, prompt, 30, Drafts(), Sampling(seed=1, temperature=3.0), statistics=statistics)
    assert got == want and statistics.drafted_tokens == 0


def test_replies_that_begin_beside_one_with_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone it drafts; when others join, what a step has found is handed out first; then it drafts again."""
    model, prompt = small_model("12b", 64, LAYOUTS[2]), some_tokens(20)
    want = ids(reply(model, prompt, 60)[0])
    others = [ids(reply(model, some_tokens(9, i), 6)[0]) for i in range(3)]
    drafts, statistics = Drafts(drafter=Knowing(prompt + want, 0.9), depth=3), Statistics()
    with Scheduler(model, 4, drafts=drafts) as scheduler:
        made = scheduler.generate_tokens(model.new_state(), prompt, GREEDY, 60, statistics=statistics)
        got = [next(made).id for _ in range(8)]
        monkeypatch.setattr(drafts.drafter, "right", 0.0)  # it knows the sequence of the long one alone
        for i, other in enumerate(others):
            assert ids(list(scheduler.generate_tokens(model.new_state(), some_tokens(9, i), GREEDY, 6))) == other
        got += ids(list(made))
    assert got == want and statistics.drafted_tokens > 20 and statistics.accepted_tokens > 0


def test_drafts_that_fail_are_off_and_the_reply_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = small_model("12b", 13, LAYOUTS[2]), some_tokens(20)
    want, state = reply(model, prompt, 20)
    drafts, real = Drafts(drafter=Knowing(prompt + ids(want), 1.0), depth=3), type(model).check

    def fails(self: Model, tokens: Any, state: Any) -> Any:
        if len(state.tokens) > 30:
            raise RuntimeError("a kernel that this GPU refuses")
        return real(self, tokens, state)

    monkeypatch.setattr(type(model), "check", fails)
    got, after = reply(model, prompt, 20, drafts)
    assert got == want and after.tokens == state.tokens and drafts.most == 0
