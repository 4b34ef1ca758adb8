"""Measures the time to the first token of a long prompt whose end changed, and a decode step as the state grows.

    python benchmarks/prefix.py [--model FILE] [--tokens 20000] [--changed 22]

Cold and reused run in one process, in turns. The built-in model by default, on random tokens: what they say does
not matter for the time. Memory is MLX's own count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_gemma4 import load
from mlx_gemma4.doctor.verdict import MLX
from mlx_gemma4.execution import execution
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.generation.prefix import PrefixCache
from mlx_gemma4.generation.sampling import Sampling
from mlx_gemma4.kv.state import KVState
from mlx_gemma4.model.model import Model

GREEDY = Sampling(temperature=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a GGUF; the built-in one by default")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--changed", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    loaded = load(args.model).model
    model = Model(replace(loaded.config, context=max(loaded.config.context, 2 * args.tokens)), loaded.weights)
    print(f"{args.model or 'built-in model'}, window {model.config.window}, {mx.default_device()}, MLX {MLX}")
    prefix(model, args.tokens, args.changed, args.rounds)
    decode(model, args.tokens)


def prefix(model: Model, tokens: int, changed: int, rounds: int) -> None:
    """The first token, cold and from what the store holds. The kept state has a reply of 100 tokens at its end."""
    prompt = random_tokens(model, tokens, 0)
    store = PrefixCache(model)
    with store.lease(prompt, 100) as (state, _):
        for _ in generate_tokens(model, state, prompt, GREEDY, 100, turn_ends=frozenset()):
            pass
    cold, reused = [], []
    for seed in range(1, rounds + 1):
        other = prompt[:-changed] + random_tokens(model, changed, seed)
        cold.append(first_token(model, model.new_state(), other))
        start = time.perf_counter()
        state, n = store.take(other, 1)
        took = time.perf_counter() - start
        reused.append(took + first_token(model, state, other[n:]))
        state.close()
    a, b = statistics.median(cold), statistics.median(reused)
    print(f"first token of {tokens} tokens, {changed} changed, median of {rounds}:")
    print(f"  cold {a:.3f} s, reused {b:.4f} s ({n} tokens were there): {100 * b / a:.2f}%")


def first_token(model: Model, state: KVState, prompt: list[int]) -> float:
    start = time.perf_counter()
    next(generate_tokens(model, state, prompt, GREEDY, 1))
    return time.perf_counter() - start


def decode(model: Model, tokens: int) -> None:
    """Steps, pipelined, at several lengths: time, memory beyond what was held before, bytes of segments written."""
    print("decode, 256 steps each:   median ms   slowest ms   held KV MB   most extra memory of a step MB")
    for length in sorted({512, tokens // 4, tokens}):
        state = model.new_state()
        for _ in generate_tokens(model, state, random_tokens(model, length, 9), GREEDY, 1):
            pass
        mx.clear_cache()
        times, extra = [], []
        with execution():
            token = mx.array([5])
            for _ in range(256):
                mx.reset_peak_memory()
                before, start = mx.get_active_memory(), time.perf_counter()
                following = mx.argmax(model.forward(token, state))[None]
                mx.async_eval(following)
                mx.eval(token)
                token = following
                times.append(time.perf_counter() - start)
                extra.append(mx.get_peak_memory() - before)
            mx.eval(token)
        row = 1e3 * statistics.median(times), 1e3 * max(times), state.nbytes / 1e6, max(extra) / 1e6
        print("  at {:6d}               {:9.2f}    {:9.2f}    {:9.2f}    {:9.2f}".format(length, *row))


def random_tokens(model: Model, n: int, seed: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(200, model.config.vocab, n)]


if __name__ == "__main__":
    main()
