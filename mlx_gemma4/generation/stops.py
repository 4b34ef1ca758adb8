"""Stop strings in text that arrives piece by piece.

In: a reply's text, split anywhere. Out: the text before the first stop string; what may be the beginning of one is held
back until that is known. Knows nothing of tokens.
"""

from collections.abc import Sequence

from ..errors import InputError


class StopStrings:
    """Looks for several strings at once. All that `push` and `finish` return, joined, is the text before the first.

    However the text is split, the result is the same: the string that ends first counts, and of several that end in one
    place the longest, which began first.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: none of them empty; with none at all, text passes as it is."""
        if "" in stops:
            raise InputError("--stop: a stop string is empty; give it some text")
        self._stops = tuple(stops)
        self._held = ""  # the longest end of the text so far that some stop string begins with
        self.stopped = False
        self.found: str | None = None  # the one that came

    def push(self, text: str) -> tuple[str, bool]:
        """Return the text that can be shown now, and True if a stop string has come: then nothing follows."""
        if self.stopped:
            return "", True
        text = self._held + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            end, start = min(ends)
            self.found = text[start:end]
            return text[:start], True
        longest = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest], False

    def finish(self) -> str:
        """Return the text that was held back, once no more comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with, short of the whole."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
