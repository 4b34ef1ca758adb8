"""What the server refuses and how, what it survives, who may use it, and who waits."""

from __future__ import annotations

import json
import logging
import re
import socket
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from serving import Serving, endless, serving, settled, started, until

from mlx_gemma4.conversation import reply as replies
from mlx_gemma4.conversation.language_model import LanguageModel
from mlx_gemma4.errors import InputError
from mlx_gemma4.server.settings import Settings

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 3}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(lm: LanguageModel) -> Iterator[Serving]:
    with serving(lm, Settings(max_body_bytes=100_000)) as running:
        yield running


@pytest.fixture
def http(server: Serving) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def error(response: httpx.Response, status: int, param: str | None = None) -> dict[str, Any]:
    """The error of a refusal, in OpenAI's form."""
    found: dict[str, Any] = response.json()["error"]
    assert (response.status_code, found["param"]) == (status, param), found
    assert set(found) == {"message", "type", "param", "code"} and found["message"]
    return found


# Fields

TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "1", "function": {"name": "f f", "arguments": "{}"}}
WRONG: list[tuple[str, Any, str]] = [
    ("messages", None, "messages"),
    ("messages", [], "messages"),
    ("messages", "hi", "messages"),
    ("messages", ["hi"], "messages[0]"),
    ("messages", [{"role": "wizard", "content": "hi"}], "messages[0].role"),
    ("messages", [{"role": "user"}], "messages[0].content"),
    ("messages", [{"role": "user", "content": 7}], "messages[0].content"),
    ("messages", [{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ("messages", [{"role": "assistant", "tool_calls": [CALL]}], "messages[0].tool_calls[0].function.name"),
    ("model", 7, "model"),
    ("temperature", "hot", "temperature"),
    ("temperature", 2.1, "temperature"),
    ("temperature", True, "temperature"),
    ("top_p", -0.1, "top_p"),
    ("top_k", 1.5, "top_k"),
    ("min_p", 2, "min_p"),
    ("frequency_penalty", 3, "frequency_penalty"),
    ("repetition_penalty", -1, "repetition_penalty"),
    ("seed", 2**70, "seed"),
    ("seed", 10**400, "seed"),
    ("max_tokens", 0, "max_tokens"),
    ("max_tokens", -4, "max_tokens"),
    ("max_completion_tokens", "many", "max_completion_tokens"),
    ("n", 17, "n"),
    ("stop", "", "stop"),
    ("stop", ["a"] * 17, "stop"),
    ("stop", 5, "stop"),
    ("stream", "yes", "stream"),
    ("stream_options", {"include_usage": True}, "stream_options"),
    ("logprobs", 1, "logprobs"),
    ("top_logprobs", 5, "top_logprobs"),
    ("top_logprobs", 21, "top_logprobs"),
    ("logit_bias", [1], "logit_bias"),
    ("logit_bias", {"99999": 1}, "logit_bias"),
    ("logit_bias", {"x": 1}, "logit_bias"),
    ("logit_bias", {"5": 101}, "logit_bias.5"),
    ("reasoning_effort", "extreme", "reasoning_effort"),
    ("chat_template_kwargs", {"enable_thinking": "yes"}, "chat_template_kwargs.enable_thinking"),
    ("tools", [{"type": "function"}], "tools[0].function"),
    ("tools", [{"type": "function", "function": {"name": "a b"}}], "tools[0].function.name"),
    ("tools", [TOOL, TOOL], "tools[1].function.name"),
    ("tools", [{"type": "function", "function": {"name": "f", "parameters": 1}}], "tools[0].function.parameters"),
    ("tool_choice", "required", "tool_choice"),
    ("tool_choice", "always", "tool_choice"),
    ("tool_choice", {"type": "function", "function": {"name": "g"}}, "tool_choice.function.name"),
    ("response_format", {"type": "xml"}, "response_format.type"),
    ("response_format", {"type": "json_schema", "json_schema": {}}, "response_format.json_schema.schema"),
    ("response_format", {"type": "regex"}, "response_format.regex"),
    ("response_format", {"type": "regex", "regex": "("}, "response_format"),
    ("response_format", {"type": "lark", "grammar": "start: nothing"}, "response_format"),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}, "response_format"),
    ("modalities", ["text", "audio"], "modalities"),
    ("functions", [{"name": "f"}], "functions"),
    ("service_tier", "flex", "service_tier"),
]


@pytest.mark.parametrize(("name", "value", "param"), WRONG, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(WRONG)])
def test_a_wrong_value_is_refused_and_named(http: httpx.Client, name: str, value: Any, param: str) -> None:
    for stream in (False, True):
        body = {**ASK, "stream": stream, name: value}
        if name == "stream_options":
            body["stream"] = False
        found = error(http.post(CHAT, content=json.dumps(body)), 400, param)
        assert found["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {}, "prompt"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/completions", {"prompt": ["a", 1]}, "prompt[1]"),
        ("/v1/completions", {"prompt": [1, 5000]}, "prompt"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("/v1/completions", {"prompt": "a", "best_of": 3}, "best_of"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ("/v1/responses", {}, "input"),
        ("/v1/responses", {"input": []}, "input"),
        ("/v1/responses", {"input": [{"type": 7}]}, "input[0].type"),
        ("/v1/responses", {"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        ("/v1/responses", {"input": "a", "background": True}, "background"),
        ("/v1/responses", {"input": "a", "tools": [{"type": "function"}]}, "tools[0].name"),
        ("/v1/responses", {"input": "a", "text": {"format": {"type": "regex", "regex": "("}}}, "text.format"),
    ],
)
def test_other_endpoints_name_fields_too(http: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    error(http.post(path, json=body), 400, param)


def test_the_clients_exceptions(server: Serving) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", messages=ASK["messages"], temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("gpt-9")
    assert missing.value.code == "model_not_found"


def test_unknown_fields_are_logged(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mlx_gemma4.server"):
        assert http.post(CHAT, json={**ASK, "flavour": "mint", "user": "me", "x\n" * 99: 1}).status_code == 200
    (line,) = [record.getMessage() for record in caplog.records if "Ignored" in record.getMessage()]
    assert "'flavour'" in line and "user" not in line and "\n" not in line and len(line) < 200


def test_a_prompt_over_the_context(http: httpx.Client) -> None:
    long = "word " * 3000
    for path, body, param in (
        (CHAT, {"messages": [{"role": "user", "content": long}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": long}], "stream": True}, "messages"),
        ("/v1/completions", {"prompt": long}, "prompt"),
        ("/v1/responses", {"input": long}, "input"),
    ):
        found = error(http.post(path, json=body), 400, param)
        assert found["code"] == "context_length_exceeded"
        have, most = map(int, re.findall(r"\d+", found["message"]))
        assert have > 3000 and most == 2048


# What else comes over the wire


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b"{",
            b'{"messages": ',
            b"\xff\xfe",
            b'{"a": "\xc3"}',
            b"[]",
            b"7",
            b'{"temperature": NaN}',
            b'"' * 99_999,
        ),
        *(b"{" * 50_000, b"[" * 90_000, b'{"a":' * 9000 + b"1" + b"}" * 9000, b'{"seed": ' + b"9" * 50_000 + b"}"),
    ],
)
def test_bodies_that_are_no_requests(http: httpx.Client, body: bytes) -> None:
    found = error(http.post(CHAT, content=body), 400)
    assert len(found["message"]) < 300


def test_text_that_no_one_expects(http: httpx.Client) -> None:
    """Half characters, control characters, deep arguments: answered, or refused, but never an error of the server."""
    half = json.dumps({**ASK, "messages": [{"role": "user", "content": "\ud800 \x00 \U0010ffff"}]})
    assert http.post(CHAT, content=half).status_code in (200, 400)
    deep: Any = "x"
    for _ in range(80):
        deep = {"a": deep}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps(deep)}}
    nested = {"messages": [*ASK["messages"], {"role": "assistant", "tool_calls": [call]}], "max_tokens": 1}
    assert http.post(CHAT, json=nested).status_code in (200, 400)
    assert http.post(CHAT, json=ASK).status_code == 200


def test_too_long_a_body(http: httpx.Client, server: Serving) -> None:
    error(http.post(CHAT, content=b'"' + b"a" * 200_000 + b'"'), 413)

    def endlessly() -> Iterator[bytes]:
        while True:
            yield b" " * 10_000

    with suppress(httpx.NetworkError):  # without a length; the server may close before it has all been sent
        assert httpx.post(f"{server.url}{CHAT}", content=endlessly()).status_code == 413
    assert http.get("/health").status_code == 200


def test_no_such_path_or_method(http: httpx.Client) -> None:
    error(http.get("/v1/nothing"), 404)
    refused = http.get(CHAT)
    error(refused, 405)
    assert refused.headers["allow"] == "POST"
    assert http.options(CHAT).status_code == 405


def test_what_is_not_http(server: Serving, http: httpx.Client) -> None:
    for sent in (b"\x16\x03\x01\x00", b"GET\r\n\r\n", b"POST /v1/responses HTTP/1.1\r\nContent-Length: x\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as bare:
            bare.sendall(sent)
            bare.shutdown(socket.SHUT_WR)
            bare.recv(1000)
    with socket.create_connection(("127.0.0.1", server.port)) as bare:  # and leaves in the middle of a body
        bare.sendall(b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    assert http.post(CHAT, json=ASK).status_code == 200


def test_a_body_that_never_comes(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_gemma4.server.wire.BODY_TIMEOUT", 0.2)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as bare:
        bare.sendall(b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in bare.recv(1000)


def test_an_error_nobody_foresaw(server: Serving, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is answered with 500, and the next request is answered as if nothing had been."""
    kept = server.engine.store

    class Broken:
        def take(self, *_: Any) -> None:
            raise ZeroDivisionError("secret")

    monkeypatch.setattr(server.engine, "store", Broken())
    for body in (ASK, {**ASK, "stream": True}):
        found = error(http.post(CHAT, json=body), 500)
        assert found["type"] == "server_error" and "secret" not in found["message"]
    monkeypatch.setattr(server.engine, "store", kept)
    assert http.post(CHAT, json=ASK).status_code == 200


def test_an_error_in_the_middle_of_a_stream(
    server: Serving, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any, **named: Any) -> Iterator[Any]:
        with closing(replies.stream(*given, **named)) as chunks:  # type: ignore[type-var]
            yield next(chunks)
            raise ZeroDivisionError

    monkeypatch.setattr("mlx_gemma4.server.engine.stream", broken)
    for path, body in ((CHAT, ASK), ("/v1/completions", {"prompt": "A"}), ("/v1/responses", {"input": "A"})):
        response = http.post(path, json={**body, "stream": True})
        assert response.status_code == 200
        data = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        found = data[-1]["response"]["error"] if path == "/v1/responses" else data[-1]["error"]
        assert "ZeroDivisionError" in found["message"] and "[DONE]" not in response.text
    client = OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    with pytest.raises(openai.APIError, match="ZeroDivisionError"):
        list(client.chat.completions.create(model="m", messages=ASK["messages"], stream=True))
    monkeypatch.undo()
    assert settled(server.engine) and not server.engine.store._reserved()


# Who may ask


def test_the_key(lm: LanguageModel) -> None:
    with serving(lm, Settings(api_key="sésame")) as running, httpx.Client(base_url=running.url) as http:
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "sésame".encode()}, {"X-Api-Key": "s"}):
            for path in ("/v1/models", "/metrics", "/v1/nothing"):
                assert error(http.get(path, headers=headers), 401)["code"] == "invalid_api_key"
        assert http.post("/v1/messages", json={}).json()["error"]["type"] == "authentication_error"
        for headers in ({"Authorization": "Bearer sésame".encode()}, {"X-Api-Key": "sésame".encode()}):
            assert http.get("/v1/models", headers=headers).status_code == 200
        assert http.get("/").status_code == http.get("/health").status_code == 200


def test_other_addresses_need_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com"):
        with pytest.raises(InputError, match="--api-key"):
            Settings(host=host)
        assert Settings(host=host, api_key="k").api_key == "k"
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        assert Settings(host=host).host == host


def test_pages_of_other_sites_are_refused(http: httpx.Client, server: Serving) -> None:
    for headers in (
        {"Host": "evil.example"},
        {"Host": f"evil.example:{server.port}"},
        {"Host": "127.0.0.1.evil.example"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
    ):
        error(http.post(CHAT, json=ASK, headers=headers), 403)
    for headers in ({"Origin": server.url}, {"Host": f"localhost:{server.port}"}, {"Host": "[::1]"}):
        answer = http.get("/v1/models", headers=headers)
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("access-control")]


# A place for everyone


def test_a_full_queue(lm: LanguageModel) -> None:
    with (
        serving(lm, Settings(parallel=1, queue=1)) as running,
        httpx.Client(base_url=running.url, timeout=60) as http,
        started(http, endless(lm)),
    ):
        waiting = socket.create_connection(("127.0.0.1", running.port))
        body = json.dumps(ASK)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        waiting.sendall(f"{head}{body}".encode())
        assert until(lambda: running.engine.load == (1, 1))
        refused = http.post(CHAT, json=ASK)
        assert error(refused, 429)["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        client = OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.RateLimitError):
            client.responses.create(model="m", input="Hi")
        waiting.close()  # one that waits and goes away leaves its place
        assert until(lambda: running.engine.load == (1, 0))
        assert http.get("/metrics").text.count("mlx_gemma4_refused_total 2.0\n") == 1
    assert settled(running.engine)


def test_who_goes_away_frees_its_place(lm: LanguageModel) -> None:
    with (
        serving(lm, Settings(parallel=1)) as running,
        httpx.Client(base_url=running.url, timeout=60) as http,
    ):
        engine = running.engine
        with started(http, endless(lm)):
            pass
        assert until(lambda: engine.load == (0, 0))
        words = "word " * 1500  # left while its prompt is read, not streaming
        with pytest.raises(httpx.ReadTimeout):
            http.post(CHAT, json={"messages": [{"role": "user", "content": words}], "max_tokens": 400}, timeout=0.3)
        assert until(lambda: engine.load == (0, 0))
        assert http.get("/metrics").text.count("mlx_gemma4_cancelled_total 2.0\n") == 1
        assert not engine.store._reserved()
        assert http.post(CHAT, json=ASK).status_code == 200


def test_the_kv_budget(lm: LanguageModel) -> None:
    """Replies for which there is no room together are made one after the other; what never fits is refused."""
    with serving(lm) as running, httpx.Client(base_url=running.url, timeout=60) as http:
        store = running.engine.store
        long = endless(lm)
        store.max_kv_bytes = store.most_bytes(2048) + 1000
        with started(http, long):
            with pytest.raises(httpx.ReadTimeout):
                http.post(CHAT, json={**long, "stream": False}, timeout=0.5)
            assert until(lambda: running.engine.load == (1, 0))
        assert settled(running.engine)
        assert http.post(CHAT, json=ASK).status_code == 200
        store.max_kv_bytes = store.most_bytes(1000)
        found = error(http.post(CHAT, json=long), 400, "messages")
        assert found["code"] == "context_length_exceeded" and "MB" in found["message"]
        assert store.nbytes <= store.max_kv_bytes
