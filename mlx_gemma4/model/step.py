"""A decode step that has been started, which is asked later for its logits or its likeliest token.

`LazyStep` is the plain way, for every device. On NVIDIA GPUs replay.py offers another behind the same `Step`.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

import mlx.core as mx

from ..execution import execution


class Step(Protocol):
    """The forward pass of one token, started."""

    def token(self) -> int:
        """Return the likeliest next token, the lowest of equals. Waits for the device."""

    def logits(self) -> mx.array:
        """Return the logits of the next token, fp32 [vocab]. To be called under the execution lock."""


NextToken: TypeAlias = "int | mx.array | Step"  # an array: int []; a step: its likeliest token


class LazyStep:
    """A step as a lazy graph: the device gets it with the first array computed from it."""

    def __init__(self, logits: mx.array) -> None:
        self._logits = logits

    def token(self) -> int:
        with execution():
            token = mx.argmax(self._logits)
            mx.async_eval(token)
        return int(token)

    def logits(self) -> mx.array:
        return self._logits


def ids_of(token: NextToken) -> mx.array:
    """Return a token as an array, int [1]."""
    return token[None] if isinstance(token, mx.array) else mx.array([known(token)])


def known(token: NextToken) -> int:
    """Return a token's id, once it is computed."""
    return int(token) if isinstance(token, int | mx.array) else token.token()
