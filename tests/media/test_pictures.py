"""Pictures and videos as people have them: formats, modes, sizes, and what can't be read."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from drawings import drawing
from PIL import Image

from mlx_gemma4.errors import InputError
from mlx_gemma4.media import picture, video
from mlx_gemma4.media.content import content_of
from mlx_gemma4.media.kind import BUDGETS
from mlx_gemma4.media.picture import decoded, fitted


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    out = BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def shown(value: Any) -> np.ndarray:
    return np.asarray(decoded(content_of({"type": "image", "image": value})))


IMAGE = Image.fromarray(drawing(60, 90))


@pytest.mark.parametrize(("form", "off"), [("PNG", 0), ("BMP", 0), ("JPEG", 60), ("WEBP", 60)])
def test_formats(form: str, off: int) -> None:
    assert np.abs(shown(saved(IMAGE, form)).astype(int) - np.asarray(IMAGE)).max() <= off


def test_a_path_bytes_and_an_image_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(saved(IMAGE, "PNG"))
    for value in (tmp_path / "a.png", str(tmp_path / "a.png"), saved(IMAGE, "PNG"), IMAGE):
        np.testing.assert_array_equal(shown(value), np.asarray(IMAGE))


def test_the_first_frame_of_an_animation() -> None:
    red, blue = (Image.new("RGB", (50, 50), colour) for colour in ("red", "blue"))
    for form in ("GIF", "WEBP", "PNG"):
        made = saved(red, form, save_all=True, append_images=[blue] * 20, lossless=True)
        assert tuple(shown(made)[25, 25]) == (255, 0, 0), form


def test_exif_turns_a_picture_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    made = saved(IMAGE, "PNG", exif=exif)
    for value in (made, Image.open(BytesIO(made))):
        np.testing.assert_array_equal(shown(value), np.rot90(np.asarray(IMAGE), -1))


def test_transparency_is_on_white() -> None:
    for mode, colour in (("RGBA", (0, 0, 0, 0)), ("LA", (0, 0))):
        assert shown(saved(Image.new(mode, (48, 48), colour), "PNG")).min() == 255
    half = shown(saved(Image.new("RGBA", (48, 48), (0, 0, 0, 128)), "PNG"))
    assert abs(int(half.max()) - 127) <= 1
    palette = Image.new("P", (48, 48), 0)
    palette.putpalette([10, 20, 30])
    assert shown(saved(palette, "PNG", transparency=0)).min() == 255
    assert tuple(shown(saved(palette, "PNG"))[0, 0]) == (10, 20, 30)


def test_greys_of_16_bits_and_four_inks() -> None:
    grey = Image.fromarray(np.full((48, 48), 0x8081, np.uint16))
    assert (shown(saved(grey, "PNG")) == 0x80).all()
    assert (shown(saved(Image.new("1", (48, 48), 1), "PNG")) == 255).all()
    inks = shown(saved(Image.new("CMYK", (48, 48), (0, 255, 255, 0)), "JPEG"))[0, 0]
    assert inks[0] > 200
    assert inks[1:].max() < 60


@pytest.mark.parametrize("tokens", BUDGETS)
@pytest.mark.parametrize(("height", "width"), [(47, 47), (2000, 1), (1, 3000), (300, 400), (4032, 3024), (1, 1)])
def test_a_picture_fills_its_budget(height: int, width: int, tokens: int) -> None:
    rows, columns = (n // 48 for n in fitted(height, width, tokens))
    assert 1 <= rows * columns <= tokens
    if max(height, width) < 2 * min(height, width):
        assert rows * columns > 0.8 * tokens


def test_budgets() -> None:
    for wrong in (0, 100, "280", True):
        with pytest.raises(InputError, match="take one of 70, 140, 280, 560, 1120"):
            picture.budget({"tokens": wrong})
    assert picture.budget({}) == 280


def bomb() -> bytes:
    """A PNG that says it has 40,000 x 40,000 pixels."""
    made = bytearray(saved(Image.new("1", (8, 8)), "PNG"))
    made[16:24] = (40_000).to_bytes(4, "big") * 2
    made[29:33] = zlib.crc32(made[12:29]).to_bytes(4, "big")
    return bytes(made)


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty"),
    "text": (lambda: b"no picture at all", "no picture that can be read"),
    "archive": (lambda: b"PK\x03\x04" + bytes(100), "no picture that can be read"),
    "svg": (lambda: b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "is an SVG"),
    "large": (bomb, "more than 89 megapixels"),
    "cut": (lambda: saved(IMAGE, "PNG")[:-500], "can't be decoded"),
    "cut jpeg": (lambda: saved(IMAGE, "JPEG")[:600], "can't be decoded"),
    "cut gif": (lambda: saved(IMAGE, "GIF")[:1500], "can't be decoded"),
    "cut webp": (lambda: saved(IMAGE, "WEBP")[:300], "can't be decoded|no picture"),
    "only a head": (lambda: saved(IMAGE, "PNG")[:20], "can't be decoded|no picture"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_pictures_are_refused_in_one_line(what: str, tmp_path: Path) -> None:
    made, match = BAD[what][0](), BAD[what][1]
    (tmp_path / "a.png").write_bytes(made)
    for value in (made, tmp_path / "a.png"):
        with pytest.raises(InputError, match=match) as refused:
            shown(value)
        assert "\n" not in str(refused.value)
        assert ("a.png" if isinstance(value, Path) else "image of") in str(refused.value)


def test_no_file_no_folder_no_number(tmp_path: Path) -> None:
    for value in (tmp_path / "none.png", tmp_path, 7, None):
        with pytest.raises(InputError):
            content_of({"type": "image", "image": value})


# ---------------------------------------------------------------- videos


def filmed(frames: int, rate: int = 10, form: str = "mp4", size: tuple[int, int] = (96, 64)) -> bytes:
    """A video whose frames get lighter."""
    out = BytesIO()
    with av.open(out, "w", format=form) as container:
        stream = container.add_stream("mpeg4" if form in ("mp4", "avi") else "libvpx", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(frames):
            grey = np.full((size[1], size[0], 3), 20 + 200 * i // max(frames, 1), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, "rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()


def frames_of(value: Any) -> list[tuple[str, np.ndarray]]:
    return video.frames(content_of({"type": "video", "video": value}))


@pytest.mark.parametrize("form", ["mp4", "avi", "webm"])
def test_frames_are_spread_over_a_video(form: str) -> None:
    made = frames_of(filmed(100, form=form))
    assert [stamp for stamp, _ in made] == [f"00:{i * 100 // 32 // 10:02}" for i in range(32)]
    greys = [int(pixels.mean()) for _, pixels in made]
    assert greys == sorted(greys)
    assert all(abs(grey - (20 + 2 * (i * 100 // 32))) < 6 for i, grey in enumerate(greys))
    assert {pixels.shape for _, pixels in made} == {(*fitted(64, 96, 70), 3)}


def test_a_short_video_has_all_its_frames() -> None:
    assert [stamp for stamp, _ in frames_of(filmed(5, rate=1))] == [f"00:0{i}" for i in range(5)]


def test_a_video_of_a_phone_held_upright_is_turned() -> None:
    """Its frames lie on their side, and a matrix in the file says how to turn them: here clockwise by a quarter."""
    out = BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        pixels = np.zeros((64, 96, 3), np.uint8)
        pixels[:, 48:] = 220  # light on the right
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode(None))
    made = bytearray(out.getvalue())
    at = made.index(b"tkhd") + 44
    made[at : at + 36] = b"".join(
        n.to_bytes(4, "big", signed=True) for n in (0, 1 << 16, 0, -1 << 16, 0, 0, 64 << 16, 0, 1 << 30)
    )
    [(_, turned)] = frames_of(bytes(made))
    assert turned.shape[0] > turned.shape[1]
    half = turned.shape[0] // 2
    assert turned[:half].mean() < 30
    assert turned[half:].mean() > 190


def test_bad_videos_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for made in (b"no video", filmed(20)[:300], b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n"):
        with pytest.raises(InputError, match="can't be decoded"):
            frames_of(made)
    monkeypatch.setattr(video, "MOST_FRAMES", 10)
    for form in ("mp4", "webm"):
        with pytest.raises(InputError, match="more than 10 frames"):
            frames_of(filmed(20, form=form))
    monkeypatch.setattr(video, "MOST_PIXELS", 1000)
    with pytest.raises(InputError, match="is 96 x 64 pixels"):
        frames_of(filmed(5))
