"""The report of the doctor, with the Metal simulator for a GPU and without one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from kernel_cases import metal

from mlx_gemma4.cli.main import main
from mlx_gemma4.doctor import table, verdict
from mlx_gemma4.gpu import render
from mlx_gemma4.measure import bench, report
from mlx_gemma4.measure.bench import BenchPlan
from mlx_gemma4.ops.cases import Product, Sizes

TINY = {"tiny": Sizes(64, 256, (), (Product("Q4_0", (32, 64)),), "Q4_0")}
LIMITS = {"device_name": "Apple M9", "max_buffer_length": 9, "resource_limit": 5}
SECRETS = {
    "MLX_GEMMA4_API_KEY": "4711",
    "MLX_HOSTFILE": "/home/jane/hosts.json",
    "METAL_CAPTURE": "jane",
    "HOME": "/home/jane",
    "AGX_RELAX_CDM_CTXSTORE_TIMEOUT": "1",
    "MLX_GEMMA4_KERNELS": "ON",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "verdict_file", lambda: tmp_path / "cache" / "kernels.json")
    monkeypatch.setattr(table, "small_sizes", lambda: TINY)
    monkeypatch.setattr(table, "real_sizes", lambda: TINY)
    monkeypatch.setattr(report, "DEMO", BenchPlan(prompts=(4,), depths=(0,), reply=2, repetitions=1))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def written(file: Path, passed: bool = True) -> dict[str, Any]:
    assert report.examine_and_report(file, lambda line: None) == passed
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_a_gpu_is_told_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "default_launcher", lambda: metal)
    monkeypatch.setattr(report, "load_subject", lambda path: 1 / 0)  # the demo alone fails
    monkeypatch.setattr(bench, "device_info", lambda: {**LIMITS, "uuid": "GPU-jane"})
    file = tmp_path / "report.json"
    found = written(file)
    assert "jane" not in file.read_text()
    assert [f.name for f in tmp_path.glob("*report*")] == ["report.json"]  # no temporary file stays
    assert found["schema"] == report.SCHEMA and found["gpu"] and not found["off"] and found["running"] is None
    assert set(found["versions"]) == {"mlx-gemma4", "mlx", "python"} and found["machine"]["system"]
    assert found["demo"] == {"error": "ZeroDivisionError: division by zero"}
    assert found["machine"].items() >= LIMITS.items()
    assert found["memory"]["peak"] > 0
    matvec = next(c for c in found["checks"] if c["op"] == "matvec Q4_0")
    assert matvec["model"] == "tiny" and matvec["shape"] == "32x64 fp32" and matvec["verdict"] == "ok"
    assert 0 < matvec["seconds"] < matvec["first"] + 1 and matvec["rate"] > 0 and matvec["error"] < verdict.LIMIT
    (launch,) = matvec["launches"]
    assert launch["kernel"].startswith("matvec_") and launch["grid"] % launch["threads"] == 0
    assert 32 <= launch["threads"] <= 1024


def test_what_is_secret_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "load_subject", lambda path: 1 / 0)
    found = written(tmp_path / "report.json")["environment"]
    assert "MLX_GEMMA4_API_KEY" not in found and "HOME" not in found
    assert found["MLX_HOSTFILE"] == found["METAL_CAPTURE"] == "(set)"
    assert found["AGX_RELAX_CDM_CTXSTORE_TIMEOUT"] == "1" and found["MLX_GEMMA4_KERNELS"] == "ON"
    assert found["MLX_ENABLE_TF32"] == "0"
    text = (tmp_path / "report.json").read_text()
    assert "jane" not in text and "4711" not in text and str(Path.home()) not in text


def test_a_machine_without_a_gpu_tells_what_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's speed, and that references run."""
    monkeypatch.setattr(bench, "COPIED", 1 << 16)
    found = written(tmp_path / "report.json")
    assert not found["gpu"]
    assert {c["verdict"] for c in found["checks"]} == {"runs as stock operations"}
    demo = found["demo"]
    assert demo["load_time"] > 0 and [c["kind"] for c in demo["cells"]] == ["prefill", "decode"]
    assert all(c["ours"] > 0 for c in demo["cells"])


def test_a_check_that_takes_the_process_down_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found before it is in the file."""
    file = tmp_path / "report.json"
    monkeypatch.setattr(render, "default_launcher", lambda: metal)
    run_check = verdict.run_check

    def dies(check: Any, launcher: Any, timed: bool) -> Any:
        if str(check.op) == "matvec Q4_0":
            raise SystemExit  # as near to an abort as a test can come
        return run_check(check, launcher, False)

    monkeypatch.setattr(verdict, "run_check", dies)
    with pytest.raises(SystemExit):
        written(file)
    found = json.loads(file.read_text())
    assert found["running"] == "matvec Q4_0: 32x64 fp32"
    assert found["checks"] and all(c["op"] < "matvec" for c in found["checks"])
    assert found["machine"] and "demo" not in found


def test_a_kernel_that_fails_is_told_with_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metal's words and the threads that it refused."""

    def limited(**declared: Any) -> Any:
        kernel = metal(**declared)

        def call(**arguments: Any) -> Any:
            if declared["name"].startswith("add_norm"):
                raise ValueError(
                    "Thread group size (64) is greater than the maximum allowed threads per threadgroup (32)"
                )
            return kernel(**arguments)

        return call

    monkeypatch.setattr(render, "default_launcher", lambda: limited)
    monkeypatch.setattr(report, "load_subject", lambda path: 1 / 0)
    found = written(tmp_path / "report.json", passed=False)
    check = next(c for c in found["checks"] if c["op"] == "add_norm")
    assert check["failed"] and "Thread group size" in check["verdict"] and check["launches"][0]["threads"] > 0
    assert list(found["off"]) == ["add_norm"]


def test_the_command_says_where_the_report_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_demo", dict)
    file = tmp_path / "report.json"
    done = CliRunner().invoke(main, ["doctor", "--json", "--report", str(file)])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["checks"] == json.loads(file.read_text())["checks"]
    assert done.stderr.splitlines()[-1].startswith(f"{file} ") and "attach it to an issue" in done.stderr


def test_a_report_that_cannot_be_written_costs_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "run_check", lambda *_: math.nan)
    done = CliRunner().invoke(main, ["doctor", "--report", str(tmp_path / "no" / "report.json")])
    assert done.exit_code != 0 and "can't be saved" in done.stderr
