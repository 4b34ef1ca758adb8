"""Vocabularies as programs write them: control tokens by meaning, contradicting keys, tables of any shape."""

from __future__ import annotations

import time
from typing import Any

import pytest

from mlx_gemma4.errors import InputError
from mlx_gemma4.tokens.tokenizer import LONGEST, Tokenizer

CONTROL, USER, BYTE, NORMAL = 3, 4, 6, 1
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def metadata(kind: str = "llama", more: dict[str, int] | None = None, **keys: Any) -> dict[str, Any]:
    """A vocabulary of letters and a few words, with `more` tokens of given types."""
    table = {"<pad>": CONTROL, "<eos>": CONTROL, "<bos>": CONTROL, "<unk>": CONTROL, **dict.fromkeys(BYTES, BYTE)}
    words = ["ab", "abc", "▁a", "▁ab"]
    table |= dict.fromkeys([*"▁abcdefghijklmnopqrstuvwxyz<>|_/", *words], NORMAL) | (more or {})
    tokens = list(table)
    made = {
        "model": kind,
        "tokens": tokens,
        "token_type": list(table.values()),
        "scores": [float(-i) for i in range(len(tokens))],
        "bos_token_id": 2,
        "eos_token_id": 1,
        **({"merges": ["a b", "ab c", "▁ a", "▁ ab"]} if kind == "gemma4" else {}),
        **keys,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in made.items()} | {
        "tokenizer.ggml.add_space_prefix": False
    }


@pytest.mark.parametrize("kind", ["llama", "gemma4"])
@pytest.mark.parametrize("type_", [NORMAL, CONTROL, USER])
@pytest.mark.parametrize("name", ["<end_of_turn>", "<start_of_turn>", "<bos>", "<turn|>", "<|turn>", "<pad>", "<mask>"])
def test_control_tokens_by_their_meaning(kind: str, type_: int, name: str) -> None:
    tokenizer = Tokenizer.from_gguf(metadata(kind, {name: type_}))
    found = tokenizer.token_id(name)
    assert found is not None
    typed = tokenizer.encode(f"a{name}b", add_bos=False)
    assert found not in typed
    assert tokenizer.decode(typed) == f"a{name}b"
    assert found in tokenizer.encode(f"a{name}b", parse_special=True)
    assert (found in tokenizer.stop_ids) == (name in ("<end_of_turn>", "<turn|>"))


def test_a_token_that_keys_name_is_a_control_token() -> None:
    tokenizer = Tokenizer.from_gguf(metadata(more={"<fin>": USER, "<b>": USER}, eot_token_id=4 + 256 + 32 + 4))
    assert tokenizer.token_id("<fin>") in tokenizer.stop_ids
    assert tokenizer.token_id("<b>") is None  # a tag is text
    assert tokenizer.decode(tokenizer.encode("<fin><b>", add_bos=False)) == "<fin><b>"


def test_merges_under_the_name_of_the_kind_without() -> None:
    """How Ollama stores a vocabulary; the scores only count up."""
    plain = metadata("gemma4")
    scores = [float(i) for i in range(len(plain["tokenizer.ggml.tokens"]))]
    changed = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": scores}
    for odd in (plain | changed, plain | changed | {"tokenizer.ggml.pre": "gemma4"}):
        for text in ("abc abd", "aabbcc\n\nx", "<bos> ab"):
            assert Tokenizer.from_gguf(odd).encode(text) == Tokenizer.from_gguf(plain).encode(text)
    del odd["tokenizer.ggml.merges"]
    with pytest.raises(InputError, match="merges"):
        Tokenizer.from_gguf(odd)


@pytest.mark.parametrize("kind", ["llama", "gemma4"])
@pytest.mark.parametrize("type_", [NORMAL, CONTROL, USER])
def test_a_token_of_100_kb(kind: str, type_: int) -> None:
    begin = time.process_time()
    with pytest.raises(InputError, match="a token of 100000 characters"):
        Tokenizer.from_gguf(metadata(kind, {"x" * 100_000: type_}))
    assert time.process_time() - begin < 1
    Tokenizer.from_gguf(metadata(kind, {"x" * LONGEST: type_} if type_ != NORMAL else {}))


@pytest.mark.parametrize(
    "keys",
    [
        {"merges": ["a b"] * 500_000},
        {"merges": ["a b", *("a" * i + " b" for i in range(3000))]},
        {"merges": ["x" * 1_000_000]},
        {"more": {f"<c{i:0200}>": CONTROL for i in range(20_000)}},
        {"more": {f"<{'c' * i}>": CONTROL for i in range(LONGEST - 2)}},
        {"more": {f"<u{i:0100}>": USER for i in range(20_000)}},
    ],
    ids=["again and again", "none of them", "no pair", "long", "of each length", "user's"],
)
def test_tables_of_any_shape_take_little_time(keys: dict[str, Any]) -> None:
    begin = time.process_time()
    try:
        tokenizer = Tokenizer.from_gguf(metadata("gemma4", **keys))
        assert tokenizer.decode(tokenizer.encode("<" * 1000 + "abc" * 1000, parse_special=True)[1:])
    except InputError:
        assert "merges" in keys
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", 7),
        ("model", ["llama"]),
        ("model", "y" * 100_000),
        ("tokens", 5),
        ("tokens", "abc"),
        ("tokens", []),
        ("token_type", [1]),
        ("token_type", ["a"] * 296),
        ("scores", [0.0]),
        ("scores", "x"),
    ],
)
def test_kinds_of_keys(key: str, value: Any) -> None:
    with pytest.raises(InputError) as error:
        Tokenizer.from_gguf(metadata(**{key: value}))
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("value", ["x", [1], 2.5, True, -7, 2**40])
def test_ids_that_keys_name(value: Any) -> None:
    for key in ("bos", "eos", "eot", "eom"):
        tokenizer = Tokenizer.from_gguf(metadata(**{f"{key}_token_id": value}))
        assert tokenizer.bos_id == 2
        assert all(type(i) is int for i in tokenizer.stop_ids)
