"""The server's routes, and what every request passes before and after them.

In: a loaded model and `Settings`. Out: a Starlette application, with the engine as `app.state.engine`.
"""

import hmac
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..conversation.language_model import LanguageModel
from . import anthropic, completions, openapi, responses
from .endpoint import Endpoint
from .engine import Engine
from .page import page
from .settings import Settings, is_loopback
from .wire import ApiError, error_response, json_response

# An endpoint that takes POST requests is a module, a line here, and its tests.
ENDPOINTS: tuple[Endpoint, ...] = (
    completions.CHAT,
    completions.TEXT,
    responses.RESPONSES,
    anthropic.MESSAGES,
    anthropic.COUNT,
)
_OPEN = ("/", "/health")  # paths that need no key: they tell nothing about the model or about requests


def create_app(lm: LanguageModel, settings: Settings | None = None) -> Starlette:
    """Return the application for a model. The engine's threads end with its lifespan, or by `engine.close`."""
    engine = Engine(lm, settings or Settings())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        engine.close()

    routes = [
        Route("/", _page),
        Route("/health", _health),
        Route("/metrics", _metrics),
        Route("/openapi.json", _openapi),
        Route("/v1/models", _models),
        Route("/v1/models/{model:path}", _model),
        *(Route(endpoint.path, endpoint.handle, methods=["POST"]) for endpoint in ENDPOINTS),
    ]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _no_route})
    app.state.engine = engine
    app.state.card = {
        "id": engine.settings.model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "mlx-gemma4",
        "context_length": lm.config.context,
    }
    app.add_middleware(_Gate, engine=engine, known={route.path for route in routes})
    return app


class _Gate:
    """Checks who asks before anything of a request is read, turns exceptions into error responses, counts requests."""

    def __init__(self, app: ASGIApp, engine: Engine, known: set[str]) -> None:
        self.app, self.settings, self.metrics, self.known = app, engine.settings, engine.metrics, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # there are no websockets here
            return await self.app(scope, receive, send)
        path, status, headers = scope["path"], 0, Headers(scope=scope)
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
            await self.app(scope, noted, counted)
        except Exception as error:  # uvicorn closes the connection on those it sees
            if status:
                raise
            await error_response(error, path)(scope, noted, counted)
        finally:
            self.metrics.requests.labels(path if path in self.known else "other", status or 500).inc()

    def _check(self, headers: Headers, path: str) -> None:
        """Raise ApiError for clients that may not use this server.

        A page of another site may make a browser send requests here: those carry its Origin, or, where the site's
        name was made to point to this machine (DNS rebinding), its name as Host.
        """
        host = headers.get("host", "")
        if is_loopback(self.settings.host) and not is_loopback(re.sub(r":\d*$", "", host)):
            raise ApiError(403, f"this server is for this machine alone; {host!r:.80} isn't a name of it")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise ApiError(403, f"pages of {origin!r:.80} may not use this server")
        key = self.settings.api_key
        if key is not None and path not in _OPEN and not _has_key(headers, key):
            raise ApiError(401, "this server wants its API key, as 'Authorization: Bearer KEY'", code="invalid_api_key")


def _has_key(headers: Headers, key: str) -> bool:
    """Returns True if a request's headers hold the key, as OpenAI's or as Anthropic's clients send it."""
    kind, _, bearer = headers.get("authorization", "").partition(" ")
    given = (bearer.strip() if kind.lower() == "bearer" else "", headers.get("x-api-key", ""))
    # A header's bytes come as Latin-1; clients send UTF-8.
    return any(hmac.compare_digest(key.encode("utf-8", "surrogateescape"), each.encode("latin-1")) for each in given)


async def _no_route(request: Request, error: Exception) -> Response:
    """Starlette's own errors: no such path or method."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    response = error_response(ApiError(error.status_code, f"{request.method} {path:.200}: {error.detail}"), path)
    response.headers.update(error.headers or {})  # 405 names the methods
    return response


async def _page(request: Request) -> Response:
    status, body, headers = page(request.headers)
    return Response(body, status, headers)


async def _health(request: Request) -> Response:
    engine: Engine = request.app.state.engine
    running, waiting = engine.load
    status = "draining" if engine.draining else "ok"
    return json_response({"status": status, "running": running, "waiting": waiting}, 503 if engine.draining else 200)


async def _metrics(request: Request) -> Response:
    return Response(request.app.state.engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _openapi(request: Request) -> Response:
    engine: Engine = request.app.state.engine
    return json_response(openapi.document(ENDPOINTS, engine.lm.config.vocab, engine.settings.api_key is not None))


async def _models(request: Request) -> Response:
    return json_response({"object": "list", "data": [request.app.state.card]})


async def _model(request: Request) -> Response:
    card = request.app.state.card
    if request.path_params["model"] != card["id"]:
        raise ApiError(404, f"there is one model here: {card['id']}", "model", "model_not_found")
    return json_response(card)
