"""Draws chat-media.svg: a picture attached in `mlx-gemma4 chat`, as a terminal that shows pictures (kitty) has it.

    python docs/images/chat_media.py

In: nothing; the model is tests/fixtures/media/uv, whose weights are random, so nothing is sent to it. Out: the file
beside this one. pyte keeps the screen and rich draws it; the thumbnail is the one that the program sends.
"""

from __future__ import annotations

import io
import os
import pty
import re
import select
import sys
import tempfile
import time
from pathlib import Path

import pyte
from PIL import Image, ImageDraw
from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
MODEL = "tests/fixtures/media/uv/model.gguf"
COLUMNS, LINES = 84, 26  # nothing may scroll
CELL = (12.2, 24.4)  # of rich's drawings, in their units
TYPED = ("/image shapes.png\r", "How many shapes are red?")
# A picture comes in pieces, of which all but the last say that there are more.
PICTURE = re.compile(rb"((?:\x1b_G[^;]*m=1;[^\x1b]*\x1b\\)*\x1b_G[^;]*m=0;[^\x1b]*\x1b\\)")


def shapes(path: Path) -> None:
    """Draw what is attached."""
    image = Image.new("RGB", (640, 480), "#f4f1e8")
    draw = ImageDraw.Draw(image)
    draw.ellipse((60, 90, 250, 280), fill="#c8373a")
    draw.rectangle((300, 60, 440, 200), fill="#2f6db5")
    draw.polygon([(420, 420), (590, 420), (505, 250)], fill="#c8373a")
    draw.ellipse((150, 320, 260, 430), fill="#e0a92e")
    image.save(path)


class Terminal:
    """A program on a screen, with the pictures that it has drawn there: row, rows, PNG in base64."""

    def __init__(self, command: list[str], folder: str) -> None:
        self.pictures: list[tuple[int, int, str]] = []
        self.screen = pyte.Screen(COLUMNS, LINES)
        self.stream = pyte.ByteStream(self.screen)
        pid, self.tty = pty.fork()
        if not pid:
            os.chdir(folder)
            kitty = {"TERM": "xterm-kitty", "COLUMNS": str(COLUMNS), "LINES": str(LINES), "HOME": folder}
            os.execvpe(command[0], command, {**os.environ, **kitty})
        os.set_blocking(self.tty, False)
        self.screen.write_process_input = lambda data: os.write(self.tty, data.encode())
        self.held = b""

    def read(self, seconds: float) -> None:
        """Show what the program writes until it has been silent for so long."""
        while select.select([self.tty], [], [], seconds)[0]:
            try:
                self.held += os.read(self.tty, 1 << 16)
            except OSError:  # it has ended
                return
            if b"\x1b_G" in self.held and not PICTURE.search(self.held):
                continue
            for part in PICTURE.split(self.held):
                if PICTURE.fullmatch(part):
                    self._draw(part.decode())
                else:
                    self.stream.feed(part)
            self.held = b""

    def _draw(self, codes: str) -> None:
        rows = int(re.findall(r"r=(\d+)", codes)[0])
        self.pictures.append((self.screen.cursor.y, rows, "".join(re.findall(r";([^\x1b]*)\x1b", codes))))
        self.screen.cursor_down(rows - 1)

    def svg(self) -> str:
        console = Console(record=True, width=COLUMNS, file=io.StringIO(), color_system="truecolor")
        shown = [bool(line.strip()) for line in self.screen.display]
        for row, rows, _ in self.pictures:
            shown[row : row + rows] = [True] * rows
        for y in range(LINES):
            if not shown[y] and not any(shown[y - 1 : y]):
                continue  # of empty lines one stays
            line = Text()
            for x in range(COLUMNS):
                c = self.screen.buffer[y][x]
                known = {"default": "", "brightblack": "bright_black"}
                colours = [known.get(f, f if re.fullmatch("[a-z_]+", f) else f"#{f}") for f in (c.fg, c.bg)]
                style = [colours[0]] if colours[0] else []
                style += ["on", colours[1]] if colours[1] else []
                style += ["bold"] * c.bold + ["reverse"] * c.reverse
                line.append(c.data, " ".join(style))
            console.print(line, soft_wrap=True)
        drawn = console.export_svg(title="mlx-gemma4 chat", unique_id="chat-media")
        for row, rows, data in self.pictures:
            place = f'x="0" y="{row * CELL[1] + 4:.1f}" height="{rows * CELL[1]:.1f}"'
            image = f'<image {place} href="data:image/png;base64,{data}"/>'
            drawn = re.sub(r'(<g class="chat-media-matrix">)', lambda m, i=image: i + m[1], drawn, count=1)
        return drawn


def main() -> None:
    root = HERE.parent.parent
    with tempfile.TemporaryDirectory() as folder:
        shapes(Path(folder) / "shapes.png")
        command = [sys.executable, "-m", "mlx_gemma4", "chat", "--model", str(root / MODEL), "-n", "8"]
        os.environ["PYTHONPATH"] = str(root)
        terminal = Terminal(command, folder)
        end = time.monotonic() + 60
        while not any(">" in line for line in terminal.screen.display) and time.monotonic() < end:
            terminal.read(0.5)
        for text in TYPED:
            os.write(terminal.tty, text.encode())
            terminal.read(3)
        (HERE / "chat-media.svg").write_text(terminal.svg())
        print("\n".join(terminal.screen.display))
        os.write(terminal.tty, b"\x03\x04")
        terminal.read(1)


if __name__ == "__main__":
    main()
