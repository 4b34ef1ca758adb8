"""The server under many clients, and over many requests: how long /health waits, and whether anything grows.

    python benchmarks/server_load.py clients [--clients 64] [--seconds 60] [--model FILE]
    python benchmarks/server_load.py leak [--requests 2000] [--model FILE]

In: nothing but the built-in model, or FILE; `mlx-gemma4 serve` is started in a fresh process and asked over HTTP.
Out, `clients`: requests answered, errors by status, and /health's slowest answer, asked ten times a second meanwhile.
Out, `leak`: the server's resident memory, bytes of KV states and open files after 500 requests and then every 250;
replies are of all kinds (streamed, whole, left in the middle, with tools, forms and errors). Exit status 1 where
/health took over 0.5 s, or where memory grew by over 5 % after the first 500 requests or KV passed its bound.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

HEALTH = 0.5  # seconds
WARM = 500  # requests after which nothing grows any more
GROWTH = 1.05
KV = 60_000_000  # bytes
USER = {"role": "user", "content": "Tell me a story about a fox."}
WANT = {"type": "object", "properties": {"a": {"const": "Z"}}, "required": ["a"]}
RUN = {"name": "run", "parameters": {"type": "object", "properties": {"cmd": {"enum": ["ls", "pwd"]}}}}
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
KINDS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": [USER]}),
    (CHAT, {"messages": [USER], "stream": True}),
    (CHAT, {"messages": [USER], "response_format": {"type": "json_object", "schema": WANT}}),
    (CHAT, {"messages": [USER], "tools": [{"type": "function", "function": RUN}], "tool_choice": "required"}),
    (CHAT, {"messages": [USER], "temperature": 9}),
    (RESPONSES, {"input": "A fox?", "stream": True}),
    (MESSAGES, {"model": "m", "messages": [USER], "max_tokens": 9, "stream": True}),
    ("/v1/completions", {"prompt": "A fox", "logprobs": 2}),
]


ASKER = """
import json, sys, time, urllib.request
waits, end = [], time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    start = time.monotonic()
    urllib.request.urlopen(sys.argv[1] + "/health", timeout=60).read()
    waits.append(time.monotonic() - start)
    time.sleep(0.1)
print(json.dumps(waits))
"""


@contextmanager
def served(model: str | None, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`mlx-gemma4 serve` in a process of its own, and its URL."""
    command = [sys.executable, "-m", "mlx_gemma4", "serve", "--port", "0", *flags, *(["-m", model] if model else [])]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:
            url = next(re.findall(r"http://\S+", line)[0] for line in process.stderr if "http://" in line)
            threading.Thread(target=process.stderr.read, daemon=True).start()  # it may go on logging
            yield process, url
        finally:
            process.kill()


def ask(http: httpx.Client, number: int, chance: random.Random) -> int:
    """One request of a kind that its number says; a third of the streams are left in the middle. Return its status."""
    path, body = KINDS[number % len(KINDS)]
    body = {"seed": number, "max_output_tokens" if path == RESPONSES else "max_tokens": chance.randint(1, 12), **body}
    if "messages" in body and chance.random() < 0.5:
        body["messages"] = [{**USER, "content": f"{USER['content']} Number {number}."}]
    with http.stream("POST", path, json=body) as response:
        for line in response.iter_lines():
            if body.get("stream") and line and chance.random() < 0.05:
                break
        return response.status_code


def clients(model: str | None, count: int, seconds: float) -> tuple[Counter[int | str], list[float]]:
    """Ask from `count` clients for so long. Return how often each status or error came, and /health's times."""
    statuses: Counter[int | str] = Counter()
    with served(model) as (_, url):
        end = time.monotonic() + seconds

        def work(client: int) -> None:
            chance = random.Random(client)
            with httpx.Client(base_url=url, timeout=600) as http:
                while time.monotonic() < end:
                    try:
                        status: int | str = ask(http, chance.randrange(10_000), chance)
                    except httpx.HTTPError as error:
                        status = type(error).__name__
                    statuses[status] += 1
                    if status == 429:
                        time.sleep(0.2)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        # In a process of its own: what 64 threads of this one make each other wait is not the server's.
        asked = subprocess.run([sys.executable, "-c", ASKER, url, str(seconds)], stdout=subprocess.PIPE, check=True)
        waits: list[float] = json.loads(asked.stdout)
        for thread in threads:
            thread.join()
    shown = ", ".join(f"{status}: {number}" for status, number in statuses.most_common())
    print(f"{count} clients, {seconds:.0f} s: {shown}; /health {len(waits)} times, the slowest {max(waits):.3f} s")
    return statuses, waits


def leak(model: str | None, requests: int, warm: int = WARM) -> list[dict[str, float]]:
    """Ask so many times. Return what the server held after `warm` requests, and every 250 from there."""
    with served(model, "--max-kv-bytes", str(KV)) as (process, url), httpx.Client(base_url=url, timeout=600) as http:
        found, chance = [], random.Random(0)
        for number in range(1, requests + 1):
            with suppress(httpx.RemoteProtocolError):
                ask(http, number, chance)
            if (number >= warm and (number - warm) % 250 == 0) or number == requests:
                while http.get("/health").json()["running"]:
                    time.sleep(0.1)
                found.append(measured(process.pid, http))
                print(f"{number}: " + json.dumps(found[-1]), flush=True)
    return found


def measured(pid: int, http: httpx.Client) -> dict[str, float]:
    """Bytes resident, bytes of KV states, open files."""
    rss = int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(pid)])) * 1024
    text = http.get("/metrics").text
    kv = sum(float(value) for value in re.findall(r"^mlx_gemma4_kv_bytes(?:\{.*\})? (\S+)$", text, re.M))
    folder = Path(f"/proc/{pid}/fd")
    return {"rss": rss, "kv": kv, "files": len(list(folder.iterdir())) if folder.exists() else 0}


def main() -> None:
    """Run one of the two, and tell."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["clients", "leak"])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--model")
    given = parser.parse_args()
    if given.what == "clients":
        statuses, waits = clients(given.model, given.clients, given.seconds)
        good = max(waits) <= HEALTH and not failed(statuses)
    else:
        first, *_, last = leak(given.model, given.requests)
        good = last["rss"] <= first["rss"] * GROWTH and last["kv"] <= KV and last["files"] <= first["files"] + 2
    sys.exit(0 if good else 1)


def failed(statuses: Counter[int | str]) -> list[int | str]:
    """Statuses that no client should see: the server's errors, and connections that broke."""
    return [status for status in statuses if isinstance(status, str) or status >= 500]


if __name__ == "__main__":
    main()
