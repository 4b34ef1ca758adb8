"""Does `mlx-gemma4 tune` find what suits a GPU that its table knows nothing about?

    python3 benchmarks/tune.py FILE.gguf [--json OUT] [--depths 512,8192] [--cores 10]

In: a model. Out: decode speed in tokens/s behind each depth with the table's numbers for this GPU, with those of an
Apple GPU of so many cores, with what `tune` finds from there, and with the table's again; JSON with these, with the
share of the table's speed that tuning reaches (of the mean before and after), and with what it measured. The exit code
is 1 if that is under 97%. What is found is not kept.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from mlx_gemma4.doctor.ready import make_ready
from mlx_gemma4.doctor.verdict import MLX, device_name, usable_kernels
from mlx_gemma4.measure.bench import BenchPlan, cells_of, load_subject, measure
from mlx_gemma4.measure.tune import lines, tune
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops import tuning
from mlx_gemma4.ops.tuning import Tuning, apple, row_of_this_gpu

ENOUGH = 0.97


def speeds(model: Model, plan: BenchPlan, used: Tuning, title: str) -> dict[int, float]:
    """Return tokens per second behind each depth, the median of several replies."""
    tuning.use(used)
    fresh = Model(model.config, model.weights, model.kernels)
    make_ready(fresh)
    found = {c.context: c.rate for c in measure(fresh, plan, cells_of(plan), plan.repetitions)}
    print(title, *(f"{rate:.1f} tokens/s at {depth}" for depth, rate in found.items()), sep=", ", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--depths", type=lambda text: tuple(map(int, text.split(","))), default=(512, 8192))
    parser.add_argument("--cores", type=int, default=10)
    parser.add_argument("--reply", type=int, default=128)
    options = parser.parse_args()
    if usable_kernels() is None:
        print("no GPU: the kernels run on Metal, or on NVIDIA with MLX's cuda extra", file=sys.stderr)
        return 2
    model = load_subject(options.file).model
    plan = BenchPlan((), options.depths, options.reply)
    table = row_of_this_gpu()
    # As on a Mac but for prompts, which are another matter.
    small = replace(apple(options.cores), prompt_attention=table.prompt_attention)
    first = speeds(model, plan, table, "the table's")
    guessed = speeds(model, plan, small, f"{options.cores} cores of Apple's")
    tuning.use(small)
    start = time.perf_counter()
    found, kinds = tune(model, small)
    seconds = time.perf_counter() - start
    for line in lines(kinds, f"{device_name()}, {options.file.name}"):
        print(line, flush=True)
    tuned = speeds(model, plan, found, "tuned")
    last = speeds(model, plan, table, "the table's again")
    shares = {n: 2 * tuned[n] / (first[n] + last[n]) for n in plan.depths}
    figures: dict[str, Any] = {
        "chip": device_name(),
        "mlx": MLX,
        "file": options.file.name,
        "tuning_seconds": round(seconds, 1),
        "tokens_per_second": {"table": first, "guess": guessed, "tuned": tuned, "table again": last},
        "share_of_the_tables": {n: round(share, 4) for n, share in shares.items()},
        "numbers": {name: n for name, n in asdict(replace(found, tilings={})).items() if name != "tilings"},
        "tilings": {" ".join(map(str, key)): asdict(t) for key, t in found.tilings.items()},
        "launches": [
            {n: getattr(k, n) for n in ("name", "count", "before", "after", "found")}
            for k in kinds
            if not math.isnan(k.after)  # others' turn never came
        ],
    }
    text = json.dumps(figures, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)
    return int(min(shares.values()) < ENOUGH)


if __name__ == "__main__":
    sys.exit(main())
