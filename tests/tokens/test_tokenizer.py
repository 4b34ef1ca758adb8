"""Tokenizers against llama.cpp's recorded results, and what must hold for every text."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vocabs
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_bpe import PlainBPE

from mlx_gemma4.errors import InputError
from mlx_gemma4.files.gguf import open_gguf
from mlx_gemma4.tokens.tokenizer import Splitter, Tokenizer

KINDS = ["gemma4", "llama"]
UNUSUAL = {"llama-ties": "equal scores", "gemma4-gaps": "merges that can't be used"}  # refused
# In llama.cpp these of Gemma 4's user-defined tokens are found in what users type. Not here.
MARKERS = ["<|tool_call>", "<tool_call|>", "<tool_response|>", '<|"|>', "<|channel>", "<channel|>"]

texts = st.one_of(
    st.text(),
    st.text("ab \n\t▁=<>|/0019é🙂\x00\ue000"),
    st.lists(
        st.sampled_from([*MARKERS, "<bos>", "<eos>", "<|turn>", "<turn|>", "<b>", "<0x41>", "  ", "\n\n", "the ", "é"])
    ).map("".join),
)


def mismatches(tokenizer: Tokenizer, cases: list[tuple[str, bool, list[int]]]) -> list[Any]:
    found = [
        (text, special, tokenizer.encode(text, add_bos=False, parse_special=special)) for text, special, _ in cases
    ]
    return [(mine, ids) for mine, (_, _, ids) in zip(found, cases, strict=True) if mine[2] != ids]


def test_llama_cpp_own_cases() -> None:
    cases = vocabs.llama_cpp_cases()
    assert len(cases) == 46
    assert not mismatches(vocabs.tokenizer("gemma4"), [(text, False, ids) for text, ids in cases])


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_from_llama_cpp(kind: str) -> None:
    cases = [x for x in vocabs.cases(kind) if x[1] or not any(marker in x[0] for marker in MARKERS)]
    assert len(cases) > 150
    assert not mismatches(vocabs.tokenizer(kind), cases)


def test_markers_are_never_typed() -> None:
    tokenizer = vocabs.tokenizer("gemma4")
    for marker in [*MARKERS, "<|turn>", "<turn|>", "<bos>", "<|tool_response>", "<|image|>"]:
        assert tokenizer.control_ids.isdisjoint(tokenizer.encode(f"a{marker}b", add_bos=False))
        (inside,) = tokenizer.encode(marker, add_bos=False, parse_special=True)
        assert inside == tokenizer.token_id(marker)
        assert tokenizer.decode([inside]) == ""
        assert tokenizer.decode([inside], skip_special=False) == marker


def test_gemma4_ids() -> None:
    tokenizer = vocabs.tokenizer("gemma4")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.stop_ids) == (262144, 2, {1, 106, 50})
    assert tokenizer.token_id("<|turn>") == 105
    assert tokenizer.token_id("the") is None
    assert tokenizer.control_starts == {"<"}
    assert len(tokenizer.control_ids) == 24


def test_bos_once() -> None:
    tokenizer = vocabs.tokenizer("gemma4")
    hi = tokenizer.encode("hi", add_bos=False)
    assert tokenizer.encode("hi") == [2, *hi]
    assert tokenizer.encode("<bos>hi", parse_special=True) == [2, *hi]
    assert tokenizer.encode("<bos>hi").count(2) == 1
    assert tokenizer.encode("") == [2]
    assert Tokenizer.from_gguf({**vocabs.gemma4_metadata(), "tokenizer.ggml.add_bos_token": False}).encode("") == [2]


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
@settings(max_examples=150, deadline=None)
def test_round_trip(kind: str, text: str) -> None:
    tokenizer = vocabs.tokenizer(kind)
    ids = tokenizer.encode(text, add_bos=False)
    assert tokenizer.control_ids.isdisjoint(ids)
    back = tokenizer.decode(ids)
    assert back == text.replace("▁", " ")


@pytest.mark.parametrize("kind", ["gemma4", "llama"])
@given(text=texts)
@settings(max_examples=150, deadline=None)
def test_rust_is_plain(kind: str, text: str) -> None:
    assert vocabs.tokenizer(kind).encode(text, add_bos=False) == plain(kind)(text)


def plain(kind: str) -> PlainBPE:
    """The plain encoder of a vocabulary."""
    if kind not in _plain:
        metadata = vocabs.gemma4_metadata() if kind == "gemma4" else vocabs.small_metadata(kind)
        vocab = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}
        types = metadata["tokenizer.ggml.token_type"]
        user = {text: i for text, i in vocab.items() if types[i] == 4 and text not in MARKERS}
        if kind.startswith("gemma4"):
            merges = dict.fromkeys(metadata["tokenizer.ggml.merges"])  # the first of equal ones counts
            ranks: dict[Any, float] = {tuple(merge.split(" ", 1)): i for i, merge in enumerate(merges)}
            _plain[kind] = PlainBPE(vocab, lambda a, b: ranks.get((a, b)), user, prefix=False, split_lines=True)
        else:
            scores = metadata["tokenizer.ggml.scores"]
            ranks = {text: -scores[i] for text, i in vocab.items() if types[i] == 1}
            prefix = kind == "llama-ties"
            _plain[kind] = PlainBPE(vocab, lambda a, b: ranks.get(a + b), user, prefix=prefix, split_lines=False)
    return _plain[kind]


_plain: dict[str, PlainBPE] = {}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_the_plain_encoder_is_llama_cpp_s(kind: str) -> None:
    """Even where the Rust one can't be: with equal scores, merges of strings that are no tokens."""
    cases = [(text, ids) for text, special, ids in vocabs.cases(kind) if not special]
    some = [(text, ids) for text, ids in cases if not any(marker in text for marker in MARKERS)]
    assert len(some) > 150
    assert not [text for text, ids in some if plain(kind)(text) != ids]


@pytest.mark.parametrize("kind", UNUSUAL)
def test_vocabularies_that_no_gemma_has_are_refused(kind: str) -> None:
    with pytest.raises(InputError, match=rf"^x\.gguf: the tokenizer has {UNUSUAL[kind]}"):
        Tokenizer.from_gguf(vocabs.small_metadata(kind), "x.gguf")


def test_padding_with_equal_scores_is_harmless() -> None:
    """Gemma 3's files pad the vocabulary up to the embedding's rows; no merge makes such a token."""
    metadata = vocabs.small_metadata("llama")
    length = len(metadata["tokenizer.ggml.tokens"])
    for key, value in (("tokens", None), ("scores", -1000.0), ("token_type", 5)):
        more = [f"[PAD{length + i}]" if value is None else value for i in range(8)]
        metadata[f"tokenizer.ggml.{key}"] = [*np.asarray(metadata[f"tokenizer.ggml.{key}"]).tolist(), *more]
    padded = Tokenizer.from_gguf(metadata)
    assert padded.vocab_size == length + 8
    for text, special, ids in vocabs.cases("llama"):
        assert padded.encode(text, add_bos=False, parse_special=special) == ids


def test_splitter_takes_the_longest() -> None:
    splitter = Splitter({"<a>": 1, "<a>b": 2, "[": 3})
    assert splitter.split("x<a>b<a>[<a") == ["x", 2, 1, 3, "<a"]
    assert splitter.split("") == []
    assert Splitter({}).split("<a>") == ["<a>"]


def test_surrogates_are_not_fatal() -> None:
    tokenizer = vocabs.tokenizer("gemma4")
    assert tokenizer.decode(tokenizer.encode("a\udc80b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude42")) == "🙂"


@pytest.mark.slow
def test_long_lines_and_start_are_quick() -> None:
    """Generous bounds against quadratic behaviour: each takes some 0.5 to 1 s."""
    begin = time.perf_counter()
    tokenizer = Tokenizer.from_gguf(vocabs.gemma4_metadata())
    assert time.perf_counter() - begin < 20
    rng = random.Random(0)
    words = ["the", "quick", "brown", "internationalization"]
    for line in (
        "a" * 2**20,
        "".join(rng.choices(words, k=150_000))[: 2**20],
        "".join(rng.choices("aZ9+/=_é", k=2**20)),
    ):
        begin = time.perf_counter()
        ids = tokenizer.encode(line, add_bos=False)
        assert time.perf_counter() - begin < 20
        assert tokenizer.decode(ids) == line


def test_chat_template_is_the_file_s() -> None:
    assert "<|turn>" in (vocabs.tokenizer("gemma4").chat_template or "")
    assert vocabs.tokenizer("llama").chat_template is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "gpt2"}, "'gpt2'"),
        ({"model": None}, "None"),
        ({"tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokens": []}, "tokenizer.ggml.tokens"),
        ({"tokens": "abc"}, "tokenizer.ggml.tokens"),
        ({"tokens": np.arange(5)}, "tokenizer.ggml.tokens"),
        ({"token_type": np.ones(3, np.int32)}, "token_type has 3"),
        ({"scores": None}, "tokenizer.ggml.scores"),
        ({"bos_token_id": 2**40, "tokens": None}, "tokens"),
    ],
)
def test_bad_metadata_is_an_input_error(change: dict[str, Any], says: str) -> None:
    metadata = vocabs.small_metadata("llama") | {f"tokenizer.ggml.{key}": x for key, x in change.items()}
    with pytest.raises(InputError, match=says) as error:
        Tokenizer.from_gguf(metadata, "model.gguf")
    assert str(error.value).startswith("model.gguf: ")


def test_bad_tokens_are_input_errors() -> None:
    for at, text, says in ((300, "<eos>", "twice"), (5, "\udc80", "surrogates"), (5, "", None)):
        metadata = vocabs.small_metadata("llama")
        tokens = metadata["tokenizer.ggml.tokens"] = list(metadata["tokenizer.ggml.tokens"])
        tokens[at] = text
        if says:
            with pytest.raises(InputError, match=says):
                Tokenizer.from_gguf(metadata)
        else:
            assert Tokenizer.from_gguf(metadata).encode("the")
    metadata = vocabs.small_metadata("llama")
    metadata["tokenizer.ggml.tokens"] = [x if x != "<0x41>" else "<0x4>" for x in metadata["tokenizer.ggml.tokens"]]
    with pytest.raises(InputError, match="byte token"):
        Tokenizer.from_gguf(metadata)


def test_without_byte_tokens_text_would_be_dropped() -> None:
    metadata = vocabs.small_metadata("llama")
    metadata["tokenizer.ggml.tokens"] = [
        x if not x.startswith("<0x") else f"byte{x[3:5]}" for x in metadata["tokenizer.ggml.tokens"]
    ]
    metadata["tokenizer.ggml.token_type"] = np.where(
        metadata["tokenizer.ggml.token_type"] == 6, 5, metadata["tokenizer.ggml.token_type"]
    )
    with pytest.raises(InputError, match="fewer than 256 byte tokens"):
        Tokenizer.from_gguf(metadata)


def test_bos_missing() -> None:
    metadata = vocabs.small_metadata("llama")
    bos = metadata.pop("tokenizer.ggml.bos_token_id")
    assert Tokenizer.from_gguf(metadata).bos_id == bos
    metadata["tokenizer.ggml.tokens"] = [x.replace("<bos>", "<s>") for x in metadata["tokenizer.ggml.tokens"]]
    with pytest.raises(InputError, match="BOS"):
        Tokenizer.from_gguf(metadata)


def folder(path: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    """A Hugging Face folder with the tokenizer of the small vocabulary, special flags as Google sets them."""
    metadata = vocabs.small_metadata("llama")
    tokens = [x.replace(" ", "▁") for x in metadata["tokenizer.ggml.tokens"]]
    types = metadata["tokenizer.ggml.token_type"]
    vocab = {text: i for i, text in enumerate(tokens)}
    joined = [text for i, text in enumerate(tokens) if types[i] == 1 and len(text) > 1]
    cuts = [(text[:i], text[i:]) for text in joined for i in range(1, len(text))]
    added = [
        {
            "id": i,
            "content": text,
            "special": bool(types[i] == 3),
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, text in enumerate(tokens)
        if types[i] in (3, 4)
    ]
    engine = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [cut for cut in cuts if vocab.keys() >= set(cut)],
            "byte_fallback": True,
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(engine))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_folder(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<bos>"}, "chat_template": [{"name": "default", "template": "T"}]}
    tokenizer = Tokenizer.from_folder(folder(tmp_path, config, {"eos_token_id": [1, 6]}))
    gguf = vocabs.tokenizer("llama")
    assert (tokenizer.bos_id, tokenizer.stop_ids, tokenizer.chat_template) == (2, {1, 6}, "T")
    assert tokenizer.control_ids == gguf.control_ids
    for text in ("Tom said he would.", "a\nb<b>c</b>", "<eos>🙂<end_of_turn>", " x "):
        for special in (False, True):
            wanted = gguf.encode(text, parse_special=special)
            assert tokenizer.encode(text, parse_special=special) == wanted
            assert tokenizer.decode(wanted) == gguf.decode(wanted)
    (tmp_path / "chat_template.jinja").write_text("U")
    assert Tokenizer.from_folder(tmp_path).chat_template == "U"


def test_folder_markers_without_a_flag(tmp_path: Path) -> None:
    """A marker that tokenizer.json doesn't call special can't be typed either."""
    file = folder(tmp_path, {}) / "tokenizer.json"
    file.write_text(file.read_text().replace("[multimodal]", "<|channel>"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    marker = tokenizer.token_id("<|channel>")
    assert marker is not None
    assert marker not in tokenizer.encode("a<|channel>b")
    assert tokenizer.decode(tokenizer.encode("a<|channel>b")) == "a<|channel>b"
    assert marker in tokenizer.encode("a<|channel>b", parse_special=True)


def test_bad_folders_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="can't be read"):
        Tokenizer.from_folder(tmp_path)
    file = folder(tmp_path, {}) / "tokenizer.json"
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(InputError, match="no JSON object"):
        Tokenizer.from_folder(tmp_path)
    file.write_text(file.read_text().replace("<0x00>", "<byte>"))
    with pytest.raises(InputError, match="isn't a Gemma tokenizer"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.real
def test_real_gemma3() -> None:
    """All recorded cases on a real Gemma 3, but for </s>: llama.cpp takes it for the end of a text, Google for HTML."""
    with open_gguf(os.environ["MLX_GEMMA4_REAL_GGUF"]) as file:
        tokenizer = Tokenizer.from_gguf(file.metadata)
    assert (tokenizer.bos_id, tokenizer.stop_ids, len(tokenizer.control_ids)) == (2, {1, 106}, 6249)
    cases = [case for case in vocabs.cases("gemma3-270m") if "</s>" not in case[0]]
    assert len(cases) > 150
    assert not mismatches(tokenizer, cases)
