"""Sound files made in tests: WAV by hand, other forms by FFmpeg."""

from __future__ import annotations

import io
import struct

import av
import numpy as np
from signals import RATE


def wav(samples: np.ndarray, rate: int = RATE, channels: int = 1) -> bytes:
    """A WAV file of interleaved samples as they are: floats, or integers (one byte: mu-law)."""
    tag = {"f": 3, "i": 1, "u": 7}[samples.dtype.kind]
    width, data = samples.dtype.itemsize, samples.tobytes()
    head = struct.pack("<HHIIHH", tag, channels, rate, rate * width * channels, width * channels, 8 * width)
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def encoded(form: str, codec: str, samples: np.ndarray, rate: int, bit_rate: int = 128_000, **options: str) -> bytes:
    """A file of `samples` fp32 [channels, n], in a form, with options, and with a codec of FFmpeg's."""
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(samples)]
    out = io.BytesIO()
    with av.open(out, "w", format=form, options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout, options={"strict": "-2"})
        stream.bit_rate = bit_rate
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        own = stream.codec_context
        to_own = av.AudioResampler(format=own.format, layout=layout, rate=rate, frame_size=own.frame_size or None)
        for part in [*to_own.resample(frame), *to_own.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return out.getvalue()
