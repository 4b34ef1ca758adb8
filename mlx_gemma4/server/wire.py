"""HTTP in and out: bodies that are read with bounds, errors as clients expect them, server-sent events.

In: Starlette requests, and values for JSON. Out: what to send. Does not know what the fields mean.
"""

import asyncio
import json
import logging
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive

from ..errors import InputError

log = logging.getLogger(__name__)
request_id: ContextVar[str] = ContextVar("request_id", default="-")  # of the request that is being answered

MAX_DEPTH = 100  # of a body's objects and lists
_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)  # or a string, which may hold some
LARGE = 8_000_000  # bytes of a body beyond which few are held at a time
BODY_TIMEOUT = 30.0  # seconds that a client may take to send a body
_LINGER = 1.0, 1 << 26  # seconds and bytes for the rest of a body that nobody reads
# `type` of an error by its status; `for_clients` has the types of all other statuses.
_OPENAI_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_KINDS = _OPENAI_KINDS | {404: "not_found_error", 413: "request_too_large", 529: "overloaded_error"}


class ApiError(Exception):
    """A request that can't be answered: its status, and for its body the message, the field (`param`) and a code.

    `wait`: seconds after which to try again, for the header Retry-After.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, wait: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.wait = status, message, param, code, wait


def as_api_error(error: BaseException) -> ApiError:
    """Return any exception as one that can be sent; an unexpected one is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return ApiError(400, str(error), error.field)
    log.error("%s: unexpected %s while answering", request_id.get(), type(error).__name__, exc_info=error)
    return ApiError(500, f"unexpected {type(error).__name__}; the server's log has the details")


def for_clients(error: BaseException, path: str) -> tuple[ApiError, dict[str, Any]]:
    """Return an error and its body as the clients of a path know them: Ollama's, Anthropic's, else OpenAI's."""
    found = as_api_error(error)
    if path.startswith("/api/") and not path.startswith("/api/v0/"):
        return found, {"error": found.message}
    other = "invalid_request_error" if found.status < 500 else None
    if path.startswith("/v1/messages"):
        if found.status == 503:  # shutting down: 529 is what these clients know
            found = ApiError(529, found.message, wait=found.wait)
        kind = _ANTHROPIC_KINDS.get(found.status, other or "api_error")
        told: dict[str, Any] = {"type": kind, "message": found.message}
        if found.param == "thread":  # their tool runners then send the whole conversation each time
            told["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        return found, {"type": "error", "error": told, "request_id": request_id.get()}
    kind = _OPENAI_KINDS.get(found.status, other or "server_error")
    body = {"message": found.message, "type": kind, "param": found.param, "code": found.code}
    return found, {"error": body}


def error_response(error: BaseException, path: str) -> Response:
    """The response to a request for `path` that failed."""
    found, body = for_clients(error, path)
    headers = {} if found.wait is None else {"retry-after": str(found.wait)}
    return json_response(body, found.status, headers)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(content), status, headers, "application/json")


def to_json(content: Any) -> bytes:
    # Half a surrogate pair, which JSON can spell and UTF-8 can't, goes out as "?".
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


async def read_json(request: Request, max_bytes: int, large: Callable[[], object]) -> dict[str, Any]:
    """Return the request's JSON object. `large` is called once it is over LARGE bytes; what that raises ends it.

    Raises:
        ApiError: 413 over `max_bytes`, 408 where it takes too long to arrive, 400 where it isn't a JSON object.
    """
    try:
        body = await asyncio.wait_for(_read_body(request, max_bytes, large), BODY_TIMEOUT)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body took over {BODY_TIMEOUT:.0f} s to arrive") from None
    except ClientDisconnect:
        raise ApiError(499, "the client went away") from None
    # Parsing a long body takes a while: the event loop serves others meanwhile.
    value = await asyncio.to_thread(_parse, body) if len(body) > 50_000 else _parse(body)
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


async def _read_body(request: Request, max_bytes: int, large: Callable[[], object]) -> bytearray:
    body = bytearray()
    async for part in request.stream():
        if len(body) <= LARGE < len(body) + len(part):
            large()
        body += part
        if len(body) > max_bytes:
            raise ApiError(413, f"the body is over {max_bytes} bytes, the most that this server takes")
    return body


async def discard(receive: Receive) -> None:
    """Read the rest of a body, for a while, so that its sender comes to read the response."""

    async def rest() -> None:
        size = 0
        while size < _LINGER[1]:
            message = await receive()
            size += len(message.get("body", b""))
            if not message.get("more_body"):
                return

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(rest(), _LINGER[0])


def _parse(body: bytearray) -> Any:
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


def sse(data: dict[str, Any] | bytes) -> bytes:
    """One server-sent event, which has the name of the data's `type`, if they have one. Bytes are sent as they are."""
    if isinstance(data, bytes):
        return data
    head = f"event: {data['type']}\n" if "type" in data else ""
    return head.encode() + b"data: " + to_json(data) + b"\n\n"


def ndjson(data: dict[str, Any] | bytes) -> bytes:
    """One line of JSON, as Ollama streams. Bytes, which would be a comment, have no place there."""
    return b"" if isinstance(data, bytes) else to_json(data) + b"\n"
