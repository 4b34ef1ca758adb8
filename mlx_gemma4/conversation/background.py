"""Run an iterator in a thread of its own, for an event loop that must not wait.

In: a function that makes the iterator. Out: its items, for `async for`. Leaving or cancelling that loop stops the
iterator after the item it is at. Knows nothing of the items, except that reading a prompt reports progress.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ..media.layers import go_on

T = TypeVar("T")
OnPrompt = Callable[[int, int], None]  # called with (tokens read, tokens in all)


class _Left(Exception):
    """Ends a prompt that nobody waits for any more."""


async def in_thread(
    start: Callable[[OnPrompt], Generator[T, None, None]], on_prompt: OnPrompt | None = None
) -> AsyncGenerator[T, None]:
    """Yield the items of an iterator that runs in a thread; each is made when the one before has been handled.

    Args:
        start: makes the iterator; takes the function to call while a prompt is read.
        on_prompt: is called by that function.
    """
    loop, left = asyncio.get_running_loop(), threading.Event()

    def still_here() -> None:
        if left.is_set():
            raise _Left

    def check(done: int, total: int) -> None:
        still_here()
        if on_prompt:
            on_prompt(done, total)

    items = start(check)
    with ThreadPoolExecutor(1, "reply", go_on.set, (still_here,)) as thread:
        try:
            while (item := await loop.run_in_executor(thread, next, items, None)) is not None:
                yield item
        finally:
            left.set()
            await asyncio.shield(loop.run_in_executor(thread, items.close))  # after the step, if it is still under way
