"""A constraint for tests of generation, told to the loop as any grammar is."""

from __future__ import annotations

import numpy as np


class Alternating:
    """Even tokens, then odd ones, and so on, `n` in all."""

    def __init__(self, n: int) -> None:
        self.n, self.seen = n, []  # type: tuple[int, list[int]]

    def mask(self) -> np.ndarray:
        return np.full(4096, 0xAAAAAAAA if len(self.seen) % 2 else 0x55555555, np.uint32)

    def accept(self, token: int) -> None:
        self.seen.append(token)

    def fork(self) -> Alternating:
        other = Alternating(self.n)
        other.seen = [*self.seen]
        return other

    @property
    def finished(self) -> bool:
        return len(self.seen) == self.n
