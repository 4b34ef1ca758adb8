"""Turn a reply's tokens into what people see: text, thinking and tool calls, as the tokens arrive.

In: token ids, one at a time (`ReplyParser`). Out: events. Control tokens are told by their ids, so text that spells one
is not taken for one, and no control token is ever part of an event's text. Nothing of a reply is lost: a call that
can't be read becomes text. calls.py reads the inside of a call.

    <|channel>thought\\nLet me look.<channel|>     -> Thinking("Let me look.")
    It is <|tool_call>call:now{}<tool_call|>       -> Text("It is "), ToolCall(name="now", arguments={})
"""

import codecs
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..tokens.tokenizer import Tokenizer
from .calls import QUOTE, read_calls

_HEADER = "thought\n"  # the beginning of a thinking channel


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


Event = Text | Thinking | ToolCall


class ReplyParser:
    """Splits one reply into events: `push` each token, then `finish`.

    Text and thinking come as soon as their characters are complete, in pieces; a call when it is complete. A call that
    can't be read, or that the reply ends inside, comes as Text, with `"` for `<|"|>`. A channel that is not closed is
    thinking to the end of the reply; one that ends within its header ("thought") gives no event.

    >>> from mlx_gemma4 import load
    >>> tokenizer = load().tokenizer
    >>> parser = ReplyParser(tokenizer)
    >>> ids = tokenizer.encode("<|channel>thought\\nHm.<channel|>Yes!", add_bos=False, parse_special=True)
    >>> events = [event for token in ids for event in parser.push(token)] + parser.finish()
    >>> "".join(event.text for event in events if isinstance(event, Text))
    'Yes!'
    """

    def __init__(self, tokenizer: Tokenizer, *, thinking_open: bool = False) -> None:
        """`thinking_open`: the prompt ends inside a thinking channel (see `ends_in_thinking`)."""
        self._tokenizer = tokenizer
        names = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>')
        self._open, self._close, self._call, self._called, self._quote = map(tokenizer.token_id, names)
        self._mode: Literal["text", "thinking"] = "thinking" if thinking_open else "text"
        self._header: str | None = None  # a channel's first characters, while they may be `_HEADER`
        self._source: str | None = None  # text of the open call
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> list[Event]:
        """Return the events that a token completes: mostly none or one."""
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
        """Return what was held back."""
        return _merged(self._text(self._utf8.decode(b"", final=True)) + self._end_call())

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
        """End a channel's header: it is thinking, except for a first line "thought"."""
        header, self._header = self._header or "", None
        text = header.removeprefix(_HEADER) if header != _HEADER.rstrip() else ""
        return [Thinking(text)] if text else []

    def _end_call(self) -> list[Event]:
        """End the open call, if there is one: as calls, and as text what can't be read."""
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
    """Return True if a prompt ends inside a channel, so that the reply begins with thinking."""
    opening, closing = tokenizer.token_id("<|channel>"), tokenizer.token_id("<channel|>")
    last = next((token for token in reversed(prompt) if token in (opening, closing)), None)
    return last is not None and last == opening


def _merged(events: list[Event]) -> list[Event]:
    """Join neighbouring events of the same kind."""
    merged: list[Event] = []
    for event in events:
        if not isinstance(event, ToolCall) and merged and isinstance(last := merged[-1], type(event)):
            merged[-1] = type(event)(last.text + event.text)
        else:
            merged.append(event)
    return merged
