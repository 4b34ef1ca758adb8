"""Steps for several states on an NVIDIA GPU, recorded once for a number of rows and replayed: one launch for the host.

In: the pass of decode.py over a pool of pages (batch.py), and a `Player` for each number of rows. Out: `BatchStep`s.
Who is in the batch and where its pages are is told by numbers that each start uploads, so states join and leave without
a new recording: one is made where the pool's arrays have moved, or a row needs more places for its pages.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..execution import execution
from ..gpu.recording import STARTS, Arena, Player, Recording, Region, recorded, recorder
from ..kv.state import KVState
from ..ops import stock
from ..ops.dispatch import REPLAY, Kernels
from ..ops.sample import LIKELIEST, SAMPLE, WORDS, Draw
from .decode import Attend, Constants, forward
from .exchange import Exchange, exchange_for
from .step import RowStep, Tokens, known_tokens
from .weights import Loaded

log = logging.getLogger("mlx_gemma4")

OverPages = Callable[[Kernels, dict[bool, Any]], Attend]  # (run, places by kind of layer) -> attention over pages
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Recorded:
    """A player that has been loaded with a step, and where that leaves logits."""

    player: Player
    logits: Region  # fp32 [rows, vocab], before any softcap


class ReplayedBatch:
    """A replayed step that is under way, or done. All but `tokens` under the execution lock."""

    def __init__(self, replayer: BatchReplayer, of: Recorded, start: int, states: Sequence[KVState]) -> None:
        self._replayer, self.of, self._start = replayer, of, start
        self.states = list(states)
        self._tokens: list[int] | None = None
        self.array: mx.array | None = None  # a copy of the logits, once somebody has asked for them

    @property
    def rows(self) -> int:
        return len(self.states)

    def tokens(self) -> list[int]:
        if self._tokens is None:
            self._tokens = self.of.player.best(self._start)[: self.rows]
        return self._tokens

    def logits(self) -> mx.array:
        if self.array is None:
            self._replayer.finish(self)
        assert self.array is not None, "the logits are gone"
        return self.array


class BatchReplayer:
    """A model's recorded steps for several states. To be called under the execution lock."""

    def __init__(self, model: Loaded, run: Kernels, constants: Constants) -> None:
        self._model, self._run, self._constants = model, run, constants
        self._finished = mx.compile(lambda logits: stock.softcap(logits, model.config.softcap))
        self._kept: dict[Key, Recorded] = {}
        self._players: dict[int, Player] = {}  # by rows
        self._exchanges: dict[int, Exchange | None] = {}  # by rows, with other ranks, of a part
        self._started: deque[ReplayedBatch] = deque()  # the latest steps, those whose tokens their player still keeps
        self._broken: set[int] = set()  # rows of steps that can't be replayed here

    def replays(self, rows: int) -> bool:
        """Return True if steps of so many rows are replayed."""
        run, part = self._run, self._model.part
        known = rows not in self._broken and (part is None or part.records)
        return known and run.player is not None and REPLAY not in run.off and not run.eager

    def start(
        self,
        tokens: Tokens,
        states: Sequence[KVState],
        draws: Sequence[Draw],
        tables: dict[bool, np.ndarray],
        key: Key,
        attend: OverPages,
    ) -> ReplayedBatch | None:
        """Start a replayed step over these places; None: it is to be done the other way.

        Args:
            draws: of the next tokens, each `in_kernel`.
            tables: places by kind of layer, int32 [rows, ..].
            key: what a recording depends on beside the pool's arrays (`forget`).
            attend: what is recorded of attention.
        """
        rows = len(next(iter(tables.values())))
        last = self._started[-1] if self._started else None
        chained = last is not None and tokens is last and last.of is self._kept.get(key) and last.states == [*states]
        if not chained:
            numbers = known_tokens(tokens)
            self._keep_logits()
            if last is not None and last.of is not self._kept.get(key):  # another stream
                self.wait()
        made = self._kept.get(key) or self._try_to_record(rows, tables, key, attend)
        if made is None:
            return None
        if len(self._started) == STARTS - 1:
            self._started.popleft().tokens()
        ids = np.zeros(rows, np.int32)
        if not chained:
            ids[: len(states)] = numbers
        drawing = [draw._replace(softcap=self._model.config.softcap).numbers for draw in draws]
        drawing += [LIKELIEST.numbers] * (rows - len(states))
        if exchange := self._exchanges.get(rows):
            drawing.append(exchange.next_flags())
        uploaded = np.concatenate([ids, *(table.reshape(-1) for table in tables.values()), *drawing]).astype(np.int32)
        step = ReplayedBatch(self, made, made.player.start(uploaded, chained), states)
        self._started.append(step)
        for n, state in enumerate(states):
            state.advance(RowStep(last, n) if chained and last is not None else int(ids[n]))
        return step

    def finish(self, step: ReplayedBatch) -> None:
        """Wait for the latest step, and give it its logits."""
        if self._started and self._started[-1] is step and step.array is None:
            step.of.player.wait()
            step.array = self._finished(step.of.player.read(step.of.logits))[: step.rows]

    def wait(self) -> None:
        """Wait until no step is under way. Their tokens and logits stay."""
        with execution():
            self._keep_logits()
            for step in self._started:
                step.tokens()
            if self._started:
                self._started[-1].of.player.wait()
            self._started.clear()

    def forget(self) -> None:
        """Let go of the pool's arrays, which are about to move: what was recorded is not to start any more."""
        self.wait()
        for player in self._players.values():
            player.forget()
        self._kept.clear()

    def _keep_logits(self) -> None:
        """Copy the latest step's logits, which somebody may still ask for, before their memory is written again."""
        if self._started:
            self.finish(self._started[-1])
            mx.eval(self._started[-1].array)

    def _try_to_record(self, rows: int, tables: dict[bool, np.ndarray], key: Key, attend: OverPages) -> Recorded | None:
        wrong: Exception | None = None
        try:
            self._kept = {k: kept for k, kept in self._kept.items() if kept.player is not self._players.get(rows)}
            self._kept[key] = self._record(rows, tables, attend)
        except Exception as error:  # an operation that runs as its reference, a driver too old ..
            wrong = error
        if exchange := self._exchanges.get(rows):
            wrong = exchange.agreed(wrong)
        if wrong is not None:
            self._kept.pop(key, None)
            self._broken.add(rows)
            log.debug("Batches of %d are not replayed: %s: %s", rows, type(wrong).__name__, wrong)
            return None
        return self._kept[key]

    def _record(self, rows: int, tables: dict[bool, np.ndarray], attend: OverPages) -> Recorded:
        """Record a step of so many rows. Raises whatever prevents that."""
        assert self._run.player is not None
        player = self._players[rows] = self._players.get(rows) or self._run.player()
        if rows not in self._exchanges:
            self._exchanges[rows] = exchange_for(self._model, player, rows)
        exchange = self._exchanges[rows]
        arena = Arena()
        recording = Recording(arena)
        # The first buffer, at the arena's beginning: tokens, places, how the next ones are drawn; exchanges' flags.
        stop = rows * (1 + WORDS) + sum(table.size for table in tables.values())
        numbers: Any = recording.buffer((stop + (exchange.flags if exchange else 0),), mx.int32)
        places, at = {}, rows
        for kind, table in tables.items():
            places[kind] = numbers[at : at + table.size].reshape(*table.shape)
            at += table.size
        run: Any = Kernels(recorder, self._run.off, strict=True)
        with recorded(recording):
            model = exchange.recorded(self._model, numbers[stop:]) if exchange else self._model
            logits: Any = forward(model, run, self._constants, numbers[:rows], attend(run, places))[0]
            logits = model.part.gathered(logits) if model.part else logits
            best = run(SAMPLE, logits, numbers[at:stop].reshape(rows, WORDS))
        player.load(recording.launches, arena.nbytes, numbers.size, best.region)
        return Recorded(player, logits.region)
