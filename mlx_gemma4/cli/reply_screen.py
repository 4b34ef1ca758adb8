"""A reply on a terminal while it is written: Markdown, with thoughts dimmed and folded.

In: pieces of text. Out: lines on a rich console. Finished blocks (paragraphs, list items, code) are printed for good
and scroll away as any output does; only the open block is redrawn, and of it only the lines that changed. Lines that no
longer fit on the screen scroll away too. Knows nothing of models and sessions.

rich.live is no substitute: it redraws its whole region each time, loses count of its rows when the terminal becomes
narrower, and shows only the top of a block that is taller than the screen, or else leaves every version of it in the
scroll-back.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import Heading, Markdown
from rich.text import Text
from rich.theme import Theme

from ..errors import printable

REDRAW_EVERY = 0.05  # seconds between two drawings, at least
THOUGHT_LINES = 6  # the last lines of an open thought that are shown
_STYLES = {"markdown.code": "cyan", "markdown.link_url": "underline"}  # in place of rich's black boxes

# Raw HTML and link definitions, which rich drops, are shown as they stand.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable("reference")


def console_for_replies() -> Console:
    return Console(theme=Theme(_STYLES), highlight=False)


class Block(NamedTuple):
    """A piece of Markdown that is laid out by itself: a top-level block, or an item of a top-level list."""

    source: str
    kind: str  # type of the parser's token that opens it
    stop: int  # line of the text at which the next block starts
    spaced: bool  # an empty line follows


def blocks(source: str) -> list[Block]:
    """Split a text into blocks. Joined, they are the text except for empty lines between them."""
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


class Line(NamedTuple):
    """A line of the screen."""

    styled: str  # with escape codes
    plain: str


class _Region:
    """The last lines of the terminal, which may still change. The cursor is at the end of the last one."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._gone: list[str] = []  # plain lines that scrolled away before they were settled
        self._drawn: list[Line] = []
        self._width = console.width
        self.at_start = True  # the cursor is on an empty line

    def draw(self, lines: Sequence[Line], settled: int = 0) -> None:
        """Show these lines in place of all that are not settled; the first `settled` stay as they are from now on."""
        same = _agree(self._gone, [line.plain for line in lines])
        del self._gone[same:]  # their layout has changed since: they are shown again below
        shown = lines[same:]
        resized = self._console.width != self._width
        keep = 0 if resized else _agree(self._drawn, shown)
        out, drew = [], bool(self._drawn)
        new = "\n".join(line.styled for line in shown[keep:])
        if not drew:
            out.append("" if self.at_start or not shown else "\n")
        elif keep == len(self._drawn) - 1 and new.startswith(self._drawn[-1].styled) and not resized:
            new = new[len(self._drawn[-1].styled) :]  # the most frequent case: the last line grows
        elif keep < len(self._drawn):
            up = self._rows(self._drawn[keep:]) - 1
            out.append((f"\x1b[{up}A" if up else "") + "\r\x1b[J")
        elif keep < len(shown):
            out.append("\n")
        out.append(new)
        if keep and keep == len(shown) < len(self._drawn):  # fewer lines than before: back to the end of the last one
            out.append(f"\x1b[A\x1b[{max(1, cell_len(shown[-1].plain))}C")
        self._console.file.write("".join(out))
        self._console.file.flush()
        room = max(1, self._console.height - 1)
        self._gone += [line.plain for line in shown[:-room]]
        self._drawn, self._width = list(shown[-room:]), self._console.width
        self.at_start = not shown and (self.at_start or drew)
        gone = min(settled, len(self._gone))
        del self._gone[:gone]
        del self._drawn[: settled - gone]

    def close(self) -> None:
        """Settle all lines, and put the cursor on a new one."""
        self._gone, self._drawn = [], []
        if not self.at_start:
            self._console.file.write("\n")
            self._console.file.flush()
        self.at_start = True

    def _rows(self, lines: Sequence[Line]) -> int:
        """Rows that drawn lines take now. Terminals that rewrap old lines when they narrow are known by name."""
        if self._width == self._console.width or not os.environ.keys() & {"TERM_PROGRAM", "VTE_VERSION"}:
            return len(lines)
        return sum(max(1, -(-cell_len(line.plain) // self._console.width)) for line in lines)


def _agree(a: Sequence[object], b: Sequence[object]) -> int:
    """Length of the common beginning of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class ReplyScreen:
    """Show a reply piece by piece. `unfolded`: thoughts stay on the screen."""

    def __init__(self, console: Console, unfolded: bool = False) -> None:
        self._console, self._unfolded = console, unfolded
        self._region = _Region(console)
        self._open = ""  # Markdown that is not settled yet
        self._thought = ""
        self._thinking_since: float | None = None
        self._gap = False  # an empty line comes before the next block
        self._next_draw = 0.0

    def text(self, piece: str) -> None:
        """Add to the reply."""
        self._open += printable(piece)
        self._draw_if_due(self._draw_text)

    def think(self, piece: str) -> None:
        """Add to a thought."""
        if self._thinking_since is None:
            self.note(None)
            self._thinking_since = time.monotonic()
        self._thought += printable(piece)
        shown = [Line("", "")] * self._gap
        self._draw_if_due(lambda: self._region.draw(shown + self._thought_lines()[-THOUGHT_LINES:]))

    def fold(self, tokens: int) -> None:
        """End the thought, and replace it by one line; unfolded, add that line to it."""
        if self._thinking_since is None:
            return
        seconds = time.monotonic() - self._thinking_since
        line = self._lines(Text(f"Thought for {seconds:.1f} s ({tokens:,} tokens)", style="dim"))
        self._settle([Line("", "")] * self._gap + (self._thought_lines() if self._unfolded else []) + line)
        self._thought, self._thinking_since, self._gap = "", None, True

    def note(self, line: str | None, style: str = "dim") -> None:
        """Settle the open block, and print a line about the reply below it."""
        final = self._laid_out(blocks(self._open))
        self._open = ""
        if line is not None:
            final += [Line("", "")] * self._gap + self._lines(Text(printable(line), style=style))
            self._gap = True
        self._settle(final)

    def close(self) -> None:
        """Settle the complete reply, and add an empty line."""
        self.note(None)
        if not self._region.at_start:
            self._settle([Line("", "")])
        self._region.close()

    def _due(self) -> bool:
        return time.monotonic() >= self._next_draw

    def _draw_if_due(self, draw: Callable[[], None]) -> None:
        """Draw now and then only: laying out long blocks takes at most a fifth of the time."""
        start = time.monotonic()
        if self._due():
            draw()
            now = time.monotonic()
            self._next_draw = now + max(REDRAW_EVERY, 4 * (now - start))

    def _settle(self, lines: list[Line]) -> None:
        self._region.draw(lines, settled=len(lines))

    def _draw_text(self) -> None:
        """Settle the blocks that are finished, as far as complete lines tell, and draw the rest."""
        complete, _, partial = self._open.rpartition("\n")
        finished = blocks(complete + "\n")[:-1]
        final = self._laid_out(finished)
        if finished:
            self._open = "\n".join(self._open.split("\n")[finished[-1].stop :])
        gap = self._gap
        marker = not partial.strip("-=*_#>`~|+:. \t0123456789")  # of which kind, only the next piece can tell
        open_blocks = blocks(self._open[: len(self._open) - len(partial)] if marker else self._open)
        lines = self._laid_out(open_blocks)
        self._gap = gap
        if any(block.kind == "table_open" for block in open_blocks):
            # Columns may still move: nothing may scroll away yet.
            lines = lines[-max(1, self._console.height - 1) :]
        self._region.draw(final + lines, settled=len(final))

    def _laid_out(self, found: Sequence[Block]) -> list[Line]:
        """Lay out blocks below what came before, with an empty line where the source has one."""
        lines: list[Line] = []
        for block in found:
            lines += [Line("", "")] * self._gap
            lines += self._lines(_markdown(block.source))
            self._gap = block.spaced
        return lines

    def _thought_lines(self) -> list[Line]:
        return self._lines(Text(self._thought.strip() or "Thinking", style="dim italic"))

    def _lines(self, content: RenderableType) -> list[Line]:
        """Render without empty lines at the top and bottom and without spaces at the ends."""
        lines: list[Line] = []
        for segments in self._console.render_lines(content, pad=False):
            row = Text.assemble(*((segment.text, segment.style or "") for segment in segments))
            row.rstrip()
            with self._console.capture() as capture:
                self._console.print(row, end="", soft_wrap=True)
            lines.append(Line(capture.get(), row.plain))
        while lines and not lines[0].plain:
            del lines[0]
        while lines and not lines[-1].plain:
            del lines[-1]
        return lines


class _Heading(Heading):
    """A heading at the left: rich centers titles."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text


class _Markdown(Markdown):
    elements: ClassVar = {**Markdown.elements, "heading_open": _Heading}


def _markdown(source: str) -> Markdown:
    """Make rich's Markdown of a text, with a line break wherever the text has one."""
    made = _Markdown("", code_theme="ansi_dark", hyperlinks=False)
    made.parsed = _PARSER.parse(source)
    left: list[Token] = list(made.parsed)
    while left:
        token = left.pop()
        left += token.children or []
        if token.type == "softbreak":
            token.type = "hardbreak"
    return made
