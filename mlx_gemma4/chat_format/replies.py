"""Turn a reply's tokens into what people see: text, thinking and tool calls, as the tokens arrive.

In: token ids, one at a time (`ReplyParser`). Out: events. Control tokens are told by their ids, so text that spells one
is not taken for one, and no control token is ever part of an event's text. A call that can't be read becomes text; one
that the reply ends inside is left out. calls.py reads the inside of a call.

    <|channel>thought\\nLet me look.<channel|>     -> Thinking("Let me look.")
    It is <|tool_call>call:now{}<tool_call|>       -> Text("It is "), ToolCall(name="now", arguments={})
"""

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..tokens.tokenizer import Tokenizer
from .call_writer import CallWriter
from .calls import QUOTE, read_calls

_HEADER = "thought\n"  # the beginning of a thinking channel
_BEGUN = re.compile(r"[\s,;]*(c(a(ll?)?)?$|call\s*(:|$))")  # a call that ends anywhere


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class Thinking:
    """A piece of the model's thinking before the answer."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A complete call of a function."""

    id: str = field(compare=False)  # made here, and unique
    name: str  # as the model wrote it; may hold dots, dashes or colons
    arguments: dict[str, Any]  # JSON values: dicts, lists, str, int, float, bool, None
    raw: str  # the text between the tokens of the call, with `"` for `<|"|>`


@dataclass(frozen=True)
class CallPart:
    """A piece of a call that is being written: of its arguments as JSON. Only where asked for, before its ToolCall."""

    id: str  # of the ToolCall that it becomes, unless the reply ends inside it
    name: str
    json: str


Event = Text | Thinking | ToolCall | CallPart


class ReplyParser:
    """Splits one reply into events: `push` each token, then `finish`.

    Text and thinking come as soon as their characters are complete, in pieces; a call when it is complete. A call that
    can't be read comes as Text, with `"` for `<|"|>`, unless the reply ends inside it. A channel that is not closed is
    thinking to the end of the reply; one that ends within its header ("thought") gives no event.

    >>> from mlx_gemma4 import load
    >>> tokenizer = load().tokenizer
    >>> parser = ReplyParser(tokenizer)
    >>> ids = tokenizer.encode("<|channel>thought\\nHm.<channel|>Yes!", add_bos=False, parse_special=True)
    >>> events = [event for token in ids for event in parser.push(token)] + parser.finish()
    >>> "".join(event.text for event in events if isinstance(event, Text))
    'Yes!'
    """

    def __init__(self, tokenizer: Tokenizer, *, thinking_open: bool = False, parts: bool = False) -> None:
        """`thinking_open`: the prompt ends inside a channel (`ends_in_thinking`); `parts`: with CallParts."""
        self._tokenizer = tokenizer
        names = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>')
        self._open, self._close, self._call, self._called, self._quote = map(tokenizer.token_id, names)
        self._mode: Literal["text", "thinking"] = "thinking" if thinking_open else "text"
        self._header: str | None = None  # a channel's first characters, while they may be `_HEADER`
        self._source: str | None = None  # text of the open call
        self._parts, self._writer = parts, CallWriter()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> list[Event]:
        """Return the events that a token completes: mostly none or one."""
        if token not in self._tokenizer.control_ids:
            return self._text(self._utf8.decode(self._tokenizer.piece(token)))
        events = self._text(self._utf8.decode(b"", final=True))
        if token == self._quote and self._source is not None:
            events += self._write(QUOTE)
        elif token in (self._call, self._called, self._open):
            events += self._end_call()
            if token == self._call:
                self._source, self._writer = "", CallWriter()
            elif token == self._open:
                events += self._end_header()
                self._mode, self._header = "thinking", ""
        elif token == self._close:
            events += self._end_header()
            self._mode = "text"
        return _merged(events)

    def finish(self) -> list[Event]:
        """Return what was held back."""
        return _merged(self._text(self._utf8.decode(b"", final=True)) + self._end_call(cut=True))

    def _text(self, text: str) -> list[Event]:
        if not text:
            return []
        if self._source is not None:
            return self._write(text)
        if self._mode == "text":
            return [Text(text)]
        if self._header is None:
            return [Thinking(text)]
        self._header += text
        return [] if _HEADER.startswith(self._header) else self._end_header()

    def _end_header(self) -> list[Event]:
        """End a channel's header: it is thinking, except for a first line "thought"."""
        header, self._header = self._header or "", None
        text = header.removeprefix(_HEADER) if header != _HEADER.rstrip() else ""
        return [Thinking(text)] if text else []

    def _write(self, text: str) -> list[Event]:
        """Go on with the open call."""
        self._source = (self._source or "") + text
        named = self._writer.name
        made = self._writer.push(text) if self._parts else ""
        name = self._writer.name
        return [CallPart(self._writer.id, name, made)] if name and (made or not named) else []

    def _end_call(self, cut: bool = False) -> list[Event]:
        """End the open call, if there is one: as calls, and as text what can't be read, unless the reply was `cut`."""
        source, self._source = self._source, None
        if source is None:
            return []
        calls, rest = read_calls(source)
        events: list[Event] = []
        for call in calls:
            writer, self._writer = self._writer, CallWriter()
            if self._parts:
                events.append(CallPart(writer.id, call.name, writer.end(call.arguments)))
            events.append(ToolCall(writer.id, call.name, call.arguments, call.source.replace(QUOTE, '"')))
        if rest.strip() and not (cut and _BEGUN.match(rest)):
            events.append(Text(rest.replace(QUOTE, '"')))
        return events


def ends_in_thinking(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Return True if a prompt ends inside a channel, so that the reply begins with thinking."""
    opening, closing = tokenizer.token_id("<|channel>"), tokenizer.token_id("<channel|>")
    last = next((token for token in reversed(prompt) if token in (opening, closing)), None)
    return last is not None and last == opening


def _merged(events: list[Event]) -> list[Event]:
    """Join neighbouring events of the same kind."""
    merged: list[Event] = []
    for event in events:
        if isinstance(event, Text | Thinking) and merged and isinstance(last := merged[-1], type(event)):
            merged[-1] = type(event)(last.text + event.text)
        else:
            merged.append(event)
    return merged
