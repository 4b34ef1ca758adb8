"""Rearrange the blocks of a quantized tensor into planar arrays: plain numpy, whole tensors, all cores.

In: the raw blocks of a tensor and the `BlockLayout` that says where a block keeps its bits. Out, written into arrays
the caller owns: codes as one little-endian bit stream in natural order, group scales as one bit stream, fp16 scales.
This is the reference of pack.metal.

Blocks are transposed first, so that a row holds the same byte of very many blocks. Each step is then one numpy
operation on such rows, at the speed of numpy's SIMD loops and outside the interpreter's lock.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from ..execution import cores

Bytes = npt.NDArray[np.uint8]

STRIPE = 1 << 21  # codes a thread takes before it asks for more
SPAN = 250_000  # codes rearranged at once: they stay in the L2 cache. No power of two, so rows share few cache sets


@dataclass(frozen=True)
class Plane:
    """The place of some bits of each code in a block.

    The bytes from `at` on are cut into runs of `run` bytes. Byte j of a run holds `bits` bits of code j in its lowest
    bits, of code j + run in the next, and so on, 8 // bits codes to a byte; the next run holds the codes after those.
    """

    at: int
    bits: int
    run: int


# From the group scales of some blocks as the file has them, [bytes, blocks], to their bit stream of the same size.
GroupScalesReader = Callable[[Bytes], Bytes]


@dataclass(frozen=True)
class BlockLayout:
    """The places in a block of `size` values and `n_bytes` bytes.

    codes: planes from the lowest bits of a code up. block_scales: the bytes where d (and dmin or m) are. group_scales:
    the reader of the block's `group_scale_bytes` of group scales, and the byte where they begin.
    """

    size: int
    n_bytes: int
    codes: tuple[Plane, ...]
    block_scales: tuple[int, ...] = ()
    group_scales: tuple[GroupScalesReader, int] | None = None
    group_scale_bytes: int = 0

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return sum(plane.bits for plane in self.codes)


def unpacked_codes(layout: BlockLayout, source: Bytes) -> Bytes:
    """Return the codes of some blocks [n_bytes, blocks], one a byte: [size, blocks]."""
    codes = np.empty((layout.size, source.shape[1]), np.uint8)
    done = 0  # bits of each code so far
    for plane in layout.codes:
        per_byte, mask = 8 // plane.bits, (1 << plane.bits) - 1
        runs = source[plane.at : plane.at + layout.size // per_byte].reshape(-1, plane.run, source.shape[1])
        parts = codes.reshape(-1, per_byte, *runs.shape[1:])
        for i in range(per_byte):
            part = runs >> i * plane.bits if i else runs
            if done:
                parts[:, i] |= (part & mask) * (1 << done)
            else:
                np.bitwise_and(part, mask, out=parts[:, i])
        done += plane.bits
    return codes


def bit_stream(numbers: Bytes, bits: int) -> Bytes:
    """Return numbers [n, blocks] of fewer than 8 bits as little-endian bit streams: bytes [n * bits / 8, blocks]."""
    eights = numbers.reshape(-1, 8, numbers.shape[1])
    out = np.empty((len(eights), bits, numbers.shape[1]), np.uint8)
    for byte in range(bits):
        # Bits that run over the ends of the byte belong to its neighbours, and drop out here. Bytes are multiplied
        # where they move up, since numpy's left shift of them takes four times as long.
        shifts = ((eights[:, i], i * bits - byte * 8) for i in range(8))
        first, second, *others = (x * (1 << n) if n > 0 else x >> -n if n else x for x, n in shifts if -bits < n < 8)
        np.bitwise_or(first, second, out=out[:, byte])
        for part in others:
            out[:, byte] |= part
    return out.reshape(-1, numbers.shape[1])


# ---- readers of group scales; pack.metal has each under GROUP_SCALE_ and its name ----


def plain(source: Bytes) -> Bytes:
    """The file's bytes are the stream."""
    return source


def q4_k(source: Bytes) -> Bytes:
    """Q4_K, Q5_K: 8 pairs of 6 bits, scale | min << 6.

    The file has 12 bytes: d, m, x of 4 each. Groups 0-3 are the lower 6 bits of d and m; groups 4-7 have their lower
    4 bits in x (scale low, min high) and their upper 2 in the top of d and m.
    """
    d, m, x = source[:4], source[4:8], source[8:]
    scales = np.concatenate((d & 63, x & 15 | d >> 6 << 4))
    mins = np.concatenate((m & 63, x >> 4 | m >> 6 << 4))
    return bit_stream(np.stack((scales, mins), 1).reshape(16, -1), 6)


def q3_k(source: Bytes) -> Bytes:
    """Q3_K: 16 scales of 6 bits.

    The file has their lower halves in 8 bytes (group i and i + 8), then the upper 2 bits in 4 bytes (group i, i + 4,
    i + 8, i + 12).
    """
    low, high = source[:8], source[8:]
    upper = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)])
    return bit_stream(np.concatenate((low & 15, low >> 4)) | upper << 4, 6)


def iq4_xs(source: Bytes) -> Bytes:
    """IQ4_XS: 8 scales of 6 bits. The file has 2 bytes with the upper 2 bits, then 4 with the lower 4, in order."""
    high, low = source[:2], source[2:]
    upper = np.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], 1).reshape(8, -1)
    lower = np.stack((low & 15, low >> 4), 1).reshape(8, -1)
    return bit_stream(lower | upper << 4, 6)


# ---- all blocks of a tensor ----


def rearrange(
    layout: BlockLayout,
    raw: Bytes,
    codes: Bytes,
    group_scales: Bytes | None,
    block_scales: Bytes | None,
    on_read: Callable[[int, int], object] | None = None,
) -> None:
    """Write the planar arrays of a tensor.

    Args:
        raw: uint8, flat, B blocks.
        codes: uint8 [B, size * bits / 8], written.
        group_scales: uint8 [B, layout.group_scale_bytes] or None, written.
        block_scales: uint8 [B, 2 * len(layout.block_scales)] or None, written.
        on_read: called with a range of bytes of `raw` that will not be read again.
    """
    blocks, step = raw.reshape(-1, layout.n_bytes), SPAN // layout.size

    def stripe(start: int) -> None:
        stop = min(start + STRIPE // layout.size, len(blocks))
        if group_scales is not None and layout.group_scales is not None:
            reader, at = layout.group_scales
            source = blocks[start:stop, at : at + layout.group_scale_bytes]
            group_scales[start:stop] = reader(np.ascontiguousarray(source.T)).T
        if block_scales is not None:
            for i, at in enumerate(layout.block_scales):
                block_scales[start:stop].view("<u2")[:, i] = blocks[start:stop, at : at + 2].view("<u2")[:, 0]
        if layout.bits == 8:  # bytes in order already, but signed; q + 128 is not
            at = layout.codes[0].at
            np.bitwise_xor(blocks[start:stop, at : at + layout.size], 128, out=codes[start:stop])
        else:
            for a in range(start, stop, step):
                source = np.ascontiguousarray(blocks[a : min(a + step, stop)].T)
                codes[a : min(a + step, stop)] = bit_stream(unpacked_codes(layout, source), layout.bits).T
        if on_read is not None:
            on_read(start * layout.n_bytes, stop * layout.n_bytes)

    in_threads(stripe, range(0, len(blocks), STRIPE // layout.size))


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(cores(), 8), thread_name_prefix="pack")


def in_threads(work: Callable[[int], None], starts: range) -> None:
    """work(start) for each start, on all cores; numpy lets other threads run while it works on an array."""
    for _ in map(work, starts) if len(starts) < 2 else _threads().map(work, starts):
        pass
