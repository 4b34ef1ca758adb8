"""Times a whole model: loading, prompts, and decode at several contexts.

    python benchmarks/decode.py 31b [--contexts 512 2048 8192 32768] [--json OUT.json]

In: a shape of `examples/make_synthetic.py`, written to a temporary file first, or the path of a GGUF. Out: a table of
tokens a second. The state grows from context to context; each adds its prompt's rest, then `--tokens` of decode.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gemma4.config import config_from_gguf
from mlx_gemma4.doctor.verdict import MLX, usable_kernels
from mlx_gemma4.files.gguf import open_gguf
from mlx_gemma4.generation.loop import Sampling, Statistics, generate_tokens
from mlx_gemma4.loading.from_gguf import GGUFSource
from mlx_gemma4.loading.loader import load_model
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops.dispatch import Kernels

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import make_synthetic


def load(path: Path) -> Model:
    """The model alone: a synthetic file needs no tokenizer."""
    with open_gguf(path) as file:
        config = config_from_gguf(file.metadata, str(path))
        return load_model(config, GGUFSource(file), kernels=usable_kernels())[0]


def launches_a_layer(model: Model) -> float | None:
    """Kernels of one decode step, those outside the layers too, for each layer; None without kernels."""
    if model.kernels is None:
        return None
    made, inner = Counter[str](), model.kernels.launcher

    def counting(**declared: Any) -> Any:
        kernel = inner(**declared)

        def call(**arguments: Any) -> Any:
            made[declared["name"]] += 1
            return kernel(**arguments)

        return call

    counted = Model(model.config, model.weights, Kernels(counting, model.kernels.off))
    state = counted.new_state()
    mx.eval(counted.forward(mx.array([5, 6, 7, 8, 9]), state))
    made.clear()
    mx.eval(counted.forward(mx.array([5]), state))
    return made.total() / len(model.config.layers)


def run(model: Model, contexts: list[int], tokens: int) -> list[dict[str, float]]:
    """Prompt and decode rates at each context, after a warm-up."""
    rng = np.random.default_rng(0)

    def ids(n: int) -> list[int]:
        return [int(i) for i in rng.integers(model.config.vocab // 10, model.config.vocab, n)]

    greedy = Sampling(temperature=0)
    list(generate_tokens(model, model.new_state(), ids(max(contexts[:1])), greedy, 8))
    state, rows = model.new_state(), []
    for context in contexts:
        statistics = Statistics()
        list(generate_tokens(model, state, ids(context - state.length), greedy, tokens, statistics=statistics))
        row = {"context": context, "prompt tokens": statistics.prompt_tokens, "prompt": statistics.prompt_rate}
        rows.append(row | {"decode": statistics.reply_rate, "peak GB": statistics.peak_memory / 1e9})
        print("  ".join(f"{name} {value:.1f}" for name, value in rows[-1].items()), flush=True)
    return rows


def prompt_rate(model: Model, n: int) -> float:
    """Tokens a second of a prompt of n tokens from an empty state."""
    statistics = Statistics()
    ids = [int(i) for i in np.random.default_rng(1).integers(model.config.vocab // 10, model.config.vocab, n)]
    list(generate_tokens(model, model.new_state(), ids, Sampling(temperature=0), 1, statistics=statistics))
    return statistics.prompt_rate


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a GGUF, or one of " + ", ".join(make_synthetic.SHAPES))
    parser.add_argument("--contexts", type=int, nargs="*", default=[512, 2048, 8192, 32768])
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt that is timed by itself")
    parser.add_argument("--tokens", type=int, default=64, help="decoded at each context")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.model)
        result: dict[str, Any] = {"model": options.model, "mlx": MLX, "device": str(mx.device_info())}
        if options.model in make_synthetic.SHAPES:
            start, path = time.perf_counter(), Path(folder) / "synthetic.gguf"
            make_synthetic.write(options.model, path)
            print(f"wrote {path.stat().st_size / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s", flush=True)
        start = time.perf_counter()
        model = load(path)
        result |= {"GB": path.stat().st_size / 1e9, "load s": time.perf_counter() - start}
        result["launches a layer"] = launches_a_layer(model)
        print(f"loaded in {result['load s']:.1f} s, launches a layer {result['launches a layer']}", flush=True)
        result["rows"] = run(model, options.contexts, options.tokens)
        result["prompt rate"] = prompt_rate(model, options.prompt)
        print(f"prompt of {options.prompt}: {result['prompt rate']:.0f} tokens/s", flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
