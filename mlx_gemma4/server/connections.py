"""Connections with bounds: how long each may keep silent, and how many there may be.

In: an application. Out: `server_config`, for uvicorn. What requests hold is no business of this module; how long a body
may take is `wire.py`'s.
"""

import asyncio
import logging
import socket
import time
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 15.0  # until a connection's next request has its whole head
STALL_SECONDS = 120.0  # that a client may leave unread what was sent to it
SPARE = 16  # connections beside the most that may have requests: /health is asked over them
_BACKLOG = 128  # connections that the system holds until they are accepted
_ACCEPTS = 8  # at once: those over the bound are closed before the next ones come


class Connection(H11Protocol):
    """uvicorn's connection over HTTP/1.1, closed when its client doesn't go on.

    Where there are too many, the one that has waited longest for a request's head is closed. Requests are fewer: the
    application refuses those over its bound.
    """

    most = 512 + SPARE
    since = 0.0  # when it began to wait
    _head: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> bool:
        """True if no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        there = [one for one in self.connections if isinstance(one, Connection) and not one.transport.is_closing()]
        if len(there) > self.most:
            idle = [one for one in there if one.waiting]
            min(idle, key=lambda one: one.since, default=self).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._stall):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._wait()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall:
            self._stall.cancel()

    def _wait(self) -> None:
        """Give the client its time for the next head."""
        if self._head:
            self._head.cancel()
        self.since = self.loop.time()
        self._head = self.loop.call_later(HEAD_SECONDS, self._late)

    def _late(self) -> None:
        if self.waiting:
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server, which accepts few connections at once but lets many wait for that."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or ():
            each.listen(_BACKLOG)


class _Seldom(logging.Filter):
    """Lets a message of asyncio's about descriptors that ran out pass once a minute, without its traceback."""

    last = float("-inf")

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.getMessage().startswith("socket.accept() out of system resource"):
            return True
        record.exc_info, record.exc_text = None, None
        record.msg, record.args = "Too many files are open for more connections; raise `ulimit -n`", ()
        seldom = time.monotonic() - self.last > 60
        self.last = time.monotonic() if seldom else self.last
        return seldom


_seldom = _Seldom()


def server_config(app: Starlette, connections: int, **more: Any) -> uvicorn.Config:
    """The configuration of a server with `connections` requests at a time, and few more connections."""
    logging.getLogger("asyncio").addFilter(_seldom)

    class Bounded(Connection):
        most = connections + SPARE

    return uvicorn.Config(
        app,
        http=Bounded,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,  # the application has its own
        server_header=False,
        timeout_keep_alive=int(HEAD_SECONDS),
        backlog=_ACCEPTS,
        **more,
    )
