"""Times a process from its start to a model's first token, ours and llama.cpp's, with the file cached and not.

    python benchmarks/loading.py FILE.gguf [--vs LLAMA-BENCH] [--repetitions 3] [--json OUT]
    python benchmarks/loading.py FILE.gguf --piece 64 --copy 4 --threads 16   # other numbers than the program's

Each run is a process of its own, the programs in turns: load the file onto the GPU, read a token, choose the next, end.
"Not cached": the system was told to let go of the file's pages, and how many it kept is shown; it keeps those of a file
in memory (tmpfs), and there is nothing to measure then. Times are of the clock on the wall, medians; ours tells besides
how much of it was loading, and where each of the fastest run's seconds went: `PARTS`. The tokenizer, which no other
part waits for here, is made at the end where the file has one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mlx_gemma4.doctor.verdict import MLX, device_name
from mlx_gemma4.measure.llama_bench import read_row

# What is timed in a process of ours, by name: what it is, and the function, if it is one. Those that call another of
# the list don't count its time.
PARTS = {
    "start": "Python and the imports",
    "gpu": "MLX's first use of the GPU",
    "open": ("the header", "loading.loader:open_gguf"),
    "copy": ("the file's bytes to where a kernel reads them", "ops.pack:copied"),
    "pack": ("the rest of packing", "ops.pack:pack_on_gpu"),
    "read": ("other tensors", "loading.from_gguf:GGUFSource.read"),
    "load": ("the rest of loading: accounting, memory's plan", "measure.bench:load_model"),
    "compile": ("kernels that are not on disk, and finding those that are", "gpu.cuda_compiler:compile_all"),
    "texts": ("what to compile", "doctor.ready:cuda_texts"),
    "check": ("kernels without a verdict", "doctor.verdict:check_model"),
    "warm": ("a first prompt and step", "doctor.ready:read_some"),
    "token": "the prompt of one token",
    "tokenizer": "the vocabulary",
}
OURS = """
import importlib, json, sys, time
from functools import wraps
from pathlib import Path
parts, under_way = dict.fromkeys(json.loads(sys.argv[3]), 0.0), []

def timed(name, function):
    @wraps(function)
    def call(*arguments, **named):
        begun = time.perf_counter()
        under_way.append(0.0)
        try:
            return function(*arguments, **named)
        finally:
            took, inside = time.perf_counter() - begun, under_way.pop()
            parts[name] += took - inside
            if under_way:
                under_way[-1] += took
    return call

import mlx.core as mx
from mlx_gemma4.files.gguf import open_gguf
from mlx_gemma4.measure import bench
from mlx_gemma4.tokens.tokenizer import Tokenizer
for name, where in json.loads(sys.argv[3]).items():
    if not isinstance(where, str):
        module, _, path = where[1].partition(":")
        owner, (*inner, function) = importlib.import_module("mlx_gemma4." + module), path.split(".")
        for within in inner:
            owner = getattr(owner, within)
        setattr(owner, function, timed(name, getattr(owner, function)))
from mlx_gemma4.ops import pack
from mlx_gemma4.quant import repack
tried = json.loads(sys.argv[4])
pack.PIECE, pack.COPY = tried["piece"] or pack.PIECE, tried["copy"] or pack.COPY
repack.THREADS = tried["threads"] or repack.THREADS
parts["start"] = time.time() - float(sys.argv[2])
timed("gpu", lambda: mx.eval(mx.zeros(8) + 1))()
subject = bench.load_subject(Path(sys.argv[1]))
model = subject.model
timed("token", lambda: mx.eval(mx.argmax(model.forward(mx.array([1]), model.new_state()))))()
with open_gguf(sys.argv[1]) as gguf:
    if "tokenizer.ggml.tokens" in gguf.metadata:
        timed("tokenizer", Tokenizer.from_gguf)(gguf.metadata)
print(json.dumps({"load": subject.load_time, "parts": parts}))
"""
THEIRS = ["-p", "1", "-n", "0", "-r", "1", "--no-warmup", "-ngl", "99", "-fa", "1", "-o", "jsonl"]


def let_go(file: Path) -> None:
    """Ask the system to drop a file's pages from its cache."""
    with open(file, "rb") as f:
        os.fsync(f.fileno())  # only what is on the disk is dropped
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(file: Path) -> float:
    """The share of a file's pages that are in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(file, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        there, mapped = np.zeros(-(-len(pages) // mmap.PAGESIZE), np.uint8), np.frombuffer(pages, np.uint8)
        start, size = ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(len(pages))
        failed = libc.mincore(start, size, ctypes.c_void_p(there.ctypes.data))
        del mapped  # or the file can't be unmapped
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
        return float((there & 1).mean())


def run(command: list[str]) -> tuple[float, str]:
    """Seconds that a process takes, and what it writes. "NOW" in the command becomes the time."""
    command, start = [str(time.time()) if word == "NOW" else word for word in command], time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{command[0]} ended with code {done.returncode}: {done.stderr.strip()[-500:]}")
    return seconds, done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--vs", type=Path, help="llama.cpp's llama-bench")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--piece", type=int, default=0, help="MB of blocks that go over at once; 0: as in ops/pack.py")
    parser.add_argument("--copy", type=int, default=0, help="MB that a thread copies at once; 0: as there")
    parser.add_argument("--threads", type=int, default=0, help="that copy; 0: as in quant/repack.py")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tried = {"piece": options.piece << 20, "copy": options.copy << 20, "threads": options.threads}
    commands = {
        "mlx-gemma4": [sys.executable, "-c", OURS, str(options.file), "NOW", json.dumps(PARTS), json.dumps(tried)]
    }
    if options.vs:
        commands["llama.cpp"] = [str(options.vs), "-m", str(options.file), *THEIRS]

    size = options.file.stat().st_size
    print(f"{device_name()}, MLX {MLX}, {options.file.name}, {size / 1e9:.2f} GB")
    rows: list[dict[str, Any]] = []
    # Once for what is compiled at first use, and kept.
    outputs = {name: run(command)[1] for name, command in commands.items()}
    for cold in (True, False):
        times: dict[str, list[float]] = {name: [] for name in commands}
        loads: list[dict[str, Any]] = []
        for _ in range(options.repetitions):
            for name, command in commands.items():
                if cold:
                    let_go(options.file)
                kept = cached(options.file)
                seconds, output = run(command)
                times[name].append(seconds)
                if name == "mlx-gemma4":
                    loads.append({"seconds": seconds, **json.loads(output.splitlines()[-1])})
        row: dict[str, Any] = {"cached": round(kept, 3), "seconds": {n: round(median(t), 2) for n, t in times.items()}}
        row |= {
            "samples": {n: [round(t, 2) for t in ts] for n, ts in times.items()},
            "load_time": round(median(load["load"] for load in loads), 2),
            "parts": {name: round(s, 3) for name, s in min(loads, key=lambda load: load["seconds"])["parts"].items()},
        }
        rows.append(row)
        shown = ", ".join(f"{name} {median(t):.2f} s" for name, t in times.items())
        print(f"{kept:4.0%} of the file cached: {shown}; loading {row['load_time']:.2f} s of ours")
        print("    ours: " + ", ".join(f"{name} {s:.2f}" for name, s in row["parts"].items() if s), flush=True)
    if options.json:
        words = [
            "python",
            "benchmarks/loading.py",
            options.file.name,
            *(["--vs", options.vs.name] if options.vs else []),
        ]
        words += ["--repetitions", str(options.repetitions)]
        figures: dict[str, Any] = {"program": "benchmarks/loading.py", "command": shlex.join(words)}
        figures |= {"file": options.file.name, "bytes": size}
        figures |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "chip": device_name()}
        versions: dict[str, Any] = {"mlx": MLX, "python": platform.python_version()}
        if options.vs:
            versions["llama.cpp"] = read_row(options.vs, outputs["llama.cpp"].splitlines()[-1]).version or "?"
        figures |= {"versions": versions, "loading": rows}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
