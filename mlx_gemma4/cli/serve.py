"""`mlx-gemma4 serve`: OpenAI's and Anthropic's interfaces over HTTP, and a page to chat in a browser."""

import logging
import os
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from .options import (
    MMPROJ,
    Lenient,
    SamplingOf,
    draft_options,
    echo,
    image_tokens_option,
    kv_option,
    load_with_progress,
    loading,
    loading_options,
    mmproj_options,
    model_option,
    output_options,
    reply_length,
    sampling_options,
)

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def _size(value: str) -> int:
    """Bytes from 4GB, 500M, 1000000."""
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMG]?)B?", value, re.IGNORECASE | re.ASCII)
    if not found:
        raise click.BadParameter(f"{value!r} is no size; write it as 4GB or 500MB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _duration(value: str) -> float:
    """Seconds from 10m, 1h30m, 0, -1."""
    from ..server.settings import seconds

    try:
        return seconds(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} must {error}") from None


@click.command(cls=Lenient)
@model_option
@click.option(
    "--models", metavar="DIR", help="In place of --model: serve those in this folder, each loaded by its name."
)
@click.option(
    "--keep",
    type=_duration,
    metavar="TIME",
    default="5m",
    help="How long such a model stays loaded unused; -1: for ever.",
)
@click.option("--host", metavar="ADDRESS", default="127.0.0.1", help="Address to listen at; others need --api-key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, help="0 takes a free one.")
@click.option("--api-key", metavar="KEY", envvar="MLX_GEMMA4_API_KEY", show_envvar=True, help="Ask clients for this.")
@click.option(
    "--allow-origin",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages or extensions there use it, as app://obsidian.md; * for all. May be repeated.",
)
@click.option("--allow-host", multiple=True, metavar="NAME", help="Another name of this machine. May be repeated.")
@click.option("--allow-remote-images", is_flag=True, help="Let requests name pictures on the web, which are read then.")
@click.option(
    "--skip-media", is_flag=True, help="Leave out pictures and sounds that the model can't take; refuse none."
)
@click.option("--parallel", type=click.IntRange(1, 32), help="Replies made at a time.  [default: as memory allows]")
@click.option("--exact", is_flag=True, help="Let them take turns, each to the bit as it is alone; slower.")
@click.option("--queue", type=click.IntRange(0, 10_000), default=32, help="Requests that may wait for that.")
@click.option(
    "-n",
    "--max-tokens",
    type=reply_length,
    metavar="N",
    default=4096,
    help="Tokens of a reply, at most, where a request doesn't say; -1: no limit.",
)
@click.option("--think-budget", type=click.IntRange(0), help="Tokens of thinking, where it doesn't say.")
@click.option(
    "--max-kv-bytes",
    type=_size,
    metavar="SIZE",
    help="Memory for conversations, kept and in use, as 4GB.  [default: half of what is free]",
)
@click.option("--grace", type=click.IntRange(0, 86400), default=30, help="Seconds that Ctrl-C waits.")
@image_tokens_option
@kv_option
@loading_options
@sampling_options
@draft_options
@mmproj_options
@output_options
def serve(
    model: str | None,
    models: str | None,
    keep: float,
    host: str,
    port: int,
    api_key: str | None,
    allow_origin: tuple[str, ...],
    allow_host: tuple[str, ...],
    allow_remote_images: bool,
    skip_media: bool,
    image_tokens: int | None,
    parallel: int | None,
    exact: bool,
    queue: int,
    max_tokens: int | None,
    think_budget: int | None,
    max_kv_bytes: int | None,
    grace: int,
    kv: str,
    sampling: SamplingOf,
    draft_max: int,
) -> None:
    """Answer over HTTP, as OpenAI, Anthropic and Ollama do.

    At / there is a page to chat in a browser. Ctrl-C lets running replies end; a second one ends at once.
    """
    from ..conversation.language_model import LanguageModel, load
    from ..generation.prefix import PrefixCache
    from ..memory import DEFAULT_CONTEXT, Room, available_memory
    from ..model.batch import MAX_BATCH
    from ..server.app import create_app
    from ..server.connections import Server, server_config
    from ..server.engine import Engine
    from ..server.models import Models
    from ..server.settings import Settings

    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of every request that is no HTTP
    settings = Settings(
        host=host,
        api_key=api_key or None,
        allow_origin=allow_origin,
        allow_host=allow_host,
        allow_remote_images=allow_remote_images,
        skip_media=skip_media,
        image_tokens=image_tokens,
        connections=_connections(queue),
        exact=exact,
        queue=queue,
        max_tokens=max_tokens,
        think_budget=think_budget,
        kv=kv,
    )
    if models is not None and model is not None:
        raise InputError("--model and --models: give one of them")
    if models is not None and not Path(models).is_dir():
        raise InputError(f"--models {models}: no such folder; make it, or name one with .gguf files in it")
    mmproj = click.get_current_context().meta.get(MMPROJ, "auto")
    if models is not None and mmproj not in (None, "auto"):
        raise InputError("--mmproj goes with --model; of a folder each model takes the one beside it")
    context, planned = loading().get("context"), max_tokens and 2 * max_tokens  # tokens of a long conversation
    listening = _listen(host, port)  # before the model is loaded, so that an error shows at once

    def sized(lm: LanguageModel, name: str, promised: int = 0) -> Settings:
        """The settings for a model, beside others that may still take as many bytes as `promised`."""
        one = PrefixCache(lm.model, kv=kv).most_bytes(min(lm.config.context, planned or DEFAULT_CONTEXT))
        # Half of what prompts leave free, but enough for one.
        most = max_kv_bytes or max((available_memory() - lm.plan.reading - lm.plan.later - promised) // 2, one)
        together = parallel or min(max(4, most // one), MAX_BATCH)
        return replace(settings, model_name=name, parallel=together, max_kv_bytes=most)

    def start(name: str, path: Path, promised: int) -> Engine:
        """Load a model of the folder."""
        room = Room(planned, kv, (max_kv_bytes or 0) + promised)
        lm = load(path, room=room, context=context, draft_max=draft_max, mmproj=mmproj)
        lm = replace(lm, sampling=sampling(lm))
        return Engine(lm, sized(lm, name, promised))

    if models is None:
        lm, _ = load_with_progress(model, kv, planned, max_kv_bytes, draft_max=draft_max)
        lm = replace(lm, sampling=sampling(lm))
        served = Models(sized(lm, model_name(model, lm.path)))
        served.stay(lm)
        what = served.settings.model_name
    else:
        served, what = Models(settings, Path(models), start, keep), f"the models in {models}"
    app = create_app(served)
    shown = f"[{host}]" if ":" in host else host
    echo(f"Serving {what} at http://{shown}:{listening.getsockname()[1]} (Ctrl-C ends)")
    config = server_config(app, settings.connections, timeout_graceful_shutdown=1 if grace else 0)
    server = Server(config)
    handle_exit = server.handle_exit

    def finish(sig: int, frame: Any) -> None:
        """Answer until running replies have ended: /health says meanwhile that no more are taken."""
        end = time.monotonic() + grace
        while served.load != (0, 0) and time.monotonic() < end:
            time.sleep(0.05)
        handle_exit(sig, frame)

    def stop(sig: int, frame: Any) -> None:
        """Let running replies end after Ctrl-C, and end them after a second one."""
        if served.draining:
            served.close(timeout=0)  # ends replies, and so the connections that uvicorn waits for
            return handle_exit(sig, frame)
        running, waiting = served.load
        if running or waiting:
            echo(f"Finishing {running} replies, for {grace} s at most; Ctrl-C again ends at once.")
        served.drain()
        threading.Thread(target=finish, args=(sig, frame), daemon=True).start()

    server.handle_exit = stop  # type: ignore[method-assign]
    with suppress(KeyboardInterrupt):  # uvicorn sends itself, in the end, the signals that it got
        server.run(sockets=[listening])
    if not served.close():
        logging.warning("A reply didn't stop in time; ending without it.")
        sys.stderr.flush()
        os._exit(1)  # Python's own exit would free what a thread uses that still runs a kernel


def _connections(queue: int) -> int:
    """The most requests at a time: more than may wait for replies, and as many as there are descriptors for."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(512, queue + 64)
    if soft < wanted + 64:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted + 64, hard), hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(16, min(wanted, soft - 64))


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
