"""A model on two ranks does what it does alone, whatever it is asked through; and only rank 0 speaks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from once import once
from PIL import Image
from ranked import LAUNCHED, TESTS, end_of, ranks, tour
from recorded import HERE

import mlx_gemma4

pytestmark = pytest.mark.slow
LAUNCH = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--backend", "ring", "--python", sys.executable]
ASKED = ["-p", "Once upon a time", "-n", "20", "--temperature", "0"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return once(tmp_path_factory, "tour-alone", lambda folder: tour(mlx_gemma4.load(), folder))


@pytest.fixture(scope="module", params=["tensor", "layers"])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    def toured(folder: Path) -> Any:
        command = [sys.executable, str(TESTS / "ranked.py"), "tour", str(folder), request.param]
        with ranks(folder, command, command) as (first, second):
            code, out, err = end_of(first)
            assert code == 0, err
            assert end_of(second)[:2] == (0, "")
        assert (folder / "talk.json.kv.rank1").is_file()
        return json.loads(out)

    return once(tmp_path_factory, f"tour-{request.param}", toured)


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


@pytest.mark.parametrize("split", ["tensor", "layers"])
def test_a_picture_through_a_projector(split: str, tmp_path: Path) -> None:
    """The first rank has the tower, and all read its rows."""
    folder = HERE / "media" / "uv"
    Image.new("RGB", (120, 90), (200, 30, 30)).save(tmp_path / "red.png")
    command = [*LAUNCHED, "generate", "-m", str(folder / "model.gguf"), "--mmproj", str(folder / "mmproj.gguf")]
    command += ["--image", str(tmp_path / "red.png"), *ASKED]
    alone = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    with ranks(tmp_path, [*command, "--split", split], [*command, "--split", split]) as (first, second):
        code, out, err = end_of(first)
        assert (code, end_of(second)[0]) == (0, 0), err
    assert out == alone.stdout != ""


def test_auto_takes_the_split_that_can_be(tmp_path: Path) -> None:
    """By layers two ranks would be faster, but this model's first layers hold the keys of all others."""
    command = [sys.executable, str(TESTS / "ranked.py"), "auto", str(HERE / "e2b-q8_0.gguf")]
    with ranks(tmp_path, command, command) as (first, second):
        code, out, err = end_of(first)
        assert (code, end_of(second)[0]) == (0, 0), err
    lm = mlx_gemma4.load(HERE / "e2b-q8_0.gguf")
    assert out.strip() == mlx_gemma4.generate(lm, "A fox", max_tokens=5, temperature=0).strip()
    assert "--split layers. Expected" in err
    assert "2 ranks: this model's layers can be split among 1 at most; so --split tensor" in err


def test_requests_at_once_are_answered_alike(together: dict[str, Any]) -> None:
    assert together["served"][:2] == together["served"][2:]
    assert together["served"][0] != together["served"][1]
