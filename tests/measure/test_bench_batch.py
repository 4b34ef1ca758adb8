"""`bench --parallel`: what is measured, llama-batched-bench beside it, and the table and chart of both."""

from __future__ import annotations

import json
import sys
import xml.dom.minidom
from pathlib import Path
from typing import Any

import click.testing
import pytest
import tables
from kernel_models import UNIFORM, both
from recorded import HERE

from mlx_gemma4.cli.main import main
from mlx_gemma4.measure import bench, llama_bench

# Stands in for llama-batched-bench: notes how it was called, then writes what that writes, or what `FAULT` says.
FAKE = """#!{python}
import json, sys
args = sys.argv[1:]
value = lambda flag: args[args.index(flag) + 1]
with open({log!r}, "a") as log:
    log.write(json.dumps(args) + "\\n")
if {fault!r} == "garbage":
    sys.exit(print('{{"n_prompt": 1}}'))
if {fault!r} == "table":
    sys.exit(print("|    PP |"))
print("build: 11549 (f00) with GNU for x86_64", file=sys.stderr, flush=True)
pp, tg = int(value("-npp")), int(value("-ntg"))
for n in map(int, value("-npl").split(",")):
    row = {{"is_pp_shared": 0, "pp": pp, "tg": tg, "pl": n, "n_kv": n * (pp + tg), "t_pp": 0.5 * n}}
    print(json.dumps(row | {{"speed_tg": 4.0 * n}}), flush=True)
"""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "COPIED", 1 << 22)
    monkeypatch.setattr(bench, "BATCH_PROMPT", 20)
    monkeypatch.setattr(llama_bench, "BATCH_PROMPT", 20)


def other(folder: Path, fault: str = "") -> Path:
    program = folder / "llama-batched-bench"
    program.write_text(FAKE.format(python=sys.executable, log=str(folder / "calls"), fault=fault))
    program.chmod(0o755)
    return program


def run(*args: str | Path) -> click.testing.Result:
    some = ["bench", "--model", HERE / "e2b-q4_k_m.gguf", "--prompt-sizes", "", "--depths", "", "--reply", "3"]
    return click.testing.CliRunner().invoke(main, list(map(str, [*some, "--repetitions", "2", *args])))


def test_replies_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of their own; as many steps for all as a reply has tokens, each starting with the one before."""
    subject = bench.load_subject(HERE / "e2b-q4_k_m.gguf")
    monkeypatch.setattr(bench, "STEADY", float("inf"))
    plan = bench.BenchPlan((), (), 3, 2, parallel=(3, 1))
    cells = bench.cells_of(plan)
    assert [(c.kind, c.context, c.parallel, c.title) for c in cells] == [
        ("batch", 20, 1, "1 at 20"),
        ("batch", 20, 3, "3 at 20"),
    ]
    steps: list[Any] = []
    prompts: list[list[int]] = []
    batch, read_chunk = subject.model.batch, bench.read_chunk

    def noted(tokens: Any, states: Any) -> Any:
        assert len(states) == 3 and {s.length for s in states} == {20 + len(steps) % 3}
        assert len(steps) % 3 == 0 or tokens is steps[-1]
        steps.append(batch(tokens, states))
        return steps[-1]

    def read(model: Any, state: Any, ids: list[int], *rest: Any) -> Any:
        prompts.append(ids)
        return read_chunk(model, state, ids, *rest)

    monkeypatch.setattr(subject.model, "batch", noted)
    monkeypatch.setattr(bench, "read_chunk", read)
    assert list(bench.measure(subject.model, plan, cells, 2)) == cells
    assert len(steps) == (2 + 2) * 3  # warm-ups
    assert len(prompts) == (2 + 2) * (1 + 3) and len({tuple(p) for p in prompts}) == 3
    for cell in cells:
        assert len(cell.samples) == len(cell.prompt_times) == 2
        assert min(cell.samples) > 0 and min(cell.prompt_times) > 0 and cell.peak_memory > 0


def test_in_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the simulator. States are in the pool before the first step, which stays until all runs are made."""
    _, fused = both("31b", UNIFORM["31b"], tmp_path)
    monkeypatch.setattr(bench, "STEADY", float("inf"))
    assert fused.batcher
    pool, batch, made, held = fused.batcher.pool, fused.batch, [], list[bool]()
    move_in = pool._move_in

    def moved_in(*args: Any) -> None:
        made.append("in")
        move_in(*args)

    def noted(tokens: Any, states: Any) -> Any:
        held.append(all(map(fused.batcher.holds, states)))  # type: ignore[union-attr]
        made.append("step")
        return batch(tokens, states)

    monkeypatch.setattr(pool, "_move_in", moved_in)
    monkeypatch.setattr(fused, "batch", noted)
    plan = bench.BenchPlan((), (), 2, 1, parallel=(2,))
    (cell,) = bench.measure(fused, plan, bench.cells_of(plan), 1)
    assert cell.rate > 0 and cell.prompt_times[0] > 0
    assert all(held) and made == ["in", *["in", "in", "step", "step"] * 3]
    assert not pool.seats


def test_warm_ups_go_on_while_runs_get_faster() -> None:
    """As when kernels are compiled in the first, and still in the second."""
    rates = [512.0, 9000.0, 33_000.0, 34_000.0, 1.0]
    bench.warm_until_steady(lambda: rates.pop(0))
    assert rates == [1.0]
    rates = [1.0, 2.0, 4.0, 8.0, 16.0]
    bench.warm_until_steady(lambda: rates.pop(0))
    assert rates == [16.0]


def test_beside_llama_batched_bench(tmp_path: Path) -> None:
    done = run("--parallel", "1,2", "--vs-batched", other(tmp_path), "--json", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    (call,) = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert call == [
        *("-m", str(HERE / "e2b-q4_k_m.gguf"), "-npp", "20", "-ntg", "3", "-npl", "1,2", "-c", "46"),
        *("-fa", "on", "-ngl", "99", "-ctk", "f16", "-ctv", "f16", "--output-format", "jsonl"),
    ]
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["versions"]["llama.cpp"] == "f00"
    assert figures["command"].endswith("--parallel 1,2 --vs-batched llama-batched-bench")
    for n, cell in enumerate(figures["cells"], 1):
        assert (cell["kind"], cell["model"], cell["parallel"], cell["context"]) == ("batch", "E2B", n, 20)
        assert cell["llama_cpp"] == 4 * n and cell["llama_cpp_prompt_seconds"] == n / 2
        assert cell["ratio"] == pytest.approx(cell["ours"] / (4 * n), rel=1e-3)
        assert len(cell["samples"]) == 2 and cell["prompt_seconds"] > 0
    assert [line[:18].strip() for line in done.stdout.splitlines()[-2:]] == ["1 at 20", "2 at 20"]
    told = [line.split(":")[0] for line in done.stderr.splitlines() if "tokens/s" in line]
    ours = ["1 at 20", "2 at 20"]
    assert told == [*ours, *(f"llama.cpp, {each}" for each in ours), *(f"{each}, again" for each in ours)]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--parallel", "0"], "'--parallel': '0' is no list"),
        (["--parallel", "33"], "--parallel 33: at most 32 replies are made at once"),
        (
            ["--parallel", "2", "--reply", "500"],
            "--parallel: prompts of 20 tokens and --reply 500 are past the model's",
        ),
        (["--vs-batched", "/nowhere/x"], "--vs-batched /nowhere/x: no such program"),
        (["--vs-batched", sys.executable], "--vs-batched: nothing to compare; give --parallel"),
    ],
)
def test_wrong_flag(args: list[str], says: str) -> None:
    done = run(*args)
    assert done.exit_code == 2
    assert says in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("fault", ["garbage", "table"])
def test_another_program(fault: str, tmp_path: Path) -> None:
    done = run("--parallel", "2", "--vs-batched", other(tmp_path, fault))
    assert done.exit_code == 2
    assert "is this llama-batched-bench" in done.stderr


def test_table_and_chart(tmp_path: Path) -> None:
    """A column for each number of replies; cells of other kinds stay in tables of their own."""
    parallel = {"kind": "batch", "model": "31B", "context": 512, "kv": "full"}
    cells = [
        parallel | {"parallel": n, "ours": 150.0 * n, "llama_cpp": 75.0 * n, "ratio": 2.0, "samples": [1]}
        for n in (1, 32)
    ]
    alone = parallel | {"kind": "decode", "ours": 131.0, "llama_cpp": 72.8, "ratio": 1.8, "samples": [1]}
    figures = {"chip": "X", "date": "2026-11-29", "cells": [*cells, alone]}
    (tmp_path / "a.json").write_text(json.dumps(figures))
    cells = tables.read(tmp_path)[1]
    assert len(cells) == 3
    lines = list(tables.markdown(*tables.read(tmp_path)))
    at = lines.index("## X: so many replies at once, behind prompts of 512 tokens, all together")
    assert lines[at + 2 : at + 5] == [
        "| model | KV | 1 | 32 |",
        "|---|---|---|---|",
        "| 31B | full | 150.0 / 75.0 = **2.00** | 4800 / 2400 = **2.00** |",
    ]
    assert "| 31B | full | 131.0 / 72.8 = **1.80** |" in lines
    drawing = tables.svg(cells, "batch")
    xml.dom.minidom.parseString(drawing)
    assert drawing.count("<polyline") == 2 and ">32<" in drawing and "replies at once" in drawing
