"""Conversations of several states, batched or each alone, for tests of batched steps."""

from __future__ import annotations

import gc
import random
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from recorded import prompts

from mlx_gemma4.model.model import Model
from mlx_gemma4.ops import matvec
from mlx_gemma4.ops.tuning import this_gpu


def few_rows_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have products of up to 4 rows done by mat-vecs: few_rows.py rounds rows to fp16."""
    monkeypatch.setattr(matvec, "this_gpu", lambda: replace(this_gpu(), few_rows_from=matvec.MAX_TOKENS + 1))


def read(model: Model, ids: list[int], kv: str = "full") -> Any:
    state = model.new_state(kv=kv)
    if ids:
        model.prefill(mx.array(ids), state)
    return state


def alone(model: Model, state: Any, token: int) -> np.ndarray:
    return np.array(model.forward(mx.array([token]), state))


def converse(
    model: Model, plain: Model, batched: bool, seed: int, steps: int
) -> tuple[list[np.ndarray], list[list[int]]]:
    """States that join, leave, fork, take marks, rewind, read prompts and are closed or forgotten between steps."""
    chance, found = random.Random(seed), []
    states = [read(plain, prompts("e2b")[n]) for n in range(3)]
    marks: list[list[int]] = [[0] for _ in states]
    for _ in range(steps):
        op, at = chance.random(), chance.randrange(len(states))
        if op < 0.55:
            chosen = chance.sample(range(len(states)), chance.randrange(1, len(states) + 1))
            tokens, some = [chance.randrange(3, 300) for _ in chosen], [states[n] for n in chosen]
            if batched:
                found.append(np.array(model.batch_step(mx.array(tokens), some)))
            else:
                found.append(np.stack([alone(plain, *pair) for pair in zip(some, tokens, strict=True)]))
        elif op < 0.65 and len(states) < 6:
            states.append(states[at].fork())
            marks.append(list(marks[at]))
        elif op < 0.72:
            marks[at].append(states[at].mark().position)
        elif op < 0.8:
            to = chance.choice([p for p in (*marks[at], states[at].length - 1) if p > 0] or [states[at].length])
            marks[at] = [p for p in marks[at] if p <= to]
            states[at].rewind(to)
        elif op < 0.88:
            plain.prefill(mx.array([chance.randrange(3, 300) for _ in range(chance.choice([1, 5, 70]))]), states[at])
        elif len(states) > 2:
            if op < 0.94:
                states[at].close()
            del states[at], marks[at]
            gc.collect()
    return found, [state.tokens for state in states]
