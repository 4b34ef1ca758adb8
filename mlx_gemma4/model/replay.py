"""A decode step recorded once and replayed: one launch for the host, whatever it holds.

In: the step as launches of kernels (`decode`), a `Player` for them. Out: logits and the likeliest token, step after
step; the next step may be started with that token before the host knows it. A step writes the newest keys and values in
place, in tails of its own, for one KV state at a time, which lends it its own. Whenever anything else looks at that
state's layers, it gets its tails back first (`settle`), so that nobody sees them change.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..execution import execution
from ..gpu.recording import STARTS, Arena, Buffer, Player, Recording, Region, recorded
from ..kv.segments import LayerKV
from ..kv.state import KVState

log = logging.getLogger("mlx_gemma4")


@dataclass(frozen=True)
class Step:
    """A step over one arrangement of a state's segments, as `decode` tells of it.

    Each row of places is max(position + slope, least), a pair of numbers; all but the first are spans: first and one
    past the last.
    """

    opened: dict[int, LayerKV]  # the state's layers, with room in their tails
    slopes: np.ndarray  # int [rows, 2]
    least: np.ndarray
    record: Callable[[Buffer, Buffer, dict[int, tuple[Buffer, Buffer]]], tuple[Buffer, Buffer]]
    # (ids, rows, tails) -> logits [1, vocab], the likeliest token int32 [1]


class Pending:
    """A replayed step that is on its way, or through. Under the execution lock, but for `best`."""

    size = 1  # its token's, and `tolist`, as of an array of ids

    def __init__(self, replay: Replay, player: Player, start: int) -> None:
        self._replay, self._player, self._start = replay, player, start
        self._token: int | None = None
        self.array: mx.array | None = None  # a copy of the logits, once somebody has asked for them

    def best(self) -> int:
        """The likeliest token, once the step is through: the lowest of equals."""
        if self._token is None:
            self._token = self._player.best(self._start)
        return self._token

    def logits(self) -> mx.array:
        """fp32 [vocab], once the step is through. Gone where another step was started with its token unseen."""
        if self.array is None:
            self._replay.finish(self)
        assert self.array is not None, "the logits are gone"
        return self.array

    def tolist(self) -> list[int]:
        return [self.best()]


class Done:
    """A step that was made some other way, to whoever waits for a `Pending`."""

    def __init__(self, logits: mx.array) -> None:
        self._logits = logits

    def best(self) -> int:
        with execution():
            token = mx.argmax(self._logits)
            mx.async_eval(token)
        return int(token)

    def logits(self) -> mx.array:
        return self._logits


# Tokens that a replayed step's own tails hold: more than a state's, for a change of segments costs the host as long as
# some ten steps take. So on NVIDIA a few hundred new tokens may not be in codes yet where others would have them there.
WORKING = 512
WORKING_BYTES = 256 << 20  # of all these tails, at most, where fewer tokens would do


class Replay:
    """A model's recorded step, and whose tails it holds. Under the execution lock."""

    def __init__(
        self,
        make_player: Callable[[], Player],
        arrange: Callable[[KVState], Step],
        finished: Callable[[mx.array], mx.array],
    ) -> None:
        """
        Args:
            arrange: seals a full tail and describes the next steps of a state, for one token each.
            finished: what makes logits fp32 [vocab] of a step's, fp32 [1, vocab].
        """
        self._make_player, self._arrange, self._finished = make_player, arrange, finished
        self._player: Player | None = None
        self._arena = Arena()
        self._last: weakref.ref[KVState] | None = None  # the state that stepped last, by whatever way
        self._switches = 0  # between states, since one stepped twice in a row
        self._owner: weakref.ref[KVState] | None = None  # whose tails it holds
        self._step: Step | None = None
        self._tails: dict[int, tuple[Region, Region]] = {}
        self._logits: Region | None = None
        self._until = 0  # length of the state when the lent tails will be full
        self._started: deque[Pending] = deque()  # the latest steps, those whose tokens the player still keeps
        self.broken = False  # steps can't be replayed here

    def begin(self, token: int | Pending | Done, state: KVState) -> Pending | None:
        """Start a step that reads a token, perhaps that of the step before; None: it is to be done some other way.

        States that take turns are not worth the changes: then one is taken on when it steps twice in a row.
        """
        last, self._last = None if self._last is None else self._last(), weakref.ref(state)
        self._switches = 0 if last is None or last is state else self._switches + 1
        if self.broken or self._switches > 1:
            return None
        ready = state.borrower is self and state.length < self._until
        chained = ready and len(self._started) > 0 and token is self._started[-1]
        if not chained:
            token = token if isinstance(token, int) else token.best()
            self._keep_logits()
            if not ready and not self._try_to_take_on(state):
                return None
        assert self._step is not None and self._player is not None
        rows = np.maximum(state.length + self._step.slopes, self._step.least)
        rows[1:, 0] = np.minimum(rows[1:, 0], rows[1:, 1])  # a segment may have gone out of sight
        if len(self._started) == STARTS - 1:
            self._started.popleft().best()
        numbers = np.concatenate([[0 if chained else token], rows.reshape(-1)]).astype(np.int32)
        started = Pending(self, self._player, self._player.start(numbers, chained))
        self._started.append(started)
        state.advance(token if isinstance(token, Pending) else mx.array([token]))
        return started

    def finish(self, pending: Pending) -> None:
        """Wait for the latest step, and give it its logits."""
        if self._started and self._started[-1] is pending and pending.array is None:
            assert self._player is not None and self._logits is not None
            self._player.wait()
            pending.array = self._finished(self._player.read(self._logits))

    def _keep_logits(self) -> None:
        """Copy the latest step's, which somebody may still ask for, before their memory is written again."""
        if self._started:
            self.finish(self._started[-1])
            mx.eval(self._started[-1].array)

    def settle(self) -> None:
        """Give the state that lent the tails its own."""
        with execution():
            self._keep_logits()
            state = None if self._owner is None else self._owner()
            player = self._player
            if state is None or player is None or state.borrower is not self:
                return
            state.checkin({i: (player.read(k), player.read(v)) for i, (k, v) in self._tails.items()})
            mx.eval(state.arrays)  # before their memory is written again

    def forget(self, _: object = None) -> None:
        """Let go of the state that was lent the tails, and of what it may have shared with others."""
        self._owner = self._step = None
        if self._player is not None:
            self._player.forget()

    def _try_to_take_on(self, state: KVState) -> bool:
        try:
            self.take_on(state)
        except Exception as error:  # an operation that runs as its reference, a driver too old ..
            self.broken = True
            log.debug("Decode steps are not replayed: %s: %s", type(error).__name__, error)
        return not self.broken

    def take_on(self, state: KVState) -> None:
        """Record the steps of a state, until its tail is full, and copy its tails. Raises whatever prevents that."""
        self.settle()
        player = self._player = self._player or self._make_player()
        step = self._arrange(state)
        self._arena.reset()
        recording = Recording(self._arena)
        numbers = recording.buffer((1 + step.slopes.size,), mx.int32)  # the first: at the arena's beginning
        room, tails = _working(state, step), {}
        for i, kv in step.opened.items():
            (_, heads, _, dim), dtype = kv.tail_keys.shape, kv.tail_keys.dtype
            keys, values = (recording.buffer((1, heads, room, dim), dtype) for _ in "kv")
            tails[i] = keys, values
        with recorded(recording):
            logits, best = step.record(numbers[:1], numbers[1:], tails)
        self._logits, self._tails = logits.spot, {i: (k.spot, v.spot) for i, (k, v) in tails.items()}
        player.load(recording.launches, self._arena.nbytes, numbers.size, best.spot)
        count = next(iter(step.opened.values())).count  # of all
        if count:
            pad = [(0, 0), (0, 0), (0, room - state.layout.tail), (0, 0)]
            arrays = [mx.pad(a, pad) for kv in step.opened.values() for a in (kv.tail_keys, kv.tail_values)]
            player.write([spot for pair in self._tails.values() for spot in pair], arrays)
        self._until = state.length + room - count
        self._owner, self._step = weakref.ref(state, self.forget), step
        state.checkout(step.opened, self)


def _working(state: KVState, step: Step) -> int:
    """Tokens that the tails of a state's layers are to hold."""
    room, nbytes = WORKING, sum(2 * kv.tail_keys.nbytes for kv in step.opened.values()) / state.layout.tail
    while room > state.layout.tail and room * nbytes > WORKING_BYTES:
        room //= 2
    return max(room, state.layout.tail)
