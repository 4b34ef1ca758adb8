"""`bench --draft-accept`: acceptance is imposed, and what it says follows from what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from drafters import Knowing
from plain_state import LAYOUTS, small_model

from mlx_gemma4.cli.main import main
from mlx_gemma4.generation.drafting import MOST
from mlx_gemma4.measure import bench, draft_bench


def test_break_even() -> None:
    assert draft_bench.break_even(1, 1.3) == pytest.approx(0.3)
    assert draft_bench.break_even(3, 1 + 0.5 + 0.25 + 0.125) == pytest.approx(0.5)
    assert draft_bench.break_even(2, 0.9) == 0 and draft_bench.break_even(2, 3.1) is None


def test_tokens_of_a_step_follow_from_the_share_that_is_imposed() -> None:
    model = small_model("12b", 64, LAYOUTS[2])
    for drafts, share, least, most in ((3, 0.0, 1, 1), (3, 1.0, 3, 4), (2, 0.5, 1.4, 2.1)):
        state = model.new_state()
        bench.fill(state, 8)
        knows = Knowing([5] * 200, 1.0)
        tokens, steps, seconds = draft_bench.run_steps(model, state, knows, drafts, share, 60)
        assert least <= tokens / steps <= most and tokens >= 60 and seconds > 0


def test_all_of_it_at_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "COPIED", 1 << 22)
    args = [
        "--prompt-sizes",
        "",
        "--depths",
        "0",
        "--reply",
        "4",
        "--repetitions",
        "1",
        "--json",
        tmp_path / "out.json",
    ]
    done = CliRunner().invoke(main, ["bench", *map(str, args), "--draft-accept", "0,1"])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["command"].endswith("--draft-accept 0.0,1.0")
    drafts = found["drafts"]
    assert [cell["drafts"] for cell in drafts["cells"]] == [*range(1, MOST + 1)] and drafts["context"] == 512
    assert all(len(cell["tokens_per_second"]) == 2 and cell["steps"] > 0 for cell in drafts["cells"])
    assert "100% right" in done.stdout and "break-even" in done.stdout
    wrong = CliRunner().invoke(main, ["bench", "--draft-accept", "0.5,2"])
    assert wrong.exit_code == 2 and "numbers from 0 to 1" in wrong.output
