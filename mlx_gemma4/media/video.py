"""Videos: from a file's bytes to frames, as a tower reads pictures, with the time of each.

In: a `Content`. Out: at most 32 frames, evenly spread over the video as transformers' processor for Gemma 4 takes them,
each of up to 70 soft tokens. Decoded by PyAV; the file can't make it open others.
"""

from __future__ import annotations

from itertools import islice

import numpy as np

from ..errors import InputError, one_line
from .content import Content
from .picture import resized

FRAMES = 32  # at most
TOKENS = 70  # of a frame, at most
MOST_FRAMES = 36_000  # of a video: 20 minutes at 30 a second; all up to the last one taken are decoded
MOST_PIXELS = 9_000_000  # of a frame
# What may be inside; formats that name other files or addresses are not among these.
OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,flv,gif",
    "protocol_whitelist": "none",
}


def frames(content: Content) -> list[tuple[str, np.ndarray]]:
    """Return the frames of a video: the time as "mm:ss", and pixels uint8 [height, width, 3].

    Raises:
        InputError: it can't be decoded, has no frames, or more or larger ones than can be taken.
    """
    import av

    with content.open() as file:
        try:
            with av.open(file, options=OPTIONS) as container:
                if not container.streams.video:
                    raise InputError(f"{content.name}: has no pictures; give a video")
                stream = container.streams.video[0]
                if stream.width * stream.height > MOST_PIXELS:
                    raise InputError(f"{content.name}: is {stream.width} x {stream.height} pixels; make it smaller")
                stream.thread_type = "AUTO"
                rate = float(stream.average_rate or stream.guessed_rate or 24)
                total = stream.frames
                if not total:  # some formats don't say
                    packets = (packet for packet in container.demux(stream) if packet.size)
                    total = sum(1 for _ in islice(packets, MOST_FRAMES + 1))
                    container.seek(0)
                if total > MOST_FRAMES:
                    raise InputError(f"{content.name}: has more than {MOST_FRAMES:,} frames; give a part of it")
                wanted = {i * total // FRAMES for i in range(FRAMES)} if total > FRAMES else set(range(total))
                found = []
                for i, frame in enumerate(islice(container.decode(stream), max(wanted, default=-1) + 1)):
                    if i in wanted:
                        image = frame.to_image().rotate(getattr(frame, "rotation", 0), expand=True)
                        time = int(i / rate)
                        found.append((f"{time // 60:02}:{time % 60:02}", resized(image, TOKENS)))
        except InputError:
            raise
        except Exception as error:  # each format's decoder has its own
            raise InputError(f"{content.name}: can't be decoded ({one_line(str(error))[:80]}); give another") from None
    if not found:
        raise InputError(f"{content.name}: has no frames that can be decoded; give another")
    return found
