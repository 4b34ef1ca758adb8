"""Measures what drafts bring: tokens a second by how many a step checks and how many of them are right.

In: a model, perhaps its assistant, and shares of drafts that are right, which are imposed: each draft is right with
that probability if those before it were, whatever it is. Out: what `mlx-gemma4 bench --json` has under "drafts".
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import mean, median
from typing import Any, cast

import mlx.core as mx

from ..execution import execution
from ..generation.drafting import MOST, Drafter, Hidden
from ..kv.state import KVState
from ..model.batch_replay import QueuedTokens
from ..model.model import Model
from .bench import fill, random_ids, reply_rate

CONTEXT = 512  # tokens before the reply
WARM = 3  # steps before others are timed


def measure_drafts(
    model: Model, drafter: Drafter | None, accepted: Sequence[float], reply: int, repetitions: int, kv: str
) -> dict[str, Any]:
    """Measure replies of `reply` tokens without drafts and with 1 to MOST.

    Args:
        drafter: an assistant of the model, whose time counts; None: drafts cost nothing, as those of repetition do.
        accepted: shares of drafts that are right.

    Returns:
        "plain": tokens a second without drafts; "cells": for each number of drafts "steps": a step's time in plain
        steps, "tokens_per_second": by share, and "break_even": the share from which on that pays; None: never.
    """
    base = model.new_state(kv=kv)
    fill(base, min(CONTEXT, model.config.context - reply - MOST - 2))
    reply_rate(model, base, reply)
    plain = median(reply_rate(model, base, reply)[0] for _ in range(repetitions))
    cells = []
    for drafts in range(1, MOST + 1):
        run_steps(model, base.fork(), drafter, drafts, 1.0, WARM * drafts)
        rates, seconds = [], []
        for share in accepted:
            runs = [run_steps(model, base.fork(), drafter, drafts, share, reply) for _ in range(repetitions)]
            rates.append(round(median(tokens / took for tokens, _, took in runs), 3))
            seconds += [took / steps for _, steps, took in runs]
        steps = mean(seconds) * plain
        cell = {"drafts": drafts, "steps": round(steps, 3), "break_even": break_even(drafts, steps)}
        cells.append({**cell, "tokens_per_second": rates})
    found = {"context": base.length, "assistant": drafter is not None, "accepted": [*accepted], "plain": plain}
    base.close()
    return {**found, "cells": cells}


def break_even(drafts: int, steps: float) -> float | None:
    """Return the share of right drafts with which a step makes as many tokens as it takes plain steps; None: none."""
    shares = (n / 1000 for n in range(1001))
    return next((a for a in shares if sum(a**n for n in range(drafts + 1)) >= steps), None)


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield a table of what was found, for people."""
    whose = "an assistant's" if found["assistant"] else "repetition's"
    yield f"Drafts ({whose}) behind {found['context']} tokens; none: {found['plain']:.1f} tokens/s"
    titles = [f"{share:.0%} right" for share in found["accepted"]]
    yield "".join(f"{title:>12}" for title in ["drafts", "plain steps", *titles, "break-even"])
    for cell in found["cells"]:
        even = "never" if cell["break_even"] is None else f"{cell['break_even']:.0%}"
        shown = [str(cell["drafts"]), f"{cell['steps']:.2f}", *(f"{r:.1f}" for r in cell["tokens_per_second"]), even]
        yield "".join(f"{text:>12}" for text in shown)


def run_steps(
    model: Model, state: KVState, drafter: Drafter | None, drafts: int, share: float, reply: int
) -> tuple[int, int, float]:
    """Make at least `reply` tokens; return how many, in how many steps, and in how many seconds."""
    chance, tokens = random.Random(drafts), [*state.tokens, *random_ids(model, 1)]
    before, steps, hidden = state.length, 0, cast("Hidden | None", None)
    start = time.perf_counter()
    while state.length < before + reply:
        count = min(drafts, model.most_checked(state) - 1)
        queued = drafter.queue(tokens, state, hidden, count) if drafter else None
        guessed = [] if queued else drafter.draft(tokens, state, hidden, count) if drafter else random_ids(model, count)
        rows = checked(model, [tokens[-1], *guessed], state, queued)
        guessed, right = queued.tokens() if queued else guessed, 0
        while right < len(guessed) and chance.random() < share:
            right += 1
        hidden, steps = rows(right), steps + 1
        tokens += [*guessed[:right], *random_ids(model, 1)]
        state.rewind(len(tokens) - 1)
    return state.length - before, steps, time.perf_counter() - start


def checked(
    model: Model, tokens: Sequence[int], state: KVState, queued: QueuedTokens | None = None
) -> Callable[[int], Hidden]:
    """Check tokens as a reply does, wait until the likeliest after each are known, and return the rows they are of.

    `queued`: drafts that are being made, behind the one token.
    """
    if replayed := model.replayed_check([tokens], [state], (), queued):
        replayed.tokens()
        # Not its method: who keeps the step asks for its logits, which the next one would have to copy first.
        return [replayed.hidden(row) for row in range(replayed.rows)].__getitem__
    tokens = [*tokens, *(queued.tokens() if queued else [])]
    with execution():
        logits, rows = model.check(tokens, state)
        best = mx.argmax(logits, axis=1)
        mx.async_eval(best, rows)
    best.tolist()
    return rows.__getitem__
