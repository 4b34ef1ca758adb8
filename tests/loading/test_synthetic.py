"""The synthetic models of examples/make_synthetic.py: sizes of the real files, and one small enough to run."""

from __future__ import annotations

from math import prod
from pathlib import Path

import make_synthetic
import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma4.config import config_from_gguf
from mlx_gemma4.files.gguf import open_gguf
from mlx_gemma4.loading.from_gguf import GGUFSource
from mlx_gemma4.loading.loader import load_model


@pytest.mark.parametrize(
    ("kind", "weights"), [("e2b", 4.63e9), ("e4b", 7.5e9), ("12b", 11.8e9), ("26b-a4b", 25.2e9), ("31b", 30.7e9)]
)
def test_sizes_are_those_of_the_real_models(kind: str, weights: float) -> None:
    made = make_synthetic.tensors(kind, make_synthetic.metadata(kind))
    assert sum(prod(shape) for shape, _ in made.values()) == pytest.approx(weights, rel=0.01)


@pytest.mark.parametrize("kind", ["12b", "e2b", "26b-a4b"])
def test_a_small_one_loads_and_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, heads, kv, _, window, _, k_is_v = make_synthetic.SHAPES[kind]
    monkeypatch.setitem(make_synthetic.SHAPES, kind, (4, 256, heads, kv, 512, window, 2, k_is_v))
    monkeypatch.setitem(make_synthetic.SHARED, kind, 2 if kind == "e2b" else 0)
    make_synthetic.write(kind, tmp_path / "x.gguf")
    with open_gguf(tmp_path / "x.gguf") as file:
        assert not [t.name for t in file.tensors.values() if not np.any(file.raw(t.name)[0])]
        model, _ = load_model(config_from_gguf(file.metadata, "x"), GGUFSource(file), "packed")
    logits = np.array(model.forward(mx.array([5, 6000, 70000]), model.new_state()))
    assert np.isfinite(logits).all()
    assert logits.std() > 0.01
