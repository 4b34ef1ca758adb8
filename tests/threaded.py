"""Several calls at once, for tests of what threads share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any


def together(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each returns, or raises, in a thread of its own."""
    found: list[Any] = [None] * len(tasks)

    def run(i: int) -> None:
        try:
            found[i] = tasks[i]()
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return found
