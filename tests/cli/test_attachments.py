"""Pictures and sounds at the command line and at the prompt: --image, /image, dropped paths, thumbnails."""

from __future__ import annotations

import base64
import io
import json
import re
import wave
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from recorded import HERE

from mlx_gemma4 import InputError, ReplyOptions, Session, load
from mlx_gemma4.cli import attachments
from mlx_gemma4.cli.main import main
from mlx_gemma4.cli.repl import Repl, ReplEnv

SEEING, HEARING = HERE / "media" / "uv" / "model.gguf", HERE / "media" / "ua" / "model.gguf"


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    path = tmp_path / "a cat.png"
    Image.new("RGB", (96, 48), "red").save(path)
    return path


@pytest.fixture
def tone(tmp_path: Path) -> Path:
    path = tmp_path / "tone.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((np.sin(np.arange(16_000) / 6) * 9000).astype("<i2").tobytes())
    return path


def generate(*flags: Any) -> Result:
    return CliRunner().invoke(main, ["generate", "--json", "-n", "2", *map(str, flags)])


def tokens(*flags: Any) -> int:
    result = generate(*flags)
    assert result.exit_code == 0, result.output
    return int(json.loads(result.stdout)["prompt_tokens"])


def test_pictures_of_a_prompt(cat: Path) -> None:
    plain = tokens("-m", SEEING, "-p", "What is it?")
    assert tokens("-m", SEEING, "-p", "What is it?", "--image", cat, "--image-tokens", 70) == plain + 57
    two = ("--image", cat, "--image-tokens", 70, "--image", cat)
    assert tokens("-m", SEEING, "-p", "What {image}is{image} it?", *two) > plain + 2 * 57 - 3  # spaces at marks go


def test_the_order_of_kinds_is_that_of_the_command_line(cat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        "mlx_gemma4.conversation.language_model.LanguageModel.encode_prompt",
        lambda lm, prompt, **more: seen.append(prompt) or lm.tokenizer.encode("Hi", add_bos=True),
    )
    generate("-m", SEEING, "--video", cat, "--image", cat, "-p", "What?", "--audio", cat, "--image", cat)
    assert [part["type"] for part in seen[0]] == ["video", "image", "audio", "image", "text"]


def test_sounds_of_a_prompt(tone: Path) -> None:
    plain = tokens("-m", HEARING, "-p", "What is it?")
    assert tokens("-m", HEARING, "-p", "What is it?", "--audio", tone) == plain + 27


def test_a_conversation_goes_on_with_another_picture(cat: Path, tmp_path: Path) -> None:
    flags = ("-m", SEEING, "--image-tokens", 70, "--state", tmp_path / "state")
    first = tokens(*flags, "-p", "What is it?", "--image", cat)
    assert first > tokens(*flags, "-p", "And it?", "--image", cat) > 57  # only what is new is read


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--image", "none.png"), "--image none.png: there is no such file"),
        (("--audio", "CAT"), "takes none, only: text, image"),
        (("--image", "CAT", "--no-mmproj"), "the mmproj file that the model sees and hears with is not loaded"),
        (("-m", HEARING, "--image", "CAT"), "takes none, only: text, audio"),
        (("-m", SEEING, "--audio", "CAT"), "takes none, only: text, image, video"),
        (("-m", SEEING, "--image", "CAT", "--raw"), "--raw"),
        (("-m", SEEING, "--image", __file__), "test_attachments.py: is no picture"),
        (("-m", SEEING, "--image", "CAT", "--image-tokens", "100"), "'100' is not one of"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(cat: Path, flags: tuple[Any, ...], says: str) -> None:
    result = generate(*(cat if flag == "CAT" else flag for flag in flags), "-p", "What?")
    said = str(result.exception) if isinstance(result.exception, InputError) else result.output
    assert result.exit_code and says in said


def test_a_prompt_is_needed(cat: Path) -> None:
    for more in ((), ("-p", "")):
        assert generate("-m", SEEING, "--image", cat, *more).exit_code


# At the prompt


class Heard:
    """A view, and all lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.drawn: list[str] = []

    def text(self, piece: str) -> None: ...
    def think(self, piece: str) -> None: ...
    def fold(self, tokens: int) -> None: ...
    def close(self) -> None: ...

    def note(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def repl(heard: Heard) -> Repl:
    env = ReplEnv(
        view=lambda unfolded: heard,
        echo=heard.lines.append,
        stoppable=lambda: nullcontext(lambda: False),
        reading=lambda: nullcontext(lambda done, total: None),
        load=load,
        sampling=lambda lm: lm.sampling,
        kv="full",
        drafts=True,
        draw=heard.drawn.append,
        image_tokens=70,
    )
    options = ReplyOptions(max_tokens=3)
    return Repl(env, {"main": Session(load(SEEING), options=options)}, options)


def kinds(repl: Repl) -> list[str]:
    return [part["type"] for part in repl.session.messages[0]["content"]]


def test_a_picture_goes_with_the_next_message(repl: Repl, heard: Heard, cat: Path) -> None:
    repl.take(f"/image {cat}")
    assert heard.lines == ["[image] a cat.png 96x48, 55 tokens"] and heard.drawn == []
    assert "1 attached" in repl.status() and not repl.session.messages
    repl.take("What is it?")
    assert kinds(repl) == ["image", "text"] and "attached" not in repl.status()
    read = repl.session.reply
    assert read and read.statistics.prompt_tokens > 57
    repl.take("And now?")
    assert repl.session.messages[2]["content"] == "And now?"
    again = repl.session.reply
    assert again and again.statistics.prompt_tokens < 57  # the picture is not read again


def test_editing_keeps_the_picture(repl: Repl, heard: Heard, cat: Path) -> None:
    repl.take(f"/image '{cat}'")
    repl.take("What is it?")
    repl.take("/edit What colour has it?")
    assert kinds(repl) == ["image", "text"] and len(repl.session.messages) == 2
    repl.take("/undo")
    assert "Took back: What colour has it?" in heard.lines


@pytest.mark.parametrize("form", ["{}", "'{}'", '"{}"', "escaped", "file://{}"])
def test_a_dropped_path_attaches(repl: Repl, cat: Path, form: str) -> None:
    repl.take(str(cat).replace(" ", "\\ ") if form == "escaped" else form.format(cat))
    assert len(repl.attached) == 1 and not repl.session.messages


def test_a_path_in_quotes_attaches_and_the_rest_is_sent(repl: Repl, cat: Path) -> None:
    repl.take(f"What is this? '{cat}'")
    assert kinds(repl) == ["image", "text"] and repl.session.messages[0]["content"][1]["text"] == "What is this?"


@pytest.mark.parametrize("line", ["Say 'no such file' please", "it's John's", "/tmp", "~", ".", "x" * 5000, "a\0b"])
def test_other_lines_are_no_paths(line: str) -> None:
    assert attachments.dropped(line) == ([], line)
    assert attachments.dropped(f"see '{__file__}'")[0] == []


def test_what_is_no_picture_is_said_when_it_is_attached(repl: Repl, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\nno more")
    for line, says in ((f"/image {bad}", "bad.png"), ("/image", "which file"), ("/audio nowhere.wav", "no such file")):
        with pytest.raises(InputError, match=says):
            repl.take(line)
    assert not repl.attached


def test_the_built_in_model_sees_pictures_alone(repl: Repl, heard: Heard, cat: Path) -> None:
    repl.branches["main"] = Session(load(), options=repl.options)
    repl.take(f"/image {cat}")
    assert heard.lines[-1] == "[image] a cat.png 96x48, 55 tokens"
    with pytest.raises(InputError, match="takes image, no video"):
        repl.take(f"/video {cat}")
    repl.branches["main"] = Session(load(mmproj=None), options=repl.options)
    with pytest.raises(InputError, match="no mmproj file is loaded"):
        repl.take(f"/image {cat}")


def test_a_picture_is_decoded_once(repl: Repl, cat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **rest: opened.append(args) or real(*args, **rest))
    repl.take(f"/image {cat}")
    repl.take("What is it?")
    assert len(opened) == 1


def test_a_saved_conversation_goes_on_without_the_file(repl: Repl, heard: Heard, cat: Path, tmp_path: Path) -> None:
    repl.take(f"/image {cat}")
    repl.take("What is it?")
    cat.unlink()
    repl.take("Sure?")
    saved = tmp_path / "talk"
    repl.take(f"/save {saved}")
    text = saved.read_text()
    assert "a cat.png" in text and len(text) < 5000  # its name and a hash, no bytes
    repl.take(f"/load {saved}")
    repl.take("Still?")
    reply = repl.session.reply
    assert reply and reply.statistics.prompt_tokens < 57 and len(repl.session.messages) == 6
    (tmp_path / "talk.kv").unlink()
    repl.branches["main"] = Session.load(load(SEEING), saved, options=repl.options)
    with pytest.raises(InputError, match="not here any more"):
        repl.take("Now?")


# Thumbnails


@pytest.mark.parametrize(
    ("environment", "how"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"TERM": "xterm-kitty", "TMUX": "x"}, None),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, None),
    ],
)
def test_thumbnails_where_terminals_show_them(
    environment: dict[str, str], how: str | None, cat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TERM", "TERM_PROGRAM", "LC_TERMINAL", "TMUX", "KITTY_WINDOW_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    size, codes = attachments.preview(attachments.opened(attachments.attachment("image", str(cat), "/image")))
    assert size == " 96x48"
    if how == "kitty":
        pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", codes)
        assert pieces[0][0].startswith("a=T,f=100") and pieces[-1][0].endswith("m=0")
        data = "".join(data for _, data in pieces)
    elif how == "iterm":
        found = re.fullmatch(r"\x1b]1337;File=inline=1;[^:]*:([^\x07]*)\x07\n", codes)
        assert found
        data = found[1]
    else:
        assert codes == ""
        return
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (96, 48)


def test_large_files_stay_where_they_are(cat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachments, "KEPT", 10)
    assert attachments.attachment("image", str(cat), "/image")["image"] == cat.resolve()
