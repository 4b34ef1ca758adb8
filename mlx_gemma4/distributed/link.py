"""The link beside MLX's own: a line of TCP from rank 0 to each follower, on which calls are told and a dead rank shows.

In: messages, JSON objects of a line each. Out: the same, in order; and the end of this process with one line on stderr
when another rank is dead, silent or reports an error: what waits in a collective can't be stopped otherwise. Rank 0
listens on the address that the hostfile names for it, and takes only who knows a secret that went over MLX's link.
"""

from __future__ import annotations

import hmac
import json
import os
import platform
import secrets
import signal
import socket
import sys
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any, NoReturn

import mlx.core as mx

from .. import __version__
from ..errors import InputError
from .place import Place, from_first, group_of

Message = dict[str, Any]

STALL = "MLX_GEMMA4_STALL"  # seconds of silence after which a rank is taken for dead
JOINING = 90.0  # seconds that ranks may take to find each other
FAILED = 1  # exit code


def stall() -> float:
    """Return after how many seconds of silence a rank is taken for dead."""
    return float(os.environ.get(STALL, "30"))


def about() -> Message:
    """Return what must be the same on all ranks."""
    return {"mlx-gemma4": __version__, "mlx": mx.__version__}


class Wire:
    """A connection to one other rank. Any thread may send; one receives."""

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        sock.settimeout(timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock, self._file, self._lock = sock, sock.makefile("rb"), threading.Lock()

    def send(self, **message: Any) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            self.sock.sendall(data)

    def receive(self) -> Message:
        """Return the next message. Raises OSError when there is none in time, EOFError when there will be none."""
        line = self._file.readline(1 << 24)
        if not line.endswith(b"\n"):
            raise EOFError
        message: Message = json.loads(line)
        return message

    @property
    def local(self) -> bool:
        """True if the other end is on this machine."""
        return bool(self.sock.getpeername()[0] == self.sock.getsockname()[0])


def _beat(wires: list[Wire], over: threading.Event) -> None:
    """Send a message now and then, so that the other end knows this process alive."""
    while not over.wait(min(1.0, stall() / 5)):
        for wire in wires:
            with suppress(OSError):  # who receives there sees it
                wire.send(beat=1)


def _thread(target: Callable[..., None], *args: Any) -> None:
    threading.Thread(target=target, args=args, daemon=True).start()


@contextmanager
def _deadline(what: str) -> Iterator[None]:
    """End this process if the block isn't through in JOINING seconds."""
    timer = threading.Timer(JOINING, end_with, (what,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


_terminal: list[Any] = []  # how the terminal was before anything was read from it


def end_with(line: str) -> NoReturn:
    """Print a line and end this process at once, whatever its threads wait for."""
    if _terminal:
        with suppress(termios.error, ValueError):
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, _terminal)
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    with suppress(OSError):
        os.write(2, f"mlx-gemma4: {' '.join(line.split())}\n".encode())
    os._exit(FAILED)


class Leader:
    """Rank 0's end."""

    def __init__(self, place: Place) -> None:
        """Wait for all followers. Raises InputError if one has other versions than this process."""
        with suppress(termios.error, ValueError, AttributeError):
            _terminal[:] = termios.tcgetattr(sys.stdin)
        self.place, self._over = place, threading.Event()
        self.dropped: deque[int] = deque()  # states that nobody has any more; followers hear of it with the next call
        self.on_checked: Callable[[int, Message], None] = lambda rank, checked: None
        self._lock, self._failing = threading.Lock(), threading.Lock()
        with _deadline("the other ranks did not come; run mlx-gemma4 hosts check HOSTFILE to see why"):
            self.group = group_of(place.backend)
            family = socket.AF_INET6 if ":" in place.address else socket.AF_INET
            with socket.create_server((place.address, 0), family=family) as listener:
                secret = [secrets.randbits(31) for _ in range(4)]
                from_first(self.group, [listener.getsockname()[1], *secret])
                self._wires, self._hello = self._accept(listener, repr(secret))
        self._answers: dict[int, SimpleQueue[Message]] = {rank: SimpleQueue() for rank in self._wires}
        for rank, hello in self._hello.items():
            for what, mine in about().items():
                if hello["about"].get(what) != mine:
                    self.close()
                    raise InputError(
                        f"{self.name(rank)} has {what} {hello['about'].get(what)}, rank 0 has {mine}; install the same"
                    )
        for rank in self._wires:
            _thread(self._hear, rank)
        _thread(_beat, [*self._wires.values()], self._over)

    def _accept(self, listener: socket.socket, secret: str) -> tuple[dict[int, Wire], dict[int, Message]]:
        wires: dict[int, Wire] = {}
        hellos: dict[int, Message] = {}
        while len(wires) < self.place.size - 1:
            wire = Wire(listener.accept()[0], 10)
            try:
                hello = wire.receive()
                known = hmac.compare_digest(str(hello["secret"]).encode(), secret.encode())
            except (OSError, EOFError, ValueError, LookupError, TypeError):
                known = False
            if known:  # else a stranger
                wire.sock.settimeout(stall())
                wire.send(stall=stall())
                wires[hello["rank"]], hellos[hello["rank"]] = wire, hello
            else:
                wire.sock.close()
        return wires, hellos

    def name(self, rank: int) -> str:
        """Return what people call a rank."""
        return f"rank {rank} ({self._hello[rank]['host']})"

    def _hear(self, rank: int) -> None:
        wire = self._wires[rank]
        try:
            while True:
                message = wire.receive()
                if "error" in message:
                    self.fail(f"{self.name(rank)}: {message['error']}")
                if "checked" in message:
                    self.on_checked(rank, message["checked"])
                if "answer" in message:
                    self._answers[rank].put(message)
        except TimeoutError:
            self.fail(f"{self.name(rank)} has been silent for {stall():g} s; see whether it sleeps or is cut off")
        except (OSError, EOFError, ValueError):
            self.fail(f"{self.name(rank)} died; start again")

    def fail(self, line: str) -> NoReturn:
        """End this process with a line, and the followers."""
        if self._over.is_set() or not self._failing.acquire(blocking=False):
            while True:
                time.sleep(60)  # it is over already: this thread has nothing to say
        for rank, wire in self._wires.items():
            with suppress(OSError):
                if wire.local:  # one that is stopped doesn't end by itself
                    os.kill(self._hello[rank]["pid"], signal.SIGKILL)
        end_with(f"{line} (the reply ends here)")

    def tell(self, op: str, *states: int, **given: Any) -> None:
        """Tell all followers of a call. Those told first are made first, everywhere."""
        with self._lock:
            gone = [self.dropped.popleft() for _ in range(len(self.dropped))]
            for rank, wire in self._wires.items():
                try:
                    if gone:
                        wire.send(op="drop", states=gone)
                    wire.send(op=op, states=states, **given)
                except OSError:
                    if not self._over.is_set():
                        self.fail(f"{self.name(rank)} died; start again")

    def answers(self) -> list[Any]:
        """Return what followers answer to the latest call that asks for it. Raises InputError, the first of theirs."""
        given = {rank: answers.get() for rank, answers in self._answers.items()}
        for rank, answer in given.items():
            if answer["answer"] is None:
                raise InputError(f"{self.name(rank)}: {answer['wrong']}")
        return [answer["answer"] for answer in given.values()]

    def close(self) -> None:
        """Let the followers end."""
        if not self._over.is_set():
            self._over.set()
            for wire in self._wires.values():
                with suppress(OSError):
                    wire.send(op="bye", states=[])


class Follower:
    """Another rank's end."""

    def __init__(self, place: Place) -> None:
        with _deadline("rank 0 did not come"):
            self.place, self.group = place, group_of(place.backend)
            port, *secret = from_first(self.group, [0] * 5)
            self._wire = Wire(socket.create_connection((place.address, port), timeout=10), 10)
            hello = {"secret": repr(secret), "rank": place.rank, "about": about(), "pid": os.getpid()}
            self._wire.send(host=platform.node() or place.rank, **hello)
            os.environ[STALL] = str(self._wire.receive().get("stall", stall()))
        self._wire.sock.settimeout(stall() + 5)
        self._calls: SimpleQueue[Message] = SimpleQueue()
        _thread(self._hear)
        _thread(_beat, [self._wire], threading.Event())

    def _hear(self) -> None:
        try:
            while True:
                message = self._wire.receive()
                if "op" in message:
                    self._calls.put(message)
                if message.get("op") == "bye":
                    time.sleep(5)  # for what is under way
                    os._exit(0)
        except (OSError, EOFError, ValueError):  # rank 0 is gone
            os._exit(FAILED)

    def calls(self) -> Iterator[Message]:
        """Yield rank 0's calls, in order, until it is done."""
        while (message := self._calls.get())["op"] != "bye":
            yield message

    def answer(self, value: Any) -> None:
        self._wire.send(answer=value)

    def refuse(self, error: Exception) -> None:
        """Answer that something was wrong with what was asked for."""
        self._wire.send(answer=None, wrong=str(error))

    def checked(self, **values: Any) -> None:
        self._wire.send(checked=values)

    def fail(self, error: Exception) -> NoReturn:
        """Tell rank 0 that this rank can't go on, and end this process."""
        with suppress(OSError):
            self._wire.send(error=" ".join(f"{error}".split()) or type(error).__name__)
            time.sleep(1)
        os._exit(FAILED)
