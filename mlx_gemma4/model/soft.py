"""Soft tokens: rows of numbers that stand in a prompt, in place of embeddings, where a picture or a sound was given.

In: what a tower made of one picture or sound (`Encoded`). Each of its rows gets a token id of its own below zero, made
of a hash of the content: in prompts, KV states, prefix caches and saved sessions it stands where other ids do, and the
same picture has the same ids everywhere. Knows no files and no towers.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, cast
from weakref import WeakValueDictionary

import mlx.core as mx
import numpy as np

from ..config import SEEN, Kind
from ..errors import InputError


@dataclass(frozen=True, eq=False)
class Encoded:
    """What a tower makes of one picture, one frame of a video, or one piece of sound."""

    kind: Kind
    digest: bytes  # SHA-256 of all that decides the rows: content, number of rows asked for, tower
    rows: mx.array  # fp32 [n, hidden], used as they are: no factor sqrt(hidden)

    @cached_property
    def ids(self) -> list[int]:
        """Token ids of the rows, n of them, all below zero."""
        return soft_ids(self.kind, self.digest, self.rows.shape[0])


def soft_ids(kind: Kind, digest: bytes, rows: int) -> list[int]:
    """Return the ids of so many rows: 30 bits each of a hash of the digest, below `SEEN` for what is seen."""
    bits = np.frombuffer(hashlib.shake_256(digest).digest(4 * rows), "<u4").astype(np.int64) >> 2
    return cast("list[int]", (bits + (SEEN if kind == "audio" else 2 * SEEN)).tolist())


class SoftRows(NamedTuple):
    """The soft tokens of a chunk."""

    places: mx.array  # int32 [n], of the tokens in the chunk
    rows: mx.array  # fp32 [n, hidden]
    last: mx.array | None  # int32 [T], the last token of the chunk that each one sees on sliding layers; None: itself


class SoftTokens:
    """Finds rows by their ids. Keeps none of them: whoever has a prompt read holds what it is made of."""

    def __init__(self, sees_ahead: bool) -> None:
        """`sees_ahead`: of the model, `Config.sees_ahead`."""
        self.sees_ahead = sees_ahead
        self._lock = threading.Lock()
        self._known: WeakValueDictionary[int, Encoded] = WeakValueDictionary()

    def add(self, encoded: Encoded) -> Encoded:
        """Make a picture or sound known by its ids; return what to hold as long as it is to be: one of the same content
        that is known already, if there is one, or who holds that would lose it with this one."""
        with self._lock:
            known = self._known.get(encoded.ids[0])
            if known is not None and known.digest == encoded.digest:
                return known
            self._known.update(dict.fromkeys(encoded.ids, encoded))
            return encoded

    def held(self, ids: Sequence[int]) -> list[Encoded]:
        """Return what the soft tokens among ids stand for, so that a caller can hold it. Raises InputError."""
        return list({id(found): found for _, found, _, _ in self._runs(ids)}.values())

    def rows(self, ids: Sequence[int]) -> SoftRows | None:
        """Return the rows of a chunk's soft tokens; None: it has none. Raises InputError for what is held by nobody."""
        runs = self._runs(ids)
        if not runs:
            return None
        places = np.concatenate([np.arange(at, at + n) for at, _, _, n in runs]).astype(np.int32)
        rows = mx.concatenate([found.rows[row : row + n] for _, found, row, n in runs])
        last = np.arange(len(ids), dtype=np.int32)
        for at in range(len(ids) - 2, -1, -1) if self.sees_ahead else ():
            if ids[at] < SEEN and ids[at + 1] < SEEN:
                last[at] = last[at + 1]
        seen = self.sees_ahead and min(ids) < SEEN
        return SoftRows(mx.array(places), rows, mx.array(last) if seen else None)

    def _runs(self, ids: Sequence[int]) -> list[tuple[int, Encoded, int, int]]:
        """Return consecutive rows among ids: place of the first, what they are of, its row, their number."""
        runs: list[tuple[int, Encoded, int, int]] = []
        if not len(ids) or min(ids) >= 0:
            return runs
        at = 0
        while at < len(ids):
            if ids[at] >= 0:
                at += 1
                continue
            found = self._known.get(ids[at])
            if found is None:
                raise InputError(
                    f"there is no token {ids[at]}, or the picture or sound that it stood for is not here any more; "
                    "give that again"
                )
            row, n = found.ids.index(ids[at]), 0
            while n < min(len(found.ids) - row, len(ids) - at) and ids[at + n] == found.ids[row + n]:
                n += 1
            runs.append((at, found, row, n))
            at += n
        return runs
