"""`mlx-gemma4 chat`: a conversation at a prompt, or line by line in a pipe."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InputError
from .options import (
    EXIT_INTERRUPTED,
    echo,
    kv_option,
    load_with_progress,
    model_option,
    output_options,
    progress,
    sampling_from,
    sampling_options,
    set_up_logging,
)

if TYPE_CHECKING:
    from ..conversation.language_model import LanguageModel
    from ..conversation.reply import ReplyOptions
    from ..conversation.session import Session
    from .repl import Repl, ReplEnv, View


Read = Callable[[], str | None]  # the next message; None: there are no more


@click.command()
@model_option
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@click.option("--think/--no-think", default=None, help="Whether the model thinks first.  [default: the template's]")
@click.option(
    "-n", "--max-tokens", type=click.IntRange(1), help="Length of a reply.  [default: what the context holds]"
)
@sampling_options
@click.option("--state", "state_file", metavar="FILE", help="Go on with the conversation saved there, and save it.")
@kv_option
@output_options
def chat(
    model: str | None,
    system: str | None,
    think: bool | None,
    max_tokens: int | None,
    state_file: str | None,
    kv: str,
    verbose: bool,
    debug: bool,
    **flags: Any,
) -> None:
    """Talk with a model. /help lists the commands at the prompt.

    Where input or output is no terminal, each line of standard input is a message, and replies go to standard output.
    """
    from ..conversation.reply import ReplyOptions
    from .repl import Repl

    set_up_logging(verbose or debug)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    lm, _ = load_with_progress(model)
    sampling = partial(sampling_from, flags=flags)
    options = ReplyOptions(max_tokens=max_tokens, sampling=sampling(lm), think=think)
    rich = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    around = _surroundings(rich, sampling, kv)
    repl = Repl(around, {"main": _open(around, lm, state_file, system, options)}, options)
    try:
        with (
            _saved_at_the_end(repl, state_file),
            _terminal(repl) if rich else nullcontext(partial(_line, repl)) as read,
        ):
            failed = converse(repl, read)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(InputError("").exit_code if failed and not sys.stdin.isatty() else 0)


def converse(repl: Repl, read: Read) -> bool:
    """Take messages until there are no more. Mistakes are told and change nothing; whether there were any."""
    from .repl import Leave

    failed = False
    while (line := read()) is not None:
        try:
            repl.take(line)
        except Leave:
            break
        except (InputError, RuntimeError, MemoryError) as error:  # MLX reports as RuntimeError that memory ran out
            failed = True
            echo(" ".join(str(error).split()) or type(error).__name__)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            echo("Interrupted.")
    return failed


def _open(around: ReplEnv, lm: LanguageModel, path: str | None, system: str | None, options: ReplyOptions) -> Session:
    """The saved conversation, where there is one."""
    first = [{"role": "system", "content": system}] if system else []
    if not path or not Path(path).exists():
        return around.session(lm, first, options)
    session = around.opened(lm, Path(path), options)
    if system is not None:
        session.messages = [*first, *(m for m in session.messages if m.get("role") != "system")]
    return session


@contextmanager
def _saved_at_the_end(repl: Repl, path: str | None) -> Iterator[None]:
    """However it ends, a terminal that is closed and a polite kill included."""
    if path:
        for name in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        if path and repl.session.messages:
            repl.session.save(path)


def _surroundings(rich: bool, sampling: Callable[[LanguageModel], Any], kv: str) -> ReplEnv:
    from .repl import ReplEnv

    if rich:
        from .reply_screen import ReplyScreen, console_for_replies, printable

        console = console_for_replies()
        view: Callable[[bool], View] = partial(ReplyScreen, console)
        show = lambda line: console.print(printable(line), markup=False, highlight=False)  # noqa: E731
    else:
        view, show = lambda unfolded: PlainReply(), click.echo
    return ReplEnv(
        view=view,
        say=show,
        stoppable=_stoppable,
        reading=lambda: progress("Reading", 1, " tokens"),
        load=lambda name: load_with_progress(name)[0],
        sampling=sampling,
        state=lambda lm: lm.model.new_state(kv=kv),
        drafts=rich,
    )


def _stoppable() -> AbstractContextManager[Callable[[], bool]]:
    """In a pipe, Ctrl-C ends the whole program."""
    if not sys.stdin.isatty():
        return nullcontext(lambda: False)
    from .terminal import stoppable

    return stoppable()


class PlainReply:
    """A reply as it comes, on standard output; what is said about it goes to standard error."""

    def __init__(self) -> None:
        self._last = "\n"

    def text(self, piece: str) -> None:
        click.echo(piece, nl=False)
        self._last = piece or self._last

    def think(self, piece: str) -> None:
        pass

    def fold(self, tokens: int) -> None:
        pass

    def note(self, line: str) -> None:
        self.close()
        echo(line)

    def close(self) -> None:
        if not self._last.endswith("\n"):
            self.text("\n")


@contextmanager
def _terminal(repl: Repl) -> Iterator[Read]:
    """A prompt with everything."""
    from .repl import COMMANDS
    from .terminal import TerminalPrompt, quiet_terminal

    about = {name: command.about for name, command in COMMANDS.items()}
    prompt = TerminalPrompt(about, repl.arguments)
    lm = repl.session.lm
    repl.around.say(f"{lm.path.name}. /help lists the commands, Ctrl-D leaves.")
    with quiet_terminal():
        yield lambda: prompt.read(repl.label, repl.draft, repl.status())


def _line(repl: Repl) -> str | None:
    """A line of standard input. On a plain terminal it is asked for."""
    asked = sys.stdin.isatty()
    while True:
        if asked:
            click.echo(repl.label, nl=False, err=True)
        try:
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        except KeyboardInterrupt:
            if not asked:
                raise
            echo("Ctrl-D leaves. /help lists the commands.")
