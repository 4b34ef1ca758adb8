"""Rearrange the blocks of a quantized tensor into planar arrays: plain numpy, whole tensors, all cores.

In: the raw blocks of a tensor and the `BlockLayout` that says where a block keeps its bits. Out, written into arrays
the caller owns: codes as one little-endian bit stream in natural order, group scales as one bit stream, fp16 scales.
This is the reference of pack.metal.

Blocks are transposed first, so that a row holds the same byte of very many blocks. Each step is then one numpy
operation on such rows, at the speed of numpy's SIMD loops and outside the interpreter's lock.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..execution import cores

Bytes = npt.NDArray[np.uint8]

THREADS = 8  # at most
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


@dataclass(frozen=True)
class Words:
    """The place of a word of codes, for codes that stay as the file has them: of the c-th 32 weights, `at + c step`."""

    at: int
    step: int


# From some bytes of blocks as the file has them, [bytes, blocks], to a bit stream.
Reader = Callable[[Bytes], Bytes]


@dataclass(frozen=True)
class BlockLayout:
    """The places in a block of `size` values and `n_bytes` bytes.

    codes: planes from the lowest bits of a code up; or the places of words; or a reader of whole blocks. block_scales:
    the bytes where d (and dmin or m) are; or four bytes whose upper halves make d. group_scales: the reader of the
    block's `group_scale_bytes` of group scales, the byte where they begin, and the one after they end.
    """

    size: int
    n_bytes: int
    bits: int  # of a code
    codes: tuple[Plane | Words, ...] | Reader
    block_scales: tuple[int | tuple[int, ...], ...] = ()
    group_scales: tuple[Reader, int, int] | None = None
    group_scale_bytes: int = 0


def unpacked_codes(size: int, planes: tuple[Plane, ...], source: Bytes) -> Bytes:
    """Return the codes of some blocks [n_bytes, blocks], one a byte: [size, blocks]."""
    codes = np.empty((size, source.shape[1]), np.uint8)
    done = 0  # bits of each code so far
    for plane in planes:
        per_byte, mask = 8 // plane.bits, (1 << plane.bits) - 1
        runs = source[plane.at : plane.at + size // per_byte].reshape(-1, plane.run, source.shape[1])
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


def wide_stream(numbers: npt.NDArray[Any], bits: int) -> Bytes:
    """Return numbers [n, blocks] of more than 8 bits as little-endian bit streams: bytes [n * bits / 8, blocks]."""
    out = np.empty((len(numbers) * bits // 8, numbers.shape[1]), np.uint8)
    for byte in range(len(out)):
        n, shift = divmod(byte * 8, bits)
        number = numbers[n] >> shift
        out[byte] = (number if shift + 8 <= bits else number | numbers[n + 1] << (bits - shift)) & 255
    return out


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


def iq2_xxs(source: Bytes) -> Bytes:
    """IQ2_XXS: of each 8 bytes the last 4: 4 sign indices of 7 bits, a scale of 4."""
    return source.reshape(8, 8, -1)[:, 4:].reshape(32, -1)


def iq2_s(source: Bytes) -> Bytes:
    """IQ2_S: of each 16 weights the upper 2 bits of 2 grid indices, then 4 of scale. The file has 8 bytes of the former
    (4 indices each), then 8 of the latter (2 scales each)."""
    high, scales = (np.stack((a & 15, a >> 4), 1).reshape(16, -1) for a in (source[:8], source[8:]))
    return cast(Bytes, high | scales << 4)


def iq3_s(source: Bytes) -> Bytes:
    """IQ3_S: of each 32 weights the top bits of 8 grid indices, then 4 bits of scale. The file has 8 bytes of the
    former, the signs, then 4 bytes of 2 scales each."""
    high, scales = source[:8].astype(np.uint32), source[40:44]
    return wide_stream(high | np.stack((scales & 15, scales >> 4), 1).reshape(8, -1).astype(np.uint32) << 8, 12)


def iq1_m(source: Bytes) -> Bytes:
    """IQ1_M: of each 16 weights 2 times 3 upper bits of a grid index and one that says minus, then 3 bits of scale.
    The file has 16 bytes of the former, then 4 words of 16 bits with 4 scales (and 4 bits of d) each."""
    nibbles, low, high = (a.astype(np.uint32) for a in (source[:16], source[16::2], source[17::2]))
    words = low | high << 8
    scales = np.stack([words >> shift & 7 for shift in (0, 3, 6, 9)], 1).reshape(16, -1)
    return wide_stream(nibbles | scales << 8, 11)


def tq1_0_codes(source: Bytes) -> Bytes:
    """TQ1_0: the first 20 of each 32 weights, 5 trits a byte."""
    return _trit_bytes(source)[:, :4].reshape(32, -1)


def tq1_0(source: Bytes) -> Bytes:
    """TQ1_0: the last 12 of each 32 weights: 2 bytes of 5 trits, and 4 bits of 2."""
    a, b, c = (_trit_bytes(source)[:, i].astype(np.uint32) for i in (4, 5, 6))
    return wide_stream(a | b << 8 | (c + 15 >> 4) << 16, 20)


def _trit_bytes(source: Bytes) -> Bytes:
    """Of each 32 weights 6 bytes of 5 trits and one of 2, in order: [8, 7, blocks].

    A byte b has trit n in the top of b * 3^n mod 256: (.. * 3) >> 8. The file has 32 bytes of weights i, i + 32, .. for
    byte i, then 16 bytes of i, i + 16, .. from 160 on, then 4 of i, i + 4, .. from 240 on, 4 trits each.
    """
    trits = []
    for at, count, each in ((0, 32, 5), (32, 16, 5), (48, 4, 4)):
        raised = source[at : at + count] * np.array([1, 3, 9, 27, 81][:each], np.uint8)[:, None, None]  # mod 256
        trits.append(((raised > 85).astype(np.uint8) + (raised > 170)).reshape(each * count, -1))  # raised * 3 >> 8
    eights = np.concatenate(trits).reshape(8, 32, -1)
    fives = np.concatenate((eights, np.zeros_like(eights[:, :3])), 1).reshape(8, 7, 5, -1)
    whole = fives[:, :, 0]
    for i in range(1, 5):
        whole = whole * 3 + fives[:, :, i]
    return ((np.arange(243) * 256 + 242) // 243).astype(np.uint8)[whole]


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
    planes = () if callable(layout.codes) else tuple(p for p in layout.codes if isinstance(p, Plane))
    words = () if callable(layout.codes) else tuple(w for w in layout.codes if isinstance(w, Words))
    places = [w.at + c * w.step + i for c in range(layout.size // 32) for w in words for i in range(4)]

    def read_codes(source: Bytes) -> Bytes:
        if callable(layout.codes):
            return layout.codes(source)
        return bit_stream(unpacked_codes(layout.size, planes, source), layout.bits)

    def stripe(start: int) -> None:
        stop = min(start + STRIPE // layout.size, len(blocks))
        if group_scales is not None and layout.group_scales is not None:
            reader, at, end = layout.group_scales
            source = blocks[start:stop, at:end]
            group_scales[start:stop] = reader(np.ascontiguousarray(source.T)).T
        if block_scales is not None:
            for i, place in enumerate(layout.block_scales):
                if isinstance(place, tuple):
                    halves = blocks[start:stop, place] >> 4
                    block_scales[start:stop] = halves[:, ::2] | halves[:, 1::2] << 4
                else:
                    block_scales[start:stop].view("<u2")[:, i] = blocks[start:stop, place : place + 2].view("<u2")[:, 0]
        if words:
            np.take(blocks[start:stop], places, axis=1, out=codes[start:stop])
        elif layout.bits == 8:  # bytes in order already, but signed; q + 128 is not
            at = planes[0].at
            np.bitwise_xor(blocks[start:stop, at : at + layout.size], 128, out=codes[start:stop])
        else:
            for a in range(start, stop, step):
                source = np.ascontiguousarray(blocks[a : min(a + step, stop)].T)
                codes[a : min(a + step, stop)] = read_codes(source).T
        if on_read is not None:
            on_read(start * layout.n_bytes, stop * layout.n_bytes)

    in_threads(stripe, range(0, len(blocks), STRIPE // layout.size))


@cache
def pool() -> ThreadPoolExecutor:
    """Return the threads of `in_threads`."""
    return ThreadPoolExecutor(min(cores(), THREADS), thread_name_prefix="pack")


def in_threads(work: Callable[[int], None], starts: range) -> None:
    """work(start) for each start, on all cores; numpy lets other threads run while it works on an array.

    When this is over, by an error or Ctrl-C too, no thread is at it: what they write to may be freed.
    """
    if len(starts) < 2:
        for start in starts:
            work(start)
        return
    under_way = [pool().submit(work, start) for start in starts]
    try:
        for one in under_way:
            one.result()
    finally:
        wait([one for one in under_way if not one.cancel()])
