"""A decode step recorded once and replayed: one launch for the host, whatever it holds.

In: the step as launches of kernels (`decode`), a `Player` for them. Out: logits, token after token. The step writes the
newest keys and values in place, in tails of its own: those of one KV state at a time, which is lent them. Whenever
anything else looks at that state's layers, it gets its tails back first (`settle`), so that nobody sees them change.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx
import numpy as np

from .execution import execution
from .recording import Arena, Buffer, Launch, Recording, Spot, recorded
from .segments import LayerKV

if TYPE_CHECKING:
    from .state import KVState

log = logging.getLogger("mlx_gemma4")


class Player(Protocol):
    """What makes recorded launches; `cuda_graph.Player` says what its methods do."""

    def load(self, launches: Sequence[Launch], nbytes: int, numbers: int, moving: Sequence[mx.array]) -> None: ...
    def write(self, spots: Sequence[Spot], arrays: Sequence[mx.array]) -> None: ...
    def start(self, numbers: np.ndarray) -> None: ...
    def wait(self) -> None: ...
    def read(self, spot: Spot) -> mx.array: ...
    def forget(self) -> None: ...


@dataclass(frozen=True)
class Step:
    """A step over one arrangement of a state's segments, as `decode` tells of it.

    Each row of places is max(position + slope, least), a pair of numbers; all but the first are spans: first and one
    past the last.
    """

    opened: dict[int, LayerKV]  # the state's layers, with room in their tails
    slopes: np.ndarray  # int [rows, 2]
    least: np.ndarray
    record: Callable[[Buffer, Buffer, dict[int, tuple[Buffer, Buffer]]], Buffer]  # (ids, rows, tails) -> logits
    reads: list[mx.array]  # the state's arrays


@dataclass(eq=False)
class Pending:
    """A step that is on its way."""

    replay: Replay
    array: mx.array | None = None

    def logits(self) -> mx.array:
        """fp32 [1, vocab], once the step is through. Under the execution lock."""
        if self.array is None:
            self.replay.finish()
        assert self.array is not None
        return self.array


class Replay:
    """A model's recorded step, and whose tails it holds. Under the execution lock."""

    def __init__(self, make_player: Callable[[], Player], arrange: Callable[[KVState], Step]) -> None:
        """`arrange` seals a full tail and describes the next steps of a state, for one token each."""
        self._make_player, self._arrange = make_player, arrange
        self._player: Player | None = None
        self._arena = Arena()
        self._last: weakref.ref[KVState] | None = None  # the state that stepped last, by whatever way
        self._owner: weakref.ref[KVState] | None = None  # whose tails it holds
        self._step: Step | None = None
        self._tails: dict[int, tuple[Spot, Spot]] = {}
        self._logits: Spot | None = None
        self._room = 0  # tokens that the lent tails have room for
        self._taken = 0  # of which steps have taken so many
        self._pending: Pending | None = None  # the latest step
        self._broken = False

    def begin(self, ids: mx.array, state: KVState) -> Pending | None:
        """Start a step that reads one token, int [1]; None: it is to be done some other way.

        A state that takes turns with others is not worth the change: only the one that stepped last is taken on.
        """
        last, self._last = None if self._last is None else self._last(), weakref.ref(state)
        if self._broken or (last is not None and last is not state):
            return None
        self.finish()
        if self._pending is not None:
            mx.eval(self._pending.array)  # before its memory is written again
        if state.lender is not self or self._taken == self._room:
            try:
                self._take_on(state)
            except Exception as error:  # an operation that runs as its twin, a driver too old ..
                self._broken = True
                log.debug("Decode steps are not replayed: %s: %s", type(error).__name__, error)
                return None
        assert self._step is not None and self._player is not None
        rows = np.maximum(state.length + self._step.slopes, self._step.least)
        rows[1:, 0] = np.minimum(rows[1:, 0], rows[1:, 1])  # a segment may have gone out of sight
        self._player.start(np.concatenate([np.array(ids).astype(np.int32), rows.reshape(-1).astype(np.int32)]))
        self._pending = Pending(self)
        self._taken += 1
        state.advance(ids)
        return self._pending

    def finish(self) -> None:
        """Wait for the latest step."""
        if self._pending is not None and self._pending.array is None:
            assert self._player is not None and self._logits is not None
            self._player.wait()
            self._pending.array = self._player.read(self._logits)

    def settle(self) -> None:
        """Give the state that was lent the tails its own."""
        with execution():
            self.finish()
            state = None if self._owner is None else self._owner()
            step, player = self._step, self._player
            if state is None or step is None or player is None or state.lender is not self:
                return
            layers = {}
            for i, kv in step.opened.items():
                keys, values = (player.read(spot) for spot in self._tails[i])
                count, stop = kv.count + self._taken, kv.stop + self._taken
                layers[i] = replace(kv, tail_keys=keys, tail_values=values, count=count, stop=stop)
            mx.eval([a for kv in layers.values() for a in (kv.tail_keys, kv.tail_values)])
            state.take_back(layers)

    def forget(self, _: object = None) -> None:
        """Let go of the state that was lent the tails, and of what it may have shared with others."""
        self._owner = self._step = None
        if self._player is not None:
            self._player.forget()

    def _take_on(self, state: KVState) -> None:
        """Record the steps of a state, until its tail is full, and copy its tails."""
        self.settle()
        player = self._player = self._player or self._make_player()
        step = self._arrange(state)
        self._arena.reset()
        recording = Recording(self._arena)
        numbers = recording.buffer((1 + step.slopes.size,), mx.int32)  # the first: at the arena's beginning
        tails = {}
        for i, kv in step.opened.items():
            shape, dtype = kv.tail_keys.shape, kv.tail_keys.dtype
            tails[i] = recording.buffer(shape, dtype), recording.buffer(shape, dtype)
        with recorded(recording):
            logits = step.record(numbers[:1], numbers[1:], tails)
        self._logits, self._tails = logits.spot, {i: (k.spot, v.spot) for i, (k, v) in tails.items()}
        player.load(recording.launches, self._arena.nbytes, numbers.size, step.reads)
        counts = {kv.count for kv in step.opened.values()}
        if counts != {0}:
            arrays = [a for kv in step.opened.values() for a in (kv.tail_keys, kv.tail_values)]
            player.write([spot for pair in self._tails.values() for spot in pair], arrays)
        self._room, self._taken = state.layout.tail - max(counts), 0
        self._owner, self._step = weakref.ref(state, self.forget), step
        state.lend(step.opened, self)
