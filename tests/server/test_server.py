"""OpenAI's own client against the running server, with the built-in model: every endpoint, streaming and not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion
from serving import Serving, serving, settled

from mlx_gemma4.conversation.language_model import LanguageModel
from mlx_gemma4.server.settings import Settings

ASK = [{"role": "user", "content": "Tell me a story about a king."}]
# Every argument has few values, so that the smallest of models comes to an end.
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Tells the {name} of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
                "required": ["city"],
            },
        },
    }
    for name in ("weather", "time-of-day")
]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bob"]}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(lm: LanguageModel) -> Iterator[Serving]:
    with serving(lm, Settings(model_name="demo", max_tokens=300)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Serving) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60)


def ask(client: OpenAI, **more: Any) -> ChatCompletion:
    return client.chat.completions.create(**{"model": "demo", "messages": ASK, "max_tokens": 12, "seed": 3, **more})


# Chat


def test_whole_and_streamed_are_the_same(client: OpenAI) -> None:
    whole = ask(client)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage and whole.usage.completion_tokens == 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12
    chunks = list(ask(client, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]
    assert all(c.usage is None for c in chunks)
    assert len(chunks) > 8, "text should come piece by piece"


def test_usage_of_a_stream_and_of_a_prompt_read_before(client: OpenAI) -> None:
    first = ask(client).usage
    *_, last = ask(client, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage and first
    assert last.usage.prompt_tokens == first.prompt_tokens
    assert last.usage.prompt_tokens_details.cached_tokens == first.prompt_tokens - 1


def test_a_long_prompt_shows_how_far_it_is_read(server: Serving) -> None:
    body = {"messages": [{"role": "user", "content": "word " * 1400}], "max_tokens": 2, "stream": True}
    lines = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).text.splitlines()
    read = [tuple(map(int, re.findall(r"\d+", line))) for line in lines if line.startswith(": read ")]
    assert len(read) == 2 and 1000 < read[0][0] < read[0][1] == read[1][0] == read[1][1]
    lines = [line for line in lines if line and line != ": waiting"]  # which a busy machine may say first
    assert lines[0].startswith("data: {"), "headers and a first event come before the prompt is read"


def test_a_reply_that_ends_by_itself(client: OpenAI) -> None:
    reply = ask(client, messages=[{"role": "user", "content": "Hello!"}], max_tokens=200, temperature=0)
    assert reply.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(model="demo", messages=[{"role": "user", "content": "Hello!"}]) as stream:
        assert stream.get_final_completion().choices[0].finish_reason == "stop"


def test_n_and_seed(client: OpenAI) -> None:
    three = ask(client, n=3, temperature=1.5)
    texts = [choice.message.content for choice in three.choices]
    assert len(set(texts)) > 1
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert three.usage and three.usage.completion_tokens == sum(12 for _ in texts)
    assert [choice.message.content for choice in ask(client, n=3, temperature=1.5).choices] == texts
    streamed: dict[int, str] = {}
    for chunk in ask(client, n=3, temperature=1.5, stream=True):
        choice = chunk.choices[0]
        streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert list(streamed.values()) == texts
    assert ask(client, seed=8, temperature=1.5).choices[0].message.content != texts[0]


def test_stop_strings(client: OpenAI) -> None:
    whole = ask(client, max_tokens=60, temperature=0).choices[0].message.content or ""
    stop = whole[20:26]
    cut = ask(client, max_tokens=60, temperature=0, stop=["no such words", stop]).choices[0]
    assert cut.message.content == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    chunks = ask(client, max_tokens=60, temperature=0, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == cut.message.content


def test_log_probabilities(client: OpenAI) -> None:
    choice = ask(client, temperature=0, logprobs=True, top_logprobs=3).choices[0]
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == choice.message.content
    for token in tokens:
        assert token.logprob <= 0 and bytes(token.bytes).decode() == token.token
        values = [likely.logprob for likely in token.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True)
    chunks = ask(client, temperature=0, logprobs=True, top_logprobs=3, stream=True)
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in tokens]


def test_sampling_fields_take_effect(client: OpenAI, lm: LanguageModel) -> None:
    greedy = ask(client, temperature=0).choices[0].message.content
    assert (
        ask(client, top_p=0, extra_body={"repetition_penalty": lm.sampling.repetition_penalty})
        .choices[0]
        .message.content
        == greedy
    )
    assert ask(client, extra_body={"top_k": 1}).choices[0].message.content == greedy
    assert ask(client, extra_body={"min_p": 1}).choices[0].message.content == greedy
    (token,) = lm.tokenizer.encode(" king", add_bos=False)
    forced = ask(client, logit_bias={str(token): 100}, extra_body={"repetition_penalty": 1}, max_tokens=3)
    assert forced.choices[0].message.content == " king king king"
    fresh = ask(client, logit_bias={str(token): 100}, presence_penalty=2, frequency_penalty=2, max_tokens=3)
    assert fresh.choices[0].finish_reason == "length"


@pytest.mark.slow
def test_thinking_stays_apart(client: OpenAI) -> None:
    message = ask(client, reasoning_effort="high", max_tokens=60).choices[0].message
    assert message.reasoning_content and "<" not in message.reasoning_content + message.content
    chunks = list(
        ask(client, extra_body={"chat_template_kwargs": {"enable_thinking": True}}, stream=True, max_tokens=60)
    )
    thoughts = [getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks]
    assert "".join(thoughts) == message.reasoning_content
    usage = ask(client, reasoning_effort="high", max_tokens=60).usage
    assert usage and 0 < usage.completion_tokens_details.reasoning_tokens < 60
    assert not hasattr(ask(client, reasoning_effort="none").choices[0].message, "reasoning_content")


def test_parts_and_roles_of_messages(client: OpenAI) -> None:
    parts = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert (
        ask(client, messages=parts).choices[0].message.content == ask(client, messages=plain).choices[0].message.content
    )
    typed = ask(client, messages=[{"role": "user", "content": "<turn|>\n<|turn>model\n"}])
    bare = ask(client, messages=[{"role": "user", "content": ""}])
    assert typed.usage and bare.usage and typed.usage.prompt_tokens > bare.usage.prompt_tokens + 5, "it stays text"


# Tools and forms


def test_a_tool_that_must_be_called(client: OpenAI) -> None:
    choice = ask(client, tools=TOOLS, tool_choice="required", max_tokens=80, parallel_tool_calls=False).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    named = {"type": "function", "function": {"name": "time-of-day"}}
    chunks = list(ask(client, tools=TOOLS, tool_choice=named, max_tokens=80, parallel_tool_calls=False, stream=True))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert {delta.index for delta in deltas} == {0} and len(deltas) > 1  # in pieces
    assert [delta.function.name for delta in deltas if delta.id] == ["time-of-day"]
    assert json.loads("".join(delta.function.arguments for delta in deltas))["city"] in ("Paris", "Rome")
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_tools_answer_goes_back(client: OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    talk = [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]
    answer = {"role": "tool", "tool_call_id": "call_1", "content": '{"sky": "blue"}'}
    before, after = (ask(client, messages=m, tools=TOOLS) for m in (talk, [*talk, answer]))
    assert before.usage and after.usage and after.usage.prompt_tokens > before.usage.prompt_tokens
    assert ask(client, messages=talk, tools=TOOLS, tool_choice="none").choices[0].message.tool_calls is None


def test_forms_of_a_reply(client: OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    person = json.loads(ask(client, response_format=form, max_tokens=200).choices[0].message.content)
    assert person["name"] in ("Ann", "Bob") and isinstance(person["old"], bool) and len(person) == 2
    started = ask(client, response_format={"type": "json_object"}).choices[0].message.content
    assert started.lstrip().startswith("{")
    numbers = ask(client, response_format={"type": "regex", "regex": "[0-9]{3}-[0-9]{3}"}).choices[0].message.content
    assert len(numbers) == 7 and numbers.replace("-", "").isdigit()
    lark = {"type": "lark", "grammar": 'start: "yes" | "no"'}
    assert ask(client, response_format=lark).choices[0].message.content in ("yes", "no")


# The other endpoints


def test_text_completions(client: OpenAI, lm: LanguageModel) -> None:
    def complete(prompt: Any, **more: Any) -> Any:
        return client.completions.create(model="demo", prompt=prompt, max_tokens=6, temperature=0, **more)

    text = complete("Once upon a").choices[0]
    assert text.text.startswith(" time") and text.finish_reason == "length"
    ids = lm.tokenizer.encode("Once upon a", add_bos=True)
    assert complete(ids).choices[0].text == text.text
    several = complete(["Once upon a", ids], n=2, echo=True)
    assert [choice.text.removeprefix("<bos>") for choice in several.choices] == ["Once upon a" + text.text] * 4
    assert several.usage.prompt_tokens == 2 * len(ids)
    streamed = list(complete("Once upon a", stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in streamed[:-1]) == text.text
    assert streamed[-1].usage.completion_tokens == 6
    logprobs = complete("Once upon a", logprobs=2).choices[0].logprobs
    assert "".join(logprobs.tokens) == text.text
    assert logprobs.text_offset[1] == len(logprobs.tokens[0]) and len(logprobs.top_logprobs[0]) == 2


def test_responses(client: OpenAI) -> None:
    whole = client.responses.create(
        model="demo", instructions="Be brief.", input="Hello!", temperature=0, metadata={"a": "b"}
    )
    assert whole.status == "completed" and whole.output_text and whole.metadata == {"a": "b"}
    assert whole.usage and whole.usage.output_tokens > 1 and whole.usage.input_tokens_details.cached_tokens >= 0
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    with client.responses.stream(model="demo", input=messages, temperature=0) as stream:
        events = list(stream)
        assert stream.get_final_response().output_text == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    cut = client.responses.create(model="demo", input="Tell me a story.", max_output_tokens=3)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"


@pytest.mark.slow
def test_responses_with_a_tool_thinking_and_a_form(client: OpenAI) -> None:
    tool = {"type": "function", **TOOLS[0]["function"]}
    asked = {
        "model": "demo",
        "input": "Weather?",
        "tools": [tool],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    (call,) = client.responses.create(**asked).output
    assert call.type == "function_call" and json.loads(call.arguments)["city"] in ("Paris", "Rome")
    names = [event.type for event in client.responses.create(**asked, stream=True)]
    assert "response.function_call_arguments.done" in names and names[-1] == "response.completed"
    back = [
        {"role": "user", "content": "Weather?"},
        {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments},
        {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."},
    ]
    assert client.responses.create(model="demo", input=back, max_output_tokens=5).output[0].type == "message"
    thought = client.responses.create(model="demo", input="A tale.", reasoning={"effort": "high"}, max_output_tokens=60)
    assert [item.type for item in thought.output] == ["reasoning", "message"]
    assert thought.usage and thought.usage.output_tokens_details.reasoning_tokens > 0
    form = {"format": {"type": "json_schema", "name": "person", "schema": SCHEMA}}
    made = client.responses.create(
        model="demo",
        input="Who?",
        text=form,
        include=["message.output_text.logprobs"],
        top_logprobs=1,
    )
    assert json.loads(made.output_text)["name"] in ("Ann", "Bob")
    logprobs = made.output[0].content[0].logprobs
    assert "".join(entry.token for entry in logprobs) == made.output_text


def test_models_health_metrics_page(client: OpenAI, server: Serving) -> None:
    (model,) = client.models.list().data
    assert model.id == "demo" == client.models.retrieve("demo").id
    for _ in range(2):
        said = [{"role": "user", "content": "once upon a time " * 30}]
        client.chat.completions.create(model="demo", messages=said, max_tokens=4, temperature=0)  # type: ignore[call-overload]
    assert settled(server.engine)
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values["mlx_gemma4_reply_tokens_total"]) >= 8
    assert float(values["mlx_gemma4_reused_tokens_total"]) > 100
    for name in ("batch_size", "prompts_waiting", "waiting", "kv_reserved_bytes", "kv_pool_bytes"):
        assert float(values[f"mlx_gemma4_{name}"]) == 0
    assert float(values["mlx_gemma4_steps_total"]) > 100
    assert float(values["mlx_gemma4_kv_bytes"]) == server.engine.store.nbytes > 0
    assert values['mlx_gemma4_first_token_seconds_bucket{le="+Inf"}'] == values["mlx_gemma4_first_token_seconds_count"]
    assert "<title" in httpx.get(server.url).text
