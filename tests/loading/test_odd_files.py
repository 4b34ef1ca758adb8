"""Files as they are found: what changes the result is honoured or refused by name, never dropped in silence."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from recorded import HERE
from rewrite import F32, Entry, odd, plus

from mlx_gemma4 import InputError, Sampling, generate, load
from mlx_gemma4.conversation.language_model import LanguageModel
from mlx_gemma4.generation.loop import generate_tokens

E2B, GEMMA3 = HERE / "e2b-f32.gguf", HERE / "gemma3-f32.gguf"
IDS = [2, 251, 37, 197, 260, 179]


def logits(file: Path | LanguageModel) -> np.ndarray:
    lm = load(file) if isinstance(file, Path) else file
    return np.array(lm.model.forward(mx.array(IDS), lm.model.new_state()))


def refused(file: Path) -> str:
    read: list[int] = []
    with pytest.raises(InputError) as error:
        load(file, progress=lambda done, total: read.append(done))
    assert not read, "said after tensors were read"
    assert len(str(error.value)) < 600
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("source", "keys", "says"),
    [
        (GEMMA3, {"gemma3.rope.scaling.type": "yarn", "gemma3.rope.scaling.factor": 4.0}, "gemma3.rope"),
        (E2B, {"gemma4.rope.scaling.type": "longrope"}, "gemma4.rope"),
        (GEMMA3, {"gemma3.rope.scaling.factor": -2.0}, "gemma3.rope.scaling.factor"),
        (GEMMA3, {"gemma3.rope.scaling.factor": float("nan")}, "gemma3.rope.scaling.factor"),
        (GEMMA3, {"gemma3.rope.scale_linear": 4.0}, "gemma3.rope.scale_linear"),
        (GEMMA3, {"gemma3.rope.scaling.attn_factor": 1.3}, "gemma3.rope.scaling.attn_factor"),
        (E2B, {"gemma4.attention.layer_norm_rms_epsilon": -1.0}, "layer_norm_rms_epsilon"),
        (E2B, {"gemma4.attention.layer_norm_rms_epsilon": 50.0}, "layer_norm_rms_epsilon"),
        (E2B, {"gemma4.rope.freq_base_swa": -1.0}, "rope.freq_base_swa"),
        (E2B, {"gemma4.rope.freq_base": 0.0}, "rope.freq_base"),
        (E2B, {"gemma4.final_logit_softcapping": -30.0}, "final_logit_softcapping"),
        (E2B, {"gemma4.attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (E2B, {"gemma4.attention.causal": False}, "attention.causal"),
        (E2B, {"gemma4.attention.scale": 0.5}, "attention.scale"),
        (E2B, {"gemma4.rope.dimension_count": 10}, "rope.dimension_count"),
        (E2B, {"gemma4.rope.dimension_count_swa": 6}, "rope.dimension_count_swa"),
        (E2B, {"gemma4.attention.max_alibi_bias": 8.0}, "max_alibi_bias"),
        (E2B, {"gemma4.expert_weights_scale": 2.5}, "expert_weights_scale"),
        (E2B, {"gemma4.expert_shared_count": 1}, "expert_shared_count"),
        (E2B, {"gemma4.residual_scale": 0.5}, "residual_scale"),
        (E2B, {"gemma4.embedding_scale": 3.0}, "embedding_scale"),
        (E2B, {"gemma4.embedding_length_per_layer_input": None}, "per_layer"),
        (E2B, {"general.architecture": [1, 2, 3]}, "architecture"),
        (E2B, {"general.architecture": 7}, "architecture"),
        (E2B, {"gemma4.attention.head_count_kv": ["a"] * 8}, "head_count_kv"),
        (E2B, {"gemma4.attention.head_count_kv": [2.5] * 8}, "head_count_kv"),
        (E2B, {"gemma4.feed_forward_length": [float("nan")] * 8}, "feed_forward_length"),
        (E2B, {"gemma4.block_count": "8"}, "block_count"),
        (E2B, {"gemma4.context_length": [512]}, "context_length"),
        (E2B, {"tokenizer.ggml.tokens": 5}, "vocab"),
        (E2B, {"tokenizer.ggml.tokens": [1, 2]}, "vocab"),
        (E2B, {"general.type": "adapter"}, "is a LoRA adapter"),
        (E2B, {"general.type": "imatrix"}, "importance matrix"),
        (E2B, {"general.architecture": "clip"}, "projector"),
    ],
)
def test_keys_that_change_the_maths_are_refused_by_name(
    source: Path, keys: dict[str, Any], says: str, tmp_path: Path
) -> None:
    assert says in refused(odd(source, tmp_path / "odd.gguf", keys))


@pytest.mark.parametrize(
    ("source", "keys"),
    [
        (GEMMA3, {"gemma3.rope.scaling.factor": 0.0}),
        (GEMMA3, {"gemma3.rope.scaling.factor": 8.0, "gemma3.rope.scaling.type": "none"}),
        (GEMMA3, {"gemma3.rope.freq_base": None, "gemma3.rope.global.freq_base": 1e6}),
        (GEMMA3, {"gemma3.rope.local.freq_base": 1e4, "gemma3.mm.tokens_per_image": 256}),
        (E2B, {"gemma4.attention.causal": True, "gemma4.attn_logit_softcapping": 0.0, "gemma4.residual_scale": 1.0}),
        (E2B, {"gemma4.vision.attention.layer_norm_epsilon": 1e-6, "gemma4.attention.scale": 1.0}),
    ],
)
def test_keys_that_say_what_is_so_anyway(source: Path, keys: dict[str, Any], tmp_path: Path) -> None:
    np.testing.assert_array_equal(logits(odd(source, tmp_path / "same.gguf", keys)), logits(source))


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_q.bias",
        "blk.0.attn_sinks.weight",
        "output.bias",
        "token_embd.bias",
        "per_layer_more.weight",
        "blk.3.ffn_gate_up.weight",
        "blk.8.attn_q.weight",
        "token_embd.scale",
        "blk.0.attn_norm.scale",
    ],
)
def test_a_tensor_that_nothing_uses_is_refused(name: str, tmp_path: Path) -> None:
    assert name in refused(odd(E2B, tmp_path / "more.gguf", edit=plus(name, np.ones(1))))


def test_scales_are_multiplied_in(tmp_path: Path) -> None:
    """As llama.cpp: on the product, and so on the weight; those of inputs are left out."""
    scales = {"blk.0.attn_q": 3.0, "blk.0.ffn_gate": 2.0, "blk.1.ffn_down": 0.25, "per_layer_model_proj": 2.0}

    def scaled(entries: list[Entry]) -> list[Entry]:
        return [(n, d * np.float32(scales.get(n.removesuffix(".weight"), 1)), k) for n, d, k in entries]

    def beside(entries: list[Entry]) -> list[Entry]:
        more: list[Entry] = [(f"{name}.scale", np.array([x], np.float32), F32) for name, x in scales.items()]
        return [*entries, *more, ("blk.0.attn_q.input_scale", np.array([7], np.float32), F32)]

    made, wanted = (odd(E2B, tmp_path / f"{edit.__name__}.gguf", edit=edit) for edit in (beside, scaled))
    np.testing.assert_allclose(logits(made), logits(wanted), rtol=0, atol=1e-5)
    assert np.abs(logits(made) - logits(E2B)).max() > 0.1
    quantized = odd(HERE / "e2b-q8_0.gguf", tmp_path / "q.gguf", edit=plus("blk.0.ffn_down.scale", np.array([2.0])))
    assert "blk.0.ffn_down.scale" in refused(quantized)


@pytest.mark.parametrize("source", [E2B, HERE / "12b-q8_0.gguf"])
def test_q_k_and_v_in_one(source: Path, tmp_path: Path) -> None:
    names = [f"blk.0.attn_{x}.weight" for x in "qkv"]

    def join(entries: list[Entry]) -> list[Entry]:
        parts = {n: d for n, d, _ in entries if n in names}
        kind = next(k for n, _, k in entries if n == names[0])
        joined: Entry = ("blk.0.attn_qkv.weight", np.concatenate([parts[n] for n in names]), kind)
        return [joined, *(e for e in entries if e[0] not in names)]

    np.testing.assert_array_equal(logits(odd(source, tmp_path / "joined.gguf", edit=join)), logits(source))
    short = odd(
        source, tmp_path / "short.gguf", edit=lambda e: [(n, d[:-1] if "qkv" in n else d, k) for n, d, k in join(e)]
    )
    assert "attn_qkv" in refused(short)


def test_types_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    def last(entries: list[Entry]) -> list[Entry]:
        name, data, _ = next(e for e in reversed(entries) if e[0].endswith("ffn_up.weight"))
        rows = np.zeros((data.shape[0], 320), np.uint8)
        return [e if e[0] != name else (name, rows, gguf.GGMLQuantizationType.Q8_1) for e in entries]

    assert "Q8_1" in refused(odd(HERE / "31b-rare.gguf", tmp_path / "last.gguf", edit=last))


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    tokens = [str(t) for t in gguf.GGUFReader(E2B).fields["tokenizer.ggml.tokens"].contents()]
    more = [*tokens, *(f"<extra_{i}>" for i in range(50))]
    keys: dict[str, Any] = {"tokenizer.ggml.tokens": more, "gemma4.vocab_size": len(tokens)}
    assert f"{len(more)} tokens for an embedding of {len(tokens)} rows" in refused(odd(E2B, tmp_path / "a.gguf", keys))
    keys = {"tokenizer.ggml.tokens": more}
    for name, value in (("token_type", 1), ("scores", 0.0)):
        fields = list(gguf.GGUFReader(E2B).fields[f"tokenizer.ggml.{name}"].contents())
        keys[f"tokenizer.ggml.{name}"] = [*fields, *[value] * 50]
    assert "token_embd.weight is" in refused(odd(E2B, tmp_path / "b.gguf", keys))


def test_a_folders_token_past_the_rows(tmp_path: Path) -> None:
    """Some tokenizers have one that their model lacks: an error where it is used."""
    folder = tmp_path / "model"
    shutil.copytree(HERE / "folders" / "gemma3-mlx4", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    beyond = load(folder).config.vocab + 400
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = vocab | {f"zz{i}": i for i in range(len(vocab), beyond)} | {"<extra>": beyond}
    flags = dict.fromkeys(("special", "normalized", "single_word", "lstrip", "rstrip"), False)
    tokenizer["added_tokens"].append({"id": beyond, "content": "<extra>", **flags})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    lm = load(folder)
    with pytest.raises(InputError, match=f"no token {beyond}"):
        generate(lm, "say <extra> now", max_tokens=1)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": None}, "yarn"),
        ({"rope_parameters": {"full_attention": {"rope_type": "llama3", "factor": 8.0}}}, "llama3"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 8.0}}}, "scaled RoPE"),
        ({"rope_parameters": {"full_attention": {"rope_theta": "x"}}}, "rope_theta"),
        ({"use_bidirectional_attention": True}, "what follows"),
        ({"attn_logit_softcapping": 50.0}, "softcapped"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"layer_types": ["linear_attention"] * 99}, "layer_types"),
    ],
)
def test_configurations_of_folders(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(HERE / "folders" / "gemma3-mlx4", folder)
    whole = json.loads((folder / "config.json").read_text())
    whole.get("text_config", whole).update(config)
    (folder / "config.json").write_text(json.dumps(whole))
    assert says in refused(folder)


def test_what_is_no_model_is_called_by_its_name(tmp_path: Path) -> None:
    assert "vocabulary without a model" in refused(odd(E2B, tmp_path / "vocab.gguf", edit=lambda _: []))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    assert "LoRA" in refused(tmp_path / "lora")
    data = E2B.read_bytes()
    for name, glob in (("part1of2", "part"), ("part2of2", "part"), ("part-00001-of-00002", "part-"), ("aa", "")):
        file = tmp_path / f"m.gguf.{name}"
        file.write_bytes(data[len(data) // 2 :] if "2of2" in name else data[: len(data) // 2])
        assert f"cat m.gguf.{glob}* > m.gguf" in refused(file)
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "no regular file" in refused(tmp_path / "pipe.gguf")


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    """A norm's are found at load, a matrix's by its logits, at once or when a token first meets them."""

    def poked(name: str, row: int) -> Path:
        def poke(entries: list[Entry]) -> list[Entry]:
            return [
                (n, np.where(np.arange(len(d)) == row, np.nan, d.T).T if n == name else d, k) for n, d, k in entries
            ]

        return odd(E2B, tmp_path / "nan.gguf", edit=lambda e: [(n, d.astype(np.float32), k) for n, d, k in poke(e)])

    with pytest.raises(InputError, match=r"blk\.3\.attn_norm\.weight has values"):
        load(poked("blk.3.attn_norm.weight", 0))
    with pytest.raises(InputError, match="logits are NaN"):
        generate(load(poked("blk.2.ffn_up.weight", 3)), "hi", max_tokens=4)
    first = int(np.argmax(logits(E2B)))
    lm = load(poked("per_layer_token_embd.weight", first))
    with pytest.raises(InputError, match="logits are NaN"):
        generate(lm, IDS, max_tokens=4, temperature=0)


@pytest.mark.parametrize("value", [-1, 3.5, 70, "many"])
def test_hints_out_of_range_are_left_out(value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = {"general.sampling.top_k": value, "general.sampling.top_p": 1.5, "general.sampling.temp": -2.0}
    lm = load(odd(E2B, tmp_path / "hints.gguf", keys))
    top_k = {-1: 0, "many": 0}.get(value, int(value) if not isinstance(value, str) else 0)
    assert lm.sampling == Sampling(temperature=1.0, top_k=top_k, top_p=1.0)
    assert any("top_p 1.5" in message for message in caplog.messages)


@pytest.mark.parametrize("ids", [[2, 317], [2, 2**40], [2, -1], [2**70], [np.int64(317)]])
def test_ids_without_a_row(ids: list[int]) -> None:
    lm = load(E2B)
    with pytest.raises(InputError, match="there is no token"):
        generate(lm, ids, max_tokens=1)
    with pytest.raises(InputError, match="there is no token"):
        list(generate_tokens(lm.model, lm.model.new_state(), ids, Sampling(temperature=0), 1))
