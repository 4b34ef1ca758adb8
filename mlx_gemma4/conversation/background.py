"""An iterator that works in a thread of its own, for an event loop that must not wait.

In: what makes the iterator. Out: its items, for `async for`. Leaving or cancelling that loop stops the iterator after
the item it is at. Knows nothing of what the items are, but that reading a prompt reports progress.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from typing import TypeVar

T = TypeVar("T")
OnPrompt = Callable[[int, int], None]  # called with (tokens read, tokens in all)


class _Left(Exception):
    """Nobody waits any more."""


async def in_thread(
    start: Callable[[OnPrompt], Iterator[T]], on_prompt: OnPrompt | None = None
) -> AsyncGenerator[T, None]:
    """Run an iterator in a thread of its own and hand its items to the event loop.

    Args:
        start: makes the iterator, in that thread; gets what to call while a prompt is read.
        on_prompt: called along with it.
    """
    loop, left = asyncio.get_running_loop(), threading.Event()
    items: asyncio.Queue[tuple[T | None, BaseException | None]] = asyncio.Queue()

    def check(done: int, total: int) -> None:
        if left.is_set():
            raise _Left
        if on_prompt:
            on_prompt(done, total)

    def post(item: T | None, end: BaseException | None) -> None:
        try:
            loop.call_soon_threadsafe(items.put_nowait, (item, end))
        except RuntimeError:  # the loop is closed
            left.set()

    def work() -> None:
        end: BaseException = _Left()
        try:
            iterator = start(check)
            try:
                for item in iterator:
                    post(item, None)
                    if left.is_set():
                        break
            finally:
                if isinstance(iterator, Generator):
                    iterator.close()
        except BaseException as error:
            end = error
        post(None, end)

    threading.Thread(target=work, name="reply", daemon=True).start()
    end: BaseException | None = None
    try:
        while True:
            item, end = await items.get()
            if end is not None:
                break
            yield item  # type: ignore[misc]
    finally:
        left.set()
        while end is None:  # within a token, or a chunk of the prompt: then what it worked on is free
            _, end = await items.get()
    if not isinstance(end, _Left):
        raise end
