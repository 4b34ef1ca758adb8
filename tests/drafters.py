"""Drafters for tests: they know what comes, and are wrong as often as they are told."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from mlx_gemma4.kv.state import KVState
from mlx_gemma4.ops.sample import Draw


class Knowing:
    """Drafts what it was told will come, each token right with a probability."""

    def __init__(self, coming: Sequence[int], right: float, seed: int = 0, needs_hidden: bool = False) -> None:
        self.coming, self.right, self.needs_hidden = [*coming], right, needs_hidden
        self.chance = random.Random(seed)
        self.hidden: list[mx.array] = []

    def draft(
        self,
        tokens: Sequence[int],
        state: KVState,
        hidden: mx.array | None,
        count: int,
        draws: Sequence[Draw] = (),
    ) -> list[int]:
        assert state.length == len(tokens) - 1 and len(draws) in (0, count)
        assert not self.needs_hidden or hidden is not None
        self.hidden += [] if hidden is None else [hidden]
        following = self.coming[len(tokens) : len(tokens) + count]
        return [t if self.chance.random() < self.right else 3 + (t + 1) % 200 for t in following]

    def queue(self, *_: Any) -> None:
        """It knows them on the host."""


class KnowingAll:
    """`Knowing` for several replies, told apart by their prompts' second tokens."""

    def __init__(self, replies: Mapping[int, Sequence[int]], right: float, needs_hidden: bool = False) -> None:
        self.needs_hidden = needs_hidden
        self.each = {key: Knowing(coming, right, key, needs_hidden) for key, coming in replies.items()}

    def draft(
        self, tokens: Sequence[int], state: KVState, hidden: mx.array | None, count: int, draws: Sequence[Draw] = ()
    ) -> list[int]:
        return self.each[tokens[1]].draft(tokens, state, hidden, count, draws)

    def queue(self, *_: Any) -> None:
        """As `Knowing`'s."""
