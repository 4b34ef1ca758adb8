"""Ranks that die, stall, drift or aren't the same: rank 0 says so in one line and ends, and nothing is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranked import LAUNCHED, TESTS, end_of, ranks
from recorded import HERE

from mlx_gemma4.conversation.language_model import demo_path

pytestmark = pytest.mark.slow
LONG = [*LAUNCHED, "generate", "-p", "Tell me a tale.", "-n", "1900", "--temperature", "1", "--split", "tensor"]
FOLLOW = [sys.executable, str(TESTS / "ranked.py")]
SOON = 10.0  # seconds in which a fault is told, once it is certain
STALL = 5.0  # seconds, in place of 30


def last_line(err: str) -> str:
    """The one line about a fault; what came before it tells of loading."""
    lines = [line for line in err.splitlines() if line.startswith("mlx-gemma4: ")]
    assert len(lines) == 1, err
    assert lines[0] == err.splitlines()[-1]
    return lines[0]


def answering(first: subprocess.Popen[str]) -> None:
    """Wait until a reply is under way."""
    assert first.stdout is not None
    assert first.stdout.read(1)


def gone(process: subprocess.Popen[str], seconds: float = SOON) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


@pytest.mark.parametrize("size", [2, 3])
def test_a_killed_rank_ends_the_reply(tmp_path: Path, size: int) -> None:
    with ranks(tmp_path, *[LONG] * size) as (first, *others):
        answering(first)
        os.kill(others[-1].pid, signal.SIGKILL)
        start = time.monotonic()
        code, _, err = end_of(first)
        assert time.monotonic() - start < SOON
        assert code == 1
        assert last_line(err).startswith(f"mlx-gemma4: rank {size - 1} (")
        assert "died" in last_line(err)
        assert all(map(gone, others))


def test_followers_end_with_rank_0(tmp_path: Path) -> None:
    with ranks(tmp_path, LONG, LONG) as (first, second):
        answering(first)
        os.kill(first.pid, signal.SIGKILL)
        assert gone(second)


def test_a_stopped_rank_ends_the_reply_and_is_gone(tmp_path: Path) -> None:
    with ranks(tmp_path, LONG, LONG, MLX_GEMMA4_STALL=str(STALL)) as (first, second):
        answering(first)
        os.kill(second.pid, signal.SIGSTOP)
        start = time.monotonic()
        code, _, err = end_of(first)
        assert STALL - 2 < time.monotonic() - start < STALL + SOON
        assert code == 1
        assert "has been silent for 5 s" in last_line(err)
        assert gone(second)


@pytest.mark.parametrize(("how", "size"), [("busy", 3), ("waiting", 2)])
def test_a_rank_that_hangs_but_lives_ends_the_reply_and_is_gone(tmp_path: Path, how: str, size: int) -> None:
    """Its thread that gives signs of life goes on, while it makes a step for ever, or waits for what never comes."""
    hangs = [*FOLLOW, how, str(tmp_path)]
    with ranks(tmp_path, *[LONG] * (size - 1), hangs, MLX_GEMMA4_STALL=str(STALL)) as (first, *others):
        answering(first)
        while not (tmp_path / "hangs").exists():
            assert others[-1].poll() is None
            time.sleep(0.05)
        start = time.monotonic()
        code, _, err = end_of(first)
        assert STALL - 2 < time.monotonic() - start < STALL + SOON
        assert code == 1
        assert last_line(err).startswith(f"mlx-gemma4: rank {size - 1} (")
        assert "): alive, but no further for 5 s; see what holds" in last_line(err)
        assert all(map(gone, others))


def test_another_model(tmp_path: Path) -> None:
    mine = [*LAUNCHED, "generate", "-p", "A", "-n", "2", "-m"]
    here, there = tmp_path / "here.gguf", tmp_path / "there.gguf"
    here.write_bytes((HERE / "31b-q4_0.gguf").read_bytes())
    with ranks(tmp_path, [*mine, str(here)], [*FOLLOW, "other", str(here), str(there)]) as (first, second):
        there.write_bytes((HERE / "31b-q8_0.gguf").read_bytes())
        code, out, err = end_of(first)
        assert (code, out) == (2, "")
        assert "is another file than rank 0's" in last_line(err)
        assert gone(second)


def test_an_assistant_that_is_not_everywhere(tmp_path: Path) -> None:
    """One that lies beside the model is left out; one that was named is not."""
    demo, here, there = demo_path(), tmp_path / "here", tmp_path / "there"
    for folder, assistants in ((here, ["mtp-model.gguf", "named.gguf"]), (there, ["named.gguf"])):
        folder.mkdir()
        for name in ("model.gguf", *assistants):
            shutil.copy(demo.with_name(demo.name if name == "model.gguf" else f"mtp-{demo.name}"), folder / name)
    command = [*LAUNCHED, "generate", "-p", "A", "-n", "2", "--split", "tensor", "-m", str(here / "model.gguf")]
    with ranks(tmp_path, command, [*FOLLOW, "other", str(here), str(there)]) as (first, second):
        code, _, err = end_of(first)
        assert (code, end_of(second)[0]) == (0, 0)
        assert "No drafts: rank 1 (" in err
        assert "mtp-model.gguf: no such file" in err
    with (there / "named.gguf").open("r+b") as file:
        file.seek(-9, 2)
        file.write(b"x")
    named = [*command, "--draft", str(here / "named.gguf")]
    with ranks(tmp_path, named, [*FOLLOW, "other", str(here), str(there)]) as (first, second):
        code, out, err = end_of(first)
        assert (code, out) == (2, "")
        assert "named.gguf: is another file than rank 0's" in last_line(err)
        assert gone(second)


def test_another_version(tmp_path: Path) -> None:
    with ranks(tmp_path, LONG, [*FOLLOW, "version"]) as (first, second):
        code, out, err = end_of(first)
        assert (code, out) == (2, "")
        assert "has mlx-gemma4 0.0.1, rank 0 has" in last_line(err)
        assert gone(second)


def test_drift_is_caught(tmp_path: Path) -> None:
    told = ["A tale of a fox. " * 60 if part == "Tell me a tale." else part for part in LONG]  # over 256 tokens
    with ranks(tmp_path, told, [*FOLLOW, "drift"]) as (first, second):
        code, _, err = end_of(first)
        assert code == 1
        assert "has drifted from rank 0 by token " in last_line(err)
        assert gone(second)
