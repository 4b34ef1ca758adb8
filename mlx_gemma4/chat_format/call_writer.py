"""Write a call's arguments as JSON while the model still writes the call.

In: the source of one call, in pieces, with `QUOTE` for each `<|"|>` token. Out: pieces of the JSON that
`json.dumps(arguments, ensure_ascii=False)` will be. Only Gemma's own notation is followed: from a deviation on
(calls.py reads many), nothing more is written until the whole call is known.
"""

import json
import re
import uuid

from .calls import MAX_DEPTH, QUOTE, word

_HEAD = re.compile(rf"\s*call\s*:\s*([^\s{{}}()\[\],;=\"'<>{QUOTE}]+)\s*{{")
_KEY = re.compile(rf"\s*(?:([^\s{{}}()\[\],:=\"'{QUOTE}]+)|{QUOTE}([^{QUOTE}]*){QUOTE})\s*[:=]")
_WORD = re.compile(rf"\s*([^{{}}()\[\],\"'{QUOTE}\n]*[^{{}}()\[\],\"'{QUOTE}\s])\s*(?=[,\]}}])")
_MARK = re.compile(r"\s*([\[{,\]}]|" + QUOTE + ")")


class CallWriter:
    """One call: `push` its source as it comes, then `end`.

    >>> writer = CallWriter()
    >>> [writer.push(piece) for piece in ("call:f{a:1,b:[tr", "ue,2", "]}")], writer.name
    (['{"a": 1, "b": [', 'true, ', '2]}'], 'f')
    """

    def __init__(self) -> None:
        self.id = f"call_{uuid.uuid4().hex[:24]}"
        self.name: str | None = None  # once it is known
        self._source = ""  # what is not written yet
        self._sent = ""
        self._ends: list[str] = []  # closing brackets of what is open
        self._next = self._head
        self._first = False  # of the items in the innermost brackets
        self._complete = False

    def push(self, text: str) -> str:
        """Return the JSON that is certain now."""
        self._source += text
        made = ""
        while not self._complete and (piece := self._next()) is not None:
            made += piece
        self._sent += made
        return made

    def end(self, arguments: dict[str, object]) -> str:
        """Return the JSON that is still missing, when the call has been read."""
        whole = json.dumps(arguments, ensure_ascii=False)
        return whole[len(self._sent) :] if not self._complete and whole.startswith(self._sent) else ""

    # Each of these writes what comes next, and says what follows it. None: the source isn't there yet, or deviates.

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self._source)
        if found:
            self._source = self._source[found.end() :]
        return found

    def _head(self) -> str | None:
        found = self._take(_HEAD)
        if not found:
            return None
        self.name = found[1]
        return self._open("{")

    def _open(self, bracket: str) -> str | None:
        if len(self._ends) > MAX_DEPTH:
            return None
        self._ends.append("}" if bracket == "{" else "]")
        self._first, self._next = True, self._item
        return bracket

    def _item(self) -> str | None:
        """The next item's beginning, with its key in an object; or the end of none."""
        if self._source.lstrip()[:1] == self._ends[-1]:
            return self._after()
        comma = "" if self._first else ", "
        if self._ends[-1] == "]":
            if not self._source.strip():
                return None
            self._next = self._value
            return comma
        found = self._take(_KEY)
        if not found:
            return None
        self._next = self._value
        return f"{comma}{json.dumps(found[1] or found[2] or '', ensure_ascii=False)}: "

    def _value(self) -> str | None:
        found = self._take(_WORD)
        if found:
            self._next = self._after
            return json.dumps(word(found[1]), ensure_ascii=False)
        mark = _MARK.match(self._source)
        if not mark or mark[1] not in ("{", "[", QUOTE):
            return None
        if mark[1] != QUOTE and len(self._ends) > MAX_DEPTH:
            return None
        self._source = self._source[mark.end() :]
        if mark[1] != QUOTE:
            return self._open(mark[1])
        self._next = self._string
        return '"'

    def _string(self) -> str | None:
        text, quote, rest = self._source.partition(QUOTE)
        self._source = rest
        if quote:
            self._next = self._after
        return json.dumps(text, ensure_ascii=False)[1:-1] + '"' * bool(quote) if text or quote else None

    def _after(self) -> str | None:
        """What follows a value: a comma, which is written with the next item, or the end of the brackets."""
        mark = _MARK.match(self._source)
        if not mark or mark[1] not in (",", self._ends[-1]):
            return None
        self._source = self._source[mark.end() :]
        if mark[1] == ",":
            self._first, self._next = False, self._item
            return ""
        self._ends.pop()
        self._next = self._after
        self._complete = not self._ends
        return mark[1]
