"""Steps over a pool's pages on an NVIDIA GPU, recorded once for a number of rows and replayed: one launch for the host.

In: the pass of decode.py over a pool of pages (batch.py), and a `Player` for each number of rows. Out: `BatchStep`s.
Rows are different states' tokens, or several of a state's, one behind the other: drafts that are checked.
Who is in the batch and where its pages are is told by numbers that each start uploads, so states join and leave without
a new recording: one is made where the pool's arrays have moved, or a row needs more places for its pages.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

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


def numbers_of(ids: Sequence[int], tables: dict[bool, np.ndarray], draws: Sequence[Draw]) -> np.ndarray:
    """Return what a start uploads, int32: tokens, their places, how the next ones are drawn."""
    numbers = [np.array(ids, np.int32), *tables.values(), *(draw.numbers for draw in draws)]
    return np.frombuffer(b"".join(a.tobytes() for a in numbers), np.int32)


def upload_room(
    recording: Recording, tokens: int, tables: dict[bool, np.ndarray], draws: int, flags: int = 0
) -> tuple[Any, Any, dict[bool, Any], Any, Any]:
    """Return a recording's first buffer, at the arena's beginning, and its parts as `numbers_of` has them.

    Behind these are so many `flags` of exchanges with other ranks.
    """
    size = tokens + draws * WORDS + sum(table.size for table in tables.values()) + flags
    numbers: Any = recording.buffer((size,), mx.int32)
    places, at = {}, tokens
    for kind, table in tables.items():
        places[kind] = numbers[at : at + table.size].reshape(*table.shape)
        at += table.size
    stop = at + draws * WORDS
    return numbers, numbers[:tokens], places, numbers[at:stop].reshape(draws, WORDS), numbers[stop:]


@dataclass(eq=False)
class Recorded:
    """A player that has been loaded with a step, and where that leaves what it makes."""

    player: Player
    rows: int
    logits: Region  # fp32 [rows, vocab], before any softcap
    hidden: Region  # [rows, hidden], what the head reads, in the KV's dtype
    starts: int = 0  # so far; what a start has left is there until the next


class HiddenRow(NamedTuple):
    """A row that a replayed step's head has read, where the step left it."""

    of: Recorded
    row: int
    start: int

    @property
    def there(self) -> bool:
        """False once another step has gone over it."""
        return self.of.starts == self.start

    @property
    def region(self) -> Region:
        """Its place, [1, hidden]."""
        start, allocation, (_, width), dtype = self.of.hidden
        return Region(start + self.row * width * dtype.size, allocation, (1, width), dtype)


class QueuedTokens:
    """Tokens that a player's latest start leaves: a step may be queued that reads them before the host knows them."""

    def __init__(self, player: Player, start: int, count: int) -> None:
        self.player, self._start, self.count = player, start, count
        self.left: list[int] | None = None  # once the host knows them

    def tokens(self) -> list[int]:
        """Return them. Waits for the device."""
        if self.left is None:
            self.left = self.player.best(self._start)
        return self.left


class _Queued(NamedTuple):
    """One of them, as a state takes note of it."""

    of: QueuedTokens
    n: int

    def token(self) -> int:
        return self.of.tokens()[self.n]


class ReplayedBatch:
    """A replayed step that is under way, or done. All but `tokens`, `leads` and `end` under the execution lock."""

    def __init__(self, replayer: BatchReplayer, of: Recorded, start: int, states: Sequence[KVState]) -> None:
        self._replayer, self.of, self._start, self._number = replayer, of, start, of.starts
        self.states = list(states)  # of rows
        self._left: list[int] | None = None
        self.array: mx.array | None = None  # a copy of the logits, once somebody has asked for them

    @property
    def rows(self) -> int:
        return len(self.states)

    def tokens(self) -> list[int]:
        return self._words()[: self.rows]

    def leads(self) -> list[float]:
        """Return by how much each row's likeliest token is above the next; of a step of one row []: it is plain."""
        words = self._words()[self.of.rows :][: self.rows]
        return cast("list[float]", np.array(words, np.int32).view(np.float32).tolist())

    @property
    def end(self) -> Callable[[], object]:
        """What waits for its end, in any thread, and doesn't keep the step."""
        return partial(self.of.player.best, self._start)

    def _words(self) -> list[int]:
        if self._left is None:
            self._left = self.of.player.best(self._start)
        return self._left

    def hidden(self, row: int) -> HiddenRow:
        """Return the row that the head has read there."""
        return HiddenRow(self.of, row, self._number)

    def logits(self) -> mx.array:
        if self.array is None:
            self._replayer.finish(self)
        assert self.array is not None, "the logits are gone"
        return self.array


class BatchReplayer:
    """A model's recorded steps for several states. To be called under the execution lock."""

    def __init__(self, model: Loaded, run: Kernels, constants: Constants) -> None:
        self._model, self._run, self._constants = model, run, constants
        self.recordings = 0  # over the pool's arrays, drafts' included
        self._kept: dict[Key, Recorded] = {}
        self._players: dict[int, Player] = {}  # by rows
        self._exchanges: dict[int, Exchange | None] = {}  # by rows, with other ranks, of a part
        # The latest steps, those whose tokens their player still keeps. One that nobody has any more is asked nothing.
        self._started: deque[weakref.ref[ReplayedBatch]] = deque()
        self._latest: Recorded | None = None  # what they are starts of
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
        queued: QueuedTokens | None = None,
    ) -> ReplayedBatch | None:
        """Start a replayed step over these places; None: it is to be done the other way.

        Args:
            states: of rows, in order; one that has several of them stands there as often, and `tokens` are known.
            draws: of the next tokens, each `in_kernel`.
            tables: places by kind of layer, int32 [rows, ..].
            key: what a recording depends on beside the pool's arrays (`forget`).
            attend: what is recorded of attention.
            queued: the tokens behind the first, which the device takes unless the host knows them by now.
        """
        rows = len(next(iter(tables.values())))
        last = self._started[-1]() if self._started else None
        chained = last is not None and tokens is last and last.of is self._kept.get(key) and last.states == [*states]
        if not chained:
            numbers = known_tokens(tokens)
            self._keep_logits()
            if self._latest is not None and self._latest is not self._kept.get(key):  # another stream
                self.wait()
        made = self._kept.get(key) or self._try_to_record(rows, tables, key, attend)
        if made is None:
            return None
        if len(self._started) == STARTS - 1 and (oldest := self._started.popleft()()) is not None:
            oldest.tokens()
        ids = [0] * rows if chained else [*numbers, *[0] * (rows - len(states))]
        if queued is not None and queued.left is not None:
            ids[1 : 1 + queued.count], queued = queued.left, None
        drawing = [draw._replace(softcap=self._model.config.softcap) for draw in draws]
        uploaded = numbers_of(ids, tables, [*drawing, *[LIKELIEST] * (rows - len(states))])
        if exchange := self._exchanges.get(rows):
            uploaded = np.concatenate([uploaded, exchange.next_flags()]).astype(np.int32)
        made.starts += 1
        after = None if queued is None else queued.player
        step = ReplayedBatch(self, made, made.player.start(uploaded, chained, after), states)
        self._started.append(weakref.ref(step))
        self._latest = made
        for n, state in enumerate(states):
            if chained and last is not None:
                state.advance(RowStep(last, n))
            else:
                state.advance(_Queued(queued, n - 1) if n and queued is not None else ids[n])
        return step

    def finish(self, step: ReplayedBatch) -> None:
        """Wait for the latest step, and give it its logits."""
        if self._started and self._started[-1]() is step and step.array is None:
            step.of.player.wait()
            logits = step.of.player.read(step.of.logits)[: step.rows]
            step.array = stock.softcap(logits, self._model.config.softcap)

    def wait(self) -> None:
        """Wait until no step is under way. Their tokens and logits stay."""
        with execution():
            self._keep_logits()
            for ref in self._started:
                if (step := ref()) is not None:
                    step.tokens()
            if self._latest is not None:
                self._latest.player.wait()
            self._latest = None
            self._started.clear()

    def forget(self) -> None:
        """Let go of the pool's arrays, which are about to move: what was recorded is not to start any more."""
        self.wait()
        for player in self._players.values():
            player.forget()
        self._drop([*self._kept])

    def _drop(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self._kept.pop(key).starts += 1  # what it left is gone

    def _keep_logits(self) -> None:
        """Copy the latest step's logits, which somebody may still ask for, before their memory is written again."""
        if self._started and (step := self._started[-1]()) is not None:
            self.finish(step)
            mx.eval(step.array)

    def _try_to_record(self, rows: int, tables: dict[bool, np.ndarray], key: Key, attend: OverPages) -> Recorded | None:
        wrong: Exception | None = None
        try:
            self._drop([k for k, kept in self._kept.items() if kept.rows == rows])
            self._kept[key] = self._record(rows, tables, attend)
            self.recordings += 1
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
        numbers, ids, places, draws, flags = upload_room(
            recording, rows, tables, rows, exchange.flags if exchange else 0
        )
        run: Any = Kernels(recorder, self._run.off, strict=True)
        with recorded(recording):
            model = exchange.recorded(self._model, flags) if exchange else self._model
            made: Any = forward(model, run, self._constants, ids, attend(run, places))
            logits, hidden = made
            if model.part:
                logits = model.part.gathered(logits)
            best: Any = run(SAMPLE, logits, draws, leads=rows > 1)
        player.load(recording.launches, arena.nbytes, numbers.size, best.region, several=rows > 1)
        return Recorded(player, rows, logits.region, hidden.region)
