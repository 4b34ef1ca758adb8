"""Runs llama.cpp's llama-bench beside ours: the same file, the same lengths.

In: the program's path, a GGUF and a bench `Plan`. Out: its samples, in tokens a second, as it makes them.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InputError

if TYPE_CHECKING:
    from .bench import BenchPlan


KV_BUFFER = re.compile(r"KV buffer size = +([0-9.]+) MiB")  # several a context: with and without a window
IS_IT = "is this llama-bench, with -o jsonl and -d?"
KV_TYPES = {"full": "f16", "q8": "q8_0", "tq4": "q4_0"}  # what comes closest to each of our --kv


class Row(NamedTuple):
    """One test of llama-bench."""

    kind: str  # "prefill" or "decode"
    context: int
    samples: list[float]
    version: str
    kv_memory: int | None  # bytes set aside for keys and values; None: it didn't say


def run(program: Path, model: Path, plan: BenchPlan) -> Iterator[Row]:
    """Prompts, then decoding at the depths: two runs of the program, for one would read each prompt at each depth."""
    if plan.prompts:
        yield from _run(program, model, plan, ["-p", _joined(plan.prompts), "-n", "0"])
    if plan.depths:
        depths = ["-d", _joined(plan.depths), "-ub", "2048"]  # larger chunks than its own fill a depth sooner, no more
        yield from _run(program, model, plan, ["-p", "0", "-n", str(plan.reply), *depths])


def _joined(numbers: tuple[int, ...]) -> str:
    return ",".join(str(n) for n in sorted(set(numbers)))


def _run(program: Path, model: Path, plan: BenchPlan, tests: list[str]) -> Iterator[Row]:
    kv = KV_TYPES[plan.kv]
    command = [str(program), "-m", str(model), *tests, "-r", str(plan.repetitions), "-ngl", "99", "-fa", "1"]
    command += ["-ctk", kv, "-ctv", kv, "-o", "jsonl", "-v"]  # -v: of each context a few lines more, of tokens none
    try:
        # In one stream, what it says of a context stands before that context's row.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise InputError(f"--vs {program}: can't be run: {error.strerror or error}") from None
    assert process.stdout is not None
    last, kv_memory, rows = "no message", 0.0, 0
    try:
        for line in filter(None, map(str.strip, process.stdout)):
            if line.startswith("{"):
                yield read_row(program, line, round(kv_memory))
                kv_memory, rows = 0.0, rows + 1
                continue
            last = line
            kv_memory += sum(float(size) * (1 << 20) for size in KV_BUFFER.findall(line))
        code = process.wait()
    finally:
        process.kill()
        process.wait()
    if code:
        raise InputError(f"--vs {program}: ended with code {code}: {last[:300]}")
    if not rows:
        raise InputError(f"--vs {program}: wrote {last[:120]!r} and no figures; {IS_IT}")


def read_row(program: Path, line: str, kv_memory: int = 0) -> Row:
    """A line of llama-bench's jsonl, and the bytes it has said that it sets aside."""
    try:
        test: dict[str, Any] = json.loads(line)
        kind, context = ("decode", "n_depth") if test["n_gen"] else ("prefill", "n_prompt")
        samples = [float(s) for s in test["samples_ts"]]
        return Row(kind, int(test[context]), samples, str(test.get("build_commit", "?")), kv_memory or None)
    except (ValueError, TypeError, KeyError):
        raise InputError(f"--vs {program}: wrote {line[:120]!r}; {IS_IT}") from None
