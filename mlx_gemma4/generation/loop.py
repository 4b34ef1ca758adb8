"""From a prompt to tokens: prefill in chunks, pipelined decode, constraints, statistics.

In: a model, a KV state, token ids. Out: tokens, one at a time. Knows nothing of text or files. Tokens are chosen from
logits by sampling.py.
"""

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import mlx.core as mx
import numpy as np

from ..errors import InputError, NoRoom, TooLong
from ..execution import execution
from ..kv.state import KVState
from ..memory import on_metal
from ..model.costs import chunk_at, needs_of
from ..model.model import Model
from ..model.step import LazyStep, Step, ids_of
from .sampling import REPETITION_WINDOW, Sample, Sampler, Sampling, Token

TURNS_MARKED = 4  # of one prompt, the last ones
CACHED = 256 << 20  # bytes of free buffers from which on they are given back on a Mac


class Constraint(Protocol):
    """Restricts one reply, token by token. `grammar.Grammar` is one; none serves two replies."""

    def mask(self) -> np.ndarray:
        """Return the tokens that may come next: uint32 words, the lowest bit of the first one for token 0."""

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
    behind many.

    The same from one multiple of `most` to the next, so that where chunks end follows from their position.
    """
    most = most or model.chunk
    return chunk_at(model.config, position // most * most, most) if on_metal() else most


def fitting_chunk(model: Model, state: KVState, tokens: int) -> int:
    """Return how many tokens of a prompt of `tokens` may be read at a time on a Mac, as this model's plan has memory.

    Raises:
        NoRoom: there is none for such a prompt.
    """
    if model.plan is None or not on_metal():
        return model.chunk
    end, needs = state.length + tokens, needs_of(model.config, state.dtype, model.chunk)
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
    length, context = state.length + len(prompt), model.config.context
    if length < 1:
        raise InputError("the prompt is empty; give it some text")
    if length >= context:
        raise TooLong(f"the prompt has {length} tokens, but the model's context holds {context}; shorten it")
    max_tokens = min(max_tokens, context - length)
    if max_tokens < 1:
        return
    state.check_room(len(prompt) + max_tokens)
    chunk = fitting_chunk(model, state, len(prompt))
    statistics.prompt_tokens = len(prompt)
    mx.reset_peak_memory()
    start = time.perf_counter()
    recent = [*state.tokens[-REPETITION_WINDOW:], *prompt]  # the same however much of a prompt was read before
    with execution():
        sampler = Sampler(sampling, recent, model.config.vocab, logprobs)
    prompt_step = _prefill(model, state, prompt, on_prompt, _marks_wanted(state, prompt, turn_ends), chunk)
    reply = _Reply(model, state, sampler, constraint, max_tokens, statistics, start, state.length)
    # A step starts before its token is known to the host, where that can be.
    pipelined = constraint is None and (sampler.greedy or not model.replays)
    try:
        yield from (_pipelined if pipelined else _one_by_one)(reply, reply.sample(prompt_step), stop_ids)
    finally:
        if state.length > reply.received:  # interrupted while a token was on its way
            state.rewind(reply.received)


@dataclass
class _Reply:
    """A reply under way."""

    model: Model
    state: KVState
    sampler: Sampler
    constraint: Constraint | None
    max_tokens: int
    statistics: Statistics
    start: float  # when the prompt began to be read
    received: int  # length of the state with the tokens that the host has received
    produced: int = 0  # tokens received
    first: float = 0.0  # when the first was there

    def read(self, chosen: Sample | Step, *, last: bool) -> Step | None:
        """Start the step that reads a chosen token; None after the last, whose logits nobody wants."""
        token = chosen.token if isinstance(chosen, Sample) else chosen
        with execution():
            if last and not self.model.replays:  # a lazy graph: it costs nothing unless the state is used again
                self.model.prefill(ids_of(token), self.state)
                return None
            step = self.model.step(token, self.state)  # replayed, it costs less than a prefill
            return None if last else step

    def sample(self, step: Step) -> Sample:
        """Choose the token after a step, scheduled. The device may still be at the step while the mask is made."""
        allowed = None if self.constraint is None else self.constraint.mask()
        with execution():
            sample = self.sampler(step.logits(), allowed)
            mx.async_eval(sample)
        return sample

    def receive(self, chosen: Sample | Step) -> Token:
        """Wait for a chosen token."""
        token = chosen.on_host() if isinstance(chosen, Sample) else Token(chosen.token())
        self.received, self.produced, now = self.received + 1, self.produced + 1, time.perf_counter()
        s = self.statistics
        if self.received % self.state.layout.tail == 2:  # a full tail was sealed: segments were joined
            _give_back()
        if self.produced == 1:
            s.prompt_time, self.first = now - self.start, now
        s.reply_tokens, s.reply_time, s.peak_memory = self.produced, now - self.first, mx.get_peak_memory()
        return token


def _pipelined(reply: _Reply, sample: Sample, stop_ids: frozenset[int]) -> Iterator[Token]:
    """Start each step before the host knows the token that it reads."""
    chosen: Sample | Step | None = sample
    while chosen is not None:
        step = reply.read(chosen, last=reply.produced + 1 == reply.max_tokens)
        following = step if step is None or reply.model.replays else reply.sample(step)
        token = reply.receive(chosen)
        if token.id in stop_ids:
            reply.statistics.stop_reason = "stop"
            return
        yield token
        chosen = following


def _one_by_one(reply: _Reply, sample: Sample, stop_ids: frozenset[int]) -> Iterator[Token]:
    """Start each step when its token is known: a constraint is to see it, or a replayed step's logits are sampled.

    The caller has the token while the device runs the step; then, under a constraint, the mask is made.
    """
    constraint = reply.constraint
    while True:
        token = reply.receive(sample)
        stop = token.id in stop_ids
        if constraint is not None and not stop:
            constraint.accept(token.id)
        complete = constraint is not None and constraint.finished
        step = reply.read(sample, last=stop or complete or reply.produced == reply.max_tokens)
        if step is not None and not reply.model.replays:
            with execution():
                mx.async_eval(step.logits())
        if not stop:
            yield token
        if stop or complete:
            reply.statistics.stop_reason = "stop"
        if step is None:
            return
        sample = reply.sample(step)


def _give_back() -> None:
    """Give free buffers back to the system on a Mac, where MLX keeps many: a prompt's, or segments that were joined."""
    if on_metal() and mx.get_cache_memory() > CACHED:
        mx.clear_cache()


def _marks_wanted(state: KVState, prompt: list[int], turn_ends: frozenset[int] | None) -> list[int]:
    if turn_ends is None:
        return []
    ends = [state.length + i + 1 for i, token in enumerate(prompt) if token in turn_ends]
    return sorted({*ends[-TURNS_MARKED:], *state.wanted_marks, state.length + len(prompt)})


def _prefill(
    model: Model,
    state: KVState,
    prompt: list[int],
    on_prompt: Callable[[int, int], None] | None,
    marks: list[int],
    most: int,
) -> LazyStep:
    """Read the prompt chunk by chunk, leaving marks; return the step of its last token.

    Chunks, of `most` tokens at most, end at multiples of `prefill_chunk`, whatever the state held before: a prompt
    whose beginning was there already is cut as one that is read whole.
    """
    done, logits = 0, mx.array(0.0)
    while done < len(prompt):
        before = state.length
        chunk = prefill_chunk(model, before, most)
        n = min(chunk - before % chunk, len(prompt) - done)
        ids = mx.array(prompt[done : done + n])
        done += n
        with execution():
            if done < len(prompt):
                model.prefill(ids, state)
                mx.eval(state.arrays)
                mx.clear_cache()
            else:
                logits = model.forward(ids, state)
                mx.eval(logits)
                _give_back()
            for position in marks:
                if before < position <= state.length:
                    state.mark(position)
        if on_prompt:
            on_prompt(done, len(prompt))
    return LazyStep(logits)
