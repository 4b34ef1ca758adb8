"""What every endpoint is, and what those that reply share: sending what a job makes, usage, log-probabilities.

In: HTTP requests. Out: the response of an `Endpoint`'s function, which gets the body as its model has it.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ..generation.sampling import Token
from ..tokens.tokenizer import Tokenizer
from .engine import Engine, Job
from .fields import Body, parse
from .wire import ApiError, error_response, for_clients, json_response, read_json, sse

Sent = dict[str, Any] | bytes  # of an event stream: an event's data, or bytes as they are


@dataclass(frozen=True)
class Endpoint:
    """A path that takes POST requests. From it come the route and the path's part of the OpenAPI document."""

    path: str
    summary: str
    request: type[Body]
    reply: dict[str, Any]  # a sample of it: see `openapi.schema`
    answer: Callable[[Any, Engine], Awaitable[ASGIApp]]  # gets a `request`, and raises ApiError or InputError
    streams: bool = True

    async def handle(self, request: Request) -> ASGIApp:
        """Read a request's body and answer it."""
        engine: Engine = request.app.state.engine
        return await self.answer(parse(self.request, await read_json(request, engine.settings.max_body_bytes)), engine)


def answer(
    job: Job,
    stream: bool | None,
    events: AsyncIterator[Sent],
    whole: Callable[[], dict[str, Any]],
    failed: Callable[[ApiError], dict[str, Any]] | None = None,
) -> ASGIApp:
    """Return the response that sends what a job makes, and cancels the job when its client goes away.

    Args:
        stream: send `events` as they are made; else `whole()`, once they are through.
        failed: the event of a later error; None: it is as an error's body.

    Nothing is sent before the first event exists, so that an earlier error has its own status. A later one is sent as
    an event.
    """

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            job.cancel()

        async def begun() -> Response:
            try:
                if stream:
                    body, headers = lines(await anext(events)), {"cache-control": "no-store", "x-accel-buffering": "no"}
                    return StreamingResponse(body, headers=headers, media_type="text/event-stream")
                async for _ in events:
                    pass
                return json_response(whole())
            except Exception as error:
                return error_response(error, scope["path"])

        async def lines(first: Sent) -> AsyncIterator[bytes]:
            try:
                yield sse(first)
                async for event in events:
                    yield sse(event)
            except Exception as error:
                found, body = for_clients(error, scope["path"])
                yield sse(failed(found) if failed else body)

        watching = asyncio.create_task(watch())
        try:
            response = await begun()
            if isinstance(response, StreamingResponse):
                await response.stream_response(send)  # without its own listening to `receive`
            else:
                await response(scope, receive, send)
        finally:
            watching.cancel()
            job.cancel()  # does nothing to one that is done

    return respond


def usage(job: Job, choices: int) -> dict[str, Any]:
    """Tokens, as OpenAI's completions count them. Each prompt counts once, as its first choice found it."""
    prompts = [reply.statistics for reply in job.replies[::choices]]
    reused = sum(statistics.reused_tokens for statistics in prompts)
    prompt = reused + sum(statistics.prompt_tokens for statistics in prompts)
    replied = sum(reply.statistics.reply_tokens for reply in job.replies)
    drafted = sum(reply.statistics.drafted_tokens for reply in job.replies)
    accepted = sum(reply.statistics.accepted_tokens for reply in job.replies)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": replied,
        "total_tokens": prompt + replied,
        "prompt_tokens_details": {"cached_tokens": reused},
        "completion_tokens_details": {
            "reasoning_tokens": job.thought,
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
    }


def reading(progress: tuple[int, int]) -> bytes:
    """A comment of the event stream: keeps the connection alive while a long prompt is read."""
    return b": read %d of %d tokens\n\n" % progress


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """Log-probabilities of tokens, as OpenAI's chat completions and responses have them; -9999: it was impossible."""

    def entry(id: int, value: float | None) -> dict[str, Any]:
        piece = tokenizer.piece(id, skip_special=False)
        logprob = -9999.0 if value is None or not math.isfinite(value) else value
        return {"token": piece.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(piece)}

    content = [
        {**entry(token.id, token.logprob), "top_logprobs": [entry(*likely) for likely in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}
