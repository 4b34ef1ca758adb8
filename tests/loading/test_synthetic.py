"""The synthetic models of examples/make_synthetic.py: sizes of the real files, and one small enough to run."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import make_synthetic
import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma4.config import config_from_gguf
from mlx_gemma4.doctor.published import PUBLISHED
from mlx_gemma4.files.gguf import open_gguf
from mlx_gemma4.loading.from_gguf import GGUFSource
from mlx_gemma4.loading.loader import load_model


@pytest.mark.parametrize(
    ("name", "weights"), [("E2B", 4.63e9), ("E4B", 7.5e9), ("12B", 11.8e9), ("26B-A4B", 25.2e9), ("31B", 30.7e9)]
)
def test_sizes_are_those_of_the_real_models(name: str, weights: float) -> None:
    made = make_synthetic.tensors(PUBLISHED[name])
    assert sum(prod(shape) for shape, _ in made.values()) == pytest.approx(weights, rel=0.01)


@pytest.mark.parametrize("type", [None, make_synthetic.UD])
@pytest.mark.parametrize("name", ["12B", "E2B", "26B-A4B"])
def test_a_small_one_loads_and_runs(
    name: str, type: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(PUBLISHED[name], layers=4, hidden=256, ffn=512, every=2, shared=2 if name == "E2B" else 0)
    monkeypatch.setitem(PUBLISHED, name, small)
    make_synthetic.write(name, tmp_path / "x.gguf", type=type)
    with open_gguf(tmp_path / "x.gguf") as file:
        assert not [t.name for t in file.tensors.values() if not np.any(file.raw(t.name)[0])]
        model, _ = load_model(config_from_gguf(file.metadata, "x"), GGUFSource(file), "packed")
    logits = np.array(model.forward(mx.array([5, 6000, 70000]), model.new_state()))
    assert np.isfinite(logits).all()
    assert logits.std() > 0.01
