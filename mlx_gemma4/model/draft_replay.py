"""An assistant's drafts on an NVIDIA GPU, recorded once for a number of them and replayed: one launch for the host.

In: the passes of assistant.py over the pages of its target's pool, a state that is there, a hidden row where the
target's own replayed step has left it (batch_replay.py). Out: tokens, which a step that checks them may read on the
device. A draft begins when all steps over the pool have ended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..execution import execution
from ..gpu.recording import Arena, Player, Recording, Region, recorded, recorder
from ..kv.state import KVState
from ..ops import paged
from ..ops.dispatch import Kernels
from ..ops.paged import PAGED_ATTENTION
from ..ops.qkv import QKV_POST, ROTATIONS, QKVArrays, QKVOptions
from ..ops.sample import LIKELIEST, Draw
from .batch import Batcher
from .batch_replay import HiddenRow, QueuedTokens, numbers_of, upload_room
from .decode import Attend
from .weights import Loaded

log = logging.getLogger("mlx_gemma4")

# (run, drafts, ids [1], hidden [1, H], attention, draws) -> tokens, int32 [drafts]
Tokens = Callable[[Kernels, int, Any, Any, Attend, Any], Any]


class _Recorded(NamedTuple):
    player: Player
    hidden: Region  # where the target's row is to be, [1, H]


class ReplayedDrafts:
    """An assistant's recorded drafts."""

    def __init__(self, own: Loaded, run: Kernels, hidden: int, tokens: Tokens, batcher: Batcher) -> None:
        """`own`: the assistant's layers. `hidden`: the width of its target's rows. `batcher`: the target's."""
        self._own, self._run, self._hidden, self._make, self._batcher = own, run, hidden, tokens, batcher
        self._players: dict[int, Player] = {}  # by number of drafts
        self._kept: dict[Any, _Recorded] = {}
        self._latest: QueuedTokens | None = None  # which the next start may overwrite
        self._broken = False  # they can't be replayed here
        batcher.on_moving.append(self._forget)

    def takes(self, state: KVState) -> bool:
        """Return True if a state's drafts are replayed, as its steps are, or are not to be had."""
        return self._batcher.replays(1, state)

    def start(
        self, token: int, state: KVState, hidden: mx.array | HiddenRow, draws: Sequence[Draw] | int
    ) -> QueuedTokens | None:
        """Start drafts of a state that it takes; None: they can't be replayed.

        Args:
            token: the last one.
            draws: how to draw each; a number: so many, the likeliest.
        """
        batcher = self._batcher
        draws = [LIKELIEST] * draws if isinstance(draws, int) else draws
        with execution():
            batcher.replayer.wait()
            if self._latest is not None:
                self._latest.tokens()
            tables, pieces = batcher.places([state], 1)
            for table in tables.values():
                table[:, paged.TO] -= 1  # of its own token the target has no keys yet
            key = (self._run.off, len(draws), *(t.shape[1] for t in tables.values()), *pieces.items())
            made = self._kept.get(key) or self._try_to_record(key, len(draws), tables, pieces)
            if made is None:
                return None
            if isinstance(hidden, HiddenRow):
                made.player.copy(made.hidden, hidden.of.player, hidden.region)
            else:
                made.player.write([made.hidden], [hidden[None].astype(made.hidden.dtype)])
            start = made.player.start(numbers_of([token], tables, draws), False)
            self._latest = QueuedTokens(made.player, start, len(draws))
            return self._latest

    def _forget(self) -> None:
        for player in self._players.values():
            player.forget()
        self._kept.clear()

    def _try_to_record(
        self, key: Any, count: int, tables: dict[bool, np.ndarray], pieces: dict[bool, int]
    ) -> _Recorded | None:
        if self._broken:
            return None
        self._kept = {k: kept for k, kept in self._kept.items() if kept.player is not self._players.get(count)}
        try:
            assert self._run.player is not None
            player = self._players[count] = self._players.get(count) or self._run.player()
            recording = Recording(arena := Arena())
            numbers, ids, places, draws, _ = upload_room(recording, 1, tables, count)
            hidden: Any = recording.buffer((1, self._hidden), self._own.kv_dtype)
            run: Any = Kernels(recorder, self._run.off, strict=True)
            with recorded(recording):
                best = self._make(run, count, ids, hidden, self._over_pages(run, places, pieces), draws)
            player.load(recording.launches, arena.nbytes, numbers.size, best.region)
        except Exception as error:  # an operation that runs as its reference, a driver too old ..
            self._broken = True
            log.debug("Drafts are not replayed: %s: %s", type(error).__name__, error)
            return None
        self._batcher.replayer.recordings += 1
        self._kept[key] = _Recorded(player, hidden.region)
        return self._kept[key]

    def _over_pages(self, run: Kernels, places: dict[bool, Any], pieces: dict[bool, int]) -> Attend:
        """Return the attention of a draft's layers to the target's pages."""
        own, pool, c = self._own, self._batcher.pool, self._own.config
        waves = own.wavelengths.items()
        rope = {kind: run(ROTATIONS, places[kind], lengths, tokens=1, by_row=True) for kind, lengths in waves}

        def attend(i: int, q: mx.array, k: mx.array | None, v: mx.array | None, options: QKVOptions) -> mx.array:
            shape, norm = c.layers[i], own.weights.layers[i].attn_q_norm
            q, _, _ = run(QKV_POST, QKVArrays(q, None, None, norm, None, rope[shape.sliding]), options)
            of, kind = pool.arrays[shape.kv_layer], shape.sliding
            return run(PAGED_ATTENTION, q, of, places[kind], scale=c.attention_scale, pieces=pieces[kind])

        return attend
