"""The report of `mlx-gemma4 doctor --report`: what we would ask the owner of a Mac for, in one JSON object.

In: the doctor's table as it grows. Out: a file, written whole before each check, so that it names as "running" the one
that took the process down. Nothing in it identifies the owner or is secret: of environment variables only numbers and
switches are told.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..conversation.language_model import demo_path
from ..doctor.table import examine
from ..paths import write_object
from .bench import BenchPlan, cells_of, copy_bandwidth, load_subject, machine, made_by, measure, result

SCHEMA = 1  # of the object: changes when a name or a unit does
DEMO = BenchPlan(prompts=(512,), depths=(0, 512), reply=64, repetitions=3)
VARIABLES = re.compile(r"(MLX|MTL|METAL|AGX)_(?!GEMMA4_)|MLX_GEMMA4_KERNELS$")  # not MLX_GEMMA4_API_KEY
HARMLESS = re.compile(r"[\d.]*|on|off|true|false", re.IGNORECASE)  # values; of others only that there is one


def examine_and_report(file: Path, echo: Callable[[str], None], as_json: bool = False) -> bool:
    """Run `examine`, measure the demo, and write both to a file. Return True if every kernel passed.

    The object has `examine`'s "gpu", "off" and "checks" (`verdict.Result`), and "demo" as `bench --json` writes it;
    times in seconds, sizes in bytes.

    Raises:
        InputError: the file can't be written; that is known before the first check.
    """
    variables = {name: value for name, value in os.environ.items() if VARIABLES.match(name)}
    head = {
        **made_by("mlx-gemma4 doctor"),
        "schema": SCHEMA,
        "machine": machine(),
        "environment": {k: v if HARMLESS.fullmatch(v) else "(set)" for k, v in variables.items()},
    }
    report: dict[str, Any] = {}

    def keep(found: dict[str, Any]) -> None:
        used = {"peak": mx.get_peak_memory(), "active": mx.get_active_memory(), "cache": mx.get_cache_memory()}
        report.update({**found, **head, "checked_as": found["machine"], "memory": used})
        write_object(file, report)

    passed = examine(echo, as_json, keep=keep)
    write_object(file, {**report, "running": "the demo"})
    write_object(file, {**report, "demo": _demo()})
    return passed


def _demo() -> dict[str, Any]:
    """Return the demo's loading time and speed, as `bench --json` has them, or the error that ended them."""
    try:
        subject, cells = load_subject(demo_path()), cells_of(DEMO)
        copy = copy_bandwidth()
        for _ in measure(subject.model, DEMO, cells, DEMO.repetitions):
            pass
        return result(subject, DEMO, cells, copy, None, "mlx-gemma4 doctor --report")
    except Exception as error:  # anything that a backend raises: the table is worth having all the same
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
