"""KV states on disk: what a file holds, and one line for any that is damaged or of another model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from plain_state import SmallModel, read, small_model, some_tokens

from mlx_gemma4.errors import InputError
from mlx_gemma4.kv.segments import SegmentLayout
from mlx_gemma4.kv.state import KVState


@pytest.fixture
def saved(tmp_path: Path) -> tuple[SmallModel, KVState, Path]:
    model = small_model("e2b", 9, SegmentLayout())
    state = model.new_state()
    read(model, state, some_tokens(150))
    model.save_state(state, tmp_path / "state")
    return model, state, tmp_path / "state"


def test_a_saved_state_is_a_safetensors_file(saved: tuple[SmallModel, KVState, Path]) -> None:
    _, state, path = saved
    arrays = mx.load(str(path), format="safetensors")
    assert arrays["tokens"].tolist() == state.tokens  # type: ignore[call-overload, index]
    assert os.listdir(path.parent) == ["state"]


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.01, 0.3, 0.7, 0.9999])
def test_a_flipped_bit_or_a_lost_end_is_refused(saved: tuple[SmallModel, KVState, Path], share: float) -> None:
    model, _, path = saved
    good = path.read_bytes()
    bad = bytearray(good)
    bad[int(share * len(good))] ^= 1 << int(share * 10) % 8
    for contents in (bytes(bad), good[: int(share * len(good))]):
        path.write_bytes(contents)
        with pytest.raises(InputError) as caught:
            model.load_state(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_every_byte_of_a_saved_state_is_checked(saved: tuple[SmallModel, KVState, Path]) -> None:
    model, _, path = saved
    good = path.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(good), 200):
        bad = bytearray(good)
        bad[at] ^= 1 << int(at) % 8
        path.write_bytes(bytes(bad))
        with pytest.raises(InputError):
            model.load_state(path)


def test_another_models_state_is_refused(saved: tuple[SmallModel, KVState, Path]) -> None:
    _, _, path = saved
    for other in (small_model("12b", 9, SegmentLayout()), small_model("e2b", 10, SegmentLayout())):
        with pytest.raises(InputError, match="another model"):
            other.load_state(path)
    with pytest.raises(InputError, match="no such file"):
        other.load_state(path.with_name("none"))


def test_a_save_that_fails_leaves_the_old_file(
    saved: tuple[SmallModel, KVState, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, state, path = saved
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        model.save_state(state, path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["state"]
