"""A prefix cache: states are kept for prompts that will begin as earlier ones did.

In: a prompt's tokens. Out: a state that holds the longest kept prefix of them, and its length. Kept states share
segments with each other and with those in use, so a common prefix is in memory once: the kept states are the branches
of a tree whose trunk is shared segments.
"""

import itertools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import NoRoom
from ..execution import execution
from ..kv.state import KVState, kv_bytes, total_nbytes, window_bytes
from ..model.model import Model
from .prompt import prefill_chunk

# Marks of one conversation that are kept, at ends of its turns. Beyond, the mark goes whose neighbours are closest.
MAX_MARKS = 8


@dataclass
class _Kept:
    """A state kept for a prompt that begins with its tokens."""

    state: KVState
    tokens: np.ndarray  # int32 [n], those of the state
    used: int  # when it last served, by the cache's clock
    pinned: bool


class PrefixCache:
    """Keeps states, within a budget, and finds the longest prefix of a prompt among them. Thread-safe."""

    def __init__(self, model: Model, max_kv_bytes: int | None = None, kv: str = "full") -> None:
        """
        Args:
            max_kv_bytes: for all states kept and in use together; None: no limit.
            kv: how states hold keys and values, as `Model.new_state` takes it.
        """
        self.model, self.max_kv_bytes, self.kv = model, max_kv_bytes, kv
        self._kept: list[_Kept] = []
        # States handed out and the most bytes each may come to hold; one that is dropped leaves by itself.
        self._in_use: weakref.WeakKeyDictionary[KVState, int] = weakref.WeakKeyDictionary()
        self._clock = itertools.count()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all states kept and in use, what they share counted once."""
        with self._lock:
            return total_nbytes(self._all())

    @property
    def reserved(self) -> int:
        """The most bytes that states in use may come to hold."""
        with self._lock:
            return sum(self._reserved().values())

    def take(self, tokens: list[int], max_tokens: int = 0) -> tuple[KVState, int]:
        """Return a state that holds the longest kept prefix of a prompt; close it, or `put` it back, when done.

        At least the last token is left to read, for its logits.

        Args:
            tokens: the whole prompt.
            max_tokens: the reply's length at most; the state takes no more than prompt and reply.

        Returns:
            the state and how many of `tokens` it holds.

        Raises:
            NoRoom: prompt and reply can't fit in `max_kv_bytes` beside the states in use.
        """
        with self._lock:
            worst = self.most_bytes(len(tokens) + max_tokens, self.model.config.longest_picture(tokens))
            self._admit(worst, len(tokens) + max_tokens)
            kept, reach, common = self._best(tokens)
            if kept is None:
                state = self.model.new_state(kv=self.kv)
            else:
                kept.used = next(self._clock)
                state = kept.state.fork()
                if 0 < reach < common:
                    # Other prompts may part here too: next time, this position can be gone back to.
                    state.wanted_marks.add(common)
                state.rewind(reach)
            state.max_tokens = len(tokens) + max_tokens
            self._in_use[state] = worst
            self._make_room()
            return state, reach

    def put(self, state: KVState, *, pinned: bool = False) -> None:
        """Keep a state's present contents for later prompts, in place of the kept states that it continues.

        Args:
            state: any state of the model and of the cache's kind. It stays usable; `close` it when no longer in use.
            pinned: keep it whatever the budget says, until `unpin`.
        """
        with self._lock:
            if not state.length:
                return
            if state.kv != self.kv:
                raise ValueError(f"a state with kv {state.kv} can't be kept beside those with kv {self.kv}")
            kept = state.fork()
            kept.max_tokens = None
            kept.wanted_marks.clear()
            with execution():
                mx.async_eval(kept.arrays)
            tokens = np.array(kept.tokens, np.int32)
            for other in list(self._kept):
                n = other.tokens.size
                if n <= tokens.size and np.array_equal(other.tokens, tokens[:n]):
                    kept.adopt(other.state)
                    pinned |= other.pinned
                    self._kept.remove(other)
            thin(kept)
            self._kept.append(_Kept(kept, tokens, next(self._clock), pinned))
            self._make_room()

    @contextmanager
    def lease(self, prompt: list[int], max_tokens: int = 0) -> Iterator[tuple[KVState, int]]:
        """Within this, have what `take` returns; at its end the state is kept and closed. Raises NoRoom as `take`."""
        state, held = self.take(prompt, max_tokens)
        try:
            yield state, held
        finally:
            self.put(state)
            state.close()

    @contextmanager
    def room(self, tokens: int) -> Iterator[KVState]:
        """Within this, have an empty state for so many tokens, which is not kept. Raises NoRoom."""
        state, _ = self.take([], tokens)
        try:
            yield state
        finally:
            state.close()

    def unpin(self) -> None:
        """Let the budget drop any kept state again."""
        with self._lock:
            for kept in self._kept:
                kept.pinned = False
            self._make_room()

    def _best(self, tokens: list[int]) -> tuple[_Kept | None, int, int]:
        """Return the kept state that serves a prompt best, the position to rewind it to, and their common length."""
        ids, best = np.array(tokens, np.int32), (None, 0, 0)
        for kept in self._kept:
            common = self.model.config.uncut(tokens, common_length(ids[:-1], kept.tokens))
            reach = kept.state.reach(common)
            if reach > best[1] or (reach == best[1] and common > best[2]):
                best = (kept, reach, common)  # type: ignore[assignment]
        return best

    def most_bytes(self, tokens: int, picture: int = 0) -> int:
        """Return the most bytes that a state of so many tokens, with the marks of one prompt, may hold.

        `picture`: of these tokens, so many are read at once.
        """
        config, dtype = self.model.config, self.model.kv_dtype
        most = kv_bytes(config, dtype, tokens, max(prefill_chunk(self.model), picture), kv=self.kv)
        return most + (MAX_MARKS + 1) * window_bytes(config, dtype)

    def _admit(self, worst: int, tokens: int) -> None:
        """Refuse a request that can't fit even if only pinned states are kept."""
        if self.max_kv_bytes is None:
            return
        taken = sum(self._reserved().values()) + total_nbytes([k.state for k in self._kept if k.pinned])
        if worst + taken > self.max_kv_bytes:
            raise NoRoom(
                f"{tokens} tokens of prompt and reply may take {worst / 1e6:.1f} MB of KV state, and "
                f"{max(0, self.max_kv_bytes - taken) / 1e6:.1f} MB of max_kv_bytes {self.max_kv_bytes / 1e6:.1f} MB "
                "are free; shorten the prompt or the reply, or raise max_kv_bytes"
            )

    def _make_room(self) -> None:
        """Drop kept states, the longest unused first, until all fits even if those in use grow to their worst."""
        if self.max_kv_bytes is None:
            return
        reserved = self._reserved()
        growth = sum(reserved.values()) - total_nbytes(reserved)  # what is shared with them is theirs already
        for kept in sorted((k for k in self._kept if not k.pinned), key=lambda k: k.used):
            if total_nbytes(self._all()) + growth <= self.max_kv_bytes:
                return
            self._kept.remove(kept)

    def _reserved(self) -> dict[KVState, int]:
        return {state: worst for state, worst in self._in_use.items() if not state.closed}

    def _all(self) -> list[KVState]:
        return [k.state for k in self._kept] + list(self._reserved())


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many tokens two sequences begin with in common."""
    n = min(a.size, b.size)
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if differ.size else n


def thin(state: KVState, most: int = MAX_MARKS) -> None:
    """Let go of marks until there are `most`: keep the last two, and others that are far apart."""
    while len(marks := state.marks) > most:
        places = [0, *(m.position for m in marks)]
        gaps = [places[i + 2] - places[i] for i in range(len(marks) - 2)]
        state.unmark(marks[gaps.index(min(gaps))])
