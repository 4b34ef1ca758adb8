"""What somebody meets in the first minutes: flags as others spell them, replies that are cut, names of no file."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import click.testing
import pytest
from recorded import HERE

from mlx_gemma4 import execution, load
from mlx_gemma4.chat_format import template
from mlx_gemma4.cli.main import main
from mlx_gemma4.cli.options import ALIASES
from mlx_gemma4.files.cached import where_to_get

E2B, BASE = str(HERE / "e2b-q4_k_m.gguf"), str(HERE / "e2b-f32.gguf")  # the second has no chat template


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """--threads sets it for the process and its children."""
    monkeypatch.setenv("MLX_GEMMA4_THREADS", "")


def run(*args: str, code: int = 0) -> click.testing.Result:
    done = click.testing.CliRunner().invoke(main, args)
    assert done.exit_code == code, (args, done.stderr, done.exception)
    return done


def test_a_cut_reply_says_so() -> None:
    done = run("generate", "Tell me a long tale", "-n", "6")
    assert "Cut off after 6 tokens: -n 1000 allows more" in done.stderr
    full = run("generate", "Tell me a long tale", "-n", "-1", "-c", "30", "--seed", "1").stderr
    assert "the context of 30 is full" in full
    assert "Cut off" not in run("generate", "hi", "--temp", "0", "-n", "-1").stderr  # no limit: it ends by itself


def test_json_that_is_cut_is_an_error(tmp_path: Path) -> None:
    schema = '{"type": "array", "items": {"type": "string", "minLength": 90}, "minItems": 3}'
    done = run("generate", "-p", "hi", "-j", schema, "-n", "5", code=1)
    assert "Cut off after 5 tokens" in done.stderr and "no whole JSON" in done.stderr
    assert (
        json.loads(run("generate", "hi", "-j", schema, "-n", "5", "--json", code=1).stdout)["stop_reason"] == "length"
    )
    (tmp_path / "many.jsonl").write_text('{"prompt": "hi"}\n{"prompt": "hi"}\n')
    done = run("generate", "--prompts", str(tmp_path / "many.jsonl"), "--json-schema", schema, "-n", "5", code=1)
    assert "2 cut off at their max_tokens" in done.stderr
    assert (
        " cut off" not in run("generate", "--prompts", str(tmp_path / "many.jsonl"), "-n", "-1", "--temp", "0").stderr
    )


def test_a_file_without_chat_template(caplog: pytest.LogCaptureFixture) -> None:
    template._tell_of_no_template.cache_clear()
    run("generate", "-m", BASE, "hi", "-n", "2", "--raw")
    assert "chat template" not in caplog.text
    run("generate", "-m", BASE, "hi", "-n", "2")
    assert caplog.text.count("has no chat template") == 1 and "use --raw" in caplog.text


def test_flags_as_others_spell_them(tmp_path: Path) -> None:
    """Each alias means what the flag does, also beside it, and --help shows one spelling."""
    (tmp_path / "prompt.txt").write_text("Once upon a time\n")
    ours = ["--prompt", "Once upon a time", "--temperature", "1", "--max-tokens", "8", "--seed", "3"]
    theirs = ["-f", str(tmp_path / "prompt.txt"), "--temp", "1", "--n-predict", "8", "-s", "3", "-t", "1"]
    theirs += ["--ctx-size", "200", "--repeat-penalty", "1.0", "-r", "no such text"]
    assert run("generate", *ours).stdout == run("generate", *theirs).stdout
    assert execution.cores() == 1
    shown = run("generate", "--help").stdout
    hidden = {name for names in ALIASES.values() for name in names.split() if name.startswith("--")}
    assert not hidden & set(shown.replace(",", " ").split())
    assert "INTEGER" not in shown and "FLOAT" not in shown


def test_every_command_takes_a_model_in_the_same_way() -> None:
    """Those that are given one as an argument take --model too. Each says in a line what it does."""
    assert "..." not in run("--help").stdout.split("Commands:")[1]
    shown = [run("inspect", *words, E2B).stdout.partition("Memory for")[0] for words in ([], ["--model"], ["-hf"])]
    assert shown[0] == shown[1] == shown[2] and "tensors" in shown[0]  # what is free changes meanwhile
    assert "name one model" in run("inspect", E2B, "-m", E2B, code=2).stderr
    for name, command in main.commands.items():
        flags = {flag for param in command.params for flag in param.opts}
        assert name in ("list", "rm", "doctor", "hosts", "completion", "follow", "probe") or "--model" in flags
        assert ("-c" in flags) == ("--context" in flags) and ("-t" in flags) == ("--threads" in flags)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["generate", "hi", "-ngl", "99"], "-ngl: needs no telling here"),
        (["generate", "hi", "there"], "a text in quotes"),
        (["chat", "model.gguf"], "a model goes with -m"),
        (["generate", E2B], "is a model and no prompt"),
        (["generate", "hi", "-p", "hi"], "give one prompt"),
        (["generate"], "give one prompt"),
        (["generate", "-f", "/nowhere.txt"], "--file /nowhere.txt: can't be read"),
        (["generate", "hi", "-n", "0"], "-1 for no limit"),
        (["generate", "hi", "-n", "1.5"], "-1 for no limit"),
        (["pull"], "no name of a repository"),
    ],
)
def test_mistakes_of_the_first_minutes(args: list[str], says: str) -> None:
    assert says in run(*args, code=2).stderr


def test_a_name_of_no_file_says_what_to_pull(tmp_path: Path) -> None:
    assert "mlx-gemma4 pull ggml-org/gemma-4-12B-it-GGUF:Q8_0 " in where_to_get(tmp_path / "gemma-4-12b-it-Q8_0.gguf")
    assert "gemma-4-26B-A4B-it-GGUF:UD-Q4_K_XL " in where_to_get(Path("/no/gemma4_26b-UD-Q4_K_XL.gguf"))
    assert where_to_get(Path("llama.gguf")).startswith(
        "download one: mlx-gemma4 pull ggml-org/gemma-4-E2B-it-GGUF:Q4_K_M"
    )
    (tmp_path / "gemma-4-E4B-it-Q4_K_M.gguf").touch()
    assert "do you mean gemma-4-E4B-it-Q4_K_M.gguf?" in where_to_get(tmp_path / "gemma-4-E4B-Q4_K_M.gguf")
    for command in (["generate", "hi"], ["inspect"], ["bench"]):
        line = run(*command, "-m", "gemma-4-E2B-it-Q4_K_M.gguf", code=2).stderr.strip()
        assert "no such file; download it: mlx-gemma4 pull" in line and "\n" not in line


@pytest.mark.slow
def test_doctor_without_a_gpu_is_a_line() -> None:
    (line,) = run("doctor").stdout.splitlines()
    assert "no GPU" in line


def test_interrupted_or_the_disk_full_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and the exit code that shells expect."""

    def fail(error: BaseException) -> None:
        def raises(*_: object, **__: object) -> None:
            raise error

        for name in ("load", "demo_path"):
            monkeypatch.setattr(f"mlx_gemma4.conversation.language_model.{name}", raises)

    for args in (["generate", "hi"], ["chat"], ["inspect"], ["bench"], ["perplexity", __file__]):
        fail(KeyboardInterrupt())
        assert run(*args, code=130).stderr.splitlines()[-1] == "Interrupted"
        fail(OSError(errno.ENOSPC, "No space left on device"))
        assert "No space left on device: make room" in run(*args, code=3).stderr


def test_a_context_bounds_conversations_and_is_no_other_model(tmp_path: Path) -> None:
    """A state saved under a bound goes on without it; a bound over the model's own is none."""
    whole, part = load(E2B), load(E2B, context=100)
    assert (whole.config.context, part.config.context, load(E2B, context=9**9).config.context) == (512, 100, 512)
    assert part.model.fingerprint == whole.model.fingerprint and part.plan.kv < whole.plan.kv
    state = ["--state", str(tmp_path / "talk.kv")]
    run("generate", "-m", E2B, "the and", "-n", "2", "-c", "100", *state)
    run("generate", "-m", E2B, "and the", "-n", "2", *state)
    assert "context holds 20" in run("generate", "-m", E2B, "the and " * 30, "-c", "20", code=2).stderr
