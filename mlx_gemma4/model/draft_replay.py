"""An assistant's drafts on an NVIDIA GPU, recorded once for a number of them and replayed: one launch for the host.

In: the passes of assistant.py over the pages of its target's pool, a state that is there, a hidden row where the
target's own replayed step has left it (batch_replay.py). Out: tokens. A draft has ended before anything else starts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..execution import execution
from ..gpu.recording import Arena, Player, Recording, Region, recorded, recorder
from ..kv.state import KVState
from ..ops import paged
from ..ops.dispatch import Kernels
from ..ops.paged import PAGED_ATTENTION
from ..ops.qkv import QKV_POST, ROTATIONS, QKVArrays, QKVOptions
from ..ops.sample import LIKELIEST, WORDS, Draw
from .batch import Batcher
from .batch_replay import HiddenRow
from .decode import Attend

if TYPE_CHECKING:
    from .assistant import Assistant

log = logging.getLogger("mlx_gemma4")


class _Recorded(NamedTuple):
    player: Player
    hidden: Region  # where the target's row is to be, [1, H]


class ReplayedDrafts:
    """An assistant's recorded drafts."""

    def __init__(self, assistant: Assistant, batcher: Batcher) -> None:
        self._assistant, self._batcher = assistant, batcher
        self._players: dict[int, Player] = {}  # by number of drafts
        self._kept: dict[Any, _Recorded] = {}
        self._broken = False  # they can't be replayed here
        batcher.on_moving.append(self._forget)

    def draft(
        self, token: int, state: KVState, hidden: mx.array | HiddenRow, draws: Sequence[Draw] | int
    ) -> list[int] | None:
        """Return drafts as `Assistant.draft` does, none where they can't be replayed; None: the state is not here.

        Args:
            token: the last one.
            draws: how to draw each; a number: so many, the likeliest.
        """
        batcher = self._batcher
        if not batcher.holds(state) or not batcher.replays(1, state):
            return None
        if self._broken:
            return []
        draws = [LIKELIEST] * draws if isinstance(draws, int) else draws
        with execution():
            batcher.replayer.wait()
            tables, pieces = batcher.places([state], 1)
            for table in tables.values():
                table[:, paged.TO] -= 1  # of its own token the target has no keys yet
            key = (self._assistant.run.off, len(draws), *(t.shape[1] for t in tables.values()), *pieces.items())
            made = self._kept.get(key) or self._try_to_record(key, len(draws), tables, pieces)
            if made is None:
                return []
            if isinstance(hidden, HiddenRow):
                made.player.copy(made.hidden, hidden.of.player, hidden.region)
            else:
                made.player.write([made.hidden], [hidden[None].astype(made.hidden.dtype)])
            numbers = [np.array([token]), *(t.reshape(-1) for t in tables.values()), *(d.numbers for d in draws)]
            start = made.player.start(np.concatenate(numbers).astype(np.int32), False)
        return made.player.best(start)

    def _forget(self) -> None:
        for player in self._players.values():
            player.forget()
        self._kept.clear()

    def _try_to_record(
        self, key: Any, count: int, tables: dict[bool, np.ndarray], pieces: dict[bool, int]
    ) -> _Recorded | None:
        try:
            player = self._players.get(count)
            self._kept = {k: kept for k, kept in self._kept.items() if kept.player is not player}
            self._kept[key] = self._record(count, tables, pieces)
            self._batcher.note_recording()
        except Exception as error:  # an operation that runs as its reference, a driver too old ..
            self._broken = True
            log.debug("Drafts are not replayed: %s: %s", type(error).__name__, error)
            return None
        return self._kept[key]

    def _record(self, count: int, tables: dict[bool, np.ndarray], pieces: dict[bool, int]) -> _Recorded:
        """Record so many drafts. Raises whatever prevents that."""
        assistant = self._assistant
        assert assistant.run.player is not None
        player = self._players[count] = self._players.get(count) or assistant.run.player()
        recording = Recording(arena := Arena())
        # The first buffer, at the arena's beginning: the token, its places, how the drafts are drawn.
        size = 1 + count * WORDS + sum(table.size for table in tables.values())
        numbers: Any = recording.buffer((size,), mx.int32)
        hidden: Any = recording.buffer((1, assistant.config.target_hidden), assistant.target.kv_dtype)
        places, at = {}, 1
        for kind, table in tables.items():
            places[kind] = numbers[at : at + table.size].reshape(*table.shape)
            at += table.size
        run: Any = Kernels(recorder, assistant.run.off, strict=True)
        with recorded(recording):
            attend, draws = self._over_pages(run, places, pieces), numbers[at:].reshape(count, WORDS)
            best: Any = assistant.tokens(run, count, numbers[:1], hidden, attend, draws)
        player.load(recording.launches, arena.nbytes, numbers.size, best.region)
        return _Recorded(player, hidden.region)

    def _over_pages(self, run: Kernels, places: dict[bool, Any], pieces: dict[bool, int]) -> Attend:
        """Return the attention of a draft's layers to the target's pages."""
        assistant, pool, c = self._assistant, self._batcher.pool, self._assistant.loaded.config
        waves = assistant.loaded.wavelengths.items()
        rope = {kind: run(ROTATIONS, places[kind], lengths, tokens=1, by_row=True) for kind, lengths in waves}

        def attend(i: int, q: mx.array, k: mx.array | None, v: mx.array | None, options: QKVOptions) -> mx.array:
            shape, norm = c.layers[i], assistant.weights.decoder.layers[i].attn_q_norm
            q, _, _ = run(QKV_POST, QKVArrays(q, None, None, norm, None, rope[shape.sliding]), options)
            of, kind = pool.arrays[shape.kv_layer], shape.sliding
            return run(PAGED_ATTENTION, q, of, places[kind], scale=c.attention_scale, pieces=pieces[kind])

        return attend
