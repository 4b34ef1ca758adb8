"""Whole small models of each type, packed and as kernels have them, against the same file expanded to fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import make_synthetic
import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import metal
from recorded import kl
from rewrite import F32, Entry, odd

from mlx_gemma4.config import config_from_gguf
from mlx_gemma4.doctor.published import PUBLISHED, Shape
from mlx_gemma4.errors import InputError
from mlx_gemma4.files.gguf import open_gguf
from mlx_gemma4.loading.from_gguf import GGUFSource
from mlx_gemma4.loading.loader import load_model
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.op import OpKey
from mlx_gemma4.quant.formats import FORMATS, Packed

TYPES = [name for name, form in FORMATS.items() if form.rule] + ["NVFP4", "Q2_0", "TQ2_0"]
SMALL = {  # rows as long as the widest block
    "E2B": Shape(4, 256, 4, (1, 1), 256, 16, 2, 2, True, 64, head_dims=(64, 128), vocab=512),
    "26B-A4B": Shape(2, 256, 4, (2, 1), 256, 16, 2, 0, False, 0, 4, 2, 256, head_dims=(64, 128), vocab=512),
}
IDS = [5, 77, 300, 2, 411, 9, 8, 100, 333]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, shape in SMALL.items():
        monkeypatch.setitem(PUBLISHED, name, shape)


def made(kind: str, type: str, folder: Path) -> Path:
    path = folder / f"{kind}-{type}.gguf"
    make_synthetic.write(kind, path, type=type)
    return path


def loaded(path: Path, holding: Any = "packed") -> Model:
    with open_gguf(path) as file:
        return load_model(config_from_gguf(file.metadata, "x"), GGUFSource(file), holding)[0]


def logits(model: Model) -> np.ndarray:
    """fp32 [T, vocab]: a prompt, then single tokens."""
    state = model.new_state()
    prompt = np.array(model.forward(mx.array(IDS[:5]), state, all_logits=True))
    return np.concatenate([prompt, *([np.array(model.forward(mx.array([i]), state))] for i in IDS[5:])])


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("type", TYPES)
def test_packed_weights_give_the_logits_of_expanded_ones(type: str, kind: str, tmp_path: Path) -> None:
    """In embeddings, the head, attention, MLPs and experts."""
    path = made(kind, type, tmp_path)
    packed, dense = loaded(path), loaded(path, "dense")
    weights = [packed.weights.token_embd, packed.weights.output]
    weights += [w for layer in packed.weights.layers for w in vars(layer).values() if isinstance(w, Packed)]
    of_type = [w for w in weights if isinstance(w, Packed) and w.format.name == type]
    assert len(of_type) > 6 and any(w.codes.ndim == 3 for w in of_type) == (kind == "26B-A4B")
    want = logits(dense)
    assert np.isfinite(want).all() and want.std() > 0.01
    assert np.abs(logits(packed) - want).max() < 1e-3
    assert kl(want, logits(packed)) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "type"), [("E2B", "IQ3_S"), ("26B-A4B", "IQ2_XXS"), ("26B-A4B", "NVFP4")])
def test_kernels_give_the_logits_of_expanded_weights(kind: str, type: str, tmp_path: Path) -> None:
    path = made(kind, type, tmp_path)
    packed, dense = loaded(path), loaded(path, "dense")
    run = Kernels(metal, frozenset([OpKey("expand")]), strict=True)
    got, want = logits(Model(packed.config, packed.weights, run)), logits(dense)
    assert not run.off - {OpKey("expand")}
    assert np.abs(got - want).max() < 1e-2
    assert kl(want, got) < 2e-6


@pytest.mark.parametrize("kind", SMALL)
def test_scales_of_tensors_beside_nvfp4(kind: str, tmp_path: Path) -> None:
    """`.scale` multiplies a tensor's product, of experts one each, also where rows are joined; `.input_scale` does
    nothing; a scale of what has none is refused."""
    path, rng = made(kind, "NVFP4", tmp_path), np.random.default_rng(0)
    names = ["attn_q", "attn_k", "ffn_gate", "ffn_down"] + ["ffn_gate_up_exps"] * (kind == "26B-A4B")

    def beside(entries: list[Entry]) -> list[Entry]:
        n = {name: 4 if "exps" in name else 1 for name in names}
        more: list[Entry] = [
            (f"blk.1.{x}.scale", rng.uniform(0.3, 3, n[x]).astype(np.float32), F32)
            for x in names
            if any(e[0] == f"blk.1.{x}.weight" for e in entries)
        ]
        return [*entries, *more, ("blk.1.attn_q.input_scale", np.array([7], np.float32), F32)]

    scaled = odd(path, tmp_path / "scaled.gguf", edit=beside)
    packed, dense = loaded(scaled), loaded(scaled, "dense")
    assert packed.weights.layers[1].ffn_gate_up is not None, "joined all the same"
    np.testing.assert_allclose(logits(packed), logits(dense), rtol=0, atol=1e-3)
    assert np.abs(logits(packed) - logits(loaded(path))).max() > 0.01
    more: Entry = ("token_embd.scale", np.ones(1, np.float32), F32)
    with pytest.raises(InputError, match=r"token_embd\.scale"):
        loaded(odd(path, tmp_path / "embedding.gguf", edit=lambda entries: [*entries, more]))
