"""The link beside MLX's own: a line of TCP from rank 0 to each follower, on which calls are told and a dead rank shows.

In: messages, JSON objects of a line each. Out: the same, in order; and the end of this process with one line on stderr
when another rank is dead, silent or reports an error: what waits in a collective can't be stopped otherwise. Rank 0
listens on the address that the hostfile names for it, and tells nothing to who does not know a secret that has gone
over MLX's link.
"""

from __future__ import annotations

import hmac
import json
import math
import os
import platform
import secrets
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any, NoReturn

from .. import __version__
from ..doctor.verdict import MLX
from ..errors import InputError
from ..memory import on_cpu
from ..shard import counted
from .place import Place, from_first, group_of

Message = dict[str, Any]

STALL = "MLX_GEMMA4_STALL"  # seconds of silence after which a rank is taken for dead
JOINING = 90.0  # seconds that ranks may take to find each other
SLOW = 0.25  # seconds that a CPU may take for a token, beside those
RECORDING = 120.0  # seconds that the first step of a kind may take to be recorded, beside those
FAILED = 1  # exit code


def stall() -> float:
    """Return after how many seconds of silence a rank is taken for dead."""
    return float(os.environ.get(STALL, "30"))


def about() -> Message:
    """Return what must be the same on all ranks."""
    return {"mlx-gemma4": __version__, "mlx": MLX}


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


def of_link(error: Exception) -> bool:
    """Return True if MLX's link has failed: its backends begin with their names, as in "[ring] .."."""
    return isinstance(error, RuntimeError) and str(error).startswith("[")


def _beat(wires: list[Wire], over: threading.Event, how: Callable[[], Message] = dict) -> None:
    """Send a message now and then, so that the other end knows this process alive, and how it is."""
    while not over.wait(min(1.0, stall() / 5)):
        for wire in wires:
            with suppress(OSError):  # who receives there sees it
                wire.send(beat=how())


def _thread(target: Callable[..., None], *args: Any) -> None:
    threading.Thread(target=target, args=args, daemon=True).start()


@contextmanager
def _deadline() -> Iterator[None]:
    """End this process if the block isn't through in JOINING seconds.

    While MLX connects it lets no thread of Python's run, so another process looks at the clock.
    """
    line = "mlx-gemma4: MLX's own link between the ranks did not come up; let its ports through the firewall"
    script = f'sleep {JOINING:g}; echo "{line}" >&2; kill -9 {os.getpid()}'
    clock = subprocess.Popen(["/bin/sh", "-c", script], stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(clock.pid, signal.SIGKILL)
        clock.wait()


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
        self._wires: dict[int, Wire] = {}
        self._hello: dict[int, Message] = {}
        self._accept()
        self._answers: dict[int, SimpleQueue[Message]] = {rank: SimpleQueue() for rank in self._wires}
        self._at: dict[int, list[int]] = {rank: [] for rank in self._wires}  # how far each is, as it said last
        for rank, hello in self._hello.items():
            for what, mine in about().items():
                if hello["about"].get(what) != mine:
                    self.close()
                    raise InputError(
                        f"{self.name(rank)} has {what} {hello['about'].get(what)}, rank 0 has {mine}; install the same"
                    )
        for wire in self._wires.values():
            wire.send(stall=stall())
        with _deadline():
            self.group = group_of(place.backend)
            secret = from_first(self.group, [secrets.randbits(31) for _ in range(4)])
        for rank, wire in self._wires.items():
            if not hmac.compare_digest(str(wire.receive().get("secret")), str(secret)):
                raise InputError(f"{self.name(rank)} is a stranger; see who connects to port {place.port} here")
            wire.sock.settimeout(stall())
        for rank in self._wires:
            _thread(self._hear, rank)
        _thread(_beat, [*self._wires.values()], self._over)

    def _accept(self) -> None:
        """Wait until each follower has said who it is. Raises InputError."""
        place, end = self.place, time.monotonic() + JOINING
        family = socket.AF_INET6 if ":" in place.address else socket.AF_INET
        try:
            with socket.create_server((place.address, place.port), family=family) as listener:
                while len(self._wires) < place.size - 1:
                    listener.settimeout(max(0.1, end - time.monotonic()))
                    wire = Wire(listener.accept()[0], JOINING)
                    hello = wire.receive()
                    self._wires[int(hello["rank"])], self._hello[int(hello["rank"])] = wire, hello
        except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
            why = "they did not come" if isinstance(error, TimeoutError) else str(error) or "one left"
            raise InputError(
                f"{place.size - 1 - len(self._wires)} of {place.size} ranks have not joined at {place.address} port "
                f"{place.port} ({why}); run mlx-gemma4 hosts check to see the reason"
            ) from error

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
                if beat := message.get("beat"):
                    self._at[rank] = beat["at"]
                    if beat["since"] > stall():
                        self._stuck()
        except TimeoutError:
            self.fail(f"{self.name(rank)} has been silent for {stall():g} s; see whether it sleeps or is cut off")
        except (OSError, EOFError, ValueError):
            self.fail(f"{self.name(rank)} died; start again")

    def _stuck(self) -> NoReturn:
        """End with a line about those that are behind all others: who waits for them is stuck as well."""
        least = min(self._at.values())
        names = " and ".join(self.name(rank) for rank, at in self._at.items() if at == least)
        self.fail(f"{names}: alive, but no further for {stall():g} s; see what holds the program or its GPU")

    def fail(self, line: str) -> NoReturn:
        """End this process with a line, and the followers."""
        if self._over.is_set() or not self._failing.acquire(blocking=False):
            while True:
                time.sleep(60)  # it is over already: this thread has nothing to say
        for rank, wire in self._wires.items():
            with suppress(OSError):
                if wire.local:  # one that is stopped doesn't end by itself
                    os.kill(self._hello[rank]["pid"], signal.SIGKILL)
        time.sleep(0.1)  # what MLX's link prints about it, in pieces, comes before, and not into this line
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
        self.place, self._wire = place, Wire(self._connect(place), JOINING)
        self._wire.send(rank=place.rank, about=about(), pid=os.getpid(), host=platform.node() or place.address)
        first = self._wire.receive()
        if "stall" not in first:  # rank 0 has another version, and says so
            sys.exit(0)
        os.environ[STALL] = str(first["stall"])
        with _deadline():
            self.group = group_of(place.backend)
            self._wire.send(secret=str(from_first(self.group, [0] * 4)))
        self._wire.sock.settimeout(stall() + 5)
        self._calls: SimpleQueue[Message] = SimpleQueue()
        self._later: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self.later = self._later.put  # what waits for evaluations: a thread does it, in this order
        self._made, self._under_way = 0, deque[float]()  # calls, and when those that aren't over were begun
        _thread(self._hear)
        _thread(self._wait)
        _thread(_beat, [self._wire], threading.Event(), self._how)

    def _connect(self, place: Place) -> socket.socket:
        end = time.monotonic() + JOINING
        while True:
            try:
                return socket.create_connection((place.address, place.port), timeout=10)
            except OSError as error:  # rank 0 may be on its way
                if time.monotonic() > end:
                    raise InputError(
                        f"rank 0 can't be reached at {place.address} port {place.port} ({error})"
                    ) from error
                time.sleep(0.2)

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

    def _how(self) -> Message:
        begun = min(self._under_way, default=math.inf)
        return {"at": [self._made, *counted], "since": max(0.0, time.monotonic() - begun)}

    def _wait(self) -> None:
        try:
            while True:
                self._later.get()()
        except Exception as error:  # what an evaluation raises
            self.fail(error)

    @contextmanager
    def at_work(self, tokens: int, more: float = 0.0) -> Iterator[None]:
        """Make a call that reads so many tokens. It is over when all is done that `later` was given meanwhile.

        Args:
            more: seconds that it may take beside those of every call.
        """
        self._under_way.append(time.monotonic() + more + (SLOW * tokens if on_cpu() else 0.0))
        yield
        self._made += 1
        self.later(self._under_way.popleft)

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
        if of_link(error):
            time.sleep(2)  # rank 0 hears by itself who has died
        with suppress(OSError):
            self._wire.send(error=" ".join(f"{error}".split()) or type(error).__name__)
            time.sleep(1)
        os._exit(FAILED)
