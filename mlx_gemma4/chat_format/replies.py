"""A reply's tokens become what people see: text, thinking and tool calls, as the tokens arrive.

In: token ids, one at a time (`ReplyParser`). Out: events. Control tokens are known by their ids, so nothing that is
merely spelled like one is taken for one, and no control token is ever part of an event's text. Nothing of a reply is
lost: a call that can't be read comes out as text. The grammar of a call's inside is in calls.py.

    <|channel>thought\\nLet me look.<channel|>     -> Thinking("Let me look.")
    It is <|tool_call>call:now{}<tool_call|>       -> Text("It is "), ToolCall(name="now", arguments={})
"""

from __future__ import annotations

import codecs
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..tokens.tokenizer import Tokenizer
from .calls import QUOTE, read_calls

_HEADER = "thought\n"  # what a channel of thinking begins with


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class Thinking:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A whole call of a function.

    Attributes:
        id: made here, unlike any other; two calls that differ in it alone are equal.
        name: as the model wrote it: may hold dots, dashes or colons.
        arguments: what JSON can hold: dicts, lists, str, int, float, bool, None.
        raw: what the model wrote between the tokens of the call, with `"` for `<|"|>`.
    """

    id: str = field(compare=False)
    name: str
    arguments: dict[str, Any]
    raw: str


Event = Text | Thinking | ToolCall


class ReplyParser:
    """Splits one reply. `push` each token, then `finish`; the events, in order, are the reply.

    Text and thinking come out as soon as their characters are whole; neighbouring pieces belong together. A call
    comes out when it is complete. Where it can't be read, or the reply ends inside it, `finish` or the call's end
    gives what the model wrote as Text, with `"` for `<|"|>`. A channel that nobody closes is thinking to its end; of
    one that is cut in its header ("thought") nothing comes.

    >>> from mlx_gemma4 import load
    >>> tokenizer = load().tokenizer
    >>> parser = ReplyParser(tokenizer)
    >>> ids = tokenizer.encode("<|channel>thought\\nHm.<channel|>Yes!", add_bos=False, parse_special=True)
    >>> events = [event for token in ids for event in parser.push(token)] + parser.finish()
    >>> "".join(event.text for event in events if isinstance(event, Text))
    'Yes!'
    """

    def __init__(self, tokenizer: Tokenizer, *, thinking_open: bool = False) -> None:
        """
        Args:
            thinking_open: the prompt ends inside a channel of thinking (see `ends_in_thinking`).
        """
        self._tokenizer = tokenizer
        names = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>')
        found = {name: tokenizer.token_id(name) for name in names}
        self._open, self._close, self._call, self._called, self._quote = (found[name] for name in names)
        self._mode: Literal["text", "thinking"] = "thinking" if thinking_open else "text"
        self._header: str | None = None  # of a channel, while it may still be `_HEADER`
        self._source: str | None = None  # of the call that is being written
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> list[Event]:
        """The events that a token completes: mostly none or one."""
        if token not in self._tokenizer.control_ids:
            return self._text(self._utf8.decode(self._tokenizer.piece(token)))
        events = self._text(self._utf8.decode(b"", final=True))
        if token == self._quote and self._source is not None:
            self._source += QUOTE
        elif token in (self._call, self._called, self._open):
            events += self._end_call()
            if token == self._call:
                self._source = ""
            elif token == self._open:
                events += self._end_header()
                self._mode, self._header = "thinking", ""
        elif token == self._close:
            events += self._end_header()
            self._mode = "text"
        return _merged(events)

    def finish(self) -> list[Event]:
        """What was held back."""
        events = self._text(self._utf8.decode(b"", final=True))
        events += self._end_call()
        return _merged(events)

    def _text(self, text: str) -> list[Event]:
        if not text:
            return []
        if self._source is not None:
            self._source += text
            return []
        if self._mode == "text":
            return [Text(text)]
        if self._header is None:
            return [Thinking(text)]
        self._header += text
        return [] if _HEADER.startswith(self._header) else self._end_header()

    def _end_header(self) -> list[Event]:
        """A channel's first line is known: what of it is thinking, which is all but "thought"."""
        header, self._header = self._header or "", None
        text = header.removeprefix(_HEADER) if header != _HEADER.rstrip() else ""
        return [Thinking(text)] if text else []

    def _end_call(self) -> list[Event]:
        """The call in progress, if there is one: as a call, or as text where it is none."""
        source, self._source = self._source, None
        if source is None:
            return []
        calls, rest = read_calls(source)
        events: list[Event] = [
            ToolCall(f"call_{uuid.uuid4().hex[:24]}", call.name, call.arguments, call.source.replace(QUOTE, '"'))
            for call in calls
        ]
        if rest.strip():
            events.append(Text(rest.replace(QUOTE, '"')))
        return events


def ends_in_thinking(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether a prompt ends inside a channel, so that the reply begins with thinking."""
    opening, closing = tokenizer.token_id("<|channel>"), tokenizer.token_id("<channel|>")
    last = next((token for token in reversed(prompt) if token in (opening, closing)), None)
    return last is not None and last == opening


def _merged(events: list[Event]) -> list[Event]:
    """Neighbours of the same kind as one."""
    merged: list[Event] = []
    for event in events:
        last = merged[-1] if merged else None
        if isinstance(event, Text) and isinstance(last, Text):
            merged[-1] = Text(last.text + event.text)
        elif isinstance(event, Thinking) and isinstance(last, Thinking):
            merged[-1] = Thinking(last.text + event.text)
        else:
            merged.append(event)
    return merged
