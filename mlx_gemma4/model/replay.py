"""A decode step on an NVIDIA GPU, recorded once and replayed: one launch for the host, whatever it holds.

In: the step as launches of kernels (decode.py), a `Player` for them. Out: `Step`s. The next step may be started
with the token of the one before while the host does not know it yet. A step writes the newest keys and values in place,
in tails of its own, for one KV state at a time, whose tails it has checked out. Whenever anything else looks at that
state's layers, the state gets its tails back first (`settle`), so that nobody sees them change.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..execution import execution
from ..gpu.recording import STARTS, Arena, Player, Recording, Region, recorded, recorder
from ..kv.segments import LayerKV
from ..kv.state import KVState
from ..ops import stock
from ..ops.dispatch import REPLAY, Kernels
from ..ops.sample import SAMPLE, WORDS, Draw
from .decode import Constants, forward, inputs_of, over_parts, with_room
from .exchange import Exchange, exchange_for
from .spans import Spans, placed
from .step import NextToken, known
from .weights import Loaded

log = logging.getLogger("mlx_gemma4")

# Tokens that a replayed step's own tails hold: more than a state's, for a change of segments costs the host as long as
# some ten steps take. So on NVIDIA a few hundred new tokens may not be quantized yet where others would have them so.
WORKING = 512
WORKING_BYTES = 256 << 20  # of all these tails, at most, where fewer tokens would do


class ReplayedStep:
    """A replayed step that is under way, or done. All but `token` and `end` under the execution lock."""

    def __init__(self, replayer: Replayer, player: Player, start: int) -> None:
        self._replayer, self._player, self._start = replayer, player, start
        self._token: int | None = None
        self.array: mx.array | None = None  # a copy of the logits, once somebody has asked for them

    def token(self) -> int:
        if self._token is None:
            self._token = self._player.best(self._start)[0]
        return self._token

    @property
    def end(self) -> Callable[[], object]:
        """What waits for its end, in any thread, and doesn't keep the step."""
        return partial(self._player.best, self._start)

    def logits(self) -> mx.array:
        if self.array is None:
            self._replayer.finish(self)
        assert self.array is not None, "the logits are gone"
        return self.array


class Replayer:
    """A model's recorded step, and the state whose tails it holds. To be called under the execution lock."""

    def __init__(self, model: Loaded, run: Kernels) -> None:
        self._model, self._run = model, run
        self._constants = Constants.of(model)
        self._player: Player | None = None
        self._exchange: Exchange | None = None  # with other ranks, of a part
        self._arena = Arena()
        self._last: weakref.ref[KVState] | None = None  # the state that stepped last, whichever way
        self._switches = 0  # between states, since one stepped twice in a row
        self._owner: weakref.ref[KVState] | None = None  # whose tails it holds
        self._spans: Spans | None = None
        self._tails: dict[int, tuple[Region, Region]] = {}
        self._logits: Region | None = None
        self._until = 0  # length of the state when these tails will be full
        self._started: deque[ReplayedStep] = deque()  # the latest steps, those whose tokens the player still keeps
        self._broken = False  # steps can't be replayed here

    @property
    def replays(self) -> bool:
        """False once recording has failed, or where `doctor` has switched it off."""
        return not self._broken and REPLAY not in self._run.off

    def takes(self, state: KVState) -> bool:
        """Return True if a step of this state is to be replayed; to be asked before each step.

        Recording costs too much where states take turns: one is taken on when it steps twice in a row.
        """
        last, self._last = None if self._last is None else self._last(), weakref.ref(state)
        self._switches = 0 if last is None or last is state else self._switches + 1
        return self._switches <= 1

    def start(self, token: NextToken, state: KVState, draw: Draw) -> ReplayedStep | None:
        """Start a replayed step; None: it is to be done the other way."""
        ready = state.borrower is self and state.length < self._until
        before = self._started[-1] if ready and self._started and token is self._started[-1] else None
        number = 0
        if before is None:
            number = known(token)
            self._keep_logits()
            if not ready and not self._try_to_take_on(state):
                return None
        assert self._spans is not None and self._player is not None
        if len(self._started) == STARTS - 1:
            self._started.popleft().token()
        drawing = draw._replace(softcap=self._model.config.softcap).numbers
        flags = [self._exchange.next_flags()] if self._exchange else []
        numbers = np.concatenate([[number], self._spans.at(state.length), drawing, *flags]).astype(np.int32)
        started = ReplayedStep(self, self._player, self._player.start(numbers, before is not None))
        self._started.append(started)
        state.advance(before or number)
        return started

    def finish(self, step: ReplayedStep) -> None:
        """Wait for the latest step, and give it its logits."""
        if self._started and self._started[-1] is step and step.array is None:
            assert self._player is not None and self._logits is not None
            self._player.wait()
            logits = self._player.read(self._logits)
            step.array = stock.softcap(logits, self._model.config.softcap).squeeze(0)

    def _keep_logits(self) -> None:
        """Copy the latest step's logits, which somebody may still ask for, before their memory is written again."""
        if self._started:
            self.finish(self._started[-1])
            mx.eval(self._started[-1].array)

    @property
    def nbytes(self) -> int:
        return 0  # the state still holds its tails, as they were

    def settle(self) -> None:
        """Check in the tails of the state that they were checked out of."""
        with execution():
            self._keep_logits()
            state, player = None if self._owner is None else self._owner(), self._player
            if state is None or player is None or state.borrower is not self:
                return
            state.checkin({i: (player.read(k), player.read(v)) for i, (k, v) in self._tails.items()})
            self.forget()
            mx.eval(state.arrays)  # before their memory is written again

    def rewinds(self, position: int) -> bool:
        return False  # whoever rewinds drafts, and is in the pool (batch.py)

    def forget(self, _: object = None) -> None:
        """Let go of the state whose tails were checked out, and of what it may have shared with others."""
        self._owner = self._spans = None
        if self._player is not None:
            self._player.forget()

    def _try_to_take_on(self, state: KVState) -> bool:
        wrong: Exception | None = None
        try:
            self.take_on(state)
        except Exception as error:  # an operation that runs as its reference, a driver too old ..
            wrong = error
        if self._exchange is not None:
            wrong = self._exchange.agreed(wrong)
        if wrong is not None:
            self._broken = True
            self.settle()  # where another rank could not
            log.debug("Decode steps are not replayed: %s: %s", type(wrong).__name__, wrong)
        return wrong is None

    def take_on(self, state: KVState) -> None:
        """Record the steps of a state, until its tail is full, and copy its tails. Raises whatever prevents that."""
        self.settle()
        assert self._run.player is not None
        player = self._player = self._player or self._run.player()
        exchange = self._exchange = self._exchange or exchange_for(self._model, player, 1)
        layers = with_room(self._model, state)
        inputs, spans = inputs_of(self._model, layers, 1)
        self._arena.reset()
        recording = Recording(self._arena)
        # The first buffer, at the arena's beginning: the token, its spans, how the next one is drawn; exchanges' flags.
        stop = 1 + spans.size + WORDS
        numbers: Any = recording.buffer((stop + (exchange.flags if exchange else 0),), mx.int32)
        room, tails = _working(state, layers), {}
        for i, kv in layers.items():
            (_, heads, _, dim), dtype = kv.tail_keys.shape, kv.tail_keys.dtype
            keys, values = (recording.buffer((1, heads, room, dim), dtype) for _ in "kv")
            tails[i] = keys, values
        run: Any = Kernels(recorder, self._run.off, strict=True)
        buffers: Any = {**inputs, "tails": tails}
        with recorded(recording):
            places = placed(numbers[1 : 1 + spans.size], spans.lengths)
            model = exchange.recorded(self._model, numbers[stop:]) if exchange else self._model
            attend, _ = over_parts(model, run, buffers, places, 1)
            logits: Any = forward(model, run, self._constants, numbers[:1], attend)[0]
            logits = model.part.gathered(logits) if model.part else logits
            best = run(SAMPLE, logits, numbers[1 + spans.size : stop].reshape(1, WORDS))
        self._logits, self._tails = logits.region, {i: (k.region, v.region) for i, (k, v) in tails.items()}
        player.load(recording.launches, self._arena.nbytes, numbers.size, best.region)
        count = next(iter(layers.values())).count  # of all
        if count:
            pad = [(0, 0), (0, 0), (0, room - state.layout.tail), (0, 0)]
            arrays = [mx.pad(a, pad) for kv in layers.values() for a in (kv.tail_keys, kv.tail_values)]
            player.write([region for pair in self._tails.values() for region in pair], arrays)
        self._until = state.length + room - count
        self._owner, self._spans = weakref.ref(state, self.forget), spans
        state.checkout(layers, self)


def _working(state: KVState, layers: dict[int, LayerKV]) -> int:
    """Return how many tokens the tails of a state's layers are to hold."""
    room, nbytes = WORKING, sum(2 * kv.tail_keys.nbytes for kv in layers.values()) / state.layout.tail
    while room > state.layout.tail and room * nbytes > WORKING_BYTES:
        room //= 2
    return max(room, state.layout.tail)
