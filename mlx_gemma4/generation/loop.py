"""From a prompt to tokens: prefill in chunks, pipelined decode, constraints, statistics.

In: a model, a KV state, token ids. Out: tokens, one at a time. Knows nothing of text or files. Tokens are chosen from
logits by sampling.py. Several replies at once, by the same pieces: scheduler.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import mlx.core as mx
import numpy as np

from ..errors import InputError, NoRoom, TooLong
from ..execution import execution
from ..kv.state import KVState
from ..memory import on_metal
from ..model.costs import chunk_at, needs_of, own_attention
from ..model.model import Model
from ..model.step import LazyStep, Step, ids_of
from ..ops.dispatch import REPLAY
from ..ops.sample import LIKELIEST
from .sampling import REPETITION_WINDOW, Sample, Sampler, Sampling, Token

log = logging.getLogger("mlx_gemma4")

FAILURES = (RuntimeError, ValueError)  # that an evaluation may raise: a kernel that this GPU's compiler refuses, ..
TURNS_MARKED = 4  # of one prompt, the last ones
CACHED = 256 << 20  # bytes of free buffers from which on they are given back on a Mac


class Constraint(Protocol):
    """Restricts one reply, token by token. `grammar.Grammar` is one; none serves two replies."""

    def mask(self) -> np.ndarray | None:
        """Return the tokens that may come next: uint32 words, the lowest bit of the first for token 0; None: any."""

    def accept(self, token: int) -> None:
        """Take note of the token that was chosen."""

    @property
    def finished(self) -> bool:
        """True if the reply is complete and nothing may follow."""


@dataclass
class Statistics:
    """Figures of one generation. Times in seconds."""

    prompt_tokens: int = 0  # those that were read
    reused_tokens: int = 0  # the prompt's others, which the state held before
    prompt_time: float = 0.0
    reply_tokens: int = 0
    reply_time: float = 0.0
    peak_memory: int = 0  # bytes, MLX's arrays
    stop_reason: Literal["stop", "length"] = "length"  # "stop": the reply was complete, "length": cut or left

    @property
    def prompt_rate(self) -> float:
        return self.prompt_tokens / self.prompt_time if self.prompt_time else 0.0

    @property
    def reply_rate(self) -> float:
        """Tokens a second after the first, which the prompt's time already holds."""
        return (self.reply_tokens - 1) / self.reply_time if self.reply_tokens > 1 and self.reply_time else 0.0


def prefill_chunk(model: Model, position: int = 0, most: int | None = None) -> int:
    """Return how many tokens of a prompt are read at a time from a position on: `most`, or as planned; on Metal fewer
    behind many where attention makes a matrix of scores.

    The same from one multiple of `most` to the next, so that where chunks end follows from their position.
    """
    most = most or model.chunk
    return chunk_at(model.config, position // most * most, most, own_attention(model.kernels)) if on_metal() else most


def fitting_chunk(model: Model, state: KVState, tokens: int) -> int:
    """Return how many tokens of a prompt of `tokens` may be read at a time on a Mac, as this model's plan has memory.

    Raises:
        NoRoom: there is none for such a prompt.
    """
    if model.plan is None or not on_metal():
        return model.chunk
    end = state.length + tokens
    needs = needs_of(model.config, state.dtype, model.chunk, own_attention(model.kernels))
    free = model.plan.limit - mx.get_active_memory() - max(0, needs.kv(end, state.kv) - state.nbytes)
    for chunk in needs.chunks():
        if needs.reading(end, state.kv, chunk) <= free:
            return chunk
    raise NoRoom(
        f"a conversation of {end:,} tokens takes {needs.kv(end, state.kv) / 1e9:.1f} GB of KV and more to read it, and "
        f"memory is {(needs.reading(end, state.kv, chunk) - free) / 1e9:.1f} GB short; shorten it, take --kv tq4 or a "
        "smaller quantization"
    )


def generate_tokens(
    model: Model,
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
    """Read a prompt and yield the tokens of the reply.

    While a token is handed out, the next is already being computed. However it ends, `state` then holds the prompt, the
    tokens handed out, and the stop token where one ended the reply, but no token that the caller has not received.

    Args:
        model, state: the model, and what came before; `state` takes prompt and reply.
        prompt: token ids, at least one.
        sampling: how tokens are chosen.
        max_tokens: the reply's length at most; the model's context bounds it too.
        stop_ids: the reply ends before any of these.
        statistics: filled in as it goes, right also when the caller stops early.
        on_prompt: called with (tokens read, tokens in all) as the prompt is read.
        turn_ends: tokens that end a chat turn. Given (perhaps empty), marks are left in `state` where a next prompt
            may part from this one: after the last turns, and at the prompt's end.
        constraint: what the reply must keep to; serves this reply alone.
        logprobs: tokens come with their log-probability, and with so many likeliest ones: log-softmax of the
            model's logits as they are, before penalties, bias, mask, filters and temperature.

    Raises:
        InputError: the prompt is empty or too long for the model's context, or the state takes no such reply.
    """
    statistics = statistics or Statistics()
    reply = begin(
        model,
        state,
        prompt,
        sampling,
        max_tokens,
        stop_ids,
        statistics,
        turn_ends,
        constraint=constraint,
        logprobs=logprobs,
    )
    try:
        while reply.unread:
            reply.read_chunk(reply.chunk)
            if on_prompt:
                on_prompt(len(prompt) - reply.unread, len(prompt))
        while not reply.over:
            token = reply.turn()
            if token is not None:
                yield token
        if reply.stopped:
            statistics.stop_reason = "stop"
    finally:
        if state.length > len(reply.ids):  # interrupted while a token was on its way
            state.rewind(len(reply.ids))


def begin(
    model: Model,
    state: KVState,
    prompt: list[int],
    sampling: Sampling,
    max_tokens: int,
    stop_ids: frozenset[int],
    statistics: Statistics,
    turn_ends: frozenset[int] | None,
    *,
    constraint: Constraint | None,
    logprobs: int | None,
) -> Decoding:
    """Check what `generate_tokens` is asked for, as it says, and return the reply with nothing read yet."""
    length, context = state.length + len(prompt), model.config.context
    if length < 1:
        raise InputError("the prompt is empty; give it some text")
    if length >= context:
        raise TooLong(f"the prompt has {length} tokens, but the model's context holds {context}; shorten it")
    max_tokens = min(max_tokens, context - length)
    if max_tokens > 0:
        state.check_room(len(prompt) + max_tokens)
        statistics.prompt_tokens = len(prompt)
    mx.reset_peak_memory()
    start = time.perf_counter()
    ids, marks = [*state.tokens, *prompt], _marks_wanted(state, prompt, turn_ends)
    recent = ids[-REPETITION_WINDOW - len(prompt) :]  # the same however much of a prompt was read before
    new_sampler = partial(Sampler, sampling, recent, model.config.vocab, logprobs, model.kernels)
    chunk = fitting_chunk(model, state, len(prompt))
    with execution():
        return Decoding(
            model, state, new_sampler, constraint, max_tokens, stop_ids, statistics, start, ids, marks, chunk
        )


@dataclass
class Decoding:
    """A reply under way: chunks of its prompt are read, then it takes turns, a token each, until it is over."""

    model: Model
    state: KVState
    new_sampler: Callable[[], Sampler]
    constraint: Constraint | None
    max_tokens: int
    stop_ids: frozenset[int]
    statistics: Statistics
    start: float  # when the prompt began to be read
    ids: list[int]  # of the state, with the tokens that the host has received
    marks: list[int]  # positions to mark
    chunk: int  # tokens of a prompt to read at a time, at most
    produced: int = 0  # tokens received
    first: float = 0.0  # when the first was there
    chosen: Sample | Step | None = None  # the next token, before it is received
    step: Step | None = None  # or what it is to be chosen from
    stopped: bool = False  # it is complete

    def __post_init__(self) -> None:
        self.sampler = self.new_sampler()

    @property
    def unread(self) -> int:
        """Tokens of the prompt to be read before the first turn."""
        return 0 if self.produced or self.max_tokens < 1 else max(0, len(self.ids) - self.state.length)

    @property
    def in_step(self) -> bool:
        """True if the step that reads a token also chooses the next."""
        return self.model.replays and self.constraint is None and self.sampler.in_step

    @property
    def over(self) -> bool:
        """True after the last token."""
        return self.chosen is None and self.step is None

    def read_chunk(self, most: int) -> None:
        """Read `most` more tokens of the prompt, or fewer: `read_chunk`."""
        try:
            self.step = read_chunk(self.model, self.state, self.ids, self.marks, most)
        except FAILURES as error:
            self.step = self.again(error)

    def turn(self) -> Token | None:
        """Receive the next token, the one after it started; None: that was a stop token."""
        # A step starts before its token is known to the host, where that can be.
        pipelined = self.constraint is None and (self.in_step or not self.model.replays)
        token = self._pipelined() if pipelined else self._one_by_one()
        return None if token.id in self.stop_ids else token

    def _pipelined(self) -> Token:
        """Start the step that reads the next token before the host knows it."""
        chosen = self.next_token() if self.chosen is None else self.chosen
        while True:
            try:
                in_step = self.in_step  # before the step, which may be the first to find that none are replayed here
                step = self.read(chosen, last=self.produced + 1 == self.max_tokens)
                self.chosen = step if step is None or in_step else self.sample(step)
                token = self.receive(chosen)
                break
            except FAILURES as error:
                chosen = self.sample(self.again(error))
        self.step = None
        if self.is_last(token):
            self.chosen = None
        return token

    def _one_by_one(self) -> Token:
        """Start the step when its token is known: a constraint is to see it, or a replayed step's logits are sampled.

        The caller has the token while the device runs the step; then, under a constraint, the mask is made.
        """
        sample = self.next_token()
        try:
            token = self.receive(sample)
        except FAILURES as error:
            sample = self.sample(self.again(error))
            token = self.receive(sample)
        last = self.is_last(token)
        try:
            self.step = self.read(sample, last=last)
            if self.step is not None and not self.model.replays:
                with execution():
                    mx.async_eval(self.step.logits())
        except FAILURES as error:
            again = self.again(error)
            self.step = None if last else again
        self.chosen = None
        return token

    def next_token(self) -> Sample:
        """Return the next token, perhaps still being computed."""
        if isinstance(self.chosen, Sample):
            return self.chosen
        try:
            if self.chosen is not None:
                return Sample(mx.array(self.chosen.token()))
            assert self.step is not None
            return self.sample(self.step)
        except FAILURES as error:
            return self.sample(self.again(error))

    def is_last(self, token: Token) -> bool:
        """Take note of a token that was received; return True if the reply ends with it."""
        stop = token.id in self.stop_ids
        if self.constraint is not None and not stop:
            self.constraint.accept(token.id)
        self.stopped = stop or (self.constraint is not None and self.constraint.finished)
        return self.stopped or self.produced == self.max_tokens

    def mask(self) -> np.ndarray | None:
        """Return the tokens that the constraint lets come next; None: any."""
        return None if self.constraint is None else self.constraint.mask()

    def read(self, chosen: Sample | Step, *, last: bool) -> Step | None:
        """Start the step that reads a chosen token; None after the last, whose logits nobody wants."""
        token = chosen.token if isinstance(chosen, Sample) else chosen
        with execution():
            if last and not self.model.replays:  # a lazy graph: it costs nothing unless the state is used again
                self.model.prefill(ids_of(token), self.state)
                return None
            # Replayed, a step costs less than a prefill.
            draw = self.sampler.draw() if self.in_step and not last else LIKELIEST
            step = self.model.step(token, self.state, draw)
            return None if last else step

    def sample(self, step: Step) -> Sample:
        """Choose the token after a step, scheduled. The device may still be at the step while the mask is made."""
        allowed = self.mask()
        with execution():
            sample = self.sampler(step.logits(), allowed)
            mx.async_eval(sample)
        return sample

    def receive(self, chosen: Sample | Step) -> Token:
        """Wait for a chosen token."""
        token = chosen.on_host() if isinstance(chosen, Sample) else Token(chosen.token())
        self.count(token)
        return token

    def count(self, token: Token) -> None:
        """Count a token that the host has received."""
        self.ids.append(token.id)
        self.produced, now = self.produced + 1, time.perf_counter()
        s = self.statistics
        if len(self.ids) % self.state.layout.tail == 2:  # a full tail was sealed: segments were joined
            _give_back()
        if self.produced == 1:
            s.prompt_time, self.first = now - self.start, now
        s.reply_tokens, s.reply_time, s.peak_memory = self.produced, now - self.first, mx.get_peak_memory()

    def again(self, error: Exception) -> Step:
        """Read everything once more, launch by launch, after an error in an evaluation; return the last token's step.

        So the kernel is found that fails only when it is evaluated, as all do on Metal, and is off from then on. An
        error that is no kernel's is raised.
        """
        model, kernels = self.model, self.model.kernels
        if kernels is None:
            raise error
        off, replayed = kernels.off, model.replays
        with kernels.one_by_one():
            marks = self.reread()
            step = model.step(self.ids[-1], self.state)
            with execution():
                mx.eval(step.logits(), self.state.arrays, self.new_sampler()(step.logits()))
        if kernels.off == off:
            if not replayed:
                raise error
            kernels.off |= {REPLAY}
            log.warning("Replayed steps fail here and are off, steps run launch by launch instead: %s", error)
        self.resume(marks)
        return step

    def reread(self) -> list[int]:
        """Start over, and read all tokens but the last; return the positions to mark."""
        marks = sorted({*self.marks, *(mark.position for mark in self.state.marks)})
        self.state.start_over()
        while self.state.length < len(self.ids) - 1:
            read_chunk(self.model, self.state, self.ids[:-1], marks, self.chunk)
        return marks

    def resume(self, marks: list[int]) -> None:
        """Go on after `reread` and a step of the last token, whose next one is to be chosen anew."""
        if self.state.length in marks:
            self.state.mark()
        with execution():
            self.sampler = self.new_sampler()
            for token in self.ids[len(self.ids) - self.produced :]:
                self.sampler.skip(token)


def _give_back() -> None:
    """Give free buffers back to the system on a Mac, where MLX keeps many: a prompt's, or segments that were joined."""
    if on_metal() and mx.get_cache_memory() > CACHED:
        mx.clear_cache()


def _marks_wanted(state: KVState, prompt: list[int], turn_ends: frozenset[int] | None) -> list[int]:
    if turn_ends is None:
        return []
    ends = [state.length + i + 1 for i, token in enumerate(prompt) if token in turn_ends]
    return sorted({*ends[-TURNS_MARKED:], *state.wanted_marks, state.length + len(prompt)})


def chunk_ahead(model: Model, state: KVState, ids: list[int], most: int) -> int:
    """Return how many of `ids`, of which the state holds a beginning, are read next.

    Chunks, of `most` tokens at most, end at multiples of `prefill_chunk`, whatever the state held before: a prompt
    whose beginning was there already is cut as one that is read whole.
    """
    chunk = prefill_chunk(model, state.length, most)
    return min(chunk - state.length % chunk, len(ids) - state.length)


def read_chunk(model: Model, state: KVState, ids: list[int], marks: list[int], most: int) -> LazyStep | None:
    """Read the next chunk of `ids` (`chunk_ahead`), leaving marks; return the step of the last token, if it is read."""
    before = state.length
    stop = before + chunk_ahead(model, state, ids, most)
    chunk, step = mx.array(ids[before:stop]), None
    with execution():
        if stop < len(ids):
            model.prefill(chunk, state)
            mx.eval(state.arrays)
            mx.clear_cache()
        else:
            logits = model.forward(chunk, state)
            mx.eval(logits)
            step = LazyStep(logits)
            _give_back()
        for position in marks:
            if before < position <= state.length:
                state.mark(position)
    return step
