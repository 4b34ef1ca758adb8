"""A decode step that has been started, which is asked later for its logits or the token that it draws from them.

`LazyStep` is the plain way, for every device. On NVIDIA GPUs replay.py offers another behind the same `Step`. A
`BatchStep` is the same for several states, and batch_replay.py its other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias, cast

import mlx.core as mx

from ..execution import execution
from ..ops.dispatch import Kernels
from ..ops.sample import LIKELIEST, Draw, drawn
from ..shard import Part


class Step(Protocol):
    """The forward pass of one token, started."""

    def token(self) -> int:
        """Return the next token, chosen by the draw that the step was started with. Waits for the device."""

    def logits(self) -> mx.array:
        """Return the logits of the next token, fp32 [vocab]. To be called under the execution lock."""


NextToken: TypeAlias = "int | mx.array | Step"  # an array: int []; a step: its token


class LazyStep:
    """A step as a lazy graph: the device gets it with the first array computed from it."""

    def __init__(
        self, logits: mx.array, draw: Draw = LIKELIEST, run: Kernels | None = None, part: Part | None = None
    ) -> None:
        """`logits`: fp32 [vocab], of a part those of its rows."""
        self.batch = LazyBatchStep(logits[None], [draw], run, part)

    def token(self) -> int:
        return self.batch.tokens()[0]

    def logits(self) -> mx.array:
        return self.batch.logits()[0]


def ids_of(token: NextToken) -> mx.array:
    """Return a token as an array, int [1]."""
    if isinstance(token, LazyStep):
        return token.batch.drawn()
    return token[None] if isinstance(token, mx.array) else mx.array([known(token)])


def known(token: NextToken) -> int:
    """Return a token's id, once it is computed."""
    return int(token) if isinstance(token, int | mx.array) else token.token()


class BatchStep(Protocol):
    """The forward pass of one token for each of several states, started."""

    @property
    def rows(self) -> int:
        """How many states it is for."""

    def tokens(self) -> list[int]:
        """Return the next token of each, chosen by the draw that its row was started with. Waits for the device."""

    def logits(self) -> mx.array:
        """Return the logits of their next tokens, fp32 [rows, vocab]. To be called under the execution lock."""


class RowStep(NamedTuple):
    """What a step for several states is for one of them: a `Step`."""

    of: BatchStep
    row: int

    def token(self) -> int:
        return self.of.tokens()[self.row]

    def logits(self) -> mx.array:
        return self.of.logits()[self.row]


Tokens: TypeAlias = "mx.array | Sequence[int] | BatchStep"  # an array: int [B]; a step: its tokens


class LazyBatchStep:
    """A step as a lazy graph: the device gets it with the first array computed from it."""

    def __init__(
        self, logits: mx.array, draws: Sequence[Draw], run: Kernels | None = None, part: Part | None = None
    ) -> None:
        """`logits`: fp32 [rows, vocab], of a part those of its rows."""
        self._logits, self._draws, self._run, self._part = logits, draws, run, part
        self._drawn: mx.array | None = None

    @property
    def rows(self) -> int:
        return self._logits.shape[0]

    def tokens(self) -> list[int]:
        with execution():
            tokens = self.drawn()
        return cast("list[int]", tokens.tolist())

    def logits(self) -> mx.array:
        if self._part is not None:
            self._logits, self._part = self._part.gathered(self._logits), None
            mx.async_eval(self._logits)
        return self._logits

    def schedule(self) -> mx.array:
        """Have the device begin, with no more of the logits than are here, which are returned."""
        mx.async_eval(self._logits)
        return self._logits

    def drawn(self) -> mx.array:
        """Return the tokens, int32 [rows], under way. To be called under the execution lock."""
        if self._drawn is None:
            if self._part is not None and all(draw.temperature == 0 for draw in self._draws):
                self._drawn = self._part.likeliest(self._logits)
            else:
                self._drawn = drawn(self._run, self.logits(), self._draws)
            mx.async_eval(self._drawn)
        return self._drawn


def count_of(tokens: Tokens) -> int:
    """Return how many tokens these are."""
    if isinstance(tokens, mx.array):
        return tokens.size
    return len(tokens) if isinstance(tokens, Sequence) else tokens.rows


def tokens_as_array(tokens: Tokens) -> mx.array:
    """Return tokens as an array, int32 [B]."""
    if isinstance(tokens, LazyBatchStep):
        return tokens.drawn()
    return tokens.astype(mx.int32) if isinstance(tokens, mx.array) else mx.array(known_tokens(tokens), mx.int32)


def known_tokens(tokens: Tokens) -> list[int]:
    """Return the tokens' ids, once they are computed."""
    if isinstance(tokens, mx.array):
        return cast("list[int]", tokens.tolist())
    return [*tokens] if isinstance(tokens, Sequence) else tokens.tokens()
