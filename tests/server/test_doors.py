"""Embeddings, echoed log-probabilities, replies that are begun, responses that go on, llama.cpp's endpoints."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import mlx.core as mx
import numpy as np
import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from serving import Serving, serving

from mlx_gemma4 import LanguageModel
from mlx_gemma4.conversation.reply import prompt_ids
from mlx_gemma4.generation.scoring import score
from mlx_gemma4.measure.perplexity import perplexity
from mlx_gemma4.model.forward import run_layers
from mlx_gemma4.server import stored
from mlx_gemma4.server.settings import Settings

ASK = [{"role": "user", "content": "Tell me a story about a king."}]
TEXT = "Once upon a time there was a king who had three sons. " * 12


@pytest.fixture(scope="module")
def server(lm: LanguageModel) -> Iterator[Serving]:
    with serving(lm, Settings(model_name="demo", max_tokens=300)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Serving) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60)


def logprobs_of(lm: LanguageModel, ids: list[int]) -> np.ndarray:
    """By a forward pass over all of them: [T, vocab]."""
    logits = lm.model.forward(mx.array(ids), lm.model.new_state(), all_logits=True)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


# Scores and embeddings


def test_scores_are_those_of_a_forward_pass(lm: LanguageModel) -> None:
    ids = lm.tokenizer.encode(TEXT)
    right = logprobs_of(lm, ids)
    found = list(score(lm.model, ids, lm.model.new_state(), top=2, start=70))
    assert [token.id for token in found] == ids[70:]
    for i, token in enumerate(found, 69):
        assert token.logprob == pytest.approx(right[i, ids[i + 1]], abs=1e-4)
        best = np.argsort(-right[i])[:2]
        assert [likely for likely, _ in token.top] == best.tolist()
        assert [value for _, value in token.top] == pytest.approx(right[i, best].tolist(), abs=1e-4)


def test_perplexity_is_of_the_second_halves(lm: LanguageModel) -> None:
    ids, losses = lm.tokenizer.encode(TEXT), []
    for i in range(len(ids) // 64):
        window = [lm.tokenizer.bos_id, *ids[64 * i + 1 : 64 * i + 64]]
        losses += [-logprobs_of(lm, window)[k - 1, window[k]] for k in range(33, 64)]
    found = perplexity(lm, TEXT, 64)
    assert found.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert found.error == pytest.approx(found.perplexity * np.std(losses) / np.sqrt(len(losses) - 1), rel=1e-3)
    assert (found.windows, found.predicted) == (len(ids) // 64, len(losses)) and len(losses) > 60


def test_an_embedding_is_the_mean_of_the_last_hidden_states(lm: LanguageModel, client: OpenAI) -> None:
    made = client.embeddings.create(model="demo", input=[TEXT, "A cat."], encoding_format="float")
    vectors = [np.array(one.embedding) for one in made.data]
    assert [one.index for one in made.data] == [0, 1] and vectors[0].shape == (lm.config.hidden,)
    assert all(np.linalg.norm(vector) == pytest.approx(1, abs=1e-5) for vector in vectors)
    ids = lm.tokenizer.encode("A cat.")
    states = run_layers(lm.model.loaded, mx.array(ids), [lm.model.new_state()], len(ids))
    normed = np.array(states, np.float64) * np.array(lm.model.weights.output_norm, np.float64)
    normed /= np.sqrt((np.array(states, np.float64) ** 2).mean(axis=-1, keepdims=True) + lm.config.eps)
    mean = normed.mean(axis=0)
    assert vectors[1] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)
    assert made.usage.prompt_tokens == len(ids) + len(lm.tokenizer.encode(TEXT))


def test_base64_and_token_ids(lm: LanguageModel, server: Serving, client: OpenAI) -> None:
    plain = client.embeddings.create(model="demo", input="A cat.")  # the client asks for base64
    body = {"input": lm.tokenizer.encode("A cat."), "encoding_format": "base64"}
    raw = httpx.post(f"{server.url}/embeddings", json=body).json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(raw), "<f4") == pytest.approx(plain.data[0].embedding)
    for wrong, path in (({"input": []}, "input"), ({"input": "a", "dimensions": 8}, "dimensions")):
        refused = httpx.post(f"{server.url}/v1/embeddings", json=wrong)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == path
    refused = httpx.post(f"{server.url}/v1/embeddings", json={"input": "word " * 3000})
    assert refused.status_code == 400 and "context" in refused.json()["error"]["message"]
    assert not server.engine.store.reserved


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_log_probabilities(client: OpenAI, lm: LanguageModel, stream: bool) -> None:
    """As lm-evaluation-harness asks: a prompt of ids, one more token, the likeliest of each place."""
    ids = lm.tokenizer.encode("Once upon a time there was a king")
    given: dict[str, Any] = {"model": "demo", "prompt": [ids, ids[:4]], "max_tokens": 1, "logprobs": 1, "echo": True}
    if stream:
        found: list[Any] = [[], []]
        for chunk in client.completions.create(**given, temperature=0, stream=True):
            one = chunk.choices[0]
            if one.logprobs:
                found[one.index] += zip(one.logprobs.token_logprobs, one.logprobs.top_logprobs, strict=True)
    else:
        choices = client.completions.create(**given, temperature=0).choices
        assert choices[0].text.startswith("Once upon a time there was a king")
        assert "".join(choices[0].logprobs.tokens[1:]) == choices[0].text
        found = [list(zip(c.logprobs.token_logprobs, c.logprobs.top_logprobs, strict=True)) for c in choices]
    right = logprobs_of(lm, ids)
    for some, n in zip(found, (len(ids), 4), strict=True):
        assert len(some) == n + 1 and some[0] == (None, None)
        assert [value for value, _ in some[1:n]] == pytest.approx(
            [right[i, ids[i + 1]] for i in range(n - 1)], abs=1e-4
        )
        assert [max(top.values()) for _, top in some[1:n]] == pytest.approx(right[: n - 1].max(axis=-1), abs=1e-4)


def test_echo_alone(client: OpenAI, lm: LanguageModel) -> None:
    given: dict[str, Any] = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 0}
    whole = client.completions.create(**given, logprobs=0, echo=True)
    logprobs = whole.choices[0].logprobs
    assert whole.choices[0].text == "Once upon a time" == "".join(logprobs.tokens)
    right = logprobs_of(lm, ids := lm.tokenizer.encode("Once upon a time"))
    assert logprobs.token_logprobs == pytest.approx([right[i, ids[i + 1]] for i in range(len(ids) - 1)], abs=1e-4)
    assert whole.usage and whole.usage.completion_tokens == 0
    assert client.completions.create(**given, echo=True).choices[0].logprobs is None
    (chunk,) = client.completions.create(**given, echo=True, stream=True)
    assert chunk.choices[0].text == "Once upon a time"
    with pytest.raises(BadRequestError, match="max_tokens"):
        client.completions.create(**given)


# Replies that are begun


def test_a_reply_that_is_begun_goes_on(client: OpenAI, server: Serving) -> None:
    def reply(*more: Any, **fields: Any) -> str:
        given = {"model": "demo", "messages": [*ASK, *more], "max_tokens": 24, "temperature": 0}
        return str(client.chat.completions.create(**given, extra_body=fields).choices[0].message.content)

    whole = reply()
    begun = " ".join(whole.split()[:5])
    said = {"role": "assistant", "content": begun}
    rest = reply(said, continue_final_message=True, add_generation_prompt=False)
    assert (begun + rest).startswith(whole)
    assert reply(said) != rest, "without it, the message is one that has been said"
    for wrong, fields in (([], {}), ([said], {"add_generation_prompt": True})):
        with pytest.raises(BadRequestError, match="continue_final_message"):
            reply(*wrong, continue_final_message=True, **fields)
    theirs = anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0)
    given: dict[str, Any] = {"model": "demo", "messages": [*ASK, said]}
    made = theirs.messages.create(**given, max_tokens=24, extra_body={"temperature": 0})
    assert made.content[0].text == rest
    assert theirs.messages.count_tokens(**given).input_tokens == made.usage.input_tokens + (
        made.usage.cache_read_input_tokens or 0
    )


def test_thinking_that_is_begun_goes_on(lm: LanguageModel, client: OpenAI) -> None:
    said = {"role": "assistant", "content": "", "reasoning_content": "The reader wants"}
    given: dict[str, Any] = {"model": "demo", "messages": [*ASK, said], "max_tokens": 5, "temperature": 0}
    more = {"continue_final_message": True, "chat_template_kwargs": {"enable_thinking": True}}
    message = client.chat.completions.create(**given, extra_body=more).choices[0].message
    assert message.reasoning_content and not message.content


# Responses that go on


def test_responses_go_on_from_earlier_ones(client: OpenAI, lm: LanguageModel) -> None:
    given: dict[str, Any] = {"model": "demo", "max_output_tokens": 8, "temperature": 0}
    first = client.responses.create(**given, input="Hello!", instructions="Be kind.")
    second = client.responses.create(**given, input="And then?", previous_response_id=first.id)
    said = [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And then?"},
    ]
    assert second.usage and second.usage.input_tokens == len(prompt_ids(lm, said)), "instructions don't carry over"
    assert second.previous_response_id == first.id and second.store is True
    third = list(client.responses.create(**given, input="Why?", previous_response_id=second.id, stream=True))
    assert third[-1].response.usage.input_tokens > second.usage.input_tokens
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    with pytest.raises(NotFoundError):
        client.responses.retrieve(first.id)
    assert client.responses.create(**given, input="?", previous_response_id=second.id).status == "incomplete"
    unkept = client.responses.create(**given, input="Hello!", store=False)
    with pytest.raises(BadRequestError) as refused:
        client.responses.create(**given, input="?", previous_response_id=unkept.id)
    assert refused.value.code == "previous_response_not_found" and unkept.store is False


def test_calls_of_an_earlier_response_find_their_results(client: OpenAI) -> None:
    tool: dict[str, Any] = {"type": "function", "name": "hour", "parameters": {"type": "object", "properties": {}}}
    tool["parameters"]["additionalProperties"] = False
    given: dict[str, Any] = {"model": "demo", "tools": [tool], "temperature": 0, "max_output_tokens": 60}
    first = client.responses.create(**given, input="What time is it?", tool_choice="required")
    (call,) = [item for item in first.output if item.type == "function_call"]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "noon"}
    second = client.responses.create(**given, input=[result], previous_response_id=first.id, tool_choice="none")
    assert second.output_text


def test_what_is_kept_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "MOST", 3)
    monkeypatch.setattr(stored, "MOST_BYTES", 1000)
    kept = stored.Stored()
    for i in range(5):
        kept.put({"id": str(i)}, [])
    assert [bool(kept.get(str(i))) for i in range(5)] == [False, False, True, True, True]
    kept.put({"id": "large"}, [{"content": "x" * 980}])
    assert kept.get("large") is None or kept.get("4") is None
    assert kept.delete("nothing") is False


def test_truncation(client: OpenAI, lm: LanguageModel) -> None:
    words = "word " * 400
    talk: list[Any] = [{"role": role, "content": words} for _ in range(4) for role in ("user", "assistant")]
    given: dict[str, Any] = {"model": "demo", "input": [*talk, *ASK], "max_output_tokens": 5}
    made = client.responses.create(**given, truncation="auto")
    assert made.truncation == "auto" and made.usage and 800 < made.usage.input_tokens < lm.config.context
    with pytest.raises(BadRequestError, match="context"):
        client.responses.create(**given)


# llama.cpp's


def test_tokens_and_templates(server: Serving, lm: LanguageModel) -> None:
    def post(path: str, **body: Any) -> Any:
        return httpx.post(server.url + path, json=body).json()

    ids = lm.tokenizer.encode("The naïve king\n", add_bos=False)
    assert post("/tokenize", content="The naïve king\n") == {"tokens": ids}
    assert post("/tokenize", content="The naïve king\n", add_special=True)["tokens"] == [lm.tokenizer.bos_id, *ids]
    assert post("/detokenize", tokens=ids)["content"] == "The naïve king\n"
    (turn,) = post("/tokenize", content="<|turn>")["tokens"]
    assert turn == lm.tokenizer.token_id("<|turn>")
    assert len(post("/tokenize", content="<|turn>", parse_special=False)["tokens"]) > 1
    pieces = post("/tokenize", content="a🜚", with_pieces=True)["tokens"]
    parts = [one["piece"].encode() if isinstance(one["piece"], str) else bytes(one["piece"]) for one in pieces]
    assert b"".join(parts).decode() == "a🜚" and any(isinstance(one["piece"], list) for one in pieces)
    assert post("/detokenize", tokens=[10**7])["error"]["param"] == "tokens"
    prompt = post("/apply-template", messages=ASK)["prompt"]
    assert lm.tokenizer.encode(prompt, parse_special=True) == prompt_ids(lm, ASK)
    props = httpx.get(f"{server.url}/props").json()
    assert props["default_generation_settings"]["n_ctx"] == lm.config.context
    assert props["chat_template"] == lm.tokenizer.chat_template and props["bos_token"] == "<bos>"
    assert json.dumps(props)
