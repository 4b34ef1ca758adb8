"""The keyboard's side of `mlx-gemma4 chat`: a prompt of several lines with history and completion, and Ctrl-C.

In: keys. Out: messages. Knows nothing of models; what it completes and shows is passed in.
"""

import os
import signal
import sys
import termios
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter, WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.styles import Style

from ..paths import state_folder
from .options import say

_STYLE = Style.from_dict({"prompt": "bold", "bottom-toolbar": "noreverse fg:ansibrightblack"})


class TerminalPrompt:
    """Ask for one message at a time.

    Args:
        commands: each "/name" with a description, to complete.
        arguments: return the words that may follow a command; None: the name of a file.
    """

    def __init__(self, commands: Mapping[str, str], arguments: Callable[[str], Iterable[str] | None]) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=_history(),
            completer=_Commands(commands, arguments),
            complete_while_typing=Condition(lambda: get_app().current_buffer.text.startswith("/")),
            multiline=True,
            prompt_continuation=lambda width, line, wrapped: " " * width,
            key_bindings=_keys(),
            style=_STYLE,
            enable_suspend=True,
            reserve_space_for_menu=6,
        )

    def read(self, label: str, text: str, toolbar: str) -> str | None:
        """Return what is typed, "" after Ctrl-C, None after Ctrl-D.

        Args:
            text: what it begins with.
            toolbar: the line below the prompt.
        """
        try:
            return self._session.prompt([("class:prompt", label)], default=text, bottom_toolbar=toolbar)
        except EOFError:
            return None
        except KeyboardInterrupt:
            if not self._session.default_buffer.text and not text:
                say("Ctrl-D leaves. /help lists the commands.")
            return ""


def _keys() -> KeyBindings:
    """Bind Enter to send, Alt+Enter and Ctrl-J to begin a new line. Pasted text stays one message."""
    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    for combination in (("escape", "enter"), ("c-j",)):
        keys.add(*combination)(lambda event: event.current_buffer.insert_text("\n"))
    return keys


class _Commands(Completer):
    """Completes names of commands, then what may follow them."""

    def __init__(self, commands: Mapping[str, str], arguments: Callable[[str], Iterable[str] | None]) -> None:
        self._commands, self._arguments = commands, arguments
        self._names = WordCompleter(list(commands), meta_dict=commands, sentence=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        command, space, argument = document.text_before_cursor.partition(" ")
        if not space and command.startswith("/") and "\n" not in command:
            yield from self._names.get_completions(document, event)
        elif space and command in self._commands:
            words = self._arguments(command)
            paths = PathCompleter(expanduser=True)
            inner = paths if words is None else WordCompleter(list(words), sentence=True)
            yield from inner.get_completions(Document(argument), event)


class _PrivateHistory(FileHistory):
    """A file that only its owner may read, made when the first message is sent; memory if it can't be written."""

    def store_string(self, string: str) -> None:
        path = Path(os.fsdecode(self.filename))
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():
                return
            os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
            super().store_string(string)

    def load_history_strings(self) -> Iterable[str]:
        with suppress(OSError):
            if Path(os.fsdecode(self.filename)).is_file():
                return list(super().load_history_strings())
        return []


def _history() -> History:
    try:
        return _PrivateHistory(str(state_folder() / "history"))
    except RuntimeError:
        return InMemoryHistory()


@contextmanager
def quiet_terminal() -> Iterator[None]:
    """Keep keys out of a reply while it is written: they wait for the next prompt. Ctrl-C works."""
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    quiet: list[Any] = termios.tcgetattr(terminal)
    quiet[0] &= ~termios.ICRNL  # or a waiting Enter would become Ctrl-J
    quiet[3] = quiet[3] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH  # Ctrl-C, too, leaves them waiting
    termios.tcsetattr(terminal, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns True after a first Ctrl-C; a second Ctrl-C raises KeyboardInterrupt."""
    pressed = False

    def press(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
