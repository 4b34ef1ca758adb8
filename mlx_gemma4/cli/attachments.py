"""Files of pictures, sounds and videos that a command or a message at the prompt names.

In: a path. Out: a content part of a message, and what to say or show of it. Nothing is decoded to send it.
"""

from __future__ import annotations

import base64
import os
import re
import shlex
import sys
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Kind
from ..errors import InputError, reason
from ..media.kind import HEAD, kind_of

if TYPE_CHECKING:
    from PIL import Image

KEPT = 64_000_000  # bytes of a file that a part holds; it need not be there any more, then
_MOST = {"image": 280, "audio": 800, "video": 2600}  # tokens, unless more are asked for
_ROWS = 8  # of a thumbnail


def attachment(kind: str, name: str, flag: str, tokens: int | None = None) -> dict[str, Any]:
    """Return a file as a content part, which has its bytes, or the path of a large file. Raises InputError."""
    path = Path(name).expanduser()
    try:
        if not path.is_file():
            raise InputError(f"{flag} {name}: there is no such file")
        small = path.stat().st_size <= KEPT
        part = {"type": kind, kind: path.read_bytes() if small else path.resolve(), "name": path.name}
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {name}: can't be read ({reason(error)})") from error
    return part | ({"tokens": tokens} if tokens and kind == "image" else {})


def most_tokens(part: dict[str, Any]) -> int:
    """Return about how many tokens a part may take."""
    return int(part.get("tokens") or _MOST[part["type"]])


def text_of(content: Any) -> str:
    """Return the text of a message's content, with a mark where something else is."""
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text") or f"[{part['type']}: {part.get('name')}]" for part in content or ())


def dropped(line: str, within: bool = True) -> tuple[list[tuple[Kind, str]], str]:
    """Return the files whose paths are all of a line or, `within` it, in quotes; and the line without them.

    So terminals paste what is dropped on them: in quotes, or with spaces behind backslashes.
    """
    if whole := _kind_at(line):
        return [whole], ""
    found = []
    for quoted in re.findall(r"'[^'\n]+'|\"[^\"\n]+\"", line) if within else ():
        if kind := _kind_at(quoted):
            found.append(kind)
            line = line.replace(quoted, "", 1)
    return found, line.strip()


def _kind_at(text: str) -> tuple[Kind, str] | None:
    with suppress(ValueError, OSError):
        (name,) = shlex.split(text) if re.search(r"[\\'\"]", text) else [text]
        path = Path(name.removeprefix("file://")).expanduser()
        if path.is_file():
            with path.open("rb") as file:
                kind = kind_of(file.read(HEAD))
            return (kind, str(path)) if kind else None
    return None


def opened(part: dict[str, Any]) -> Image.Image | None:
    """Return a picture that is attached, decoded; None: it is none. Raises InputError."""
    from ..media.content import content_of
    from ..media.picture import decoded

    return decoded(content_of(part)) if part["type"] == "image" else None


def preview(picture: Image.Image | None) -> tuple[str, str]:
    """Return a picture's size in words, and the codes that draw it small on this terminal, or nothing."""
    if picture is None:
        return "", ""
    size = f" {picture.width}x{picture.height}"
    draw = _kitty if graphics() == "kitty" else _iterm if graphics() else None
    if draw is None:
        return size, ""
    picture = picture.copy()
    picture.thumbnail((640, _ROWS * 20))
    file = BytesIO()
    picture.save(file, "PNG")
    return size, draw(base64.b64encode(file.getvalue()).decode()) + "\n"


def graphics() -> str | None:
    """Return how this terminal shows pictures: "kitty", "iterm" or not at all."""
    names = " ".join(os.environ.get(name, "") for name in ("TERM", "TERM_PROGRAM", "LC_TERMINAL"))
    if not sys.stdout.isatty() or "TMUX" in os.environ or "screen" in names:
        return None
    if "KITTY_WINDOW_ID" in os.environ or re.search("kitty|ghostty", names):
        return "kitty"
    return "iterm" if re.search("iTerm|WezTerm", names) else None


def _kitty(data: str) -> str:
    """https://sw.kovidgoyal.net/kitty/graphics-protocol: a PNG in pieces of 4096 characters, drawn at the cursor."""
    pieces = [data[i : i + 4096] for i in range(0, len(data), 4096)]
    heads = [f"a=T,f=100,q=2,r={_ROWS}," if i == 0 else "" for i in range(len(pieces))]
    return "".join(
        f"\x1b_G{head}m={int(i + 1 < len(pieces))};{piece}\x1b\\"
        for i, (head, piece) in enumerate(zip(heads, pieces, strict=True))
    )


def _iterm(data: str) -> str:
    """https://iterm2.com/documentation-images.html"""
    return f"\x1b]1337;File=inline=1;height={_ROWS};preserveAspectRatio=1:{data}\x07"
