"""The workflows, which no machine of ours runs: what they take from other files is there; a release's steps run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
JOB: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "mac.yml").read_text())["jobs"]["mac"]
SCRIPTS = [step["run"] for step in JOB["steps"] if "run" in step]
RELEASE: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
FORMULA = (ROOT / "packaging" / "mlx-gemma4.rb").read_text()


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


def test_a_tag_alone_publishes_and_with_no_token() -> None:
    publish = RELEASE["publish"]
    assert publish["if"] == "startsWith(github.ref, 'refs/tags/v')" and publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"} and publish["environment"] == "pypi"
    assert [step["uses"].split("@")[0] for step in publish["steps"]][-1] == "pypa/gh-action-pypi-publish"
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()


def test_the_formula_has_what_pyproject_calls_for() -> None:
    """A wheel of each dependency for a Mac, with its hash; packaging/homebrew.py writes them where the marks are."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = text[text.index("dependencies = [") : text.index("[project.optional-dependencies]")]
    wanted = {name.lower().replace("_", "-") for name in re.findall(r'^    "([\w-]+)', listed, re.MULTILINE)}
    found = re.findall(r'resource "(\S+)" do\n    url "(\S+)", using: :nounzip\n    sha256 "([0-9a-f]{64})"\n', FORMULA)
    assert wanted | {"mlx-metal"} <= {name for name, _, _ in found} and len(found) == FORMULA.count('resource "')
    assert all(re.search(r"-(none-any|macosx_1[0-4]_\d+_(arm64|universal2))\.whl$", url) for _, url, _ in found)
    (version,) = re.findall(r'^version = "(.*)"$', text, re.MULTILINE)
    assert f"mlx_gemma4-{version}-py3-none-any.whl" in FORMULA


@pytest.mark.slow
def test_the_release_builds_installs_and_runs(tmp_path: Path) -> None:
    """Its build job, step by step on a copy of the tree; but the packages that tests have are not downloaded again."""
    tree = tmp_path / "tree"
    for name in ("mlx_gemma4", "kernels", "packaging"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    env = {key: x for key, x in os.environ.items() if key != "PYTHONPATH"}
    env |= {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "RUNNER_TEMP": str(tmp_path)}
    env["GITHUB_REF"] = "refs/heads/main"
    (packages := tmp_path / "packages").mkdir()  # those of the tests, but not this one, where it is installed
    for path in (path for folder in sys.path if folder.endswith("-packages") for path in Path(folder).iterdir()):
        if not path.name.startswith("mlx_gemma4") and not (packages / path.name).exists():
            (packages / path.name).symlink_to(path)
    steps = [step for step in RELEASE["build"]["steps"] if "run" in step]
    assert len(steps) == 5
    for step in steps[:4]:  # the last one asks PyPI about every dependency
        more = {"PYTHONPATH": str(packages)} if step["name"].startswith("Install") else {}
        command = ["bash", "-e", "-o", "pipefail", "-c", step["run"]]
        done = subprocess.run(command, cwd=tree, env={**env, **more}, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, (step["name"], done.stdout[-2000:], done.stderr[-2000:])
    assert len((tmp_path / "wheel.txt").read_text().split()) >= 30
