"""Rearrange the blocks of a quantized tensor into planar arrays: numpy only, whole tensors, all cores.

In: the raw blocks of a tensor and the `Layout` that says where a block keeps its bits. Out, written into arrays the
caller owns: codes as one little-endian bit stream in natural order, group scales as one bit stream, fp16 scales.

A GGUF block scatters the bits of its codes for the benefit of CPU kernels. Here the codes of a segment, that is of a
run of bytes at one bit position, are masked out for very many blocks at once (`_take`), which leaves one code a byte;
neighbours are then pushed together (`_squeeze`), and the segments go to their places in the stream. Each
step is one numpy operation on an array of 64-bit words that stays in the cache, so it runs at the speed of numpy's
SIMD loops, outside the interpreter's lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

SPAN = 1 << 17  # bytes of the arrays a thread works on: a few of them stay in its L2 cache
STRIPE = 1 << 21  # codes a thread takes before it asks for more


@dataclass(frozen=True)
class Plane:
    """Where a block keeps some bits of each code.

    The bytes from `at` on are cut into runs of `run` bytes. Byte j of a run holds `bits` bits of code j in its lowest
    bits, of code j + run in the next, and so on, 8 // bits codes to a byte; the next run holds the codes after those.
    """

    at: int
    bits: int
    run: int


@dataclass(frozen=True)
class BlockLayout:
    """What is where in a block of `size` values and `n_bytes` bytes.

    codes: planes from the lowest bits of a code up. block_scales: the bytes where d (and dmin or m) are. group_scales:
    what writes the group scales as a bit stream of `group_scale_bytes` a block, and the byte where they begin.
    """

    size: int
    n_bytes: int
    codes: tuple[Plane, ...]
    block_scales: tuple[int, ...] = ()
    group_scales: tuple[GroupScalesWriter, int] | None = None
    group_scale_bytes: int = 0

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return sum(plane.bits for plane in self.codes)

    @property
    def segment(self) -> int:
        """Codes that lie in neighbouring bytes of every plane."""
        return min(plane.run for plane in self.codes if plane.run > 1)


@dataclass(frozen=True)
class Blocks:
    """Some consecutive blocks of a tensor."""

    raw: Bytes  # flat, a whole number of blocks
    n_bytes: int  # of one block

    @property
    def count(self) -> int:
        return self.raw.size // self.n_bytes

    def field(self, at: int, dtype: str) -> np.ndarray:
        """The value at byte `at` of each block, as a strided view [blocks]."""
        view: np.ndarray = np.ndarray((self.count,), dtype, self.raw, at, (self.n_bytes,))
        return view

    def copy(self, at: int, n: int) -> Blocks:
        """n bytes from byte `at` of each block, closed up."""
        return Blocks(self.field(at, f"V{n}").copy().view(np.uint8), n)

    def words(self, at: int, dtype: str) -> Words:
        """The field zero-extended to 64-bit words."""
        return self.field(at, dtype).astype(np.uint64)


GroupScalesWriter = Callable[[Blocks, Bytes, int], None]  # blocks, out [blocks, bytes], byte of the block


@cache
def _repeat(lane: int, every: int) -> np.uint64:
    """The mask `lane` repeated `every` so many bits over a word."""
    mask: np.uint64 = np.uint64(sum(lane << s for s in range(0, 64, every)))
    return mask


# ---- codes ----


def _codes(layout: BlockLayout, blocks: Blocks, out: Bytes) -> None:
    """The code stream of some blocks, to `out`, flat."""
    width = layout.segment
    if len(layout.codes) == 1:
        # All runs look alike, so each counts as a block, and one pass takes a segment of every run. Bytes stay in
        # the file's order: [blocks, width].
        size = width * 8 // layout.bits
        source = _load(blocks, layout.codes[0].at, layout.size * layout.bits // 8)
        x, tmp = (_scratch(i, source.nbytes) for i in range(2))
        for start in range(0, size, width):
            _take(source, start // width * layout.bits, layout.bits, 0, x)
            if layout.bits == 8:  # signed; q + 128 is not
                np.bitwise_xor(x, _repeat(0x80, 8), out=x)
            lanes, _ = _squeeze(x, tmp, layout.bits)
            n = width * layout.bits // 8
            target = np.ndarray((x.nbytes // width,), f"V{n}", out, start * layout.bits // 8, (width,))
            np.copyto(target, lanes.view(f"V{n}"))
    else:
        # A segment of every block at a time, as words [width / 8, blocks], so that words can be joined.
        x, tmp = (_scratch(i, blocks.count * width) for i in range(2))
        pieces: dict[int, Words] = {}
        for start in range(0, layout.size, width):
            _gather(layout, blocks, start, pieces, x, tmp)
            lanes, used = _squeeze(x, tmp, layout.bits)
            at, stride = start * layout.bits // 8, layout.size * layout.bits // 8
            _join(lanes.reshape(-1, blocks.count), used, out, at, stride)


def _gather(layout: BlockLayout, blocks: Blocks, start: int, pieces: dict[int, Words], x: Words, tmp: Words) -> None:
    """Codes start .. start + segment of each block, out of several planes, to x, one code a byte.

    pieces: what was loaded for other segments of these blocks, by its place in the block.
    """
    done = 0  # bits of the codes that are in x
    for plane in layout.codes:
        run, at = divmod(start, plane.run * 8 // plane.bits)
        shift, at = divmod(at, plane.run)
        at += plane.at + run * plane.run
        part = tmp if done else x
        if plane.run == 1:
            _load_bits(blocks, at, part)
            np.left_shift(part, np.uint64(done), out=part)
        else:
            if at not in pieces:
                pieces[at] = _scratch(5 + len(pieces), x.nbytes)
                for i, word in enumerate(pieces[at].reshape(-1, blocks.count)):
                    np.copyto(word, blocks.field(at + 8 * i, "<u8"))
            _take(pieces[at], shift * plane.bits, plane.bits, done, part)
        if done:
            np.bitwise_or(x, tmp, out=x)
        done += plane.bits


def _load(blocks: Blocks, at: int, n: int) -> Words:
    """n bytes from byte `at` of each block, one block's after the other."""
    out = _scratch(2, blocks.count * n)
    np.copyto(out.view(f"V{n}"), blocks.field(at, f"V{n}"))
    return out


def _load_bits(blocks: Blocks, at: int, out: Words) -> None:
    """From byte `at` of each block as many bits as out has bytes for it, each to the lowest bit of a byte."""
    for i, word in enumerate(out.reshape(-1, blocks.count)):
        np.copyto(word, blocks.field(at + i, "u1"))
    np.multiply(out, _repeat(1, 8), out=out)  # a copy of all 8 bits in each byte
    np.bitwise_and(out, np.uint64(0x8040201008040201), out=out)  # byte i keeps bit i, worth 2**i
    np.add(out, np.uint64(0x00406070787C7E7F), out=out)  # plus 128 - 2**i: bit 7 is set if it was, nothing carries
    np.right_shift(out, np.uint64(7), out=out)
    np.bitwise_and(out, _repeat(1, 8), out=out)


def _take(source: Words, shift: int, bits: int, to: int, out: Words) -> None:
    """Bits shift .. shift + bits of each byte of source, to bit `to` of the bytes of out; the others become zero."""
    if to > shift:
        source = np.left_shift(source, np.uint64(to - shift), out=out)
    elif to < shift:
        source = np.right_shift(source, np.uint64(shift - to), out=out)
    np.bitwise_and(source, _repeat(((1 << bits) - 1) << to, 8), out=out)


def _squeeze(x: Words, tmp: Words, bits: int) -> tuple[np.ndarray, int]:
    """Codes of `bits` bits, one a byte, pushed together; both arrays are scratch afterwards.

    Returns lanes, and how many bits of a lane, from the lowest, are in use: all of them, or else those of 8 codes.
    Each step joins neighbours low and high. If both fit into the lane of one, the pair is cut to its lower half, which
    halves the array too. If not, the lane grows: high * 2**lane + low becomes high * 2**used + low by a subtraction.
    """
    a, t, used = x.view(np.uint8), tmp.view(np.uint8), bits
    while used < (lane := a.itemsize * 8) and used < 8 * bits:
        a, t = a.view(f"<u{lane // 4}"), t.view(f"<u{lane // 4}")[: a.size // 2]
        if 2 * used <= lane:
            np.right_shift(a, a.dtype.type(lane - used), out=t)
            np.bitwise_or(a, t, out=a)
            half = t.view(f"<u{lane // 8}")[: a.size]
            np.copyto(half, a, casting="unsafe")
            a, t = half, a.view(f"<u{lane // 8}")
        else:
            np.right_shift(a, a.dtype.type(lane), out=t)
            np.multiply(t, a.dtype.type((1 << lane) - (1 << used)), out=t)
            np.subtract(a, t, out=a)
        used *= 2
    return a, used


def _join(lanes: np.ndarray, used: int, out: Bytes, at: int, stride: int) -> None:
    """Write the used bits of lanes [L, blocks] one after the other to byte `at` of every `stride` bytes of out."""
    size, count = lanes.itemsize * 8, lanes.shape[1]
    joined, shifted = (_scratch(3 + i, lanes[0].nbytes).view(lanes.dtype)[:count] for i in range(2))
    for start in range(0, len(lanes) * used, size):  # the first bit of the word
        word = None
        for i, lane in enumerate(lanes):
            shift = i * used - start
            if -used < shift < size:
                if shift:
                    move = np.left_shift if shift > 0 else np.right_shift
                    lane = move(lane, lanes.dtype.type(abs(shift)), out=joined if word is None else shifted)
                word = lane if word is None else np.bitwise_or(word, lane, out=joined)
        assert word is not None
        n = min(size, len(lanes) * used - start) // 8
        part = word.view(f"<u{n}")[:: size // 8 // n]
        np.copyto(np.ndarray((count,), f"<u{n}", out, at + start // 8, (stride,)), part)


# ---- group scales: each of these writes the `group_scales` stream of some blocks to out [blocks, bytes] ----


def plain(blocks: Blocks, out: Bytes, at: int) -> None:
    """The bytes from `at` on, as they are."""
    n = out.shape[1]
    np.copyto(out.reshape(-1).view(f"V{n}"), blocks.field(at, f"V{n}"))


def q4_k(blocks: Blocks, out: Bytes, at: int) -> None:
    """Q4_K, Q5_K: 8 pairs of 6 bits, scale | min << 6.

    The file has 12 bytes: d, m, x of 4 each. Groups 0-3 are the lower 6 bits of d and m; groups 4-7 have their lower
    4 bits in x (scale low, min high) and their upper 2 in the top of d and m.
    """
    here = blocks.copy(at, 12)
    d, m, x = (_bytes_apart(here.words(i, "<u4")) for i in (0, 4, 8))
    first = (d & _repeat(0x3F, 16)) | (m & _repeat(0x3F, 16)) << _8
    second = ((x | x << _4) & _repeat(0x0F, 8)) | (d >> _2 & _repeat(0x30, 16)) | (m << _6 & _repeat(0x3000, 16))
    _store_six_bits((first, second), out)


def q3_k(blocks: Blocks, out: Bytes, at: int) -> None:
    """Q3_K: 16 scales of 6 bits.

    The file has their lower halves in 8 bytes (group i and i + 8), then the upper 2 bits in 4 bytes (group i, i + 4,
    i + 8, i + 12).
    """
    here = blocks.copy(at, 12)
    low, high = here.words(0, "<u8"), here.words(8, "<u4")
    first = (low & _repeat(0x0F, 8)) | ((high | high << _30) & _repeat(3, 8)) << _4
    second = (low >> _4 & _repeat(0x0F, 8)) | ((high >> _4 | high << _26) & _repeat(3, 8)) << _4
    _store_six_bits((first, second), out)


def iq4_xs(blocks: Blocks, out: Bytes, at: int) -> None:
    """IQ4_XS: 8 scales of 6 bits. The file has 2 bytes with the upper 2 bits, then 4 with the lower 4, in order."""
    here = blocks.copy(at, 6)
    high, low = here.words(0, "<u2"), _bytes_apart(here.words(2, "<u4"))
    for shift, width in ((_24, 8), (_12, 4), (_6, 2)):
        high = (high | high << shift) & _repeat((1 << width) - 1, 4 * width)
    _store_six_bits((((low | low << _4) & _repeat(0x0F, 8)) | high << _4,), out)


_2, _4, _6, _8, _12, _24, _26, _30 = (np.uint64(n) for n in (2, 4, 6, 8, 12, 24, 26, 30))


def _bytes_apart(x: Words) -> Words:
    """The lower 4 bytes of each word to its 4 16-bit lanes."""
    x = (x | x << np.uint64(16)) & _repeat(0xFFFF, 32)
    x = (x | x << _8) & _repeat(0xFF, 16)
    return x


def _store_six_bits(words: tuple[Words, ...], out: Bytes) -> None:
    """Words of 8 numbers of 6 bits, one a byte, to 6 bytes each."""
    for i, x in enumerate(words):
        lanes, _ = _squeeze(x, np.empty_like(x), 6)
        for at, piece in ((0, 4), (4, 2)):
            part = lanes.view(f"<u{piece}")[at // piece :: 8 // piece]
            np.copyto(np.ndarray(x.shape, f"<u{piece}", out, 6 * i + at, (out.shape[1],)), part)


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
    n_blocks = raw.size // layout.n_bytes

    def stripe(start: int) -> None:
        stop = min(start + STRIPE // layout.size, n_blocks)
        blocks = Blocks(raw[start * layout.n_bytes : stop * layout.n_bytes], layout.n_bytes)
        if group_scales is not None and layout.group_scales is not None:
            write, at = layout.group_scales
            write(blocks, group_scales[start:stop], at)
        if block_scales is not None:
            halves = block_scales[start:stop].view("<u2")
            for i, at in enumerate(layout.block_scales):
                np.copyto(halves[:, i], blocks.field(at, "<u2"))
        # Several planes take more and shorter operations, whose fixed cost wants longer arrays.
        step = SPAN // (layout.size * layout.bits // 8) if len(layout.codes) == 1 else 2 * SPAN // layout.segment
        for a in range(start, stop, step):
            b = min(a + step, stop)
            some = Blocks(raw[a * layout.n_bytes : b * layout.n_bytes], layout.n_bytes)
            _codes(layout, some, codes[a:b].reshape(-1))
        if on_read is not None:
            on_read(start * layout.n_bytes, stop * layout.n_bytes)

    in_threads(stripe, range(0, n_blocks, STRIPE // layout.size))


_local = threading.local()


def _scratch(i: int, n_bytes: int) -> Words:
    """This thread's working array number i, of n_bytes."""
    arrays: dict[int, Words] = _local.__dict__.setdefault("arrays", {})
    n = -(-n_bytes // 8)
    if i not in arrays or arrays[i].size < n:
        arrays[i] = np.empty(n, np.uint64)
    return arrays[i][:n]


@cache
def _threads() -> ThreadPoolExecutor:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(min(cores, 8), thread_name_prefix="pack")


def in_threads(work: Callable[[int], None], starts: range) -> None:
    """work(start) for each start, on all cores; numpy lets other threads run while it works on an array."""
    if len(starts) < 2:
        for start in starts:
            work(start)
    else:
        for _ in _threads().map(work, starts):
            pass
