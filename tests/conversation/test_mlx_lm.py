"""mlx-lm's own functions over our models: the same greedy tokens as ours, and its ways with prompts and caches."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from recorded import HERE

import mlx_gemma4
from mlx_gemma4 import InputError, LanguageModel, Sampling, chat, for_mlx_lm, prompt_ids

GREEDY = Sampling(temperature=0)
TALE = [{"role": "user", "content": "Tell me a tale about a goose & a <turn|>."}]


@pytest.fixture(scope="module")
def pair(lm: LanguageModel) -> Any:
    return for_mlx_lm(lm)


def test_the_same_greedy_tokens(lm: LanguageModel, pair: Any) -> None:
    model, tokenizer = pair
    prompt = tokenizer.apply_chat_template(TALE, add_generation_prompt=True, enable_thinking=False)
    assert prompt == prompt_ids(lm, TALE)
    ours = chat(lm, TALE, max_tokens=40, sampling=GREEDY)
    theirs = list(mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=40))
    assert [response.token for response in theirs] == [token.id for token in ours.tokens]
    assert "".join(response.text for response in theirs) == ours.text
    assert theirs[-1].finish_reason == "length"
    assert mlx_lm.generate(model, tokenizer, prompt=prompt, max_tokens=40) == ours.text


@pytest.mark.parametrize("name", ["e2b-q4_0", "26b-a4b-q4_0", "gemma3-q4_0"])
def test_other_models(name: str) -> None:
    other = mlx_gemma4.load(HERE / f"{name}.gguf")
    ids = list(range(110, 150))
    model, tokenizer = for_mlx_lm(other)
    ours = chat(other, ids, max_tokens=12, sampling=GREEDY)
    theirs = mlx_lm.stream_generate(model, tokenizer, ids, max_tokens=12)
    assert [r.token for r in theirs][: len(ours.tokens)] == [token.id for token in ours.tokens]


def test_a_reply_that_ends_by_itself(lm: LanguageModel, pair: Any) -> None:
    ids = prompt_ids(lm, [{"role": "user", "content": "Hello"}])
    *_, last = mlx_lm.stream_generate(*pair, ids, max_tokens=60)
    ours = chat(lm, "Hello", max_tokens=60, sampling=GREEDY)
    assert last.finish_reason == ours.finish_reason == "stop"
    assert mlx_lm.generate(*pair, prompt=ids, max_tokens=60) == ours.text


@pytest.mark.slow
def test_text_prompts_samplers_and_processors(lm: LanguageModel, pair: Any) -> None:
    model, tokenizer = pair
    text = tokenizer.apply_chat_template(TALE, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    assert text.startswith("<bos><|turn>user\n") and text.endswith("<|turn>model\n")
    assert tokenizer.encode(text.replace(" & a <turn|>", "")) == prompt_ids(
        lm, [{**TALE[0], "content": "Tell me a tale about a goose."}]
    )
    ours = mlx_gemma4.generate(lm, lm.encode_prompt("Once upon", raw=True), max_tokens=10, sampling=GREEDY)
    assert mlx_lm.generate(model, tokenizer, prompt="Once upon", max_tokens=10) == ours
    warm = make_sampler(temp=0.8, top_p=0.9)
    processors = make_logits_processors(repetition_penalty=1.2)
    made = mlx_lm.generate(model, tokenizer, prompt=text, max_tokens=10, sampler=warm, logits_processors=processors)
    assert made


def test_thinking_shows_as_in_mlx_lm(pair: Any) -> None:
    model, tokenizer = pair
    prompt = tokenizer.apply_chat_template(TALE, add_generation_prompt=True, enable_thinking=True)
    assert mlx_lm.generate(model, tokenizer, prompt=prompt, max_tokens=8).startswith("<|channel>thought")


def test_a_prompt_cache_goes_on_and_is_trimmed(lm: LanguageModel, pair: Any) -> None:
    model, tokenizer = pair
    cache = make_prompt_cache(model)
    ids = prompt_ids(lm, TALE)
    whole = [r.token for r in mlx_lm.stream_generate(model, tokenizer, ids, max_tokens=20, prompt_cache=cache)]
    read = cache[0].offset
    assert read >= len(ids) + 19 and can_trim_prompt_cache(cache) and cache[0].nbytes > 0
    assert trim_prompt_cache(cache, read - len(ids) - 5) == read - len(ids) - 5
    assert cache[0].kv.tokens == ids + whole[:5]
    rest = mlx_lm.stream_generate(model, tokenizer, whole[5:6], max_tokens=14, prompt_cache=cache)
    assert [r.token for r in rest] == whole[6:]


def test_what_cannot_be(lm: LanguageModel, pair: Any) -> None:
    model, tokenizer = pair
    with pytest.raises(InputError, match="batch of 2"):
        model(mx.zeros((2, 3), mx.int32))
    with pytest.raises(InputError, match="context holds 2048"):
        mlx_lm.generate(model, tokenizer, prompt=[5] * 2100, max_tokens=4)
