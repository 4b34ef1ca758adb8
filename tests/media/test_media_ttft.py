"""benchmarks/media_ttft.py on the fixtures: what it measures is done, and llama.cpp's times are read."""

from __future__ import annotations

import json
from pathlib import Path

import media_ttft
import pytest
from recorded import HERE

LLAMA = """#!/bin/sh
echo "$@" > {log}
for i in 40 12 10 11; do echo "mtmd batch encoding done in $i ms" >&2; done
"""


def figures(kind: str, tmp_path: Path, *more: str) -> dict[str, object]:
    pair = HERE / "media" / kind
    out = tmp_path / "out.json"
    given = [str(pair / "model.gguf"), "--mmproj", str(pair / "mmproj.gguf"), "--rounds", "1", "--json", str(out)]
    assert media_ttft.main([*given, *more]) == 0
    made: dict[str, object] = json.loads(out.read_text())
    return made


def test_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli, log = tmp_path / "llama-mtmd-cli", tmp_path / "log"
    cli.write_text(LLAMA.format(log=log))
    cli.chmod(0o755)
    made = figures("uv", tmp_path, "--tokens", "70", "--llama", str(cli))
    (row,), asked = made["pictures"], made["questions"]  # type: ignore[misc, has-type]
    assert row["tokens"] == 70 and row["ratio"] > 0 and 0 < row["tower"] < row["encode"] and row["picture"] > 0
    assert row["llama.cpp"] == 11
    assert "--image-max-tokens 70" in log.read_text() and log.read_text().count("part.png") == media_ttft.COPIES
    assert asked["tower ran"] == 1 and max(asked["tokens read"][1:]) <= media_ttft.QUESTION < asked["tokens read"][0]
    assert "the tower ran 1 times" in capsys.readouterr().out


def test_a_llama_that_fails_is_no_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = tmp_path / "llama-mtmd-cli"
    cli.write_text("#!/bin/sh\necho no such model >&2; exit 1\n")
    cli.chmod(0o755)
    made = figures("ua", tmp_path, "--llama", str(cli))
    assert made["sound"]["rows"] == 750  # type: ignore[index]
    assert "no such model" in capsys.readouterr().err
