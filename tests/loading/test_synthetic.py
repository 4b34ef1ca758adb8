"""The synthetic models of examples/make_synthetic.py: sizes of the real files, and one small enough to run."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import make_synthetic
import mlx.core as mx
import numpy as np
import pytest
from hearing import wav_of as wav
from PIL import Image

from mlx_gemma4.config import config_from_gguf
from mlx_gemma4.doctor.published import PUBLISHED
from mlx_gemma4.files.gguf import open_gguf
from mlx_gemma4.loading.from_gguf import GGUFSource
from mlx_gemma4.loading.loader import load_model
from mlx_gemma4.media.projector import open_media


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


@pytest.mark.parametrize(("name", "weights"), [("31B", 569.6e6), ("26B-A4B", 569.6e6), ("E2B", 167.4e6 + 305.6e6)])
def test_projectors_are_of_the_size_of_the_real_ones(name: str, weights: float) -> None:
    _, made = make_synthetic.projector(PUBLISHED[name].hidden, make_synthetic.PROJECTORS[name], "BF16")
    assert sum(prod(shape) for key, (shape, _) in made.items() if "input_proj" not in key) == pytest.approx(
        weights, 0.01
    )


@pytest.mark.parametrize("type", ["BF16", "F16"])
def test_a_projector_loads_and_encodes(type: str, tmp_path: Path) -> None:
    make_synthetic.write("DEMO", tmp_path / "mmproj.gguf", type=type, mmproj=True)
    media = open_media(tmp_path / "mmproj.gguf", make_synthetic.config_of(make_synthetic.DEMO))
    assert media.kinds == {"image", "video", "audio"}
    for part in (
        {"type": "image", "image": Image.new("RGB", (60, 90), "red"), "tokens": 70},
        {"type": "audio", "audio": wav(1.0)},
    ):
        _, encoded, _ = media.encode(part)
        rows = np.array(encoded.rows)  # type: ignore[union-attr]
        assert np.isfinite(rows).all() and rows.std() > 0.1, part["type"]
