"""Runs llama.cpp's llama-bench and llama-batched-bench for `mlx-gemma4 bench`: the same file, the same lengths.

In: the program's path, a GGUF and a `BenchPlan`. Out: its samples, in tokens per second, as it makes them.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from .bench import BATCH_PROMPT, BenchPlan

KV_BUFFER = re.compile(r"KV buffer size = +([0-9.]+) MiB")  # several per context: with and without a window
BUILD = re.compile(r"build: \d+ \((\w+)\)")
IS_IT = "is this llama-bench, with -o jsonl and -d?"
IS_IT_BATCHED = "is this llama-batched-bench, with --output-format jsonl?"
KV_TYPES = {"full": "f16", "q8": "q8_0", "tq4": "q4_0"}  # closest to each of our --kv


class Row(NamedTuple):
    """One test of llama-bench or llama-batched-bench."""

    kind: str  # "prefill", "decode" or "batch"
    context: int
    samples: list[float]
    version: str | None  # None: not printed
    kv_memory: int | None  # bytes allocated for keys and values; None: not printed
    parallel: int = 1  # replies at once
    prompt_time: float | None = None  # seconds for the prompts of a batch


def run(program: Path, model: Path, plan: BenchPlan) -> Iterator[Row]:
    """Measure prompts, then decoding at the depths: in two runs, since one would read each prompt at each depth.

    Raises:
        InputError: the program can't be run, fails, or writes something else than llama-bench's JSON lines.
    """
    if plan.prompts:
        yield from _run(program, model, plan, ["-p", _joined(plan.prompts), "-n", "0"])
    if plan.depths:
        depths = ["-d", _joined(plan.depths), "-ub", "2048"]  # larger chunks only fill a depth sooner
        yield from _run(program, model, plan, ["-p", "0", "-n", str(plan.reply), *depths])


def _joined(numbers: tuple[int, ...]) -> str:
    return ",".join(str(n) for n in sorted(set(numbers)))


def _run(program: Path, model: Path, plan: BenchPlan, tests: list[str]) -> Iterator[Row]:
    kv = KV_TYPES[plan.kv]
    command = [str(program), "-m", str(model), *tests, "-r", str(plan.repetitions), "-ngl", "99", "-fa", "1"]
    command += ["-ctk", kv, "-ctv", kv, "-o", "jsonl", "-v"]  # -v: prints the size of each KV buffer
    kv_memory = 0.0
    for line in _lines("--vs", program, command, IS_IT):
        if line.startswith("{"):
            yield read_row(program, line, round(kv_memory))
            kv_memory = 0.0
        else:
            kv_memory += sum(float(size) * (1 << 20) for size in KV_BUFFER.findall(line))


def run_batched(program: Path, model: Path, plan: BenchPlan) -> Iterator[Row]:
    """Measure replies at once, by llama-batched-bench. Raises InputError as `run` does."""
    kv, room = KV_TYPES[plan.kv], max(plan.parallel) * (BATCH_PROMPT + plan.reply)
    command = [str(program), "-m", str(model), "-npp", str(BATCH_PROMPT), "-ntg", str(plan.reply)]
    command += ["-npl", _joined(plan.parallel), "-c", str(room), "-fa", "on", "-ngl", "99", "-ctk", kv, "-ctv", kv]
    version = None
    for line in _lines("--vs-batched", program, [*command, "--output-format", "jsonl"], IS_IT_BATCHED):
        if line.startswith("{"):
            try:
                test: dict[str, Any] = json.loads(line)
                samples, time = [float(test["speed_tg"])], float(test["t_pp"])
                yield Row("batch", int(test["pp"]), samples, version, None, int(test["pl"]), time)
            except (ValueError, TypeError, KeyError):
                raise InputError(f"--vs-batched {program}: wrote {line[:120]!r}; {IS_IT_BATCHED}") from None
        elif found := BUILD.search(line):
            version = found[1]


def _lines(flag: str, program: Path, command: list[str], is_it: str) -> Iterator[str]:
    """Yield what a program writes, stderr too, line by line. Raises InputError as `run` does."""
    try:
        # One stream, so that the lines on a context come before its row.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise InputError(f"{flag} {program}: can't be run: {error.strerror or error}") from None
    assert process.stdout is not None
    last, rows = "no message", 0
    try:
        for line in filter(None, map(str.strip, process.stdout)):
            if line.startswith("{"):
                rows += 1
            else:
                last = line
            yield line
        code = process.wait()
    finally:
        process.kill()
        process.wait()
    if code:
        raise InputError(f"{flag} {program}: ended with code {code}: {last[:300]}")
    if not rows:
        raise InputError(f"{flag} {program}: wrote {last[:120]!r} and no figures; {is_it}")


def read_row(program: Path, line: str, kv_memory: int = 0) -> Row:
    """Parse a line of llama-bench's jsonl; kv_memory: bytes that it printed for the KV buffers before it."""
    try:
        test: dict[str, Any] = json.loads(line)
        kind, context = ("decode", "n_depth") if test["n_gen"] else ("prefill", "n_prompt")
        samples = [float(s) for s in test["samples_ts"]]
        return Row(kind, int(test[context]), samples, str(test.get("build_commit", "?")), kv_memory or None)
    except (ValueError, TypeError, KeyError):
        raise InputError(f"--vs {program}: wrote {line[:120]!r}; {IS_IT}") from None
