"""A conversation at a prompt: each line is a message to the model, or a command that changes the conversation.

In: one message or command at a time. Out: replies on a `View`, lines about commands. Built on `session.Session`, which
rewinds the KV state, so that undo and retry read nothing again. Knows no terminal: see terminal.py, reply_screen.py.
"""

import difflib
import re
import shlex
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..chat_format.messages import media_parts
from ..chat_format.replies import Event, Text, Thinking, ToolCall
from ..conversation.background import OnPrompt
from ..conversation.language_model import LanguageModel
from ..conversation.parts import content_of
from ..conversation.reply import ReplyOptions
from ..conversation.session import Session
from ..errors import InputError
from ..kv.state import total_nbytes
from ..media.kind import KINDS
from .attachments import attachment, dropped, opened, preview, text_of
from .options import SamplingOf


class View(Protocol):
    """A place that shows a reply."""

    def text(self, piece: str) -> None: ...
    def think(self, piece: str) -> None: ...
    def fold(self, tokens: int) -> None: ...  # a thought of so many tokens has ended
    def note(self, line: str) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class ReplEnv:
    """The surroundings of a conversation: terminal or pipe, and the command's options."""

    view: Callable[[bool], View]  # of a reply; True: thoughts stay on it
    echo: Callable[[str], None]  # print a line
    # Context of a reply; its function returns True once the reply should stop.
    stoppable: Callable[[], AbstractContextManager[Callable[[], bool]]]
    reading: Callable[[], AbstractContextManager[OnPrompt]]  # context in which a prompt is read
    load: Callable[[str], LanguageModel]  # a model by its name
    sampling: SamplingOf
    kv: str  # kind of keys and values of new states
    drafts: bool  # a prompt can begin with a text
    draw: Callable[[str], None] | None = None  # writes a thumbnail's codes; None: they can't be shown
    image_tokens: int | None = None  # of a picture, at most


class Leave(Exception):
    """Raised by /quit."""


@dataclass
class Repl:
    """The conversations at a prompt: branches, each a Session, one of them the current one."""

    env: ReplEnv
    branches: dict[str, Session]
    options: ReplyOptions
    branch: str = "main"
    unfolded: bool = False  # thoughts stay on the screen
    draft: str = ""  # text that the next prompt begins with; what is sent then replaces the last message
    attached: list[dict[str, Any]] = field(default_factory=list)  # what goes with the next message
    _retries: int = field(default=0, repr=False)

    @property
    def session(self) -> Session:
        return self.branches[self.branch]

    @property
    def label(self) -> str:
        return "> " if self.branch == "main" else f"{self.branch}> "

    def status(self) -> str:
        """Return a line with the context and memory in use."""
        tokens, context = self.session.state.length, self.session.lm.config.context
        held = total_nbytes(session.state for session in self.branches.values())
        more = f", {len(self.attached)} attached" * bool(self.attached) + ", thinking" * bool(self.options.think)
        return f"{tokens:,} / {context:,} tokens, {_megabytes(held)}" + more

    def take(self, line: str) -> None:
        """Handle a line: a message, or a "/command"; "//" begins a message with a slash. Raises InputError.

        Paths of pictures and sounds, alone or in quotes, attach these: terminals paste them for what is dropped.
        """
        draft, self.draft = self.draft, ""
        command = re.fullmatch(r"/(\w*)(?:\s+(.*))?", line.strip(), re.DOTALL)
        files, text = dropped(line.strip(), within=not command and self.session.lm.media is not None)
        for kind, name in files:
            self._attach(kind, name)
        if files and not text:
            return
        if command:
            self._run(f"/{command[1]}", (command[2] or "").strip())
        elif not text:
            if draft:
                self.env.echo("Left as it was.")
        else:
            self._say(text[1:] if text.startswith("//") else text, again=bool(draft))

    def _say(self, text: str, again: bool) -> None:
        """Send a message with what is attached, or again in place of the last one, which keeps what it had."""
        before = media_parts([{"content": self.session.last_said}]) if again else ()
        content = content_of(text, [*before, *self.attached])
        if again:
            self._answer(lambda on_prompt: self.session.edit(content, self.options, on_prompt=on_prompt))
        else:
            message = {"role": "user", "content": content}
            self._answer(lambda on_prompt: self.session.send(message, self.options, on_prompt=on_prompt))
        self.attached = []

    def _attach(self, kind: str, name: str) -> None:
        """Let a file go with the next message. It is encoded at once: what is wrong with it shows here."""
        lm = self.session.lm
        part = attachment(kind, name, f"/{kind}", self.env.image_tokens)
        if lm.media is None:
            raise InputError(f"/{kind} {name}: no mmproj file is loaded; start with --mmproj FILE")
        picture = opened(part)
        pieces = lm.media.encode(part, picture)
        tokens = sum(len(piece.ids) for piece in pieces if not isinstance(piece, str))
        size, codes = preview(picture)
        if self.env.draw and codes:
            self.env.draw(codes)
        self.env.echo(f"[{kind}] {part['name']}{size}, {_counted(tokens, 'token')}")
        self.attached.append(part)

    def arguments(self, command: str) -> Iterable[str] | None:
        """Return the words that may follow a command; None: the name of a file."""
        if command in ("/save", "/load", "/model", *(f"/{kind}" for kind in KINDS)):
            return None
        return {"/think": ["on", "off"], "/fork": list(self.branches)}.get(command, [])

    def close(self) -> None:
        for session in self.branches.values():
            session.close()

    def _run(self, name: str, argument: str) -> None:
        command = COMMANDS.get(name)
        if command is None:
            near = difflib.get_close_matches(name, COMMANDS, 1)
            raise InputError(f"{name} is no command; " + (f"the nearest is {near[0]}" if near else "/help lists them"))
        if argument and not command.usage:
            raise InputError(f"{name} takes nothing after it; it {command.about}")
        command.run(self, argument)

    def _answer(self, start: Callable[[OnPrompt], Generator[Event, None, None]]) -> None:
        """Show a reply as it is made, until it ends or is stopped."""
        with self.env.stoppable() as stopped, closing(self.env.view(self.unfolded)) as view:
            begun = False
            try:
                with self.env.reading() as update:

                    def check(done: int, total: int) -> None:
                        if stopped():
                            raise KeyboardInterrupt
                        update(done, total)

                    events = start(check)
                    first = next(events, None)
                begun = True
                with closing(events):
                    self._show(view, chain([first] if first else [], events), stopped)
            except KeyboardInterrupt:
                if not stopped():
                    raise
            if begun:
                self._note_the_end(view)
            else:
                view.note("Stopped before the reply began; the conversation is as it was.")

    def _show(self, view: View, events: Iterable[Event], stopped: Callable[[], bool]) -> None:
        counted = 0  # tokens of the reply before the current event's stretch
        reply = self.session.reply
        assert reply is not None
        thinking = False
        for event in events:
            if thinking and not isinstance(event, Thinking):
                view.fold(len(reply.tokens) - 1 - counted)
            thinking = isinstance(event, Thinking)
            if not thinking:
                counted = len(reply.tokens)
            if isinstance(event, ToolCall):
                view.note(f"calls {event.raw}")
            elif isinstance(event, Text | Thinking):
                (view.think if thinking else view.text)(event.text)
            if stopped():
                break
        if thinking:
            view.fold(len(reply.tokens) - counted)

    def _note_the_end(self, view: View) -> None:
        reply = self.session.reply
        if reply is None or reply.finish_reason == "cancelled":
            view.note("(stopped)")
        elif reply.finish_reason == "length":
            cut = self.options.max_tokens is not None and len(reply.tokens) >= self.options.max_tokens
            why = f"at --max-tokens {self.options.max_tokens}" if cut else "where the context is full: /undo or /clear"
            view.note(f"(cut {why})")

    def _system(self, argument: str) -> None:
        messages = self.session.messages
        has = bool(messages) and messages[0].get("role") == "system"
        if not argument:
            self.env.echo(f"System: {messages[0]['content']}" if has else "No system prompt; /system TEXT gives one.")
            return
        first = [] if argument == "none" else [{"role": "system", "content": argument}]
        self.session.messages = [*first, *messages[has:]]
        self.env.echo("System prompt removed." if argument == "none" else "System prompt set.")

    def _undo(self, argument: str) -> None:
        said = self.session.undo()
        if said is None:
            raise InputError("there is nothing to take back")
        line = " ".join(said.split())
        self.env.echo(f"Took back: {line if len(line) <= 60 else line[:59] + '…'}")

    def _retry(self, argument: str) -> None:
        options, sampling = self.options, self.options.sampling
        if sampling and sampling.seed is not None:  # else the same reply would come again
            self._retries += 1
            options = replace(options, sampling=replace(sampling, seed=sampling.seed + self._retries))
        self._answer(lambda on_prompt: self.session.retry(options, on_prompt=on_prompt))

    def _edit(self, argument: str) -> None:
        said = self.session.last_said
        if said is None:
            raise InputError("there is nothing to edit yet")
        if argument:
            self._say(argument, again=True)
        elif not self.env.drafts:
            raise InputError("/edit: give the new text after it")
        else:
            text = text_of(said)
            self.draft = f"/{text}" if text.startswith("/") else text

    def _save(self, argument: str) -> None:
        path = _path("/save", argument)
        self.session.save(path)
        self.env.echo(f"Saved as {path}, and what the model has read beside it.")

    def _load(self, argument: str) -> None:
        path = _path("/load", argument)
        loaded = Session.load(self.session.lm, path, options=self.options, kv=self.env.kv)
        self.session.close()
        self.branches[self.branch] = loaded
        self.env.echo(f"{_turns(loaded)} loaded.")

    def _fork(self, argument: str) -> None:
        if not argument:
            for name, session in self.branches.items():
                here = "*" if name == self.branch else " "
                self.env.echo(f"{here} {name}: {_turns(session)}, {_counted(session.state.length, 'token')}")
            return
        if not re.fullmatch(r"[\w.-]{1,40}", argument):
            raise InputError(f"/fork {argument}: a name is letters, digits, dots and dashes, at most 40")
        new = argument not in self.branches
        if new:
            self.branches[argument] = self.session.fork()
        came_from, self.branch = self.branch, argument
        self.env.echo(f"Now on {argument}, " + (f"branched from {came_from}." if new else _turns(self.session) + "."))

    def _stats(self, argument: str) -> None:
        session, reply = self.session, self.session.reply
        if reply:
            s = reply.statistics
            read, made = _counted(s.prompt_tokens, "token"), _counted(s.reply_tokens, "token")
            self.env.echo(f"Prompt: {read} read, {s.prompt_rate:.1f} a second; {s.reused_tokens:,} reused.")
            self.env.echo(f"Reply: {made}, {s.reply_rate:.1f} a second.")
            if s.drafted_tokens:
                share = f"{s.accepted_tokens:,} of {s.drafted_tokens:,} accepted"
                self.env.echo(f"Drafts: {share}, {s.tokens_per_step:.2f} tokens a step.")
            self.env.echo(f"Peak memory of arrays: {_megabytes(s.peak_memory)}.")
        self.env.echo(f"Conversation: {_turns(session)}, {self.status()}.")

    def _model(self, argument: str) -> None:
        if not argument:
            self.env.echo(f"{self.session.lm.path}; /model PATH takes another.")
            return
        lm = self.env.load(argument)
        options = replace(self.options, sampling=self.env.sampling(lm))
        branches = {
            name: Session(lm, messages=session.messages, options=options, kv=self.env.kv)
            for name, session in self.branches.items()
        }
        self.close()
        self.branches, self.options = branches, options
        self.env.echo(f"Now {lm.path.name}; it reads the conversation with the next message.")

    def _think(self, argument: str) -> None:
        if argument in ("on", "off"):
            self.options = replace(self.options, think=argument == "on")
            for session in self.branches.values():
                session.options = self.options
            self.env.echo(f"Thinking is {argument} from the next message.")
            return
        if argument:
            raise InputError(f"/think {argument}: say on or off, or nothing to show or hide thoughts")
        self.unfolded = not self.unfolded
        if not self.unfolded:
            self.env.echo("Thoughts are folded.")
            return
        replies = [m for m in self.session.messages if m.get("role") == "assistant"]
        thought = str(replies[-1].get("reasoning_content") or "") if replies else ""
        self.env.echo(thought or "There is no thought yet.")
        self.env.echo("Thoughts stay unfolded; /think folds them again.")

    def _clear(self, argument: str) -> None:
        old, self.attached = self.session, []
        system = [m for m in old.messages[:1] if m.get("role") == "system"]
        self.branches[self.branch] = Session(old.lm, messages=system, options=self.options, kv=self.env.kv)
        old.close()
        self.env.echo("A new conversation" + (" with the same system prompt." if system else "."))

    def _help(self, argument: str) -> None:
        for name, command in COMMANDS.items():
            self.env.echo(f"{f'{name} {command.usage}':<18}{command.about}")
        self.env.echo("Enter sends, Alt+Enter or Ctrl-J begins a new line. // begins a message with a slash.")
        self.env.echo("Ctrl-C stops the reply, Ctrl-D leaves.")

    def _quit(self, argument: str) -> None:
        raise Leave


class Command(NamedTuple):
    usage: str  # of its argument
    about: str
    run: Callable[[Repl, str], None]  # with the text after its name


def _attaches(kind: str) -> Callable[[Repl, str], None]:
    return lambda repl, argument: repl._attach(kind, str(_path(f"/{kind}", argument)))


COMMANDS = {
    "/image": Command("FILE", "attaches a picture to your next message", _attaches("image")),
    "/audio": Command("FILE", "attaches a sound", _attaches("audio")),
    "/video": Command("FILE", "attaches a video", _attaches("video")),
    "/system": Command("[TEXT]", "shows or sets the system prompt; none removes it", Repl._system),
    "/undo": Command("", "takes back your last message and its reply", Repl._undo),
    "/retry": Command("", "makes another reply to your last message", Repl._retry),
    "/edit": Command("[TEXT]", "changes your last message", Repl._edit),
    "/save": Command("FILE", "saves the conversation", Repl._save),
    "/load": Command("FILE", "goes on with a saved conversation", Repl._load),
    "/fork": Command("[NAME]", "begins a branch or goes to it; alone, lists them", Repl._fork),
    "/stats": Command("", "shows speed, memory and tokens of the last reply", Repl._stats),
    "/model": Command("[PATH]", "takes another model; the conversation stays", Repl._model),
    "/think": Command("[on|off]", "switches thinking; alone, shows or hides thoughts", Repl._think),
    "/clear": Command("", "begins anew; the system prompt stays", Repl._clear),
    "/help": Command("", "shows this", Repl._help),
    "/quit": Command("", "leaves, as Ctrl-D does", Repl._quit),
}


def _path(command: str, argument: str) -> Path:
    """Return the file that a command names, perhaps in quotes as in a shell."""
    try:
        (name,) = shlex.split(argument) if argument[:1] in "'\"" else [argument]
    except ValueError:
        name = argument
    if not name:
        raise InputError(f"{command}: which file?")
    return Path(name).expanduser()


def _turns(session: Session) -> str:
    said = _counted(sum(message.get("role") == "user" for message in session.messages), "message")
    return f"{said} of yours" + (f" (with {', '.join(session.media)})" if session.media else "")


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.{1 if count < 1e7 else 0}f} MB"
