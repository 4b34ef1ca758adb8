"""A model that leads and one that follows, in one process, without a link between them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma4 import LanguageModel
from mlx_gemma4.distributed import following, mirror
from mlx_gemma4.distributed.following import follow
from mlx_gemma4.distributed.mirror import LedModel
from mlx_gemma4.distributed.place import Place
from mlx_gemma4.errors import InputError
from mlx_gemma4.kv.state import KVState


class Both:
    """Both ends of a link without sockets, and what goes over MLX's own."""

    place, group = Place(1, 2, "ring", "127.0.0.1", 1), None

    def __init__(self) -> None:
        self.dropped: deque[int] = deque()
        self.told: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self.ids: SimpleQueue[mx.array] = SimpleQueue()
        self.replies: SimpleQueue[Any] = SimpleQueue()
        self.on_checked: Callable[[int, dict[str, Any]], None] = lambda rank, theirs: None
        self.failed: list[str] = []
        self.allowed: list[float] = []  # seconds more, by call
        self.error: BaseException | None = None

    def tell(self, op: str, *states: int, **given: Any) -> None:
        gone = [self.dropped.popleft() for _ in range(len(self.dropped))]
        if gone:
            self.told.put({"op": "drop", "states": gone})
        self.told.put({"op": op, "states": list(states), **given})

    def calls(self) -> Iterator[dict[str, Any]]:
        while (message := self.told.get())["op"] != "bye":
            yield message

    def answers(self) -> list[Any]:
        answer = self.replies.get(timeout=60)
        if isinstance(answer, Exception):
            raise InputError(str(answer))
        return [answer]

    def answer(self, value: Any) -> None:
        self.replies.put(value)

    refuse = answer

    @contextmanager
    def at_work(self, tokens: int, more: float = 0.0) -> Iterator[None]:
        self.allowed.append(more)
        yield

    def later(self, task: Callable[[], object]) -> None:
        task()

    def checked(self, **values: Any) -> None:
        self.on_checked(1, values)

    def name(self, rank: int) -> str:
        return f"rank {rank}"

    def fail(self, line: str) -> None:
        self.failed.append(line)

    def shared(self, ids: mx.array, group: Any) -> mx.array:
        if threading.current_thread().name == "follower":
            return self.ids.get(timeout=60)
        self.ids.put(ids)
        return ids


class Pair:
    """A model that leads, and the states of the one that follows."""

    def __init__(self, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, other: LanguageModel | None = None) -> None:
        """`other`: the one that follows, by default the same."""
        self.link, self.states = Both(), {}
        for module in (mirror, following):
            monkeypatch.setattr(module, "shared_ids", self.link.shared)
        self.model = LedModel(lm.model, self.link)  # type: ignore[arg-type]
        self.thread = threading.Thread(target=self._follow, args=(other or lm,), name="follower")
        self.thread.start()

    def _follow(self, lm: LanguageModel) -> None:
        try:
            follow(lm.model, self.link, self.states)  # type: ignore[arg-type]
        except BaseException as error:
            self.link.error = error

    def end(self) -> None:
        self.link.told.put({"op": "bye", "states": []})
        self.thread.join(60)
        assert self.link.error is None
        assert not self.thread.is_alive()


def same(a: KVState, b: KVState) -> None:
    assert a.tokens == b.tokens
    assert [mark.position for mark in a.marks] == [mark.position for mark in b.marks]
    for i, kv in a.layers.items():
        other = b.layers[i]
        assert kv.count == other.count
        for mine, theirs in zip(kv.pieces, other.pieces, strict=True):
            assert (mine.start, mine.stop) == (theirs.start, theirs.stop)
            n = mine.stop - mine.start
            assert np.array_equal(np.array(mine.keys[:, :, :n]), np.array(theirs.keys[:, :, :n]))
