"""From a prompt to tokens: prefill in chunks, pipelined decode, constraints, statistics.

In: a model, a KV state, token ids. Out: tokens, one at a time. Knows nothing of text or files. How a token is chosen
from logits is in sampling.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import mlx.core as mx
import numpy as np

from ..errors import InputError, TooLong
from ..execution import execution
from ..gpu.render import cuda_launcher
from ..kv.state import KVState
from ..model.model import Model
from ..model.replay import Done, Pending
from .sampling import REPETITION_WINDOW, Sample, Sampler, Sampling, Token

__all__ = [
    "PREFILL_CHUNK",
    "Constraint",
    "Sampling",
    "Statistics",
    "Token",
    "check_length",
    "generate_tokens",
    "prefill_chunk",
]

PREFILL_CHUNK = 1024  # tokens read at a time: bounds the memory that a long prompt takes
CHUNK_ROWS = 32 * PREFILL_CHUNK  # query heads x tokens of a chunk, at most, where chunks may be larger


class Constraint(Protocol):
    """What one reply must look like, told token by token. `grammar.Grammar` is one; none serves two replies."""

    def mask(self) -> np.ndarray:
        """The tokens that may come next: uint32 words, the lowest bit of the first one for token 0."""

    def accept(self, token: int) -> None:
        """Take note of the token that was chosen."""

    @property
    def finished(self) -> bool:
        """Whether the reply is complete and nothing may follow."""


@dataclass
class Statistics:
    """What a generation did. Times in seconds."""

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


def check_length(prompt: int, context: int) -> None:
    """Refuse a prompt, in tokens, that leaves no room in the context."""
    if prompt < 1:
        raise InputError("the prompt is empty; give it some text")
    if prompt >= context:
        raise TooLong(f"the prompt has {prompt} tokens, but the model's context holds {context}; shorten it")


def prefill_chunk(model: Model) -> int:
    """Tokens of a prompt that are read at a time: on NVIDIA GPUs more for models of few heads.

    There a launch costs the host about 10 us, which bounds the prompts of small models. The scores of a chunk, which
    bound its memory, stay those of 31B's 32 heads.
    """
    if model.kernels is None or model.kernels.launcher is not cuda_launcher:
        return PREFILL_CHUNK
    heads = max(layer.heads for layer in model.config.layers)
    return max(PREFILL_CHUNK, min(4 * PREFILL_CHUNK, CHUNK_ROWS // heads))


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
) -> Iterator[Token]:
    """Read a prompt and yield the tokens of the reply.

    While a token is handed out, the next is already being computed: under a constraint, once it is known what may
    follow the token, which is found out on the host while the device runs the forward pass. However it ends,
    `state` then holds the prompt, the tokens handed out, and the stop token where one ended the reply: nothing that
    nobody has seen.

    Args:
        model, state: the model, and what came before; `state` takes prompt and reply.
        prompt: token ids, at least one.
        sampling: how tokens are chosen.
        max_tokens: the reply's length at most; the model's context bounds it too.
        stop_ids: the reply ends before any of these.
        statistics: filled in as it goes, right also when the caller stops early.
        on_prompt: called with (tokens read, tokens in all) as the prompt is read.
        turn_ends: tokens that end a turn. Given (perhaps empty), marks are left in `state` where a next prompt
            may part from this one: after the last turns, and at the prompt's end.
        constraint: what the reply must look like; serves this reply alone.
        logprobs: tokens come with their log-probability, and with so many likeliest ones: log-softmax of the
            model's logits as they are, before penalties, bias, mask, filters and temperature.

    Raises:
        InputError: the prompt is empty or too long for the model's context, or the state takes no such reply.
    """
    statistics = statistics or Statistics()
    check_length(state.length + len(prompt), model.config.context)
    max_tokens = min(max_tokens, model.config.context - state.length - len(prompt))
    if max_tokens < 1:
        return
    state.check_room(len(prompt) + max_tokens)
    statistics.prompt_tokens = len(prompt)
    mx.reset_peak_memory()
    start = time.perf_counter()
    recent = [*state.tokens[-REPETITION_WINDOW:], *prompt]  # the same however much of a prompt was read before
    with execution():
        choose = Sampler(sampling, recent, model.config.vocab, logprobs)
    logits = _prefill(model, state, prompt, on_prompt, _marks_wanted(state, prompt, turn_ends))
    choice: Sample | Likeliest = _choose(choose, lambda: logits, constraint)
    # A step is scheduled before its token is known, where that can be.
    ahead = constraint is None and (choose.greedy or not model.replays)
    mark, known = start, state.length
    try:
        for produced in range(1, max_tokens + 1):
            following = _next(model, state, choose, choice, produced < max_tokens) if ahead else None
            token = choice.on_host()
            known += 1
            now = time.perf_counter()
            if produced == 1:
                statistics.prompt_time, mark = now - start, now
            statistics.reply_tokens, statistics.reply_time = produced, now - mark
            statistics.peak_memory = mx.get_peak_memory()
            stop = token.id in stop_ids
            if not ahead:
                if constraint is not None and not stop:
                    constraint.accept(token.id)
                finished = constraint is not None and constraint.finished
                more = not stop and not finished and produced < max_tokens
                following = _next(model, state, choose, choice, more, constraint)
            if stop:
                statistics.stop_reason = "stop"
                return
            yield token
            if constraint is not None and constraint.finished:
                statistics.stop_reason = "stop"
                return
            choice = following() if following else choice
    finally:
        if state.length > known:  # interrupted while a token was on its way
            state.rewind(known)


@dataclass(frozen=True)
class Likeliest:
    """The choice of a greedy reply whose step is still under way: a `Choice` that needs no logits."""

    step: Pending | Done

    def on_host(self) -> Token:
        return Token(self.step.best())

    @property
    def token(self) -> mx.array:
        return mx.array(self.step.best())


def _next(
    model: Model,
    state: KVState,
    choose: Sampler,
    choice: Sample | Likeliest,
    more: bool,
    constraint: Constraint | None = None,
) -> Callable[[], Sample | Likeliest] | None:
    """Read a chosen token into the state; the choice that follows it, if there is to be one (`more`).

    The forward pass is scheduled. So is the choice; or else, where steps are replayed, it is when it is asked for.
    """
    following: Sample | Likeliest
    with execution():
        if model.replays:
            step = model.begin(choice.step if isinstance(choice, Likeliest) else int(choice.token), state)
            if not more:  # a step costs less than a prefill, and nobody waits for it
                return None
            if constraint is None and choose.greedy:
                following = Likeliest(step)
                return lambda: following
            return lambda: _choose(choose, step.logits, constraint)
        if not more:  # a lazy graph: on a GPU it costs nothing unless the state is used again
            model.prefill(choice.token[None], state)
            return None
        logits = model.forward(choice.token[None], state)
        if constraint is not None:
            mx.async_eval(logits)
    following = _choose(choose, lambda: logits, constraint)
    return lambda: following


def _choose(choose: Sampler, logits: Callable[[], mx.array], constraint: Constraint | None) -> Sample:
    """The next token, scheduled. The device may still be at the logits while the mask is made."""
    allowed = None if constraint is None else constraint.mask()
    with execution():
        choice = choose(logits(), allowed)
        mx.async_eval(choice)
    return choice


_TURNS_MARKED = 4  # of one prompt, the last ones


def _marks_wanted(state: KVState, prompt: list[int], turn_ends: frozenset[int] | None) -> list[int]:
    """Positions to mark while a prompt is read."""
    if turn_ends is None:
        return []
    ends = [state.length + i + 1 for i, token in enumerate(prompt) if token in turn_ends]
    return sorted({*ends[-_TURNS_MARKED:], *state.wanted_marks, state.length + len(prompt)})


def _prefill(
    model: Model,
    state: KVState,
    prompt: list[int],
    on_prompt: Callable[[int, int], None] | None,
    marks: list[int],
) -> mx.array:
    """Read the prompt chunk by chunk, leaving marks; the logits after its last token, [vocab].

    Chunks end at multiples of `prefill_chunk` tokens, whatever the state held before: a prompt whose beginning
    was there already is cut as one that is read whole.
    """
    done, logits, chunk = 0, mx.array(0.0), prefill_chunk(model)
    while done < len(prompt):
        before = state.length
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
            for position in marks:
                if before < position <= state.length:
                    state.mark(position)
        if on_prompt:
            on_prompt(done, len(prompt))
    return logits
