"""What there is beside text: pictures, sounds and videos; and which of them some bytes are, by their first few.

In: the beginning of a file. Out: "image", "audio", "video" or None. Knows no decoder, nor whether they
can be read. Imports nothing heavy: the command line names these before a command runs.
"""

from __future__ import annotations

import re

from ..config import Kind

KINDS: tuple[Kind, ...] = ("image", "audio", "video")
BUDGETS = (70, 140, 280, 560, 1120)  # soft tokens of a picture, at most
HEAD = 16  # bytes that decide

_STARTS: dict[Kind, re.Pattern[bytes]] = {  # of ISO files ("ftyp") the brand decides
    "image": re.compile(
        rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8|BM|II\*\0|MM\0\*|RIFF....WEBP|....ftyp(hei|mif1|msf1|avif)", re.S
    ),
    "audio": re.compile(rb"fLaC|OggS|ID3|\xff[\xfb\xf3\xf2\xf1]|FORM....AIF|RIFF....WAVE|....ftypM4A", re.S),
    "video": re.compile(rb"\x1aE\xdf\xa3|RIFF....AVI |....ftyp", re.S),  # Matroska and WebM begin as the first one does
}


def kind_of(head: bytes) -> Kind | None:
    """Return what a file that begins so is, or None."""
    return next((kind for kind in KINDS if _STARTS[kind].match(head)), None)
