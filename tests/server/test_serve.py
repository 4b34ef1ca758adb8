"""`mlx-gemma4 serve` as a process: how it begins, and how Ctrl-C ends it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from serving import endless, started, until

from mlx_gemma4.conversation.language_model import LanguageModel

pytestmark = pytest.mark.slow


@contextmanager
def command(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`mlx-gemma4 serve`, and its URL."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "mlx_gemma4", "serve", "--port", "0", *flags],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stderr
        try:
            line = next(line for line in process.stderr if "http://" in line)
            yield process, re.findall(r"http://\S+", line)[0]
        finally:
            process.kill()


def test_ctrl_c_lets_replies_end(lm: LanguageModel) -> None:
    with command("--grace", "60") as (process, url), httpx.Client(base_url=url, timeout=60) as http:
        with started(http, endless(lm, 150)) as lines:
            process.send_signal(signal.SIGINT)
            assert until(lambda: httpx.get(f"{url}/health").status_code == 503)  # still there, and says so
            assert httpx.get(f"{url}/health").json()["status"] == "draining"
            assert httpx.post(f"{url}/v1/chat/completions", json=endless(lm)).status_code == 503
            assert list(lines)[-2] == "data: [DONE]"
        assert process.wait(20) == 0


def test_a_second_ctrl_c_ends_at_once(lm: LanguageModel) -> None:
    with command() as (process, url), httpx.Client(base_url=url, timeout=60) as http, started(http, endless(lm)):
        process.send_signal(signal.SIGINT)
        assert until(lambda: not reachable(url))
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


def reachable(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_mistakes_on_the_command_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for flags, words in (
            (["--port", str(taken.getsockname()[1])], "--port"),
            (["--host", "0.0.0.0"], "--api-key"),
            (["--max-kv-bytes", "lots"], "--max-kv-bytes"),
        ):
            environment = {key: value for key, value in os.environ.items() if key != "MLX_GEMMA4_API_KEY"}
            done = subprocess.run(
                [sys.executable, "-m", "mlx_gemma4", "serve", *flags],
                capture_output=True,
                text=True,
                timeout=60,
                env=environment,
            )
            assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
