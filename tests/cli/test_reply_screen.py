"""Replies on an emulated terminal: nothing is lost or shown twice, in whatever pieces, on however small a screen."""

from __future__ import annotations

import io
import random
import re

import pyte
import pytest
from rich.console import Console

from mlx_gemma4.cli import reply_screen
from mlx_gemma4.cli.reply_screen import ReplyScreen, blocks

ITEMS = "\n".join(f"{i}. item number {i}" for i in range(1, 25))
CODE = "\n".join(f"value_{i} = {i}  # line {i}" for i in range(30))
REPLY = f"""# Title

Some *slanted* text with `code`, **bold words that go on until they wrap** and <b>tags</b>:
- one
- two with more
  1. nested first
  2. nested second
- three

1. first

   with a second paragraph
2. second

```python
def double(x):
    return 2 * x

```

| name | count |
|---|--:|
| a | 1 |
| much longer | 22 |

> quoted words
> of two lines

Roses are red,
violets are blue.

[link]: http://example.org
---
{ITEMS}

```python
{CODE}
```

The end."""


class Emulated(io.StringIO):
    """A file that is a terminal's screen."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self.screen = pyte.HistoryScreen(width, height, history=2000, ratio=0.5)
        self._stream = pyte.Stream(self.screen)
        self.written: list[str] = []

    def write(self, text: str) -> int:
        self._stream.feed(text.replace("\n", "\r\n"))
        self.written += [text] if text else []
        return len(text)

    @property
    def lines(self) -> list[str]:
        """All lines, those that scrolled away first."""
        past = ["".join(row[x].data for x in range(self.screen.columns)) for row in self.screen.history.top]
        return [line.rstrip() for line in (*past, *self.screen.display)]


def emulated(width: int, height: int) -> tuple[Emulated, Console]:
    file = Emulated(width, height)
    return file, Console(file=file, width=width, height=height, force_terminal=True, highlight=False)


def shown(text: str, seed: int = 0, width: int = 44, height: int = 12) -> list[str]:
    """The screen after a reply in pieces of random sizes; seed 0: in one piece."""
    sizes = random.Random(seed)
    file, console = emulated(width, height)
    screen, at = ReplyScreen(console), 0
    while at < len(text):
        size = sizes.choice([1, 2, 3, 5, 8, 40]) if seed else len(text)
        screen.text(text[at : at + size])
        at += size
    screen.close()
    lines = file.lines
    while lines and not lines[-1]:
        lines.pop()
    return lines


@pytest.fixture(autouse=True)
def _draw_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReplyScreen, "_due", lambda self: True)


@pytest.mark.parametrize("seed", range(1, 6))
def test_pieces_do_not_matter(seed: int) -> None:
    assert shown(REPLY, seed) == shown(REPLY)


@pytest.mark.parametrize(("width", "height"), [(80, 4), (30, 50), (120, 3)])
def test_any_size(width: int, height: int) -> None:
    whole = shown(REPLY, 0, width, height)
    assert shown(REPLY, 7, width, height) == whole
    words = re.findall(r"\w+", re.sub(r"```python|\d+\.", "", REPLY))
    seen = iter(re.findall(r"\w+", "\n".join(whole)))
    assert all(word in seen for word in words), "a word is missing or out of place"


def test_layout() -> None:
    lines = shown(REPLY, 3)
    assert lines[0] == "Title"
    assert " • two with more" in lines and "    1 nested first" in lines
    assert lines[lines.index("Roses are red,") + 1] == "violets are blue."
    assert any("<b>tags</b>" in line for line in lines)
    assert "[link]: http://example.org" in lines
    assert not any("```" in line or "**" in line for line in lines)
    assert lines.count(" 24 item number 24") == lines.count("24 item number 24") + 1 == 1


def test_finished_lines_are_never_drawn_again() -> None:
    """While the last paragraph is written, what stands above it is left alone."""
    file, console = emulated(60, 20)
    screen = ReplyScreen(console)
    screen.text("First paragraph.\n\nSecond ")
    file.written.clear()
    for word in ("paragraph ", "goes ", "on, ", "and ", "on."):
        screen.text(word)
    screen.close()
    assert "First" not in "".join(file.written)
    assert "\x1b[" not in "".join(file.written), "a line that only grows needs no drawing again"
    assert file.lines[:3] == ["First paragraph.", "", "Second paragraph goes on, and on."]


def test_a_table_taller_than_the_screen_is_whole_in_the_end() -> None:
    table = "| n | square |\n|---|---|\n" + "".join(f"| {i} | {i * i} {'x' * i} |\n" for i in range(20))
    lines = shown(table, 5, 60, 8)
    for i in range(20):
        assert sum(f"{i * i} {'x' * i}".strip() == " ".join(line.split()[1:]) for line in lines) == 1


def test_thoughts_are_folded() -> None:
    file, console = emulated(40, 10)
    screen = ReplyScreen(console)
    thought = " ".join(f"thought{i}" for i in range(100))
    for word in thought.split():
        screen.think(word + " ")
    assert "thought99" in "\n".join(file.lines)
    screen.fold(142)
    screen.text("Answer.")
    screen.close()
    lines = file.lines
    assert re.fullmatch(r"Thought for \d+\.\d s \(142 tokens\)", lines[0])
    assert lines[1:3] == ["", "Answer."]
    assert "thought0" not in "\n".join(lines)


def test_thoughts_unfolded() -> None:
    file, console = emulated(40, 10)
    screen = ReplyScreen(console, unfolded=True)
    thought = [f"thought{i}" for i in range(100)]
    for word in thought:
        screen.think(word + " ")
    screen.fold(142)
    screen.close()
    text = " ".join(file.lines)
    assert text.split()[:100] == thought
    assert "Thought for" in text


def test_control_characters_are_harmless() -> None:
    file, console = emulated(40, 10)
    screen = ReplyScreen(console)
    screen.text("a\x1b[2J\x1b]0;title\x07b\x9b1mc\rd\n\n```\n\x1b[31mred\n```\n")
    screen.think("\x1b[8mhidden")
    screen.fold(1)
    screen.note("\x1b[8mnote")
    screen.close()
    assert file.screen.title == ""
    text = "\n".join(file.lines)
    assert "a�[2J�]0;title�b�1mcd" in text and "�[31mred" in text and "�[8mnote" in text


@pytest.mark.parametrize("known", [True, False])
def test_a_narrower_terminal(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that were drawn are drawn again in the new width; how many rows they take depends on the terminal."""
    for name in ("TERM_PROGRAM", "VTE_VERSION"):
        monkeypatch.delenv(name, raising=False)
    if known:
        monkeypatch.setenv("TERM_PROGRAM", "tmux")
    file, console = emulated(60, 20)
    screen = ReplyScreen(console)
    screen.note("Settled.")
    screen.text("word " * 20)  # two rows of 60 columns, four of 30
    console.width = 30
    file.written.clear()
    screen.text("end")
    (written,) = file.written
    assert written.startswith("\x1b[4A\r\x1b[J" if known else "\x1b[2A\r\x1b[J"), "the empty line, and the rows"
    assert written.replace("\n", " ").split()[-1] == "end"
    assert "Settled" not in written


def test_blocks_join_to_the_text() -> None:
    for cut in range(0, len(REPLY), 17):
        text = REPLY[:cut]
        parts = blocks(text)
        assert "\n".join(part.source for part in parts).split() == text.split()
        assert all(part.stop <= text.count("\n") + 1 for part in parts)


def test_drawing_takes_a_bounded_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand pieces within one interval are drawn once."""
    monkeypatch.undo()
    monkeypatch.setattr(reply_screen, "REDRAW_EVERY", 3600)
    file, console = emulated(60, 20)
    screen = ReplyScreen(console)
    for _ in range(1000):
        screen.text("x ")
    assert len(file.written) == 1
    screen.close()
    assert " ".join(file.lines).split() == ["x"] * 1000
