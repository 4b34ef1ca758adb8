"""KV states on disk: what a file holds, and one line for any that is damaged or of another model."""

from __future__ import annotations

import hashlib
import json
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


def edited(path: Path, change: Any) -> None:
    """Rewrite a saved state's header, with a checksum that is right."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = len(text).to_bytes(8, "little") + text + data[8 + size : -32]
    path.write_bytes(body + hashlib.sha256(body).digest())


def about(**values: Any) -> Any:
    return lambda header: header["__metadata__"].update(values)


def entry(name: str, **values: Any) -> Any:
    return lambda header: header[name].update(values)


CHANGES = [
    about(layout="[]"),
    about(layout="[64, 8]"),
    about(layout="[0, 8, 4]"),
    about(layout='["a", 8, 4]'),
    about(layout="[64, 0, 4]"),
    about(layout="[1000000000, 8, 4]"),
    about(layout="null"),
    about(layout="{"),
    about(counts="{}"),
    about(counts="[]"),
    about(counts=json.dumps({key: [999, 0] for key in "01234"})),
    about(counts=json.dumps({key: [-22, 0] for key in "01234"})),
    about(counts=json.dumps({key: [21, 0] for key in "01234"})),
    about(counts=json.dumps({key: [22, 5] for key in "01234"})),
    about(counts=json.dumps({key: ["22", 0] for key in "01234"})),
    about(kv="q8"),
    about(kv="none"),
    lambda header: header["__metadata__"].pop("model"),
    lambda header: header["__metadata__"].pop("layout"),
    lambda header: header["__metadata__"].pop("kv"),
    lambda header: header.pop("tokens"),
    lambda header: header.pop("layer.0.tail.keys"),
    lambda header: header.pop("layer.1.keys.0"),
    lambda header: header.update({"layer.1.keys.x": header.pop("layer.1.keys.0")}),
    lambda header: header.update({"layer.1.keys.77": header.pop("layer.1.keys.0")}),
    entry("tokens", dtype="F32"),
    entry("tokens", shape=[10, 15]),
    entry("tokens", shape=[1 << 40]),
    entry("layer.0.tail.keys", shape=[2, 64, 1, 12]),
    entry("layer.0.tail.keys", dtype="U32"),
    entry("layer.0.keys.0", shape=[1]),
    entry("layer.0.keys.0", dtype="Q9"),
    entry("layer.0.keys.0", data_offsets=[1 << 60, 1 << 61]),
    entry("layer.0.keys.0", data_offsets=[-8, 3]),
    lambda header: header.clear(),
]


def test_an_edited_header_with_a_right_checksum_is_refused(saved: tuple[SmallModel, KVState, Path]) -> None:
    model, _, path = saved
    good = path.read_bytes()
    for change in CHANGES:
        path.write_bytes(good)
        edited(path, change)
        assert path.read_bytes() != good
        with pytest.raises(InputError) as error:
            model.load_state(path)
        assert str(path) in str(error.value)


def test_ids_that_the_model_lacks_are_refused(saved: tuple[SmallModel, KVState, Path]) -> None:
    model, _, path = saved
    data = bytearray(path.read_bytes()[:-32])
    at = 8 + int.from_bytes(data[:8], "little")
    data[at : at + 4] = (2**31 - 1).to_bytes(4, "little")
    path.write_bytes(bytes(data) + hashlib.sha256(data).digest())
    with pytest.raises(InputError, match="no token"):
        model.load_state(path)


def test_a_rewritten_header_as_it_was_loads(saved: tuple[SmallModel, KVState, Path]) -> None:
    model, state, path = saved
    edited(path, lambda header: None)
    assert model.load_state(path).tokens == state.tokens


def test_only_files_of_ours_are_replaced(saved: tuple[SmallModel, KVState, Path]) -> None:
    model, state, path = saved
    model.save_state(state, path)
    link = path.with_name("link")
    link.symlink_to(path)
    model.save_state(state, link)
    assert link.is_symlink()
    other, pipe = path.with_name("notes"), path.with_name("pipe")
    other.write_text("mine")
    os.mkfifo(pipe)
    for place in (other, pipe, path.parent, path.parent / "no" / "x"):
        with pytest.raises(InputError, match="can't be saved"):
            model.save_state(state, place)
        with pytest.raises(InputError):
            model.load_state(place)
    assert other.read_text() == "mine"
    assert pipe.is_fifo()
