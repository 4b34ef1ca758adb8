"""The loop of `mlx-gemma4 chat`: lines from a terminal or a pipe go to a `Repl`, replies to the screen or a pipe.

In: the command's options, then lines of standard input. Out: replies and answers to commands. What a line does is in
repl.py; the keyboard's side is terminal.py, the screen's reply_screen.py.
"""

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import click

from ..conversation.language_model import LanguageModel
from ..conversation.reply import ReplyOptions
from ..conversation.session import Session
from ..errors import InputError, one_line, printable
from .options import SamplingOf, echo, load_with_progress, progress, say
from .repl import COMMANDS, Leave, Repl, ReplEnv, View
from .reply_screen import ReplyScreen, console_for_replies
from .terminal import TerminalPrompt, quiet_terminal, stoppable

Read = Callable[[], str | None]  # the next message; None: there are no more


def chat_loop(
    model: str | None,
    system: str | None,
    think: bool | None,
    think_budget: int | None,
    max_tokens: int | None,
    sampling: SamplingOf,
    state_file: str | None,
    kv: str,
    image_tokens: int | None,
    draft_max: int,
) -> bool:
    """Hold a conversation until there are no more messages; return True if a line failed."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if state_file:
        Session.check_place(state_file)
    lm, _ = load_with_progress(model, kv, draft_max=draft_max)
    options = ReplyOptions(max_tokens, sampling(lm), think=think, think_budget=think_budget)
    rich = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    env = _repl_env(rich, sampling, kv, draft_max, image_tokens)
    repl = Repl(env, {"main": _open(lm, state_file, system, options, kv)}, options)
    with _saved_at_the_end(repl, state_file), _terminal(repl) if rich else nullcontext(partial(_line, repl)) as read:
        return _converse(repl, read)


def _converse(repl: Repl, read: Read) -> bool:
    """Take messages until there are no more; print errors. Return True if there was one."""
    failed = False
    while (line := read()) is not None:
        try:
            repl.take(line)
        except Leave:
            break
        except (InputError, RuntimeError, MemoryError) as error:  # MLX reports as RuntimeError that memory ran out
            failed = True
            echo(one_line(str(error)) or type(error).__name__)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            echo("Interrupted.")
    return failed


def _open(lm: LanguageModel, path: str | None, system: str | None, options: ReplyOptions, kv: str) -> Session:
    """Open the saved conversation if there is one, else begin a new one."""
    new = Session(lm, system, options=options, kv=kv)
    if not path or not Path(path).exists():
        return new
    session = Session.load(lm, path, options=options, kv=kv)
    if system is not None:
        session.messages = [*new.messages, *(m for m in session.messages if m.get("role") != "system")]
    return session


@contextmanager
def _saved_at_the_end(repl: Repl, path: str | None) -> Iterator[None]:
    """Save the conversation however it ends, also when the terminal is closed or SIGTERM comes."""
    if path:
        for name in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        if path and repl.session.messages:
            repl.session.save(path)


def _repl_env(rich: bool, sampling: SamplingOf, kv: str, draft_max: int, image_tokens: int | None) -> ReplEnv:
    console = console_for_replies()
    screen: Callable[[bool], View] = partial(ReplyScreen, console)
    return ReplEnv(
        view=screen if rich else lambda unfolded: PlainReply(),
        echo=(lambda line: console.print(printable(line), markup=False, highlight=False)) if rich else say,
        stoppable=stoppable if sys.stdin.isatty() else lambda: nullcontext(lambda: False),  # Ctrl-C ends a pipe
        reading=lambda: progress("Reading", 1, " tokens"),
        load=lambda name: load_with_progress(name, kv, draft_max=draft_max)[0],
        sampling=sampling,
        kv=kv,
        drafts=rich,
        draw=partial(click.echo, nl=False) if rich else None,
        image_tokens=image_tokens,
    )


class PlainReply:
    """A reply as it comes, on standard output; notes about it go to standard error."""

    def __init__(self) -> None:
        self._last = "\n"

    def text(self, piece: str) -> None:
        say(piece, end="")
        self._last = piece or self._last

    def think(self, piece: str) -> None: ...
    def fold(self, tokens: int) -> None: ...

    def note(self, line: str) -> None:
        self.close()
        echo(line)

    def close(self) -> None:
        if not self._last.endswith("\n"):
            self.text("\n")


@contextmanager
def _terminal(repl: Repl) -> Iterator[Read]:
    """A prompt with history, completion and a toolbar."""
    prompt = TerminalPrompt({name: command.about for name, command in COMMANDS.items()}, repl.arguments)
    repl.env.echo(f"{repl.session.lm.path.name}. /help lists the commands, Ctrl-D leaves.")
    with quiet_terminal():
        yield lambda: prompt.read(repl.label, repl.draft, repl.status())


def _line(repl: Repl) -> str | None:
    """Read a line of standard input. On a plain terminal, a label asks for it."""
    asked = sys.stdin.isatty()
    while True:
        if asked:
            say(repl.label, end="", err=True)
        try:
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        except KeyboardInterrupt:
            if not asked:
                raise
            echo("Ctrl-D leaves. /help lists the commands.")
