"""Times the first load of a model on a machine, when all kernels are compiled and checked, and a later one.

    python benchmarks/first_load.py FILE.gguf [--threads 1 0] [--json OUT]

Each run is a process of its own: load the file, read a prompt, choose a token, end. For each number of threads that
compile (0: one a core; on NVIDIA) a first load with an empty cache of ours and of MLX, and a later one with what that
left. Seconds: the process in all, loading the weights, compiling, checking (references and replayed steps are in it),
MLX's own kernels (a first short prompt), and the first reply. The file's pages should be in the system's cache: run it
twice, or read the file before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mlx_gemma4.doctor.verdict import MLX, device_name

PARTS = ("weights", "compile", "check", "mlx", "reply")
OURS = """
import json, sys, time
import mlx.core as mx
from pathlib import Path
from mlx_gemma4.doctor import ready, verdict
from mlx_gemma4.gpu import cuda_compiler
from mlx_gemma4.measure import bench

threads, seconds, checks = int(sys.argv[2]) or None, {}, []

def timed(module, name, part, *more):
    function = getattr(module, name)
    def call(*arguments):
        start = time.perf_counter()
        try:
            return function(*arguments, *more)
        finally:
            took = time.perf_counter() - start
            seconds[part] = seconds.get(part, 0) + took
            if part == "each":
                checks.append((round(took, 3), arguments[0].key))
    setattr(module, name, call)

timed(bench, "load_model", "weights")
timed(cuda_compiler, "compile_all", "compile", threads)
timed(verdict, "check_model", "check")
timed(verdict, "run_check", "each")
timed(ready, "read_some", "mlx")
model = bench.load_subject(Path(sys.argv[1])).model
start = time.perf_counter()
state = model.new_state()
logits = model.forward(mx.arange(100), state)
for _ in range(3):
    logits = model.forward(mx.argmax(logits)[None], state)
mx.eval(logits)
seconds["reply"] = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "slowest": sorted(checks)[:-6:-1], "checks": len(checks)}))
"""


def run(file: Path, cache: Path, threads: int) -> dict[str, Any]:
    """Load a file in a process of its own, with a cache in this folder; return what it measured, and its seconds."""
    kept = {name: value for name, value in os.environ.items() if name != "MLX_PTX_CACHE_DIR"}
    environment = {**kept, "XDG_CACHE_HOME": str(cache)}
    start = time.perf_counter()
    command = [sys.executable, "-c", OURS, str(file), str(threads)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    total = time.perf_counter() - start
    if not done.stdout.strip():
        sys.exit(f"{file}: the process ended with code {done.returncode} and no figures")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**measured, "total": round(total, 2), "code": done.returncode}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 0], help="that compile; 0: one a core")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    rows = []
    print(f"{'':<28}{'total':>8}" + "".join(f"{part:>9}" for part in PARTS), "  checks", flush=True)
    for threads in options.threads:
        with tempfile.TemporaryDirectory() as folder:
            for which in ("first", "later"):
                row = {"load": which, "threads": threads, **run(options.file, Path(folder), threads)}
                rows.append(row)
                shown = "".join(f"{row['seconds'].get(part, 0):>9.2f}" for part in PARTS)
                title = f"{which}, {threads or len(os.sched_getaffinity(0))} threads"
                print(f"{title:<28}{row['total']:>8.2f}{shown}{row['checks']:>9}", flush=True)
                for took, key in row["slowest"] if which == "first" else ():
                    print(f"    {took:>6.2f}  {key}")
    if options.json:
        found = {"program": "first_load.py", "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        machine = {"chip": device_name(), "mlx": MLX, "cores": len(os.sched_getaffinity(0)), "file": options.file.name}
        options.json.write_text(json.dumps({**found, **machine, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
