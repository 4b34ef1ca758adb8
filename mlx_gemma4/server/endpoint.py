"""What every endpoint is, and what those that reply share: sending what a job makes, usage, log-probabilities.

In: HTTP requests. Out: the response of an `Endpoint`'s function, which gets the body as its model has it.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ..generation.sampling import Token
from ..tokens.tokenizer import Tokenizer
from .engine import Job
from .fields import Body, parse
from .models import Models
from .wire import ApiError, error_response, for_clients, json_response, read_json, sse

QUIET = 1.0  # seconds without a byte after which a stream says that it goes on
SLOW = 4.0  # seconds beside them in which a reply that is being made may still fail with its own status
LONG = 50_000  # bytes of a body that is checked in a thread, for others are served meanwhile
Sent = dict[str, Any] | bytes  # of an event stream: an event's data, or bytes as they are
Form = tuple[str, Callable[[Sent], bytes]]  # of a stream: its media type, and an event's bytes
EVENTS: Form = ("text/event-stream", sse)


@dataclass(frozen=True)
class Endpoint:
    """A path that takes POST requests. From it come the route and the path's part of the OpenAPI document."""

    path: str
    summary: str
    request: type[Body]
    reply: dict[str, Any]  # a sample of it: see `openapi.schema`
    answer: Callable[[Any, Any], Awaitable[ASGIApp]]  # gets a `request` and what it needs; raises ApiError, InputError
    streams: str = "text/event-stream"  # "": never
    of_models: bool = False  # `answer` gets all Models, and none is loaded; else the Engine of the body's `model`
    method: str = "POST"

    async def handle(self, request: Request) -> ASGIApp:
        """Read a request's body and answer it. Its model stays loaded until the end."""
        models: Models = request.app.state.models
        with ExitStack() as held:
            return await self._handle(request, models, held)

    async def _handle(self, request: Request, models: Models, stack: ExitStack) -> ASGIApp:
        """`stack`: what is held while the request is answered."""
        values = await read_json(request, models.max_body_bytes, lambda: stack.enter_context(models.large_body()))
        long = int(request.headers.get("content-length", LONG)) >= LONG
        body = await asyncio.to_thread(parse, self.request, values) if long else parse(self.request, values)
        if self.of_models:
            return await self.answer(body, models)
        keep = getattr(body, "keep_alive", None)  # seconds where the body's model knows it
        held = await models.hold(getattr(body, "model", None))

        async def respond(scope: Scope, receive: Receive, send: Send) -> None:
            with large:
                try:
                    await app(scope, receive, send)
                finally:
                    models.release(held, keep if isinstance(keep, float) else None)

        try:
            app = await self.answer(body, held.engine)
        except BaseException:
            models.release(held)
            raise
        large = stack.pop_all()
        return respond


def answer(
    job: Job,
    stream: bool | None,
    events: AsyncIterator[Sent],
    whole: Callable[[], dict[str, Any]],
    failed: Callable[[ApiError], dict[str, Any]] | None = None,
    ping: Sent = b": still here\n\n",
    form: Form = EVENTS,
) -> ASGIApp:
    """Return the response that sends what a job makes, and cancels the job when its client goes away.

    Args:
        stream: send `events` as they are made; else `whole()`, once they are through.
        failed: the event of a later error; None: it is as an error's body.
        ping: what tells a stream's client, once it has had an event, that more will come: clients give up on silence.
        form: of a stream: its media type, and an event's bytes.

    Nothing is sent before the first event exists, so that an earlier error has its own status. A later one is sent as
    an event. Where the job waits for others, or takes long to begin, a comment is sent first.
    """

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            job.cancel()

        async def begun() -> Response:
            try:
                if stream:
                    first = asyncio.ensure_future(anext(events))
                    await asyncio.wait({first}, timeout=QUIET / 4)
                    if not first.done() and not job.waiting:
                        await asyncio.wait({first}, timeout=SLOW)
                    if first.done():
                        first.result()
                    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
                    return StreamingResponse(lines(first), headers=headers, media_type=form[0])
                async for _ in events:
                    pass
                return json_response(whole())
            except Exception as error:
                return error_response(error, scope["path"])

        async def lines(coming: asyncio.Future[Sent]) -> AsyncIterator[bytes]:
            silence: Sent = b": waiting\n\n" if form is EVENTS else ping
            try:
                while True:
                    if not (await asyncio.wait({coming}, timeout=QUIET))[0]:
                        yield form[1](silence)
                        continue
                    yield form[1](coming.result())
                    silence, coming = ping, asyncio.ensure_future(anext(events))
            except StopAsyncIteration:
                return
            except Exception as error:
                found, body = for_clients(error, scope["path"])
                yield form[1](failed(found) if failed else body)
            finally:
                coming.cancel()

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
