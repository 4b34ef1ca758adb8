"""Sounds: a file or bytes in any common form, as 16 kHz mono, in pieces of at most 30 seconds.

In: WAV, MP3, FLAC, Ogg (Vorbis, Opus), M4A, AAC, AIFF, WebM or MP4, of any rate and number of channels. Out: fp32
samples. FFmpeg's decoders read it (PyAV), one packet at a time: what is not sound is passed over, and no more than an
hour is ever held. Knows no towers.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

import numpy as np

from ..errors import InputError
from .content import Content

if TYPE_CHECKING:
    from av.container import InputContainer

RATE = 16_000  # samples a second
PIECE = 30 * RATE  # samples that a tower takes at once: 750 tokens
MOST = 3600  # seconds; 90,000 tokens
RATES = range(1000, 400_000)  # of a file; a resampler's filter grows with the rate
LOUDEST = 1e6  # a sample; full scale is 1
# FFmpeg's demuxers that may read a file. Others open files and addresses that the content names (HLS, concat).
FORMS = "aac,aiff,flac,matroska,mov,mp3,ogg,w64,wav"
TAKEN = "give a WAV, MP3, FLAC, Ogg, M4A or WebM file"


def pieces(content: Content) -> list[np.ndarray]:
    """Return a sound's pieces, fp32 [n] each, all of PIECE samples but the last.

    A tower hears no more than 30 seconds at once. transformers drops what lies beyond; here the rest follows in pieces
    that are encoded apart from each other, as llama.cpp does, and all of them stand between one pair of control tokens.

    Raises:
        InputError: no sound, or one that can't be decoded, is cut short, holds NaN or is longer than an hour.
    """
    samples = decode(content)
    return [samples[i : i + PIECE] for i in range(0, len(samples), PIECE)]


def decode(content: Content) -> np.ndarray:
    """Return a sound's samples, fp32 [n] at 16 kHz, the mean of its channels. Raises InputError as `pieces` does.

    A packet that can't be decoded is passed over, as players do, as long as the sound has the length that its file
    says. Of Ogg and WebM files, and MP3 files without a count of frames, that are cut short nobody can tell: they are
    heard to their end.
    """
    import av  # takes a third of a second

    with content.open() as file:
        _check_riff(file, content.name)
        counted = _counts_frames(file)
        try:
            with _opened(file) as container:
                exact = container.format.name not in ("mp3", "aac") or counted  # of these two others are guesses
                found = list(_chunks(container, content.name, exact))
        except (av.FFmpegError, ValueError, OverflowError) as error:
            why = error.strerror if isinstance(error, av.FFmpegError) else str(error)
            raise InputError(f"{content.name}: can't be read as sound ({why}); {TAKEN}") from None
    if not found:
        raise InputError(f"{content.name}: holds no samples; {TAKEN}")
    return np.concatenate(found)


def _opened(file: BinaryIO) -> InputContainer:
    """Open a sound whose title may be in any encoding: PyAV up to 18 is to be told, later ones take it as it is."""
    import av

    given: dict[str, Any] = {"options": {"format_whitelist": FORMS}}
    try:
        return cast("InputContainer", av.open(file, **given, metadata_errors="replace"))
    except TypeError:
        return cast("InputContainer", av.open(file, **given))


def _check_riff(file: BinaryIO, name: str) -> None:
    """Refuse a WAV file with a chunk that it doesn't hold: FFmpeg takes less of samples, and memory for the rest."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    form, long = file.read(4), 0  # RF64 and BW64 say the length of samples apart, in 64 bits
    order: Literal["big", "little"] = "big" if form == b"RIFX" else "little"
    at = 12 if form in (b"RIFF", b"RIFX", b"RF64", b"BW64") else size
    chunks = 0
    while at + 8 <= size:
        file.seek(at)
        chunks += 1
        tag, n = file.read(4), int.from_bytes(file.read(4), order)
        if tag == b"ds64":
            long = int.from_bytes(file.read(16)[8:], order)
        if tag == b"data" and (n == 0 or n >= 0x7FFF0000):
            if not long:  # from a program that writes to a pipe: the rest of the file
                break
            n = long
        if (at + 8 + n > size and tag.isascii()) or chunks > 1000:
            raise InputError(f"{name}: has {size} of {at + 8 + n} bytes: it is cut short or damaged; copy it again")
        at += 8 + n + n % 2
    file.seek(0)


def _counts_frames(file: BinaryIO) -> bool:
    """Return True for an MP3 file that says in its first frame how many it has."""
    head = file.read(10)
    tag = 10 + sum(b << 7 * i for i, b in enumerate(reversed(head[6:]))) if head[:3] == b"ID3" else 0
    file.seek(tag)
    frame = file.read(256)
    file.seek(0)
    return any(mark in frame for mark in (b"Xing", b"Info", b"VBRI"))


def _chunks(container: InputContainer, name: str, exact: bool) -> Iterator[np.ndarray]:
    """Yield fp32 [n] pieces of the first sound stream of an open file, resampled, and hold them to its header.

    `exact`: the length that the header says is one.
    """
    import av

    if not container.streams.audio:
        raise InputError(f"{name}: has no sound in it; {TAKEN}")
    stream = container.streams.audio[0]
    if stream.codec_context is None:
        raise InputError(f"{name}: is encoded in a way that can't be read; {TAKEN}")
    if stream.rate not in RATES:
        raise InputError(f"{name}: has {stream.rate} samples a second; convert it to 16000")
    declared = float(stream.duration * stream.time_base) if exact and stream.duration and stream.time_base else 0.0
    too_long = InputError(f"{name}: is longer than an hour; cut it into shorter sounds")
    if declared > MOST:
        raise too_long
    resampler = av.AudioResampler(format="flt", rate=RATE)  # channels side by side: PyAV crashes at 8 and more apart
    total = 0
    for packet in container.demux(stream):
        for frame in [*_frames(packet), *([] if packet.size else [None])]:  # the last packet is empty
            for resampled in resampler.resample(frame):
                samples: np.ndarray = resampled.to_ndarray().reshape(-1, resampled.layout.nb_channels)
                if not (np.abs(samples) < LOUDEST).all():
                    raise InputError(f"{name}: has samples that are no numbers or far too large; export it again")
                chunk: np.ndarray = samples.mean(1, dtype=np.float32)
                total += len(chunk)
                if total > MOST * RATE:
                    raise too_long
                yield chunk
    if total / RATE < 0.95 * declared - 0.5:
        raise InputError(
            f"{name}: ends after {total / RATE:.1f} of {declared:.1f} seconds: it is damaged; copy it again"
        )


def _frames(packet: Any) -> list[Any]:
    import av

    try:
        return list(packet.decode())
    except av.InvalidDataError:
        return []
