"""Byte-pair merging in plain Python, step by step as llama.cpp does it: the oracle of tokens/tokenizer.py.

In: a vocabulary and the rank of a merge. Out: ids. It is slow (some 10 us a character) but without limits.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Mapping

from mlx_gemma4.tokens.tokenizer import SPACE, Splitter

Rank = Callable[[str, str], "float | None"]  # of joining two neighbours; lower joins earlier, None never


def merge(symbols: list[str], rank: Rank) -> list[str]:
    """Joins neighbours, lowest rank first and leftmost of equals first, until no pair has a rank."""
    left = list(range(-1, len(symbols) - 1))
    right = [*range(1, len(symbols)), -1]
    parts: list[str | None] = list(symbols)  # None: joined to what stands left of it
    queue: list[tuple[float, int, int, str]] = []

    def offer(a: int, b: int) -> None:
        if a < 0 or b < 0:
            return
        first, second = parts[a], parts[b]
        if first is not None and second is not None and (found := rank(first, second)) is not None:
            heapq.heappush(queue, (found, a, b, first + second))

    for i in range(len(symbols) - 1):
        offer(i, i + 1)
    while queue:
        _, a, b, joined = heapq.heappop(queue)
        first, second = parts[a], parts[b]
        if first is None or second is None or len(first) + len(second) != len(joined):
            continue  # one of them has grown or gone since
        parts[a], parts[b] = joined, None
        right[a] = right[b]
        if right[b] >= 0:
            left[right[b]] = a
        offer(left[a], a)
        offer(a, right[a])
    return [part for part in parts if part is not None]


class PlainBPE:
    """Text -> ids. `user` are the strings that become their token before any merging.

    prefix       puts a space before each stretch of text
    split_lines  merges runs of newlines apart from the rest; a run that is a token becomes that token
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        rank: Rank,
        user: Mapping[str, int],
        *,
        prefix: bool,
        split_lines: bool,
    ) -> None:
        self._vocab = vocab
        self._rank = rank
        self._user = Splitter(user)
        self._prefix = prefix
        self._words = re.compile(r"[^\n]+|\n+" if split_lines else r"(?s:.+)")

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._user.split(text):
            if isinstance(part, int):
                ids.append(part)
                continue
            for word in self._words.findall((" " * self._prefix + part).replace(" ", SPACE)):
                ids.extend(self._word(word))
        return ids

    def _word(self, word: str) -> list[int]:
        if word[0] == "\n" and word in self._vocab:
            return [self._vocab[word]]
        return [i for symbol in merge(list(word), self._rank) for i in self._symbol(symbol)]

    def _symbol(self, symbol: str) -> list[int]:
        found = self._vocab.get(symbol)
        if found is not None:
            return [found]
        return [self._vocab[f"<0x{byte:02X}>"] for byte in symbol.encode()]
