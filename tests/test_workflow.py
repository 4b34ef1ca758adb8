"""The workflow for Macs, which no machine of ours runs: what it takes from other files is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
JOB: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "mac.yml").read_text())["jobs"]["mac"]
SCRIPTS = [step["run"] for step in JOB["steps"] if "run" in step]


def printed(command: str) -> str:
    return subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def test_it_installs_as_the_readme_says_and_takes_the_lowest_mlx() -> None:
    install = next(s for s in SCRIPTS if "README.md" in s)
    (readme,) = re.findall(r"\$\((grep [^)]*README\.md)\)", install)
    assert printed(readme) == 'pip install . && mlx-gemma4 generate --prompt "Once upon a time"'
    (lowest,) = re.findall(r"==\$\((sed .*pyproject\.toml)\)", install)
    assert re.fullmatch(r"0\.\d+\.\d+", printed(lowest))


def test_every_step_ends_and_reports_are_kept() -> None:
    assert all("timeout-minutes" in step for step in JOB["steps"] if "run" in step)
    upload = JOB["steps"][-1]
    assert upload["if"] == "always()" and upload["with"]["path"] == "reports/"
    assert all("reports" in script for script in SCRIPTS if "pip install '.[test]'" not in script)


def test_the_tests_that_it_names_are_there() -> None:
    named = re.findall(r"\btests/\S+", "\n".join(SCRIPTS))
    assert len(named) >= 4 and all((ROOT / path).exists() for path in named)
    chosen = "\n".join((ROOT / path).read_text() for path in named if path.endswith("test_on_metal.py"))
    assert "def test_apple_agrees" in chosen and "def test_kernels_are_right_on_this_gpu" in chosen
