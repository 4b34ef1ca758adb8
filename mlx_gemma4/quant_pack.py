"""Rearrange the blocks of a quantized tensor into planar arrays: numpy only, whole tensors, all cores.

In: the raw blocks of a tensor and the `Layout` that says where a block keeps its bits. Out, written into arrays the
caller owns: codes as one little-endian bit stream in natural order, group scales as one bit stream, fp16 scales.

A GGUF block scatters its bits for the benefit of CPU kernels. Here 8 codes are first laid side by side in a 64-bit
word, one a byte (`_lay_out`), then pushed together (`_squeeze`), then words are joined to the stream (`_join`). Every
step is a bitwise operation on a whole array of words that fits the L2 cache, so that it runs at the speed of
numpy's SIMD loops; [words, blocks] is the order everywhere, blocks last, so that these arrays are contiguous.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

CHUNK = 1 << 18  # codes a thread works on at a time: two arrays of as many bytes stay in its L2 cache
STRIPE = 1 << 23  # codes a thread takes before it asks for more


class Piece(NamedTuple):
    """The lowest `n_bytes` bytes of each word [blocks] are to be stored."""

    words: Words
    n_bytes: int


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
class Layout:
    """What is where in a block of `size` values and `n_bytes` bytes.

    codes: planes from the lowest bits of a code up. flip: True where codes are signed bytes (they become q + 128).
    super: the bytes where d (and dmin or m) are. sub: gets the group scales, `sub_bytes` a block, as one bit stream.
    """

    size: int
    n_bytes: int
    codes: tuple[Plane, ...]
    super: tuple[int, ...] = ()
    sub: Callable[[Blocks], list[Piece]] | None = None
    sub_bytes: int = 0
    flip: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return sum(plane.bits for plane in self.codes)


@dataclass(frozen=True)
class Blocks:
    """Some consecutive blocks of a tensor."""

    raw: Bytes  # flat, a whole number of blocks
    n_bytes: int  # of one block

    @property
    def count(self) -> int:
        return self.raw.size // self.n_bytes

    def field(self, at: int, dtype: str, n: int = 1) -> np.ndarray:
        """n neighbouring values from byte `at` of each block, as a strided view [n, blocks]."""
        d = np.dtype(dtype)
        return np.ndarray((n, self.count), d, self.raw, at, (d.itemsize, self.n_bytes))

    def words(self, at: int, dtype: str, n: int = 1) -> Words:
        """The same, zero-extended to contiguous 64-bit words."""
        return self.field(at, dtype, n).astype(np.uint64)


# ---- steps on words; each works in place, `tmp` is scratch of the same shape ----


def _repeat(lane: int, every: int) -> np.uint64:
    """The mask `lane` repeated `every` so many bits over a word."""
    return np.uint64(sum(lane << s for s in range(0, 64, every)))


def _squeeze(x: Words, bits: int, tmp: Words) -> None:
    """8 codes of `bits` bits, one in each byte, to 8 * bits bits at the bottom of the word.

    Three times, neighbours are joined: hi*2**w + lo becomes hi*2**b + lo by taking hi * (2**w - 2**b) off.
    """
    if bits == 8:
        return
    for narrow in (np.uint16, np.uint32, np.uint64):
        a, t = x.view(narrow), tmp.view(narrow)
        w = a.itemsize * 4  # bits of half a lane; of these, the lower b = w/8*bits are in use
        np.right_shift(a, narrow(w), out=t)
        np.multiply(t, narrow((1 << w) - (1 << w // 8 * bits)), out=t)
        np.subtract(a, t, out=a)


def _spread_bits(x: Words) -> None:
    """The 8 bits at the bottom of each word to the lowest bit of its 8 bytes."""
    np.multiply(x, _repeat(1, 8), out=x)  # a copy of all 8 bits in each byte
    np.bitwise_and(x, np.uint64(0x8040201008040201), out=x)  # byte i keeps bit i
    np.add(
        x, np.uint64(0x00406070787C7E7F), out=x
    )  # byte i: 2**i + (128 - 2**i) has bit 7 set, and carries nothing
    np.right_shift(x, np.uint64(7), out=x)
    np.bitwise_and(x, _repeat(1, 8), out=x)


def _lay_out(layout: Layout, blocks: Blocks, x: Words, tmp: Words, source: Words) -> None:
    """Fill x [size / 8, blocks]: code k of a block in byte k % 8 of word k // 8."""
    done = 0  # bits of the codes that are in place
    for plane in layout.codes:
        n_words = layout.size * plane.bits // 64
        if plane.bits == 8:
            np.copyto(x, blocks.field(plane.at, "<u8", n_words))
        elif plane.run == 1:  # a byte has one bit of 8 codes in natural order
            np.copyto(tmp, blocks.field(plane.at, "u1", layout.size // 8))
            _spread_bits(tmp)
            np.left_shift(tmp, np.uint64(done), out=tmp)
            np.bitwise_or(x, tmp, out=x)
        else:
            runs = source[:n_words].reshape(-1, plane.run // 8, x.shape[1])
            np.copyto(source[:n_words], blocks.field(plane.at, "<u8", n_words))
            _take_apart(runs, plane.bits, done, x, tmp)
        done += plane.bits
    if layout.flip:
        np.bitwise_xor(x, _repeat(0x80, 8), out=x)


def _take_apart(source: Words, bits: int, done: int, x: Words, tmp: Words) -> None:
    """Distribute the 8 // bits codes in each byte of source [runs, words of a run, blocks], to bit `done` of x's bytes."""
    runs, run, n = source.shape
    target, scratch = (a.reshape(runs, 8 // bits, run, n) for a in (x, tmp))
    mask = _repeat(((1 << bits) - 1) << done, 8)
    for i in range(8 // bits):
        out = scratch[:, i] if done else target[:, i]
        shift = done - i * bits
        if shift > 0:
            np.left_shift(source, np.uint64(shift), out=out)
        else:
            np.right_shift(source, np.uint64(-shift), out=out)
        np.bitwise_and(out, mask, out=out)
        if done:
            np.bitwise_or(target[:, i], out, out=target[:, i])


def _join(lanes: Words, width: int, tmp: Words) -> Words:
    """Write lanes [groups, L, blocks] of `width` bits each one after the other: words [groups, L * width / 64, blocks].

    The words are in `tmp` (of the shape of `lanes`), whose last lane is scratch.
    """
    if width == 64:
        return lanes
    n_lanes = lanes.shape[1]
    n_words = -(-n_lanes * width // 64)
    words, shifted = tmp[:, :n_words], tmp[:, -1]
    for w in range(n_words):
        word = words[:, w]
        fresh = True
        for lane in range(n_lanes):
            shift = lane * width - w * 64  # where this lane starts in this word
            if not -width < shift < 64:
                continue
            out = word if fresh else shifted
            if shift >= 0:
                np.left_shift(lanes[:, lane], np.uint64(shift), out=out)
            else:
                np.right_shift(lanes[:, lane], np.uint64(-shift), out=out)
            if not fresh:
                np.bitwise_or(word, shifted, out=word)
            fresh = False
    return words


def _store(piece: Piece, out: Bytes, at: int) -> int:
    """Write a piece to out[:, at : at + n_bytes], out being [blocks, bytes]; returns where the next one goes."""
    done = 0
    for size in (8, 4, 2, 1):
        if piece.n_bytes - done >= size:
            part = piece.words.view(f"<u{size}")[done // size :: 8 // size]
            target = np.ndarray(part.shape, f"<u{size}", out.data, at + done, (out.shape[1],))
            np.copyto(target, part)
            done += size
    return at + done


# ---- group scales: each of these returns one block's `sub` stream in pieces ----


def plain_scales(blocks: Blocks, at: int, n: int) -> list[Piece]:
    """n bytes from `at` on, as they are (n is 1 or a multiple of 8)."""
    size = 8 if n % 8 == 0 else 1
    return [Piece(w, size) for w in blocks.words(at, f"<u{size}", n // size)]


def scales_and_mins(blocks: Blocks, at: int) -> list[Piece]:
    """Q4_K, Q5_K: 8 pairs of 6 bits, scale | min << 6.

    The file has 12 bytes: d, m, x of 4 each. Groups 0-3 are the lower 6 bits of d and m; groups 4-7 have their lower
    4 bits in x (scale low, min high) and their upper 2 in the top of d and m.
    """
    d, m, x = (_bytes_apart(w) for w in blocks.words(at, "<u4", 3))
    first = (d & _repeat(0x3F, 16)) | (m & _repeat(0x3F, 16)) << 8
    second = ((x | x << 4) & _repeat(0x0F, 8)) | (d >> 2 & _repeat(0x30, 16)) | (m << 6 & _repeat(0x3000, 16))
    return [_six_bits(first), _six_bits(second)]


def scales_of_16(blocks: Blocks, at: int) -> list[Piece]:
    """Q3_K: 16 scales of 6 bits. The file has their lower halves in 8 bytes (group i and i + 8), then the upper 2 bits
    in 4 bytes (group i, i + 4, i + 8, i + 12)."""
    low, high = blocks.words(at, "<u8")[0], blocks.words(at + 8, "<u4")[0]
    first = (low & _repeat(0x0F, 8)) | ((high | high << 30) & _repeat(3, 8)) << 4
    second = (low >> 4 & _repeat(0x0F, 8)) | ((high >> 4 | high << 26) & _repeat(3, 8)) << 4
    return [_six_bits(first), _six_bits(second)]


def scales_of_8(blocks: Blocks, at: int) -> list[Piece]:
    """IQ4_XS: 8 scales of 6 bits. The file has 2 bytes with the upper 2 bits, then 4 with the lower 4, both in order."""
    high, low = blocks.words(at, "<u2")[0], _bytes_apart(blocks.words(at + 2, "<u4")[0])
    for shift, width in ((24, 8), (12, 4), (6, 2)):
        high = (high | high << shift) & _repeat((1 << width) - 1, 4 * width)
    return [_six_bits(((low | low << 4) & _repeat(0x0F, 8)) | high << 4)]


def _bytes_apart(x: Words) -> Words:
    """The lower 4 bytes of each word to its 4 16-bit lanes."""
    x = (x | x << 16) & _repeat(0xFFFF, 32)
    return (x | x << 8) & _repeat(0xFF, 16)


def _six_bits(x: Words) -> Piece:
    """8 numbers of 6 bits, one a byte, to 6 bytes."""
    _squeeze(x, 6, np.empty_like(x))
    return Piece(x, 6)


# ---- all blocks of a tensor ----


def rearrange(
    layout: Layout,
    raw: Bytes,
    codes: Bytes,
    sub: Bytes | None,
    super_: Bytes | None,
    on_read: Callable[[int, int], object] | None = None,
) -> None:
    """Write the planar arrays of a tensor.

    Args:
        raw: uint8, flat, B blocks.
        codes: uint8 [B, size * bits / 8], written.
        sub: uint8 [B, layout.sub_bytes] or None, written.
        super_: uint8 [B, 2 * len(layout.super)] or None, written.
        on_read: called with a range of bytes of `raw` that will not be read again.
    """
    n_blocks = raw.size // layout.n_bytes

    def stripe(start: int) -> None:
        stop = min(start + STRIPE // layout.size, n_blocks)
        step = CHUNK // layout.size
        for a in range(start, stop, step):
            b = min(a + step, stop)
            blocks = Blocks(raw[a * layout.n_bytes : b * layout.n_bytes], layout.n_bytes)
            _codes(layout, blocks, codes[a:b])
            if sub is not None and layout.sub is not None:
                at = 0
                for piece in layout.sub(blocks):
                    at = _store(piece, sub[a:b], at)
            if super_ is not None:
                halves = super_[a:b].view("<u2")
                for i, at in enumerate(layout.super):
                    np.copyto(halves[:, i], blocks.field(at, "<u2")[0])
        if on_read is not None:
            on_read(start * layout.n_bytes, stop * layout.n_bytes)

    in_threads(stripe, range(0, n_blocks, STRIPE // layout.size))


def _codes(layout: Layout, blocks: Blocks, out: Bytes) -> None:
    """The code stream of some blocks, to out [blocks, size * bits / 8]."""
    x, tmp, source = (a[: layout.size // 8 * blocks.count].reshape(-1, blocks.count) for a in _scratch())
    _lay_out(layout, blocks, x, tmp, source)
    _squeeze(x, layout.bits, tmp)
    at = 0
    four = (
        -1,
        4,
        blocks.count,
    )  # 4 words of 8 codes are 32 codes: whole 32-bit words, whatever the number of bits
    for group in _join(x.reshape(four), 8 * layout.bits, tmp.reshape(four)):
        for i, word in enumerate(group):
            at = _store(Piece(word, min(8, 4 * layout.bits - 8 * i)), out, at)


_local = threading.local()


def _scratch() -> tuple[Words, Words, Words]:
    """This thread's three working arrays."""
    if not hasattr(_local, "arrays"):
        _local.arrays = tuple(np.empty(CHUNK // 8, np.uint64) for _ in range(3))
    arrays: tuple[Words, Words, Words] = _local.arrays
    return arrays


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
