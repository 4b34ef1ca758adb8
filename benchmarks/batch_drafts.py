"""Measures what drafts bring replies that step together, beside the same replies without drafts, in about a minute.

    python benchmarks/batch_drafts.py FILE.gguf [--draft ASSISTANT.gguf] [--parallel 2,4,8] [--right 0,0.7] [--json OUT]

Replies are those of the server's scheduler. How many drafts are right is imposed, whatever the model says: with random
weights nothing else can be measured. Without an assistant drafts cost nothing, as those of repetition. Numbers of
drafts follow from what is measured, as in the server; a first run, which records and learns, does not count.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from mlx_gemma4.execution import execution, leave
from mlx_gemma4.generation.batch_drafts import Started
from mlx_gemma4.generation.decoding import Statistics
from mlx_gemma4.generation.drafting import Check, Drafts
from mlx_gemma4.generation.sampling import Sampling
from mlx_gemma4.generation.scheduler import Scheduler
from mlx_gemma4.kv.state import KVState
from mlx_gemma4.loading.assistant import load_assistant
from mlx_gemma4.measure.bench import fill, load_subject, random_ids
from mlx_gemma4.model.model import Model

GREEDY = Sampling(temperature=0)
WARM = 24  # tokens of each reply before those that count
NEVER = 1 << 30  # tokens alike from which on repetition drafts


class Guesses:
    """Drafts that cost nothing."""

    needs_hidden = False

    def __init__(self, model: Model) -> None:
        self.ids = random_ids(model, 512)

    def draft(self, tokens: Sequence[int], state: KVState, hidden: Any, count: int, draws: Any = ()) -> list[int]:
        return self.ids[len(tokens) % 256 :][:count]

    def queue(self, *_: Any) -> None:
        """They are known on the host."""


class Told(NamedTuple):
    """Rows of a step whose tokens are imposed."""

    drawn: list[int]

    def tokens(self) -> list[int]:
        return self.drawn

    def leads(self) -> list[float]:
        return [math.inf] * len(self.drawn)


def imposing(right: float) -> Any:
    """Return `Started.check` with so many of the drafts right."""
    chance, check = random.Random(0), Started.check

    def imposed(self: Started) -> Check:
        found = check(self)
        tokens = [token.id for token in found.tokens()]
        for row, draft in enumerate(found.drafts.tokens):
            tokens[row] = draft if chance.random() < right else draft ^ 1
        return found._replace(samples=Told(tokens))

    return patch.object(Started, "check", imposed)


def run(scheduler: Scheduler, bases: list[KVState], n: int) -> tuple[float, float]:
    """Return tokens a second of all replies while all of them were under way, and their tokens a step."""
    figures = [Statistics() for _ in bases]

    def one(i: int) -> list[float]:
        state = bases[i].fork()
        prompt = random_ids(scheduler.model, 8 + i)
        made = scheduler.generate_tokens(state, prompt, GREEDY, n, statistics=figures[i])
        times = [time.perf_counter() for _ in made]
        with execution():
            state.close()
        leave()
        return times

    with ThreadPoolExecutor(len(bases)) as pool:
        times = list(pool.map(one, range(len(bases))))
    start, stop = max(each[WARM] for each in times), min(each[-1] for each in times)
    tokens = sum(start < at <= stop for each in times for at in each)
    return tokens / (stop - start), sum(f.tokens_per_step for f in figures) / len(figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--parallel", default="2,4,8")
    parser.add_argument("--right", default="0,0.7", help="shares of drafts that are right, if those before them are")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=160, help="tokens of each reply")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    began = time.perf_counter()
    model = load_subject(options.model).model
    drafter = load_assistant(options.draft, model) if options.draft else Guesses(model)
    base, cells = model.new_state(), []
    fill(base, options.context)
    print(f"[{time.perf_counter() - began:5.1f} s] loaded; replayed checks: {model.checks_replayed(base)}", flush=True)
    for n in map(int, options.parallel.split(",")):
        bases = [base.fork() for _ in range(n)]
        with Scheduler(model, n) as scheduler:
            run(scheduler, bases, options.steps)
            plain, _ = run(scheduler, bases, options.steps)
        for right in map(float, options.right.split(",")):
            drafts = Drafts(drafter=drafter, least_alike=NEVER)
            with Scheduler(model, n, drafts=drafts) as scheduler, imposing(right):
                run(scheduler, bases, options.steps)
                rate, per_step = run(scheduler, bases, options.steps)
                known = scheduler._drafts
            assert known is not None
            cell: dict[str, Any] = {"parallel": n, "right": right, "plain": plain, "rate": rate, "gain": rate / plain}
            cell |= {"tokens_per_step": per_step, "making_ms": {n: 1000 * s for n, s in sorted(known.making.items())}}
            cell |= {"plain_ms": {rows: 1000 * s for rows, s in sorted(known.plain.items())}}
            cell |= {"check_ms": {rows: 1000 * s for rows, s in sorted(known.checks.items())}}
            cells.append(cell)
            print(
                f"[{time.perf_counter() - began:5.1f} s] {n} replies, {right:.0%} right: {rate:.1f} tokens/s, "
                f"{plain:.1f} without drafts ({rate / plain:.2f}); {per_step:.2f} tokens a step; "
                + "".join(f"{n} drafts {1000 * s:.2f} ms; " for n, s in sorted(known.making.items()))
                + "checks "
                + ", ".join(f"{rows} rows {1000 * s:.2f} ms" for rows, s in sorted(known.checks.items())),
                flush=True,
            )
    if options.json:
        found = {"model": options.model.name, "context": options.context, "assistant": bool(options.draft)}
        options.json.write_text(json.dumps(found | {"cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
