"""What a part of a message gives to see or hear: bytes, a file, or an image of Pillow's.

In: the value of a content part. Out: a `Content`, which is read as a file and told from others by a hash. Nothing is
decoded here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import InputError, reason
from ..paths import check_source

if TYPE_CHECKING:
    from PIL import Image

LONGEST = 4 << 30  # bytes of a file


@dataclass(frozen=True)
class Content:
    """Bytes, the path of a file, or a Pillow image. `name` says in errors which one is meant."""

    name: str
    source: bytes | Path | Image.Image

    def open(self) -> BinaryIO:
        """Open what is no image of Pillow's, for reading. Raises InputError."""
        assert isinstance(self.source, bytes | Path)
        if isinstance(self.source, bytes):
            return BytesIO(self.source)
        try:
            return self.source.open("rb")
        except OSError as error:
            raise InputError(f"{self.name}: can't be read: {reason(error)}") from None

    def digest(self) -> bytes:
        """Return the SHA-256 of all of it. Raises InputError."""
        if not isinstance(self.source, bytes | Path):
            image = self.source
            return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).digest()
        found = hashlib.sha256()
        with self.open() as file:
            try:
                while piece := file.read(1 << 20):
                    found.update(piece)
            except OSError as error:
                raise InputError(f"{self.name}: can't be read: {reason(error)}") from None
        return found.digest()


def content_of(part: Mapping[str, Any]) -> Content:
    """Return what a part {"type": KIND, KIND: bytes | str | Path | Pillow image} gives.

    Raises:
        InputError: there is no such file, or it is empty, too large or no plain file.
    """
    kind = part["type"]
    value: Any = part.get(kind)
    if isinstance(value, str | Path):
        path = Path(value).expanduser()
        if not path.exists():
            raise InputError(f"{path}: no such file; check the path")
        check_source(path, f"a file with {'an' if kind[0] in 'ai' else 'a'} {kind}")
        size, content = path.stat().st_size, Content(str(path), path)
    elif isinstance(value, bytes | bytearray | memoryview):
        size, content = len(value), Content(part.get("name") or f"{kind} of {len(value):,} bytes", bytes(value))
    elif kind == "image" and hasattr(value, "tobytes") and hasattr(value, "convert"):
        return Content("image", value)
    else:
        raise InputError(f"{kind}: is {type(value).__name__}, neither bytes nor a path; give one of these")
    if not size:
        raise InputError(f"{content.name}: is empty; give another")
    if size > LONGEST:
        raise InputError(f"{content.name}: has {size / 1e9:.1f} GB, and {LONGEST / 1e9:.1f} are the most; give less")
    return content
