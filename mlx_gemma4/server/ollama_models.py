"""Ollama's endpoints about models: show, pull and delete.

In: a model's name. Out: what its file says, the progress of a download in lines of JSON, nothing.
Described at https://docs.ollama.com/api. Models to pull are on Hugging Face, and become the folder's.
"""

import asyncio
import hashlib
import threading
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import model_validator
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp

from ..files import hub
from ..files.folder import link_model, repository
from .cards import timestamp
from .endpoint import Endpoint
from .fields import Body
from .lists import capabilities, details
from .models import Models
from .wire import ApiError, for_clients, json_response, ndjson

JSON_LINES = "application/x-ndjson"
EVERY = 0.2  # seconds between two lines of progress


class Named(Body):
    """A body whose `model` older clients call `name`."""

    model: str

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: Any) -> Any:
        older = isinstance(values, dict) and values.get("model") is None and "name" in values
        return {**{key: x for key, x in values.items() if key != "name"}, "model": values["name"]} if older else values


class ShowRequest(Named):
    verbose: bool | None = None


class PullRequest(Named):
    ignored = ("insecure", "username", "password")
    stream: bool | None = None


class _Left(Exception):
    """Nobody waits for a download any more."""


async def show(body: ShowRequest, models: Models) -> Response:
    """Describe a model."""
    card = await models.card(body.model)
    architecture = card.config.architecture
    info: dict[str, Any] = {
        "general.architecture": architecture,
        "general.parameter_count": card.parameters,
        f"{architecture}.context_length": card.config.context,
        f"{architecture}.embedding_length": card.config.hidden,
        f"{architecture}.block_count": len(card.config.layers),
    }
    info |= {key: x for key, x in card.metadata.items() if key != "tokenizer.chat_template"}
    sampling = {key.split(".")[-1]: x for key, x in card.metadata.items() if key.startswith("general.sampling.")}
    return json_response(
        {
            "modelfile": f"FROM {card.name}",
            "parameters": "\n".join(f"{key:<30} {x}" for key, x in sampling.items()),
            "template": card.template,
            "details": details(card),
            "model_info": info,
            "capabilities": capabilities(card),
            "modified_at": timestamp(card.changed),
        }
    )


async def delete(body: Named, models: Models) -> Response:
    """Delete a model, once requests to it are done."""
    await models.delete(body.model)
    return Response()


async def pull(body: PullRequest, models: Models) -> ASGIApp:
    """Download a model of Hugging Face into the folder."""
    if models.folder is None:
        raise ApiError(
            400, "this server has the one model that it was started with; `serve --models DIR` can pull more"
        )
    repo, quant = repository(body.model)
    lines = _pulled(models.folder, repo, quant)
    if body.stream is not False:
        return StreamingResponse(lines, media_type=JSON_LINES)
    async for line in lines:
        last = line
    return Response(last, 400 if last.startswith(b'{"error"') else 200, media_type="application/json")


async def _pulled(folder: Path, repo: str, quant: str) -> AsyncIterator[bytes]:
    """The lines of a download, which stops when nobody reads them any more; a later one goes on from there."""
    loop, left = asyncio.get_running_loop(), threading.Event()
    news: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue()
    digest = "sha256:" + hashlib.sha256(f"{repo}:{quant}".encode()).hexdigest()
    told = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal told
        if left.is_set():
            raise _Left
        if time.monotonic() - told > EVERY or done == total:
            told = time.monotonic()
            loop.call_soon_threadsafe(news.put_nowait, (total, done))

    def ended(work: asyncio.Future[Path]) -> None:
        news.put_nowait(None)
        work.exception()  # has been seen, then

    yield ndjson({"status": "pulling manifest"})
    work = loop.run_in_executor(None, partial(hub.pull, repo, quant, progress=progress))
    work.add_done_callback(ended)
    try:
        while (found := await news.get()) is not None:
            line = {"status": f"pulling {digest[7:19]}", "digest": digest, "total": found[0], "completed": found[1]}
            yield ndjson(line)
        path = await work
        await asyncio.to_thread(link_model, folder, repo, path)
        for status in ("verifying sha256 digest", "writing manifest", "success"):
            yield ndjson({"status": status})
    except Exception as error:
        yield ndjson(for_clients(error, "/api/pull")[1])
    finally:
        left.set()


_DETAILS = {"format": str, "family": str, "parameter_size": str, "quantization_level": str}
_SHOWN = {"details": _DETAILS, "model_info": dict, "capabilities": [str], "template": str, "modified_at": str}
ENDPOINTS = (
    Endpoint("/api/show", "Ollama: describe a model", ShowRequest, _SHOWN, show, "", of_models=True),
    Endpoint("/api/pull", "Ollama: download a model", PullRequest, {"status": str}, pull, JSON_LINES, of_models=True),
    Endpoint("/api/delete", "Ollama: delete a model", Named, {}, delete, "", of_models=True, method="DELETE"),
)
