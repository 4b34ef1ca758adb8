"""A step for several states at once: each reads one token of its own, or several that are checked.

In: a token and a `KVState` for each reply. Out: logits of all, row by row. Who is in a batch may change from step to
step. On a CPU stock operations take all rows at once, RoPE and attention state by state (forward.py). On a GPU it is
the pass of decode.py with a row for each state, whose keys and values lie in pages of one pool (kv/pool.py) that
kernels write in place: as many launches as for one state. States that the pool does not take step alone. Where it is
replayed, a state may have several rows: all are written before any attends, and each sees up to itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, TypedDict, cast

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..kv.pool import Pair, Pool, Seat
from ..kv.state import KVState
from ..memory import memory_size
from ..ops import paged, stock
from ..ops.dispatch import Kernels
from ..ops.paged import FILL_PAGES, PAGED_ATTENTION
from ..ops.qkv import QKV_POST, ROTATIONS, QKVArrays, QKVOptions
from ..ops.sample import LIKELIEST, Draw
from .batch_replay import BatchReplayer, Key, QueuedTokens, ReplayedBatch
from .decode import TRACES, Attend, Constants, forward
from .forward import head, run_layers
from .step import BatchStep, LazyBatchStep, NextToken, RowStep, Tokens, count_of, known, tokens_as_array
from .weights import Loaded

MAX_BATCH = 32  # states of a step
KEPT = 32  # of the GPU's memory: how small a pool is that stays when the last state leaves
Alone = Callable[[mx.array, KVState], mx.array]  # (ids int [1], state) -> logits [1, vocab], the whole


def check_batch(tokens: Tokens, states: Sequence[KVState]) -> None:
    """Refuse what no step can take. Raises InputError."""
    given = count_of(tokens)
    different = len({id(s) for s in states})
    if not 1 <= len(states) <= MAX_BATCH or given != len(states) or different != len(states):
        raise InputError(
            f"a batch step takes one token for each of 1 to {MAX_BATCH} different states; these are {given} tokens "
            f"for {len(states)} states, {different} of them different"
        )
    for state in states:
        state.check_room(1)


def stock_step(model: Loaded, ids: mx.array, states: Sequence[KVState]) -> mx.array:
    """Read a token, ids int [B], into each of B states, in stock operations: fp32 logits [B, vocab]."""
    return head(model, run_layers(model, ids, states, ids.size))


class Inputs(TypedDict):
    """What a step of several rows reads and writes. A dict, which `mx.compile` takes."""

    places: dict[bool, mx.array]  # by kind of layer, int32 [rows, 4 + pages]: `ops.paged`
    pool: dict[int, Pair]  # by layer with keys and values of its own, [pages, G, page, D]


def rows_for(states: int) -> int:
    """Return the rows of a step for so many states: a power of two, so that few traces and recordings serve all."""
    return 1 << (states - 1).bit_length()


def over_pages(model: Loaded, run: Kernels, inputs: Inputs, pieces: dict[bool, int]) -> tuple[Attend, dict[int, Pair]]:
    """Return attention of rows over their pages, and where those of the pool's arrays will be that are not in place."""
    c, places, pool = model.config, inputs["places"], dict(inputs["pool"])
    moved: dict[int, Pair] = {}
    rope = {
        kind: run(ROTATIONS, places[kind], lengths, tokens=places[kind].shape[0], by_row=True)
        for kind, lengths in model.wavelengths.items()
    }

    def attend(i: int, q: mx.array, k: mx.array | None, v: mx.array | None, options: QKVOptions) -> mx.array:
        shape, layer = c.layers[i], model.weights.layers[i]
        given = QKVArrays(q, k, v, layer.attn_q_norm, layer.attn_k_norm, rope[shape.sliding])
        if shape.kv_layer == i:
            given = given._replace(pool=pool[i], places=places[shape.sliding])
        q, keys, values = run(QKV_POST, given, options)
        if keys is not None and values is not None and keys is not pool[i][0]:
            pool[i] = moved[i] = keys, values
        kind, scale = shape.sliding, c.attention_scale
        return run(PAGED_ATTENTION, q, pool[shape.kv_layer], places[kind], scale=scale, pieces=pieces[kind])

    return attend, moved


class Batcher:
    """Steps of a model for several states on a GPU, and the pool of those states. Under the execution lock."""

    def __init__(self, model: Loaded, run: Kernels, alone: Alone) -> None:
        self._model, self._run, self._alone = model, run, alone
        self._constants = Constants.of(model)
        self._last: mx.array | None = None  # logits of the latest step that was not replayed
        self.replayer = BatchReplayer(model, run, self._constants)
        kept = memory_size() // KEPT if run.player else 0
        self.pool = Pool(model.config, model.kv_dtype, self._fill, paged.PAGE, self._wait, kept)
        self._shapes = {kind: next(s for s in model.config.layers if s.sliding == kind) for kind in self.pool.kinds}
        self.on_moving: list[Callable[[], None]] = []  # called before the pool's arrays go, beside the replayer

        def traceable(pieces: dict[bool, int], ids: mx.array, inputs: Inputs) -> tuple[mx.array, dict[int, Pair]]:
            attend, moved = over_pages(model, run, inputs, pieces)
            logits, _ = forward(model, run, self._constants, ids, attend)
            return stock.softcap(logits, model.config.softcap), moved

        @lru_cache(TRACES)
        def traced(_: Any, *pieces: tuple[bool, int]) -> Callable[..., Any]:
            return mx.compile(partial(traceable, dict(pieces)))

        self._traceable, self._traced = traceable, traced

    def start(self, tokens: Tokens, states: Sequence[KVState], draws: Sequence[Draw], replay: bool = True) -> BatchStep:
        """Start a step that reads a token into each of B states, and draws the next of each. `replay`: if it may be."""
        together = [n for n, state in enumerate(states) if self.pool.takes(state)]
        if len(together) == len(states):
            return self._together(tokens, states, draws, replay)
        ids = tokens_as_array(tokens)
        rows = {n: self._alone(ids[n : n + 1], s) for n, s in enumerate(states) if n not in together}
        if together:
            some = [states[n] for n in together], [draws[n] for n in together]
            logits = self._together(ids[mx.array(together)], *some, replay).logits()
            rows |= {n: logits[i : i + 1] for i, n in enumerate(together)}
        return LazyBatchStep(mx.concatenate([rows[n] for n in range(len(states))]), draws, self._run)

    def start_one(self, token: NextToken, state: KVState, draw: Draw) -> RowStep:
        """Start a step of one state that is in the pool."""
        chains = isinstance(token, RowStep) and token.of.rows == 1
        tokens: Tokens = token.of if isinstance(token, RowStep) and chains else [known(token)]
        return RowStep(self.start(tokens, [state], [draw]), 0)

    def replays(self, rows: int, state: KVState) -> bool:
        """Return True if steps of so many rows, some of them this state's, are replayed."""
        return self._model.part is None and self.pool.takes(state) and self.replayer.replays(rows_for(rows))

    def holds(self, state: KVState) -> bool:
        """Return True if a state is in the pool."""
        return isinstance(state.borrower, Seat) and state.borrower.pool is self.pool

    def check(
        self,
        ids: Sequence[Sequence[int]],
        states: Sequence[KVState],
        draws: Sequence[Draw] = (),
        queued: QueuedTokens | None = None,
    ) -> ReplayedBatch | None:
        """`Model.replayed_check`."""
        tokens = [token for some in ids for token in some]
        of_rows = [state for state, some in zip(states, ids, strict=True) for _ in some]
        if queued is not None:
            tokens, of_rows = tokens + [0] * queued.count, of_rows + of_rows * queued.count
        if not all(self.replays(len(tokens), state) for state in states):
            return None
        return self._replayed(tokens, of_rows, draws or [LIKELIEST] * len(tokens), *self._keyed(of_rows), queued)

    def _keyed(self, states: Sequence[KVState]) -> tuple[Key, dict[bool, np.ndarray], dict[bool, int]]:
        """Return the places of rows, their pieces, and what a step of them depends on beside the pool's arrays."""
        rows = rows_for(len(states))
        tables, pieces = self.places(states, rows)
        return (self._run.off, rows, *(t.shape[1] for t in tables.values()), *pieces.items()), tables, pieces

    def _replayed(
        self,
        tokens: Tokens,
        states: Sequence[KVState],
        draws: Sequence[Draw],
        key: Key,
        tables: dict[bool, np.ndarray],
        pieces: dict[bool, int],
        queued: QueuedTokens | None = None,
    ) -> ReplayedBatch | None:
        if self._last is not None:
            self._wait(False)

        def attend(recording: Kernels, places: dict[bool, Any]) -> Attend:
            return over_pages(self._model, recording, {"places": places, "pool": self.pool.arrays}, pieces)[0]

        return self.replayer.start(tokens, states, draws, tables, key, attend, queued)

    def steps_replayed(self, states: int, draws: Sequence[Draw]) -> bool:
        """Return True if a step for so many states with these draws is replayed, should the pool take them."""
        return self.replayer.replays(rows_for(states)) and all(draw.in_kernel for draw in draws)

    def _together(self, tokens: Tokens, states: Sequence[KVState], draws: Sequence[Draw], replay: bool) -> BatchStep:
        run, pool, rows = self._run, self.pool, rows_for(len(states))
        key, tables, pieces = self._keyed(states)
        if replay and self.steps_replayed(len(states), draws):
            step = self._replayed(tokens, states, draws, key, tables, pieces)
            if step is not None:
                return step
        self.replayer.wait()
        ids = tokens_as_array(tokens)
        if self._last is not None:  # steps write in place: this one is to follow, whatever its tokens come of
            ids = ids + (self._last[0, 0] > mx.inf).astype(mx.int32)
        padded = mx.pad(ids, (0, rows - ids.size)) if rows > ids.size else ids
        inputs: Inputs = {"places": {k: mx.array(t) for k, t in tables.items()}, "pool": pool.arrays}
        if run.traced and not run.eager:
            shapes = tuple(keys.shape for keys, _ in pool.arrays.values())
            logits, moved = self._traced((key, shapes), *pieces.items())(padded, inputs)
        else:
            logits, moved = self._traceable(pieces, padded, inputs)
        pool.arrays |= moved
        self._last = cast(mx.array, logits[: len(states)])
        for n, state in enumerate(states):
            state.advance(ids[n : n + 1])
        return LazyBatchStep(self._last, draws, run, self._model.part)

    def places(self, states: Sequence[KVState], rows: int) -> tuple[dict[bool, np.ndarray], dict[bool, int]]:
        """Return a step's places by kind of layer, int32 [rows, ..], and its pieces. States without pages join.

        `states`: of rows; one that has several reads as many tokens, one behind the other.
        """
        pool, tables, pieces = self.pool, dict[bool, np.ndarray](), dict[bool, int]()
        count = Counter(map(id, states))
        seats = {key: pool.seat(state, count[key]) for key, state in {id(state): state for state in states}.items()}
        at: list[tuple[Seat, int, int]] = []  # of rows: where the state is, its length then, tokens of this step
        for state in reversed(states):
            key = id(state)
            at.insert(0, (seats[key], state.length + count[key] - 1, count[key]))
            count[key] -= 1
        longest = max(length for _, length, _ in at)
        for kind, shape in self._shapes.items():
            room = paged.page_room(pool.most_pages(kind, longest))
            pieces[kind] = paged.pieces_for(rows, shape.heads, shape.kv_heads, room, pool.page)
            seen = [(length, *pool.row(seat, kind, length), own) for seat, length, own in at]
            share = paged.share_for(max(row[2] for row in seen), pieces[kind])
            # Rows without a state: each has a place of its own in page 0.
            seen += [(0, n, n + 1, [0], 1) for n in range(len(states), rows)]
            tables[kind] = paged.place_rows(seen, room, share)
        return tables, pieces

    def _fill(self, new: Pair, pool: Pair, place: tuple[int, int, int], pages: Sequence[int]) -> tuple[Pair, mx.array]:
        return self._run(FILL_PAGES, new, pool, paged.place_row(*place, pages, paged.page_room(len(pages))))

    def _wait(self, moving: bool) -> None:
        """Wait until no step reads or writes the pool. `moving`: its arrays are about to go."""
        last, self._last = self._last, None
        if last is not None:
            with suppress(RuntimeError, ValueError):  # one that has failed is told to who asks for its logits
                mx.eval(last)
        if moving:
            self.replayer.forget()
            for forget in self.on_moving:
                forget()
        else:
            self.replayer.wait()
