"""Measures load, first token, prefill and decode of a model, beside llama.cpp on the same file and machine.

    python benchmarks/cpu.py [MODEL.gguf ...] [--llama-bench PATH]

Without a model: the built-in one. Each figure is the median of several runs, each load in a process of its own.
Prints one table, machine, versions and date above it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

RUNS = 3
PROMPT, REPLY = 512, 64  # tokens, as llama-bench is told too

# Runs in a process of its own: its start is a cold start, its peak is the load's.
CHILD = """
import json, sys, time
import mlx_gemma4.cli  # as the command does: it keeps numpy's BLAS to one thread
start = time.perf_counter()
import mlx_gemma4
from mlx_gemma4.generation.decoding import Statistics
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.generation.sampling import Sampling
path, prompt, reply = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
lm = mlx_gemma4.load(path)
load = time.perf_counter() - start
first = next(iter(generate_tokens(lm.model, lm.model.new_state(), [lm.tokenizer.bos_id], Sampling(temperature=0), 2)))
first = time.perf_counter() - start
ids = [lm.tokenizer.bos_id] + [1000 + i % 500 for i in range(prompt - 1)]
s, cpu = Statistics(), []
for _ in generate_tokens(lm.model, lm.model.new_state(), ids, Sampling(temperature=0), reply, statistics=s):
    cpu.append(time.process_time())
cpu = 1e3 * (cpu[-1] - cpu[0]) / (len(cpu) - 1)
print(json.dumps({"load": load, "first": first, "prefill": s.prompt_rate, "decode": s.reply_rate, "cpu": cpu}))
"""


def ours(path: Path) -> dict[str, float]:
    """Medians over RUNS of seconds to load and to a first token, tokens a second, and CPU ms a token of the reply."""
    runs = []
    for _ in range(RUNS):
        command = [sys.executable, "-c", CHILD, str(path), str(PROMPT), str(REPLY)]
        runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def llama_cpp(path: Path, program: Path) -> dict[str, float]:
    """llama-bench's tokens a second for the same prompt and reply lengths."""
    command = [program, "-m", path, "-p", str(PROMPT), "-n", str(REPLY), "-r", str(RUNS), "-o", "json"]
    out = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout
    rates = {"prefill" if row["n_prompt"] else "decode": row["avg_ts"] for row in json.loads(out)}
    start = time.perf_counter()
    subprocess.run([str(program), "-m", str(path), "-p", "0", "-n", "1", "-r", "1"], check=True, capture_output=True)
    return {**rates, "first": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's llama-bench, to run beside ours")
    args = parser.parse_args()
    from mlx_gemma4.conversation.language_model import demo_path

    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, MLX {version('mlx')}, ",
        end="",
    )
    print(f"{datetime.date.today()}; prompt {PROMPT} tokens, reply {REPLY}, median of {RUNS}")
    rates = f"{'prefill tok/s':>14} {'decode tok/s':>13} {'CPU ms':>7}"
    print(f"{'model':28} {'program':11} {'load s':>7} {'first token s':>14} {rates}")
    for path in args.models or [demo_path()]:
        rows = {"mlx-gemma4": ours(path)}
        if args.llama_bench:
            rows["llama.cpp"] = llama_cpp(path, args.llama_bench)
        for program, row in rows.items():
            load = f"{row['load']:7.2f}" if "load" in row else f"{'-':>7}"
            rates = f"{row['first']:14.2f} {row['prefill']:14.1f} {row['decode']:13.1f}"
            cpu = f"{row['cpu']:7.1f}" if "cpu" in row else f"{'-':>7}"
            print(f"{path.name[:28]:28} {program:11} {load} {rates} {cpu}")


if __name__ == "__main__":
    main()
