"""Files of assistants: three spellings in GGUF and folders, what is checked of them, and how one is found."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import make_synthetic
import mlx.core as mx
import numpy as np
import pytest
from recorded import kl
from recorded import path as fixture

from mlx_gemma4 import InputError, load
from mlx_gemma4.conversation.language_model import demo_path
from mlx_gemma4.files.folder import find_models
from mlx_gemma4.files.repository import best_drafters, choices, choose
from mlx_gemma4.loading.assistant import SPELLINGS, assistant_beside, load_assistant, open_assistant
from mlx_gemma4.loading.from_safetensors import gguf_name
from mlx_gemma4.loading.loader import load_model, open_model
from mlx_gemma4.model.assistant import Assistant, mismatch
from mlx_gemma4.model.model import Model

FOLDER = Path(__file__).parents[1] / "fixtures" / "assistants"
OWN = {
    "gemma4-assistant": ("embedding_length_out", "nextn.pre_projection", "nextn.post_projection"),
    "gemma4_assistant": ("n_embd_backbone", "mtp.pre_projection", "mtp.post_projection"),
    "gemma4_mtp": ("backbone_embedding_length", "mtp_pre_proj", "mtp_post_proj"),
}
Arrays = dict[str, np.ndarray]


def target_of(kind: str) -> Model:
    with open_model(FOLDER / kind / "target") as (config, source, _):
        return load_model(config, source)[0]


def as_gguf(
    kind: str,
    spelling: str,
    path: Path,
    edit: Callable[[Arrays], object] = lambda _: None,
    quantized: bool = False,
    **keys: Any,
) -> Path:
    """The recorded assistant of a kind as a GGUF in F32, or with a head in Q8_0."""
    text = json.loads((FOLDER / kind / "assistant" / "config.json").read_text())["text_config"]
    backbone, pre, post = OWN[spelling]
    names = {"pre_projection.weight": f"{pre}.weight", "post_projection.weight": f"{post}.weight"}
    names |= {"masked_embedding.centroids.weight": "mtp.centroids.weight"}
    names |= {"masked_embedding.token_ordering": "mtp.token_ordering"}
    arrays: Arrays = {}
    for name, array in mx.load(str(FOLDER / kind / "assistant" / "model.safetensors")).items():  # type: ignore[union-attr]
        if spelling == "gemma4_assistant" or "masked" not in name:
            dtype = mx.int32 if "ordering" in name else mx.float32
            arrays[names.get(name, gguf_name(name))] = np.array(array.astype(dtype))
    edit(arrays)
    values = {"block_count": text["num_hidden_layers"], "embedding_length": text["hidden_size"], backbone: 40}
    values |= {"feed_forward_length": text["intermediate_size"], "attention.head_count": text["num_attention_heads"]}
    values |= {"attention.key_length": 32, "attention.key_length_swa": 16, "attention.sliding_window": 9}
    values |= {"nextn_predict_layers": text["num_hidden_layers"], "centroid_top_k": 3, "attention.k_eq_v": 1} | keys
    out = gguf.GGUFWriter(path, spelling)
    for key, value in values.items():
        if value is not None:
            out.add_uint32(f"{spelling}.{key}", value)
    out.add_float32(f"{spelling}.attention.layer_norm_rms_epsilon", 1e-6)
    for name, array in arrays.items():
        kind_of = gguf.GGMLQuantizationType.Q8_0
        if quantized and name == "token_embd.weight":
            out.add_tensor(name, gguf.quants.quantize(array, kind_of), raw_dtype=kind_of)
        else:
            out.add_tensor(name, array)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def first_logits(a: Assistant, ids: list[int], hidden: np.ndarray) -> np.ndarray:
    state = a.target.new_state()
    a.target.prefill(mx.array(ids[:-1]), state)
    h = a.step(a.run, mx.array(ids[-1:], mx.int32), mx.array(hidden)[None], a.attention(a.inputs(state)))
    return np.array(a.scores(a.run, h))


@pytest.mark.parametrize(("kind", "spelling"), [("12b", s) for s in SPELLINGS] + [("e2b", "gemma4_assistant")])
def test_spellings(kind: str, spelling: str, tmp_path: Path) -> None:
    """Each as the folder it was made of: no pattern (the last layer is global), no rope_freqs, with centroids."""
    a = load_assistant(as_gguf(kind, spelling, tmp_path / "a.gguf"), target_of(kind))
    assert a.config.centroids == (16 if kind == "e2b" else 0)
    ids = json.loads((FOLDER / "recorded.json").read_text())["prompts"][2]
    with np.load(FOLDER / f"{kind}.npz") as recorded:
        made = first_logits(a, ids, recorded["2/hidden"][0])
        assert kl(recorded["2/logits"][:1], made) <= 1e-10


def test_a_quantized_head_in_clusters(tmp_path: Path) -> None:
    """Its rows go in the order of the centroids, packed; and centroids that are not to be used are not."""
    target = target_of("e2b")
    ids = json.loads((FOLDER / "recorded.json").read_text())["prompts"][2]
    hidden = np.load(FOLDER / "e2b.npz")["2/hidden"][0]
    files = [as_gguf("e2b", "gemma4_assistant", tmp_path / f"{q}.gguf", quantized=q) for q in (True, False)]
    packed, plain = (first_logits(load_assistant(file, target), ids, hidden) for file in files)
    assert 0 < kl(plain, packed) <= 1e-3
    dense = load_assistant(as_gguf("e2b", "gemma4_assistant", tmp_path / "d.gguf", use_ordered_embeddings=0), target)
    every = first_logits(dense, ids, hidden)
    scored = plain[0] > plain.min()
    np.testing.assert_allclose(every[0][scored], plain[0][scored], atol=1e-4)
    assert dense.config.centroids == 0
    assert 20 <= scored.sum() <= 24  # 3 centroids of 8 tokens


def test_a_folder_of_google_s_12b(tmp_path: Path) -> None:
    """Its class has another name."""
    shutil.copytree(FOLDER / "12b" / "assistant", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["model_type"], config["text_config"]["model_type"] = "gemma4_unified_assistant", "gemma4_unified_text"
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    assert load_assistant(tmp_path / "a", target_of("12b")).config.target_hidden == 40


def drop(name: str) -> Callable[[Arrays], object]:
    return lambda arrays: arrays.pop(name)


def cut(name: str) -> Callable[[Arrays], object]:
    return lambda arrays: arrays.update({name: arrays[name][:-8]})


def twice(arrays: Arrays) -> None:
    arrays["mtp.token_ordering"][3] = arrays["mtp.token_ordering"][4]


@pytest.mark.parametrize(
    ("kind", "edit", "keys", "says"),
    [
        ("12b", drop("nextn.pre_projection.weight"), {}, "tensor pre_projection.weight missing; .*download it again"),
        ("12b", drop("blk.2.ffn_norm.weight"), {}, r"tensor blk\.2\.ffn_norm\.weight missing"),
        ("12b", cut("nextn.post_projection.weight"), {}, "post_projection.weight is 32 x 32, .* calls for 40 x 32"),
        ("12b", cut("blk.0.attn_q.weight"), {}, r"blk\.0\.attn_q\.weight is 56 x 32, .* calls for 64 x 32"),
        ("12b", None, {"embedding_length_out": None}, "embedding_length_out is missing"),
        ("12b", None, {"block_count": 5000}, "block_count is 5000"),
        (
            "12b",
            None,
            {"embedding_length_out": 48},
            "for a model of hidden size 48, and the model's is 40; give --draft",
        ),
        ("12b", None, {"attention.key_length_swa": 64}, "for sliding heads of 64, and the model's are of 16"),
        ("12b", None, {"attention.head_count": 3}, "of 3 heads, which the model's 2 KV heads of sliding layers don't"),
        ("12b", None, {"vocab_size": 130}, "for a vocabulary of 130 tokens, and the model's has 128"),
        ("e2b", twice, {}, "its ordering has not each token once; it is damaged"),
        ("e2b", cut("mtp.token_ordering"), {}, "ordering.weight is 120, .* calls for 128"),
        ("e2b", None, {"centroid_top_k": 99}, "centroid_top_k is 99"),
    ],
)
def test_what_is_wrong_is_said(
    kind: str, edit: Callable[[Arrays], object] | None, keys: dict[str, Any], says: str, tmp_path: Path
) -> None:
    spelling = "gemma4_assistant" if kind == "e2b" else "gemma4-assistant"
    file = as_gguf(kind, spelling, tmp_path / "a.gguf", edit or (lambda _: None), **keys)
    with pytest.raises(InputError, match=says) as raised:
        load_assistant(file, target_of(kind))
    assert str(raised.value).startswith(str(file))
    assert "\n" not in str(raised.value)


def test_no_assistant_at_all(tmp_path: Path) -> None:
    target = target_of("12b")
    with pytest.raises(InputError, match="is a model of architecture 'gemma4', no assistant of Gemma 4; give --draft"):
        load_assistant(demo_path(), target)
    with pytest.raises(InputError, match="is a folder of model_type 'gemma4_text', no assistant"):
        load_assistant(FOLDER / "12b" / "target", target)
    with pytest.raises(InputError, match="no assistant"):
        load_assistant(tmp_path, target)
    with pytest.raises(InputError, match=r"is an assistant, which drafts for a model .--draft., and no model itself"):
        load(demo_path().with_name("mtp-gemma4-demo.gguf"))
    gemma3 = load(fixture("gemma3", "q8_0", tmp_path), draft=None)
    with open_assistant(FOLDER / "12b" / "assistant") as (config, _):
        assert mismatch(config, gemma3.config) == "for Gemma 4, and the model is gemma3"


def test_the_one_beside_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In its folder or in MTP; of several the one that fits; none is no error."""
    caplog.set_level(logging.INFO)
    model = tmp_path / "tales-it-Q4_K_M.gguf"
    shutil.copy(demo_path(), model)
    config = load(demo_path(), draft=None).config
    assert assistant_beside(model, config) is None
    as_gguf("12b", "gemma4-assistant", tmp_path / "mtp-tales-it-Q8_0.gguf")
    assert assistant_beside(model, config) is None
    assert "for a model of hidden size 40, and the model's is 256" in caplog.text
    (tmp_path / "MTP").mkdir()
    fits = tmp_path / "MTP" / "mtp-x.gguf"
    make_synthetic.write("DEMO", fits, spelling="gemma4-assistant")
    assert assistant_beside(model, config) == fits
    (tmp_path / "a-assistant-q8_0.gguf").write_bytes(b"GGUF")
    assert assistant_beside(model, config) == fits
    for draft, there in (("auto", True), (fits, True), (None, False)):
        drafts = load(model, draft=draft).drafts
        assert drafts is not None and (drafts.drafter is not None) == there
    assert load(model, draft_max=0).drafts is None
    (tmp_path / "models").mkdir()
    link = tmp_path / "models" / "tales.gguf"
    link.symlink_to(model)
    assert assistant_beside(link, config) == fits
    assert list(find_models(tmp_path)) == ["tales-it-Q4_K_M", "models/tales"]


def test_too_little_memory_for_the_one_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, file = tmp_path / "m.gguf", tmp_path / "mtp-m.gguf"
    shutil.copy(demo_path(), model)
    make_synthetic.write("DEMO", file, spelling="gemma4-assistant")
    monkeypatch.setattr("mlx_gemma4.loading.assistant.sizes", lambda *_: (1 << 60, 1 << 60))
    drafts = load(model).drafts
    assert drafts is not None and drafts.drafter is None
    assert "No drafts: " in caplog.text
    with pytest.raises(InputError, match="more than is free; use --no-draft"):
        load(model, draft=file)


def test_assistants_are_no_models_of_a_repository() -> None:
    files = ["MTP/mtp-m-Q8_0.gguf", "MTP/mtp-m-BF16.gguf", "m-Q8_0.gguf", "m-assistant-Q4_0.gguf", "m-Q4_K_M.gguf"]
    assert [c.title for c in choices(files)] == ["Q4_K_M", "Q8_0"]
    assert choose("a/b", files, "q8_0").files == ("m-Q8_0.gguf",)
    assert best_drafters(files, "m-Q4_K_M.gguf")[0] == "MTP/mtp-m-Q8_0.gguf"
    assert [c.title for c in choices(["m-assistant-Q8_0.gguf"])] == ["Q8_0"]  # a repository of nothing else
    assert best_drafters(["my-assistants.gguf", "smtp-x.gguf", "x/mtp-y.bin"]) == []
