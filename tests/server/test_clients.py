"""What clients of other servers send: kept, or left out with a line in the log, or refused by name; never ignored."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Serving, endless, serving, settled, started

from mlx_gemma4.conversation.language_model import LanguageModel
from mlx_gemma4.grammar import grammar
from mlx_gemma4.server import completions, fields, forms, responses
from mlx_gemma4.server.settings import Settings

USER = {"role": "user", "content": "Tell me a story about a fox."}
ASK: dict[str, Any] = {"messages": [USER], "max_tokens": 60, "seed": 1}
CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
WANT = {"type": "object", "properties": {"a": {"const": "Z"}}, "required": ["a"], "additionalProperties": False}
SHAPED = Path(__file__).parent / "requests"  # written by hand after the clients that they are named for
CALLED: dict[str, Any] = {"name": "run", "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}}}}


@pytest.fixture(scope="module")
def server(lm: LanguageModel) -> Iterator[Serving]:
    """What it takes is text alone, as clients send more than a model takes."""
    with serving(replace(lm, media=None), Settings(max_tokens=8)) as running:
        yield running


@pytest.fixture
def http(server: Serving) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def body_of(path: str, **more: Any) -> dict[str, Any]:
    """A request of any of the interfaces."""
    said = {
        CHAT: {"messages": [USER], "max_tokens": 60},
        TEXT: {"prompt": "A fox", "max_tokens": 60},
        RESPONSES: {"input": "A fox?", "max_output_tokens": 60},
        MESSAGES: {"model": "m", "messages": [USER], "max_tokens": 60},
    }
    return {"seed": 1, **said[path], **more}


def text_of(path: str, reply: dict[str, Any]) -> str:
    if path == RESPONSES:
        return str(reply["output"][-1]["content"][0]["text"])
    if path == MESSAGES:
        return str(reply["content"][-1]["text"])
    choice = reply["choices"][0]
    return str(choice["text"] if path == TEXT else choice["message"]["content"])


def refused(response: httpx.Response, name: str) -> None:
    assert response.status_code == 400 and name in response.json()["error"]["message"], response.text


# Forms


GBNF = 'root ::= "yes" | "no"'
SPELLINGS: list[tuple[dict[str, Any], str]] = [
    ({"guided_json": WANT}, "json"),
    ({"guided_json": json.dumps(WANT)}, "json"),
    ({"guided_regex": "(yes|no)"}, "choice"),
    ({"guided_choice": ["yes", "no"]}, "choice"),
    ({"guided_grammar": GBNF}, "choice"),
    ({"structured_outputs": {"json": WANT}}, "json"),
    ({"structured_outputs": {"choice": ["yes", "no"], "disable_any_whitespace": True}}, "choice"),
    ({"structured_outputs": {"regex": "yes|no", "json": None}}, "choice"),
    ({"structured_outputs": {"grammar": 'start: "yes" | "no"'}}, "choice"),
    ({"nvext": {"guided_json": WANT}}, "json"),
    ({"json_schema": WANT}, "json"),
    ({"grammar": GBNF}, "choice"),
    ({"grammar": {"type": "json", "value": WANT}}, "json"),
    ({"regex": "yes|no"}, "choice"),
    ({"ebnf": GBNF}, "choice"),
    ({"format": WANT}, "json"),
]
FORMATS: list[tuple[dict[str, Any], str]] = [
    ({"type": "json_object", "schema": WANT}, "json"),
    ({"type": "json_schema", "schema": WANT}, "json"),
    ({"type": "json_schema", "json_schema": {"name": "x", "strict": "true", "schema": WANT}}, "json"),
    ({"type": "json", "value": WANT}, "json"),
    ({"type": "regex", "pattern": "yes|no"}, "choice"),
    ({"type": "regex", "value": "yes|no"}, "choice"),
    ({"type": "grammar", "grammar": GBNF}, "choice"),
]


def kept(text: str, kind: str) -> bool:
    return json.loads(text) == {"a": "Z"} if kind == "json" else text in ("yes", "no")


@pytest.mark.parametrize(("more", "kind"), [*SPELLINGS, *(({"response_format": one}, kind) for one, kind in FORMATS)])
def test_a_form_is_kept_however_it_is_spelled(http: httpx.Client, more: dict[str, Any], kind: str) -> None:
    assert kept(text_of(CHAT, http.post(CHAT, json=body_of(CHAT, **more)).json()), kind)


@pytest.mark.parametrize("path", [TEXT, RESPONSES, MESSAGES])
def test_a_form_is_kept_in_every_interface(http: httpx.Client, path: str) -> None:
    own = {
        TEXT: [{"response_format": {"type": "json_object", "schema": WANT}}],
        RESPONSES: [{"text": {"format": {"type": "json_schema", "name": "x", "schema": WANT}}}],
        MESSAGES: [{name: {"type": "json_schema", "schema": WANT}} for name in ("output_format",)]
        + [{"output_config": {"format": {"type": "json_schema", "schema": WANT}}}],
    }
    for more in (*own[path], {"guided_json": WANT}):
        assert kept(text_of(path, http.post(path, json=body_of(path, **more)).json()), "json")


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_grammar": "root ::= ("}, "guided_grammar"),
        ({"grammar": 7}, "grammar"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"guided_something": "x"}, "guided_something"),
        ({"my_schema": WANT}, "my_schema"),
        ({"provider": {"response_format": "x"}}, "provider.response_format"),
        ({"guided_json": WANT, "regex": "a"}, "guided_json"),
        ({"response_format": {"type": "text", "schema": WANT}}, "response_format.schema"),
        ({"response_format": {"type": "regex", "regex": "a", "schema": WANT}}, "response_format.schema"),
        ({"response_format": {"type": "json_object", "json_grammar": "x"}}, "response_format.json_grammar"),
        ({"response_format": {"type": "json_object"}, "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_json": {"type": "no"}}, "schema"),
    ],
)
def test_a_form_that_cannot_be_kept_is_refused(http: httpx.Client, more: dict[str, Any], name: str) -> None:
    for path in (CHAT, TEXT):
        refused(http.post(path, json=body_of(path, **more)), name)


def test_what_is_no_form_is_none() -> None:
    for more in (
        {"guided_json": None},
        {"structured_outputs": True},
        {"guided_decoding_backend": "x"},
        {"grammar": ""},
    ):
        body = fields.parse(completions.ChatRequest, {"messages": [USER], **more})
        assert forms.read_form(body, "response_format", None).options == {}


# Limits


def test_minus_one_is_no_limit(http: httpx.Client) -> None:
    names = {CHAT: ("max_tokens", "max_completion_tokens"), RESPONSES: ("max_output_tokens",), TEXT: ("max_tokens",)}
    names |= {MESSAGES: ("max_tokens",)}
    for path, limits in names.items():
        for name in limits:
            stop = "stop_sequences" if path == MESSAGES else "stop"
            body = {**body_of(path), stop: ["e"], "top_k": -1}
            body = {key: value for key, value in body.items() if not key.startswith("max_")}
            assert http.post(path, json={**body, name: -1}).status_code == 200
            assert http.post(path, json={**body, name: -4}).status_code == 400
    for more in ({"thinking": {"type": "enabled", "budget_tokens": -1}}, {"seed": -1}, {"n_predict": 3}):
        assert http.post(CHAT, json={**ASK, **more}).status_code == 200
    unsaid = {key: value for key, value in ASK.items() if key != "max_tokens"}
    whole = http.post(CHAT, json={**unsaid, "max_tokens": -1, "stop": ["."]}).json()
    assert whole["usage"]["completion_tokens"] > 8  # `serve --max-tokens` is for those that don't say
    assert http.post(CHAT, json={**unsaid, "max_new_tokens": 3}).json()["usage"]["completion_tokens"] == 3


# Parts, items and tools of other kinds


OTHER_PARTS: list[dict[str, Any]] = [
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
    {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
    {"type": "file", "file": {"file_id": "x"}},
    {"type": "thinking", "thinking": "x"},
]
OTHER_ITEMS: list[dict[str, Any]] = [
    {"type": "custom_tool_call", "call_id": "c", "name": "apply_patch", "input": "x"},
    {"type": "custom_tool_call_output", "call_id": "c", "output": "ok"},
    {"type": "local_shell_call", "call_id": "d", "action": {"type": "exec", "command": ["ls"]}, "status": "completed"},
    {"type": "local_shell_call_output", "call_id": "d", "output": "a"},
    {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "x"}},
    {"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": "AA", "content": None},
    {"type": "item_reference", "id": "msg_1"},
    {"type": "compaction", "encrypted_content": "AA"},
    {"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": "x"}]},
    {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
]
OTHER_BLOCKS: list[dict[str, Any]] = [
    {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
    {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
    {"type": "redacted_thinking", "data": "AA"},
    {"type": "text", "text": "a", "citations": None},
    {"type": "tool_use", "id": "t", "name": "run", "input": {}, "caller": {"type": "direct"}},
]


def test_other_parts_are_left_out(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    seen = {"role": "user", "content": [*OTHER_PARTS, {"type": "text", "text": "What is there?"}]}
    history = [seen, {"role": "assistant", "content": [*OTHER_PARTS, {"type": "text", "text": "a"}]}]
    with caplog.at_level(logging.WARNING, "mlx_gemma4.server"):
        assert http.post(CHAT, json={**ASK, "messages": [*history, USER]}).status_code == 200
    (line,) = [record.getMessage() for record in caplog.records if "Left out" in record.getMessage()]
    assert all(name in line for name in ("image_url", "input_audio", "file")) and len(line) < 300


def test_other_items_and_tools_of_responses(http: httpx.Client) -> None:
    tools = [{"type": kind, "name": "x"} for kind in ("web_search", "custom", "namespace", "local_shell", "mcp")]
    body = {"input": OTHER_ITEMS, "tools": [{"type": "function", **CALLED}, *tools], "max_output_tokens": 3}
    assert http.post(RESPONSES, json=body).status_code == 200
    read = responses._messages(fields.parse(responses.ResponsesRequest, body), [])
    assert [call["function"]["name"] for call in read[0]["tool_calls"]] == ["apply_patch"]
    assert read[1]["name"] == "apply_patch" and read[1]["content"] == "ok"


def test_other_blocks_and_tools_of_messages(http: httpx.Client) -> None:
    held = {"type": "text", "media_type": "text/plain", "data": "Words of a file"}
    results = [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image", "source": {}}]}]
    asked = [*results, {"type": "document", "source": held}, {"type": "container_upload", "file_id": "f"}]
    talk = [USER, {"role": "assistant", "content": OTHER_BLOCKS}, {"role": "user", "content": asked}]
    tools = [{"type": "web_search_20250305", "name": "web_search"}, {"type": "bash_20250124", "name": "bash"}]
    body = body_of(MESSAGES, messages=talk, tools=[*tools, {"name": "run", "input_schema": {}}])
    assert http.post(MESSAGES, json={**body, "max_tokens": 3}).status_code == 200
    counted = {key: body[key] for key in ("model", "messages", "tools")}
    with_file = http.post(f"{MESSAGES}/count_tokens", json=counted).json()["input_tokens"]
    held["data"] = ""
    assert http.post(f"{MESSAGES}/count_tokens", json=counted).json()["input_tokens"] != with_file


def test_calls_of_older_and_other_kinds_in_a_history(http: httpx.Client) -> None:
    calls = [
        {"function_call": {"name": "run", "arguments": "{}"}},
        {"tool_calls": [{"id": "1", "type": "custom", "custom": {"name": "patch", "input": "x"}}]},
    ]
    results = [
        {"role": "function", "name": "run", "content": "1"},
        {"role": "tool", "tool_call_id": "1", "content": ""},
    ]
    for call, result in zip(calls, results, strict=True):
        talk = [USER, {"role": "assistant", "content": None, **call}, result]
        assert http.post(CHAT, json={**ASK, "max_tokens": 3, "messages": talk}).status_code == 200


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ({"type": "function", "name": "run"}, "run"),
        ({"type": "function", "function": {"name": "run"}}, "run"),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "run"}]}, "required"),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "run"}}]},
            },
            "required",
        ),
        ({"type": "required"}, "required"),
        ({"type": "any"}, "required"),
    ],
)
def test_a_choice_of_tools_is_kept_however_it_is_spelled(http: httpx.Client, choice: Any, name: str) -> None:
    other = {"name": "other", "parameters": {}}
    short = {"type": "object", "properties": {"cmd": {"const": "ls"}}, "required": ["cmd"]}
    tools = [{"type": "function", "function": one} for one in ({**CALLED, "parameters": short}, other)]
    body = {**ASK, "tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
    found = http.post(CHAT, json=body).json()["choices"][0]["message"]
    assert found.get("tool_calls") and (name == "required" or found["tool_calls"][0]["function"]["name"] == "run")
    if isinstance(choice, dict) and choice["type"] == "allowed_tools":
        assert {call["function"]["name"] for call in found["tool_calls"]} == {"run"}


def test_a_model_without_tools_refuses_them(lm: LanguageModel) -> None:
    tokenizer = copy.copy(lm.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tools = {CHAT: {"type": "function", "function": CALLED}, RESPONSES: {"type": "function", **CALLED}}
    tools[MESSAGES] = {"name": "run", "input_schema": {}}
    with serving(replace(lm, tokenizer=tokenizer)) as running, httpx.Client(base_url=running.url, timeout=60) as http:
        for path, tool in tools.items():
            refused(http.post(path, json=body_of(path, tools=[tool])), "tools can't be used")
            assert http.post(path, json=body_of(path, tools=[], max_tokens=1)).status_code == 200


# Streams


def streamed(http: httpx.Client, path: str, body: dict[str, Any]) -> list[str]:
    with http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        return list(response.iter_lines())


def test_arguments_are_streamed_in_pieces(http: httpx.Client) -> None:
    write = {"name": "write", "parameters": {"type": "object", "properties": {"text": {"type": "string"}}}}
    write["parameters"] |= {"required": ["text"], "additionalProperties": False}
    chat = {**ASK, "tools": [{"type": "function", "function": write}], "tool_choice": "required", "max_tokens": 50}
    events = [json.loads(line[6:]) for line in streamed(http, CHAT, chat) if line.startswith("data: {")]
    deltas = [one for event in events for choice in event["choices"] for one in choice["delta"].get("tool_calls", [])]
    assert len(deltas) > 5 and all("call:" not in json.dumps(event) for event in events)
    items = {"input": "x", "tools": [{"type": "function", **write}], "tool_choice": "required", "max_output_tokens": 50}
    lines = streamed(http, RESPONSES, {**items, "seed": 1})
    assert sum("event: response.function_call_arguments.delta" in line for line in lines) > 5
    tool = {"name": "write", "input_schema": write["parameters"]}
    lines = streamed(http, MESSAGES, body_of(MESSAGES, tools=[tool], tool_choice={"type": "any"}, max_tokens=50))
    assert sum("input_json_delta" in line for line in lines) > 5


def test_a_cut_call_is_no_text(http: httpx.Client) -> None:
    long = {"type": "object", "properties": {"city": {"type": "string", "minLength": 200}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "get", "parameters": long}}]
    cut = {**ASK, "tools": tools, "tool_choice": "required", "max_tokens": 20}
    (choice,) = http.post(CHAT, json=cut).json()["choices"]
    assert choice["finish_reason"] == "length" and choice["message"]["content"] == ""
    lines = streamed(http, CHAT, cut)
    assert not any("call:" in line for line in lines)


def test_a_stream_that_waits_says_so(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_gemma4.server.endpoint.QUIET", 0.05)
    with (
        serving(lm, Settings(parallel=1)) as running,
        httpx.Client(base_url=running.url, timeout=60) as http,
        started(http, endless(lm)),
    ):
        for path in (CHAT, TEXT, RESPONSES, MESSAGES):
            with http.stream("POST", path, json=body_of(path, stream=True)) as waiting:
                assert waiting.status_code == 200 and running.engine.load == (1, 1)
                lines = waiting.iter_lines()
                assert [line for line in (next(lines), next(lines), next(lines)) if line] == [": waiting"] * 2
    assert settled(running.engine)


def test_a_stream_that_is_silent_says_that_it_goes_on(
    lm: LanguageModel, server: Serving, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop strings hold everything back here; any other reason to be silent is told the same way."""
    monkeypatch.setattr("mlx_gemma4.server.endpoint.QUIET", 0.01)
    held = {"logit_bias": {str(lm.tokenizer.encode("a", add_bos=False)[0]): 100}, "max_tokens": 200}
    chat = {**ASK, **held, "stop": ["a" * 900]}
    assert ": still here" in streamed(http, CHAT, chat)
    lines = streamed(http, MESSAGES, body_of(MESSAGES, **held, stop_sequences=["a" * 900]))
    assert lines.count("event: ping") > 3


# Thinking


def test_thinking_ends_and_then_comes_the_form(http: httpx.Client) -> None:
    forms_of = [{"response_format": {"type": "json_object"}}, {"guided_json": WANT}]
    tools = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    for more in (*forms_of, {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}):
        reply = http.post(CHAT, json={**ASK, "max_tokens": 300, "reasoning_effort": "high", **more}).json()
        message = reply["choices"][0]["message"]
        assert 0 < reply["usage"]["completion_tokens_details"]["reasoning_tokens"] < 100
        assert message.get("tool_calls") or "{" in message["content"]


@pytest.mark.parametrize(
    "more",
    [
        {"thinking": {"type": "enabled", "budget_tokens": 5}},
        {"reasoning": {"max_tokens": 5}},
        {"enable_thinking": True, "thinking_budget": 5},
        {"chat_template_kwargs": {"enable_thinking": True, "thinking_budget": 5}},
    ],
)
def test_thinking_has_a_budget(http: httpx.Client, more: dict[str, Any]) -> None:
    for form in ({}, {"guided_json": WANT}):
        reply = http.post(CHAT, json={**ASK, **more, **form}).json()
        assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == 5
        assert reply["choices"][0]["message"]["content"]


def test_messages_have_a_budget_too(http: httpx.Client) -> None:
    for budget, most in ((0, 0), (5, 5)):
        body = body_of(MESSAGES, thinking={"type": "enabled", "budget_tokens": budget})
        content = http.post(MESSAGES, json=body).json()["content"]
        thought = "".join(block.get("thinking", "") for block in content)
        assert len(thought.split()) <= most and content[-1]["type"] == "text"


# The log, and requests as programs send them


def test_nested_unknown_fields_are_logged(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    message = {**USER, "content": [{"type": "text", "text": "Hi", "flavour": 1}], "mood": 1}
    tools = [{"type": "function", "function": {**CALLED, "colour": 1}}]
    body = {**ASK, "max_tokens": 1, "messages": [message, message], "tools": tools, "stream_options": None}
    with caplog.at_level(logging.WARNING, "mlx_gemma4.server"):
        answer = http.post(CHAT, json=body, headers={"X-Request-Id": "mine-1"})
    (line,) = [record.getMessage() for record in caplog.records if "Ignored" in record.getMessage()]
    for name in ("messages[].mood", "messages[].content[].flavour", "tools[].function.colour"):
        assert line.count(name) == 1
    assert line.startswith("mine-1: ") and answer.headers["x-request-id"] == answer.headers["request-id"] == "mine-1"


def test_every_answer_has_an_id(http: httpx.Client) -> None:
    for answer in (http.get("/health"), http.get("/nothing"), http.post(CHAT, json=ASK), http.post(MESSAGES, json={})):
        assert re.fullmatch(r"req_[0-9a-f]{32}", answer.headers["x-request-id"])
    assert answer.json()["request_id"] == answer.headers["request-id"]
    assert http.get("/health", headers={"X-Request-Id": "a b"}).headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("file", sorted(SHAPED.glob("*.json")), ids=lambda file: file.stem)
def test_a_program_can_work(http: httpx.Client, caplog: pytest.LogCaptureFixture, file: Path) -> None:
    """Requests in the shape of Codex's and Claude Code's, with their histories; nothing in them is unknown here."""
    for request in json.loads(file.read_text()):
        body = {**request["body"], "max_output_tokens" if request["path"] == RESPONSES else "max_tokens": 3}
        with caplog.at_level(logging.WARNING, "mlx_gemma4.server"):
            lines = streamed(http, request["path"], body)
        assert any(line.startswith("data: ") for line in lines) and not any('"error":{' in line for line in lines)
    assert not [record for record in caplog.records if "Ignored" in record.getMessage()]


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_a_form_beside_a_call_that_is_required_is_for_text_which_there_is_none_of(
    http: httpx.Client, path: str
) -> None:
    """Instructor's responses and agents with an output schema ask for both."""
    schema, few = {"name": "story", "schema": WANT}, {"type": "object", "properties": {"cmd": {"enum": ["ls"]}}}
    run = {"name": "run", "parameters": {**few, "required": ["cmd"]}}
    more: dict[str, Any] = {
        CHAT: {
            "tools": [{"type": "function", "function": run}],
            "tool_choice": "required",
            "response_format": {"type": "json_schema", "json_schema": schema},
        },
        RESPONSES: {
            "tools": [{"type": "function", **run}],
            "tool_choice": {"type": "function", "name": "run"},
            "text": {"format": {"type": "json_schema", **schema}},
        },
        MESSAGES: {
            "tools": [{"name": "run", "input_schema": run["parameters"]}],
            "tool_choice": {"type": "any"},
            "output_config": {"format": {"type": "json_schema", "schema": WANT}},
        },
    }[path]
    more |= {} if path == MESSAGES else {"parallel_tool_calls": False}
    reply = http.post(path, json=body_of(path, **more))
    assert reply.status_code == 200 and re.search(r'"cmd\\?": ?\\?"ls', reply.text)
    free = http.post(
        path, json=body_of(path, **{**more, "tool_choice": {"type": "none"} if path == MESSAGES else "none"})
    )
    assert WANT["properties"]["a"]["const"] in text_of(path, free.json())  # without a call, the form holds


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES, "/api/chat"])
@pytest.mark.parametrize("strict", [True, False, None])
def test_calls_of_strict_tools_keep_to_their_schemas(
    http: httpx.Client, path: str, strict: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the model makes by itself, too; of other tools only those that are asked for."""
    choices: list[str] = []
    made = grammar.tool_calls
    monkeypatch.setattr(grammar, "tool_calls", lambda *a, **k: choices.append(a[2]) or made(*a, **k))
    given = {key: value for key, value in {**CALLED, "strict": strict}.items() if value is not None}
    tool = {
        RESPONSES: {"type": "function", **given},
        MESSAGES: {"input_schema": given["parameters"], **{k: v for k, v in given.items() if k != "parameters"}},
    }.get(path, {"type": "function", "function": given})
    body = {"messages": [USER], "stream": False, "options": {"num_predict": 8}, "model": "demo"}
    body = body if path == "/api/chat" else body_of(path)
    assert http.post(path, json={**body, "tools": [tool]}).status_code == 200
    assert choices == (["auto"] if strict else [])
