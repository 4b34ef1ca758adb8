"""A bounded number of replies is made at a time, over one cache of prefixes; more requests wait in a queue.

In: prompts with options. Out: a `Job`, whose updates an event loop awaits. A `Scheduler` makes the tokens of all, so a
short reply is not stuck behind a long one; a thread for each makes text of them. A cancelled job leaves its thread
within one token, or one chunk of a prompt.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from ..chat_format.replies import Event
from ..conversation.language_model import LanguageModel
from ..conversation.reply import Chunk, Reply, ReplyOptions, stream
from ..errors import InputError, NoRoom, TooLong
from ..execution import leave
from ..generation.prefix import PrefixCache
from ..generation.sampling import Token
from ..generation.scheduler import Scheduler
from ..kv.state import KVState
from ..media.layers import go_on
from .metrics import Metrics
from .settings import Settings
from .stored import Stored
from .wire import ApiError, request_id

log = logging.getLogger(__name__)

T = TypeVar("T")
Reading = Callable[[list[int], KVState, Callable[[], None]], T]
Prompt = Sequence[Mapping[str, Any]] | list[int] | str  # messages; ids or text to go on with as they are
Channel = Literal["answer", "thinking", "call", "control"]
# What the tokens behind each of these are part of.
_CHANNELS: dict[str, Channel] = {"<|channel>": "thinking", "<|tool_call>": "call"}
_CHANNELS |= {"<channel|>": "answer", "<tool_call|>": "answer"}


class Update(NamedTuple):
    """News of a job: a token with the events it brings, or progress in reading the prompt."""

    choice: int  # index of the reply, of those that the job makes
    events: Sequence[Event] = ()
    token: Token | None = None
    channel: Channel = "control"  # what the token is part of
    reply: Reply | None = None  # the whole reply, with its last update
    reading: tuple[int, int] | None = None  # prompt tokens read, and in all

    @property
    def answer(self) -> list[Token]:
        """Its token, if that is part of the answer."""
        return [self.token] if self.token and self.channel == "answer" else []


@dataclass(frozen=True)
class GenerationRequest:
    """One reply that a job has to make."""

    prompt: Prompt
    options: ReplyOptions
    one_call: bool = False  # end after the first tool call


class _Cancelled(Exception):
    """The job's client no longer waits."""


class Job:
    """One HTTP request: replies made one after the other. Its updates are for the event loop that submitted it.

    `replies`, `answers` (the tokens of each reply's answer) and `thought` (how many tokens were thinking) are of the
    updates that were handed out.
    """

    def __init__(self, engine: "Engine", requests: Sequence[GenerationRequest], field: str, format_field: str) -> None:
        self.engine, self.requests = engine, requests
        self.replies: list[Reply] = []
        self.answers: list[list[Token]] = [[] for _ in requests]
        self.thought = 0
        self.waiting = True  # until a thread begins with it
        self.cancelled = False
        self.submitted = time.monotonic()
        # The HTTP request's fields for those of ReplyOptions that have other names there; None: the prompt's.
        self._fields = {None: field, "schema": format_field, "regex": format_field, "grammar": format_field}
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
            self.answers[item.choice] += item.answer
            self.thought += item.channel == "thinking"
            self.replies += [item.reply] if item.reply else []
            yield item

    def cancel(self) -> None:
        """Stop as soon as possible. Does nothing to a job that is done."""
        self.cancelled = True
        self.engine.forget(self)

    def check(self) -> None:
        """Leave its thread if it was cancelled."""
        if self.cancelled:
            raise _Cancelled

    def cancelled_error(self) -> ApiError:
        """The error of a cancelled job, for a client that may still listen."""
        return ApiError(503, "the server is shutting down" if self.engine.draining else "the client went away")

    def error(self, error: InputError) -> ApiError:
        """Return an error as the HTTP request's; one that is about no option is about the prompt."""
        if isinstance(error, TooLong | NoRoom):
            return ApiError(400, str(error), self._fields[None], "context_length_exceeded")
        return ApiError(400, str(error), self._fields.get(error.field, error.field))

    def post(self, item: Update | Exception | None) -> None:
        """Hand out an update or error, from any thread; None is the end."""
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:  # the event loop is closed
            self.cancelled = True


class Engine:
    """Threads that make replies, and the queue before them."""

    def __init__(self, lm: LanguageModel, settings: Settings) -> None:
        self.lm, self.settings, self.metrics = lm, settings, Metrics()
        self.store = PrefixCache(lm.model, settings.max_kv_bytes, settings.kv)
        self.scheduler = Scheduler(lm.model, settings.parallel, settings.exact, lm.drafts)
        self._channels = {lm.tokenizer.token_id(name): channel for name, channel in _CHANNELS.items()}
        self.draining = False
        self.load_seconds = 0.0  # that the model took to load, until a reply tells of it
        self.stored = Stored()
        self._aside = asyncio.Semaphore(1)
        self._waiting: deque[Job] = deque()
        self._running: set[Job] = set()
        self._holding: set[Job] = set()  # running jobs that have a KV state, or try to get one
        self._ended = 0  # replies that no longer have one
        self._seconds = 1.0  # moving average of a job's duration
        self._closed = False
        self._changed = threading.Condition()  # guards all of the above
        self._threads = [
            threading.Thread(target=self._serve, name=f"reply-{i}", daemon=True) for i in range(settings.parallel)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def load(self) -> tuple[int, int]:
        """Jobs running and waiting."""
        with self._changed:
            return len(self._running), len(self._waiting)

    @property
    def promised(self) -> int:
        """Bytes that conversations may still come to take."""
        return max(0, (self.settings.max_kv_bytes or 0) - self.store.nbytes)

    async def read(
        self, prompts: Sequence[str | list[int]], what: Reading[T], truncate: bool = False
    ) -> list[tuple[list[int], T]]:
        """Read texts for something else than a reply, in a thread, one at a time.

        Args:
            what: gets a prompt's ids, an empty state for them, and what to call as it goes on.
            truncate: cut what is longer than the context.

        Returns:
            ids and result of each.

        Raises:
            TooLong, NoRoom: one is too long, or there is no room for it.
        """

        def check() -> None:
            if self.draining:
                raise ApiError(503, "the server is shutting down", code="shutting_down", wait=10)

        def work() -> list[tuple[list[int], T]]:
            made, context = [], self.lm.config.context
            for prompt in prompts:
                check()
                ids = self.lm.encode_prompt(prompt, raw=True) if isinstance(prompt, str) else prompt
                if len(ids) > context and not truncate:
                    raise TooLong(f"a text has {len(ids)} tokens, but the model's context holds {context}; shorten it")
                with self.store.room(len(ids[:context])) as state:
                    made.append((ids[:context], what(ids[:context], state, check)))
            return made

        async with self._aside:
            return await asyncio.to_thread(work)

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
        _log_unused(self.lm, requests[0].options)
        with self._changed:
            if self.draining:
                raise ApiError(503, "the server is shutting down", code="shutting_down", wait=10)
            running, waiting, parallel = len(self._running), len(self._waiting), self.settings.parallel
            if running + waiting >= parallel + self.settings.queue:
                self.metrics.refused.inc()
                message = f"{running} requests are being answered and {waiting} are waiting; try later"
                wait = min(max(round(self._seconds * waiting / parallel), 1), 60)
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
            for job in list(self._waiting):
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
        ended = self.scheduler.close(max(0.0, end - time.monotonic()))
        return ended and not any(thread.is_alive() for thread in self._threads)

    def _serve(self) -> None:
        """Run jobs until the engine is closed. Each thread does this."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return leave()
                job = self._waiting.popleft()
                self._running.add(job)
                job.waiting = False
            go_on.set(job.check)  # while its pictures and sounds are encoded
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
        inside: Channel = "answer"
        reply = None
        with closing(self._chunks(job, choice, request)) as chunks:
            for chunk in chunks:
                first, reply, token = reply is None, chunk.reply, chunk.token
                job.check()
                if first and not choice:
                    self.metrics.first_token.observe(time.monotonic() - job.submitted)
                inside = self._channels.get(token.id, inside) if token else inside
                channel = inside if token and token.id not in self.lm.tokenizer.control_ids else "control"
                job.post(Update(choice, chunk.events, token, channel, None if token else reply))
                if request.one_call and reply.tool_calls and token:
                    reply.finish_reason = "tool_calls"
                    job.post(Update(choice, reply=reply))
                    break
        if reply:
            self.metrics.prompt_tokens.inc(reply.statistics.prompt_tokens)
            self.metrics.reused_tokens.inc(reply.statistics.reused_tokens)
            self.metrics.reply_tokens.inc(reply.statistics.reply_tokens)
            self.metrics.drafted_tokens.inc(reply.statistics.drafted_tokens)
            self.metrics.accepted_tokens.inc(reply.statistics.accepted_tokens)

    def _chunks(self, job: Job, choice: int, request: GenerationRequest) -> Generator[Chunk, None, None]:
        """Yield one reply's chunks. While the KV budget has no room for it beside others, wait until one is done."""

        def reading(done: int, total: int) -> None:
            job.check()
            job.post(Update(choice, reading=(done, total)))

        prompt: Any = request.prompt
        if isinstance(prompt, str):
            prompt = self.lm.encode_prompt(prompt, raw=True)
        try:
            while not job.cancelled:
                with self._changed:
                    self._holding.add(job)
                    ended = self._ended
                made = stream(
                    self.lm,
                    prompt,
                    request.options,
                    store=self.store,
                    on_prompt=reading,
                    scheduler=self.scheduler,
                    call_parts=True,
                )
                with closing(made) as chunks:
                    try:
                        first = next(chunks)
                    except NoRoom:
                        with self._changed:
                            self._holding.remove(job)
                            if not self._holding and self._ended == ended:
                                raise
                            while self._ended == ended and not job.cancelled:
                                self._changed.wait()
                        continue
                    yield first
                    yield from chunks
                    return
            raise _Cancelled
        finally:
            with self._changed:
                self._holding.discard(job)
                self._ended += 1
                self._changed.notify_all()


def _pool_bytes(engine: Engine) -> int:
    batcher = engine.lm.model.batcher
    return batcher.pool.nbytes if batcher else 0


# Numbers of an engine, which `Metrics` shows as sums over all: name, what it is, value.
GAUGES: tuple[tuple[str, str, Callable[[Engine], float]], ...] = (
    ("running", "Requests being answered.", lambda engine: engine.load[0]),
    ("waiting", "Requests in the queue.", lambda engine: engine.load[1]),
    ("batch_size", "Replies in the latest step; 0 when idle.", lambda engine: engine.scheduler.rows),
    ("prompts_waiting", "Replies being made whose prompts are not read yet.", lambda engine: engine.scheduler.waiting),
    ("steps_total", "Steps; reply_tokens_total by it is the mean batch size.", lambda engine: engine.scheduler.steps),
    ("kv_bytes", "Bytes of KV states, kept and in use.", lambda engine: engine.store.nbytes),
    ("kv_pool_bytes", "Bytes of the pool of states that step together.", _pool_bytes),
    ("kv_reserved_bytes", "Bytes that states in use may come to hold.", lambda engine: engine.store.reserved),
)


def _log_unused(lm: LanguageModel, options: ReplyOptions) -> None:
    """Log what a reply is asked for that this model has not, or that can't be together."""
    if options.think and lm.tokenizer.token_id("<|channel>") is None:
        log.warning("%s: ignored that thinking is asked for: this model has none", request_id.get())
    if options.tools and options.tool_choice == "auto" and (options.schema or options.regex or options.grammar):
        log.warning("%s: no tool will be called: the reply has a form", request_id.get())
