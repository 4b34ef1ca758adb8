"""Choosing tokens: each filter against a plain reference, and the loop around them."""

from __future__ import annotations

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from recorded import HERE

from mlx_gemma4 import InputError, Sampling, generate, load, stream
from mlx_gemma4.generation.decoding import Statistics
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.generation.prompt import prefill_chunk
from mlx_gemma4.generation.sampling import Sampler, penalise
from mlx_gemma4.gpu.render import cuda_launcher
from mlx_gemma4.model.costs import PREFILL_CHUNK
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops.dispatch import Kernels

LOGITS = [2.0, 1.5, 1.4, 0.2, -0.5, -3.0, 1.1, -0.1]


def drawn(s: Sampling, n: int = 300) -> np.ndarray:
    """How often each token comes up in n draws, as shares."""
    sampler, logits = Sampler(replace(s, seed=6), [0], len(LOGITS)), mx.array(LOGITS)
    return np.bincount([int(sampler(logits).token) for _ in range(n)], minlength=len(LOGITS)) / n


def reference(s: Sampling) -> np.ndarray:
    """The distribution that tokens are drawn from, by the definitions of the filters."""
    logits = dict(enumerate(LOGITS))
    if s.top_k:
        kept = sorted(logits, key=lambda i: -logits[i])[: s.top_k]
        logits = {i: logits[i] for i in kept}

    def shares() -> dict[int, float]:
        total = sum(math.exp(v) for v in logits.values())
        return {i: math.exp(v) / total for i, v in logits.items()}

    if s.top_p < 1:
        p, kept, mass = shares(), [], 0.0
        for i in sorted(p, key=lambda i: -p[i]):
            if mass >= s.top_p:
                break
            kept.append(i)
            mass += p[i]
        logits = {i: logits[i] for i in kept}
    if s.min_p:
        p = shares()
        logits = {i: v for i, v in logits.items() if p[i] >= s.min_p * max(p.values())}
    out = np.zeros(len(LOGITS))
    for i, v in logits.items():
        out[i] = math.exp(v / s.temperature)
    return out / out.sum()


@pytest.mark.parametrize(
    "s",
    [
        Sampling(),
        Sampling(temperature=0.3),
        Sampling(temperature=3.0),
        Sampling(top_k=1),
        Sampling(top_k=3),
        Sampling(top_k=100),
        Sampling(top_p=0.1),
        Sampling(top_p=0.7),
        Sampling(min_p=0.5),
        Sampling(top_k=5, top_p=0.8, min_p=0.3, temperature=0.8),
    ],
)
def test_sampling_follows_the_definitions(s: Sampling) -> None:
    ours, want = drawn(s), reference(s)
    assert set(np.flatnonzero(ours)) <= set(np.flatnonzero(want)), "a filtered token was drawn"
    # 300 draws: 4 standard deviations of a binomial share
    assert np.all(np.abs(ours - want) <= 4 * np.sqrt(want * (1 - want) / 300) + 1e-9)


def test_penalty() -> None:
    out = np.array(penalise(mx.array(LOGITS), mx.array([0, 5, 5]), 2.0))
    assert out[0] == 1.0
    assert out[5] == -6.0  # once, though it stands twice
    assert np.array_equal(np.delete(out, [0, 5]), np.delete(np.array(LOGITS, np.float32), [0, 5]))


@pytest.fixture(scope="module")
def lm():
    return load(HERE / "e2b-q4_k_m.gguf")


def tokens(lm, prompt, sampling=Sampling(temperature=0), n=20, **more) -> list[int]:  # noqa: B008
    return [token.id for token in generate_tokens(lm.model, lm.model.new_state(), prompt, sampling, n, **more)]


def test_greedy_is_the_likeliest_token_each_time(lm) -> None:
    """The pipelined loop against whole passes over a growing prompt."""
    prompt = [2, 10, 20, 30]
    ids = list(prompt)
    for _ in range(12):
        ids.append(int(mx.argmax(lm.model.forward(mx.array(ids), lm.model.new_state()))))
    assert tokens(lm, prompt, n=12) == ids[len(prompt) :]


def test_same_seed_same_reply(lm) -> None:
    prompt, s = [2, 10, 20], Sampling(temperature=1.0, seed=3, repetition_penalty=1.3, top_p=0.9)
    first = tokens(lm, prompt, s)
    assert tokens(lm, prompt, s) == first
    assert tokens(lm, prompt, Sampling(temperature=1.0, seed=4, top_p=0.9)) != first


def test_stops_before_a_stop_token(lm) -> None:
    whole = tokens(lm, [2, 10, 20])
    at = next(i for i in range(1, len(whole)) if whole[i] not in whole[:i])
    assert tokens(lm, [2, 10, 20], stop_ids=frozenset([whole[at]])) == whole[:at]


def test_ends_where_the_context_ends(lm) -> None:
    context = lm.config.context
    assert len(tokens(lm, [2] * (context - 5), n=100)) == 5
    with pytest.raises(InputError, match="512"):
        tokens(lm, [2] * context)
    with pytest.raises(InputError, match="empty"):
        tokens(lm, [])


def test_long_prompts_are_read_in_chunks(lm, monkeypatch) -> None:
    """The same reply however the prompt is cut, and progress that ends at its length."""
    prompt, seen = [2, *range(10, 110)], []
    whole = tokens(lm, prompt)
    assert len(prompt) < PREFILL_CHUNK
    monkeypatch.setattr(lm.model, "chunk", 16)
    assert tokens(lm, prompt, on_prompt=lambda done, total: seen.append((done, total))) == whole
    assert seen[0] == (16, 101)
    assert seen[-1] == (101, 101)


def test_statistics(lm) -> None:
    statistics = Statistics()
    assert len(tokens(lm, [2, 10, 20], n=8, statistics=statistics)) == 8
    assert (statistics.prompt_tokens, statistics.reply_tokens) == (3, 8)
    assert statistics.prompt_rate > 0
    assert statistics.reply_rate > 0
    assert statistics.peak_memory > 0


def test_stream_joins_to_generate(lm) -> None:
    s = Sampling(temperature=1, seed=1)
    chunks = list(stream(lm, "the and", max_tokens=40, sampling=s))
    assert "".join(chunk.text for chunk in chunks) == generate(lm, "the and", max_tokens=40, sampling=s)
    assert chunks[-1].token is None
    assert sum(chunk.token is not None for chunk in chunks) <= 40


def test_chat_template_and_raw_differ(lm) -> None:
    raw = lm.encode_prompt("the", raw=True)
    chat = lm.encode_prompt("the")
    assert raw[0] == chat[0] == 2
    assert chat.count(2) == 1
    assert len(chat) > len(raw)


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "top_k", "repetition_penalty"])
def test_impossible_sampling_is_refused(field: str) -> None:
    with pytest.raises(InputError, match=field.replace("_", "-")):
        Sampling(**{field: -3})


def test_chunks_are_larger_where_launches_cost(lm):
    """On NVIDIA a model of few heads reads more at a time; elsewhere all read alike."""
    heads = max(layer.heads for layer in lm.config.layers)
    on_nvidia = Model(lm.config, lm.model.weights, Kernels(cuda_launcher))
    assert prefill_chunk(lm.model) == PREFILL_CHUNK
    assert prefill_chunk(on_nvidia) == max(PREFILL_CHUNK, min(4 * PREFILL_CHUNK, 32 * PREFILL_CHUNK // heads))
