"""HTTP in and out: bodies that are read with bounds, errors as clients expect them, server-sent events.

In: Starlette requests and what a job yields. Out: JSON and event streams. Knows nothing of what the fields mean.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import InputError

log = logging.getLogger(__name__)

MAX_DEPTH = 100  # of a body's objects and lists
_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)  # or a string, which may hold some
BODY_TIMEOUT = 30.0  # seconds that a client may take to send a body
# OpenAI's `type` of an error by its status; every other 4xx is an "invalid_request_error".
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that can't be answered: status and, for its body, what is wrong and which field it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def kind(self) -> str:
        """OpenAI's name for this sort of error."""
        return _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")


def as_api_error(error: BaseException) -> ApiError:
    """Any exception as one that is sent; what nobody foresaw is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):  # of options that can't be together
        return ApiError(400, str(error), "tool_choice" if str(error).startswith("tool_choice") else None)
    log.error("Unexpected %s while answering a request", type(error).__name__, exc_info=error)
    return ApiError(500, f"unexpected {type(error).__name__}; the server's log has the details")


def openai_error(error: ApiError) -> dict[str, Any]:
    """An error's body as OpenAI's clients read it."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}


def error_response(error: ApiError, body: Callable[[ApiError], Any] = openai_error) -> Response:
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    return json_response(body(error), error.status, headers)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(content), status, headers, "application/json")


def to_json(content: Any) -> bytes:
    # Half a surrogate pair, which JSON can spell and UTF-8 can't, goes out as "?".
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The request's JSON object.

    Raises:
        ApiError: 413 over `max_bytes`, 408 where it takes too long to arrive, 400 where it isn't a JSON object.
    """
    try:
        body = await asyncio.wait_for(_read_body(request, max_bytes), BODY_TIMEOUT)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body took over {BODY_TIMEOUT:.0f} s to arrive") from None
    except ClientDisconnect:
        raise ApiError(499, "the client went away") from None
    # A long body takes a while, in which others are served.
    value = await asyncio.to_thread(_parse, body) if len(body) > 50_000 else _parse(body)
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


async def _read_body(request: Request, max_bytes: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise ApiError(413, f"the body is over {max_bytes} bytes, the most that this server takes")
        parts.append(part)
    return b"".join(parts)


def _parse(body: bytes) -> Any:
    try:
        text = body.decode("utf-8")
        depth = 0
        for found in _BRACKET.finditer(text):
            depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(found[0][0], 0)
            if depth > MAX_DEPTH:
                raise ApiError(400, f"the body is nested over {MAX_DEPTH} deep")
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body isn't JSON: {error}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


class Cancellable(Protocol):
    """What is to stop when nobody waits for it any more."""

    def cancel(self) -> None: ...


@asynccontextmanager
async def watched(receive: Receive, job: Cancellable) -> AsyncIterator[None]:
    """While this is open, a client that goes away cancels the job; so does whatever else ends it early."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        job.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        job.cancel()  # does nothing to one that is done


async def answer_whole(request: Request, job: Cancellable, body: Awaitable[Any]) -> Response:
    """A JSON response, made when the job is done."""
    async with watched(request.receive, job):
        return json_response(await body)


def sse(data: Any, event: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if event is None else b"event: " + event.encode() + b"\n"
    return head + b"data: " + (data if isinstance(data, bytes) else to_json(data)) + b"\n\n"


class EventStream(Response):
    """Server-sent events as a job makes them.

    Nothing is sent before the first event is there, so that an error until then has its own status. One that comes
    later is sent as an event.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        job: Cancellable,
        events: AsyncIterator[bytes],
        error_body: Callable[[ApiError], Any] = openai_error,
        error_event: str | None = None,
    ) -> None:
        """
        Args:
            events: `sse` values; they should come soon also while a prompt is read (a line beginning with ":" will do).
            error_body, error_event: how an error is written.
        """
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.job, self.events, self.error_body, self.error_event = job, events, error_body, error_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with watched(receive, self.job):
            try:
                first = await anext(self.events, b"")
            except Exception as error:
                await error_response(as_api_error(error), self.error_body)(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            try:
                async for event in self.events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except Exception as error:
                body = sse(self.error_body(as_api_error(error)), self.error_event)
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
