"""Parse the text between the tokens of a tool call into a name and arguments.

In: the call's source, with `QUOTE` in place of each `<|"|>` token. Out: the calls, and the text that can't be read.
Gemma 4 writes `call:NAME{key:VALUE,...}` with strings between `<|"|>` tokens, in which nothing is escaped. Models
deviate from it, and unambiguous deviations are read too: `call:NAME(key=VALUE)`, JSON and Python quotes, quoted keys,
words without quotes, several calls in a row.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

QUOTE = "\udc22"  # a lone surrogate: no text that was decoded from UTF-8 holds one
MAX_DEPTH = 64  # of nested arguments; deeper ones can't be read

_SPACE = re.compile(r"\s*")
_CALL = re.compile(r"\s*call\s*:\s*")
_AROUND = re.compile(r"\(\s*\{")
_NAME = re.compile(rf"[^\s{{}}()\[\],;=\"'<>{QUOTE}]+")
_KEY = re.compile(rf"[^\s{{}}()\[\],:=\"'{QUOTE}]+")
_WORD = re.compile(rf"[^{{}}()\[\],\"'{QUOTE}\n]+")
_PYTHON = {"True": "true", "False": "false", "None": "null"}
_STRING = re.compile(
    rf"""{QUOTE}([^{QUOTE}]*){QUOTE} | "((?:[^"\\]|\\.)*)" | '((?:[^'\\]|\\.)*)'""", re.DOTALL | re.VERBOSE
)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


class Call(NamedTuple):
    """One call, and the source that it was read from."""

    name: str
    arguments: dict[str, Any]
    source: str


def read_calls(source: str) -> tuple[list[Call], str]:
    """Return the calls at the beginning of `source`, and the rest: "" or space if all of it could be read."""
    calls: list[Call] = []
    done = 0
    while True:
        reader = _Reader(source, done)
        try:
            reader.match(_CALL)
            name, arguments = reader.match(_NAME), reader.arguments()
        except _Unreadable:
            return calls, source[done:]
        calls.append(Call(name, arguments, source[done : reader.at].strip()))
        done = reader.at
        separator = re.compile(r"\s*[,;]?(?=\s*call\s*:)").match(source, done)
        done = separator.end() if separator else done


class _Unreadable(Exception):
    """The source is not what was expected at this position."""


class _Reader:
    """A position in the source, and methods that read on from it."""

    def __init__(self, source: str, at: int) -> None:
        self.source, self.at = source, at

    def arguments(self) -> dict[str, Any]:
        """Read `{...}`, or `(...)` around pairs or an object."""
        bracket = self._peek()
        if bracket not in ("{", "("):
            raise _Unreadable
        around = _AROUND.match(self.source, self.at)
        if not around:
            return self._object("}" if bracket == "{" else ")", 0)
        self.at = around.end() - 1
        arguments = self._object("}", 0)
        self._expect(")")
        return arguments

    def _object(self, end: str, depth: int) -> dict[str, Any]:
        """Read pairs up to `end`; the position is at the bracket that opens them."""
        found: dict[str, Any] = {}
        for _ in self._items(end):
            key = self._string() if self._peek() in (QUOTE, '"', "'") else self.match(_KEY)
            if self._peek() not in (":", "="):
                raise _Unreadable
            self.at += 1
            found[key] = self._value(depth + 1)
        return found

    def _items(self, end: str) -> Iterator[None]:
        """Stop at each item of a list, whose opening bracket is here and whose closing one is `end`."""
        self.at += 1
        while self._peek() != end:
            yield
            if self._peek() != ",":
                break
            self.at += 1
        self._expect(end)

    def _value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise _Unreadable
        first = self._peek()
        if first in (QUOTE, '"', "'"):
            return self._string()
        if first == "{":
            return self._object("}", depth)
        if first == "[":
            return [self._value(depth + 1) for _ in self._items("]")]
        return word(self.match(_WORD).strip())

    def _string(self) -> str:
        found = _STRING.match(self.source, self.at)
        if not found:
            raise _Unreadable
        self.at = found.end()
        if found[1] is not None:
            return found[1]
        text = _ESCAPE.sub(_unescaped, (found[2] or found[3] or "").replace(QUOTE, '"'))
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    def _peek(self) -> str:
        """Skip space, and return the next character, "" at the end."""
        found = _SPACE.match(self.source, self.at)
        self.at = found.end() if found else self.at
        return self.source[self.at : self.at + 1]

    def _expect(self, character: str) -> None:
        if self._peek() != character:
            raise _Unreadable
        self.at += 1

    def match(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.source, self.at)
        if not found:
            raise _Unreadable
        self.at = found.end()
        return found[0]


def word(text: str) -> Any:
    """Convert a value without quotes: a number, true, false, null, or else a string as it is."""
    if not text:
        raise _Unreadable
    try:
        value = json.loads(_PYTHON.get(text, text))
        return value if math.isfinite(value or 0) else text
    except (ValueError, OverflowError):  # no JSON, or an integer of more digits than a float or Python takes
        return text


def _unescaped(escape: re.Match[str]) -> str:
    """Convert a JSON escape; of one that JSON does not have, return what follows the backslash."""
    code = escape[1]
    return chr(int(code[1:], 16)) if len(code) == 5 else _ESCAPED.get(code, code)
