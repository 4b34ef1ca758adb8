"""Responses that later requests go on from, in memory: the latest ones, within bounds.

In: responses with their conversations. Out: the same, by id. All of it belongs to the event loop.
"""

import json
from collections import OrderedDict
from typing import Any, NamedTuple

MOST = 1000  # responses
MOST_BYTES = 64_000_000  # of all, as JSON, with their pictures and sounds


class _Kept(NamedTuple):
    response: dict[str, Any]
    messages: list[dict[str, Any]]  # the conversation, its reply included; without instructions
    n_bytes: int


class Stored:
    """Keeps responses; the oldest go first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._bytes = 0

    def put(self, response: dict[str, Any], messages: list[dict[str, Any]]) -> None:
        media: list[int] = []  # sizes of pictures and sounds, which JSON can't hold
        text = json.dumps([response, messages], ensure_ascii=False, default=lambda data: media.append(len(data)))
        n_bytes = len(text.encode("utf-8", "replace")) + sum(media)
        self._kept[response["id"]] = _Kept(response, messages, n_bytes)
        self._bytes += n_bytes
        while len(self._kept) > MOST or self._bytes > MOST_BYTES:
            self.delete(next(iter(self._kept)))

    def get(self, id: str) -> _Kept | None:
        return self._kept.get(id)

    def delete(self, id: str) -> bool:
        """Forget a response; return False if there is none."""
        found = self._kept.pop(id, None)
        self._bytes -= found.n_bytes if found else 0
        return found is not None
