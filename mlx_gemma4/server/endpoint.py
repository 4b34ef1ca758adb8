"""What every endpoint is, and what those that reply share: what a job has made, usage, log-probabilities.

In: HTTP requests. Out: the response of an `Endpoint`'s function, which gets the body as its model has it.
"""

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..conversation.reply import Reply
from ..generation.sampling import Token
from ..tokens.tokenizer import Tokenizer
from .engine import Engine, Job, Update
from .fields import Body, parse
from .wire import read_json


@dataclass(frozen=True)
class Context:
    """The server, as far as endpoints need it."""

    engine: Engine
    model_name: str
    max_tokens: int | None  # of a reply whose request doesn't say; None: what the context holds
    max_body_bytes: int


@dataclass(frozen=True)
class Endpoint:
    """A path that takes POST requests. From it come the route and the path's part of the OpenAPI document."""

    path: str
    summary: str
    request: type[Body]
    reply: dict[str, Any]  # a sample of it: see `openapi.schema`
    answer: Callable[[Any, Context], Awaitable[Response]]  # gets a `request`, and raises ApiError or InputError
    streams: bool = True

    async def handle(self, request: Request) -> Response:
        """Read a request's body and answer it."""
        context: Context = request.app.state.context
        return await self.answer(parse(self.request, await read_json(request, context.max_body_bytes)), context)


class Collector:
    """What a job has made so far: whole replies, and what usage and log-probabilities are told of."""

    def __init__(self, job: Job, tokenizer: Tokenizer | None = None) -> None:
        """tokenizer: to tell log-probabilities, or None."""
        self.job, self.tokenizer = job, tokenizer
        self.replies: list[Reply] = []
        self.answers: dict[int, list[Token]] = {}  # the tokens of each choice's answer
        self._thought = 0  # tokens of thinking

    async def updates(self) -> AsyncIterator[Update]:
        """Pass on the job's updates, collected."""
        async for update in self.job.updates():
            if update.token and update.channel == "answer":
                self.answers.setdefault(update.choice, []).append(update.token)
            self._thought += update.channel == "thinking"
            self.replies += [update.reply] if update.reply else []
            yield update

    def usage(self, choices: int) -> dict[str, Any]:
        """Tokens, as OpenAI's completions count them. Each prompt counts once, as its first choice found it."""
        prompts = [reply.statistics for reply in self.replies[::choices]]
        reused = sum(statistics.reused_tokens for statistics in prompts)
        prompt = reused + sum(statistics.prompt_tokens for statistics in prompts)
        replied = sum(reply.statistics.reply_tokens for reply in self.replies)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": replied,
            "total_tokens": prompt + replied,
            "prompt_tokens_details": {"cached_tokens": reused},
            "completion_tokens_details": {"reasoning_tokens": self._thought},
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
