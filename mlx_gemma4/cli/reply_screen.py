"""A reply on a terminal as it is written: Markdown, with thoughts dimmed and folded.

In: pieces of text. Out: lines on a rich console. Finished blocks (paragraphs, list items, code) are printed for good
and scroll away as any output does; only the open block's lines are drawn again, and of these only what changed. What
no longer fits above the bottom of the screen is left to scroll away too. Knows nothing of models and sessions.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import Heading, Markdown
from rich.segment import Segment, Segments
from rich.text import Text
from rich.theme import Theme

REDRAW_EVERY = 0.05  # seconds at least between two drawings
THOUGHT_LINES = 6  # of an open thought, the last ones
_STYLES = {"markdown.code": "cyan", "markdown.link_url": "underline"}  # over rich's, whose black boxes suit no terminal

# Raw HTML and link definitions, which rich drops, are shown as they stand.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable("reference")
_CONTROLS = {c: "\N{REPLACEMENT CHARACTER}" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}
_CONTROLS[ord("\r")] = ""


def console_for_replies() -> Console:
    return Console(theme=Theme(_STYLES), highlight=False)


def printable(text: str) -> str:
    """Text that can't move the cursor or do worse: of control characters, only line ends and tabs are left."""
    return text.translate(_CONTROLS)


@dataclass(frozen=True)
class Block:
    """A stretch of Markdown that is laid out on its own: a top-level block, or an item of a top-level list."""

    source: str
    kind: str  # the parser's name of what opens it
    stop: int  # the line of the text that the next one starts at
    spaced: bool  # whether an empty line follows


def blocks(source: str) -> list[Block]:
    """The blocks of a text, which joined are the text but for empty lines between them."""
    starts: list[tuple[int, str]] = []
    for token in _PARSER.parse(source):
        top = token.level == 0 and token.nesting >= 0 and not token.type.endswith("list_open")
        if token.map and (top or (token.level == 1 and token.type == "list_item_open")):
            starts.append((token.map[0], token.type))
    lines = source.split("\n")
    found = []
    for (start, kind), (stop, _) in zip(starts, [*starts[1:], (len(lines), "")], strict=False):
        text = "\n".join(lines[start:stop])
        found.append(Block(text.rstrip("\n"), kind, stop, not lines[stop - 1].strip()))
    return found


@dataclass(frozen=True)
class Line:
    """A line of the screen."""

    styled: str  # with escape codes
    plain: str


class _Region:
    """The last lines of the terminal, which may still change. The cursor stands at the end of the last one."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._gone: list[str] = []  # plain lines that had to scroll away before they were settled
        self._drawn: list[Line] = []
        self._width = console.width
        self.at_start = True  # the cursor stands on an empty line

    def draw(self, lines: Sequence[Line]) -> None:
        """Show these lines in place of those drawn since the last `settle`."""
        same = _agree(self._gone, [line.plain for line in lines])
        del self._gone[same:]  # laid out otherwise by now: they are shown again below
        shown = lines[same:]
        resized = self._console.width != self._width
        keep = 0 if resized else _agree(self._drawn, shown)
        out, drew = [], bool(self._drawn)
        new = "\n".join(line.styled for line in shown[keep:])
        if not drew:
            out.append("" if self.at_start or not shown else "\n")
        elif keep == len(self._drawn) - 1 and new.startswith(self._drawn[-1].styled) and not resized:
            new = new[len(self._drawn[-1].styled) :]  # the most frequent case: the last line goes on
        elif keep < len(self._drawn):
            up = self._rows(self._drawn[keep:]) - 1
            out.append((f"\x1b[{up}A" if up else "") + "\r\x1b[J")
        elif keep < len(shown):
            out.append("\n")
        out.append(new)
        if keep and keep == len(shown) < len(self._drawn):  # fewer than before: back to the end of the last
            out.append(f"\x1b[A\x1b[{max(1, cell_len(shown[-1].plain))}C")
        self._console.file.write("".join(out))
        self._console.file.flush()
        room = max(1, self._console.height - 1)
        self._gone += [line.plain for line in shown[:-room]]
        self._drawn, self._width = list(shown[-room:]), self._console.width
        self.at_start = not shown and (self.at_start or drew)

    def settle(self, count: int) -> None:
        """The first lines of those drawn stay as they are from now on."""
        gone = min(count, len(self._gone))
        del self._gone[:gone]
        del self._drawn[: count - gone]

    def close(self) -> None:
        """Settle all, and put the cursor on a new line."""
        self.settle(len(self._gone) + len(self._drawn))
        if not self.at_start:
            self._console.file.write("\n")
            self._console.file.flush()
        self.at_start = True

    def _rows(self, lines: Sequence[Line]) -> int:
        """Rows that drawn lines take now. Terminals that wrap old lines anew when they shrink are known by name."""
        if self._width == self._console.width or not os.environ.keys() & {"TERM_PROGRAM", "VTE_VERSION"}:
            return len(lines)
        return sum(max(1, -(-cell_len(line.plain) // self._console.width)) for line in lines)


def _agree(a: Sequence[object], b: Sequence[object]) -> int:
    """How many items two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class ReplyScreen:
    """Takes a reply piece by piece. `unfolded`: thoughts stay on the screen."""

    def __init__(self, console: Console, unfolded: bool = False) -> None:
        self._console, self._unfolded = console, unfolded
        self._region = _Region(console)
        self._open = ""  # Markdown that is not settled yet
        self._thought = ""
        self._thinking_since: float | None = None
        self._gap = False  # whether an empty line comes before the next block
        self._next_draw = 0.0

    def text(self, piece: str) -> None:
        """More of the reply."""
        self._open += printable(piece)
        if self._due():
            self._draw_text()

    def think(self, piece: str) -> None:
        """More of a thought."""
        if self._thinking_since is None:
            self.note(None)
            self._thinking_since = time.monotonic()
        self._thought += printable(piece)
        if self._due():
            start = time.monotonic()
            self._region.draw([Line("", "")] * self._gap + self._thought_lines()[-THOUGHT_LINES:])
            self._drew(start)

    def fold(self, tokens: int) -> None:
        """The thought has ended: one line remains, or that line below it."""
        if self._thinking_since is None:
            return
        seconds = time.monotonic() - self._thinking_since
        line = self._lines(Text(f"Thought for {seconds:.1f} s ({tokens:,} tokens)", style="dim"))
        self._settle([Line("", "")] * self._gap + (self._thought_lines() if self._unfolded else []) + line)
        self._thought, self._thinking_since, self._gap = "", None, True

    def note(self, line: str | None, style: str = "dim") -> None:
        """Settle what is open, and print a line of our own below it."""
        final = self._laid_out(blocks(self._open))
        self._open = ""
        if line is not None:
            final += [Line("", "")] * self._gap + self._lines(Text(printable(line), style=style))
            self._gap = True
        self._settle(final)

    def close(self) -> None:
        """The reply is complete; an empty line follows it."""
        self.note(None)
        if not self._region.at_start:
            self._settle([Line("", "")])
        self._region.close()

    def _due(self) -> bool:
        return time.monotonic() >= self._next_draw

    def _drew(self, start: float) -> None:
        """Long blocks take long to lay out: at most a fifth of the time goes into it."""
        now = time.monotonic()
        self._next_draw = now + max(REDRAW_EVERY, 4 * (now - start))

    def _settle(self, lines: list[Line]) -> None:
        self._region.draw(lines)
        self._region.settle(len(lines))

    def _draw_text(self) -> None:
        """Settle the blocks that complete lines show to be finished, and draw the rest."""
        start = time.monotonic()
        complete, _, partial = self._open.rpartition("\n")
        finished = blocks(complete + "\n")[:-1]
        final = self._laid_out(finished)
        if finished:
            self._open = "\n".join(self._open.split("\n")[finished[-1].stop :])
        gap = self._gap
        if not partial.strip("-=*_#>`~|+:. \t0123456789"):  # a marker of what only the next piece can tell
            rest = self._open[: len(self._open) - len(partial)]
        else:
            rest = self._open
        open_blocks = blocks(rest)
        lines = self._laid_out(open_blocks)
        self._gap = gap
        if any(block.kind == "table_open" for block in open_blocks):  # columns move: nothing may scroll away yet
            lines = lines[-max(1, self._console.height - 1) :]
        self._region.draw(final + lines)
        self._region.settle(len(final))
        self._drew(start)

    def _laid_out(self, found: Sequence[Block]) -> list[Line]:
        """Lines of blocks that follow what came before, in the spacing that the source has."""
        lines: list[Line] = []
        for block in found:
            lines += [Line("", "")] * self._gap
            lines += self._lines(_markdown(block.source))
            self._gap = block.spaced
        return lines

    def _thought_lines(self) -> list[Line]:
        return self._lines(Text(self._thought.strip() or "Thinking", style="dim italic"))

    def _lines(self, content: RenderableType) -> list[Line]:
        """What a renderable looks like, without empty lines around and spaces at the ends."""
        rows = [_trimmed(row) for row in self._console.render_lines(content, pad=False)]
        with self._console.capture() as capture:
            for row in rows:
                self._console.print(Segments([*row, Segment.line()]), end="", soft_wrap=True)
        styled = capture.get().split("\n")
        lines = [Line(a, "".join(s.text for s in row)) for a, row in zip(styled, rows, strict=False)]
        while lines and not lines[0].plain:
            del lines[0]
        while lines and not lines[-1].plain:
            del lines[-1]
        return lines


class _Heading(Heading):
    """A heading where text begins: rich puts titles in the middle."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text


class _Markdown(Markdown):
    elements: ClassVar = {**Markdown.elements, "heading_open": _Heading}


def _markdown(source: str) -> Markdown:
    """Rich's Markdown of text as models write it: a line's end is a line's end."""
    made = _Markdown("", code_theme="ansi_dark", hyperlinks=False)
    made.parsed = _PARSER.parse(source)
    left: list[Token] = list(made.parsed)
    while left:
        token = left.pop()
        left += token.children or []
        if token.type == "softbreak":
            token.type = "hardbreak"
    return made


def _trimmed(row: list[Segment]) -> list[Segment]:
    """A row without spaces at its end."""
    room, kept = len("".join(segment.text for segment in row).rstrip()), []
    for segment in row:
        if room > 0:
            kept.append(Segment(segment.text[:room], segment.style))
            room -= len(segment.text)
    return kept
