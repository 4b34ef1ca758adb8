"""Projector files: what is refused, what lies beside a model, and what content parts become."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from drawings import drawing
from PIL import Image
from recorded import HERE
from rewrite import drop, odd, plus

from mlx_gemma4 import execution as queue
from mlx_gemma4.config import Config, Reader
from mlx_gemma4.conversation.language_model import load
from mlx_gemma4.errors import InputError
from mlx_gemma4.execution import execution
from mlx_gemma4.loading.loader import open_model
from mlx_gemma4.measure.inspection import ProjectorReport, inspect, lines
from mlx_gemma4.media import layers, projector
from mlx_gemma4.media.content import Content
from mlx_gemma4.media.layers import by_layers
from mlx_gemma4.media.picture import decoded
from mlx_gemma4.media.projector import media_beside, open_media
from mlx_gemma4.model.soft import Encoded

UV, V, V31 = (HERE / "media" / kind for kind in ("uv", "v", "v31"))


def config_of(folder: Path) -> Config:
    with open_model(folder / "model.gguf") as (config, _, _):
        return config


def picture(shade: int = 0) -> dict[str, Any]:
    pixels = np.maximum(drawing(60, 90), shade).astype(np.uint8)
    return {"type": "image", "image": Image.fromarray(pixels), "tokens": 70}


def refused(path: Path, config: Config) -> str:
    with pytest.raises(InputError) as error:
        open_media(path, config)
    assert "\n" not in str(error.value)
    assert path.name in str(error.value)
    return str(error.value)


def test_files_of_others_are_refused_in_one_line(tmp_path: Path) -> None:
    uv, mmproj = config_of(UV), UV / "mmproj.gguf"
    assert "no projector for images or sound; give --mmproj" in refused(UV / "model.gguf", uv)
    assert "is for a model of hidden size 36, and the model's is 44" in refused(V / "mmproj.gguf", uv)
    assert "are for Gemma 4, and the model is gemma3" in refused(mmproj, replace(uv, architecture="gemma3"))
    assert "type 'gemma3', which is none of Gemma 4's" in refused(
        odd(mmproj, tmp_path / "other.gguf", {"clip.vision.projector_type": "gemma3"}), uv
    )
    assert "type '[1 2]'" in refused(odd(mmproj, tmp_path / "list.gguf", {"clip.vision.projector_type": [1, 2]}), uv)
    assert "without a tower" in refused(odd(mmproj, tmp_path / "no.gguf", {"clip.has_vision_encoder": False}), uv)
    assert "tensor v.patch_embd.bias missing" in refused(
        odd(mmproj, tmp_path / "less.gguf", edit=drop("patch_embd.bias")), uv
    )
    assert "has tensor v.more.weight, which nothing here knows" in refused(
        odd(mmproj, tmp_path / "more.gguf", edit=plus("v.more.weight", np.zeros((2, 2)))), uv
    )
    assert "v.patch_embd.weight is 32 x 6912, but the configuration calls for 31 x 6912" in refused(
        odd(mmproj, tmp_path / "narrow.gguf", {"clip.vision.embedding_length": 31}), uv
    )
    (tmp_path / "cut.gguf").write_bytes(mmproj.read_bytes()[:-1000])
    assert "is cut short" in refused(tmp_path / "cut.gguf", uv)
    assert "no such file" in refused(tmp_path / "none.gguf", uv)
    assert "no towers for images or sound" in refused(HERE / "folders" / "e2b-bf16", uv)
    assert "attention.head_count is 3 for a width of 32" in refused(
        odd(V / "mmproj.gguf", tmp_path / "heads.gguf", {"clip.vision.attention.head_count": 3}), config_of(V)
    )
    assert "tensor v.std_scale missing" in refused(
        odd(V31 / "mmproj.gguf", tmp_path / "half.gguf", edit=drop("std_scale")), config_of(V31)
    )
    with pytest.raises(InputError, match="belongs to a model"):
        load(mmproj)


@pytest.mark.parametrize("folder", [UV, V], ids=["uv", "v"])
def test_metadata_that_cannot_be_is_refused(folder: Path) -> None:
    """Whatever a key says: the tensors don't fit, or the key is named."""
    with projector.open_towers(folder / "mmproj.gguf") as ([tower], source):
        metadata = dict(tower.read.metadata)
        keys = ["embedding_length", "feed_forward_length", "block_count", "attention.head_count", "patch_size"]
        for key in keys if folder == V else keys[:1]:
            for value in (None, 0, -1, 3, 1 << 40, 0.5, "x", [1, 2], float("nan"), True):
                changed = {**metadata, f"clip.vision.{key}": value}
                if value is None and key == "patch_size":
                    continue  # it has a default
                other = replace(tower, read=Reader(changed, "clip.vision.", "a.gguf"))
                with pytest.raises(InputError):
                    projector.check_tensors(folder / "mmproj.gguf", [other], source, config_of(folder).hidden)


@pytest.mark.parametrize("folder", [UV, V], ids=["uv", "v"])
def test_a_folder_has_the_same_towers(folder: Path) -> None:
    with open_model(folder / "folder") as (config, _, _):
        assert config.hidden == config_of(folder).hidden
    found = media_beside(folder / "folder", config)
    assert found is not None
    assert found.path == folder / "folder"
    theirs = projector.read_towers(folder / "mmproj.gguf", config_of(folder))
    ours = projector.read_towers(folder / "folder", config_of(folder))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(np.array(ours[name]).reshape(array.shape), np.array(array), err_msg=name)
    a, b = (open_media(folder / name, config_of(folder)).encode(picture()) for name in ("folder", "mmproj.gguf"))
    assert [each.ids for each in a if isinstance(each, Encoded)] == [
        each.ids for each in b if isinstance(each, Encoded)
    ]


@pytest.mark.parametrize("change", [{"hidden_activation": "gelu"}, {"model_type": "siglip"}])
def test_a_folder_with_another_tower_is_refused(change: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(V / "folder", tmp_path / "v")
    config = json.loads((tmp_path / "v" / "config.json").read_text())
    config["vision_config"] |= change
    (tmp_path / "v" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=next(iter(change.values()))):
        open_media(tmp_path / "v", config_of(V))
    assert media_beside(tmp_path / "v", config_of(V)) is None


def test_a_tower_in_any_type(tmp_path: Path) -> None:
    """F16 and F32 are exact; Q8_0 is near."""
    plain = open_media(V / "mmproj.gguf", config_of(V)).encode(picture())[1]
    assert isinstance(plain, Encoded)
    for kind, off in (("F32", 0.0), ("F16", 2e-3), ("Q8_0", 0.2)):
        type_ = gguf.GGMLQuantizationType[kind]

        def edit(entries: list[Any], type_: Any = type_) -> list[Any]:
            made = []
            for name, data, was in entries:
                wide_enough = type_.name != "Q8_0" or (data.ndim == 2 and data.shape[1] == 64)
                if was == gguf.GGMLQuantizationType.BF16 and wide_enough:
                    wide = gguf.quants.dequantize(data, was)
                    made.append((name, gguf.quants.quantize(wide, type_), type_))
                else:
                    made.append((name, data, was))
            return made

        other = open_media(odd(V / "mmproj.gguf", tmp_path / f"{kind}.gguf", edit=edit), config_of(V))
        rows = other.encode(picture())[1]
        assert isinstance(rows, Encoded)
        np.testing.assert_allclose(np.array(rows.rows), np.array(plain.rows), atol=off)


def test_parts_become_texts_and_soft_tokens(tmp_path: Path) -> None:
    media = open_media(UV / "mmproj.gguf", config_of(UV))
    assert media.kinds == {"image", "video"}
    begin, encoded, end = media.encode(picture())
    assert (begin, end) == ("<|image>", "<image|>")
    assert isinstance(encoded, Encoded)
    assert encoded.rows.shape == (60, 44)
    assert encoded.kind == "image"
    large = media.encode(picture() | {"tokens": 280})[1]
    assert isinstance(large, Encoded)
    assert large.rows.shape[0] > 200
    assert large.digest != encoded.digest
    frames = [Image.fromarray(drawing(48, 48) // (i + 1)) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=1000)
    video = media.encode({"type": "video", "video": tmp_path / "a.gif"})
    assert [each for each in video if isinstance(each, str)] == [
        "00:00 ", "<|image>", "<image|>", " 00:01 ", "<|image>", "<image|>", " 00:02 ", "<|image>", "<image|>",
    ]  # fmt: skip
    assert {each.kind for each in video if isinstance(each, Encoded)} == {"video"}
    assert len({each.digest for each in video if isinstance(each, Encoded)}) == 3
    long = picture() | {"image": Image.fromarray(drawing(1, 2000)), "tokens": 560}
    small = open_media(V / "mmproj.gguf", config_of(V))
    with pytest.raises(InputError, match="is too long for this projector, which knows 1120 places"):
        small.encode(long)
    with pytest.raises(InputError, match="takes image and video, no audio"):
        media.encode({"type": "audio", "audio": b"RIFF"})


def test_a_picture_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is asked about, from however many threads; until others take its place."""
    media = open_media(UV / "mmproj.gguf", config_of(UV))
    made: list[int] = []
    tower = projector.TOWERS["gemma4uv"]

    def counted(*args: Any) -> Any:
        made.append(1)
        return tower.rows(*args)

    monkeypatch.setitem(projector.TOWERS, "gemma4uv", replace(tower, rows=counted))
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(media.encode(picture())[1])) for _ in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(made) == 1
    assert len({each.digest for each in found}) == 1
    monkeypatch.setattr(projector, "KEPT", 2 * found[0].rows.nbytes)
    for shade in (50, 100, 0, 0):
        media.encode(picture(shade))
    assert len(made) == 4


def test_others_execute_between_two_layers() -> None:
    """A reply's step waits for a layer of a tower, not for a picture."""
    others: list[threading.Thread] = []
    order: list[str] = []

    def step() -> None:
        with execution():
            order.append("step")

    def layers() -> Iterator[mx.array]:
        for i in range(3):
            latest, end = queue._last, time.monotonic() + 60
            others.append(threading.Thread(target=step))
            others[-1].start()
            while queue._last is latest and time.monotonic() < end:
                time.sleep(0.001)  # until it stands in the queue
            order.append("layer")
            yield mx.array(i)

    assert by_layers(layers()).item() == 2
    for each in others:
        each.join()
    assert order == ["layer", "step"] * 3


def test_other_weights_have_other_ids(tmp_path: Path) -> None:
    def doubled(entries: list[Any]) -> list[Any]:
        return [(n, d + 128 if n.startswith("mm.") else d, t) for n, d, t in entries]

    other = odd(UV / "mmproj.gguf", tmp_path / "a.gguf", edit=doubled)
    a, b = (open_media(path, config_of(UV)).encode(picture())[1] for path in (UV / "mmproj.gguf", other))
    assert isinstance(a, Encoded)
    assert isinstance(b, Encoded)
    assert a.ids != b.ids


# ---------------------------------------------------------------- beside a model


def test_the_projector_beside_a_model_is_taken(tmp_path: Path) -> None:
    shutil.copy(UV / "model.gguf", tmp_path / "model-Q4_0.gguf")
    assert media_beside(tmp_path / "model-Q4_0.gguf", config_of(UV)) is None
    shutil.copy(V / "mmproj.gguf", tmp_path / "mmproj-model-BF16.gguf")  # of another model
    shutil.copy(UV / "mmproj.gguf", tmp_path / "mmproj-F16.gguf")
    (tmp_path / "mmproj-BF16.gguf").write_bytes(b"GGUF, damaged")
    lm = load(tmp_path / "model-Q4_0.gguf", draft=None)
    assert lm.media is not None
    assert lm.media.path == tmp_path / "mmproj-F16.gguf"
    (tmp_path / "part").mkdir()
    shutil.copy(UV / "model.gguf", tmp_path / "part" / "model.gguf")
    found = media_beside(tmp_path / "part" / "model.gguf", config_of(UV))
    assert found is not None
    assert found.path.resolve() == tmp_path / "mmproj-F16.gguf"
    assert load(tmp_path / "model-Q4_0.gguf", draft=None, mmproj=None).media is None
    own = load(tmp_path / "model-Q4_0.gguf", draft=None, mmproj=UV / "mmproj.gguf").media
    assert own is not None
    assert own.path == UV / "mmproj.gguf"
    with pytest.raises(InputError, match="hidden size 36"):
        load(tmp_path / "model-Q4_0.gguf", draft=None, mmproj=V / "mmproj.gguf")


@pytest.mark.slow
def test_flags_of_commands() -> None:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mlx_gemma4", *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL)

    model = ("-m", str(UV / "model.gguf"))
    for command in (("generate", "-p", "x", "-n", "1", "--raw"), ("chat",), ("serve", "--port", "0")):
        done = run(*command, *model, "--mmproj", str(V / "mmproj.gguf"))
        assert done.returncode == 2, command
        assert "is for a model of hidden size 36" in done.stderr.splitlines()[-1]
    for flags in (("--mmproj", str(UV / "mmproj.gguf")), ("--no-mmproj",)):
        assert run("generate", "-p", "x", "-n", "1", "--raw", *model, *flags).returncode == 0
    done = run("serve", "--models", str(UV), "--mmproj", str(UV / "mmproj.gguf"))
    assert done.returncode == 2
    assert "--mmproj goes with --model" in done.stderr.splitlines()[-1]


def test_inspect_shows_projectors() -> None:
    report = inspect(UV / "mmproj.gguf")
    assert isinstance(report, ProjectorReport)
    assert report.hidden == 44
    shown = "\n".join(lines(report, "a chip"))
    assert "A projector (mmproj) for models of hidden size 44" in shown
    assert "gemma4uv: image, 32 wide" in shown
    assert "BF16 " in shown
    assert "gemma4v: image, 32 wide, 2 layers" in "\n".join(lines(inspect(V / "mmproj.gguf"), "a chip"))
    model = "\n".join(lines(inspect(UV / "model.gguf"), "a chip"))
    assert f"Takes image, video with {UV / 'mmproj.gguf'}" in model


def test_bad_projectors_are_refused_by_inspect(tmp_path: Path) -> None:
    edits: list[Callable[[list[Any]], list[Any]]] = [drop("mm."), drop("patch_embd.bias")]
    for edit in edits:
        with pytest.raises(InputError, match="missing"):
            inspect(odd(UV / "mmproj.gguf", tmp_path / "a.gguf", edit=edit))


@pytest.mark.parametrize("kind", ["uv", "v", "v31", "ua", "a"])
def test_what_the_weights_will_take_is_known_before(kind: str) -> None:
    media = open_media(HERE / "media" / kind / "mmproj.gguf", config_of(HERE / "media" / kind))
    assert media.unread == sum(weight.nbytes for weight in projector.read_towers(media.path, media._config).values())
    media.load()
    assert media.unread == 0


def test_a_model_leaves_room_for_its_projector() -> None:
    lm = load(V / "model.gguf", draft=None)
    assert lm.media is not None and lm.plan.later == lm.media.unread > 0
    assert load(V / "model.gguf", draft=None, mmproj=None).plan.later == 0


def test_encoding_ends_between_two_layers_where_nobody_waits() -> None:
    left = 3

    def still_here() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise TimeoutError

    media = open_media(V / "mmproj.gguf", config_of(V))
    token = layers.go_on.set(still_here)
    try:
        with pytest.raises(TimeoutError):
            media.encode(picture())
        with pytest.raises(TimeoutError):
            by_layers(mx.zeros(1) for _ in range(10**9))
    finally:
        layers.go_on.reset(token)
    assert len(media.encode(picture())) == 3  # the next one finds nothing locked


def test_a_picture_that_is_decoded_is_taken_as_it_is(tmp_path: Path) -> None:
    """With the same name in prompts: it is the file that is asked about."""
    drawn = np.maximum(drawing(60, 90), 0).astype(np.uint8)
    Image.fromarray(drawn).save(tmp_path / "a.png")
    part = {"type": "image", "image": (tmp_path / "a.png").read_bytes(), "tokens": 70}
    ids = []
    for given in (None, decoded(Content("a.png", tmp_path / "a.png"))):
        _, made, _ = open_media(UV / "mmproj.gguf", config_of(UV)).encode(part, given)
        assert isinstance(made, Encoded)
        ids.append(made.ids)
    assert ids[0] == ids[1]
