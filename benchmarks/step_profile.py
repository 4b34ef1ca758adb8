"""Profiles a decode step on an NVIDIA GPU: the time of each kernel, and how long the GPU waits between kernels.

    python benchmarks/step_profile.py MODEL.gguf [--depths 512,2048] [--kv full] [--parallel 1] [--json OUT.json]

In: a GGUF (speed alone counts: one of `examples/make_synthetic.py` will do). Out: for each depth a table of
microseconds a token by kernel and launch size, from CUPTI's records (PyTorch's profiler, which must be installed),
and what they add up to beside the time from the first to the last. Random keys and values fill the depths.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.generation.sampling import Sampling
from mlx_gemma4.kv.state import KVState
from mlx_gemma4.measure.bench import fill, load_subject
from mlx_gemma4.model.model import Model

WARM, STEPS = 12, 16


def steps(model: Model, state: KVState, n: int) -> None:
    """Decode n tokens, each step scheduled while the one before runs, as `generate` does."""
    for _ in generate_tokens(model, state, [7], Sampling(temperature=0), n + 1):
        pass


def batches(model: Model, states: list[KVState], n: int) -> None:
    """Decode n tokens of each state, all in one step."""
    step = model.batch([7] * len(states), states)
    for _ in range(n):
        before, step = step, model.batch(step, states)
        before.tokens()
    step.tokens()


def records(model: Model, base: KVState, parallel: int) -> list[dict[str, Any]]:
    """CUPTI's records of some steps' kernels, in the order they ran."""
    forks = [base.fork() for _ in range(parallel)]

    def run(n: int) -> None:
        if parallel == 1:
            steps(model, forks[0], n)
        else:
            batches(model, forks, n)

    run(WARM)
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        run(STEPS)
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        p.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    return sorted((e for e in events if e.get("cat") == "kernel"), key=lambda e: e["ts"])


def summary(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Microseconds a token: of each kernel, of all, between the first and the last, and with none running."""
    by: dict[tuple[str, str], list[float]] = defaultdict(list)
    idle, end = 0.0, events[0]["ts"]
    for e in events:
        name = re.sub(r"_[0-9a-f]{12}$", "", e["name"].split("(")[0].split("<")[0])[-40:]
        by[name, "x".join(map(str, e["args"]["grid"]))].append(e["dur"])
        idle += max(0.0, e["ts"] - end)
        end = max(end, e["ts"] + e["dur"])
    rows: list[dict[str, Any]] = [
        {"kernel": name, "grid": grid, "launches": len(d) / STEPS, "us each": sum(d) / len(d), "us": sum(d) / STEPS}
        for (name, grid), d in by.items()
    ]
    rows.sort(key=lambda row: -row["us"])
    whole = (end - events[0]["ts"]) / STEPS
    return {"rows": rows, "kernels us": sum(r["us"] for r in rows), "whole us": whole, "idle us": idle / STEPS}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--depths", default="512,2048")
    parser.add_argument("--kv", default="full")
    parser.add_argument("--parallel", type=int, default=1, help="replies in a step")
    parser.add_argument("--rows", type=int, default=24, help="printed a depth")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.cuda.init()
    subject = load_subject(options.model)
    state, found = subject.model.new_state(kv=options.kv), {}
    for depth in map(int, options.depths.split(",")):
        fill(state, depth)
        found[depth] = s = summary(records(subject.model, state, options.parallel))
        print(f"{subject.name} at {depth}: {s['whole us']:.0f} us a step, kernels {s['kernels us']:.0f}, ", end="")
        print(f"no kernel {s['idle us']:.0f}; launches {sum(r['launches'] for r in s['rows']):.0f}")
        for r in s["rows"][: options.rows]:
            print(
                f"{r['us']:8.0f} us {r['launches']:6.1f} x {r['us each']:6.1f}  {r['kernel']} {r['grid']}", flush=True
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
