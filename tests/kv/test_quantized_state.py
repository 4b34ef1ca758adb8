"""KV states whose global layers are in codes: what stays exact, what they take, files, prefixes, `--kv`."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from plain_state import LAYOUTS, SmallModel, read, small_model, some_tokens

from mlx_gemma4.cli.main import main
from mlx_gemma4.errors import InputError
from mlx_gemma4.generation.prefix import PrefixCache
from mlx_gemma4.kv import file, quantization
from mlx_gemma4.kv.segments import SegmentLayout
from mlx_gemma4.kv.state import KVState, kv_bytes, total_nbytes
from mlx_gemma4.model.model import estimate_key_means

KINDS = tuple(quantization.BITS)
LAYOUT = LAYOUTS[0]  # blocks of 4
GLOBAL = 1  # the global layer of "12b"


def model() -> SmallModel:
    return small_model("12b", 8, LAYOUT)


def after(tokens: list[int], kv: str, then: int = 0) -> KVState:
    """A state that has read tokens in one pass, and `then` more in another."""
    state = model().new_state(kv=kv)
    read(model(), state, tokens[: len(tokens) - then])
    if then:
        state.mark()
        read(model(), state, tokens[len(tokens) - then :])
    return state


@pytest.mark.parametrize("kv", KINDS)
def test_sealed_segments_of_global_layers_are_in_codes(kv: str) -> None:
    state = after(some_tokens(50), kv)
    for i, layer in state.layers.items():
        assert [s.quantized for s in layer.segments] == [i == GLOBAL] * len(layer.segments)
        assert layer.tail_keys.dtype == layer.tail_values.dtype == mx.float32
    shape = state.config.layers[GLOBAL]
    held = sum(s.keys.nbytes + s.values.nbytes for s in state.layers[GLOBAL].segments)
    assert held == 48 * shape.kv_heads * 2 * quantization.vector_bytes(kv, shape.head_dim, mx.float32)


def test_key_means_are_estimated_once(caplog: pytest.LogCaptureFixture) -> None:
    """By the first quantized state of a model, and by no other."""
    base = model()
    fresh = SmallModel(base.config, base.weights)
    fresh.layout = SegmentLayout()
    with caplog.at_level(logging.DEBUG, "mlx_gemma4"):
        fresh.new_state()
        assert not caplog.records
        fresh.new_state(kv="tq4")
        fresh.new_state(kv="q8")
    assert [r.getMessage().split(" of ")[0] for r in caplog.records] == ["Key means"]
    assert mx.array_equal(fresh.rotations[GLOBAL][2:], estimate_key_means(fresh)[GLOBAL])


@pytest.mark.parametrize("kv", KINDS)
def test_growing_never_encodes_a_token_twice(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state, encode, encoded = after(some_tokens(3), kv), quantization.quantize, []

    def counting(keys: mx.array, *rest: Any) -> Any:
        encoded.append(keys.shape[2])
        return encode(keys, *rest)

    for layer in state.layers.values():
        if layer.quantizer:
            object.__setattr__(layer.quantizer, "quantize", counting)
    for size in (1, 1, 1, 30, 1, 7, 4, 1, 1, 50, 1):
        read(model(), state, some_tokens(size + 1)[1:])
    assert sum(encoded) == sum(s.stop - s.start for s in state.layers[GLOBAL].segments)


@pytest.mark.parametrize("kv", KINDS)
def test_a_rewind_to_a_whole_block_is_as_if_nothing_had_followed(kv: str) -> None:
    tokens = some_tokens(70)
    state, fresh = after(tokens, kv, then=22), after(tokens[:48], kv)
    state.rewind(48)
    for token in range(100, 120):
        np.testing.assert_array_equal(read(model(), state, [token]), read(model(), fresh, [token]))


@pytest.mark.parametrize("kv", KINDS)
def test_a_rewind_into_a_sealed_block_keeps_its_codes(kv: str) -> None:
    tokens = some_tokens(70)
    state = after(tokens, kv, then=20)  # marked at 50: 2 tokens of a block of 4
    before = state.layers[GLOBAL]
    state.rewind(50)
    layer = state.layers[GLOBAL]
    assert (layer.count, layer.skip) == (2, 2)
    for part in (0, 1):
        old, new = (mx.concatenate([(s.keys, s.values)[part] for s in k.segments], axis=2) for k in (before, layer))
        assert mx.array_equal(old[:, :, :50], new)
    near = read(model(), state.fork(), [7])
    np.testing.assert_allclose(near, read(model(), after(tokens[:50], kv), [7]), atol=0.5)
    for token in (7, 8, 9):  # the block fills up, and is sealed
        read(model(), state, [token])
    layer = state.layers[GLOBAL]
    assert (layer.count, layer.skip, layer.stop) == (1, 0, 53)
    assert sum(s.keys.shape[2] for s in layer.segments) == 52


@pytest.mark.parametrize("kv", KINDS)
def test_forks_share_codes(kv: str) -> None:
    state = after(some_tokens(90), kv)
    other, held = state.fork(), state.nbytes
    assert total_nbytes([state, other]) == held
    read(model(), other, [5])
    assert total_nbytes([state, other]) - held < held / 2


@pytest.mark.parametrize("kv", KINDS)
def test_the_worst_case_is_never_exceeded(kv: str) -> None:
    for kind, layout in itertools.product(("e2b", "12b"), (SegmentLayout(), LAYOUTS[0])):
        model = small_model(kind, 8, layout)
        state, n = model.new_state(kv=kv), 0
        for size in (1, 90, 5, 1, 64, 200, 3):
            read(model, state, some_tokens(size, size))
            n += size
            assert state.nbytes <= kv_bytes(model.config, mx.float32, n, 200, layout, kv)


@pytest.mark.parametrize("kv", KINDS)
def test_a_file_holds_codes(kv: str, tmp_path: Path) -> None:
    state = after(some_tokens(70), kv, then=20)
    state.rewind(50)
    model().save_state(state, tmp_path / "state")
    loaded = model().load_state(tmp_path / "state")
    assert (loaded.kv, loaded.tokens) == (kv, state.tokens)
    for token in range(100, 110):
        np.testing.assert_array_equal(read(model(), state, [token]), read(model(), loaded, [token]))


def test_a_file_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = after(some_tokens(20), "tq4")
    with monkeypatch.context() as patch:
        patch.setattr(file, "VERSION", "1")
        model().save_state(state, tmp_path / "state")
    with pytest.raises(InputError, match="of version 1, this program reads version 2"):
        model().load_state(tmp_path / "state")


@pytest.mark.parametrize("kv", KINDS)
def test_prefixes_in_codes(kv: str) -> None:
    model = small_model("12b", 8, SegmentLayout())
    store, talk = PrefixCache(model, kv=kv), some_tokens(300)
    state, n = store.take(talk)
    assert (state.kv, n) == (kv, 0)
    read(model, state, talk)
    store.put(state)
    assert store.take([*talk[:299], 7, 8])[1] == 299
    with pytest.raises(ValueError, match="can't be kept"):
        store.put(after(talk, "full"))
    assert store.most_bytes(3000) < PrefixCache(model).most_bytes(3000)


def test_generate_takes_kv(tmp_path: Path) -> None:
    def generate(*flags: str) -> Any:
        return CliRunner().invoke(main, ["generate", "-p", "Once", "-n", "5", "--temperature", "0", *flags])

    file = str(tmp_path / "talk")
    assert generate("--kv", "tq4", "--state", file).exit_code == 0
    assert generate("--state", file).exit_code == 0
    wrong = generate("--kv", "q8", "--state", file)
    assert wrong.exit_code != 0 and "was saved with --kv tq4" in wrong.output
    assert generate("--kv", "q2").exit_code == 2
