"""From a prompt to tokens: a generator of them, and the checks before.

In: a model, a KV state, token ids. Out: tokens, one at a time. Knows nothing of text or files. A reply under way is
decoding.py's; several at once, by the same pieces: scheduler.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from functools import partial
from itertools import islice

import mlx.core as mx

from ..errors import InputError, TooLong
from ..execution import execution
from ..kv.state import KVState
from ..model.model import Model
from .decoding import Decoding, Statistics
from .drafting import Drafting, Drafts
from .prompt import fitting_chunk, marks_wanted
from .sampling import REPETITION_WINDOW, Constraint, Sampler, Sampling, Token


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
    drafts: Drafts | None = None,
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
        drafts: guess tokens, so that steps make several at once; None: one a step.

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
        drafts=drafts,
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
    drafts: Drafts | None,
) -> Decoding:
    """Check what `generate_tokens` is asked for, as it says, and return the reply with nothing read yet."""
    length, context = state.length + len(prompt), model.config.context
    model.config.check_ids(prompt, soft=True)
    model.soft.held(prompt)  # or it says what is not there
    if prompt and prompt[-1] < 0:
        raise InputError("the prompt ends with a picture or sound; let some text follow")
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
    ids, marks = [*state.tokens, *prompt], marks_wanted(state, prompt, turn_ends)
    # Soft tokens are no tokens that could come again.
    recent = list(islice((i for i in reversed(ids) if i >= 0), REPETITION_WINDOW))[::-1]
    new_sampler = partial(Sampler, sampling, recent, model.config.vocab, logprobs, model.kernels)
    chunk = fitting_chunk(model, state, prompt)
    with execution():
        return Decoding(
            model,
            state,
            new_sampler,
            constraint,
            max_tokens,
            stop_ids,
            statistics,
            start,
            ids,
            marks,
            chunk,
            Drafting(drafts) if drafts is not None and drafts.most > 0 else None,
        )
