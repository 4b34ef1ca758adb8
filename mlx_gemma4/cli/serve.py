"""`mlx-gemma4 serve`: OpenAI's and Anthropic's interfaces over HTTP, and a page to chat in a browser."""

import logging
import os
import re
import socket
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from .options import (
    SamplingOf,
    draft_options,
    echo,
    kv_option,
    load_with_progress,
    model_option,
    output_options,
    sampling_options,
)

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def _size(value: str) -> int:
    """Bytes from 4GB, 500M, 1000000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", value, re.IGNORECASE | re.ASCII)
    if not found:
        raise click.BadParameter(f"{value!r} is no size; write it as 4GB or 500MB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


@click.command()
@model_option
@click.option("--host", default="127.0.0.1", help="Address to listen at; others need --api-key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, help="0 takes a free one.")
@click.option("--api-key", metavar="KEY", envvar="MLX_GEMMA4_API_KEY", show_envvar=True, help="Ask clients for this.")
@click.option("--parallel", type=click.IntRange(1, 32), help="Replies made at a time.  [default: as memory allows]")
@click.option("--exact", is_flag=True, help="Let them take turns, each to the bit as it is alone; slower.")
@click.option("--queue", type=click.IntRange(0, 10_000), default=32, help="Requests that may wait for that.")
@click.option(
    "-n", "--max-tokens", type=click.IntRange(1), default=4096, help="Length of a reply whose request doesn't say."
)
@click.option(
    "--max-kv-bytes",
    type=_size,
    metavar="SIZE",
    help="Memory for conversations, kept and in use, as 4GB.  [default: half of what is free]",
)
@click.option("--grace", type=click.IntRange(0), default=30, help="Seconds that Ctrl-C waits.")
@kv_option
@sampling_options
@draft_options
@output_options
def serve(
    model: str | None,
    host: str,
    port: int,
    api_key: str | None,
    parallel: int | None,
    exact: bool,
    queue: int,
    max_tokens: int,
    max_kv_bytes: int | None,
    grace: int,
    kv: str,
    sampling: SamplingOf,
    draft_max: int,
) -> None:
    """Answer over HTTP: OpenAI's and Anthropic's interfaces, and a page to chat in a browser.

    Ctrl-C lets running replies end; a second one ends at once.
    """
    import uvicorn

    from ..generation.prefix import PrefixCache
    from ..memory import available_memory
    from ..model.batch import MAX_BATCH
    from ..server.app import create_app
    from ..server.settings import Settings

    for name in ("httpx", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)
    settings = Settings(host=host, api_key=api_key or None, exact=exact, queue=queue, max_tokens=max_tokens, kv=kv)
    listening = _listen(host, port)  # before the model is loaded, so that an error shows at once
    lm, _ = load_with_progress(model, kv, 2 * max_tokens, max_kv_bytes, draft_max=draft_max)
    lm = replace(lm, sampling=sampling(lm))
    one = PrefixCache(lm.model, kv=kv).most_bytes(min(lm.config.context, 2 * max_tokens))  # long reply
    if not max_kv_bytes:  # half of what prompts leave free, but enough for one
        max_kv_bytes = max((available_memory() - lm.plan.reading) // 2, one)
    parallel = parallel or min(max(4, max_kv_bytes // one), MAX_BATCH)
    settings = replace(settings, model_name=model_name(model, lm.path), parallel=parallel, max_kv_bytes=max_kv_bytes)
    app = create_app(lm, settings)
    shown = f"[{host}]" if ":" in host else host
    echo(f"Serving {settings.model_name} at http://{shown}:{listening.getsockname()[1]} (Ctrl-C ends)")
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=logging.getLogger().isEnabledFor(logging.INFO),  # --verbose
        server_header=False,
        timeout_graceful_shutdown=grace,
    )
    server = uvicorn.Server(config)
    handle_exit, engine = server.handle_exit, app.state.engine

    def stop(sig: int, frame: Any) -> None:
        """Let running replies end after Ctrl-C, and end them after a second one."""
        if server.should_exit:
            engine.close(timeout=0)  # ends replies, and so the connections that uvicorn waits for
        else:
            running, waiting = engine.load
            if running or waiting:
                echo(f"Finishing {running} replies, for {grace} s at most; Ctrl-C again ends at once.")
            engine.drain()
        handle_exit(sig, frame)

    server.handle_exit = stop  # type: ignore[method-assign]
    with suppress(KeyboardInterrupt):  # uvicorn sends itself, in the end, the signals that it got
        server.run(sockets=[listening])
    if not engine.close():
        logging.warning("A reply didn't stop in time; ending without it.")
        sys.stderr.flush()
        os._exit(1)  # Python's own exit would free what a thread uses that still runs a kernel


def model_name(model: str | None, path: Path) -> str:
    """The model's name in replies: the repository's, or the file's."""
    if model is None:
        return "gemma4-demo"
    return model if not Path(model).exists() else path.name.removesuffix(".gguf")


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"--host {host} --port {port}: can't listen there ({reason}); take another port") from None
