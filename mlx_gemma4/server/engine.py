"""A bounded number of threads makes replies, over one cache of prefixes; more requests wait in a queue.

In: prompts with options. Out: a `Job`, whose updates an event loop awaits. The threads take turns at the model token by
token and chunk by chunk (`execution()` serves them in order of arrival), so a short reply is not stuck behind a long
one. A cancelled job leaves its thread within one token, or one chunk of a prompt.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ..chat_format.replies import Event
from ..conversation.language_model import LanguageModel
from ..conversation.reply import Chunk, Reply, ReplyOptions, stream
from ..errors import InputError, NoRoom, TooLong
from ..generation.prefix import PrefixCache
from ..generation.sampling import Token
from ..tokens.tokenizer import Tokenizer
from .metrics import Metrics
from .wire import ApiError

Prompt = Sequence[Mapping[str, Any]] | list[int] | str  # messages; ids or text to go on with as they are
Channel = Literal["answer", "thinking", "call", "control"]


class Update(NamedTuple):
    """News of a job: a token with the events it brings, or progress in reading the prompt."""

    choice: int  # index of the reply, of those that the job makes
    events: Sequence[Event] = ()
    token: Token | None = None
    channel: Channel = "control"  # what the token is part of
    reply: Reply | None = None  # the whole reply, with its last update
    reading: tuple[int, int] | None = None  # prompt tokens read, and in all


@dataclass(frozen=True)
class GenerationRequest:
    """One reply that a job has to make."""

    prompt: Prompt
    options: ReplyOptions
    one_call: bool = False  # end after the first tool call


class _Cancelled(Exception):
    """The job's client no longer waits."""


class Job:
    """One HTTP request: replies made one after the other. Its updates are for the event loop that submitted it."""

    def __init__(self, engine: "Engine", requests: Sequence[GenerationRequest], field: str, format_field: str) -> None:
        self.engine, self.requests, self.field = engine, requests, field
        self.cancelled = False
        self.submitted = time.monotonic()
        # Options of ReplyOptions by the names that the HTTP request has for them.
        self._fields = {"tools": "tools", **dict.fromkeys(("schema", "regex", "grammar"), format_field)}
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Update | Exception | None] = asyncio.Queue()

    async def updates(self) -> AsyncIterator[Update]:
        """Yield updates as they are made.

        Raises:
            ApiError: the request can't be answered, or was cancelled.
        """
        while (item := await self._items.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def cancel(self) -> None:
        """Stop as soon as possible. Does nothing to a job that is done."""
        self.cancelled = True
        self.engine.forget(self)

    def cancelled_error(self) -> ApiError:
        """The error of a cancelled job, for a client that may still listen."""
        return ApiError(503, "the server is shutting down" if self.engine.draining else "the client went away")

    def error(self, error: InputError) -> ApiError:
        """Return an error as the HTTP request's; one that is about no option is about the prompt."""
        if isinstance(error, TooLong | NoRoom):
            return ApiError(400, str(error), self.field, "context_length_exceeded")
        return ApiError(400, str(error), self._fields.get(error.field, error.field) if error.field else self.field)

    def post(self, item: Update | Exception | None) -> None:
        """Hand out an update or error, from any thread; None is the end."""
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:  # the event loop is closed
            self.cancelled = True


class Engine:
    """Threads that make replies, and the queue before them."""

    def __init__(
        self, lm: LanguageModel, metrics: Metrics, parallel: int, queue: int, max_kv_bytes: int | None, kv: str
    ) -> None:
        """
        Args:
            parallel: replies made at a time.
            queue: requests that may wait beside them.
            max_kv_bytes, kv: see PrefixCache.
        """
        self.lm, self.metrics, self.parallel, self.queue = lm, metrics, parallel, queue
        self.store = PrefixCache(lm.model, max_kv_bytes, kv)
        self.draining = False
        self._waiting: deque[Job] = deque()
        self._running: set[Job] = set()
        self._holding: set[Job] = set()  # running jobs that have a KV state, or try to get one
        self._releases = 0  # how often a job left that set
        self._seconds = 1.0  # moving average of a job's duration
        self._closed = False
        self._changed = threading.Condition()  # guards all of the above
        self._threads = [threading.Thread(target=self._serve, name=f"reply-{i}", daemon=True) for i in range(parallel)]
        for thread in self._threads:
            thread.start()

    @property
    def load(self) -> tuple[int, int]:
        """Jobs running and waiting."""
        with self._changed:
            return len(self._running), len(self._waiting)

    def submit(
        self, requests: Sequence[GenerationRequest], field: str = "messages", format_field: str = "response_format"
    ) -> Job:
        """Queue a job. Call it from a coroutine.

        Args:
            field, format_field: the HTTP request's fields with the prompt and the reply's form, for errors.

        Raises:
            ApiError: 429 where the queue is full, 503 where the server is shutting down.
        """
        job = Job(self, requests, field, format_field)
        with self._changed:
            if self.draining:
                raise ApiError(503, "the server is shutting down", code="shutting_down", wait=10)
            if len(self._waiting) + len(self._running) >= self.parallel + self.queue:
                self.metrics.refused.inc()
                running, waiting = len(self._running), len(self._waiting)
                message = f"{running} requests are being answered and {waiting} are waiting; try later"
                wait = min(max(round(self._seconds * waiting / self.parallel), 1), 60)
                raise ApiError(429, message, code="rate_limit_exceeded", wait=wait)
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def forget(self, job: Job) -> None:
        """Take a cancelled job out of the queue, if it is still there."""
        with self._changed:
            self._changed.notify_all()
            if job not in self._waiting:
                return
            self._waiting.remove(job)
        job.post(job.cancelled_error())

    def drain(self) -> None:
        """Take no more jobs, and cancel those that have not begun."""
        with self._changed:
            self.draining = True
            waiting = list(self._waiting)
        for job in waiting:
            job.cancel()

    def close(self, timeout: float = 10.0) -> bool:
        """Cancel everything and end the threads. Returns True if they ended within `timeout` seconds."""
        self.drain()
        with self._changed:
            self._closed = True
            for job in self._running:
                job.cancelled = True
            self._changed.notify_all()
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _serve(self) -> None:
        """Run jobs until the engine is closed. Each thread does this."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                job = self._waiting.popleft()
                self._running.add(job)
            end: Exception | None = None
            start = time.monotonic()
            try:
                for choice, request in enumerate(job.requests):
                    self._answer(job, choice, request)
            except _Cancelled:
                self.metrics.cancelled.inc()
                end = job.cancelled_error()
            except InputError as error:
                end = job.error(error)
            except Exception as error:
                end = error
            with self._changed:
                self._running.remove(job)
                self._seconds += 0.2 * (time.monotonic() - start - self._seconds)
                self._changed.notify_all()
            self.metrics.reply.observe(time.monotonic() - job.submitted)
            job.post(end)

    def _answer(self, job: Job, choice: int, request: GenerationRequest) -> None:
        """Make one of a job's replies."""

        def reading(done: int, total: int) -> None:
            if job.cancelled:
                raise _Cancelled
            job.post(Update(choice, reading=(done, total)))

        prompt = request.prompt
        if isinstance(prompt, str):
            prompt = self.lm.encode_prompt(prompt, raw=True)
        channels, reply = _Channels(self.lm.tokenizer), None
        with closing(self._chunks(job, prompt, request.options, reading)) as chunks:
            for chunk in chunks:
                first, reply = reply is None, chunk.reply
                if job.cancelled:
                    raise _Cancelled
                if first and not choice:
                    self.metrics.first_token.observe(time.monotonic() - job.submitted)
                last = chunk.token is None
                channel = channels.of(chunk.token.id) if chunk.token else "control"
                job.post(Update(choice, chunk.events, chunk.token, channel, reply if last else None))
                if request.one_call and reply.tool_calls and not last:
                    reply.finish_reason = "tool_calls"
                    job.post(Update(choice, reply=reply))
                    break
        if reply:
            self.metrics.prompt_tokens.inc(reply.statistics.prompt_tokens)
            self.metrics.reused_tokens.inc(reply.statistics.reused_tokens)
            self.metrics.reply_tokens.inc(reply.statistics.reply_tokens)

    def _chunks(
        self, job: Job, prompt: Any, options: ReplyOptions, reading: Callable[[int, int], None]
    ) -> Generator[Chunk, None, None]:
        """Yield one reply's chunks. While the KV budget has no room for it beside others, wait until one is done."""
        try:
            while True:
                with self._changed:
                    self._holding.add(job)
                made = stream(self.lm, prompt, options, store=self.store, on_prompt=reading)
                with closing(made) as chunks:
                    try:
                        first = next(chunks)
                    except NoRoom as error:
                        self._wait_for_room(job, error)
                        continue
                    yield first
                    yield from chunks
                    return
        finally:
            self._release(job)

    def _wait_for_room(self, job: Job, error: NoRoom) -> None:
        self._release(job)
        with self._changed:
            if not self._holding:
                raise job.error(error)
            before = self._releases
            self._changed.wait_for(lambda: job.cancelled or self._releases > before)
        if job.cancelled:
            raise _Cancelled

    def _release(self, job: Job) -> None:
        with self._changed:
            self._holding.discard(job)
            self._releases += 1
            self._changed.notify_all()


class _Channels:
    """Tells which channel each token of a reply belongs to."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._control = tokenizer.control_ids
        self._opens: dict[int | None, Channel] = {
            tokenizer.token_id("<|channel>"): "thinking",
            tokenizer.token_id("<|tool_call>"): "call",
        }
        self._closes = {tokenizer.token_id("<channel|>"), tokenizer.token_id("<tool_call|>")}
        self._now: Channel = "answer"

    def of(self, token: int) -> Channel:
        if token not in self._control:
            return self._now
        if token in self._opens:
            self._now = self._opens[token]
        elif token in self._closes:
            self._now = "answer"
        return "control"
