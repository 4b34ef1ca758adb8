"""Penalties, bias, masks and log-probabilities, each against a plain formula."""

from __future__ import annotations

from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from constraints import Alternating
from recorded import HERE

from mlx_gemma4 import InputError, Sampling, load
from mlx_gemma4.generation.decoding import Statistics
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.generation.sampling import Sampler, Token, log_probabilities, unpack_mask

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def lm():
    return load(HERE / "e2b-q4_k_m.gguf")


def reply(lm, sampling: Sampling = GREEDY, n: int = 20, **more) -> list[Token]:
    return list(generate_tokens(lm.model, lm.model.new_state(), [2, 10, 20], sampling, n, **more))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def logits_along(lm, tokens: list[int]) -> list[np.ndarray]:
    """The model's logits before each token of a reply, by whole passes."""
    ids = [[2, 10, 20, *tokens[:i]] for i in range(len(tokens))]
    return [np.array(lm.model.forward(mx.array(x), lm.model.new_state())) for x in ids]


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        Sampling(temperature=0.7, top_k=20, top_p=0.9, seed=3),
        Sampling(
            temperature=1.5, min_p=0.01, seed=4, repetition_penalty=1.2, presence_penalty=1.0, logit_bias={7: 50.0}
        ),
    ],
)
def test_logprobs_are_the_models_own(lm, sampling: Sampling, n: int) -> None:
    """log-softmax of the logits, whatever sampling makes of them."""
    tokens = reply(lm, sampling, 8, logprobs=n)
    for token, logits in zip(tokens, logits_along(lm, [token.id for token in tokens]), strict=True):
        want = log_softmax(logits)
        assert token.logprob == pytest.approx(want[token.id], abs=1e-4)
        best = np.sort(want)[::-1][:n]
        assert [p for _, p in token.top] == pytest.approx(best, abs=1e-4)
        assert [want[i] for i, _ in token.top] == pytest.approx(best, abs=1e-4)
        assert len({i for i, _ in token.top}) == n


def test_tokens_are_bare_unless_asked(lm) -> None:
    assert all(token.logprob is None and token.top == () for token in reply(lm))
    assert [token.id for token in reply(lm, logprobs=4)] == [token.id for token in reply(lm)]


def test_all_logprobs_make_one() -> None:
    ids, values = log_probabilities(mx.array([1.0, 2.0, 3.0]), mx.array(0), 3)[1:]
    assert ids.tolist() == [2, 1, 0]
    assert float(mx.exp(values).sum()) == pytest.approx(1)


@pytest.mark.parametrize(("frequency", "presence"), [(0.7, 0.0), (0.0, 1.3), (0.4, 0.9), (-0.5, 0.2)])
def test_penalties_as_openai_defines_them(lm, frequency: float, presence: float) -> None:
    """logit - count * frequency - (count > 0) * presence, counting the reply's tokens alone."""
    sampling = Sampling(temperature=0, frequency_penalty=frequency, presence_penalty=presence)
    tokens = [token.id for token in reply(lm, sampling)]
    for i, logits in enumerate(logits_along(lm, tokens)):
        adjusted = logits.astype(np.float64)
        for token, count in Counter(tokens[:i]).items():
            adjusted[token] -= count * frequency + presence
        assert adjusted[tokens[i]] == pytest.approx(adjusted.max(), abs=1e-4)
    assert tokens != [token.id for token in reply(lm)]


def test_bias(lm) -> None:
    """A token pushed up comes each time, one pushed down never."""
    assert {token.id for token in reply(lm, Sampling(temperature=1, logit_bias={77: 100.0}))} == {77}
    first = reply(lm, n=1)[0].id
    assert reply(lm, Sampling(temperature=0, logit_bias={first: -100.0}), 1)[0].id != first


def test_bias_by_the_formula() -> None:
    choose = Sampler(Sampling(temperature=0, logit_bias={1: 0.6, 0: -5}), [0], 3)
    assert int(choose(mx.array([2.0, 1.5, 2.05])).token) == 1
    assert int(choose(mx.array([9.0, 1.5, 2.2])).token) == 0


def test_sampling_can_be_a_key_whatever_form_its_bias_has() -> None:
    assert {Sampling(logit_bias={3: 1, 2: 0.5}), Sampling(logit_bias=((2, 0.5), (3, 1.0)))} == {
        Sampling(logit_bias=[(3, 1.0), (2, 0.5)])
    }


@pytest.mark.parametrize("vocab", [31, 32, 33, 64, 100])
def test_masks(vocab: int) -> None:
    """Bits of words, lowest first; nothing beyond them."""
    rng = np.random.default_rng(vocab)
    bits = rng.random(64) < 0.5
    words = np.packbits(bits, bitorder="little").view(np.uint32)
    want = np.concatenate([bits, np.zeros(36, bool)])[:vocab]
    np.testing.assert_array_equal(np.array(unpack_mask(mx.array(words), vocab)), want)
    choose = Sampler(Sampling(temperature=5, top_k=3, top_p=0.9, seed=1), [0], vocab)
    for _ in range(20):
        assert want[int(choose(mx.array(rng.normal(0, 9, vocab).astype(np.float32)), words).token)]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1, seed=2)])
def test_the_loop_keeps_to_a_constraint(lm, sampling: Sampling) -> None:
    constraint, state, statistics = Alternating(6), lm.model.new_state(), Statistics()
    made = generate_tokens(lm.model, state, [2, 10, 20], sampling, 20, statistics=statistics, constraint=constraint)
    tokens = [token.id for token in made]
    assert [token % 2 for token in tokens] == [0, 1, 0, 1, 0, 1]
    assert tokens == constraint.seen
    assert (statistics.stop_reason, statistics.reply_tokens) == ("stop", 6)
    assert state.tokens == [2, 10, 20, *tokens]
    if sampling is GREEDY:
        for i, logits in enumerate(logits_along(lm, tokens)):
            assert logits[tokens[i]] == pytest.approx(logits[i % 2 :: 2].max(), abs=1e-4)


@pytest.mark.parametrize("leave", [1, 3, 6])
def test_leaving_a_constrained_reply(lm, leave: int) -> None:
    """The state holds what was handed out and no more, as without one."""
    state = lm.model.new_state()
    made = generate_tokens(lm.model, state, [2, 10, 20], GREEDY, 20, constraint=Alternating(6))
    tokens = [next(made).id for _ in range(leave)]
    made.close()
    assert state.tokens == [2, 10, 20, *tokens]


def test_stop_tokens_end_a_constrained_reply(lm) -> None:
    free = [token.id for token in reply(lm, constraint=Alternating(6))]
    state, statistics = lm.model.new_state(), Statistics()
    stop = frozenset([free[2]])
    made = generate_tokens(lm.model, state, [2, 10, 20], GREEDY, 20, stop, statistics, constraint=Alternating(6))
    assert [token.id for token in made] == free[: free.index(free[2])]
    assert statistics.stop_reason == "stop"
    assert state.tokens == [2, 10, 20, *free[: free.index(free[2]) + 1]]


def test_reasons_to_stop(lm) -> None:
    statistics = Statistics()
    tokens = [token.id for token in reply(lm, n=7, statistics=statistics)]
    assert statistics.stop_reason == "length"
    reply(lm, n=7, statistics=statistics, stop_ids=frozenset(tokens[-1:]))
    assert statistics.stop_reason == "stop"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda lm: Sampling(frequency_penalty=float("nan")), "--frequency-penalty"),
        (lambda lm: Sampling(presence_penalty=float("inf")), "--presence-penalty"),
        (lambda lm: Sampling(logit_bias={1: float("nan")}), "logit_bias"),
        (lambda lm: reply(lm, Sampling(logit_bias={10**7: 1.0})), "there is no token 10000000"),
        (lambda lm: reply(lm, Sampling(logit_bias={-1: 1.0})), "there is no token -1"),
        (lambda lm: reply(lm, logprobs=-1), "--logprobs -1"),
        (lambda lm: reply(lm, logprobs=10**7), "--logprobs 10000000"),
    ],
)
def test_refused(lm, make, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make(lm)
