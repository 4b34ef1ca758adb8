"""A bound on the tokens of thinking in one reply.

In: the constraint on the reply, if it has one. Out: a `Constraint` that closes the thinking channel in time.
"""

import copy

import numpy as np

from ..generation.sampling import Constraint
from ..tokens.tokenizer import Tokenizer


class ThinkBudget:
    """A constraint with a bound on thinking: after `budget` tokens only the end of the channel may follow."""

    def __init__(self, tokenizer: Tokenizer, budget: int, inner: Constraint | None, thinking: bool) -> None:
        """`thinking`: the prompt ends inside a channel."""
        self._opens, self._closes = tokenizer.token_id("<|channel>"), tokenizer.token_id("<channel|>")
        self._left, self._inner = budget, inner
        self._thinking = thinking
        self._close = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
        if self._closes is not None:
            self._close[self._closes // 32] = 1 << self._closes % 32

    def fork(self) -> "ThinkBudget":
        """Return one that goes on from here by itself."""
        other = copy.copy(self)
        other._inner = None if self._inner is None else self._inner.fork()
        return other

    def mask(self) -> np.ndarray | None:
        """Return the tokens that may come next, as `Constraint.mask`; None: any."""
        if self._thinking and self._left <= 0:
            return self._close
        return None if self._inner is None else self._inner.mask()

    def accept(self, token: int) -> None:
        """Take note of the token that was chosen."""
        if self._thinking:
            self._left -= 1
        self._thinking = token != self._closes if self._thinking else token == self._opens
        if self._inner is not None:
            self._inner.accept(token)

    @property
    def finished(self) -> bool:
        return self._inner is not None and self._inner.finished
