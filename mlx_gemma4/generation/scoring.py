"""What a model makes of a text that is there already: log-probabilities of its tokens, and its embedding.

In: a model, token ids, an empty KV state. Out: numbers. Nothing is generated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

from ..execution import execution
from ..kv.state import KVState
from ..model.model import Model
from ..ops import stock
from .prompt import chunk_ahead, fitting_chunk
from .sampling import Token, check_finite

ROWS = 64  # of logits that are made at a time: 64 MB of the largest vocabulary


def score(
    model: Model, ids: list[int], state: KVState, top: int = 0, start: int = 1, check: Callable[[], None] | None = None
) -> Iterator[Token]:
    """Yield the tokens from number `start` on (at least 1), each with its log-probability behind all before it.

    Args:
        ids: the text, at least one token.
        state: empty; takes them.
        top: how many of the likeliest tokens at its place each comes with.
        check: called as it goes on; an exception ends it.
    """
    for first, hidden in _read(model, ids, state, check):
        stop = min(first + hidden.shape[0], len(ids) - 1)  # the last token predicts none of them
        for row in range(max(first, start - 1), stop, ROWS):
            wanted = ids[row + 1 : min(row + ROWS, stop) + 1]
            with execution():
                logits = model.logits(hidden[row - first : row - first + len(wanted)])
                logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                chosen = mx.take_along_axis(logprobs, mx.array(wanted)[:, None], axis=-1)[:, 0]
                likely = (
                    mx.argpartition(-logprobs, kth=top - 1, axis=-1)[:, :top] if top else mx.zeros((len(wanted), 0))
                )
                values = mx.take_along_axis(logprobs, likely, axis=-1) if top else likely
                mx.eval(chosen, likely, values)
            rows = zip(np.array(chosen).tolist(), np.array(likely).tolist(), np.array(values).tolist(), strict=True)
            for id, (value, others, theirs) in zip(wanted, rows, strict=True):
                pairs = sorted(zip(others, theirs, strict=True), key=lambda pair: -pair[1])
                yield Token(id, value, tuple(pairs))


def embed(model: Model, ids: list[int], state: KVState, check: Callable[[], None] | None = None) -> np.ndarray:
    """Return the mean of the tokens' last hidden states (after the last norm), of length 1: fp32 [hidden]."""
    total = mx.zeros(model.config.hidden)
    for _, hidden in _read(model, ids, state, check):
        with execution():
            normed = stock.rms_norm(hidden, model.weights.output_norm, model.config.eps)
            total = total + normed.astype(mx.float32).sum(axis=0)
            mx.eval(total)
    mean = np.array(total, np.float64) / len(ids)
    return (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)


def _read(
    model: Model, ids: list[int], state: KVState, check: Callable[[], None] | None
) -> Iterator[tuple[int, mx.array]]:
    """Read tokens in chunks; yield each chunk's position and hidden states before the last norm, [T, hidden]."""
    model.config.check_ids(ids)
    chunk = fitting_chunk(model, state, ids)
    while (first := state.length) < len(ids):
        if check:
            check()
        with execution():
            some = mx.array(ids[first : first + chunk_ahead(model, state, ids, chunk)])
            hidden = model.hidden(some, state)
            mx.eval(hidden, state.arrays)
            mx.clear_cache()
            check_finite(mx.sum(hidden.astype(mx.float32)))
        yield first, hidden
