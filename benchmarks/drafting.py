"""Measures what drafts bring on this machine, beside plain decode in the same run, in about a minute.

    python benchmarks/drafting.py FILE.gguf [--draft ASSISTANT.gguf] [--context 512] [--steps 96] [--json OUT]

Prints plain tokens a second; what a check of 1 to 8 rows and drafts of the assistant take, as the host sees them and on
the device, where steps are recorded; by depth the tokens a second for shares of drafts that are right, and the gap of a
cycle: its time less that of its draft and check on the device; whole replies with depth by measurement; and one that
repeats a passage of 500 tokens of its prompt. Without an assistant drafts cost nothing, as those of repetition.

Random weights agree with no draft, so what is right is imposed: by depth and where "70% right", on the checks; where
"70% known", on drafts that the host makes, and these replies must be those without drafts; for the passage, on all
tokens: what is measured there are the steps of a reply whose repetitions are right. Random weights also leave the best
two tokens close together at every second place, where a trained model's are at one of fifty, and such places
are decided by a step of their own: not here.
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

import numpy as np

from mlx_gemma4.generation import drafting
from mlx_gemma4.generation.decoding import Decoding, Statistics
from mlx_gemma4.generation.drafting import MOST, Check, Drafter, Drafts, Hidden
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.generation.sampling import Sample, Sampling, Token
from mlx_gemma4.kv.state import KVState
from mlx_gemma4.loading.assistant import load_assistant
from mlx_gemma4.measure.bench import fill, load_subject, random_ids
from mlx_gemma4.measure.draft_bench import checked, run_steps
from mlx_gemma4.model.model import Model
from mlx_gemma4.model.step import known
from mlx_gemma4.ops.sample import Draw

GREEDY = Sampling(temperature=0)
SHARES = (0.5, 0.7, 0.9)
PASSAGE, SEEN = 500, 17  # tokens that are repeated, and how many of them the prompt ends with


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

    def queue(self, *_: Any) -> None:
        """The host knows these."""


class Starts:
    """The latest starts of players of recorded steps, to be repeated."""

    def __init__(self, model: Model) -> None:
        self._latest: dict[Any, np.ndarray] = {}
        player: Any = model.kernels and model.kernels.player
        if player:
            real = player.start

            def start(this: Any, numbers: np.ndarray, *more: Any) -> int:
                self._latest.pop(this, None)
                self._latest[this] = numbers
                return int(real(this, numbers, *more))

            player.start = start

    def on_device(self, players: int, times: int = 16) -> float:
        """Return the seconds that the latest starts of so many players take together, the host being ahead; or 0."""
        found = 0.0
        for player, numbers in [*self._latest.items()][-players:]:
            player.start(numbers, False)
            player.wait()
            start = time.perf_counter()
            for _ in range(times):
                player.start(numbers, False)
            player.wait()
            found += (time.perf_counter() - start) / times
        return found


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


def imposed(right: float) -> Callable[[Check, Sequence[int]], tuple[int, int]]:
    """Return a `Check.taken` that finds each draft right with a probability, if those before it were."""
    chance = random.Random(0)

    def taken(self: Check, tokens: Sequence[int]) -> tuple[int, int]:
        n, drafts = 0, self.drafts.known()
        while n < len(drafts) and chance.random() < right:
            n += 1
        return n, n + 1

    return taken


def repeating(model: Model, base: KVState) -> tuple[float, float, float]:
    """Return tokens a second of a reply that repeats a passage, without and with drafts, and tokens a step then."""
    passage = random_ids(model, PASSAGE, 1)
    prompt, n = passage + passage[:SEEN], PASSAGE - SEEN - MOST - 1
    coming, real = [*base.tokens, *passage, *passage], Check.tokens

    def receive(self: Decoding, chosen: Any) -> Token:
        known(chosen.token if isinstance(chosen, Sample) else chosen)
        token = Token(coming[len(self.ids)])
        self.count(token)
        return token

    def tokens(self: Check) -> list[Token]:
        return [Token(token) for token in coming[self.before + 1 :][: len(real(self))]]

    with patch.object(Decoding, "receive", receive), patch.object(Check, "tokens", tokens):
        _, plain = reply(model, base, prompt, n, None)
        drafts = Drafts()
        for _ in range(2):
            made, s = reply(model, base, prompt, n, drafts)
    assert made == passage[SEEN:][:n]
    return plain.reply_rate, s.reply_rate, s.tokens_per_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=96, help="tokens of each measured run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    began, drafting.NEAR = time.perf_counter(), -1.0

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:5.1f} s] {text}", flush=True)

    model = load_subject(options.model).model
    starts = Starts(model)
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

    found["checks"], found["checks_on_device"] = {}, {}
    for rows in (1, 2, 4, 8):
        took = seconds(lambda rows=rows: check(rows))  # type: ignore[misc]
        device = starts.on_device(1)
        found["checks"][rows], found["checks_on_device"][rows] = took / one, device / one
        say(
            f"check of {rows} rows: {1000 * took:.2f} ms, {took / one:.2f} plain steps; on the device "
            f"{1000 * device:.2f} ms, {device / one:.2f}"
        )
    if drafter is not None:
        found["assistant_ms"], found["assistant_ms_on_device"], tokens = {}, {}, [*state.tokens, 5]
        for count in (1, 3, 7):
            check(4)
            took = seconds(lambda count=count: drafter.draft(tokens, state, rows_after[4](3), count))  # type: ignore[misc]
            device = starts.on_device(1)
            found["assistant_ms"][count], found["assistant_ms_on_device"][count] = 1000 * took, 1000 * device
            say(f"{count} drafts of the assistant: {1000 * took:.2f} ms, on the device {1000 * device:.2f} ms")
    state.close()

    found["depths"], found["gap_ms"] = {}, {}
    say("tokens/s by depth and share of right drafts (over plain): " + "  ".join(f"{s:.0%}" for s in SHARES))
    for depth in range(1, MOST + 1):
        run_steps(model, base.fork(), drafter, depth, 1.0, 3 * depth)
        rates, cycles = [], []
        for share in SHARES:
            state = base.fork()
            run_steps(model, state, drafter, depth, share, 2)  # it joins the pool, where it stays
            made, steps, took = run_steps(model, state, drafter, depth, share, options.steps)
            rates.append(made / took)
            cycles.append(1000 * took / steps)
        device = 1000 * starts.on_device(1 if drafter is None else 2)
        found["depths"][depth], found["gap_ms"][depth] = rates, cycles[0] - device
        say(
            f"depth {depth}: "
            + "  ".join(f"{rate:6.1f} ({rate * one:.2f})" for rate in rates)
            + f"; a cycle {cycles[0]:.2f} ms, on the device {device:.2f}, gap {cycles[0] - device:.3f}"
        )

    prompt, n = random_ids(model, 8), 2 * options.steps
    want, plain = reply(model, base, prompt, n, None)
    found["replies"] = {"plain": plain.reply_rate}
    say(f"a reply without drafts: {plain.reply_rate:.1f} tokens/s")
    whole = [*base.tokens, *prompt, *want]
    ways: list[tuple[str, Drafter, float | None]] = [
        ("as drafted", drafter or Imposed(None, whole, 0.0), None),
        ("70% right", drafter or Imposed(None, whole, 0.0), 0.7),
        ("70% known", Imposed(drafter, whole, 0.7), None),
    ]
    for name, whose, right in ways:
        drafts = Drafts(drafter=whose, least_alike=1 << 30)
        with patch.object(Check, "taken", Check.taken if right is None else imposed(right)):
            for _ in range(2):  # recordings, and what is learned, are the first one's
                got, s = reply(model, base, prompt, n, drafts)
        first = next((i for i in range(n) if got[i] != want[i]), n)
        same = "" if right else ", tokens equal" if first == n else f", tokens differ from {first} on"
        found["replies"][name] = s.reply_rate
        say(
            f"drafts {name}, depth by measurement: {s.reply_rate:.1f} tokens/s "
            f"({s.reply_rate / plain.reply_rate:.2f}), {s.tokens_per_step:.2f} tokens a step{same}; "
            + ", ".join(f"{rows} rows {1000 * took:.2f} ms" for rows, took in sorted(drafts.seconds.items()))
        )
    without, rate, tokens_a_step = repeating(model, base)
    found["repeating"] = {"plain": without, "drafts": rate, "tokens_per_step": tokens_a_step}
    say(
        f"a passage of {PASSAGE} tokens repeated: {without:.1f} tokens/s without drafts, {rate:.1f} with "
        f"({rate / without:.2f}), {tokens_a_step:.2f} tokens a step"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    say("done")


if __name__ == "__main__":
    main()
