"""Measures what drafts bring on this machine, beside plain decode in the same run, in about a minute.

    python benchmarks/drafting.py FILE.gguf [--draft ASSISTANT.gguf] [--context 512] [--steps 96] [--json OUT]

Prints plain tokens a second, what a check of 2, 4, 8 rows costs in plain steps, what a draft of the assistant's takes,
tokens a second by depth and by the share of drafts that are right (imposed), and whole replies with depth by
measurement: all drafts wrong, and 70% right. Without an assistant drafts cost nothing, as those of repetition. Random
weights leave the best two tokens close together at every second place, where a trained model's are at one of fifty, and
such places are decided by a step of their own: whole replies here are made without that, and once with it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from mlx_gemma4.generation import drafting
from mlx_gemma4.generation.decoding import Statistics
from mlx_gemma4.generation.drafting import MOST, Drafter, Drafts, Hidden
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.generation.sampling import Sampling
from mlx_gemma4.kv.state import KVState
from mlx_gemma4.loading.assistant import load_assistant
from mlx_gemma4.measure.bench import fill, load_subject, random_ids
from mlx_gemma4.measure.draft_bench import checked, run_steps
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops.sample import Draw

GREEDY = Sampling(temperature=0)
SHARES = (0.0, 0.3, 0.5, 0.7, 0.9)


class Imposed:
    """Drafts as an assistant does, in its time, and then says what comes with a probability."""

    needs_hidden = True

    def __init__(self, drafter: Drafter | None, coming: Sequence[int], right: float) -> None:
        self.drafter, self.coming, self.right, self.chance = drafter, [*coming], right, random.Random(0)

    def draft(
        self, tokens: Sequence[int], state: KVState, hidden: Hidden | None, count: int, draws: Sequence[Draw] = ()
    ) -> list[int]:
        if self.drafter is not None and not self.drafter.draft(tokens, state, hidden, count, draws):
            return []
        following = self.coming[len(tokens) : len(tokens) + count]
        return [t if self.chance.random() < self.right else (t + 1) % 1000 + 3 for t in following]


def seconds(do: Callable[[], Any], times: int = 16) -> float:
    """Return the median time of several runs, after three."""
    found = []
    for n in range(times + 3):
        start = time.perf_counter()
        do()
        found += [time.perf_counter() - start] * (n > 2)
    return median(found)


def plain_steps(model: Model, state: KVState, n: int) -> float:
    """Return the seconds of a step, each started with the one before."""
    step = model.step(5, state)
    for i in range(n + 8):
        if i == 8:
            start = time.perf_counter()
        following = model.step(step, state)
        step.token()
        step = following
    took = (time.perf_counter() - start) / n
    step.token()
    return took


def reply(
    model: Model, base: KVState, prompt: list[int], n: int, drafts: Drafts | None
) -> tuple[list[int], Statistics]:
    s, state = Statistics(), base.fork()
    made = [t.id for t in generate_tokens(model, state, prompt, GREEDY, n, statistics=s, drafts=drafts)]
    return made, s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=96, help="tokens of each measured run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:5.1f} s] {text}", flush=True)

    model = load_subject(options.model).model
    drafter = load_assistant(options.draft, model) if options.draft else None
    base, found = model.new_state(), dict[str, Any]()
    fill(base, options.context)
    say(f"loaded; {options.context} tokens of context; replayed checks: {model.checks_replayed(base)}")
    replayer = base.fork()
    one = plain_steps(model, replayer, options.steps)
    replayer.close()
    found["plain"] = {"tokens_per_second": 1 / one}
    say(f"plain decode: {1 / one:.1f} tokens/s ({1000 * one:.2f} ms a step)")

    state = base.fork()
    model.seat(state)
    start = time.perf_counter()
    pooled = plain_steps(model, state, options.steps)
    found["pooled"] = 1 / pooled
    say(f"plain decode over pages: {1 / pooled:.1f} tokens/s; recorded in {time.perf_counter() - start:.2f} s in all")

    length, rows_after = state.length, dict[int, Any]()

    def check(rows: int) -> None:
        rows_after[rows] = checked(model, random_ids(model, rows), state)
        state.rewind(length)

    found["checks"] = {}
    for rows in (1, 2, 3, 4, 6, 8):
        took = seconds(lambda rows=rows: check(rows))  # type: ignore[misc]
        found["checks"][rows] = took / one
        say(f"check of {rows} rows: {1000 * took:.2f} ms, {took / one:.2f} plain steps")
    if drafter is not None:
        found["assistant_ms"], tokens = {}, [*state.tokens, 5]
        for count in (1, 3, 7):
            check(4)
            took = seconds(lambda count=count: drafter.draft(tokens, state, rows_after[4](3), count))  # type: ignore[misc]
            found["assistant_ms"][count] = 1000 * took / count
            say(f"{count} drafts of the assistant: {1000 * took:.2f} ms, {1000 * took / count:.3f} ms each")
    state.close()

    found["depths"] = {}
    say("tokens/s by depth and share of right drafts (over plain): " + "  ".join(f"{s:.0%}" for s in SHARES))
    for depth in range(1, MOST + 1):
        run_steps(model, base.fork(), drafter, depth, 1.0, 3 * depth)
        rates = []
        for share in SHARES:
            made, _, took = run_steps(model, base.fork(), drafter, depth, share, options.steps)
            rates.append(made / took)
        found["depths"][depth] = rates
        say(f"depth {depth}: " + "  ".join(f"{rate:6.1f} ({rate * one:.2f})" for rate in rates))

    prompt, n = random_ids(model, 8), 2 * options.steps
    want, plain = reply(model, base, prompt, n, None)
    found["replies"] = {"plain": plain.reply_rate}
    say(f"a reply without drafts: {plain.reply_rate:.1f} tokens/s")
    for right, near in ((0.0, 0.0), (0.7, 0.0), (0.7, drafting.NEAR)):
        drafts = Drafts(drafter=Imposed(drafter, [*base.tokens, *prompt, *want], right), least_alike=1 << 30)
        with patch.object(drafting, "NEAR", near):
            for _ in range(2):  # recordings, and what is learned, are the first one's
                got, s = reply(model, base, prompt, n, drafts)
        same = "equal" if got == want else f"differs from token {next(i for i in range(n) if got[i] != want[i])}"
        found["replies"][f"{right}, near {near}"] = s.reply_rate
        say(
            f"drafts {right:.0%} right, near {near}, depth by measurement: {s.reply_rate:.1f} tokens/s "
            f"({s.reply_rate / plain.reply_rate:.2f}), {s.tokens_per_step:.2f} tokens a step, {same}; "
            + ", ".join(f"{rows} rows {1000 * took:.2f} ms" for rows, took in sorted(drafts.seconds.items()))
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    say("done")


if __name__ == "__main__":
    main()
