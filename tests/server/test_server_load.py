"""The server under load, with the built-in model: nobody is stuck, nothing is left behind.

`pytest tests/server/test_server_load.py -s` prints what docs/server.md quotes.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import pytest
from serving import Serving, serving, settled

from mlx_gemma4.conversation.language_model import LanguageModel
from mlx_gemma4.server.settings import Settings

pytestmark = pytest.mark.slow

CLIENTS, REQUESTS = int(os.environ.get("LOAD_CLIENTS", 32)), int(os.environ.get("LOAD_REQUESTS", 300))
BUDGET = 60_000_000  # bytes of KV state
TOPICS = ["a king", "a fox", "the sea", "an old shoe", "two sisters", "a candle", "snow", "a mill"]


@pytest.fixture
def server(lm: LanguageModel) -> Iterator[Serving]:
    with serving(lm, Settings(parallel=4, queue=26, max_kv_bytes=BUDGET)) as running:
        yield running


def chat(topic: str, max_tokens: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Tell me a story about {topic}."}]
    return {"messages": messages, "max_tokens": max_tokens, "stream": True, **more}


def endless(lm: LanguageModel) -> dict[str, int]:
    """A bias that keeps a reply from ending by itself."""
    return {str(token): -100 for token in lm.tokenizer.stop_ids}


def in_use() -> tuple[int, int, int]:
    """Bytes of MLX's arrays, threads, open files."""
    gc.collect()
    mx.clear_cache()
    files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    return mx.get_active_memory(), threading.active_count(), files


def no_more(after: tuple[int, ...], before: tuple[int, ...]) -> bool:
    """True if nothing has grown by what 300 requests would leave if they left a thing each.

    Small arrays, workers of the event loop and connections are kept by who made them first.
    """
    return all(a < b + most for a, b, most in zip(after, before, (100_000, 20, 20), strict=True))


def forget_prefixes(server: Serving) -> None:
    """Let the store drop all that it keeps for later prompts."""
    server.engine.store.max_kv_bytes = 0
    server.engine.store.unpin()


# Many at once


async def one_request(client: httpx.AsyncClient, dice: random.Random, seen: Counter[str]) -> None:
    """A request that is read to its end, or left after a few tokens; what became of it is counted.

    One that the server refuses (429) is sent again a little later.
    """
    body = chat(dice.choice(TOPICS), dice.randint(1, 10), seed=dice.randrange(100))
    leave_after = dice.randrange(5) if dice.random() < 0.3 else None
    while not await once(client, body, leave_after, seen):
        await asyncio.sleep(dice.random() / 2)


async def once(client: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None, seen: Counter[str]) -> bool:
    """Whether the server took it."""
    pieces, ended = 0, False
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code == 429:
            assert int(response.headers["retry-after"]) >= 1
            seen["refused (429)"] += 1
            return False
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            ended |= line == "data: [DONE]"
            if line.startswith("data: {"):
                assert "error" not in json.loads(line[6:])
                pieces += 1
                if leave_after is not None and pieces > leave_after:
                    break
    if leave_after is None:
        assert ended
    seen["answered" if ended else "left by the client"] += 1
    return True


async def crowd(url: str) -> Counter[str]:
    """All clients, each with one request at a time, until all requests are sent."""
    seen: Counter[str] = Counter()
    left = list(range(REQUESTS))

    async def client_loop(number: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            while left:
                await one_request(client, random.Random(1000 * number + left.pop()), seen)

    await asyncio.gather(*(client_loop(i) for i in range(CLIENTS)))
    return seen


def as_http(port: int, body: dict[str, Any]) -> str:
    data = json.dumps(body)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n{data}"


def slow_reader(port: int, body: dict[str, Any], stop: threading.Event) -> None:
    """Reads a byte at a time, then resets the connection."""
    with socket.socket() as bare:
        bare.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        bare.connect(("127.0.0.1", port))
        bare.sendall(as_http(port, body).encode())
        while not stop.wait(0.05):
            bare.recv(1)
        bare.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


READER = """
import socket, sys
bare = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
bare.sendall(sys.argv[2].encode())
while got := bare.recv(100):
    print(got, flush=True)
"""


def killed_client(port: int, body: dict[str, Any]) -> None:
    """Another process that reads is killed."""
    command = [sys.executable, "-c", READER, str(port), as_http(port, body)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout and b"HTTP/1.1 200" in process.stdout.readline()
        process.kill()


def test_many_clients(lm: LanguageModel, server: Serving) -> None:
    """32 clients, 300 requests, cancels, a slow reader and a killed client: no error but 429, and nothing stays."""
    httpx.post(f"{server.url}/v1/chat/completions", json=chat("a king", 2, stream=False), timeout=60).raise_for_status()
    forget_prefixes(server)
    before = in_use()
    server.engine.store.max_kv_bytes = BUDGET
    stop = threading.Event()
    long = chat("a slow reader", 1500, logit_bias=endless(lm))
    others = [
        threading.Thread(target=slow_reader, args=(server.port, long, stop)),
        threading.Thread(target=killed_client, args=(server.port, long)),
    ]
    for thread in others:
        thread.start()
    start = time.monotonic()
    seen = asyncio.run(crowd(server.url))
    seconds = time.monotonic() - start
    stop.set()
    for thread in others:
        thread.join(60)
        assert not thread.is_alive()
    assert settled(server.engine)
    kept = server.engine.store.nbytes
    assert seen["answered"] + seen["left by the client"] == REQUESTS
    assert seen["left by the client"] > REQUESTS / 10 and seen["refused (429)"] > 0
    assert kept <= BUDGET
    forget_prefixes(server)
    assert server.engine.store.nbytes == 0
    end = time.monotonic() + 60
    while not no_more(after := in_use(), before) and time.monotonic() < end:
        time.sleep(0.1)  # connections are still being closed
    print(f"\n{CLIENTS} clients, {REQUESTS} requests in {seconds:.1f} s: {dict(seen)}")
    print(f"{kept / 1e6:.1f} MB of prefixes kept; arrays, threads, files before {before}, after {after}")
    assert no_more(after, before)


# A short one beside a long one


async def first_token(client: httpx.AsyncClient, body: dict[str, Any]) -> float:
    """Seconds until a reply's first piece of text; the rest is read too."""
    start, first = time.monotonic(), 0.0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not first and line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                first = time.monotonic() - start
    return first


async def beside_a_long_one(server: Serving, long: dict[str, Any]) -> list[float]:
    client = httpx.AsyncClient(base_url=server.url, timeout=120)
    async with client, client.stream("POST", "/v1/chat/completions", json=long) as response:
        lines = response.aiter_lines()
        for _ in range(20):
            await anext(lines)
        times = [await first_token(client, chat(topic, 10)) for topic in TOPICS[:5]]
        assert server.engine.load[0] == 1  # the long one is still at it
    return times


def test_a_short_request_is_not_stuck_behind_a_long_one(lm: LanguageModel, server: Serving) -> None:
    """First token of a 10-token request soon, while a 2,000-token one runs, which ends when its client goes."""
    times = asyncio.run(beside_a_long_one(server, chat("a king", 2000, logit_bias=endless(lm))))
    start = time.monotonic()
    assert settled(server.engine)
    print(f"\nfirst token beside a long reply: {', '.join(f'{t:.2f}' for t in times)} s; ", end="")
    print(f"place free {time.monotonic() - start:.2f} s after its client left")
    assert max(times) < 10  # of a machine that others use; the long one took longer, and was still there


def test_replies_step_together(lm: LanguageModel) -> None:
    """Eight at once take few more steps than one; with `exact`, one after the other in turns, the same replies."""
    body = chat("a king", 30, logit_bias=endless(lm), temperature=0)
    texts, steps = [], []
    for exact in (False, True):
        with serving(lm, Settings(parallel=8, exact=exact)) as running:

            async def all_at_once() -> list[str]:
                async with httpx.AsyncClient(base_url=running.url, timeout=120) as client:
                    asked = [client.post("/v1/chat/completions", json={**body, "stream": False}) for _ in range(8)]
                    return [
                        answer.json()["choices"][0]["message"]["content"] for answer in await asyncio.gather(*asked)
                    ]

            texts.append(asyncio.run(all_at_once()))
            steps.append(running.engine.scheduler.steps)
    assert texts[0] == texts[1] and len(set(texts[0])) == 1
    assert 30 <= steps[0] < 120  # 240, each by itself; some come late where the machine is busy
