"""Towers that see, stage by stage, beside what transformers computes in fp32 for the fixtures in media/."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from drawings import SIZES, drawing
from PIL import Image
from recorded import HERE, kl

from mlx_gemma4.config import Config, Reader
from mlx_gemma4.conversation.language_model import load
from mlx_gemma4.execution import execution
from mlx_gemma4.files.gguf import open_gguf
from mlx_gemma4.loading.loader import open_model
from mlx_gemma4.media import layers, patches, projector, vision
from mlx_gemma4.media.layers import by_layers
from mlx_gemma4.media.picture import resized
from mlx_gemma4.model.soft import Encoded

KINDS = ("uv", "v", "v31")


def folder(kind: str) -> Path:
    return HERE / "media" / kind


def config_of(kind: str) -> Config:
    with open_model(folder(kind) / "model.gguf") as (config, _, _):
        return config


def recorded(kind: str) -> tuple[Any, dict[str, Any]]:
    return np.load(folder(kind) / "pictures.npz"), json.loads((folder(kind) / "pictures.json").read_text())


def png(pixels: np.ndarray) -> bytes:
    out = BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def some_rows(rows: mx.array) -> np.ndarray:
    n = rows.shape[0]
    return np.array(rows)[np.unique(np.linspace(0, n - 1, 12).round().astype(int))]


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_the_reference(size: str) -> None:
    """torchvision rounds its weights to 16 bits: a level or two off in less than a pixel of a hundred."""
    arrays, about = recorded("v")
    made = resized(Image.fromarray(drawing(*SIZES[size])), about["budget"])
    assert list(made.shape) == about["sizes"][size]["pixels"]
    off = np.abs(made[::7, ::5].astype(int) - arrays[f"{size}/pixels"])
    assert off.max() <= 2
    assert (off > 0).mean() < 0.01


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_stage_is_that_of_the_reference(kind: str, size: str) -> None:
    arrays, about = recorded(kind)
    pixels = resized(Image.fromarray(drawing(*SIZES[size])), about["budget"])
    with execution():
        weights = projector.read_towers(folder(kind) / "mmproj.gguf", config_of(kind))
        with open_gguf(folder(kind) / "mmproj.gguf") as gguf:
            read = Reader(gguf.metadata, "clip.vision.", kind)
        if kind == "uv":
            stages = {
                "embedded": patches.embedded(weights, pixels),
                "projected": by_layers(patches.rows(read, weights, pixels)),
            }
        else:
            down, across = pixels.shape[0] // 16, pixels.shape[1] // 16
            x, turns = vision.embedded(weights, pixels), vision.rotations(16, down, across)
            stages = {"embedded": x, "block 0": vision.layer(weights, "v.blk.0.", (2, 16), x, turns)}
            last = vision.layer(weights, "v.blk.1.", (2, 16), stages["block 0"], turns)
            stages["pooled"] = vision.pooled(weights, last, down, across)
            stages["projected"] = by_layers(vision.rows(read, weights, pixels))
        for stage, n in about["sizes"][size]["rows"].items():
            assert stages[stage].shape[0] == n, stage
            np.testing.assert_allclose(some_rows(stages[stage]), arrays[f"{size}/{stage}"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "off"), [(mx.float32, 1e-4), (mx.float16, 0.02), (mx.bfloat16, 0.2)])
@pytest.mark.parametrize(("kind", "metal"), [*((kind, False) for kind in KINDS), ("v31", True)])
def test_the_way_of_a_gpu(kind: str, metal: bool, dtype: mx.Dtype, off: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in the weights' type, heads padded (Metal), scores in pieces (fp32 elsewhere): the same operations, on
    this CPU."""
    arrays, about = recorded(kind)
    weights = dict(projector.read_towers(folder(kind) / "mmproj.gguf", config_of(kind)))
    weights = {name: w.astype(dtype) if w.ndim > 1 and "position" not in name else w for name, w in weights.items()}
    for module in (layers, vision):
        monkeypatch.setattr(module, "on_cpu", lambda: False)
    monkeypatch.setattr(vision, "on_metal", lambda: metal)
    monkeypatch.setattr(vision, "fused", lambda f, _: f)  # which calls a compiler
    monkeypatch.setattr(vision, "SCORES", 20_000)
    with open_gguf(folder(kind) / "mmproj.gguf") as gguf:
        read = Reader(gguf.metadata, "clip.vision.", kind)
    with execution():
        pixels = resized(Image.fromarray(drawing(*SIZES["square"])), about["budget"])
        rows = by_layers((patches if kind == "uv" else vision).rows(read, weights, pixels))
        assert rows.dtype == mx.float32
        np.testing.assert_allclose(some_rows(rows), arrays["square/projected"], rtol=off, atol=off)


def test_fp16_holds_what_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of numbers that fp16 can't hold."""
    monkeypatch.setattr(layers, "on_cpu", lambda: False)
    x = mx.array([[2e5, -1e6, 3.0, 0.0]])
    with execution():
        made = layers.linear(x, mx.eye(4).astype(mx.float16))
        np.testing.assert_allclose(np.array(made), np.array(x), rtol=1e-3, atol=1)


@pytest.mark.parametrize("prompt", ["one", "two"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_prompts_with_pictures_are_those_of_the_reference(kind: str, prompt: str) -> None:
    arrays, about = recorded(kind)
    lm = load(folder(kind) / "model.gguf", draft=None)
    assert lm.media is not None
    begin, between, end = about["words"]
    ids, held = list(begin), []
    for i, size in enumerate(about["prompts"][prompt]):
        ids += between if i else []
        part = {"type": "image", "image": png(drawing(*SIZES[size])), "tokens": about["budget"]}
        for piece in lm.media.encode(part):
            if isinstance(piece, Encoded):
                lm.model.soft.add(piece)
                held.append(piece)
                ids += piece.ids
            else:
                ids += lm.tokenizer.encode(piece, add_bos=False, parse_special=True)
    ids += end
    with execution():
        soft = lm.model.soft.rows(ids)
        logits = np.array(lm.model.forward(mx.array(ids), lm.model.new_state(), all_logits=True, soft=soft))
    theirs = arrays[f"logits/{prompt}"]
    np.testing.assert_allclose(logits[-len(theirs) :], theirs, atol=1e-3)
    assert kl(theirs, logits[-len(theirs) :]) <= 1e-6
