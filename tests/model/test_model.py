"""The model against transformers and llama.cpp on the recorded fixtures, and against itself.

Every kind, as F32 and in each quantized mix; prompts shorter and several times longer than the window.
What the numbers are and who made them: tests/fixtures/README.md.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest
from recorded import HERE, KINDS, kl, logits, path, prompts, sidecar, tags, window
from rewrite import Edit, Entry, rewrite, up_first

from mlx_gemma4 import load
from mlx_gemma4.quant.formats import Packed

Holding = Literal["packed", "dense"]
ALL_TYPES = {
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"),
}
F32 = [(kind, tag) for kind in KINDS for tag in tags(kind) if tag.endswith("f32")]
QUANTIZED = [(kind, tag) for kind in KINDS for tag in tags(kind) if not tag.endswith("f32")]
LONGEST = -1  # the index of the prompt that is several windows long


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where fixtures that are made from others go."""
    return tmp_path_factory.mktemp("derived")


def load_model(file: Path, holding: Holding = "dense", fuse: bool = True) -> Any:
    """The model of a GGUF."""
    return load(file, weights=holding, fuse=fuse).model


@functools.cache
def kept_model(file: Path, holding: Holding = "dense") -> Any:
    """As `load_model`, once per file."""
    return load_model(file, holding)


def every_logit(model: Any, ids: list[int]) -> np.ndarray:
    """fp32 [T, vocab] of one pass over a prompt."""
    return np.array(model.forward(mx.array(ids, mx.int32), model.new_state(), all_logits=True))


@functools.cache
def our_logits(file: Path, kind: str, holding: Holding) -> list[np.ndarray]:
    """As recorded.logits: per prompt, the last positions' logits."""
    last = [len(x) for x in logits(kind, "f32", "transformers")]
    return [every_logit(kept_model(file, holding), ids)[-n:] for ids, n in zip(prompts(kind), last, strict=True)]


def in_chunks(model: Any, ids: list[int], size: int) -> dict[int, np.ndarray]:
    """The logits after each chunk of `size` tokens: {tokens read: [vocab]}."""
    state = model.new_state()
    result = {}
    for start in range(0, len(ids), size):
        chunk = ids[start : start + size]
        result[start + len(chunk)] = np.array(model.forward(mx.array(chunk, mx.int32), state))
    return result


def test_fixtures_cover_every_type() -> None:
    seen = {t for kind in KINDS for file in sidecar(kind)["files"].values() for t in file["types"]}
    assert seen == ALL_TYPES


@pytest.mark.parametrize(("kind", "tag"), F32)
def test_f32_file_gives_transformers_logits(kind: str, tag: str, folder: Path) -> None:
    ours = our_logits(path(kind, tag, folder), kind, "dense")
    for mine, theirs in zip(ours, logits(kind, tag, "transformers"), strict=True):
        assert np.abs(mine - theirs).max() <= 1e-3
        assert kl(theirs, mine) <= 1e-6


@pytest.mark.parametrize("holding", ["packed", "dense"])
@pytest.mark.parametrize(("kind", "tag"), QUANTIZED)
def test_quantized_file_gives_fp32_logits(kind: str, tag: str, holding: Holding, folder: Path) -> None:
    """Against transformers in fp32 over gguf.quants.dequantize of the same file."""
    ours = our_logits(path(kind, tag, folder), kind, holding)
    for mine, theirs in zip(ours, logits(kind, tag, "transformers"), strict=True):
        assert kl(theirs, mine) <= 1e-6


@pytest.mark.parametrize(("kind", "tag"), F32 + QUANTIZED)
def test_near_llama_cpp(kind: str, tag: str, folder: Path) -> None:
    """llama.cpp rounds activations to 8 bits (and its GELU to a table in fp16), so it is only near."""
    ours = our_logits(path(kind, tag, folder), kind, "dense" if tag.endswith("f32") else "packed")
    for mine, llama in zip(ours, logits(kind, tag, "llama.cpp"), strict=True):
        assert kl(llama, mine) <= 5e-3


@pytest.mark.parametrize("tag", ["f32", "q4_k_m"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_chunking_gives_the_same_logits(kind: str, tag: str) -> None:
    """Chunks of 1 (decode) to window + 2 tokens: each chunk's end falls before, on and after the window's."""
    model = kept_model(HERE / f"{kind}-{tag}.gguf")
    ids = prompts(kind)[LONGEST]
    whole = every_logit(model, ids)
    for size in range(1, window(kind, tag) + 3):
        for read, last in in_chunks(model, ids, size).items():
            np.testing.assert_allclose(last, whole[read - 1], atol=2e-4, err_msg=f"chunks of {size}, {read} read")


@pytest.mark.parametrize(("kind", "tag"), QUANTIZED)
def test_decode_of_packed_weights_equals_prefill(kind: str, tag: str) -> None:
    """One token at a time takes other paths through packed weights than many at once."""
    model = kept_model(HERE / f"{kind}-{tag}.gguf", "packed")
    ids = prompts(kind)[1]
    whole = every_logit(model, ids)
    for read, last in in_chunks(model, ids, 1).items():
        np.testing.assert_allclose(last, whole[read - 1], atol=2e-4, err_msg=f"{read} read")


@pytest.mark.parametrize(("kind", "tag"), QUANTIZED)
def test_packed_means_packed(kind: str, tag: str) -> None:
    """The tests above do compare two ways to hold the same weights."""
    held = {holding: kept_model(HERE / f"{kind}-{tag}.gguf", holding).weights for holding in ("packed", "dense")}
    assert isinstance(held["packed"].output, Packed)
    assert all(isinstance(layer.ffn_down, Packed) for layer in held["packed"].layers)
    assert all(isinstance(layer.ffn_down, mx.array) for layer in held["dense"].layers)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 257])
@pytest.mark.parametrize("kind", ["e2b", "12b"])
def test_long_prompts_outgrow_no_buffer(kind: str, size: int) -> None:
    """560 tokens: buffers of 256 and 512 tokens grow, and sliding layers let go of what left their window, not more."""
    model = kept_model(HERE / f"{kind}-f32.gguf")
    ids = [2, *np.random.default_rng(size).integers(3, 317, 559).tolist()]
    whole = every_logit(model, ids)
    state = model.new_state()
    for start in range(0, len(ids), size):
        chunk = mx.array(ids[start : start + size], mx.int32)
        part = np.array(model.forward(chunk, state, all_logits=True))
        np.testing.assert_allclose(part, whole[start : start + size], atol=5e-4, err_msg=f"{start} read before")


def test_states_of_one_model_do_not_meet() -> None:
    """Two sequences, read in turns, give what each gives alone."""
    model = kept_model(HERE / "e2b-f32.gguf")
    first, second = prompts("e2b")[1], prompts("e2b")[2][:20]
    states = model.new_state(), model.new_state()
    for a, b in zip(first, second, strict=True):
        last = [np.array(model.forward(mx.array([t], mx.int32), s)) for t, s in zip((a, b), states, strict=True)]
    for ids, mixed in zip((first, second), last, strict=True):
        np.testing.assert_array_equal(in_chunks(model, ids, 1)[len(ids)], mixed)


@pytest.mark.parametrize(("kind", "tag"), [(k, "q4_k_m") for k in KINDS] + [("26b-a4b", "split-mix"), ("31b", "rare")])
def test_fused_gate_and_up_change_no_bit_of_packed_decode(kind: str, tag: str) -> None:
    file = HERE / f"{kind}-{tag}.gguf"
    fused, apart = load_model(file, "packed"), load_model(file, "packed", fuse=False)
    ids = prompts(kind)[0]
    for together, alone in zip(in_chunks(fused, ids, 1).values(), in_chunks(apart, ids, 1).values(), strict=True):
        np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_gate_and_up_change_dense_products_by_rounding_only(kind: str, folder: Path) -> None:
    """BLAS may group its sums by the matrix's height; the logits' norm tells how much that was."""
    file = path(kind, "split-f32" if kind == "26b-a4b" else "f32", folder)
    fused, apart = load_model(file), load_model(file, fuse=False)
    ids = prompts(kind)[0]
    for together, alone in zip(in_chunks(fused, ids, 1).values(), in_chunks(apart, ids, 1).values(), strict=True):
        assert np.linalg.norm(together - alone) <= 1e-6 * np.linalg.norm(alone)


@pytest.mark.parametrize(
    ("kind", "tag", "says"),
    [
        ("12b", "q4_k_m", "Fused gate+up on 2 MLP layers (0 left unfused)"),
        ("12b", "untied-q4_k_m", "Fused gate+up on 1 MLP layers (1 left unfused)"),
        ("e2b", "q4_k_m", "Fused gate+up on 4 MLP layers (0 left unfused)"),
        ("26b-a4b", "split-mix", "Fused gate+up on 1 expert layers (1 left unfused)"),
    ],
)
def test_the_log_counts_fused_layers(kind: str, tag: str, says: str, caplog: pytest.LogCaptureFixture) -> None:
    """Halves of different types (two of these files have such a layer) stay apart."""
    with caplog.at_level(logging.INFO, logger="mlx_gemma4"):
        load_model(HERE / f"{kind}-{tag}.gguf", "packed")
    assert says in [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("holding", ["packed", "dense"])
@pytest.mark.parametrize(("kind", "tag"), [("12b", "q4_k_m"), ("26b-a4b", "split-mix"), ("e4b", "f32")])
def test_gate_and_up_may_come_in_any_order(kind: str, tag: str, holding: Holding, tmp_path: Path) -> None:
    file = HERE / f"{kind}-{tag}.gguf"
    turned = rewrite(file, tmp_path / "up-first.gguf", up_first)
    ids = prompts(kind)[1]
    np.testing.assert_array_equal(
        every_logit(load_model(turned, holding), ids), every_logit(load_model(file, holding), ids)
    )


def swap_gate_and_up(entries: list[Entry]) -> list[Entry]:
    """The gates' rows under the names of the ups, and the other way round."""
    other = {"ffn_gate.": "ffn_up.", "ffn_up.": "ffn_gate."}
    rows = {name: (data, kind) for name, data, kind in entries}
    result = []
    for name, data, kind in entries:
        part = next((p for p in other if p in name), None)
        result.append((name, *rows[name.replace(part, other[part])]) if part else (name, data, kind))
    return result


def halve_output_scales(entries: list[Entry]) -> list[Entry]:
    return [(n, data * np.float32(0.5) if "layer_output_scale" in n else data, k) for n, data, k in entries]


@pytest.mark.parametrize("edit", [swap_gate_and_up, halve_output_scales])
def test_the_comparison_sees_a_wrong_model(edit: Edit, tmp_path: Path) -> None:
    """The fixtures are sensitive: with gate for up, or another layer scale, they are far from the record."""
    wrong = load_model(rewrite(HERE / "12b-f32.gguf", tmp_path / "wrong.gguf", edit))
    theirs = logits("12b", "f32", "transformers")[0]
    assert kl(theirs, every_logit(wrong, prompts("12b")[0])[-len(theirs) :]) > 1e-2
