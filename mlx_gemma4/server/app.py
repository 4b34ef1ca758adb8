"""The server's routes, and what every request passes before and after them.

In: a loaded model and `Settings`. Out: a Starlette application, with the engine as `app.state.engine`.
"""

from __future__ import annotations

import hmac
import ipaddress
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..conversation.language_model import LanguageModel
from ..errors import InputError
from . import anthropic, completions, openapi, responses
from .engine import Engine
from .metrics import Metrics
from .page import page
from .wire import ApiError, as_api_error, error_response, json_response, openai_error

Handler = Callable[[Request], Awaitable[Response]]

_OPEN = ("/", "/health")  # what needs no key: nothing of the model or of what others ask is in it
_KNOWN_PATHS = (
    *_OPEN,
    "/metrics",
    "/openapi.json",
    "/v1/models",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
)


@dataclass(frozen=True)
class Settings:
    """What `serve` is told."""

    host: str = "127.0.0.1"
    api_key: str | None = None
    model_name: str = "gemma"  # in replies and /v1/models
    parallel: int = 4  # replies made at a time
    queue: int = 32  # requests that may wait beside them
    max_kv_bytes: int | None = None  # of all KV states; None: no limit
    kv: str = "full"  # how KV states hold keys and values
    max_body_bytes: int = 8_000_000
    max_tokens: int | None = None  # of a reply whose request doesn't say; None: what the context holds

    def __post_init__(self) -> None:
        if self.api_key is None and not is_loopback(self.host):
            raise InputError(f"--host {self.host}: others can reach this address; give an --api-key, or use 127.0.0.1")


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach an address or name."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.rstrip(".").lower() == "localhost"


def create_app(lm: LanguageModel, settings: Settings | None = None) -> Starlette:
    """The application around a model. Its engine's threads end with the application's lifespan, or `engine.close`."""
    settings = settings or Settings()
    metrics = Metrics()
    engine = Engine(
        lm,
        parallel=settings.parallel,
        queue=settings.queue,
        max_kv_bytes=settings.max_kv_bytes,
        kv=settings.kv,
        metrics=metrics,
    )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        engine.close()

    def get(path: str, handler: Handler) -> Route:
        return Route(path, _answered(handler))

    def post(path: str, handler: Handler) -> Route:
        return Route(path, _answered(handler), methods=["POST"])

    routes = [
        get("/", _page),
        get("/health", _health),
        get("/metrics", _metrics),
        get("/openapi.json", _openapi),
        get("/v1/models", _models),
        get("/v1/models/{model:path}", _model),
        post("/v1/chat/completions", completions.chat_completions),
        post("/v1/completions", completions.completions),
        post("/v1/responses", responses.responses),
        post("/v1/messages", anthropic.messages),
        post("/v1/messages/count_tokens", anthropic.count_tokens),
    ]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _no_route})
    app.state.engine, app.state.settings, app.state.started = engine, settings, int(time.time())
    app.add_middleware(_Gate, settings=settings, metrics=metrics)
    return app


class _Gate:
    """Who may ask: checked before anything of a request is read. Counts what was answered."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        path, status, headers = scope["path"], 500, Headers(scope=scope)
        unread = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"

        async def noted() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and message.get("more_body", False)
            return message

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if unread:  # uvicorn would go on reading a body that may never end
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        try:
            self._check(headers, path)
        except ApiError as error:
            await error_response(error, _error_body(path))(scope, noted, counted)
        else:
            await self.app(scope, noted, counted)
        finally:
            label = path if path in _KNOWN_PATHS else "other"
            self.metrics.count("mlx_gemma4_requests_total", labels=f'path="{label}",status="{status}"')

    def _check(self, headers: Headers, path: str) -> None:
        """Raises ApiError for whom this server is not.

        A page of another site may make a browser send requests here: those carry its Origin, or, where the site's
        name was made to point to this machine (DNS rebinding), its name as Host.
        """
        host = headers.get("host", "")
        if is_loopback(self.settings.host) and not is_loopback(_host_name(host)):
            raise ApiError(403, f"this server is for this machine alone; {host!r:.80} isn't a name of it")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise ApiError(403, f"pages of {origin!r:.80} may not use this server")
        key = self.settings.api_key
        if key is not None and path not in _OPEN and not any(_same(key, given) for given in _keys(headers)):
            raise ApiError(401, "this server wants its API key, as 'Authorization: Bearer KEY'", code="invalid_api_key")


def _host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _keys(headers: Headers) -> list[str]:
    """The keys that a request gives, as OpenAI's clients and as Anthropic's do."""
    kind, _, bearer = headers.get("authorization", "").partition(" ")
    return ([bearer.strip()] if kind.lower() == "bearer" else []) + [headers.get("x-api-key", "")]


def _same(key: str, given: str) -> bool:
    # A header's bytes come as Latin-1; clients send UTF-8.
    return hmac.compare_digest(key.encode("utf-8", "surrogateescape"), given.encode("latin-1"))


def _error_body(path: str) -> Callable[[ApiError], Any]:
    """How errors of a path are written."""
    return anthropic.error_body if path.startswith("/v1/messages") else openai_error


def _answered(handler: Handler) -> Handler:
    """The handler, every exception of its an answer: uvicorn would close the connection of one that it sees."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except Exception as error:
            return error_response(as_api_error(error), _error_body(request.url.path))

    return handle


async def _no_route(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such path or method."""
    assert isinstance(error, HTTPException)
    found = ApiError(error.status_code, f"{request.method} {request.url.path:.200}: {error.detail}")
    response = error_response(found, _error_body(request.url.path))
    response.headers.update(error.headers or {})  # 405 says which methods there are
    return response


async def _page(request: Request) -> Response:
    body, headers = page()
    return Response(body, headers=headers)


async def _health(request: Request) -> Response:
    engine: Engine = request.app.state.engine
    running, waiting = engine.load
    status = "draining" if engine.draining else "ok"
    return json_response({"status": status, "running": running, "waiting": waiting}, 503 if engine.draining else 200)


async def _metrics(request: Request) -> Response:
    engine: Engine = request.app.state.engine
    running, waiting = engine.load
    gauges = {
        "mlx_gemma4_running": (running, "Requests being answered."),
        "mlx_gemma4_waiting": (waiting, "Requests in the queue."),
        "mlx_gemma4_kv_bytes": (engine.store.nbytes, "Bytes of KV states, kept and in use."),
    }
    return Response(engine.metrics.text(gauges), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _openapi(request: Request) -> Response:
    state = request.app.state
    return json_response(openapi.document(state.engine.lm.config.vocab, state.settings.api_key is not None))


def _card(request: Request) -> dict[str, Any]:
    engine: Engine = request.app.state.engine
    return {
        "id": request.app.state.settings.model_name,
        "object": "model",
        "created": request.app.state.started,
        "owned_by": "mlx-gemma4",
        "context_length": engine.lm.config.context,
    }


async def _models(request: Request) -> Response:
    return json_response({"object": "list", "data": [_card(request)]})


async def _model(request: Request) -> Response:
    card = _card(request)
    if request.path_params["model"] != card["id"]:
        raise ApiError(404, f"there is one model here: {card['id']}", "model", "model_not_found")
    return json_response(card)
