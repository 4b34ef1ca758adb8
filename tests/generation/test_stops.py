"""Stop strings: however the text is cut, the same comes out, and nothing of it is lost."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_gemma4 import InputError, Sampling, load, stream
from mlx_gemma4.generation.stops import StopStrings


def before_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The plain reference: read character by character until the text ends with a stop string; the longest one goes."""
    for end in range(len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            return text[: end - max(map(len, met))], True
    return text, False


def pushed(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    search, out = StopStrings(stops), ""
    for piece in pieces:
        text, stopped = search.push(piece)
        out += text
        assert stopped == search.stopped
    return out + search.finish(), search.stopped


LETTERS = st.text("ab#\n", max_size=20)


@given(
    LETTERS, st.lists(st.text("ab#\n", min_size=1, max_size=5), max_size=3), st.lists(st.integers(0, 20), max_size=6)
)
@settings(max_examples=600, deadline=None)
@example("aabaabab", ["abab", "aabb"], [1, 2, 3])
@example("xyz", [], [1])
@example("", ["a"], [])
def test_any_cut_gives_the_same(text: str, stops: list[str], cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(places)]
    assert pushed(pieces, stops) == pushed(list(text), stops) == pushed([text], stops) == before_stop(text, stops)


@given(LETTERS, st.lists(st.text("ab#\n", min_size=1, max_size=5), min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_holds_back_no_more_than_it_must(text: str, stops: list[str]) -> None:
    """What is held is the longest end that some stop string begins with: all before it has come out."""
    search, out = StopStrings(stops), ""
    for i, c in enumerate(text):
        piece, stopped = search.push(c)
        if stopped:
            break
        out += piece
        held = text[len(out) : i + 1]
        assert text[: i + 1] == out + held
        assert not held or any(stop.startswith(held) for stop in stops)
    else:
        assert out + search.finish() == text


def test_after_a_stop_nothing_comes() -> None:
    search = StopStrings(["END"])
    assert search.push("so E") == ("so ", False)
    assert search.push("ND and more") == ("", True)
    assert search.push("more") == ("", True)
    assert search.finish() == ""


def test_the_longest_of_those_that_end_together() -> None:
    assert pushed(["a b c"], ["c", "b c"]) == ("a ", True)


def test_an_empty_one_is_refused() -> None:
    with pytest.raises(InputError, match="--stop"):
        StopStrings(["a", ""])


def test_across_tokens_of_a_reply() -> None:
    """Found where tokens meet, cut exactly, and generation ends there."""
    lm = load()
    sampling = Sampling(temperature=0)
    whole = "".join(chunk.text for chunk in stream(lm, "Once upon a time", sampling=sampling, max_tokens=40))
    for start in (3, 17, 50):
        stop = whole[start : start + 9]
        chunks = list(stream(lm, "Once upon a time", sampling=sampling, max_tokens=40, stop=[stop, "no such text"]))
        assert "".join(chunk.text for chunk in chunks) == whole[: whole.index(stop)]
        assert chunks[-1].statistics.stop_reason == "stop"
        assert chunks[-1].statistics.reply_tokens < 40
