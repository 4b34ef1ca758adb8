"""What some bytes are, by their first few: a picture, a sound or a video. Whether they can be read is not known here.

In: the beginning of a file. Out: "image", "audio", "video" or None. Knows no decoder.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .projector import Media

Kind = Literal["image", "audio", "video"]
KINDS: tuple[Kind, ...] = ("image", "audio", "video")
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


def kinds_of(media: Media | None) -> tuple[Kind, ...]:
    """Return what a model takes beside text, in the order of KINDS."""
    return tuple(kind for kind in KINDS if media and kind in media.kinds)
