"""Replies in asyncio: the same tokens, and cancelling stops within one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator

import mlx.core as mx
import pytest
from scripted import GREEDY, SHORT, TALE, Actor, ids_of, user

import mlx_gemma4
from mlx_gemma4 import InputError, LanguageModel, Session, astream, chat, prompt_ids
from mlx_gemma4.conversation.background import in_thread
from mlx_gemma4.media.layers import by_layers


def test_async_is_the_same(lm: LanguageModel) -> None:
    async def main() -> tuple[list[int], list[int], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        tokens = [chunk.token.id async for chunk in astream(lm, "Tell me a tale.", SHORT) if chunk.token]
        reply = await mlx_gemma4.achat(lm, "Tell me a tale.", max_tokens=6, sampling=GREEDY)
        ticking.cancel()
        return tokens, ids_of(reply), ticks

    tokens, again, ticks = asyncio.run(main())
    assert tokens == again == ids_of(chat(lm, "Tell me a tale.", SHORT))
    assert ticks > 5  # the loop was free


def test_cancelling_stops_within_a_token(actor: Actor) -> None:
    actor.say("word " * 500)

    async def main() -> tuple[int, int]:
        state = actor.lm.model.new_state()

        async def consume() -> None:
            async for chunk in astream(actor.lm, "Go", state=state):
                if len(chunk.reply.tokens) == 3:
                    started.set()

        started = asyncio.Event()
        task = asyncio.create_task(consume())
        await started.wait()
        before = actor.model.asked
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        asked, length = actor.model.asked, state.length
        await asyncio.sleep(0.1)
        assert actor.model.asked == asked and state.length == length  # nothing goes on behind
        return before, asked

    before, asked = asyncio.run(main())
    assert asked <= before + 2


def test_leaving_an_async_loop_stops_too(actor: Actor) -> None:
    session = Session(actor.say("word " * 500).lm)

    async def main() -> None:
        events = session.asend("Go")
        async for _ in events:
            break
        before = actor.model.asked
        await events.aclose()
        assert actor.model.asked <= before + 2
        with pytest.raises(InputError, match="context"):
            async for _ in session.asend("word " * 3000):
                pass

    asyncio.run(main())
    assert session.reply and session.reply.finish_reason == "cancelled"


def test_cancelling_a_long_prompt(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm.model, "chunk", 256)

    async def main() -> int:
        state, reading, loop = lm.model.new_state(), asyncio.Event(), asyncio.get_running_loop()

        async def consume() -> None:
            seen = lambda done, total: loop.call_soon_threadsafe(reading.set)  # noqa: E731
            async for _ in astream(lm, (TALE + " ") * 10, SHORT, state=state, on_prompt=seen):
                pass

        task = asyncio.create_task(consume())
        await reading.wait()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return state.length

    length = asyncio.run(main())
    assert 0 < length < len(prompt_ids(lm, user((TALE + " ") * 10)))
    assert length % 256 == 0


def test_leaving_ends_a_tower_between_two_layers() -> None:
    """Of what is encoded for a reply that nobody waits for."""
    ended = []

    def endless(check: object) -> Generator[int, None, None]:
        try:
            yield 1
            by_layers(mx.zeros(1) for _ in range(10**9))
        finally:
            ended.append(True)

    async def main() -> None:
        async def consume() -> None:
            async for _ in in_thread(endless):
                pass

        task = asyncio.create_task(consume())
        await asyncio.sleep(0.2)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(task, 20)

    asyncio.run(main())
    assert ended
