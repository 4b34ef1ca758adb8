"""Folders of safetensors give transformers' logits, joined or apart, quantized by mlx-lm or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import recorded

from mlx_gemma4 import InputError, load
from mlx_gemma4.loading.from_safetensors import gguf_name

FOLDERS = Path(__file__).parents[1] / "fixtures" / "folders"
NAMES = sorted(folder.name for folder in FOLDERS.iterdir())


def distances(name: str, weights: str, fuse: bool = True) -> tuple[float, float]:
    """Largest difference of a logit from transformers', and mean KL, over the recorded prompts."""
    kind = name.rsplit("-", 1)[0]
    model = load(FOLDERS / name, weights=weights, fuse=fuse).model
    worst, kls = 0.0, []
    with np.load(FOLDERS / name / "logits.npz") as arrays:
        for prompt, key in zip(recorded.prompts(kind), arrays.files, strict=True):
            theirs = arrays[key]
            ours = np.array(model.forward(mx.array(prompt), model.new_state(), all_logits=True))[-len(theirs) :]
            worst = max(worst, float(np.abs(ours - theirs).max()))
            kls.append(recorded.kl(theirs, ours))
    return worst, float(np.mean(kls))


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_dense_equals_transformers(name: str, fuse: bool) -> None:
    worst, kl = distances(name, "dense", fuse)
    assert worst <= 1e-3
    assert kl <= 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_as_stored_equals_transformers(name: str) -> None:
    _, kl = distances(name, "packed")
    assert kl <= 1e-6


def test_names() -> None:
    assert gguf_name("model.language_model.layers.3.mlp.up_proj.weight") == "blk.3.ffn_up.weight"
    assert gguf_name("language_model.model.layers.11.router.scale") == "blk.11.ffn_gate_inp.scale"
    assert gguf_name("model.embed_tokens.weight") == "token_embd.weight"
    assert gguf_name("model.vision_tower.blocks.0.weight") == "model.vision_tower.blocks.0.weight"


def copied(folder: str, target: Path) -> Path:
    return Path(shutil.copytree(FOLDERS / folder, target / folder))


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        load(tmp_path)


def test_config_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json.*JSON"):
        load(tmp_path)


def test_no_tensors(tmp_path: Path) -> None:
    folder = copied("e2b-mlx4", tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no \.safetensors"):
        load(folder)


def test_cut_short(tmp_path: Path) -> None:
    file = copied("e2b-mlx4", tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load(file.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"num_hidden_layers": 5}, "layer_types"),
        ({"hidden_size": 128}, "token_embd.weight"),
        ({"num_attention_heads": 3}, "attn_q.weight"),
        ({"num_kv_shared_layers": 4}, "share keys"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ],
)
def test_config_that_cannot_be(change: dict[str, object], message: str, tmp_path: Path) -> None:
    file = copied("e2b-mlx4", tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=message):
        load(file.parent)
