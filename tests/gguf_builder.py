"""GGUF files by hand, byte by byte: strings, keys, arrays, tensor entries, and whole files."""

from __future__ import annotations

import struct

import numpy as np

U32, STRING, ARRAY = 4, 8, 9


def text(s: str | bytes) -> bytes:
    """A GGUF string: length and bytes."""
    data = s.encode() if isinstance(s, str) else s
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(name: str | bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    """A directory entry; dims fastest first."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    version: int = 3,
    align: int = 32,
    magic: bytes = b"GGUF",
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A GGUF file by hand. counts: (tensors, keys) to declare, if not the true ones."""
    keys, tensors = keys or [], tensors or []
    n_tensors, n_keys = counts or (len(tensors), len(keys))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % align) + data


GOOD_KEYS = [
    key("general.architecture", STRING, text("gemma4")),
    key("a.uint32", U32, struct.pack("<I", 7)),
    key("a.strings", ARRAY, array(STRING, 3, text("one") + text("") + text("drei ▁ü"))),
    key("a.floats", ARRAY, array(6, 2, struct.pack("<2f", 0.5, -1))),
]
GOOD_TENSORS = [tensor("a", (4, 3), 0, 0), tensor("b.weight", (32, 2, 2), 8, 64)]
GOOD_DATA = np.arange(48, dtype=np.uint8).tobytes() + bytes(16) + bytes(range(136))
