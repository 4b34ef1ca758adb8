"""Measures how fast several replies are made at once, and holds each one's tokens to those of its solo run.

    python benchmarks/batch.py [FILE.gguf] [--parallel 1,2,4,8,16,32] [--prompt 512] [--steps 64] [--json OUT]

Without a file: the built-in model. Prompts are random ids, replies greedy, warmed, of full length. A row's tokens equal
its solo run's, or differ first where the solo run's logits nearly tie; the exit code is 1 if not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import mlx_gemma4
from mlx_gemma4.kv.state import KVState
from mlx_gemma4.measure.bench import load_subject
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops import tuning

WARM = 8  # steps before those that are measured
TIE = 0.02  # between logits, of their spread: what rounding may turn round


def together(model: Model, states: list[KVState], first: list[int], steps: int) -> tuple[list[list[int]], float]:
    """Return each state's greedy tokens, [B][WARM + steps], and the seconds that all but the first WARM took."""
    tokens, found, start = first, [], 0.0
    started: list[Any] = []  # each step is started with the one before, whose tokens the host does not know yet
    for n in range(WARM + steps):
        if n == WARM:
            found += [step.tokens() for step in started]
            started, start = [], time.perf_counter()
        started.append(model.batch(started[-1] if started else tokens if n == 0 else found[-1], states))
        if len(started) > 1:
            found.append(started.pop(0).tokens())
    found += [step.tokens() for step in started]
    return [list(row) for row in zip(*found, strict=True)], time.perf_counter() - start


def alone(model: Model, state: KVState, first: int, steps: int) -> tuple[list[int], float]:
    """Return a state's greedy tokens, [WARM + steps], and the seconds that all but the first WARM took."""
    step, found, start = model.step(first, state), [], 0.0
    for n in range(WARM + steps):
        if n == WARM:
            start = time.perf_counter()
        before, step = step, model.step(step, state)
        found.append(before.token())
    return found, time.perf_counter() - start


def gap(model: Model, prompt: KVState, first: int, solo: list[int], row: list[int]) -> float:
    """How far apart the logits were where two runs first differ, as a share of their spread; 0: they are the same."""
    at = next((i for i, (a, b) in enumerate(zip(solo, row, strict=True)) if a != b), None)
    if at is None:
        return 0.0
    logits = np.array(model.forward(mx.array([first, *solo[:at]], mx.int32), prompt.fork()))
    return float(abs(logits[solo[at]] - logits[row[at]]) / logits.std())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", default=None)
    parser.add_argument("--parallel", default="1,2,4,8,16,32")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--tuning", nargs="*", default=[], help="NUMBER=VALUE, of `ops.tuning.Tuning`, for a try")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = load_subject(options.file).model if options.file else mlx_gemma4.load().model
    changed: Any = {name: int(value) for name, value in (given.split("=") for given in options.tuning)}
    tuning.use(replace(tuning.this_gpu(), **changed))
    chance = np.random.default_rng(0)
    sizes = [int(n) for n in options.parallel.split(",")]
    prompts, first = [], [int(i) for i in chance.integers(3, model.config.vocab, max(sizes))]
    for _ in range(max(sizes)):
        prompts.append(model.new_state())
        model.prefill(mx.array(chance.integers(3, model.config.vocab, options.prompt)), prompts[-1])
        mx.eval(prompts[-1].arrays)
    solo = [alone(model, p.fork(), t, options.steps) for p, t in zip(prompts, first, strict=True)]
    single = options.steps * len(solo) / sum(seconds for _, seconds in solo)
    print(f"{'replies':>8} {'tokens/s':>9} {'one after another':>18} {'rows that differ':>17} {'largest gap':>12}")
    cells, worst = [], 0.0
    for n in sizes:
        states = [p.fork() for p in prompts[:n]]
        rows, seconds = together(model, states, first[:n], options.steps)
        gaps = [gap(model, *each) for each in zip(prompts, first, (tokens for tokens, _ in solo), rows, strict=False)]
        rate, differ = n * options.steps / seconds, sum(g > 0 for g in gaps)
        print(f"{n:8} {rate:9.1f} {single:18.1f} {differ:17} {max(gaps):12.4f}", flush=True)
        cells.append({"parallel": n, "rate": rate, "alone": single, "differ": differ, "gap": max(gaps)})
        worst = max(worst, *gaps)
        for state in states:
            state.close()
    if options.json:
        figures = {"model": str(options.file or "demo"), "prompt": options.prompt, "cells": cells}
        options.json.write_text(json.dumps(figures))
    return int(worst > TIE)


if __name__ == "__main__":
    sys.exit(main())
