"""What some bytes are, by their first few: a picture, a sound or a video. Whether they can be read is not known here.

In: the beginning of a file. Out: "image", "audio", "video" or None. Knows no decoder.
"""

from collections.abc import Collection
from typing import Literal, Protocol

Kind = Literal["image", "audio", "video"]
KINDS: tuple[Kind, ...] = ("image", "audio", "video")
HEAD = 16  # bytes that decide

_STARTS: tuple[tuple[bytes, Kind], ...] = (
    (b"\x89PNG\r\n\x1a\n", "image"),
    (b"\xff\xd8\xff", "image"),
    (b"GIF8", "image"),
    (b"BM", "image"),
    (b"II*\0", "image"),
    (b"MM\0*", "image"),
    (b"fLaC", "audio"),
    (b"OggS", "audio"),
    (b"ID3", "audio"),
    (b"\xff\xfb", "audio"),
    (b"\xff\xf3", "audio"),
    (b"\xff\xf2", "audio"),
    (b"\xff\xf1", "audio"),
    (b"\x1aE\xdf\xa3", "video"),  # Matroska, WebM
)
_RIFF: dict[bytes, Kind] = {b"WEBP": "image", b"WAVE": "audio", b"AVI ": "video"}
_PICTURES = b"heic", b"heix", b"mif1", b"msf1", b"avif"  # brands of ISO files; the others hold sound or video


def kind_of(head: bytes) -> Kind | None:
    """Return what a file that begins so is, or None."""
    if head[:4] == b"RIFF":
        return _RIFF.get(head[8:12])
    if head[4:8] == b"ftyp":
        return "audio" if head[8:11] == b"M4A" else "image" if head[8:12] in _PICTURES else "video"
    return next((kind for start, kind in _STARTS if head.startswith(start)), None)


class _Takes(Protocol):
    """A projector (projector.py's `Media`)."""

    @property
    def kinds(self) -> Collection[str]: ...


def kinds_of(media: _Takes | None) -> tuple[Kind, ...]:
    """Return what a model takes beside text, in the order of KINDS."""
    return tuple(kind for kind in KINDS if media and kind in media.kinds)
