"""The server's models: one that stays, or those of a folder, each loaded when it is asked for and let go when idle.

In: names from requests. Out: an `Engine` to hold while a request is answered. A model is let go only when nobody holds
it: for its time being up, to make room for another, or because it is deleted. All but `load`, `drain` and `close`
belong to the event loop.
"""

import asyncio
import gc
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx

from ..conversation.language_model import LanguageModel
from ..errors import InputError
from ..files.folder import delete_model, find_models, look_up
from ..media.projector import kinds_of
from .cards import Card, card_of, cards
from .engine import GAUGES, Engine
from .metrics import Metrics
from .settings import Settings
from .stored import Stored
from .wire import LARGE, ApiError

log = logging.getLogger("mlx_gemma4")
MOST_LARGE = 8  # requests at a time whose bodies are over wire.LARGE

Start = Callable[[str, Path, int], Engine]  # name, path, bytes that others may still take: loads a model


@dataclass
class Held:
    """A loaded model."""

    name: str
    engine: Engine
    keep: float  # seconds without a request after which it goes
    users: int = 0  # requests under way
    going: bool = False  # takes no more requests
    until: float = math.inf  # when it goes, in seconds since 1970, unless a request comes
    timer: asyncio.TimerHandle | None = None
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class Models:
    """The models by name, those that are loaded, and what all of them share."""

    def __init__(
        self, settings: Settings, folder: Path | None = None, start: Start | None = None, keep: float = 300.0
    ) -> None:
        """
        Args:
            settings: `model_name` is a single model's.
            folder: of models; None: `stay` gives the one.
            start: loads a model of the folder, in another thread. Raises InputError, of exit code 3 for want of memory.
            keep: seconds that a model without requests stays loaded, unless a request says otherwise.
        """
        self.settings, self.folder, self.keep, self._start = settings, folder, keep, start
        self.metrics, self.stored = Metrics(), Stored()
        self.loaded: dict[str, Held] = {}  # the one used last comes last
        self.draining = False
        self.large = 0  # requests with large bodies that are being answered
        self._single: Path | None = None
        self._loading = asyncio.Lock()  # of who loads a model or lets one go
        self._tasks: set[asyncio.Task[None]] = set()
        for name, about, value in GAUGES:
            self.metrics.gauge(name, about, lambda value=value: sum(map(value, self.engines)))  # type: ignore[misc]

    def stay(self, lm: LanguageModel) -> Engine:
        """Serve this model, whatever requests call it; return its engine."""
        engine = self._shared(Engine(lm, self.settings))
        self._single = lm.path
        self.loaded[self.settings.model_name] = Held(self.settings.model_name, engine, math.inf)
        return engine

    @property
    def engines(self) -> list[Engine]:
        return [held.engine for held in list(self.loaded.values())]

    @property
    def load(self) -> tuple[int, int]:
        """Jobs running and waiting."""
        loads = [engine.load for engine in self.engines]
        return sum(load[0] for load in loads), sum(load[1] for load in loads)

    def drain(self) -> None:
        """Take no more jobs, and cancel those that have not begun."""
        self.draining = True
        for engine in self.engines:
            engine.drain()

    def close(self, timeout: float = 10.0) -> bool:
        """End all engines; return True if they ended within `timeout` seconds each."""
        self.drain()
        ended = [engine.close(timeout) for engine in self.engines]
        return all(ended)

    @property
    def max_body_bytes(self) -> int:
        """What a request may have: little where no model is served that takes pictures or sounds."""
        sees = self.folder is not None or any(engine.lm.media for engine in self.engines)
        return self.settings.max_body_bytes if sees else min(LARGE, self.settings.max_body_bytes)

    @contextmanager
    def large_body(self) -> Iterator[None]:
        """A large body is held while this is open. Raises ApiError (429) where there are too many."""
        if self.large >= MOST_LARGE:
            message = f"{self.large} large requests are being answered; try later"
            raise ApiError(429, message, code="rate_limit_exceeded", wait=5)
        self.large += 1
        try:
            yield
        finally:
            self.large -= 1

    # Names

    async def paths(self) -> dict[str, Path]:
        """All models by name."""
        if self.folder is None:
            return {self.settings.model_name: self._single} if self._single else {}
        return await asyncio.to_thread(find_models, self.folder)

    async def cards(self) -> list[Card]:
        """All models that can be read, without loading any."""
        return [self._seen(card) for card in await asyncio.to_thread(cards, await self.paths())]

    async def card(self, name: str) -> Card:
        """Return a model's card. Raises ApiError (404)."""
        paths = await self.paths()
        found = look_up(name, list(paths))
        card = await asyncio.to_thread(card_of, found, paths[found]) if found else None
        if card is None:
            raise self._not_found(name, list(paths))
        return self._seen(card)

    def _seen(self, card: Card) -> Card:
        """A card with what the model was loaded with, if it is: `--mmproj` may name any file."""
        held = self.loaded.get(card.name)
        return replace(card, media=kinds_of(held.engine.lm.media)) if held else card

    def _not_found(self, name: str, names: list[str]) -> ApiError:
        have = ", ".join(names[:20]) or "none"
        return ApiError(404, f"model {name!r:.80} not found; there are: {have}", "model", "model_not_found")

    # Loading and letting go

    async def hold(self, name: str | None) -> Held:
        """Return a model that stays until `release`, loaded if need be; without a name the one used last, or the first.

        Raises:
            ApiError: 404 where there is no such model, 503 where the server is shutting down.
            InputError: it can't be loaded.
        """
        key = await self._key(name)
        held = self.loaded.get(key)
        if held is None or held.going:
            async with self._loading:
                held = self.loaded.get(key) or await self._load(key)
        held.users += 1
        if held.timer:
            held.timer.cancel()
            held.timer = None
        self.loaded[key] = self.loaded.pop(key)
        return held

    def release(self, held: Held, keep: float | None = None) -> None:
        """End `hold`. `keep`: seconds that the model stays loaded from now on without a request."""
        held.users -= 1
        held.keep = held.keep if keep is None else keep
        held.until = time.time() + held.keep
        if held.users:
            return
        held.idle.set()
        if self.folder and not held.going and math.isfinite(held.keep):
            held.timer = asyncio.get_running_loop().call_later(held.keep, self._expire, held)

    async def delete(self, name: str) -> None:
        """Delete a model of the folder, once nobody uses it. Raises ApiError."""
        if self.folder is None:
            raise ApiError(400, "this server has the one model that it was started with; `serve --models DIR` has many")
        async with self._loading:
            card = await self.card(name)
            if card.name in self.loaded:
                await self._let_go(self.loaded[card.name])
            await asyncio.to_thread(delete_model, self.folder, card.path)

    async def _key(self, name: str | None) -> str:
        if self.folder is None:
            return self.settings.model_name
        if name in self.loaded:
            return str(name)
        names = list(await self.paths())
        if not name and (self.loaded or names):
            return next(reversed(self.loaded), None) or names[0]
        found = look_up(name or "", names)
        if found is None:
            raise self._not_found(name or "", names)
        return found

    async def _load(self, key: str) -> Held:
        """Load a model; where memory is short, let others go first, the longest unused before the rest."""
        assert self._start
        path = (await self.card(key)).path
        while True:
            if self.draining:
                raise ApiError(503, "the server is shutting down", code="shutting_down", wait=10)
            promised = sum(engine.promised for engine in self.engines)
            started = time.monotonic()
            try:
                engine = self._shared(await asyncio.to_thread(self._start, key, path, promised))
                break
            except InputError as error:
                if error.exit_code != 3 or not self.loaded:
                    raise
                log.info("%s", error)
            await self._let_go(min(self.loaded.values(), key=lambda held: held.users > 0))
        engine.load_seconds = time.monotonic() - started
        held = self.loaded[key] = Held(key, engine, self.keep)
        return held

    def _shared(self, engine: Engine) -> Engine:
        engine.metrics, engine.stored = self.metrics, self.stored
        return engine

    async def _let_go(self, held: Held) -> None:
        """Unload a model once nobody holds it. Called with `_loading`."""
        held.going = True
        if held.timer:
            held.timer.cancel()
        while held.users:
            held.idle.clear()
            await held.idle.wait()
        del self.loaded[held.name]
        await asyncio.to_thread(held.engine.close)
        del held.engine
        gc.collect()
        mx.clear_cache()
        log.info("Unloaded %s", held.name)

    def _expire(self, held: Held) -> None:
        async def end() -> None:
            async with self._loading:
                if self.loaded.get(held.name) is held and not held.users and time.time() >= held.until - 0.01:
                    await self._let_go(held)

        task = asyncio.get_running_loop().create_task(end())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
