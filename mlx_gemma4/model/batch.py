"""A step for several states at once: each reads one token of its own.

In: a token and a `KVState` for each reply. Out: logits of all, row by row. Products, norms and experts take all rows at
once; RoPE and attention go by row. Who is in a batch may change from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..errors import InputError
from ..kv.state import KVState
from .forward import head, run_layers
from .weights import Loaded

MAX_BATCH = 32  # states of a step


def check_batch(tokens: int, states: Sequence[KVState]) -> None:
    """Refuse what no step can take. Raises InputError."""
    if not 1 <= len(states) <= MAX_BATCH or tokens != len(states) or len({id(s) for s in states}) != len(states):
        raise InputError(
            f"a batch step takes one token for each of 1 to {MAX_BATCH} different states; these are {tokens} tokens "
            f"for {len(states)} states, {len({id(s) for s in states})} of them different"
        )
    for state in states:
        state.check_room(1)


def stock_step(model: Loaded, ids: mx.array, states: Sequence[KVState]) -> mx.array:
    """Read a token, ids int [B], into each of B states, in stock operations: fp32 logits [B, vocab]."""
    return head(model, run_layers(model, ids, states, ids.size))
