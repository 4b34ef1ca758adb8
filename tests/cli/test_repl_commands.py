"""Commands of `mlx-gemma4 chat` one by one, without a terminal: what they change, and what they read again."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from pictured import seeing
from recorded import HERE

from mlx_gemma4 import InputError, ReplyOptions, Session, load
from mlx_gemma4.cli.repl import Repl, ReplEnv
from mlx_gemma4.conversation.language_model import LanguageModel

OTHER_MODEL = HERE / "e2b-q4_k_m.gguf"


class Heard:
    """A view that remembers."""

    def __init__(self) -> None:
        self.replies = ""
        self.lines: list[str] = []

    def text(self, piece: str) -> None:
        self.replies += piece

    def think(self, piece: str) -> None: ...
    def fold(self, tokens: int) -> None: ...
    def close(self) -> None: ...

    def note(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def demo() -> LanguageModel:
    return load()


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def repl(demo: LanguageModel, heard: Heard) -> Repl:
    env = ReplEnv(
        view=lambda unfolded: heard,
        echo=heard.lines.append,
        stoppable=lambda: nullcontext(lambda: False),
        reading=lambda: nullcontext(lambda done, total: None),
        load=load,
        sampling=lambda lm: lm.sampling,
        kv="full",
        drafts=True,
    )
    options = ReplyOptions(max_tokens=12)
    return Repl(env, {"main": Session(demo, options=options)}, options)


def read_and_reused(repl: Repl) -> tuple[int, int]:
    assert repl.session.reply is not None
    statistics = repl.session.reply.statistics
    return statistics.prompt_tokens, statistics.reused_tokens


def test_a_loaded_conversation_says_what_was_seen(
    repl: Repl, heard: Heard, demo: LanguageModel, tmp_path: Path
) -> None:
    session = Session(seeing(demo), options=ReplyOptions(max_tokens=2))
    (tmp_path / "cat.jpg").write_bytes(b"a cat")
    seen = {"type": "image", "image": tmp_path / "cat.jpg"}
    list(session.send({"role": "user", "content": [seen, {"type": "audio", "audio": b"purr"}]}))
    session.save(tmp_path / "talk")
    repl.take(f"/load {tmp_path / 'talk'}")
    assert heard.lines[-1] == "1 message of yours (with cat.jpg, a sound) loaded."


def test_undo_and_retry_read_nothing_again(repl: Repl) -> None:
    """The KV state goes back: after /retry one token is read, after /undo only the new message."""
    repl.take("Hello! " * 30)
    first = repl.session.state.length
    repl.take("And now a tale")
    new, reused = read_and_reused(repl)
    assert reused >= first - 1
    repl.take("/undo")
    assert repl.session.state.length <= first + 2  # what ends a turn may stay
    repl.take("And now a tale")
    assert read_and_reused(repl)[1] >= reused and sum(read_and_reused(repl)) == new + reused
    repl.take("/retry")
    assert read_and_reused(repl) == (1, new + reused - 1)
    repl.take("/edit And now another")
    assert read_and_reused(repl)[1] >= reused
    assert [m["content"] for m in repl.session.messages if m["role"] == "user"][1] == "And now another"


def test_branches_do_not_touch_each_other(repl: Repl) -> None:
    repl.take("Hello!")
    before = list(repl.session.messages)
    repl.take("/fork b")
    repl.take("Tell me more")
    assert read_and_reused(repl)[1] > 0
    repl.take("/fork main")
    assert repl.session.messages == before
    assert len(repl.branches["b"].messages) == 4
    with pytest.raises(InputError, match="a name is"):
        repl.take("/fork two words")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/load nowhere.json", "nowhere.json"),
        (f"/load {OTHER_MODEL}", "can't be read as a saved conversation"),
        ("/load", "which file"),
        (f"/save {__file__}", "is no conversation"),
        ("/save /nowhere/at/all", "can't be saved"),
        ("/model nowhere.gguf", "nowhere.gguf"),
        (f"/model {__file__}", "not a GGUF"),
        ("/think maybe", "on or off"),
        ("/undo twice", "takes nothing"),
        ("/sytsem x", "the nearest is /system"),
        ("/xyzzy", "no command"),
    ],
)
def test_a_mistake_changes_nothing(repl: Repl, heard: Heard, line: str, says: str) -> None:
    repl.take("Hello!")
    session, messages, tokens = repl.session, list(repl.session.messages), repl.session.state.tokens
    with pytest.raises(InputError, match=says) as told:
        repl.take(line)
    assert "\n" not in str(told.value)
    assert repl.session is session and session.messages == messages and session.state.tokens == tokens
    repl.take("And then?")
    assert read_and_reused(repl)[1] >= len(tokens) - 1


def test_stopped_before_the_reply(repl: Repl, heard: Heard) -> None:
    """Ctrl-C while a prompt is read takes the message back."""
    repl.take("Hello!")
    messages = list(repl.session.messages)
    object.__setattr__(repl.env, "stoppable", lambda: nullcontext(lambda: True))
    repl.take("Tell me a very long tale")
    assert repl.session.messages == messages
    assert heard.lines[-1].startswith("Stopped before")


def test_another_model_takes_the_conversation(repl: Repl) -> None:
    repl.take("Hello!")
    repl.take("/fork b")
    messages = list(repl.session.messages)
    repl.take(f"/model {OTHER_MODEL}")
    assert repl.session.lm.path == OTHER_MODEL
    assert repl.session.messages == messages == repl.branches["main"].messages
    repl.take("the and")
    assert read_and_reused(repl)[1] == 0


def test_states_are_of_the_kind_asked_for(repl: Repl, tmp_path: Path) -> None:
    """/clear, /model and /load keep to --kv; what a file holds stays as it was held."""
    object.__setattr__(repl.env, "kv", "q8")
    repl.take("Hello!")
    repl.take(f"/save {tmp_path / 'full'}")
    repl.take("/clear")
    assert repl.session.state.kv == "q8"
    repl.take("Hello!")
    repl.take(f"/load {tmp_path / 'full'}")
    assert repl.session.state.kv == "full" and repl.session.state.length
    (tmp_path / "full.kv").unlink()
    repl.take(f"/load {tmp_path / 'full'}")
    assert repl.session.state.kv == "q8" and not repl.session.state.length
    repl.take(f"/model {OTHER_MODEL}")
    assert repl.session.state.kv == "q8"


def test_a_full_context_is_told(repl: Repl, heard: Heard) -> None:
    with pytest.raises(InputError, match=r"2,?048"):
        repl.take("word " * 3000)
    assert repl.session.messages == []
    repl.take("Hello!")
    assert heard.replies


def test_small_print(repl: Repl, heard: Heard, tmp_path: Path) -> None:
    for line in ("/undo", "/retry", "/edit"):
        with pytest.raises(InputError, match="nothing"):
            repl.take(line)
    repl.take("/system")
    assert "No system prompt" in heard.lines[-1]
    repl.take("/system You are\na poet.")
    repl.take("/system")
    assert heard.lines[-1] == "System: You are\na poet."
    repl.take("/system none")
    assert repl.session.messages == []
    repl.take("/usr/bin is a folder")  # not a command
    assert repl.session.messages[0]["content"] == "/usr/bin is a folder"
    repl.take("/edit")
    assert repl.draft == "//usr/bin is a folder"
    repl.take(" ")
    assert heard.lines[-1] == "Left as it was." and not repl.draft
    repl.take(f"/save '{tmp_path / 'a b.json'}'")
    assert (tmp_path / "a b.json").is_file()
    repl.take("/save " + str(tmp_path / "a b.json"))  # its own file may be written again
    assert repl.arguments("/fork") == ["main"] and repl.arguments("/save") is None
    assert re.fullmatch(r"[\d,]+ / 2,048 tokens, [\d.]+ MB", repl.status())
