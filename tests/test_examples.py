"""Each example runs as it stands, with the built-in model, and so do those in docstrings."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ["batch", "fork", "json_schema", "one_liner", "streaming", "tools"]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each example printed: they run side by side."""
    here = tmp_path_factory.mktemp("examples")
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__"]
    runs = {
        name: subprocess.Popen(
            [*command, EXAMPLES / f"{name}.py"],
            cwd=here,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        for name in NAMES
    }
    printed = {name: run.communicate(timeout=120)[0] for name, run in runs.items()}
    assert {name: run.returncode for name, run in runs.items()} == dict.fromkeys(NAMES, 0), printed
    return printed | {"answers": (here / "prompts.answers.jsonl").read_text(encoding="utf-8")}


def test_all_are_here_and_short() -> None:
    found = {path.stem for path in EXAMPLES.glob("*.py")} - {"make_synthetic"}
    assert found == set(NAMES)
    for name in NAMES:
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60


def test_they_say_something(output: dict[str, str]) -> None:
    assert len(output["one_liner"].split()) > 20
    assert len(output["streaming"].split()) > 20 and "tokens" in output["streaming"]


def test_the_tool_was_called_for_real(output: dict[str, str]) -> None:
    line = next(line for line in output["tools"].splitlines() if "[add({" in line)
    arguments, result = line.split("[add(")[1].rstrip("]").split(") = ")
    arguments = json.loads(arguments.replace("'", '"'))
    assert int(result) == arguments["a"] + arguments["b"]


def test_the_schema_was_obeyed(output: dict[str, str]) -> None:
    facts = json.loads(output["json_schema"])
    assert set(facts) == {"hero", "animal", "gold_pieces", "ends_well"}


def test_forks_read_what_is_new(output: dict[str, str]) -> None:
    lines = [line for line in output["fork"].splitlines() if "already]" in line]
    assert len(lines) == 3
    assert all(int(line.split()[1]) < 30 < int(line.split()[4]) for line in lines)


def test_the_batch_shares_its_beginning(output: dict[str, str]) -> None:
    answers = [json.loads(line) for line in output["answers"].splitlines()]
    assert len(answers) == 3 and all(answer["reply"] for answer in answers)
    known = [int(line.split()[-2]) for line in output["batch"].splitlines() if line.endswith("known")]
    assert len(known) == 3 and min(known) > 10


@pytest.mark.parametrize(
    "module",
    [
        "chat_format.messages",
        "chat_format.replies",
        "conversation.batch",
        "conversation.language_model",
        "conversation.mlx_lm",
        "conversation.reply",
        "conversation.session",
    ],
)
def test_docstrings(module: str) -> None:
    failed, tried = doctest.testmod(import_module(f"mlx_gemma4.{module}"))
    assert tried and not failed
