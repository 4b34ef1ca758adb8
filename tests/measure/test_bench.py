"""`bench`: that what it counts is what there is, that the other program runs in turns, and what its files hold."""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
import xml.dom.minidom
from math import prod
from pathlib import Path
from typing import Any

import click.testing
import mlx.core as mx
import pytest
from kernel_models import BUDGET, UNIFORM, both
from recorded import HERE, path

from mlx_gemma4.cli.main import main
from mlx_gemma4.conversation.language_model import load
from mlx_gemma4.files.gguf import open_gguf
from mlx_gemma4.measure import bench
from mlx_gemma4.model.costs import kv_per_token

# Stands in for llama-bench: notes how it was called, then writes what llama-bench writes, or what `FAULT` says.
FAKE = """#!{python}
import json, sys
args = sys.argv[1:]
value = lambda flag: args[args.index(flag) + 1]
with open({log!r}, "a") as log:
    log.write(json.dumps(args) + "\\n")
fault = {fault!r}
if fault == "garbage":
    sys.exit(print("| model | t/s |"))
if fault == "dies" and "-d" in args:
    sys.exit("CUDA error: out of memory")
for n in value("-p").split(","):
    if n != "0":
        row = {{"n_prompt": int(n), "n_gen": 0, "n_depth": 0, "samples_ts": [1, 4, 2], "build_commit": "f00"}}
        print(json.dumps(row))
for n in value("-d").split(",") if "-d" in args else ():
    for size in (3, int(n) / 8):
        print(f"llama_kv_cache:      CUDA0 KV buffer size = {{size:8.2f}} MiB", file=sys.stderr, flush=True)
    print(json.dumps({{"n_prompt": 0, "n_gen": 2, "n_depth": int(n), "samples_ts": [8, 2, 4], "build_commit": "f00"}}))
    sys.stdout.flush()
"""


@pytest.fixture(autouse=True)
def little_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "COPIED", 1 << 22)


def other(folder: Path, fault: str = "") -> Path:
    program = folder / "llama-bench"
    program.write_text(FAKE.format(python=sys.executable, log=str(folder / "calls"), fault=fault))
    program.chmod(0o755)
    return program


def run(*args: str | Path) -> click.testing.Result:
    """`mlx-gemma4 bench`, quick."""
    some = ["bench", "--model", HERE / "e2b-q4_k_m.gguf", "--prompt-sizes", "9", "--depths", "0,70", "--reply", "2"]
    return click.testing.CliRunner().invoke(main, list(map(str, [*some, "--repetitions", "3", *args])))


@pytest.mark.parametrize(
    ("kind", "tag"), [("31b", "q4_0"), ("e2b", "q4_k_m"), ("26b-a4b", "q8_0"), ("12b", "untied-q4_k_m")]
)
def test_bytes_of_weights(kind: str, tag: str, tmp_path: Path) -> None:
    """Those of the file's tensors: of embeddings a row, of experts the chosen ones; what a CPU widens, wide."""
    file = path(kind, tag, tmp_path)
    model = load(file, weights="packed").model
    c, want = model.config, 0.0
    with open_gguf(file) as gguf:
        untied = "output.weight" in gguf.tensors
        for name, t in gguf.tensors.items():
            n_bytes: float = t.n_bytes
            if t.type in ("F16", "BF16") and len(t.shape) > 1 and name != "per_layer_token_embd.weight":
                n_bytes = 4 * prod(t.shape)
            if name == "per_layer_token_embd.weight" or (name == "token_embd.weight" and untied):
                n_bytes /= c.vocab
            elif name == "token_embd.weight":
                n_bytes += n_bytes / c.vocab  # the head, and the row of the token
            elif "_exps" in name:
                n_bytes *= c.experts_used / c.experts
            want += n_bytes if name != "rope_freqs.weight" else 0
    assert bench.weight_bytes(model) == pytest.approx(want, abs=2)


@pytest.mark.parametrize("kind", ["e2b", "31b", "gemma3"])
def test_a_filled_state_is_like_one_that_has_read(kind: str, tmp_path: Path) -> None:
    """The same segments and bytes as behind a prompt of that length, grown in steps; nothing that isn't a number."""
    model = load(path(kind, "q4_k_m", tmp_path)).model
    filled = model.new_state()
    for length in (3, 200, 400):
        bench.fill(filled, length)
        read = model.new_state()
        for start in range(0, length, bench.PREFILL_CHUNK):
            model.prefill(mx.array([5] * min(bench.PREFILL_CHUNK, length - start)), read)
        assert filled.length == read.length == length
        for i, shape in enumerate(model.config.layers):
            if shape.kv_layer == i and not shape.sliding:
                assert [s.stop for s in filled.layers[i].segments] == [s.stop for s in read.layers[i].segments]
                assert filled.layers[i].count == read.layers[i].count
        seen = sum(
            part.keys.nbytes + part.values.nbytes for s in model.config.layers for part in filled.view(s.kv_layer, 1)
        )
        assert kv_per_token(model.config, "full", length, filled.dtype) == seen
    assert mx.isfinite(model.forward(mx.array([5]), filled)).all()


@pytest.mark.parametrize("kind", ["31b", "e2b", "26b-a4b"])
def test_launches_and_host_time(kind: str, tmp_path: Path) -> None:
    """As many launches as the budget of test_decode allows, a layer; none where stock operations run."""
    plain, fused = both(kind, UNIFORM[kind], tmp_path)
    state = fused.new_state()
    bench.fill(state, 20)
    counted = bench.launches(fused, state)
    assert counted is not None
    outside = 7  # embed, first norm, two rotations, head; per_layer_model_proj, ple_inputs
    assert 4 * len(fused.config.layers) < counted <= BUDGET[kind] * len(fused.config.layers) + outside
    assert state.length == 20
    assert bench.launches(plain, state) is None
    assert 0 < bench.host_time(plain, state, 3) < 10


def test_a_cell_with_kernels(tmp_path: Path) -> None:
    """All of it, run by the simulator."""
    _, fused = both("31b", UNIFORM["31b"], tmp_path)
    plan = bench.BenchPlan((), (20,), 2, 1)
    (cell,) = bench.measure(fused, plan, bench.cells_of(plan), 1)
    assert cell.launches == bench.launches(fused, fused.new_state())
    assert cell.host_time is not None and cell.host_time > 0
    assert cell.rate > 0 and cell.peak_memory > 0


def test_copy_bandwidth() -> None:
    assert 1e8 < bench.copy_bandwidth() < 1e13


def test_every_cell_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as often as asked, with the median; twice in turns."""
    subject = bench.load_subject(HERE / "e2b-q4_k_m.gguf")
    plan = bench.BenchPlan((20, 5), (70, 0), 3, 3)
    cells = bench.cells_of(plan)
    assert [(c.kind, c.context) for c in cells] == [("prefill", 5), ("prefill", 20), ("decode", 0), ("decode", 70)]
    asked: list[tuple[int, int]] = []
    real = bench.generate_tokens

    def noted(model: Any, state: Any, prompt: Any, sampling: Any, n: int, **options: Any) -> Any:
        asked.append((state.length + len(prompt), n))
        return real(model, state, prompt, sampling, n, **options)

    monkeypatch.setattr(bench, "generate_tokens", noted)
    monkeypatch.setattr(bench, "STEADY", float("inf"))
    for turn in (2, 1):
        assert list(bench.measure(subject.model, plan, cells, turn)) == cells
    assert [len(c.samples) for c in cells] == [3] * 4
    assert all(c.rate == sorted(c.samples)[1] > 0 for c in cells)
    warm = [(61, bench.WARM_UP + 1), (125, bench.WARM_UP + 1)]  # just before a tail of 64 is full
    turns = [
        [*[(5, 1)] * (2 + n), *[(20, 1)] * (2 + n), warm[0], *[(1, 4)] * n, warm[1], *[(71, 4)] * n] for n in (2, 1)
    ]
    assert asked == [*turns[0], *turns[1]]


def test_table_and_json(tmp_path: Path) -> None:
    done = run("--json", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["file"] == "e2b-q4_k_m.gguf"
    assert {"date", "chip", "versions", "command", "copy_bandwidth"} <= figures.keys()
    cells = figures["cells"]
    assert [(c["kind"], c["context"], c["kv"]) for c in cells] == [
        ("prefill", 9, "full"),
        ("decode", 0, "full"),
        ("decode", 70, "full"),
    ]
    for cell in cells:
        assert cell["llama_cpp"] is None and cell["ratio"] is None
        assert min(cell["samples"]) <= cell["ours"] <= max(cell["samples"])
    assert cells[2]["bytes_per_token"] > cells[1]["bytes_per_token"]
    share = cells[1]["ours"] * cells[1]["bytes_per_token"] / figures["copy_bandwidth"]
    assert cells[1]["share_of_copy"] == pytest.approx(share, rel=0.01, abs=1e-4)
    rows = done.stdout.splitlines()[-4:]
    assert [row[:18].strip() for row in rows] == ["", "prompt of 9", "reply at 0", "reply at 70"]
    assert f"{cells[2]['ours']:.1f}" in rows[3]


def test_in_turns_with_llama_bench(tmp_path: Path) -> None:
    """The same file and lengths for both, the ratio of the medians, and its version."""
    done = run("--vs", other(tmp_path), "--json", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    file = str(HERE / "e2b-q4_k_m.gguf")
    same = ["-r", "3", "-ngl", "99", "-fa", "1", "-ctk", "f16", "-ctv", "f16", "-o", "jsonl", "-v"]
    assert calls[0] == ["-m", file, "-p", "9", "-n", "0", *same]
    assert calls[1] == ["-m", file, "-p", "0", "-n", "2", "-d", "0,70", "-ub", "2048", *same]
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["versions"]["llama.cpp"] == "f00"
    for cell in figures["cells"]:
        theirs = 2 if cell["kind"] == "prefill" else 4
        assert cell["llama_cpp"] == theirs
        assert cell["ratio"] == pytest.approx(cell["ours"] / theirs, rel=1e-3)
        assert len(cell["samples"]) == 3  # before and after, together
    assert [c.get("llama_cpp_kv_memory") for c in figures["cells"]] == [None, 3 << 20, (24 + 70) << 17]
    lines = [line.split(":")[0] for line in done.stderr.splitlines() if "tokens/s" in line]
    ours = ["prompt of 9", "reply at 0", "reply at 70"]
    assert lines == [*ours, *(f"llama.cpp, {title}" for title in ours), *(f"{title}, again" for title in ours)]


def test_kv_in_codes(tmp_path: Path) -> None:
    """Fewer bytes a token, and llama.cpp is told to hold as few."""
    done = run("--vs", other(tmp_path), "--json", tmp_path / "out.json", "--kv", "tq4", "--depths", "400")
    assert done.exit_code == 0, done.output
    assert all("-ctk q4_0 -ctv q4_0" in " ".join(json.loads(call)) for call in (tmp_path / "calls").open())
    coded = json.loads((tmp_path / "out.json").read_text())["cells"][-1]
    assert run("--json", tmp_path / "full.json", "--depths", "400").exit_code == 0
    full = json.loads((tmp_path / "full.json").read_text())["cells"][-1]
    assert (coded["kv"], full["kv"]) == ("tq4", "full")
    assert coded["bytes_per_token"] < full["bytes_per_token"]
    assert 0 < coded["kv_memory"] < full["kv_memory"]


def test_what_was_measured_is_kept_when_the_other_program_fails(tmp_path: Path) -> None:
    done = run("--vs", other(tmp_path, "dies"), "--json", tmp_path / "out.json")
    assert done.exit_code == 2
    assert "ended with code 1: CUDA error: out of memory" in done.stderr
    cells = json.loads((tmp_path / "out.json").read_text())["cells"]
    assert [c["llama_cpp"] for c in cells] == [2, None, None]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calls", "llama-bench", "out.json"]


def test_report_tells_the_machine_and_not_whose(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert run("--vs", other(tmp_path), "--report", report).exit_code == 0
    text = report.read_text()
    figures = json.loads(text)
    assert figures["machine"]["system"].startswith(platform.system())
    assert figures["command"].endswith("--vs llama-bench")
    for private in (str(tmp_path), str(HERE), str(Path.home()) + "/", platform.node()):
        assert private not in text


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--depths", "1,x"], "'--depths': '1,x' is no list"),
        (["--prompt-sizes", "0"], "'--prompt-sizes': '0' is no list"),
        (["--depths", "600"], "--depths 600: with 4 tokens more, past the model's context of 512"),
        (["--prompt-sizes", "512"], "--prompt-sizes 512"),
        (["--vs", "/nowhere/llama-bench"], "--vs /nowhere/llama-bench: no such program"),
        (["--json", "/nowhere/out.json"], "/nowhere/out.json: can't be saved: there is no folder /nowhere"),
        (["--model", "nowhere.gguf"], "nowhere.gguf: no such file"),
    ],
)
def test_wrong_flag(args: list[str], says: str) -> None:
    done = run(*args)
    assert done.exit_code == 2
    assert says in done.stderr.splitlines()[-1]


def test_not_llama_bench(tmp_path: Path) -> None:
    done = run("--vs", other(tmp_path, "garbage"))
    assert done.exit_code == 2
    assert "wrote '| model | t/s |' and no figures; is this llama-bench" in done.stderr


def test_name_of_a_model() -> None:
    for name, label in {
        "Gemma-4-E2B-It": "E2B",
        "synthetic 26b-a4b": "26B-A4B",
        "gemma-4-31B-it-Q4_K_M": "31B",
        "gemma3-270m": "270M",
        "gemma_4_12b": "12B",
    }.items():
        assert bench.size_label(name, "file") == label
    assert bench.size_label("", "gemma4-demo") == "gemma4-demo"
    assert bench.size_label("tales", "x-E4B-Q8_0") == "E4B"


def tables() -> Any:
    """benchmarks/tables.py, which is no module of the package."""
    spec = importlib.util.spec_from_file_location("tables", Path(__file__).parents[2] / "benchmarks" / "tables.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_and_chart(tmp_path: Path) -> None:
    """From what `bench` writes; of two runs the one with the other program's figures counts, then the later."""
    t = tables()
    assert run("--vs", other(tmp_path), "--json", tmp_path / "a.json").exit_code == 0
    run_a = json.loads((tmp_path / "a.json").read_text())
    cell = run_a["cells"][1] | {"model": "31B", "context": 2048}
    for name, date, ours in (("b", "2026-11-01", 1.0), ("c", "2027-01-01", 5.5)):
        changed = [cell | {"ours": ours, "llama_cpp": 4.0, "ratio": ours / 4.0}]
        (tmp_path / f"{name}.json").write_text(json.dumps(run_a | {"date": date, "cells": changed}))
    alone = cell | {"ours": 7.7, "llama_cpp": None, "ratio": None}
    (tmp_path / "e.json").write_text(json.dumps(run_a | {"date": "2027-02-02", "cells": [alone]}))
    lines = list(t.markdown(*t.read(tmp_path)))
    assert "| 31B | full |  | 5.5 / 4.0 = **1.38** |  |" not in lines  # contexts 0, 70 and 2048
    assert "| 31B | full |  |  | 5.5 / 4.0 = **1.38** |" in lines
    assert sum("](c.json)" in line for line in lines) == 1
    assert not any("Projection" in line for line in lines)  # a CPU launches nothing
    counted = cell | {"context": 512, "bytes_per_token": 17 * 10**9, "launches": 500}
    (tmp_path / "d.json").write_text(json.dumps(run_a | {"cells": [counted]}))
    rows = {line.split(" | ")[0]: line for line in t.markdown(*t.read(tmp_path))}
    assert rows["| M5 Max (40-core GPU)"] == f"| M5 Max (40-core GPU) | {1 / (17 / (0.85 * 614) + 0.001):.1f} |"
    assert rows["| M5 Max, mlx-lm, published"] == "| M5 Max, mlx-lm, published | 28.3 |"
    drawing = t.svg(t.read(tmp_path)[1])
    xml.dom.minidom.parseString(drawing)
    assert drawing.count("<polyline") == 4  # two models
    assert (
        t._figure({"model": "31B", "kind": "prefill", "ours": 2400.0, "llama_cpp": 2500.0, "ratio": 0.96})
        == "2400 / 2500 = 0.96"
    )


def test_table_of_loading(tmp_path: Path) -> None:
    """From what benchmarks/loading.py writes, of a file that could not be had out of the cache, too."""
    t = tables()
    warm = {"cached": 1.0, "seconds": {"mlx-gemma4": 4.32, "llama.cpp": 2.18}, "load_time": 3.1}
    cold = {"cached": 0.0, "seconds": {"mlx-gemma4": 5.73, "llama.cpp": 4.07}, "load_time": 4.51}
    made = {"file": "e2b.gguf", "bytes": 34 * 10**8, "date": "2026-11-29", "chip": "X"}
    (tmp_path / "loading").mkdir()
    (tmp_path / "loading" / "a.json").write_text(json.dumps(made | {"loading": [cold, warm]}))
    (tmp_path / "loading" / "b.json").write_text(json.dumps(made | {"chip": "Y", "loading": [warm]}))
    lines = list(t.markdown(*t.read(tmp_path)))
    assert "| e2b.gguf | X | 3.4 | 5.7 / 4.1 (4.5) | 4.3 / 2.2 (3.1) |" in lines
    assert "| e2b.gguf | Y | 3.4 |  | 4.3 / 2.2 (3.1) |" in lines
    assert sum("](loading/a.json)" in line for line in lines) == 1
