"""Measures what sampling costs: decoding speed with several settings beside greedy, taking turns in one process.

    python benchmarks/sampling.py [MODEL.gguf] [--depth 512] [--tokens 256] [--rounds 5] [--quick] [--json OUT.json]

In: a GGUF (speed alone counts: one of `examples/make_synthetic.py` will do); without one, the built-in model. Out: for
each kind of sampling the median tokens a second, and its share of greedy's. Random keys and values fill the depth.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

from mlx_gemma4.conversation.language_model import demo_path
from mlx_gemma4.generation.decoding import Statistics
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.generation.sampling import Sampling
from mlx_gemma4.kv.state import KVState
from mlx_gemma4.measure.bench import fill, load_subject
from mlx_gemma4.model.model import Model

KINDS = {
    "greedy": Sampling(temperature=0),
    "default": Sampling(temperature=1, top_k=64, top_p=0.95),
    "temperature only": Sampling(temperature=1),
    "top-p only": Sampling(temperature=1, top_p=0.95),
    "default, repetition penalty": Sampling(temperature=1, top_k=64, top_p=0.95, repetition_penalty=1.1),
}


def rate(model: Model, base: KVState, sampling: Sampling, tokens: int) -> float:
    """Decode behind `base`, as `generate` does. Return tokens a second."""
    statistics = Statistics()
    for _ in generate_tokens(model, base.fork(), [7], sampling, tokens + 1, statistics=statistics):
        pass
    return statistics.reply_rate


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", default=demo_path())
    parser.add_argument("--depth", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="greedy and the default alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    kinds = {name: KINDS[name] for name in ("greedy", "default")} if options.quick else KINDS
    subject = load_subject(options.model)
    depth = min(options.depth, subject.model.config.context - options.tokens - 2)
    state = subject.model.new_state()
    fill(state, depth)
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for round_ in range(options.rounds + 1):  # the first warms up
        for name, sampling in kinds.items():
            found = rate(subject.model, state, sampling, options.tokens)
            if round_:
                rates[name].append(found)
    medians = {name: median(found) for name, found in rates.items()}
    print(f"{subject.name} at {depth}, replies of {options.tokens} tokens, median of {options.rounds}")
    for name, speed in medians.items():
        print(f"{speed:10.1f} tokens/s {speed / medians['greedy']:7.1%}  {name}")
    if options.json:
        cells = [
            {"model": subject.name, "depth": depth, "sampling": name, "median": medians[name], "rates": rates[name]}
            for name in kinds
        ]
        options.json.write_text(json.dumps(cells, indent=1))


if __name__ == "__main__":
    main()
