"""The server's routes, and what every request passes before and after them.

In: a loaded model and `Settings`, or `Models`. Out: a Starlette application, with these as `app.state.models`.
"""

import hmac
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..conversation.language_model import LanguageModel
from . import anthropic, completions, embeddings, lists, llama_cpp, ollama, ollama_models, openapi, responses
from .endpoint import Endpoint
from .models import Models
from .page import page
from .settings import Settings, host_name, is_loopback
from .wire import ApiError, discard, error_response, json_response, request_id

log = logging.getLogger(__name__)

# An endpoint that takes POST requests is a module, a line here, and its tests.
ENDPOINTS: tuple[Endpoint, ...] = (
    completions.CHAT,
    completions.TEXT,
    responses.RESPONSES,
    anthropic.MESSAGES,
    anthropic.COUNT,
    embeddings.EMBEDDINGS,
    *llama_cpp.ENDPOINTS,
    *ollama.ENDPOINTS,
    *ollama_models.ENDPOINTS,
)
_OPENAI = {"chat", "completions", "responses", "messages", "models", "embeddings"}  # after /v1, which may be left out
_OPEN = ("/", "/health")  # paths that need no key: they tell nothing about the model or about requests


def create_app(lm: LanguageModel | Models, settings: Settings | None = None) -> Starlette:
    """Return the application for a model, or several. Engines' threads end with its lifespan, or by `models.close`."""
    models = lm if isinstance(lm, Models) else Models(settings or Settings())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        models.close()

    routes = [
        Route("/", _page),
        Route("/health", _health),
        Route("/metrics", _metrics),
        Route("/openapi.json", _openapi),
        *lists.ROUTES,
        *llama_cpp.ROUTES,
        responses.STORED,
        *(Route(endpoint.path, endpoint.handle, methods=[endpoint.method]) for endpoint in ENDPOINTS),
    ]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _no_route})
    app.state.models = models
    if not isinstance(lm, Models):
        app.state.engine = models.stay(lm)
    app.add_middleware(_Gate, models=models, known={route.path for route in routes})
    return app


class _Gate:
    """Checks who asks before anything of a request is read, turns exceptions into error responses, counts requests.

    Each response has its request's id, the client's own or a new one, which the log names too.
    """

    def __init__(self, app: ASGIApp, models: Models, known: set[str]) -> None:
        self.app, self.settings, self.metrics, self.known = app, models.settings, models.metrics, known
        self.hosts = {name.lower() for name in self.settings.allow_host}
        self.open = 0  # requests that are being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # there are no websockets here
            return await self.app(scope, receive, send)
        path, status, headers, start = _full_path(scope["path"]), 0, Headers(scope=scope), time.monotonic()
        scope = {**scope, "path": path}
        unread = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
        id = headers.get("x-request-id", "")
        id = id if re.fullmatch(r"[\w.:-]{1,100}", id, re.ASCII) else f"req_{uuid.uuid4().hex}"
        request_id.set(id)
        added = [(b"x-request-id", id.encode()), (b"request-id", id.encode())]

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
                    await discard(noted)  # closing with unread data would take the response from the client
                    added.append((b"connection", b"close"))
                message["headers"] = [*message["headers"], *added]
            await send(message)

        self.open += 1
        try:
            cors = self._check(headers, path)
            added += cors
            preflight = cors and scope["method"] == "OPTIONS" and "access-control-request-method" in headers
            if not preflight:
                self._check_key(headers, path)
            answer = Response(status_code=204, headers=_preflight(headers)) if preflight else self.app
            await answer(scope, noted, counted)
        except Exception as error:  # uvicorn closes the connection on those it sees
            if status:
                raise
            await error_response(error, path)(scope, noted, counted)
        finally:
            self.open -= 1
            log.info("%s: %s %.200r: %d, %.3f s", id, scope["method"], path, status, time.monotonic() - start)
            self.metrics.requests.labels(path if path in self.known else "other", status or 500).inc()

    def _check(self, headers: Headers, path: str) -> list[tuple[bytes, bytes]]:
        """Return the headers for pages of other origins that may ask; raise ApiError for clients that may not.

        A page of another site may make a browser send requests here: those carry its Origin, or, where the site's
        name was made to point to this machine (DNS rebinding), its name as Host.
        """
        if self.open > self.settings.connections and path != "/health":
            raise ApiError(503, "too many requests at a time", code="overloaded", wait=1)
        host, origin = headers.get("host", ""), headers.get("origin")
        name = host_name(host)
        if name is None or (is_loopback(self.settings.host) and not is_loopback(name) and name not in self.hosts):
            raise ApiError(
                403, f"this server is for this machine alone; {host!r:.80} isn't a name of it (--allow-host)"
            )
        if origin is None or origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower()):
            return []
        if not {origin.lower(), "*"} & set(self.settings.allow_origin):
            raise ApiError(403, f"pages of {origin!r:.80} may not use this server (--allow-origin)")
        shown = (b"access-control-expose-headers", b"x-request-id, request-id, retry-after")
        return [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin"), shown]

    def _check_key(self, headers: Headers, path: str) -> None:
        key = self.settings.api_key
        if key is not None and path not in _OPEN and not _has_key(headers, key):
            raise ApiError(401, "this server wants its API key, as 'Authorization: Bearer KEY'", code="invalid_api_key")


def _preflight(headers: Headers) -> dict[str, str]:
    """What a browser asks before it sends a page's request to another origin."""
    wanted = headers.get("access-control-request-headers", "")
    allowed = {"access-control-allow-methods": "GET, POST, DELETE", "access-control-max-age": "600"}
    return allowed | {"access-control-allow-headers": wanted, "access-control-allow-private-network": "true"}


def _has_key(headers: Headers, key: str) -> bool:
    """Returns True if a request's headers hold the key, as OpenAI's or as Anthropic's clients send it."""
    kind, _, bearer = headers.get("authorization", "").partition(" ")
    given = (bearer.strip() if kind.lower() == "bearer" else "", headers.get("x-api-key", ""))
    # A header's bytes come as Latin-1; clients send UTF-8.
    return any(hmac.compare_digest(key.encode("utf-8", "surrogateescape"), each.encode("latin-1")) for each in given)


def _full_path(path: str) -> str:
    """A path without /v1, and LM Studio's for what are OpenAI's endpoints, as the path that it stands for."""
    studio, rest = path.startswith("/api/v0/"), path.removeprefix("/api/v0").removeprefix("/")
    return f"/v1/{rest}" if rest.split("/")[0] in _OPENAI - ({"models"} if studio else set()) else path


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
    models: Models = request.app.state.models
    running, waiting = models.load
    status = "draining" if models.draining else "ok"
    return json_response({"status": status, "running": running, "waiting": waiting}, 503 if models.draining else 200)


async def _metrics(request: Request) -> Response:
    return Response(request.app.state.models.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _openapi(request: Request) -> Response:
    models: Models = request.app.state.models
    vocab = max((engine.lm.config.vocab for engine in models.engines), default=openapi.VOCAB)
    return json_response(openapi.document(ENDPOINTS, vocab, models.settings.api_key is not None))
