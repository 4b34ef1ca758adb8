"""Many prompts at once: the same replies as one by one, whoever fails or leaves; and the file of prompts."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from scripted import GREEDY, ids_of

from mlx_gemma4 import InputError, LanguageModel, ReplyOptions, batch, chat
from mlx_gemma4.cli.main import main

ABOUT = ["a king", "a fox", "the sea", "an old shoe", "two sisters"]
PROMPTS = [f"Tell me a story about {about}." for about in ABOUT]
SYSTEM = {"role": "system", "content": "You tell tales, in three sentences at most."}


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith(("scheduler", "reply"))}


@pytest.mark.parametrize(("exact", "kv"), [(False, "full"), (True, "full"), (False, "q8")])
def test_the_same_as_one_by_one(lm: LanguageModel, exact: bool, kv: str) -> None:
    """With a common beginning that is read once, more prompts than replies at a time, and options of each."""
    prompts = [[SYSTEM, {"role": "user", "content": prompt}] for prompt in PROMPTS]
    options = [ReplyOptions(max_tokens=8 + i, sampling=GREEDY) for i in range(5)]
    progress: list[tuple[int, int]] = []
    made = batch(lm, prompts, options, parallel=3, exact=exact, kv=kv, on_progress=lambda *n: progress.append(n))
    got = dict(made)
    assert progress == [(n, 5) for n in range(1, 6)]
    for i in range(5):
        want = chat(lm, prompts[i], options[i], state=lm.model.new_state(kv=kv))
        assert ids_of(got[i]) == ids_of(want) and got[i].text == want.text
        assert got[i].finish_reason == want.finish_reason == "length"
        assert got[i].statistics.reused_tokens > 20
    assert not threads()


def test_they_come_as_they_are_done(lm: LanguageModel) -> None:
    options = [ReplyOptions(max_tokens=n, sampling=GREEDY) for n in (40, 20, 3)]
    assert [i for i, _ in batch(lm, PROMPTS[:3], options, parallel=3)] == [2, 1, 0]


def test_one_that_fails_leaves_the_others(lm: LanguageModel) -> None:
    prompts: list[Any] = [PROMPTS[0], "goose " * 3000, [], PROMPTS[1]]
    got = dict(batch(lm, prompts, max_tokens=4, temperature=0))
    assert "context holds 2048" in str(got[1].error) and got[2].error
    assert [got[i].error for i in (0, 3)] == [None, None] and got[0].text
    assert not list(batch(lm, []))
    with pytest.raises(TypeError, match="not both"):
        list(batch(lm, prompts, ReplyOptions(), max_tokens=3))


def test_leaving_ends_all(lm: LanguageModel) -> None:
    bias = dict.fromkeys(lm.tokenizer.stop_ids, -100.0)
    made = batch(lm, PROMPTS, [ReplyOptions(max_tokens=4), *[options_without_end(bias)] * 4], parallel=4)
    assert next(made)[0] == 0
    made.close()
    assert not threads()


def options_without_end(bias: dict[int, float]) -> ReplyOptions:
    return ReplyOptions(max_tokens=1500, sampling=type(GREEDY)(temperature=0, logit_bias=bias))


# A file of prompts


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, ["generate", *map(str, args)])


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    entries: list[dict[str, Any]] = [
        {"prompt": PROMPTS[0], "id": "king"},
        {"messages": [SYSTEM, {"role": "user", "content": PROMPTS[1]}], "max_tokens": 3},
        {"prompt": "goose " * 3000, "id": 7},
        {"prompt": PROMPTS[2], "schema": {"enum": ["yes", "no"]}, "seed": 4},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(map(json.dumps, entries)) + "\n")  # empty lines don't count as prompts
    return path


def test_a_file_in_a_file_out(lm: LanguageModel, prompts_file: Path, tmp_path: Path) -> None:
    """In order; what the output has is not asked again, and what is half there is dropped."""
    command = ("--prompts", prompts_file, "-n", "6", "--temperature", "0")
    done = run(*command)
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["id"] for record in records] == ["king", 3, 7, 7]
    assert records[0]["text"] == chat(lm, PROMPTS[0], max_tokens=6, temperature=0).text
    assert records[1]["reply_tokens"] == 3 and records[0]["reply_tokens"] == 6
    assert "context holds 2048" in records[2]["error"] and records[3]["text"] in ('"yes"', '"no"')
    assert "4 prompts answered, 0 were before, 1 failed" in done.stderr
    whole = done.stdout.encode()
    for kept, before in ((len(whole) // 3, 1), (len(whole) - 1, 3), (0, 0)):
        out = tmp_path / f"{kept}.jsonl"
        out.write_bytes(whole[:kept])
        again = run(*command, "-o", out)
        assert again.exit_code == 0 and not again.stdout and out.read_bytes() == whole
        assert f"{4 - before} prompts answered, {before} were before" in again.stderr
    again = run(*command, "-o", out)
    assert again.exit_code == 0 and "all 4 prompts are answered" in again.stderr and out.read_bytes() == whole


def test_lines_end_where_json_lines_do(lm: LanguageModel, tmp_path: Path) -> None:
    """A byte order mark, Windows' line ends, and a line separator within a prompt."""
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('\ufeff{"prompt": "a fox\u2028and a bear"}\r\n{"prompt": "b", "id": "b"}\r\n'.encode())
    done = run("--prompts", path, "-n", "2")
    assert done.exit_code == 0, done.output
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [1, "b"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", ":1: is not JSON"),
        ('{"prompt": "a"}\n[3]', ":2: must be an object"),
        ('{"prompt": "a", "messages": []}', ":1: must be an object"),
        ('{"prompt": 3}', ":1: prompt must be text"),
        ('{"messages": []}', ":1: prompt must be text"),
        ('{"prompt": "a", "id": {}}', ":1: id must be"),
        ('\n{"prompt": "a", "max_tokns": 3}', ':2: there is no option "max_tokns"'),
        ('{"prompt": "a", "max_tokens": 0}', ":1: max_tokens 0"),
        ('{"prompt": "a", "max_tokens": "many"}', ":1: "),
        ('{"prompt": "a", "temperature": -1}', ":1: --temperature"),
        ("", ": holds no prompts"),
    ],
)
def test_mistakes_in_the_file(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    done = run("--prompts", path)
    assert done.exit_code == 2 and not done.stdout
    lines = [line for line in done.stderr.splitlines() if "built-in demo" not in line]
    assert len(lines) == 1 and lines[0].startswith("mlx-gemma4: ") and f"{path}{says}" in lines[0]


def test_mistakes_beside_it(prompts_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    for text, says in (('{"id": "fox", "text": ""}\n', "other prompts"), ("[]\n", "isn't what"), ("{\n", "isn't what")):
        other.write_text(text)
        done = run("--prompts", prompts_file, "-o", other)
        assert done.exit_code == 2 and f"--output {other}" in done.stderr and says in done.stderr
        assert other.read_text() == text
    for args, says in (
        ([], "give one prompt"),
        (["--prompts", prompts_file, "-p", "a"], "give one prompt"),
        (["-p", "a", "-o", other], "--output goes with"),
        (["--prompts", prompts_file, "--state", other], "--state"),
        (["--prompts", prompts_file, "--raw"], ":3: messages need"),
        (["--prompts", tmp_path / "none"], "can't be read"),
    ):
        done = run(*args)  # type: ignore[arg-type]
        assert done.exit_code == 2 and says in done.stderr, args


def test_errors_are_not_hidden(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that is no prompt's ends all, and says what it is."""

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no device")

    monkeypatch.setattr(lm.model, "forward", broken)
    with pytest.raises(OSError, match="no device"):
        list(batch(lm, PROMPTS, max_tokens=3))
    assert not threads()
    with pytest.raises(InputError, match="max_tokens"):
        batch(lm, PROMPTS, max_tokens=0).__next__()
