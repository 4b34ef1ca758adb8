"""The server in a thread of this process, or in a process of its own, for tests that talk to it over HTTP."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from starlette.applications import Starlette

from mlx_gemma4.conversation.language_model import LanguageModel
from mlx_gemma4.server.app import create_app
from mlx_gemma4.server.connections import Server, server_config
from mlx_gemma4.server.engine import Engine
from mlx_gemma4.server.models import Models
from mlx_gemma4.server.settings import Settings


class Serving(NamedTuple):
    url: str  # http://127.0.0.1:PORT
    port: int
    app: Starlette
    engine: Any  # of a single model


@contextmanager
def serving(lm: LanguageModel | Models, settings: Settings | None = None) -> Iterator[Serving]:
    """A server that answers while this is open. Its settings are those of create_app."""
    app = create_app(lm, settings)
    listener = socket.create_server(("127.0.0.1", 0))
    connections = app.state.models.settings.connections
    server = Server(server_config(app, connections, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < end and thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = listener.getsockname()[1]
    try:
        yield Serving(f"http://127.0.0.1:{port}", port, app, getattr(app.state, "engine", None))
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"


@contextmanager
def serving_folder(folder: Path, hub: str, cache: Path) -> Iterator[str]:
    """`serve --models` in a process of its own, with another hub and cache; its address."""
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(cache), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "mlx_gemma4", "serve", "--models", str(folder), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr
            yield next(word for line in process.stderr for word in line.split() if word.startswith("http://"))
        finally:
            process.kill()


def settled(engine: Engine, seconds: float = 60.0) -> bool:
    """Wait until nothing runs and nothing waits; whether that came to pass."""
    end = time.monotonic() + seconds
    while engine.load != (0, 0) and time.monotonic() < end:
        time.sleep(0.02)
    return engine.load == (0, 0)


def endless(lm: LanguageModel, max_tokens: int = 1900) -> dict[str, Any]:
    """A chat request, streaming, for a reply that doesn't end by itself."""
    bias = {str(token): -100 for token in lm.tokenizer.stop_ids}
    messages = [{"role": "user", "content": "Tell me a story."}]
    return {"messages": messages, "max_tokens": max_tokens, "stream": True, "logit_bias": bias}


@contextmanager
def started(http: httpx.Client, body: dict[str, Any]) -> Iterator[Iterator[str]]:
    """The rest of a chat's stream whose first text has come."""
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        next(line for line in lines if '"content":"' in line and '"content":""' not in line)
        yield lines


def until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Wait for a condition; whether it came to pass."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()
