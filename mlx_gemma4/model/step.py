"""A decode step that has been started, and what starts it.

In: a token and a `KVState`. Out: a `Step`, which is asked later for its logits or its likeliest token. `LazyStepper` is
the plain way, for every device. On NVIDIA GPUs replay.py offers another behind the same `Stepper`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import mlx.core as mx

from ..execution import execution
from ..kv.state import KVState


class Step(Protocol):
    """The forward pass of one token, started."""

    def token(self) -> int:
        """Return the likeliest next token, the lowest of equals. Waits for the device."""

    def logits(self) -> mx.array:
        """Return the logits of the next token, fp32 [vocab]. To be called under the execution lock."""


NextToken: TypeAlias = "int | mx.array | Step"  # an array: int []; a step: its likeliest token


class Stepper(Protocol):
    """Starts steps. To be called under the execution lock."""

    @property
    def replays(self) -> bool:
        """True if a step costs the host next to nothing and may start with the `Step` before it, still under way.

        Then `logits` waits for the device, and is not to be asked of a step whose token another has started with.
        """

    def step(self, token: NextToken, state: KVState) -> Step:
        """Start reading a token into a state."""


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


class LazyStepper:
    """Starts steps by a function (ids int [1], state) -> logits fp32 [1, vocab]."""

    replays = False

    def __init__(self, read: Callable[[mx.array, KVState], mx.array]) -> None:
        self._read = read

    def step(self, token: NextToken, state: KVState) -> Step:
        return LazyStep(self._read(ids_of(token), state)[0])


def ids_of(token: NextToken) -> mx.array:
    """Return a token as an array, int [1]."""
    return token[None] if isinstance(token, mx.array) else mx.array([known(token)])


def known(token: NextToken) -> int:
    """Return a token's id, once it is computed."""
    return int(token) if isinstance(token, int | mx.array) else token.token()
