"""The command line as a person meets it: what is printed where, exit codes, one line for every mistake."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click.testing
import pexpect
import pytest
from recorded import HERE
from rewrite import drop, rewrite

from mlx_gemma4.cli import options
from mlx_gemma4.cli.main import main
from mlx_gemma4.conversation import language_model

MODEL = HERE / "e2b-q4_k_m.gguf"
COMMAND = [sys.executable, "-m", "mlx_gemma4"]


def run(*args: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, args)], input=text, capture_output=True, text=True, timeout=300)


def refused(*args: str | Path, code: int = 2, text: str | None = None) -> str:
    """The one line of stderr that a refusal prints."""
    done = run("generate", *args, text=text)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.strip().splitlines() if "has no chat template" not in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("mlx-gemma4: ")
    return lines[0]


def test_reply_on_stdout_statistics_on_stderr() -> None:
    done = run("generate", "-m", MODEL, "-p", "the and", "-n", "5", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    assert "Reply: " in done.stderr
    assert "Peak memory: " in done.stderr
    assert "Prompt: " not in done.stdout


def test_built_in_model() -> None:
    done = run("generate", "-p", "Once upon a time", "-n", "100", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert "built-in demo" in done.stderr
    assert "--model ggml-org/gemma-4" in done.stderr
    words = done.stdout.split()
    assert len(words) > 50
    assert len(set(words)) > 25, "the demo repeats itself"


def test_json() -> None:
    done = run("generate", "-m", MODEL, "-p", "the", "-n", "4", "--json", "--temperature", "0")
    report = json.loads(done.stdout)
    assert report["reply_tokens"] <= 4
    assert report["prompt_tokens"] > 1
    assert report["peak_memory"] > 0
    plain = run("generate", "-m", MODEL, "-p", "the", "-n", "4", "--temperature", "0")
    assert report["text"] == plain.stdout.removesuffix("\n")


def test_standard_input_and_seed() -> None:
    args = ("generate", "-m", MODEL, "-n", "12", "--temperature", "1", "--seed", "7", "--raw")
    assert run(*args, "-p", "-", text="the and").stdout == run(*args, "-p", "the and").stdout


def test_verbose_tells_plan_and_fusion() -> None:
    done = run("generate", "-m", MODEL, "-p", "the", "-n", "1", "-v")
    assert "Memory plan: weights" in done.stderr
    assert "Fused gate+up on 4 MLP layers (0 left unfused)" in done.stderr


def test_interrupted() -> None:
    """Ctrl-C leaves what was written, the statistics of what ran, and the exit code that shells expect."""
    args = [*COMMAND, "generate", "-p", "Once upon a time", "-n", "2000", "--temperature", "1"]
    # A runner in the background ignores Ctrl-C, and so would its children.
    heed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed)
    assert process.stdout is not None
    first = process.stdout.read(20)  # it has begun to answer
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert len(first + rest) >= 20
    assert b"(interrupted)" in errors
    assert b"Traceback" not in errors


def test_closed_pipe() -> None:
    """`mlx-gemma4 generate | head -c 1` ends quietly."""
    args = " ".join([*COMMAND, "generate", "-p", "Once", "-n", "300"])
    done = subprocess.run(["bash", "-c", f"{args} | head -c 1"], capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr
    assert "unexpected" not in done.stderr


def test_version_and_help() -> None:
    assert run("--version").stdout.startswith("mlx-gemma4")
    for args in (["--help"], ["generate", "--help"]):
        assert "Usage" in run(*args).stdout


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from mlx_gemma4.cli.main import main; main(sys.argv[1:], standalone_mode=False);"
    code += "print([m for m in ('mlx.core', 'numpy', 'jinja2', 'rich', 'starlette') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, "chat", "--help"], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["-m", "nowhere.gguf", "-p", "x"], "nowhere.gguf: no such file"),
        (["-m", __file__, "-p", "x"], "not a GGUF"),
        (["-m", str(HERE), "-p", "x"], "no config.json"),
        (["-m", str(MODEL), "-p", ""], "the prompt is empty"),
        (["-m", str(MODEL), "-p", "x", "--temperature", "-1"], "--temperature -1.0"),
        (["-m", str(MODEL), "-p", "x", "--temperature", "nan"], "--temperature nan"),
        (["-m", str(MODEL), "-p", "x", "--top-k", "-2"], "--top-k -2"),
        (["-m", str(MODEL), "-p", "x", "--top-p", "0"], "--top-p 0.0"),
        (["-m", str(MODEL), "-p", "x", "--min-p", "2"], "--min-p 2.0"),
        (["-m", str(MODEL), "-p", "x", "--repetition-penalty", "0"], "--repetition-penalty 0.0"),
        (["-m", str(MODEL), "-p", "x", "--frequency-penalty", "nan"], "--frequency-penalty nan"),
    ],
)
def test_wrong_flag(flags: list[str], says: str) -> None:
    assert says in refused(*flags)


def test_prompt_longer_than_the_context() -> None:
    line = refused("-m", MODEL, "-p", "-", text="the " * 2000)
    assert "512" in line
    assert "context" in line


def test_truncated_anywhere(tmp_path: Path) -> None:
    """Cut at any place, header or data, a file is refused in one line."""
    whole = MODEL.read_bytes()
    cut = tmp_path / "cut.gguf"
    for share in (0, 0.001, 0.1, 0.5, 0.999):
        cut.write_bytes(whole[: int(len(whole) * share)])
        assert "cut.gguf" in refused("-m", cut, "-p", "x")


def test_missing_tensor(tmp_path: Path) -> None:
    broken = rewrite(HERE / "e2b-f32.gguf", tmp_path / "broken.gguf", drop("blk.1.ffn_up"))
    assert "blk.1.ffn_up.weight missing" in refused("-m", broken, "-p", "x")


def test_too_little_memory(tmp_path: Path) -> None:
    """Said before anything is loaded, with both numbers, exit code 3."""
    code = (
        "import mlx_gemma4.memory as m; m.available_memory = lambda: 1_000_000; "
        "from mlx_gemma4.cli.main import main; main()"
    )
    args = [sys.executable, "-c", code, "generate", "-m", str(MODEL), "-p", "x"]
    done = subprocess.run(args, capture_output=True, text=True, timeout=300)
    assert done.returncode == 3
    assert "needs 0.4 GB of memory and 0.0 GB are free" in done.stderr


def test_a_draft_that_does_not_match() -> None:
    """One line that says what does not; and without drafts nobody looks at the file."""
    other = str(Path(__file__).parents[1] / "fixtures" / "assistants" / "e2b" / "assistant")
    done = run("generate", "-p", "x", "-n", "1", "--draft", other)
    assert done.returncode == 2
    assert "this assistant is for a model of hidden size 40, and the model's is 256" in done.stderr.splitlines()[-1]
    assert run("generate", "-p", "x", "-n", "1", "--draft", other, "--no-draft").returncode == 0


def test_debug_shows_the_traceback() -> None:
    done = run("generate", "-m", "nowhere.gguf", "-p", "x", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_every_command_helps_and_debugs() -> None:
    groups = [(name, one) for name, one in main.commands.items() if isinstance(one, click.Group)]
    inner = [([name, sub], one) for name, group in groups for sub, one in group.commands.items()]
    assert [words for words, _ in inner] == [["hosts", "check"]]
    for words, command in [*(([name], one) for name, one in main.commands.items()), *inner]:
        flags = {flag for option in command.params for flag in option.opts}
        if not (command.hidden or isinstance(command, click.Group) or words == ["completion"]):
            assert {"--verbose", "--debug"} <= flags, words
        shown = click.testing.CliRunner().invoke(main, [*words, "--help"]).stdout
        assert "Usage" in shown
        assert (command.help or "").split()[0] in shown


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell: str) -> None:
    script = run("completion", shell).stdout
    assert "_MLX_GEMMA4_COMPLETE" in script
    assert f"{shell}_complete" in script


def test_completion_in_bash(tmp_path: Path) -> None:
    """Sourced as --help says; then a tab after `gen`, and after `bench --dep`."""
    program = tmp_path / "mlx-gemma4"
    program.write_text(f"#!{sys.executable}\nfrom mlx_gemma4.cli.main import main\nmain(prog_name='mlx-gemma4')\n")
    program.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)}
    for words, found in (("mlx-gemma4 gen", "generate"), ("mlx-gemma4 bench --dep", "--depths")):
        tab = f"COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _mlx_gemma4_completion mlx-gemma4"
        script = f'eval "$(mlx-gemma4 completion bash)"; {tab}; echo "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=300)
        assert done.stdout.strip() == found, done.stderr


def test_no_option_leaks_into_the_environment() -> None:
    """The package runs without a writable home or cache folder."""
    env = {**os.environ, "HOME": "/nonexistent", "XDG_CACHE_HOME": "/nonexistent"}
    done = subprocess.run(
        [*COMMAND, "generate", "-m", str(MODEL), "-p", "the", "-n", "2"],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_json_schema(tmp_path: Path) -> None:
    schema = tmp_path / "person.json"
    schema.write_text(json.dumps(PERSON))
    done = run("generate", "-p", "Who are you?", "--json-schema", schema, "--temperature", "1", "--seed", "3")
    assert done.returncode == 0, done.stderr
    person = json.loads(done.stdout)
    assert set(person) == {"name", "age"} and len(person["name"]) <= 12 and 0 <= person["age"] <= 99


def test_stop_strings() -> None:
    args = ("generate", "-p", "Once upon a time", "-n", "40", "--temperature", "0")
    whole = run(*args).stdout
    cut = run(*args, "--stop", "no such", "--stop", whole[25:33]).stdout
    assert cut.removesuffix("\n") == whole[: whole.index(whole[25:33])]


def test_logprobs() -> None:
    done = run("generate", "-m", MODEL, "-p", "the", "-n", "4", "--json", "--logprobs", "2", "--temperature", "0")
    report = json.loads(done.stdout)
    assert [len(token["top"]) for token in report["tokens"]] == [2] * len(report["tokens"])
    for token in report["tokens"]:
        assert token["top"][0] == {key: token[key] for key in ("id", "text", "logprob")}
    assert "".join(token["text"] for token in report["tokens"]) == report["text"]
    assert report["stop_reason"] in ("stop", "length")


@pytest.mark.slow
def test_thinking_stays_out_of_the_reply() -> None:
    """On stderr, and in `--json` under its own name."""
    args = ("generate", "-p", "Once upon a time", "-n", "60", "--seed", "1", "--system", "Be brief.")
    done = run(*args, "--think")
    report = json.loads(run(*args, "--think", "--json").stdout)
    assert report["thinking"] and report["thinking"] in done.stderr
    assert report["thinking"] not in done.stdout and "thought" not in done.stdout
    assert done.stdout.removesuffix("\n") == report["text"]
    assert "thinking" not in json.loads(run(*args, "--no-think", "--json").stdout)


def test_thinking_is_dimmed_on_a_terminal() -> None:
    args = ["-m", "mlx_gemma4", "generate", "-p", "Once upon a time", "-n", "60", "--seed", "1", "--think"]
    child = pexpect.spawn(sys.executable, args, encoding="utf-8", timeout=300)
    shown = child.read()
    dimmed, plain = re.findall(r"\x1b\[2m(.*?)\x1b\[0m", shown, re.DOTALL), shown.split("\x1b[0m")[-1]
    assert len("".join(dimmed).split()) > 3
    assert len(plain.split()) > 10 and "\x1b[2m" not in plain


@pytest.mark.slow
def test_system_is_read_once_and_not_later(tmp_path: Path) -> None:
    state = tmp_path / "talk.kv"
    args = ("generate", "-p", "Once", "-n", "3", "--state", state, "--json")
    without = json.loads(run("generate", "-p", "Once", "-n", "3", "--json").stdout)["prompt_tokens"]
    assert json.loads(run(*args, "--system", "You are a bear.").stdout)["prompt_tokens"] > without
    assert run(*args).returncode == 0
    assert "begun already" in run(*args, "--system", "You are a cat.").stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--logprobs", "3"], "give --json too"),
        (["--raw", "--think"], "--raw sends the text as it is"),
        (["--raw", "--system", "x"], "--raw sends the text as it is"),
        (["--stop", ""], "--stop: a stop string is empty"),
        (["--json-schema", "nowhere.json"], "--json-schema nowhere.json: can't be read"),
        (["--json-schema", __file__], "can't be read as JSON"),
        (["--json-schema", "LIST"], "must hold a JSON object"),
        (["--json-schema", "BAD"], "schema at /properties/a: Invalid type: strin"),
    ],
)
def test_wrong_flag_of_replies(flags: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "LIST").write_text("[1]")
    (tmp_path / "BAD").write_text('{"properties": {"a": {"type": "strin"}}}')
    flags = [str(tmp_path / flag) if flag.isupper() else flag for flag in flags]
    assert says in refused("-m", MODEL, "-p", "x", *flags)


def test_loading_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal, after a second: bytes and seconds left, then kernels; the line is gone at the end."""

    def load(path: Any, *, progress: Any, preparing: Any, **_: Any) -> str:
        progress(10**9, 4 * 10**9)
        progress(2 * 10**9, 4 * 10**9)
        preparing(3, 80)
        return "model"

    seconds = iter(range(0, 100, 2))
    monkeypatch.setattr(language_model, "load", load)
    monkeypatch.setattr(options.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    lm, _ = options.load_with_progress(str(MODEL), "full", draft_max=0)
    assert lm == "model"
    shown = capsys.readouterr().err
    assert (
        "\rLoading 1.0 of 4.0 GB\x1b[K\rLoading 2.0 of 4.0 GB, 4 s left\x1b[K\rPreparing kernels: 3 of 80\x1b[K"
        in shown
    )
    assert shown.endswith("\r\x1b[K")
