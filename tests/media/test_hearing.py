"""Both towers that hear compute what transformers computes, stage by stage, from the fixtures' projectors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
import sound_files
from drawings import SIZES, drawing
from PIL import Image
from recorded import kl
from rewrite import Edit, Entry, drop, odd, plus
from shapes import MEDIA as SPECIAL
from signals import LENGTHS, RATE, voice

from mlx_gemma4.config import Config
from mlx_gemma4.errors import InputError
from mlx_gemma4.loading.loader import load_model, open_model
from mlx_gemma4.media import frames, hearing, layers, projector, sounds
from mlx_gemma4.media.content import content_of
from mlx_gemma4.media.layers import by_layers
from mlx_gemma4.media.projector import Media, open_media
from mlx_gemma4.media.sounds import PIECE
from mlx_gemma4.model.soft import Encoded

MEDIA = Path(__file__).parents[1] / "fixtures" / "media"
KINDS = ("a", "ua")
LIMIT = 1e-4


def config_of(kind: str) -> Config:
    with open_model(MEDIA / kind / "model.gguf") as (config, _, _):
        return config


def tower_of(kind: str) -> tuple[Any, Any]:
    """The metadata reader and the weights of a fixture's tower."""
    path = MEDIA / kind / "mmproj.gguf"
    with projector.open_towers(path) as (towers, _):
        return towers[0].read, projector.read_towers(path, config_of(kind))


def recorded(kind: str, length: str) -> list[dict[str, tuple[int, np.ndarray]]]:
    """Of each piece and stage: how many rows there are, and those that were kept."""
    counts = json.loads((MEDIA / kind / "sounds.json").read_text())["rows"][length]
    with np.load(MEDIA / kind / "sounds.npz") as arrays:
        return [{s: (n, arrays[f"{length}/{i}/{s}"]) for s, n in stages.items()} for i, stages in enumerate(counts)]


def check(found: Any, expected: tuple[int, np.ndarray]) -> None:
    count, rows = expected
    assert len(found) == count
    kept = np.unique(np.linspace(0, count - 1, 12).round().astype(int))
    np.testing.assert_allclose(np.array(found)[kept], rows, rtol=0, atol=LIMIT)


@pytest.mark.parametrize("length", LENGTHS)
def test_frames_of_samples_are_the_reference_s(length: str) -> None:
    read, weights = tower_of("ua")
    samples = voice(LENGTHS[length])
    for i, stages in enumerate(recorded("ua", length)):
        made = frames.frames(samples[i * PIECE : (i + 1) * PIECE])
        check(made, stages["frames"])
        check(by_layers(frames.rows(read, weights, made)), stages["projected"])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_way_of_a_gpu(kind: str, dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 16 bits in products in fp32: the same operations, on this CPU."""
    read, weights = tower_of(kind)
    weights = {name: w.astype(dtype) if w.ndim == 2 and "conv_dw" not in name else w for name, w in weights.items()}
    monkeypatch.setattr(layers, "on_cpu", lambda: False)
    tower = projector.TOWERS[f"gemma4{kind}"]
    part = {"type": "audio", "audio": sound_files.wav(voice(RATE))}
    rows = by_layers(tower.rows(read, weights, tower.inputs(content_of(part), part)[0]))
    assert rows.dtype == mx.float32
    check(rows, recorded(kind, "1 s")[0]["projected"])


LONG = [pytest.param(n, marks=pytest.mark.slow if n in ("30 s", "31 s") else ()) for n in LENGTHS]


@pytest.mark.parametrize("length", LONG)
def test_every_stage_of_the_conformer_is_the_reference_s(length: str) -> None:
    read, weights = tower_of("a")
    samples, pieces = voice(LENGTHS[length]), recorded("a", length)
    assert pieces or len(hearing.log_mel(samples)) == 0  # of which the reference makes nothing
    for i, stages in enumerate(pieces):
        mel = hearing.log_mel(samples[i * PIECE : (i + 1) * PIECE])
        check(mel, stages["mel"])
        h = hearing.subsample(weights, mx.array(mel))
        check(h, stages["subsampled"])
        check(hearing.block(weights, "a.blk.0.", h, read.count("attention.head_count")), stages["block 0"])
        check(by_layers(hearing.rows(read, weights, mel)), stages["projected"])


@pytest.mark.parametrize("kind", [pytest.param("a", marks=pytest.mark.slow), "ua"])
def test_a_long_sound_is_pieces_between_one_pair_of_tokens(kind: str) -> None:
    """31 seconds: a piece of 30 and one of 1, each as if it were alone; the same sound again is not encoded again."""
    media = open_media(MEDIA / kind / "mmproj.gguf", config_of(kind))
    assert media.kinds == {"audio"}
    part = {"type": "audio", "audio": sound_files.wav(voice(31 * RATE))}
    begin, first, second, end = media.encode(part)
    assert (begin, end) == ("<|audio>", "<audio|>")
    for piece, stages in zip((first, second), recorded(kind, "31 s"), strict=True):
        assert isinstance(piece, Encoded)
        assert piece.kind == "audio"
        check(piece.rows, stages["projected"])
    assert first.digest != second.digest
    assert media.encode(part)[1] is first
    head = media.encode({"type": "audio", "audio": sound_files.wav(voice(30 * RATE))})[1]
    np.testing.assert_array_equal(np.array(head.rows), np.array(first.rows))
    assert head.digest != first.digest


def test_what_is_shorter_than_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 ms are too short for the conformer, at the end of a sound they are left out; frames take a single sample."""
    a, ua = (open_media(MEDIA / kind / "mmproj.gguf", config_of(kind)) for kind in KINDS)
    for n in (1, 160):
        with pytest.raises(InputError, match="too short to hear; give at least 161 samples"):
            a.encode({"type": "audio", "audio": sound_files.wav(voice(n))})
    assert len(a.encode({"type": "audio", "audio": sound_files.wav(voice(161))})[1].rows) == 1
    monkeypatch.setattr(sounds, "PIECE", 1600)
    assert len(a.encode({"type": "audio", "audio": sound_files.wav(voice(1600 + 160))})) == 3
    assert len(a.encode({"type": "audio", "audio": sound_files.wav(voice(1600 + 161))})) == 4
    assert len(ua.encode({"type": "audio", "audio": sound_files.wav(voice(1))})[1].rows) == 1


def changed(kind: str, target: Path, edit: Edit | None = None, keys: dict[str, Any] | None = None) -> Media:
    return open_media(odd(MEDIA / kind / "mmproj.gguf", target, keys, edit), config_of(kind))


@pytest.mark.parametrize(("type_", "most"), [("Q8_0", 0.03), ("Q4_0", 0.6), ("F16", 1e-3)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_projector_hears_nearly_the_same_and_warns(
    kind: str, type_: str, most: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    to = gguf.GGMLQuantizationType[type_]

    def quantized(entries: list[Entry]) -> list[Entry]:
        dense = [(name, gguf.quants.dequantize(data, t), t) for name, data, t in entries]
        return [
            (n, gguf.quants.quantize(d, to) if t.name == "BF16" else d, to if t.name == "BF16" else t)
            for n, d, t in dense
        ]

    media = changed(kind, tmp_path / "mmproj.gguf", quantized)
    assert ("mishears" in caplog.text) == (type_ != "F16")
    piece = media.encode({"type": "audio", "audio": sound_files.wav(voice(RATE))})[1]
    assert isinstance(piece, Encoded)
    count, expected = recorded(kind, "1 s")[0]["projected"]
    kept = np.unique(np.linspace(0, count - 1, 12).round().astype(int))
    error = np.square(np.array(piece.rows)[kept] - expected).mean() / np.square(expected).mean()
    assert error**0.5 < most


def test_bounds_are_optional_and_kept_to(tmp_path: Path) -> None:
    """A file without bounds is read; what hears differs, as these bind."""
    part = {"type": "audio", "audio": sound_files.wav(voice(RATE))}
    free = (
        changed("a", tmp_path / "free.gguf", lambda all_: drop("put_min")(drop("put_max")(all_))).encode(part)[1].rows
    )
    bound = open_media(MEDIA / "a" / "mmproj.gguf", config_of("a")).encode(part)[1].rows
    assert np.abs(np.array(free) - np.array(bound)).max() > 0.1


@pytest.mark.parametrize(
    ("kind", "edit", "keys", "why"),
    [
        ("a", drop("blk.1.conv_dw"), None, "tensor a.blk.1.conv_dw.weight missing"),
        ("a", drop("pre_encode.out.weight"), None, "tensor a.pre_encode.out.weight missing"),
        ("a", plus("a.blk.0.out_scale.weight", np.ones(32)), None, "has tensor a.blk.0.out_scale.weight"),
        ("a", None, {"clip.audio.block_count": 3}, "missing"),
        ("a", None, {"clip.audio.attention.head_count": 5}, "does not divide 32"),
        ("a", None, {"clip.audio.embedding_length": 64}, "calls for"),
        ("a", None, {"clip.audio.projector_type": "gemma3na"}, "which is none of Gemma 4's"),
        ("ua", None, {"clip.audio.projector_type": "gemma4a"}, "clip.audio.attention.head_count is 0"),
        ("ua", drop("mm.a."), None, "missing"),
    ],
)
def test_files_that_are_damaged(kind: str, edit: Edit | None, keys: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=why):
        changed(kind, tmp_path / "mmproj.gguf", edit, keys)


@pytest.mark.parametrize("kind", KINDS)
def test_another_model_s_projector(kind: str) -> None:
    other = KINDS[1 - KINDS.index(kind)]
    with pytest.raises(InputError, match="is for a model of hidden size"):
        open_media(MEDIA / kind / "mmproj.gguf", config_of(other))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_folders_hear_what_files_hear(kind: str, transposed: bool, tmp_path: Path) -> None:
    """As transformers saves them, and with the kernels of convolutions as mlx-vlm does."""
    folder = MEDIA / kind / "folder"
    if transposed:
        arrays = mx.load(str(folder / "model.safetensors"))
        assert isinstance(arrays, dict)
        for name, array in arrays.items():
            if array.ndim == 4:
                arrays[name] = array.transpose(0, 2, 3, 1)
            elif array.ndim == 3:
                arrays[name] = array.swapaxes(1, 2)
        mx.save_safetensors(
            str(tmp_path / "model.safetensors"), {name.removeprefix("model."): each for name, each in arrays.items()}
        )
        folder = Path(shutil.copy(folder / "config.json", tmp_path)).parent
    with open_model(folder) as (config, _, _):
        media = open_media(folder, config)
    piece = media.encode({"type": "audio", "audio": sound_files.wav(voice(RATE))})[1]
    assert isinstance(piece, Encoded)
    check(piece.rows, recorded(kind, "1 s")[0]["projected"])


def test_a_folder_whose_tower_is_another(tmp_path: Path) -> None:
    config = json.loads((MEDIA / "a" / "folder" / "config.json").read_text())
    shutil.copy(MEDIA / "a" / "folder" / "model.safetensors", tmp_path)
    config["audio_config"]["attention_context_left"] = 20
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"audio_config.attention_context_left is '20', which is not supported"):
        open_media(tmp_path, config_of("a"))


def check_logits(media: Media, kind: str, prompt: str, parts: list[dict[str, Any]]) -> None:
    """Read a prompt with these parts between the fixture's words, and hold its last logits to the reference's."""
    before, between, after = json.loads((MEDIA / kind / "sounds.json").read_text())["words"]
    with np.load(MEDIA / kind / "sounds.npz") as arrays:
        expected = arrays[f"logits/{prompt}"]
    with open_model(MEDIA / kind / "model.gguf") as (config, source, _):
        model, _ = load_model(config, source)
    control = {text: i for i, text in SPECIAL.items()}
    ids, held = list(before), []
    for i, part in enumerate(parts):
        ids += between if i else []
        for piece in media.encode(part):
            if isinstance(piece, Encoded):
                model.soft.add(piece)
                held.append(piece)
            ids += piece.ids if isinstance(piece, Encoded) else [control[piece]]
    ids += after
    found = model.forward(mx.array(ids), model.new_state(), all_logits=True, soft=model.soft.rows(ids))
    logits = np.array(found)[-len(expected) :]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3)
    assert kl(expected, logits) <= 1e-6


@pytest.mark.parametrize(("prompt", "lengths"), [("one", ["1 s"]), ("two", ["0.1 s", "7.3 s"])])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_prompts_with_sounds_are_the_reference_s(kind: str, prompt: str, lengths: list[str]) -> None:
    """transformers pads sounds to equal length; here each is encoded alone."""
    media = open_media(MEDIA / kind / "mmproj.gguf", config_of(kind))
    parts = [{"type": "audio", "audio": sound_files.wav(voice(LENGTHS[length]))} for length in lengths]
    check_logits(media, kind, prompt, parts)


def test_logits_of_a_prompt_with_a_picture_and_a_sound_are_the_reference_s(tmp_path: Path) -> None:
    """Of one file with both towers, as E2B's and E4B's have them: `v`'s beside `a`'s."""
    seeing = gguf.GGUFReader(MEDIA / "v" / "mmproj.gguf")
    keys = {f.name: f.contents() for f in seeing.fields.values() if "vision" in f.name}
    more: list[Entry] = [(t.name, np.asarray(t.data), t.tensor_type) for t in seeing.tensors]
    media = changed("a", tmp_path / "mmproj.gguf", lambda entries: [*entries, *more], keys)
    assert media.kinds == {"image", "video", "audio"}
    image = Image.fromarray(drawing(*SIZES["square"]))
    sound = {"type": "audio", "audio": sound_files.wav(voice(RATE))}
    check_logits(media, "a", "picture and sound", [{"type": "image", "image": image, "tokens": 70}, sound])


def test_models_that_hear_nothing_say_which_do() -> None:
    media = open_media(MEDIA / "v31" / "mmproj.gguf", config_of("v31"))
    with pytest.raises(InputError, match="takes image and video, no audio; of Gemma 4 E2B, E4B and 12B hear"):
        media.encode({"type": "audio", "audio": sound_files.wav(voice(RATE))})


def test_pictures_are_not_heard() -> None:
    media = open_media(MEDIA / "a" / "mmproj.gguf", config_of("a"))
    with pytest.raises(InputError, match="takes audio, no image"):
        media.encode({"type": "image", "image": b"any"})
