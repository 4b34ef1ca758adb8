"""Prompts in chunks: how long they are, where they end, and reading one.

In: a model, a KV state, token ids. Out: a state that has read more of them. Knows nothing of replies.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..config import SEEN
from ..errors import NoRoom
from ..execution import execution
from ..kv.state import KVState
from ..memory import on_metal
from ..model.costs import chunk_at, needs_of, own_attention
from ..model.model import Model
from ..model.step import LazyStep
from .sampling import check_finite

TURNS_MARKED = 4  # of one prompt, the last ones
CACHED = 256 << 20  # bytes of free buffers from which on they are given back on a Mac


def prefill_chunk(model: Model, position: int = 0, most: int | None = None) -> int:
    """Return how many tokens of a prompt are read at a time from a position on: `most`, or as planned; on Metal fewer
    behind many where attention makes a matrix of scores.

    The same from one multiple of `most` to the next, so that where chunks end follows from their position.
    """
    most = most or model.chunk
    return chunk_at(model.config, position // most * most, most, own_attention(model.kernels)) if on_metal() else most


def fitting_chunk(model: Model, state: KVState, prompt: Sequence[int]) -> int:
    """Return how many tokens of a prompt may be read at a time on a Mac, as this model's plan has memory.

    A picture in it may be longer, and is read at once.

    Raises:
        NoRoom: there is none for such a prompt.
    """
    if model.plan is None or not on_metal():
        return model.chunk
    end, picture = state.length + len(prompt), model.config.longest_picture(prompt)
    needs = needs_of(model.config, state.dtype, model.chunk, own_attention(model.kernels))
    free = model.plan.limit - mx.get_active_memory() - max(0, needs.kv(end, state.kv) - state.nbytes)
    for chunk in needs.chunks():
        if (reading := needs.reading(end, state.kv, max(chunk, picture))) <= free:
            return chunk
    raise NoRoom(
        f"a conversation of {end:,} tokens takes {needs.kv(end, state.kv) / 1e9:.1f} GB of KV and more to read it, and "
        f"memory is {(reading - free) / 1e9:.1f} GB short; shorten it, take --kv tq4 or a smaller quantization"
    )


def marks_wanted(state: KVState, prompt: list[int], turn_ends: frozenset[int] | None) -> list[int]:
    """Return the positions to mark of a state that is to read a prompt: `generate_tokens`."""
    if turn_ends is None:
        return []
    ends = [state.length + i + 1 for i, token in enumerate(prompt) if token in turn_ends]
    return sorted({*ends[-TURNS_MARKED:], *state.wanted_marks, state.length + len(prompt)})


def chunk_ahead(model: Model, state: KVState, ids: list[int], most: int) -> int:
    """Return how many of `ids`, of which the state holds a beginning, are read next.

    Chunks, of `most` tokens at most, end at multiples of `prefill_chunk`, whatever the state held before: a prompt
    whose beginning was there already is cut as one that is read whole. Where that is within a picture whose tokens see
    each other, a chunk ends before it, or holds all of it.
    """
    chunk = prefill_chunk(model, state.length, most)
    stop = min(state.length + chunk - state.length % chunk, len(ids))
    start = model.config.uncut(ids, stop)
    if start > state.length:
        return start - state.length
    while start < stop < len(ids) and ids[stop] < SEEN:
        stop += 1
    return stop - state.length


def read_chunk(model: Model, state: KVState, ids: list[int], marks: list[int], most: int) -> LazyStep | None:
    """Read the next chunk of `ids` (`chunk_ahead`), leaving marks; return the step of the last token, if it is read."""
    before = state.length
    stop = before + chunk_ahead(model, state, ids, most)
    chunk, step = mx.array(ids[before:stop]), None
    with execution():
        soft = model.soft.rows(ids[before:stop])
        if stop < len(ids):
            model.prefill(chunk, state, soft=soft)
            mx.eval(state.arrays)
            mx.clear_cache()
        else:
            logits = model.forward(chunk, state, soft=soft)
            mx.eval(logits)
            check_finite(mx.sum(logits))
            step = LazyStep(logits)
            give_back()
        for position in marks:
            if before < position <= state.length:
                state.mark(position)
    return step


def give_back() -> None:
    """Give free buffers back to the system on a Mac, where MLX keeps many: a prompt's, or segments that were joined."""
    if on_metal() and mx.get_cache_memory() > CACHED:
        mx.clear_cache()
