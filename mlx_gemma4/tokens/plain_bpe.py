"""Byte-pair merging in plain Python, step by step as llama.cpp does it, and cutting text at fixed strings.

In: a vocabulary and the rank of a merge. Out: ids. `PlainBPE` is slow (some 10 us a character) but without
limits: it is the reference for the Rust encoder in tokenizer.py, and takes its place for vocabularies that the
Rust one can't express (equal scores, tokens of characters or merges of strings that aren't tokens).
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..errors import InputError

SPACE = "\u2581"  # how SentencePiece writes a space

Hashes = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]
Rank = Callable[[str, str], "float | None"]  # of joining two neighbours; lower joins earlier, None never


class Splitter:
    """Cuts text at given strings; where several begin at one place the longest counts."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids
        lengths: dict[str, set[int]] = {}
        for text in ids:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        self._starts = re.compile(f"[{re.escape(''.join(lengths))}]") if lengths else None

    def split(self, text: str) -> list[str | int]:
        """The text between the strings, never empty, and the ids of the strings, in order."""
        parts: list[str | int] = []
        done = 0
        for match in self._starts.finditer(text) if self._starts else ():
            at = match.start()
            found = self._longest(text, at) if at >= done else 0
            if found:
                if at > done:
                    parts.append(text[done:at])
                parts.append(self._ids[text[at : at + found]])
                done = at + found
        if done < len(text):
            parts.append(text[done:])
        return parts

    def _longest(self, text: str, at: int) -> int:
        for length in self._lengths[text[at]]:
            if text[at : at + length] in self._ids:
                return length
        return 0


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


def splits(texts: Sequence[str], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """All ways to cut each of `texts`, which are tokens, in two tokens: in order of texts, shortest left part first.

    `vocab` lists its tokens by id, from 0.
    Gemma 3 has 1.4 million cuts; a table of substring hashes, without false negatives, leaves 0.5 to look up.
    """
    flat, ends = _codes(list(vocab))
    # Hash modulo 2^64: the sum of code[i] * factor^i over the substring, divided by factor^start.
    factor = 0x9E3779B97F4A7C15
    sums = np.zeros(len(flat) + 1, np.uint64)
    np.cumsum(flat * _powers(factor, len(flat)), out=sums[1:])
    back = _powers(pow(factor, -1, 1 << 64), len(sums))

    def slot(start: Ints, stop: Ints) -> Hashes:
        found: Hashes = ((sums[stop] - sums[start]) * back[start]) >> np.uint64(40)
        return found

    table = np.zeros(1 << 24, np.bool_)
    table[slot(ends[:-1], ends[1:])] = True
    rows = np.fromiter((vocab[text] for text in texts), np.int64, len(texts))
    cuts = np.maximum(ends[rows + 1] - ends[rows] - 1, 0)  # of each text
    of = np.repeat(np.arange(len(texts)), cuts)  # each cut's text, (cuts in all,)
    at = np.arange(len(of)) - np.repeat(np.cumsum(cuts) - cuts, cuts) + 1  # and its place there
    start = ends[rows][of]
    right = table[slot(start + at, ends[rows + 1][of])]
    of, at, start = of[right], at[right], start[right]
    left = table[slot(start, start + at)]
    return [
        (head, tail)
        for i, k in zip(of[left].tolist(), at[left].tolist(), strict=True)
        if (head := texts[i][:k]) in vocab and (tail := texts[i][k:]) in vocab
    ]


def _codes(texts: Sequence[str]) -> tuple[Hashes, Ints]:
    """Code points of all texts, scrambled (n,), and where each text begins, then the end (texts + 1,)."""
    flat = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    flat = (flat + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
    ends = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)), out=ends[1:])
    return flat ^ (flat >> np.uint64(32)), ends


def _powers(factor: int, count: int) -> Hashes:
    """factor^0, factor^1 ... modulo 2^64, (count,)."""
    steps = np.full(count, factor, np.uint64)
    steps[:1] = 1
    powers: Hashes = np.cumprod(steps, dtype=np.uint64)
    return powers


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
        try:
            return [self._vocab[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        except KeyError as error:
            raise InputError(f"the model's vocabulary has no token for {symbol!r}, nor bytes for it") from error
