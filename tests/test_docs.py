"""Commands in README and docs: their flags exist, those that need no download run; the table of Macs is computed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import pytest
import which_mac

from mlx_gemma4.cli.main import main
from mlx_gemma4.cli.options import LOADING, Lenient

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "log.md")]
WAITING = ("serve", "chat", "hosts")  # for somebody


def commands() -> list[tuple[str, list[str]]]:
    """Each command line in a block of code, with its page; what comes before in a pipe or behind is left out."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:sh|console)?\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if said := re.search(r"(?:^\$? ?|&& |\| )mlx-gemma4 (.*)", line):
                    found.append((page.name, shlex.split(re.split(r" [|>]| 2>", said[1])[0], comments=True)))
    return found


def in_text() -> list[tuple[str, list[str]]]:
    """Each command line in the text that has a flag."""
    return [
        (page.name, shlex.split(said.replace(" ..", "")))
        for page in PAGES
        for said in re.findall(r"`mlx-gemma4 ([^`\n]* --[^`\n]*)`", page.read_text())
    ]


def parsed(words: list[str]) -> click.Context:
    """Parse a command line as the program does, without running it."""
    command: click.Command = main
    while isinstance(command, click.Group):
        command, words = command.commands[words[0]], words[1:]
    return command.make_context("mlx-gemma4", list(words))


@pytest.mark.parametrize(("page", "words"), [*commands(), *in_text()], ids=lambda x: x if isinstance(x, str) else x[0])
def test_flags_exist(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_GEMMA4_THREADS", "")
    with suppress(click.exceptions.Exit):  # --help
        try:
            parsed(words)
        except click.BadOptionUsage:  # the text means the flag, without its value
            parsed([*words, "1"])


def runnable() -> list[Any]:
    """Those with the demo: they name no file and no repository, and nobody has to end them."""
    some = [
        (page, words)
        for page, words in commands()
        if words[0] not in WAITING and not re.search("[/.]|^pull|^rm", " ".join(words))
    ]
    return [pytest.param(words, id=f"{page}-{words[0]}") for page, words in some]


@pytest.mark.slow
@pytest.mark.parametrize("words", runnable())
def test_those_that_need_no_download_run(words: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "mlx_gemma4", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and (done.stdout or "No models" in done.stderr), done.stderr
    if words[0] == "generate":
        assert len(done.stdout.split()) > 20


def test_there_are_commands_to_run_and_commands_parse_what_they_are_given() -> None:
    assert len(runnable()) >= 3 and len(commands()) >= 15
    assert isinstance(main.commands["generate"], Lenient)
    assert parsed(["generate", "hi", "--ctx-size", "99"]).meta[LOADING]["context"] == 99
    with pytest.raises(click.UsageError):
        parsed(["generate", "hi", "--no-such-flag"])


def test_which_model_for_which_mac() -> None:
    """docs/models.md has the table that benchmarks/which_mac.py makes; and what it recommends fits."""
    page = (ROOT / "docs" / "models.md").read_text()
    lines = list(which_mac.table())
    assert "\n".join(lines) in page
    cells = {tuple(x.strip() for x in line.split("|")[1:3]): line.split("|")[4:-1] for line in lines[2:]}
    fits = lambda kind, gib: cells[kind][which_mac.MACS.index(gib)].strip()  # noqa: E731
    assert fits(("E2B", "Q4_0"), 8) and fits(("E4B", "Q8_0"), 16) and fits(("12B", "Q4_0"), 16)
    assert fits(("12B", "Q6_K"), 24) and fits(("26B-A4B", "Q4_0"), 24) and fits(("26B-A4B", "Q4_K_M"), 32)
    assert fits(("31B", "Q4_0"), 32) and fits(("31B", "Q6_K"), 48) and not fits(("31B", "Q4_K_M"), 24)
    assert f"{which_mac.LEAST >> 10}K" in page


def test_table_of_types() -> None:
    """docs/files.md has the table that benchmarks/by_type.py prints of its JSON file."""
    words = ["benchmarks/by_type.py", "--table", "docs/benchmarks/types-12b-h200.json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    made = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert made.stdout in (ROOT / "docs" / "files.md").read_text()
