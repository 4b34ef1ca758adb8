"""Ollama's native API: lines of JSON as Ollama writes them, and Ollama's own clients where they are installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted import Actor
from serving import Serving, serving

from mlx_gemma4 import LanguageModel
from mlx_gemma4.conversation.reply import prompt_ids
from mlx_gemma4.server.settings import Settings

ASK = [{"role": "user", "content": "Tell me a story about a king."}]
FEW = {"num_predict": 12, "seed": 3, "temperature": 0.7}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"]},
    },
}
TIMES = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


@pytest.fixture(scope="module")
def server(lm: LanguageModel) -> Iterator[Serving]:
    with serving(replace(lm, media=None), Settings(model_name="demo", max_tokens=300)) as running:
        yield running


@pytest.fixture
def caller(lm: LanguageModel) -> Iterator[Serving]:
    """A server whose model calls a tool, once."""
    actor = Actor(lm, None).say('<|tool_call>call:weather{city:<|"|>Paris<|"|>}<tool_call|>')
    with serving(actor.lm, Settings(model_name="demo", parallel=1)) as running:
        yield running


def post(server: Serving, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/api/{path}", json={"model": "demo", **body}, timeout=60)


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200 and response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def test_chat_in_lines(server: Serving, lm: LanguageModel) -> None:
    *pieces, last = lines(post(server, "chat", messages=ASK, options=FEW))
    for piece in pieces:
        assert piece.keys() == {"model", "created_at", "message", "done"} and piece["done"] is False
        assert piece["message"].keys() == {"role", "content"} and piece["message"]["role"] == "assistant"
        datetime.fromisoformat(piece["created_at"].replace("Z", "+00:00"))
    assert len(pieces) > 5
    assert last["done"] is True and last["done_reason"] == "length" and last["message"]["content"] == ""
    assert last["eval_count"] == 12 and last["prompt_eval_count"] == len(prompt_ids(lm, ASK))
    assert all(isinstance(last[name], int) and 0 < last[name] < 60e9 for name in TIMES)
    assert last["total_duration"] >= last["eval_duration"] + last["prompt_eval_duration"]
    whole = post(server, "chat", messages=ASK, options=FEW, stream=False).json()
    assert whole["message"]["content"] == "".join(piece["message"]["content"] for piece in pieces)
    assert whole["done_reason"] == "length" and "context" not in whole


@pytest.mark.slow
def test_options(server: Serving) -> None:
    def text(**options: Any) -> str:
        made = post(server, "generate", prompt="Tell me a story.", stream=False, options={**FEW, **options}).json()
        return str(made["response"])

    greedy = text(temperature=0)
    assert greedy == text(top_k=1) == text(temperature=0, num_gpu=99, use_mmap=True)
    assert text(seed=5, temperature=1.5) == text(seed=5, temperature=1.5) != text(seed=6, temperature=1.5)
    stop = greedy[10:14]
    assert text(temperature=0, stop=[stop]) == text(temperature=0, stop=stop) == greedy[: greedy.index(stop)]
    assert text(temperature=0, repeat_penalty=1.0) != text(temperature=0, repeat_penalty=9.0)
    assert len(text(temperature=0, num_predict=3)) < len(greedy)
    prompt = post(server, "generate", prompt="Tell me a story.", stream=False, options=FEW).json()["prompt_eval_count"]
    cut = post(
        server, "generate", prompt="Tell me a story.", stream=False, options={**FEW, "num_ctx": prompt + 4}
    ).json()
    assert (cut["eval_count"], cut["done_reason"]) == (4, "length")
    ended = post(
        server, "chat", messages=[{"role": "user", "content": "Hello!"}], options={"num_predict": -1}, stream=False
    )
    assert ended.json()["done_reason"] == "stop"


def test_wrong_options_are_named(server: Serving) -> None:
    for body, words in (
        ({"options": {"top_p": "high"}}, "options.top_p"),
        ({"options": {"num_predict": -3}}, "num_predict"),
        ({"keep_alive": "soon"}, "keep_alive"),
        ({"format": "yaml"}, "format"),
        ({"messages": [{"role": "user", "content": "See", "images": ["aGk="]}]}, "messages[0].images"),
    ):
        refused = post(server, "chat", **{"messages": ASK, **body})
        assert refused.status_code == 400 and words in refused.json()["error"], refused.text
    refused = post(server, "generate", prompt="a", suffix="b")
    assert refused.status_code == 400 and "suffix" in refused.json()["error"]


def test_generate_goes_on_with_its_context(server: Serving, lm: LanguageModel) -> None:
    first = post(server, "generate", prompt="Hello!", system="Be kind.", stream=False, options=FEW).json()
    told = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello!"}]
    assert first["context"][: first["prompt_eval_count"]] == prompt_ids(lm, told)
    second = post(server, "generate", prompt="And now?", context=first["context"], stream=False, options=FEW).json()
    assert second["context"][: len(first["context"])] == first["context"]
    assert second["prompt_eval_count"] > len(first["context"])
    raw = post(server, "generate", prompt="Once upon a", raw=True, stream=False, options=FEW).json()
    assert raw["prompt_eval_count"] == len(lm.tokenizer.encode("Once upon a")) and "context" not in raw
    assert post(server, "generate", prompt="a", context=[10**7]).status_code == 400


def test_loading_and_letting_go(server: Serving) -> None:
    assert post(server, "generate").json()["done_reason"] == "load"
    assert post(server, "chat", messages=[], keep_alive=0).json()["done_reason"] == "unload"
    assert post(server, "generate", prompt="Hi", keep_alive="-1", options=FEW).status_code == 200


@pytest.mark.slow
def test_forms_and_thinking(server: Serving) -> None:
    schema = {"type": "object", "properties": {"old": {"type": "boolean"}}, "required": ["old"]}
    schema["additionalProperties"] = False
    made = post(server, "chat", messages=ASK, format=schema, stream=False, options={"seed": 1}).json()
    assert isinstance(json.loads(made["message"]["content"])["old"], bool)
    thought = post(server, "chat", messages=ASK, think=True, stream=False, options={**FEW, "num_predict": 80}).json()
    assert thought["message"]["thinking"]


def test_tools(caller: Serving, server: Serving) -> None:
    asked = [{"role": "user", "content": "What is the weather in Paris?"}]
    *pieces, last = lines(post(caller, "chat", messages=asked, tools=[WEATHER], options={"temperature": 0}))
    calls = [call for piece in pieces for call in piece["message"].get("tool_calls", [])]
    assert [call["function"] for call in calls] == [{"index": 0, "name": "weather", "arguments": {"city": "Paris"}}]
    assert last["done_reason"] == "stop"
    told = [*asked, {"role": "assistant", "content": "", "tool_calls": calls}]
    told.append({"role": "tool", "tool_name": "weather", "content": '{"weather": "sunny"}'})
    answer = post(server, "chat", messages=told, tools=[WEATHER], stream=False, options={"temperature": 0}).json()
    assert answer["message"]["content"]


def test_an_answer_that_is_begun_goes_on(server: Serving) -> None:
    whole = post(server, "chat", messages=ASK, stream=False, options={**FEW, "temperature": 0}).json()
    begun = {"role": "assistant", "content": " ".join(whole["message"]["content"].split()[:4])}
    rest = post(server, "chat", messages=[*ASK, begun], stream=False, options={**FEW, "temperature": 0}).json()
    assert (begun["content"] + rest["message"]["content"]).startswith(whole["message"]["content"])


@pytest.mark.slow
def test_old_turns_are_left_out_where_the_context_is_short(server: Serving, lm: LanguageModel) -> None:
    turns = [{"role": role, "content": "word " * 300} for _ in range(5) for role in ("user", "assistant")]
    talk = [{"role": "system", "content": "Be brief."}, *turns, *ASK]
    made = post(server, "chat", messages=talk, stream=False, options=FEW).json()
    assert 600 < made["prompt_eval_count"] < lm.config.context
    refused = post(server, "chat", messages=talk, truncate=False)
    assert refused.status_code == 400 and "context" in refused.json()["error"]


@pytest.mark.slow
def test_embeddings(server: Serving, lm: LanguageModel) -> None:
    texts = ["The king was very old.", "An old king ruled the land.", "She put bread in her pocket."]
    made = post(server, "embed", input=texts).json()
    one, same, other = made["embeddings"]
    assert len(one) == lm.config.hidden and sum(x * x for x in one) == pytest.approx(1, abs=1e-5)
    assert sum(a * b for a, b in zip(one, same, strict=True)) > sum(a * b for a, b in zip(one, other, strict=True))
    assert made["prompt_eval_count"] == sum(len(lm.tokenizer.encode(text)) for text in texts)
    assert len(post(server, "embed", input="a", dimensions=8).json()["embeddings"][0]) == 8
    assert post(server, "embeddings", prompt=texts[0]).json()["embedding"] == pytest.approx(one)
    assert post(server, "embed", input="word " * 3000).status_code == 200
    assert post(server, "embed", input="word " * 3000, truncate=False).status_code == 400


def test_show(server: Serving, lm: LanguageModel) -> None:
    shown = post(server, "show").json()
    assert shown["model_info"]["gemma4.context_length"] == lm.config.context
    assert shown["details"]["family"] == "gemma4" and "{%" in shown["template"]
    assert shown["capabilities"] == ["completion", "tools", "thinking"]


# Ollama's own clients, where they are installed: pip install ollama litellm; npm install ollama in $OLLAMA_JS


def test_ollama_python(server: Serving) -> None:
    ollama = pytest.importorskip("ollama")
    client = ollama.Client(host=server.url)
    assert [model.model for model in client.list().models] == ["demo"]
    assert client.show("demo").modelinfo["general.architecture"] == "gemma4"
    assert client.ps().models[0].model == "demo"
    pieces = list(client.chat("demo", ASK, stream=True, options=FEW))
    whole = client.chat("demo", ASK, options=FEW)
    assert whole.message.content == "".join(piece.message.content for piece in pieces) and whole.eval_count == 12
    assert pieces[-1].done_reason == "length"
    assert client.generate("demo", "Hello!", options=FEW).response

    def weather(city: str) -> str:
        """Tell the weather.

        Args:
            city: the city's name
        """
        return city

    assert client.chat("demo", ASK, tools=[weather], options=FEW).message is not None
    assert len(client.embed("demo", ["a", "b"]).embeddings) == 2
    assert len(client.embeddings("demo", "a").embedding) == 256
    with pytest.raises(ollama.ResponseError, match="not found") as refused:
        client.show("other")
    assert refused.value.status_code == 404


@pytest.mark.slow
def test_litellm(server: Serving, caller: Serving) -> None:
    litellm = pytest.importorskip("litellm")
    given = {"model": "ollama_chat/demo", "api_base": server.url, "messages": ASK, "max_tokens": 12, "seed": 3}
    reply = litellm.completion(**given)
    assert reply.choices[0].message.content and reply.usage.completion_tokens == 12
    pieces = [piece.choices[0].delta.content or "" for piece in litellm.completion(**given, stream=True)]
    assert "".join(pieces) == reply.choices[0].message.content
    asked = [{"role": "user", "content": "What is the weather in Paris?"}]
    called = litellm.completion(
        **{**given, "api_base": caller.url, "messages": asked, "max_tokens": 60}, tools=[WEATHER]
    )
    assert called.choices[0].message.tool_calls[0].function.name == "weather"
    assert len(litellm.embedding(model="ollama/demo", input=["a"], api_base=server.url).data[0]["embedding"]) == 256


JAVASCRIPT = """
import { Ollama } from 'ollama'
const ollama = new Ollama({ host: process.argv[2] }), messages = [{ role: 'user', content: 'Tell me a story.' }]
const options = { num_predict: 12, seed: 3 }, made = { text: '' }
made.models = (await ollama.list()).models.map((model) => model.name)
for await (const part of await ollama.chat({ model: 'demo', messages, options, stream: true })) {
  made.text += part.message.content
  if (part.done) made.reason = part.done_reason
}
made.whole = (await ollama.chat({ model: 'demo', messages, options })).message.content
made.generated = (await ollama.generate({ model: 'demo', prompt: 'Hello!', options })).response
made.embedded = (await ollama.embed({ model: 'demo', input: ['a', 'b'] })).embeddings.length
made.shown = (await ollama.show({ model: 'demo' })).details.family
await ollama.show({ model: 'other' }).catch((error) => { made.error = error.message })
console.log(JSON.stringify(made))
"""


@pytest.mark.slow
def test_ollama_js(server: Serving, tmp_path: Path) -> None:
    folder = os.environ.get("OLLAMA_JS")
    if not folder or not shutil.which("node"):
        pytest.skip("OLLAMA_JS names no folder with node_modules/ollama")
    script = tmp_path / "client.mjs"
    script.write_text(JAVASCRIPT)
    (tmp_path / "node_modules").symlink_to(Path(folder) / "node_modules")
    done = subprocess.run(["node", str(script), server.url], capture_output=True, text=True, timeout=120)
    made = json.loads(done.stdout or done.stderr)
    assert made["models"] == ["demo"] and made["text"] == made["whole"] and made["reason"] == "length"
    assert made["generated"] and made["embedded"] == 2 and made["shown"] == "gemma4" and "not found" in made["error"]
