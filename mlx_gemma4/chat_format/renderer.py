"""Runs chat templates in a process of their own (sandbox.py), bounded in time and memory.

In: a template, what it is given, stand-ins. Out: the text, or an InputError. One process serves all renderings, in
turns, and another one follows where it had to be ended. Knows nothing of tokens.
"""

import atexit
import marshal
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import InputError

HEAD = struct.Struct("<Qd")  # of a frame: its length, and the seconds of CPU that it may take
MEMORY = 800 << 20  # bytes of address space of the process; a tenth of it is Python's own
LONGEST = 1 << 26  # bytes of a prompt
SECONDS = 2.0  # of CPU that a rendering may take, and so many more for each million bytes of messages
PATIENCE = 120.0  # seconds on the clock, on a machine that is busy
LOOK = 100  # milliseconds between two looks at its memory, which no limit bounds on a Mac
_SAYS = {
    "T": "",
    "R": "the model's chat template refuses these messages: ",
    "N": "the messages are nested too deeply, or the model's chat template is",
    "M": "the model's chat template takes too much memory: its code may be broken",
    "F": "the model's chat template failed: ",
}


class _Renderer:
    """The process, started when it is first needed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started it: a fork of that one must not use it

    def start(self) -> subprocess.Popen[bytes]:
        """Return the running process."""
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self.close()
            self._owner = os.getpid()
            file = Path(__file__).with_name("sandbox.py")
            command = [
                sys.executable,
                "-I",
                "-S",
                str(file),
                str(MEMORY),
                *(path for path in sys.path if Path(path).is_absolute()),
            ]
            pipe, null = subprocess.PIPE, subprocess.DEVNULL
            try:  # in a session of its own: Ctrl-C is not for it
                self._process = subprocess.Popen(
                    command, stdin=pipe, stdout=pipe, stderr=null, start_new_session=True, bufsize=0
                )
            except OSError as error:
                raise InputError(f"{sys.executable}: can't be started to render chat templates ({error})") from error
        return self._process

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()

    def render(self, frame: bytes, seconds: float) -> str:
        """Send a frame; return the text that comes back. Raises InputError."""
        with self.lock:
            process = self.start()
            try:
                letter, text = self._exchange(process, HEAD.pack(len(frame), seconds) + frame)
            except (OSError, ValueError, EOFError):  # it has ended
                with suppress(subprocess.TimeoutExpired):
                    process.wait(5)
                self.close()
                what = {-signal.SIGPROF: "took too long", -signal.SIGKILL: "takes too much memory"}
                problem = what.get(process.returncode, "can't be run")
                raise InputError(f"the model's chat template {problem}: its code may be broken") from None
            except BaseException:  # Ctrl-C: half an answer is on its way
                self.close()
                raise
            if letter == "M":  # it ends
                self.close()
        if letter == "T":
            return text
        raise InputError(_SAYS[letter] + (text if letter in "RF" else ""))

    def _exchange(self, process: subprocess.Popen[bytes], frame: bytes) -> tuple[str, str]:
        assert process.stdin is not None and process.stdout is not None
        data = memoryview(frame)
        while data:
            data = data[process.stdin.write(data) :]
        end = time.monotonic() + PATIENCE
        head = self._read(process, 9, end)
        size = int.from_bytes(head[1:], "little")
        if size > LONGEST or chr(head[0]) not in _SAYS:
            raise ValueError
        return chr(head[0]), self._read(process, size, end).decode("utf-8", "surrogatepass")

    def _read(self, process: subprocess.Popen[bytes], size: int, end: float) -> bytearray:
        """Read so many bytes, looking at the process's memory while they take their time."""
        assert process.stdout is not None
        data, there = bytearray(), select.poll()
        there.register(process.stdout, select.POLLIN)
        while len(data) < size:
            if not there.poll(LOOK):
                if memory_of(process.pid) > MEMORY or time.monotonic() > end:
                    process.kill()
                continue
            piece = process.stdout.read(min(size - len(data), 1 << 20))
            if not piece:
                raise EOFError
            data += piece
        return data


def memory_of(pid: int) -> int:
    """Return the bytes of memory that a process holds; 0 where that can't be told."""
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        command = ["ps", "-o", "rss=", "-p", str(pid)]
        return 1024 * int(subprocess.run(command, capture_output=True, timeout=5, check=True).stdout)
    return 0


_renderer = _Renderer()


def close() -> None:
    """End the process; the next rendering starts another."""
    with _renderer.lock:
        _renderer.close()


def start() -> None:
    """Start the process, so that the first rendering finds it ready. Raises InputError."""
    with _renderer.lock:
        _renderer.start()


atexit.register(_renderer.close)


def render(source: str, variables: Mapping[str, Any], there: Mapping[int, str]) -> str:
    """Render a template.

    Args:
        variables: of JSON's types.
        there: ordinal of a character -> the stand-in that `variables` have in its place.

    Raises:
        InputError: it fails, refuses the messages, or takes too long or too much memory.
    """
    frame = marshal.dumps((source, dict(variables), dict(there)))
    return _renderer.render(frame, SECONDS * (1 + len(frame) / 1e6))
