"""Drafts: guesses at the next tokens of a reply, which the model then checks in one step (`Model.check`).

In: the tokens of a sequence. Out: tokens that may follow. `Lookup` guesses that what came before comes again; another
`Drafter` may be a model. Knows nothing of text, and nothing of how a token is chosen: loop.py takes the tokens that it
would have chosen, drafted or not, so drafts change how fast a reply comes and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from ..kv.state import KVState
from ..ops.sample import Draw

NGRAM = 3  # tokens that must have come before in this order
LONGEST = 16  # tokens that are compared before them, to tell which place is the likeliest to go on alike


class Drafter(Protocol):
    """Guesses the next tokens of one sequence at a time."""

    @property
    def needs_hidden(self) -> bool:
        """True if it drafts from the hidden row of the target."""

    def draft(
        self,
        tokens: Sequence[int],
        state: KVState,
        hidden: mx.array | None,
        count: int,
        draws: Sequence[Draw] = (),
    ) -> list[int]:
        """Return up to `count` tokens that may follow; none where there is nothing to go by.

        Args:
            tokens: all of the sequence; the last one is not read yet.
            state: of the target, which has read all but the last token. Must stay as it is.
            hidden: the target's hidden row after its last norm, which the head made the last token from: fp32
                [hidden]. None: unknown.
            draws: how the target will draw each of these tokens; empty: in another way. A drafter that draws from
                its own logits by the same numbers agrees with the target more often than one that takes its likeliest.
        """
