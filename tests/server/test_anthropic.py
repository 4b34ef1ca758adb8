"""Anthropic's Messages, by their own client, from the built-in model."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import httpx
import pytest
from serving import Serving, serving, settled

from mlx_gemma4.conversation.language_model import LanguageModel
from mlx_gemma4.conversation.reply import prompt_ids
from mlx_gemma4.errors import InputError
from mlx_gemma4.server.anthropic import CountRequest, MessagesRequest, read_messages, read_request
from mlx_gemma4.server.fields import parse
from mlx_gemma4.server.settings import Settings
from mlx_gemma4.server.wire import ApiError, as_api_error

ASK = [{"role": "user", "content": "Tell me a story about a king."}]
WEATHER = {
    "name": "get_weather",
    "description": "The weather at a place",
    "input_schema": {
        "type": "object",
        "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["unit", "days"],
        "additionalProperties": False,
    },
}
CLOCK = {"name": "clock", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}}


@pytest.fixture(scope="module")
def server(lm: LanguageModel) -> Iterator[Serving]:
    with serving(lm, Settings(api_key="sesame", parallel=2, queue=0, max_body_bytes=200_000)) as running:
        yield running


@pytest.fixture
def client(server: Serving) -> Iterator[anthropic.Anthropic]:
    assert settled(server.engine)
    with anthropic.Anthropic(base_url=server.url, api_key="sesame", max_retries=0, timeout=60) as made:
        yield made


def create(client: anthropic.Anthropic, **more: Any) -> anthropic.types.Message:
    given = {"model": "any", "max_tokens": 16, "messages": ASK, "extra_body": {"temperature": 0.0}}
    return client.messages.create(**(given | more))


def streamed(client: anthropic.Anthropic, **more: Any) -> tuple[anthropic.types.Message, list[Any]]:
    """The message that the client puts together, and the events as they were sent."""
    given = {"model": "any", "max_tokens": 16, "messages": ASK, "extra_body": {"temperature": 0.0}}
    with client.messages.stream(**(given | more)) as stream:
        events = list(stream)
        return stream.get_final_message(), events


def same(a: anthropic.types.Message, b: anthropic.types.Message) -> bool:
    """Equal but for ids and for how much of the prompt was kept from before."""

    def bare(message: anthropic.types.Message) -> dict[str, Any]:
        made = message.to_dict()
        usage = made["usage"]
        made["usage"] = [usage["input_tokens"] + usage["cache_read_input_tokens"], usage["output_tokens"]]
        made["content"] = [{key: x for key, x in block.items() if key != "id"} for block in made["content"]]
        return {key: made[key] for key in ("content", "stop_reason", "stop_sequence", "usage", "role", "model")}

    assert bare(a) == bare(b)
    return True


# Replies


def test_a_message(client: anthropic.Anthropic) -> None:
    message = create(client)
    assert message.type == "message" and message.role == "assistant" and message.model == "any"
    assert [block.type for block in message.content] == ["text"] and len(message.content[0].text.split()) > 5
    assert message.stop_reason == "max_tokens" and message.usage.output_tokens == 16


def test_a_stream_is_the_same_message(client: anthropic.Anthropic) -> None:
    message, events = streamed(client)
    kinds = [event.type for event in events if event.type != "text"]  # "text" is the client's own
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"} and len(kinds) > 10
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert same(message, create(client))


def test_what_was_read_before_is_counted_apart(client: anthropic.Anthropic) -> None:
    first = create(client, system="Speak of kings.")
    messages = [*ASK, {"role": "assistant", "content": first.content}, {"role": "user", "content": "Go on."}]
    second = create(client, messages=messages, system="Speak of kings.")
    whole = client.messages.count_tokens(model="any", messages=messages, system="Speak of kings.").input_tokens
    assert second.usage.cache_read_input_tokens > 10
    assert second.usage.input_tokens + second.usage.cache_read_input_tokens == whole


def test_stop_sequence(client: anthropic.Anthropic) -> None:
    words = create(client).content[0].text.split()
    for stop in (words[3], words[4]):
        message, _ = streamed(client, stop_sequences=["never said", stop])
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
        assert stop not in message.content[0].text and message.content[0].text.startswith(words[0])
        assert same(message, create(client, stop_sequences=["never said", stop]))


@pytest.mark.slow
def test_thinking_comes_in_a_block_of_its_own(client: anthropic.Anthropic) -> None:
    more = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 200}
    message, _ = streamed(client, **more)
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking and "<" not in message.content[0].thinking + message.content[1].text
    assert same(message, create(client, **more))
    messages = [*ASK, {"role": "assistant", "content": message.content}, {"role": "user", "content": "Go on."}]
    assert [block.type for block in create(client, messages=messages).content] == ["text"]


def test_schema(client: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
    schema["additionalProperties"] = False
    message = create(client, output_config={"format": {"type": "json_schema", "schema": schema}}, max_tokens=40)
    assert list(json.loads(message.content[0].text)) == ["n"] and message.stop_reason == "end_turn"


# Tools


def test_tools(client: anthropic.Anthropic) -> None:
    more = {"tools": [WEATHER, CLOCK], "tool_choice": {"type": "tool", "name": "get_weather"}, "max_tokens": 80}
    more["tool_choice"]["disable_parallel_tool_use"] = True
    message, events = streamed(client, **more)
    assert message.stop_reason == "tool_use" and len(message.content) == 1
    call = message.content[0]
    assert call.name == "get_weather" and call.id.startswith("toolu_")
    assert call.input["unit"] in ("C", "F") and 1 <= call.input["days"] <= 9
    assert any(event.type == "content_block_delta" and event.delta.type == "input_json_delta" for event in events)
    assert same(message, create(client, **more))
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Rain"}]}
    messages = [*ASK, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    answer = create(client, messages=messages, tools=[WEATHER, CLOCK], tool_choice={"type": "none"})
    assert answer.stop_reason in ("end_turn", "max_tokens")


def test_any_tool(client: anthropic.Anthropic) -> None:
    choice = {"type": "any", "disable_parallel_tool_use": True}
    message = create(client, tools=[WEATHER, CLOCK], tool_choice=choice, max_tokens=80)
    assert message.stop_reason == "tool_use" and [block.type for block in message.content] == ["tool_use"]


def test_a_runner_of_tools_sends_the_whole_conversation(
    client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newer clients ask for a thread, which is refused in the way after which they do without."""
    read: list[list[dict[str, Any]]] = []
    monkeypatch.setattr(
        "mlx_gemma4.server.anthropic.read_messages", lambda body: read.append(read_messages(body)) or read[-1]
    )

    @anthropic.beta_tool
    def fetch(unit: Literal["C", "F"]) -> str:
        """Fetch."""
        return f"Rain, {unit}"

    choice: Any = {"type": "tool", "name": "fetch", "disable_parallel_tool_use": True}
    given: dict[str, Any] = {"model": "any", "max_tokens": 40, "messages": ASK, "max_iterations": 2}
    client.beta.messages.tool_runner(**given, tools=[fetch], tool_choice=choice).until_done()
    assert [[message["role"] for message in messages] for messages in read] == [["user"], ["user", "assistant", "tool"]]
    assert read[-1][-1]["content"].startswith("Rain")
    with pytest.raises(anthropic.BadRequestError, match="thread isn't supported") as refused:
        create(client, extra_body={"thread": {"type": "continue", "previous_message_id": "msg_1"}})
    details = json.loads(refused.value.response.text)["error"]["details"]
    assert details == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


# What is asked for


def test_a_conversation_as_templates_have_it() -> None:
    use = {"type": "tool_use", "id": "toolu_1", "name": "clock", "input": {"zone": "UTC"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "no", "is_error": True}
    thought = {"type": "thinking", "thinking": "Hm.", "signature": ""}
    conversation = {
        "model": "any",
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Time?"}, {"type": "text", "text": "Now!"}]},
            {"role": "assistant", "content": [thought, {"type": "text", "text": "I look."}, use]},
            {"role": "user", "content": [result, {"type": "text", "text": "Well?"}]},
        ],
    }
    call = {"id": "toolu_1", "type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    assert read_messages(parse(CountRequest, conversation)) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Time?\nNow!"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "toolu_1", "name": "clock", "content": "Error: no"},
        {"role": "user", "content": "Well?"},
    ]


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
RESULT = {"type": "tool_result", "tool_use_id": "x"}
USE = {"type": "tool_use", "id": "x", "name": "clock", "input": {}}


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "ten"}, "max_tokens"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [*ASK, {"role": "assistant", "content": [USE]}]}, "messages"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, "messages[0].content[0].tool_use_id"),
        ({"system": 1}, "system"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": "x"}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"thinking": {"type": "deep"}}, "thinking.type"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": 0, "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
        ({"tools": [CLOCK, CLOCK]}, "tools[1].name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "tool", "name": "x"}, "tools": [CLOCK]}, "tool_choice.name"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ],
)
def test_a_wrong_field_is_named(lm: LanguageModel, more: dict[str, Any], field: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_request(parse(MessagesRequest, {"model": "any", "max_tokens": 5, "messages": ASK} | more), lm)
    assert caught.value.status == 400 and caught.value.param == field and field in caught.value.message


FULL = {
    "model": "any",
    "max_tokens": 5,
    "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Time?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "clock", "input": {"zone": "UTC"}},
            ],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "5"}]}],
        },
    ],
    "tools": [WEATHER, CLOCK],
    "tool_choice": {"type": "tool", "name": "clock", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "stop_sequences": ["x"],
    "temperature": 0.5,
    "stream": False,
}
JUNK = [
    None,
    True,
    0,
    -1,
    1.5,
    1e300,
    1 << 80,
    "",
    "x",
    "\ud800",
    [],
    [None],
    [[]],
    [{}],
    {},
    {"type": None},
    {"type": "text"},
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in nested lists and objects: where it is, and its key."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


FORMAT = {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}}


@pytest.mark.parametrize("full", [FULL, FULL | {"tool_choice": {"type": "auto"}, "output_config": FORMAT}])
def test_any_value_in_any_place_is_taken_or_refused(lm: LanguageModel, full: dict[str, Any]) -> None:
    read_request(parse(MessagesRequest, full), lm)
    taken, refused = 0, []
    for i in range(len(list(places(full)))):
        for junk in JUNK:
            body = copy.deepcopy(full)
            holder, key = list(places(body))[i]
            holder[key] = junk
            try:
                request = read_request(parse(MessagesRequest, body), lm)
                prompt_ids(lm, request.prompt, request.options)
                taken += 1
            except (ApiError, InputError) as error:
                refused.append(as_api_error(error).status)
    assert set(refused) == {400} and len(refused) > 400 and taken > 200


# Errors


def kind(error: anthropic.APIStatusError) -> str:
    assert isinstance(error.body, dict) and error.body["type"] == "error" and error.body["error"]["message"]
    return str(error.body["error"]["type"])


def test_a_bad_request(client: anthropic.Anthropic) -> None:
    for name, value in (("temperature", 7.0), ("model", None), ("max_tokens", -4)):
        with pytest.raises(anthropic.BadRequestError) as caught:
            create(client, extra_body={name: value})
        assert kind(caught.value) == "invalid_request_error" and name in str(caught.value)


def test_a_prompt_over_the_context(client: anthropic.Anthropic, lm: LanguageModel) -> None:
    long = [{"role": "user", "content": "king " * 3000}]
    for ask in (create, streamed):
        with pytest.raises(anthropic.BadRequestError) as caught:
            ask(client, messages=long)
        assert kind(caught.value) == "invalid_request_error"
        numbers = [int(number) for number in re.findall(r"\d+", str(caught.value))]
        assert lm.config.context in numbers and max(numbers) > 3000


def test_too_large_a_body(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.APIStatusError) as caught:
        create(client, messages=[{"role": "user", "content": "x" * 300_000}])
    assert caught.value.status_code == 413 and kind(caught.value) == "request_too_large"


def test_keys(server: Serving) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0) as client:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            create(client)
        assert kind(caught.value) == "authentication_error"
    with anthropic.Anthropic(base_url=server.url, auth_token="sesame", max_retries=0) as client:
        assert create(client, max_tokens=1).usage.output_tokens == 1


def test_an_unknown_path(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.batches.retrieve("x")
    assert kind(caught.value) == "not_found_error"


def test_a_body_that_is_no_json(server: Serving) -> None:
    answer = httpx.post(f"{server.url}/v1/messages", content=b"{", headers={"x-api-key": "sesame"})
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_a_full_server(client: anthropic.Anthropic, server: Serving, lm: LanguageModel) -> None:
    bias = {str(token): -100 for token in lm.tokenizer.stop_ids}
    long = {"model": "any", "max_tokens": 1900, "messages": ASK, "extra_body": {"logit_bias": bias}}
    with client.messages.stream(**long) as one, client.messages.stream(**long) as two:
        next(iter(one)), next(iter(two))
        with pytest.raises(anthropic.RateLimitError) as caught:
            create(client)
        assert kind(caught.value) == "rate_limit_error" and int(caught.value.response.headers["retry-after"]) > 0
    assert settled(server.engine, 5)


def test_a_server_that_shuts_down(lm: LanguageModel) -> None:
    with (
        serving(lm) as server,
        anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client,
    ):
        server.engine.drain()
        with pytest.raises(anthropic.APIStatusError) as caught:
            create(client)
        assert caught.value.status_code == 529 and kind(caught.value) == "overloaded_error"
