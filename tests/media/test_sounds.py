"""Sounds in the forms that people have become the samples that were put in; what is none says so in one line."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import zipfile
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import pytest
from signals import RATE, voice
from sound_files import encoded, wav

from mlx_gemma4.errors import InputError
from mlx_gemma4.media import sounds
from mlx_gemma4.media.content import content_of


def decoded(audio: bytes | Path) -> np.ndarray:
    return sounds.decode(content_of({"type": "audio", "audio": audio}))


def distance(found: np.ndarray, expected: np.ndarray, most_late: int) -> float:
    """RMS of the difference over that of what is expected, at the best lag of up to `most_late` samples."""
    n = min(len(found), len(expected)) - most_late - 800
    errors = [np.square(found[400 + t : 400 + t + n] - expected[400 : 400 + n]).mean() for t in range(most_late + 1)]
    return float(np.sqrt(min(errors) / np.square(expected).mean()))


def chord(rate: int) -> np.ndarray:
    """A second of three tones below 4 kHz."""
    t = np.arange(rate) / rate
    tones: np.ndarray = np.sin(2 * np.pi * np.array([[200], [1000], [2900]]) * t + 1)
    return 0.2 * tones.sum(0)


@pytest.mark.parametrize("channels", [1, 2, 6, 8, 64])
@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000, 96_000])
def test_any_rate_and_channels(rate: int, channels: int) -> None:
    """A chord of another loudness in each channel is heard as their mean."""
    loudness = np.linspace(0.2, 1, channels)[:, None]
    found = decoded(wav((loudness * chord(rate)).T.astype(np.float32), rate, channels))
    assert abs(len(found) - RATE) <= 1
    assert found.dtype == np.float32
    assert distance(found, loudness.mean() * chord(RATE), 0) < 2e-3


def test_samples_at_16_khz_stay_as_they_are() -> None:
    given = voice(RATE)
    np.testing.assert_array_equal(decoded(wav(given)), given)
    whole = (given * 32767).round().astype("<i2")
    np.testing.assert_allclose(decoded(wav(whole)), whole / 32768, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("form", "codec", "rate", "limit", "late"),
    [
        ("wav", "pcm_s24le", 48_000, 1e-3, 0),
        ("wav", "pcm_mulaw", 8_000, 0.03, 0),
        ("w64", "pcm_s16le", 16_000, 1e-3, 0),
        ("aiff", "pcm_s16be", 44_100, 1e-3, 0),
        ("flac", "flac", 44_100, 1e-3, 0),
        ("mp3", "libmp3lame", 44_100, 0.1, 0),
        ("ogg", "vorbis", 44_100, 0.03, 0),
        ("ogg", "libopus", 48_000, 0.1, 0),
        ("ipod", "aac", 44_100, 0.05, 0),  # .m4a
        ("adts", "aac", 48_000, 0.25, 400),  # says nothing of the encoder's delay
        ("webm", "libopus", 48_000, 0.1, 0),
        ("mp4", "aac", 48_000, 0.05, 0),
    ],
)
def test_forms(form: str, codec: str, rate: int, limit: float, late: int) -> None:
    """A voice comes out of each form as it went in, as exactly as its codec is, and in time."""
    given = voice(3 * rate, rate)
    found = decoded(encoded(form, codec, np.stack([given, given]), rate))
    assert abs(len(found) - 3 * RATE) < 1000
    assert distance(found, decoded(wav(given, rate)), late) < limit


@pytest.mark.parametrize(
    ("form", "codec", "options", "limit", "late"),
    [
        ("webm", "libopus", {"live": "1"}, 0.1, 0),  # Chrome, Firefox
        ("ogg", "libopus", {}, 0.1, 0),  # Firefox, when asked
        ("mp4", "aac", {"movflags": "frag_keyframe+empty_moov+default_base_moof"}, 0.25, 400),  # Safari
    ],
)
def test_what_browsers_record(form: str, codec: str, options: dict[str, str], limit: float, late: int) -> None:
    """MediaRecorder writes as it goes, without the length and without going back to the head."""
    given = voice(3 * 48_000, 48_000)
    found = decoded(encoded(form, codec, given[None], 48_000, **options))
    assert abs(len(found) - 3 * RATE) < 1500
    assert distance(found, decoded(wav(given, 48_000)), late) < limit


def test_a_film_s_sound_is_heard_and_its_pictures_are_passed_over() -> None:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=5, width=64, height=48, pix_fmt="yuv420p")
        audio = container.add_stream("aac", rate=RATE, layout="mono")
        for i in range(5):
            picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 * i, np.uint8), format="rgb24")
            container.mux(video.encode(picture))
        for i in range(15):
            frame = av.AudioFrame.from_ndarray(
                voice(RATE)[None, i * 1024 : (i + 1) * 1024], format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = RATE, i * 1024
            container.mux(audio.encode(frame))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    assert distance(decoded(out.getvalue()), voice(15 * 1024), 0) < 0.1


WAV_HEAD = wav(voice(0))


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.wav", wav(voice(RATE)))
    return out.getvalue()


def rf64(more: bytes = b"") -> bytes:
    """A WAV file whose samples' length is said in 64 bits, and what follows them."""
    head, data = WAV_HEAD[12:36], voice(RATE).tobytes()
    lengths = b"ds64" + struct.pack("<IQQQI", 28, 0, len(data), RATE, 0)
    return b"RF64\xff\xff\xff\xffWAVE" + lengths + head + b"data\xff\xff\xff\xff" + data + more


def unknown_codec() -> bytes:
    made = bytearray(wav(voice(RATE)))
    made[20:22] = b"\x99\x99"
    return bytes(made)


def with_sample(value: float) -> bytes:
    samples = voice(RATE)
    samples[777] = value
    return wav(samples)


def still_film() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=5, width=64, height=48, pix_fmt="yuv420p")
        container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        container.mux(video.encode(None))
    return out.getvalue()


WAV = wav(voice(RATE))
FLAC, MP3 = (encoded(f, c, voice(3 * RATE)[None], RATE) for f, c in (("flac", "flac"), ("mp3", "libmp3lame")))
OGG = encoded("ogg", "flac", voice(RATE)[None], RATE)
ID3 = b"ID3\3\0\0" + bytes([0, 0, 2, 0]) + bytes(256)  # a tag of 256 bytes
M4A = encoded("ipod", "aac", voice(3 * RATE)[None], RATE)
HLS = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/hostname\n#EXT-X-ENDLIST\n"
BAD = {
    "empty": (b"", "is empty"),
    "an archive": (zipped(), "can't be read as sound"),
    "a text": (b"not a sound at all. " * 100, "can't be read as sound"),
    "zeros": (bytes(10_000), "can't be read as sound"),
    "a playlist": (HLS, "can't be read as sound"),
    "a list of files": (b"ffconcat version 1.0\nfile /etc/hostname\n", "can't be read as sound"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "can't be read as sound"),
    "a WAV of empty chunks": (WAV + bytes(100_000), "cut short or damaged"),
    "the same behind 64 bits": (rf64(b"LIST" + struct.pack("<I", 2_000_000_000)), "cut short or damaged"),
    "no samples": (wav(voice(0)), "holds no samples"),
    "pictures alone": (still_film(), "has no sound in it"),
    "a codec nobody knows": (unknown_codec(), "is encoded in a way that can't be read"),
    "another rate in the middle": (
        OGG + encoded("ogg", "flac", voice(RATE, 8000)[None], 8000),
        "can't be read as sound",
    ),
    "NaN": (with_sample(np.nan), "no numbers"),
    "infinite": (with_sample(-np.inf), "no numbers"),
    "huge": (with_sample(1e30), "far too large"),
    "a WAV cut short": (WAV[:-10_000], "of 64044 bytes: it is cut short"),
    "a WAV whose list of names has 2 GB": (WAV + b"LIST" + struct.pack("<I", 2_000_000_000), "of 2000064052 bytes"),
    "a WAV of a head": (WAV[:30], "is cut short"),
    "a FLAC cut short": (FLAC[: len(FLAC) // 2], "of 3.0 seconds"),
    "an MP3 cut short": (MP3[: len(MP3) // 2], r"of 3\.. seconds"),
    "an MP3 with a tag, cut short": (ID3 + MP3[: len(MP3) // 2], r"of 3\.. seconds"),
    "an M4A cut short": (M4A[: len(M4A) // 2], "can't be read as sound"),
    "1 Hz": (wav(voice(RATE), rate=1), "has 1 samples a second"),
    "1 GHz": (wav(voice(RATE), rate=1_000_000_000), "has 1000000000 samples a second"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_sound_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    data, why = BAD[what]
    path = tmp_path / "given.wav"
    path.write_bytes(data)
    for given, name in ((path, str(path)), (data, "audio of ")):
        if not data and given is data:
            continue  # the caller's bytes are checked in test_content
        with pytest.raises(InputError, match=why) as refused:
            decoded(given)
        assert name in str(refused.value)
        assert "\n" not in str(refused.value)


def test_any_beginning_of_a_file_is_a_sound_or_refused() -> None:
    """What is cut anywhere ends in an InputError or in samples, never in another error."""
    for data in (WAV, FLAC, MP3, M4A, encoded("webm", "libopus", voice(48_000, 48_000)[None], 48_000)):
        for cut in np.linspace(1, len(data) - 1, 23).astype(int):
            with suppress(InputError):
                assert np.isfinite(decoded(data[:cut])).all()


def test_five_hours_are_refused(tmp_path: Path) -> None:
    """By the header at once; where the header doesn't say, when an hour has been decoded. Neither is held in memory."""
    size = 5 * 3600 * RATE * 2
    head = bytearray(wav(np.zeros(0, "<i2")))
    head[4:8], head[40:44] = struct.pack("<I", size + 36), struct.pack("<I", size)
    path = tmp_path / "long.wav"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)  # a hole
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(InputError, match="longer than an hour; cut it"):
        decoded(path)
    assert time.perf_counter() - start < 5
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_an_mp3_whose_bit_rate_rises_and_that_has_no_count_of_frames_is_heard_whole() -> None:
    """FFmpeg takes the rate of the first frames for all, and says 149 seconds of 14."""
    low, high = (
        encoded("mp3", "libmp3lame", voice(7 * RATE)[None], RATE, bit_rate, write_xing="0")
        for bit_rate in (8_000, 160_000)
    )
    assert b"Xing" not in low + high
    assert abs(len(decoded(low + high)) - 14 * RATE) < 4000


def test_a_wav_from_a_pipe_has_any_length_in_its_head() -> None:
    for size in (0, 0x7FFFF000, 0xFFFFFFFF):
        head = bytearray(WAV)
        head[4:8] = head[40:44] = struct.pack("<I", size)
        np.testing.assert_array_equal(decoded(bytes(head)), voice(RATE))
    np.testing.assert_array_equal(decoded(rf64()), voice(RATE))


def test_a_sound_whose_header_says_no_length_is_bounded_while_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    webm = encoded("webm", "libopus", voice(3 * 48_000, 48_000)[None], 48_000)
    assert len(decoded(webm)) == 3 * RATE
    monkeypatch.setattr(sounds, "MOST", 2)
    with pytest.raises(InputError, match="longer than an hour"):
        decoded(webm)
