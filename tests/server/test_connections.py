"""Connections: who holds one too long, who holds too many, what is parsed of them, and which pages may ask."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import pytest
from serving import Serving, endless, serving, settled, started, until

from mlx_gemma4.conversation.language_model import LanguageModel
from mlx_gemma4.errors import InputError
from mlx_gemma4.server.connections import SPARE, server_config
from mlx_gemma4.server.settings import Settings

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 3}
CHAT = "/v1/chat/completions"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def server(lm: LanguageModel) -> Iterator[Serving]:
    with serving(lm, Settings(max_body_bytes=1_000_000)) as running:
        yield running


@pytest.fixture
def http(server: Serving) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def connected(port: int, sent: bytes = b"") -> socket.socket:
    made = socket.create_connection(("127.0.0.1", port), timeout=60)
    made.sendall(sent)
    return made


def answered(port: int) -> bytes:
    with connected(port, HEALTH) as asking:
        return asking.recv(1000)


# Time


def test_halves_of_heads_time_out(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_gemma4.server.connections.HEAD_SECONDS", 0.5)
    with serving(lm) as running:
        for sent in (b"", b"GET /health HT", b"POST / HTTP/1.1\r\nX: y\r\n", HEALTH.replace(b"close", b"keep-alive")):
            with connected(running.port, sent) as half:
                while half.recv(1000):  # raises TimeoutError where the server waits on
                    pass
        with connected(running.port) as slow:  # a byte now and then doesn't help
            with suppress(OSError):
                for byte in HEALTH * 10:
                    slow.sendall(bytes([byte]))
                    time.sleep(0.02)
            with suppress(OSError):
                assert slow.recv(1000) == b""


def test_who_takes_nothing_is_left(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_gemma4.server.connections.STALL_SECONDS", 0.2)
    body = json.dumps({**ASK, "max_tokens": 1, "n": 1, "stream": True, "metadata": {}}).encode()
    page = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serving(lm) as running:
        held = socket.socket()
        held.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        held.connect(("127.0.0.1", running.port))
        assert body
        with suppress(OSError):
            held.sendall(page * 60)  # many pages, none of which is read
        gone = until(lambda: closed_by_peer(held), 15)
        held.close()
        assert gone and answered(running.port).startswith(b"HTTP/1.1 200")


def closed_by_peer(connection: socket.socket) -> bool:
    """Send until it fails: the other side has gone."""
    try:
        connection.settimeout(0.1)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    except TimeoutError:
        return False
    except OSError:
        return True
    return False


# Numbers


def test_connections_are_bounded_and_leave_room(lm: LanguageModel) -> None:
    with serving(lm, Settings(connections=4)) as running, ExitStack() as held:
        made = [held.enter_context(connected(running.port, b"GET /health HT")) for _ in range(80)]
        assert answered(running.port).startswith(b"HTTP/1.1 200")
        made[0].settimeout(5)
        with suppress(OSError):  # the oldest was closed for the newer ones
            assert made[0].recv(1) == b""
        assert answered(running.port).startswith(b"HTTP/1.1 200")


def test_requests_are_bounded_and_health_is_not(lm: LanguageModel) -> None:
    with (
        serving(lm, Settings(connections=1)) as running,
        httpx.Client(base_url=running.url, timeout=60) as http,
        started(http, endless(lm)),
    ):
        refused = httpx.post(running.url + CHAT, json=ASK)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert httpx.get(f"{running.url}/health").status_code == 200
    assert settled(running.engine)


def test_running_out_of_descriptors_is_told_once(caplog: pytest.LogCaptureFixture, lm: LanguageModel) -> None:
    with serving(lm) as running:
        server_config(running.app, SPARE)
        log = logging.getLogger("asyncio")
        for _ in range(50):
            log.error("socket.accept() out of system resource\nsocket: x", exc_info=OSError(24, "x"))
        log.error("another")
    lines = [record.getMessage() for record in caplog.records if record.name == "asyncio"]
    assert len(lines) == 2 and "ulimit -n" in lines[0] and lines[1] == "another"


# Bodies


def test_too_long_a_body_is_always_answered(server: Serving) -> None:
    body = b'{"x": "' + b"a" * 9_000_000 + b'"}'
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for _ in range(3):
        with connected(server.port, head + body) as bare:
            assert b" 413 " in bare.recv(1000)


@pytest.mark.slow
def test_many_of_anything_let_others_be_served(lm: LanguageModel) -> None:
    """Tools, messages, parts, biases, calls: refused, or linear, and /health is answered meanwhile."""
    tool = {"type": "function", "function": {"name": "f"}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = {"role": "assistant", "content": "a" * 300}
    user = ASK["messages"][0]
    many: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"tools": [{**tool, "function": {"name": f"f{i}"}} for i in range(25_000)]}),
        (CHAT, {"tools": [{**tool, "function": {"name": f"f{i}"}} for i in range(900)]}),
        (CHAT, {"messages": [user] * 50_000}),
        (CHAT, {"messages": [user] * 9_000}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}] * 60_000}]}),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [call] * 9_000}, *[user] * 100]}),
        (CHAT, {"logit_bias": {str(i): 1 for i in range(200_000)}}),
        (CHAT, {f"field{i}": 1 for i in range(100_000)}),
        ("/v1/responses", {"input": [said] * 9_000, "messages": None}),
        ("/v1/completions", {"prompt": [1] * 300_000, "messages": None}),
    ]
    with serving(lm) as running:
        for path, more in many:
            worst, done = [0.0], threading.Event()

            def poll(worst: list[float] = worst, done: threading.Event = done) -> None:
                while not done.wait(0.02):
                    start = time.thread_time(), time.monotonic()
                    assert answered(running.port)
                    worst[0] = max(worst[0], time.monotonic() - start[1])

            poller = threading.Thread(target=poll)
            poller.start()
            start = time.monotonic()
            status = httpx.post(running.url + path, json={**ASK, **more}, timeout=300).status_code
            done.set()
            poller.join()
            assert status in (200, 400) and worst[0] < 15 and time.monotonic() - start < 120, (more.keys(), worst)


def test_long_texts_let_others_be_served(server: Serving) -> None:
    """Tokenizing runs beside other threads: its share of the event loop's thread is small."""
    code = "def foo(x):\n    return {'a': x, \"b\": [1, 2, 3]}  # comment about the fox\n" * 10_000
    body = {"model": "m", "messages": [{"role": "user", "content": code}]}
    done = threading.Event()
    waits: list[float] = []

    def poll() -> None:
        while not done.wait(0.01):
            start = time.monotonic()
            answered(server.port)
            waits.append(time.monotonic() - start)

    poller = threading.Thread(target=poll)
    poller.start()
    status = httpx.post(f"{server.url}/v1/messages/count_tokens", json=body, timeout=120).status_code
    done.set()
    poller.join()
    assert status == 200 and len(waits) > 3 and max(waits) < 10


# Hosts and origins


def status(http: httpx.Client, **headers: str) -> int:
    return http.get(
        "/v1/models", headers={name: value.encode("latin-1") for name, value in headers.items()}
    ).status_code


def test_hosts_and_origins_that_no_browser_sends(http: httpx.Client, server: Serving) -> None:
    for origin in ("http://[", "http://", "http://[::1", "null", "//", "http://a@127.0.0.1", "x" * 5000, "\xff"):
        assert status(http, Origin=origin) == 403
    port = server.port
    hosts = ("127.0.0.1#evil.com", f"evil.com:1@127.0.0.1:{port}", "[127.0.0.1", "127.0.0.1:80:80", "127.0.0.1/")
    for host in (*hosts, "localhost:99999999", "127.0.0.1,evil.com", "evil.com", "localhost.evil.com", "\xff"):
        assert status(http, Host=host) in (400, 403), host
    for host in (f"127.0.0.1:{port}", "LOCALHOST", "localhost.", f"[::1]:{port}"):
        assert status(http, Host=host) == 200


def test_allowed_origins_and_hosts(lm: LanguageModel) -> None:
    origin = "app://obsidian.md"
    settings = Settings(api_key="k", allow_origin=(origin, "https://a.example"), allow_host=("host.docker.internal",))
    with serving(lm, settings) as running, httpx.Client(base_url=running.url, timeout=60) as http:
        key = {"Authorization": "Bearer k"}
        answer = http.get("/v1/models", headers={**key, "Origin": origin})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin
        assert answer.headers["vary"] == "Origin" and "access-control-allow-credentials" not in answer.headers
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-a"}
        preflight = http.options(CHAT, headers={"Origin": origin, **asked})  # browsers send no key with it
        assert preflight.status_code == 204 and preflight.headers["access-control-allow-headers"] == "authorization,x-a"
        assert "POST" in preflight.headers["access-control-allow-methods"]
        without = http.get("/v1/models", headers={"Origin": origin})
        assert without.status_code == 401 and without.headers["access-control-allow-origin"] == origin
        for other in ("https://b.example", "http://a.example", "https://a.example.evil"):
            refused = http.options(CHAT, headers={"Origin": other, **asked})
            assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers
        for host, wanted in (
            ("host.docker.internal:8080", 200),
            ("HOST.docker.internal", 200),
            ("docker.internal", 403),
        ):
            assert status(http, Host=host, **key) == wanted
    with serving(lm, Settings(allow_origin=("*",))) as running, httpx.Client(base_url=running.url) as http:
        assert status(http, Origin="chrome-extension://abc") == 200


def test_wrong_origins_and_hosts_are_refused_at_the_start() -> None:
    for origin in ("example.com", "https://example.com/", "https://Example.com", ""):
        with pytest.raises(InputError, match="--allow-origin"):
            Settings(allow_origin=(origin,))
    for host in ("http://a", "a/b", "", "a b"):
        with pytest.raises(InputError, match="--allow-host"):
            Settings(allow_host=(host,))


def test_the_list_of_models_with_a_slash(http: httpx.Client) -> None:
    assert http.get("/v1/models/").json()["data"] == http.get("/v1/models").json()["data"]
