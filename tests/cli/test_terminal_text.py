"""What files and models say reaches a terminal without what could control it; errors are short, and come early."""

from __future__ import annotations

import ast
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
from click.testing import CliRunner
from recorded import HERE
from rewrite import odd

from mlx_gemma4 import Sampling, generate, load
from mlx_gemma4.cli.main import main
from mlx_gemma4.cli.options import say
from mlx_gemma4.conversation.language_model import demo_path
from mlx_gemma4.errors import InputError, one_line, printable

PACKAGE = Path(__file__).parents[2] / "mlx_gemma4"
EVIL = "\x1b]0;OWNED\x07\x1b[2J\x9b31m\x08\x7f\rhi"
COMMAND = [sys.executable, "-m", "mlx_gemma4"]


def on_a_terminal(*args: str) -> bytes:
    """Both streams of a command on a terminal."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [*COMMAND, *args])
    seen = b""
    try:
        while piece := os.read(terminal, 65536):
            seen += piece
    except OSError:  # Linux: the other end is closed
        pass
    os.waitpid(child, 0)
    return seen


def harmless(seen: bytes) -> bool:
    """No control but line ends and what this program draws: its progress lines and dim text."""
    text = re.sub(r"\r[^\r\n]*\x1b\[K|\x1b\[[02]m|\r?\r\n", "", seen.decode())
    return not any(c in text for c in "\x1b\x07\x08\x7f\x9b\r")


@pytest.mark.slow
def test_commands_on_a_terminal(tmp_path: Path) -> None:
    file = demo_path()
    reader = gguf.GGUFReader(file)
    tokens = [str(t) for t in reader.fields["tokenizer.ggml.tokens"].contents()]
    types = list(reader.fields["tokenizer.ggml.token_type"].contents())
    merges = [
        part for m in reader.fields["tokenizer.ggml.merges"].contents() for part in (*str(m).split(" ", 1), str(m))
    ]
    used = {*merges, *(m.replace(" ", "", 1) for m in merges)}
    renamed = [f"{t}\x1b]0;OWNED{i}\x07\x9b" if types[i] == 1 and t not in used else t for i, t in enumerate(tokens)]
    evil = odd(file, tmp_path / "e\x1b[2J.gguf", {"general.name": EVIL, "tokenizer.ggml.tokens": renamed})
    template = odd(file, tmp_path / "t.gguf", {"tokenizer.chat_template": "{{ raise_exception('\x1b]0;OWNED\x07') }}"})
    for args in (
        ("inspect", str(evil)),
        ("generate", "-m", str(evil), "-p", "Once", "-n", "8", "--temperature", "3", "--top-k", "0", "--top-p", "1"),
        ("generate", "-m", str(template), "-p", "x", "--debug"),
        ("generate", "-m", f"{EVIL}.gguf", "-p", "x"),
    ):
        seen = on_a_terminal(*args)
        assert seen.strip()
        assert harmless(seen), (args, seen)
        assert b"]0;OWNED\x07" not in seen


def test_text_is_made_harmless(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert printable(EVIL) == "�]0;OWNED��[2J�31m��hi"
    assert printable("a\tb\nü\U0001f600\u202b") == "a\tb\nü\U0001f600\u202b"
    say(EVIL)
    say(EVIL, err=True)
    said = capsys.readouterr()
    assert "\x07" in said.out  # into a pipe as it is, but for what click takes out
    assert said.err == printable(EVIL) + "\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    say(EVIL)
    assert capsys.readouterr().out == printable(EVIL) + "\n"


def test_logs_and_tracebacks_are_harmless(tmp_path: Path) -> None:
    code = (
        "import logging, sys, threading\nfrom mlx_gemma4.cli.options import _set_up_logging\n"
        "_set_up_logging(None, None, True)\nE = sys.argv[1]\nlogging.warning('%s', E)\n"
        "try:\n    raise ValueError(E)\nexcept ValueError:\n    logging.exception('oh')\n"
        "def f(): raise ValueError(E)\nt = threading.Thread(target=f); t.start(); t.join()\nraise KeyError(E, E[0])"
    )
    done = subprocess.run([sys.executable, "-c", code, EVIL.replace("\r", "")], capture_output=True, text=True)
    assert done.stderr.count("Traceback") == 3
    assert not set(done.stderr) & set("\x1b\x07\x08\x7f\x9b")


def test_everything_printed_passes_one_door() -> None:
    """Nothing prints but `say`, the progress line and the screen of replies."""
    doors = {"cli/options.py", "cli/reply_screen.py"}
    for path in PACKAGE.rglob("*.py"):
        if str(path.relative_to(PACKAGE)) in doors:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("print", "click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write"), (
                    path
                )


@pytest.mark.parametrize("text", ["y" * 100_000, "a b " * 100_000, "\x1b" * 5000, "a\n\n\tb", "", "é" * 481])
def test_errors_are_one_short_line(text: str) -> None:
    for error in (InputError(f"start {text} end"), InputError(text)):
        assert len(str(error)) <= 480
        assert str(error).isprintable()
    assert str(InputError(f"start {text} end")).startswith("start")
    assert str(InputError(f"start {text} end")).endswith("end")
    assert one_line("as it is") == "as it is"


def test_places_are_checked_before_a_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before the model is loaded, and what is there stays: folders, devices, pipes, files of others."""
    notes, pipe = tmp_path / "notes.txt", tmp_path / "pipe"
    notes.write_text("mine")
    os.mkfifo(pipe)
    (tmp_path / "prompts").write_text('{"prompt": "x"}\n')
    for module in ("generate", "chat_loop", "prompts"):
        monkeypatch.setattr(f"mlx_gemma4.cli.{module}.load_with_progress", None)
    cases = [("generate", "--prompts", str(tmp_path / "prompts"), "-o", str(tmp_path / "no/such/o"))]
    for place in map(str, (tmp_path / "no/such/s", tmp_path, notes, pipe, "/dev/null", notes / "x")):
        cases += [("generate", "-p", "hi", "--state", place), ("chat", "--state", place)]
    cases += [("doctor", "--report", str(tmp_path / "no/r.json")), ("bench", "--json", str(tmp_path / "no/r.json"))]
    for args in cases:
        done = CliRunner().invoke(main, args)
        assert done.exit_code == 2, (args, done.output)
        assert done.output.count("\n") == 1
        assert f"{args[-1]}: can't be saved" in done.output
    assert notes.read_text() == "mine"
    assert pipe.is_fifo()


@pytest.mark.parametrize(
    "args",
    [
        ("--seed", str(2**64)),
        ("--seed", "-1"),
        ("--top-k", "-1"),
        ("--top-k", str(10**30)),
        ("--temperature", "nan"),
        ("--temperature", "1e300"),
        ("--repetition-penalty", "inf"),
        ("-n", "0"),
    ],
)
def test_bounds_of_options(args: tuple[str, ...]) -> None:
    file = str(HERE / "e2b-f32.gguf")
    done = CliRunner().invoke(main, ["generate", "-m", file, "-p", "x", *(() if "-n" in args else ("-n", "1")), *args])
    works = args == ("--top-k", str(10**30))
    assert done.exit_code == (0 if works else 2), done.output
    assert "unexpected" not in done.output


def test_seeds_of_64_bits() -> None:
    lm = load(HERE / "e2b-f32.gguf")
    for seed in (0, 2**63, 2**64 - 1, -1, -(2**63)):
        assert generate(lm, "x", max_tokens=2, seed=seed) == generate(lm, "x", max_tokens=2, seed=seed)
    bad: Any
    for bad in (2**64, -(2**63) - 1, 1.5, "1", True, [1]):
        with pytest.raises(InputError, match="seed"):
            Sampling(seed=bad)
    for name, bad in (("temperature", "1"), ("temperature", None), ("top_k", 1.5), ("top_p", []), ("min_p", True)):
        with pytest.raises(InputError, match=name.replace("_", "-")):
            Sampling(**{name: bad})
    for bad in ("x", {"a": 1}, {1: "b"}, {1: 1e300}, 5):
        with pytest.raises(InputError, match="logit_bias"):
            Sampling(logit_bias=bad)
    for options in ({"max_tokens": "5"}, {"max_tokens": 1.5}, {"logprobs": "x"}, {"stop": [1]}):
        with pytest.raises(InputError):
            generate(lm, "x", **options)
