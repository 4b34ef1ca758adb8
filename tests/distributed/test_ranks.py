"""A model on two ranks does what it does alone, whatever it is asked through; and only rank 0 speaks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from ranked import TESTS, end_of, ranks, tour

import mlx_gemma4

pytestmark = pytest.mark.slow
LAUNCH = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--backend", "ring", "--python", sys.executable]
ASKED = ["-p", "Once upon a time", "-n", "20", "--temperature", "0"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tour(mlx_gemma4.load(), tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module", params=["tensor", "layers"])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("together")
    command = [sys.executable, str(TESTS / "ranked.py"), "tour", str(folder), request.param]
    with ranks(folder, command, command) as (first, second):
        code, out, err = end_of(first)
        assert code == 0, err
        assert end_of(second)[:2] == (0, "")
    assert (folder / "talk.json.kv.rank1").is_file()
    seen: dict[str, Any] = json.loads(out)
    return seen


WHATS = ["reply", "sampled", "drafted", "assisted", "cat", "dog", "schema", "batch", "said", "again", "fork", "held"]


@pytest.mark.parametrize("what", [*WHATS, "loaded", "served"])
def test_two_ranks_do_as_one(what: str, alone: dict[str, Any], together: dict[str, Any]) -> None:
    assert together[what] == alone[what]
    assert alone[what]


@pytest.mark.parametrize("what", ["likely", "cat likely", "dog likely"])
def test_log_probabilities(what: str, alone: dict[str, Any], together: dict[str, Any]) -> None:
    assert together[what] == pytest.approx(alone[what], abs=1e-4)


def test_texts_that_are_scored(alone: dict[str, Any], together: dict[str, Any]) -> None:
    assert together["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-4)
    assert together["embedding"] == pytest.approx(alone["embedding"], abs=1e-5)


def test_drafts_and_pictures_are_no_idle_talk(alone: dict[str, Any]) -> None:
    """Some drafts are right; what is seen changes the reply."""
    assert alone["assisted"][1] > 5
    assert alone["cat likely"] != pytest.approx(alone["dog likely"], abs=1e-2)


def test_requests_at_once_are_answered_alike(together: dict[str, Any]) -> None:
    assert together["served"][:2] == together["served"][2:]
    assert together["served"][0] != together["served"][1]
