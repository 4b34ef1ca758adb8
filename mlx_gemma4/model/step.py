"""A decode step that has been started, which is asked later for its logits or the token that it draws from them.

`LazyStep` is the plain way, for every device. On NVIDIA GPUs replay.py offers another behind the same `Step`.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

import mlx.core as mx

from ..execution import execution
from ..ops.dispatch import Kernels
from ..ops.sample import LIKELIEST, Draw, drawn


class Step(Protocol):
    """The forward pass of one token, started."""

    def token(self) -> int:
        """Return the next token, chosen by the draw that the step was started with. Waits for the device."""

    def logits(self) -> mx.array:
        """Return the logits of the next token, fp32 [vocab]. To be called under the execution lock."""


NextToken: TypeAlias = "int | mx.array | Step"  # an array: int []; a step: its token


class LazyStep:
    """A step as a lazy graph: the device gets it with the first array computed from it."""

    def __init__(self, logits: mx.array, draw: Draw = LIKELIEST, run: Kernels | None = None) -> None:
        self._logits, self._draw, self._run = logits, draw, run
        self._token: int | None = None

    def token(self) -> int:
        if self._token is None:
            with execution():
                token = drawn(self._run, self._logits[None], [self._draw])
                mx.async_eval(token)
            self._token = int(token)
        return self._token

    def logits(self) -> mx.array:
        return self._logits


def ids_of(token: NextToken) -> mx.array:
    """Return a token as an array, int [1]."""
    return token[None] if isinstance(token, mx.array) else mx.array([known(token)])


def known(token: NextToken) -> int:
    """Return a token's id, once it is computed."""
    return int(token) if isinstance(token, int | mx.array) else token.token()
