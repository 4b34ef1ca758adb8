"""Several replies at once: continuous batching, in one thread that owns the order of things.

In: what `generate_tokens` takes, from any threads. Out: each one's tokens, in its thread. Each round, one chunk of the
prompts that wait is read, in turns, then all replies under way step together; so replies join and leave between two
tokens, and nobody waits for more than a chunk. What several prompts begin with is read once. A reply alone takes the
steps of loop.py. Knows nothing of text.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..execution import execution, leave
from ..kv.state import KVState
from ..memory import SMALLEST_CHUNK
from ..model.batch import MAX_BATCH
from ..model.model import Model
from ..model.step import BatchStep, LazyBatchStep, RowStep
from ..ops.dispatch import REPLAY
from ..ops.sample import LIKELIEST
from .batch_drafts import Asked, BatchDrafts, Started, receive_all
from .decoding import FAILURES, Decoding, Statistics
from .drafting import Drafts
from .loop import begin
from .prefix import common_length
from .prompt import chunk_ahead
from .sampling import Constraint, Sample, Sampling, Token, choose

log = logging.getLogger("mlx_gemma4")

AHEAD = 16  # tokens that a reply may be ahead of who takes them, at most; a state's tail can be taken back
SHARED = 64  # tokens of a prompt that are worth waiting for while another reply reads them
WAIT = 0.1  # seconds that replies under way wait for a chunk of a prompt, about


class _Job:
    """A reply that somebody waits for, in another thread."""

    def __init__(self, reply: Decoding) -> None:
        self.reply = reply
        self.items: SimpleQueue[Token | int | Exception | None] = SimpleQueue()  # int: tokens of the prompt not read
        self.paused = False  # steps no more until some of them are taken
        self.left = False  # by who waited
        self.after: tuple[_Job, int] | None = None  # whose state it takes over, once that holds so many tokens
        self.done = threading.Event()  # the scheduler will not touch it again

    def behind(self) -> bool:
        """True if too many tokens wait to be taken. Then whoever takes the next one tells the scheduler."""
        self.paused = True  # first: they may be taken just now
        self.paused = self.items.qsize() >= AHEAD
        return self.paused


class _Chain(NamedTuple):
    """A step whose own tokens are the next of all its replies: the step after it need not wait for them."""

    step: BatchStep
    jobs: list[_Job]


class Scheduler:
    """Makes replies with one model, `parallel` at a time; further ones wait in order of arrival. Thread-safe.

    To be closed, or used in a `with`: its thread keeps it alive.

    Attributes:
        rows: replies in the latest step; 0 when idle.
        steps: steps so far.
    """

    def __init__(
        self, model: Model, parallel: int = MAX_BATCH, exact: bool = False, drafts: Drafts | None = None
    ) -> None:
        """
        Args:
            parallel: replies at a time, 1 to MAX_BATCH.
            exact: they take turns, each with steps of its own, so that each is to the bit what it is alone. Otherwise
                all step at once, faster by far, and near ties between tokens may be decided otherwise.
            drafts: for replies while they are alone, or take turns, and beside others where checks are replayed.
        """
        if not 1 <= parallel <= MAX_BATCH:
            raise ValueError(f"parallel must be from 1 to {MAX_BATCH}, not {parallel}")
        self.model, self.parallel, self.exact = model, parallel, exact
        self.drafts = None if exact and model.kernels else drafts  # a step that checks some is exact on a CPU alone
        self._drafts = BatchDrafts(model, drafts) if drafts and not exact else None
        self.rows = self.steps = 0
        self._inbox: SimpleQueue[_Job | None] = SimpleQueue()  # None: look again at what has changed
        self._closed, self._lock = False, threading.Lock()
        self._waiting: deque[_Job] = deque()
        self._reading: deque[_Job] = deque()  # their prompts
        self._answering: list[_Job] = []
        self._last: _Chain | None = None  # the latest step, if nobody has joined or left
        self._rate = 5000.0  # tokens of prompts read a second, lately
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Replies that wait for others to end, or whose prompts are not read to the end yet."""
        return len(self._waiting) + len(self._reading)

    def generate_tokens(
        self,
        state: KVState,
        prompt: list[int],
        sampling: Sampling,
        max_tokens: int,
        stop_ids: frozenset[int] = frozenset(),
        statistics: Statistics | None = None,
        on_prompt: Callable[[int, int], None] | None = None,
        turn_ends: frozenset[int] | None = None,
        *,
        constraint: Constraint | None = None,
        logprobs: int | None = None,
    ) -> Generator[Token, None, None]:
        """As `loop.generate_tokens`, beside other replies. Nobody else may use `state` or `constraint` meanwhile."""
        statistics = statistics or Statistics()
        reply = begin(
            self.model,
            state,
            prompt,
            sampling,
            max_tokens,
            stop_ids,
            statistics,
            turn_ends,
            constraint=constraint,
            logprobs=logprobs,
            drafts=self.drafts,
        )
        job, given, held = _Job(reply), 0, len(reply.ids)
        if reply.max_tokens < 1:
            return
        with self._lock:
            if self._closed:
                raise RuntimeError("the scheduler is closed")
            self._inbox.put(job)
        try:
            while (item := job.items.get()) is not None:
                if job.paused:
                    self._inbox.put(None)
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, Token):
                    given, held = given + 1, held + 1
                    yield item
                elif on_prompt:
                    on_prompt(len(prompt) - item, len(prompt))
            given, held = reply.produced, len(reply.ids)
            if reply.stopped:
                statistics.stop_reason = "stop"
        finally:
            job.left = True
            self._inbox.put(None)
            if threading.current_thread() is not self._thread:  # as when it collects garbage
                job.done.wait()
            statistics.reply_tokens = given
            if state.length > held:  # tokens that nobody took
                state.rewind(held)

    def close(self, timeout: float | None = None) -> bool:
        """End all replies, with an error where somebody still waits, and the thread; True if it ends in `timeout` s."""
        with self._lock:
            self._closed = True
        self._inbox.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # All of this runs in the scheduler's thread

    def _run(self) -> None:
        while not self._closed:
            if not self._round():
                self._take(self._inbox.get())
        self._look()
        for job in [*self._waiting, *self._reading, *self._answering]:
            self._end(job, RuntimeError("the scheduler is closed"))
        leave()

    def _round(self) -> bool:
        """Read some of the prompts, then make a token of each reply; return False if there was nothing to do."""
        self._look()
        self._read_prompts()
        jobs, last = [job for job in self._answering if not job.behind()], self._last
        self._last = None
        self.rows, self.steps = len(jobs), self.steps + bool(jobs)
        if self.exact or (len(self._answering) == 1 and not self._reading):
            for job in jobs:
                self._guarded([job], self._turn, job)
        elif jobs:
            self._guarded(jobs, self._together, jobs, last)
        return bool(jobs or self._reading)

    def _take(self, job: _Job | None) -> None:
        if job is not None:
            self._waiting.append(job)

    def _look(self) -> None:
        """See who has come and who has left, and let in as many as may be answered at a time."""
        try:
            while True:
                self._take(self._inbox.get_nowait())
        except Empty:
            pass
        for job in [job for job in (*self._waiting, *self._reading, *self._answering) if job.left]:
            self._end(job)
        while self._waiting and len(self._reading) + len(self._answering) < self.parallel:
            job = self._waiting.popleft()
            if not self.exact:
                self._guarded([job], self._share, job)
            if not job.done.is_set():
                self._reading.append(job)

    def _share(self, job: _Job) -> None:
        """Find who holds, or is about to read, the most of what a reply's prompt begins with."""
        state, wanted = job.reply.state, np.array(job.reply.ids[:-1], np.int32)
        least = state.length + SHARED
        for other in (*self._answering, *self._reading):
            theirs = other.reply.state
            if (theirs.kv, theirs.dtype, theirs.layout) != (state.kv, state.dtype, state.layout):
                continue
            common = common_length(wanted, np.array(other.reply.ids, np.int32))
            common = self.model.config.uncut(job.reply.ids, common)
            if common < least:
                continue
            ahead = common > theirs.length and other in self._reading
            reach = common if ahead else theirs.reach(common)
            if reach >= least:
                job.after, least = (other, reach), reach + 1
        if job.after and job.after[1] > job.after[0].reply.state.length:
            job.after[0].reply.marks.append(job.after[1])
        self._follow(job)

    def _follow(self, job: _Job) -> None:
        """Let a reply go on from the state that it waits for, if that is so far; or by itself, if that has gone."""
        if job.after is None or (job.after[0].reply.state.length < job.after[1] and not job.after[0].done.is_set()):
            return
        (other, position), job.after = job.after, None
        reply, before = job.reply, job.reply.state.length
        with suppress(InputError):  # it can't go back there: each reads for itself
            if not other.done.is_set():
                reply.state.take_over(other.reply.state, position)
        reply.statistics.reused_tokens += reply.state.length - before
        reply.statistics.prompt_tokens -= reply.state.length - before

    def _end(self, job: _Job, error: Exception | None = None) -> None:
        for jobs in (self._waiting, self._reading, self._answering):
            if job in jobs:
                jobs.remove(job)
        job.items.put(error)
        job.done.set()

    def _guarded(self, jobs: list[_Job], do: Callable[..., object], *args: Any) -> None:
        """Do something for replies; what it raises ends them."""
        try:
            do(*args)
        except Exception as error:
            for job in jobs:
                if not job.done.is_set():
                    self._end(job, error)

    def _read_prompts(self) -> None:
        """Read a chunk of a prompt, or of several short ones: no more than replies under way can wait for."""
        left, start = None, time.perf_counter()
        for n in range(len(self._reading)):
            job, most = self._reading[0], self._most(self._reading[0].reply)
            self._guarded([job], self._follow, job)
            if job.after:
                self._reading.rotate(-1)
            if job.after or job.done.is_set():
                continue
            ahead = chunk_ahead(self.model, job.reply.state, job.reply.ids, most)
            left = most if left is None else left
            if n and (ahead > left or (self._answering and time.perf_counter() - start > WAIT / 2)):
                return
            left -= ahead
            self._reading.rotate(-1)
            self._guarded([job], self._read_chunk, job, most)

    def _most(self, reply: Decoding) -> int:
        """Return how many tokens of a prompt may be read at a time now."""
        most = reply.chunk
        while self._answering and not self.exact and most > max(SMALLEST_CHUNK, WAIT * self._rate):
            most //= 2
        return most

    def _read_chunk(self, job: _Job, most: int) -> None:
        before, start = job.reply.unread, time.perf_counter()
        job.reply.read_chunk(most)
        tokens = before - job.reply.unread
        if tokens >= SMALLEST_CHUNK:
            self._rate += 0.3 * (tokens / (time.perf_counter() - start) - self._rate)
        job.items.put(job.reply.unread)
        if not job.reply.unread:
            self._reading.remove(job)
            self._answering.append(job)
        for other in [other for other in self._reading if other.after and other.after[0] is job]:
            self._guarded([other], self._follow, other)

    def _turn(self, job: _Job) -> None:
        """Make a reply's next token by steps of its own."""
        token = job.reply.turn()
        self._deliver(job, token, job.reply.over)

    def _settle(self, job: _Job) -> None:
        """Hand out what a step has found that checked drafts while the reply was alone."""
        for token in job.reply.settled():
            self._deliver(job, token, over=False)
        if job.reply.over:  # it was a stop token
            self._end(job)

    def _together(self, jobs: list[_Job], last: _Chain | None) -> None:
        """Make the next token of several replies, or the next tokens, by one step."""
        replies, drafts = [job.reply for job in jobs], self._drafts
        if drafts is None:
            return self._step(jobs, last)
        drafted = drafts.wanted(replies)
        if drafted:
            self._check(jobs, drafts)
        else:
            self._step(jobs, last)
        drafts.stepped([] if self._reading else replies, drafted)

    def _step(self, jobs: list[_Job], last: _Chain | None) -> None:
        """Make the next token of several replies by one step.

        The step starts before its tokens are known to the host; those after it are chosen when these are. So a mask is
        made of all that its constraint must have seen, and the device is at the step meanwhile.
        """
        samples: list[Sample] = []
        if last is None or last.jobs != jobs:
            last = None
            for job in jobs:
                self._guarded([job], self._settle, job)
            for job in [job for job in jobs if not job.done.is_set()]:
                self._guarded([job], lambda job=job: samples.append(job.reply.next_token()))
            jobs = [job for job in jobs if not job.done.is_set()]
            if not jobs:
                return
        try:
            with execution():
                if last is None:
                    ids = mx.stack([sample.token for sample in samples])
                    mx.async_eval(ids)  # by itself: what is evaluated together is waited for together
                draws = [job.reply.sampler.draw() if _in_step(job.reply) else LIKELIEST for job in jobs]
                step = self.model.batch(last.step if last else ids, [job.reply.state for job in jobs], draws)
                if isinstance(step, LazyBatchStep):
                    step.schedule()
            tokens = [Token(token) for token in (last.step.tokens() if last else np.array(ids).tolist())]
            for row, sample in enumerate(samples):
                if sample.logprobs is not None or sample.total is not None:
                    tokens[row] = self._received(jobs[row], sample) or tokens[row]
        except FAILURES as error:
            return self._again(jobs, error)
        masks: dict[int, np.ndarray | None] = {}  # of rows that go on
        for row, (job, token) in enumerate(zip(jobs, tokens, strict=True)):
            if job.done.is_set():
                continue
            self._guarded([job], self._count, job, token, row, masks)
            if not job.done.is_set():
                self._deliver(job, token, over=row not in masks)
        going = {row: jobs[row].reply for row in masks}
        try:
            if len(going) == len(jobs) and all(map(_in_step, going.values())):
                self._last = _Chain(step, jobs)
            self._choose(going, step, masks)
        except FAILURES as error:
            self._again([jobs[row] for row in masks], error)

    def _check(self, jobs: list[_Job], drafts: BatchDrafts) -> None:
        """Make the next tokens of several replies by one step, which checks drafts of them.

        What the step before has found is handed out while the device is at this one.
        """
        received: dict[_Job, tuple[list[Token], bool]] = {}
        asked: dict[_Job, Asked] = {}
        started: list[Started] = []
        for job in jobs:
            self._guarded([job], lambda job=job: received.update({job: receive_all(job.reply)}))
        plan = drafts.plan([job.reply for job in received]) if received else []
        for (job, (_, over)), each in zip(received.items(), plan, strict=True):
            if job.reply.state.length < len(job.reply.ids):
                self._guarded([job], lambda *a, job=job: asked.update({job: drafts.asked(job.reply, *a)}), *each, over)
        try:
            started = drafts.start([*asked.values()]) if asked else []
        except FAILURES as error:
            self._again([*asked], error)
        for job, (tokens, over) in [each for each in received.items() if not each[0].done.is_set()]:
            for n, token in enumerate(tokens, 1):
                self._deliver(job, token, over and n == len(tokens))
        going = [(job, each) for job, each in zip(asked, started, strict=False) if not job.done.is_set()]
        try:
            checks = [each.check() for _, each in going]
        except FAILURES as error:
            return self._again([job for job, _ in going], error)
        for (job, _), check in zip(going, checks, strict=True):
            self._guarded([job], job.reply.settle_check, check)

    def _received(self, job: _Job, sample: Sample) -> Token | None:
        """Return a chosen token; None, and the reply ends, if its logits are no numbers."""
        try:
            return sample.on_host()
        except InputError as error:
            self._end(job, error)
            return None

    def _choose(self, replies: dict[int, Decoding], step: BatchStep, masks: dict[int, np.ndarray | None]) -> None:
        """Choose the tokens after a step, of those rows that go on, where the step itself does not."""
        others = {row: reply for row, reply in replies.items() if not _in_step(reply)}
        with execution():
            drawn = step.drawn() if isinstance(step, LazyBatchStep) and not self._last and replies else None
            totals = None if drawn is None else mx.sum(step.logits(), axis=-1)
        for row in replies.keys() - others.keys():
            chosen = None if drawn is None or totals is None else Sample(drawn[row], None, totals[row])
            replies[row].chosen = chosen or RowStep(step, row)
        if others:
            with execution():
                logits = step.logits()
                logits = logits if len(others) == step.rows else logits[mx.array([*others])]
                samples = choose([reply.sampler for reply in others.values()], logits, [masks[row] for row in others])
                mx.async_eval(samples)
            for reply, sample in zip(others.values(), samples, strict=True):
                reply.chosen = sample

    def _count(self, job: _Job, token: Token, row: int, masks: dict[int, np.ndarray | None]) -> None:
        """Count a reply's token, and unless it is the last, add what may follow."""
        job.reply.chosen = job.reply.step = None
        job.reply.count(token)
        if not job.reply.is_last(token):
            masks[row] = job.reply.mask()

    def _deliver(self, job: _Job, token: Token | None, over: bool) -> None:
        if token is not None and token.id not in job.reply.stop_ids:
            job.items.put(token)
        if over:
            self._end(job)

    def _again(self, jobs: list[_Job], error: Exception) -> None:
        """Do a step again after an error in an evaluation, as `Decoding.again` does.

        If it is no kernel's, but the batch's, replies take turns from now on.
        """
        self._last = None
        self.model.failed(error)
        kernels, replays = self.model.kernels, self.model.replays
        if kernels is None:
            raise error
        off = kernels.off
        with kernels.one_by_one():
            with suppress(*FAILURES):
                for job in jobs:
                    job.reply.reread()
                with execution():
                    states = [job.reply.state for job in jobs]
                    mx.eval(self.model.batch_step([job.reply.ids[-1] for job in jobs], states))
            for job in jobs:
                self._guarded([job], self._reread, job.reply)
        if kernels.off == off and replays:
            kernels.off |= {REPLAY}
            log.warning("Replayed steps fail here and are off, steps run launch by launch instead: %s", error)
        elif kernels.off == off:
            self.exact = True
            log.warning("Steps of several replies fail here and are off, replies take turns instead: %s", error)

    def _reread(self, reply: Decoding) -> None:
        marks = reply.reread()
        reply.chosen, reply.step = None, self.model.step(reply.ids[-1], reply.state)
        with execution():
            mx.eval(reply.step.logits(), reply.state.arrays)
        reply.resume(marks)


def _in_step(reply: Decoding) -> bool:
    """Return True if the step that reads a token draws the next one, too."""
    return reply.constraint is None and reply.sampler.in_step
