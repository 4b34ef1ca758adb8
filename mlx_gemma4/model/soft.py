"""Soft tokens: rows of numbers that stand in a prompt, in place of embeddings, where a picture or a sound was given.

In: what a tower made of one picture or sound (`Encoded`). Each of its rows gets a token id of its own below zero, made
of a hash of the content: in prompts, KV states, prefix caches and saved sessions it stands where other ids do, and the
same picture has the same ids everywhere. Knows no files and no towers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import mlx.core as mx
import numpy as np


@dataclass(frozen=True, eq=False)
class Encoded:
    """What a tower makes of one picture, one frame of a video, or one piece of sound."""

    kind: Literal["image", "video", "audio"]
    digest: bytes  # SHA-256 of all that decides the rows: content, number of rows asked for, tower
    rows: mx.array  # fp32 [n, hidden], used as they are: no factor sqrt(hidden)

    @cached_property
    def ids(self) -> list[int]:
        """Token ids of the rows, n of them, all below zero: 31 bits each of a hash of the digest."""
        bits = np.frombuffer(hashlib.shake_256(self.digest).digest(4 * self.rows.shape[0]), "<i4")
        return [int(i) for i in bits | np.int32(-(2**31))]
