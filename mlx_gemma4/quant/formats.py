"""Quantized weights: from the blocks of a GGUF to planar MLX arrays, and from those to numbers.

In: a tensor's raw bytes (`files.gguf`) and its type. Out: `Packed`, with the file's bits per weight, or a dense
`mx.array`. It knows nothing of models and multiplies nothing (`ops` does). `FORMATS` below lists every quantization
that can be read: to add one, add its row (and its size in `files.gguf.TENSOR_TYPES`); if its numbers follow one of the
formulas in `scales_and_biases`, nothing else is needed.

All values equal those of llama.cpp's gguf-py in fp32, bit for bit, which fixes the order of operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Literal

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..files.gguf import TENSOR_TYPES, TensorInfo
from ..memory import on_cpu
from .codebooks import Rule, numbers, values
from .repack import (
    BlockLayout,
    Plane,
    Reader,
    Words,
    iq1_m,
    iq2_s,
    iq2_xxs,
    iq3_s,
    iq4_xs,
    plain,
    q3_k,
    q4_k,
    rearrange,
    tq1_0,
    tq1_0_codes,
)

Shape = tuple[int, ...]
BLOCKS = {t.name: t for t in TENSOR_TYPES.values()}


@dataclass(frozen=True)
class Format:
    """The meaning of one quantization's planar arrays, and their places in a block of the file.

    With q the unsigned code, d and m from `block_scales`, the weight w by `group_scale_kind` is:
        ""           d * (q - offset), or d * q + m with has_min
        "scale-min"  (d * scale) * q - (m * min); the lower half of the group's bits is scale, the upper min
        "scale-32"   (d * (scale - 32)) * (q - offset)
        "int8"       (d * scale) * (q - offset)
        "e8m0"       2**(scale - 128) * lut[q]
        "ue4m3"      row * (scale as UE4M3, halved) * lut[q]; row is a factor of the whole row, in fp32
        "odd"        d * rule.factor * (2 * scale + 1) * value
    and lut[q] replaces q - offset for formats that have a lut, the rule's value for those that have a rule.
    """

    name: str
    bits: int  # of a code; of a rule's codes, for each weight
    group: int  # weights that share a scale
    group_scale_bits: int  # bits per group in `group_scales`
    offset: int  # subtracted from the code
    has_min: bool
    scale_block: int  # weights per fp16 d (and m), 0 if there is none
    lut: tuple[int, ...] | None
    group_scale_kind: Literal["", "scale-min", "scale-32", "int8", "e8m0", "ue4m3", "odd"]
    codes_at: tuple[Plane | Words, ...] | Reader  # as `BlockLayout` has them, and these two:
    block_scales_at: tuple[int | tuple[int, ...], ...]
    group_scales_at: tuple[Reader, int, int] | None
    rule: Rule | None = None  # of codes that stand for several weights: codebooks.py

    @property
    def is_affine(self) -> bool:
        """True if weights are a scale times the code, and a bias."""
        return self.lut is None and self.rule is None

    @property
    def table_bytes(self) -> int:
        """Size of the grid that kernels read."""
        return self.rule.grid_bytes if self.rule else 0

    @property
    def per_row(self) -> bool:
        """True if `block_scales` has a row's factor instead: fp32, as the bits of two fp16 numbers."""
        return self.group_scale_kind == "ue4m3"

    @property
    def block_numbers(self) -> int:
        """fp16 numbers in `block_scales` for each scale_block weights, or for a row."""
        return 1 + (self.has_min or self.per_row)

    @property
    def layout(self) -> BlockLayout:
        """The places in a block, for `repack`."""
        block = BLOCKS[self.name]
        group_scale_bytes = block.block_size // self.group * self.group_scale_bits // 8
        places = self.codes_at, self.block_scales_at, self.group_scales_at
        return BlockLayout(block.block_size, block.block_bytes, self.bits, *places, group_scale_bytes)


# The 16 values of ggml's non-linear 4-bit types, and those of FP4 (E2M1), doubled to make them integers.
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
IQ1M_D = (49, 51, 53, 55)  # the bytes of a block whose upper halves are d

# Byte positions are those of the block structs in ggml-common.h. P(at, bits, run) is explained at `Plane`, W(at, step)
# at `Words`, what a rule's numbers are at `Rule`.
P, W = Plane, Words
# fmt: off
FORMATS: dict[str, Format] = {f.name: f for f in (
    # bits, group, group_scale_bits, offset, has_min, scale_block, lut, group_scale_kind, codes_at, block_scales_at,
    # group_scales_at, rule
    Format("Q4_0",    4, 32, 0,  8,   False, 32,  None, "",          (P(2, 4, 16),), (0,), None),
    Format("Q4_1",    4, 32, 0,  0,   True,  32,  None, "",          (P(4, 4, 16),), (0, 2), None),
    Format("Q5_0",    5, 32, 0,  16,  False, 32,  None, "",          (P(6, 4, 16), P(2, 1, 1)), (0,), None),
    Format("Q5_1",    5, 32, 0,  0,   True,  32,  None, "",          (P(8, 4, 16), P(4, 1, 1)), (0, 2), None),
    Format("Q8_0",    8, 32, 0,  128, False, 32,  None, "",          (P(2, 8, 32),), (0,), None),
    Format("Q2_K",    2, 16, 8,  0,   True,  256, None, "scale-min", (P(16, 2, 32),), (80, 82), (plain, 0, 16)),
    Format("Q3_K",    3, 16, 6,  4,   False, 256, None, "scale-32",  (P(32, 2, 32), P(0, 1, 32)), (108,),
           (q3_k, 96, 108)),
    Format("Q4_K",    4, 32, 12, 0,   True,  256, None, "scale-min", (P(16, 4, 32),), (0, 2), (q4_k, 4, 16)),
    Format("Q5_K",    5, 32, 12, 0,   True,  256, None, "scale-min", (P(48, 4, 32), P(16, 1, 32)), (0, 2),
           (q4_k, 4, 16)),
    Format("Q6_K",    6, 16, 8,  32,  False, 256, None, "int8",      (P(0, 4, 64), P(128, 2, 32)), (208,),
           (plain, 192, 208)),
    Format("IQ4_NL",  4, 32, 0,  0,   False, 32,  IQ4,  "",          (P(2, 4, 16),), (0,), None),
    Format("IQ4_XS",  4, 32, 6,  0,   False, 256, IQ4,  "scale-32",  (P(8, 4, 16),), (0,), (iq4_xs, 2, 8)),
    Format("MXFP4",   4, 32, 8,  0,   False, 0,   FP4,  "e8m0",      (P(1, 4, 16),), (), (plain, 0, 1)),
    Format("NVFP4",   4, 16, 8,  0,   False, 0,   FP4,  "ue4m3",     (P(4, 4, 8),), (), (plain, 0, 4)),
    Format("Q2_0",    2, 32, 0,  1,   False, 64,  None, "",          (P(2, 2, 1),), (0,), None),
    Format("TQ2_0",   2, 32, 0,  1,   False, 256, None, "",          (P(0, 2, 32),), (64,), None),
    Format("IQ3_XXS", 2, 32, 32, 0,   False, 256, None, "odd",       (W(2, 8), W(6, 8)), (0,), (plain, 66, 98),
           Rule("iq3_xxs", 256, 4, 28, 4, 0.25, 1)),
    Format("IQ3_S",   3, 32, 12, 0,   False, 256, None, "odd",       (W(2, 8), W(6, 8), W(74, 4)), (0,),
           (iq3_s, 66, 110), Rule("iq3_s", 512, 4, 8, 4, 1, 3)),
    Format("IQ2_XXS", 1, 32, 32, 0,   False, 256, None, "odd",       (W(2, 8),), (0,), (iq2_xxs, 2, 66),
           Rule("iq2_xxs", 256, 8, 28, 4, 0.125, 1)),
    Format("IQ2_XS",  2, 16, 4,  0,   False, 256, None, "odd",       (W(2, 8), W(6, 8)), (0,), (plain, 66, 74),
           Rule("iq2_xs", 512, 8, 0, 4, 0.125, 1)),
    Format("IQ2_S",   2, 16, 8,  0,   False, 256, None, "odd",       (W(2, 4), W(34, 4)), (0,), (iq2_s, 66, 82),
           Rule("iq2_s", 1024, 8, 4, 4, 0.125, 1)),
    Format("IQ1_S",   1, 32, 16, 0,   False, 256, None, "odd",       (W(2, 4),), (0,), (plain, 34, 50),
           Rule("iq1_s", 2048, 8, 12, 3)),
    Format("IQ1_M",   1, 16, 11, 0,   False, 256, None, "odd",       (W(0, 4),), (IQ1M_D,), (iq1_m, 32, 56),
           Rule("iq1_m", 2048, 8, 8, 3)),
    Format("TQ1_0",   1, 32, 20, 0,   False, 256, None, "",          tq1_0_codes, (52,), (tq1_0, 0, 52), Rule("tq1_0")),
    Format("Q1_0",    1, 32, 0,  0,   False, 128, None, "",          (P(2, 1, 1),), (0,), None, Rule("q1_0")),
)}
# fmt: on

FLOATS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
SUPPORTED = frozenset(FORMATS) | frozenset(FLOATS)


def check_supported(info: TensorInfo, path: str | Path) -> None:
    """Raise InputError if this tensor's type can't be loaded."""
    if info.type not in SUPPORTED:
        raise InputError(
            f"{path}: tensor {info.name!r} is {info.type}, which can't be loaded yet; "
            f"take a file in one of {', '.join(sorted(SUPPORTED))}"
        )


@dataclass(frozen=True)
class Packed:
    """A quantized weight [N, K] or [E, N, K], with the file's bits per weight.

    codes: uint32 [.., N, K * bits / 32], a little-endian stream of unsigned codes, as mx.quantized_matmul reads them.
    group_scales: uint8 [.., N, K / group * group_scale_bits / 8], a little-endian stream of group scales, or None.
    block_scales: float16 [.., N, K / scale_block, 1 or 2], d and m; of formats with `per_row` [.., N, 1, 2]; or None.
    """

    format: Format
    shape: Shape
    codes: mx.array
    group_scales: mx.array | None
    block_scales: mx.array | None

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.codes, self.group_scales, self.block_scales) if a is not None)

    def __getitem__(self, index: mx.array | slice) -> Packed:
        """Return some rows (of [E, N, K]: experts), in the order of the index; no others are read."""
        codes, scales = self.codes[index], (self.group_scales, self.block_scales)
        shape = *codes.shape[:-1], self.shape[-1]
        return Packed(self.format, shape, codes, *(None if a is None else a[index] for a in scales))


def pack_on_cpu(
    raw: np.ndarray, type: str, shape: Shape, on_read: Callable[[int, int], object] | None = None
) -> Packed:
    """Rearrange a tensor's blocks, on all cores, straight into MLX's memory.

    Args:
        raw: uint8 [rows, row_bytes], as `GGUFFile.raw` returns it.
        type: a name in FORMATS.
        shape: [N, K] or [E, N, K], or [K]; the product of all but K is rows.
        on_read: called, from any thread, with ranges [start, stop) of bytes of raw that won't be read again. With
            `GGUFFile.release` a load holds little more than its result.
    """
    form = FORMATS[type]
    layout = form.layout
    n_blocks = prod(shape) // layout.size
    flat = np.ascontiguousarray(raw).reshape(-1)
    if shape[-1] % layout.size or flat.size != n_blocks * layout.n_bytes:
        raise ValueError(f"{flat.size} bytes of {type} are no tensor of shape {shape}")
    rows, per_row = shape[:-1], shape[-1] // layout.size
    codes = _Target((*rows, shape[-1] * form.bits // 32), mx.uint32)
    group_scales = _Target((*rows, per_row * layout.group_scale_bytes), mx.uint8) if layout.group_scales else None
    block_scales = _Target((*rows, per_row, len(layout.block_scales)), mx.float16) if layout.block_scales else None

    def blocks(target: _Target | None) -> np.ndarray | None:
        return None if target is None else target.bytes.reshape(n_blocks, -1)

    rearrange(layout, flat, codes.bytes.reshape(n_blocks, -1), blocks(group_scales), blocks(block_scales), on_read)
    made = [target.array() if target else None for target in (group_scales, block_scales)]
    return Packed(form, shape, codes.array(), made[0], row_factors(mx.ones(rows)) if form.per_row else made[1])


def row_factors(factors: mx.array) -> mx.array:
    """Factors of rows, fp32 [..], as `block_scales` of a format with `per_row`: [.., 1, 2]."""
    return factors.astype(mx.float32)[..., None].view(mx.float16)[..., None, :]


class _Target:
    """The memory of a new MLX array, writable as `bytes` until `array` is called."""

    def __init__(self, shape: Shape, dtype: mx.Dtype) -> None:
        self._array = mx.zeros(shape, dtype) if writes_show() else None
        self._view = np.empty(shape, _NUMPY[dtype]) if self._array is None else np.asarray(self._array)
        self.bytes = self._view.reshape(-1).view(np.uint8)

    def array(self) -> mx.array:
        return mx.array(self._view) if self._array is None else self._array


_NUMPY = {mx.uint32: np.uint32, mx.uint8: np.uint8, mx.float16: np.float16}


@cache
def writes_show() -> bool:
    """True if MLX's operations see values written to the numpy view of an array, as MLX documents.

    False on NVIDIA, where the host writes to an array's memory through page faults, which is slow.
    """
    if not (on_cpu() or mx.metal.is_available()):
        return False
    a = mx.zeros((64,), mx.uint32)
    mx.eval(a)
    view = np.asarray(a)
    if not view.flags.writeable:
        return False
    view[:] = 3
    return bool(mx.all(a == 3).item())


def dense(raw: np.ndarray, type: str, shape: Shape, dtype: mx.Dtype | None = mx.float32) -> mx.array:
    """Return a tensor's numbers, exact in fp32.

    Args:
        raw, shape: as for `pack_on_cpu`.
        type: any in SUPPORTED.
        dtype: of the result; None keeps F16 and BF16 and gives fp32 for all other types.
    """
    if type in FLOATS:
        bits = np.dtype("<u4" if type == "F32" else "<u2")
        # Of this shape already, as MLX's arrays have at most 2^31 - 1 numbers along an axis.
        whole = np.ascontiguousarray(raw).reshape(-1).view(bits).reshape(shape)
        out = mx.array(np.require(whole, requirements="A")).view(FLOATS[type])
    else:
        out = dequantize(pack_on_cpu(raw, type, shape))
    return out if dtype is None else out.astype(dtype)


def dequantize(w: Packed, dtype: mx.Dtype = mx.float32, rows: mx.array | None = None) -> mx.array:
    """Return the numbers of a packed weight, by stock MLX operations: [.., N, K], or [*rows.shape, K] with rows.

    Computed in fp32, one rounding per operation, then cast. Must not be compiled: a fused multiply-add rounds once.

    Args:
        rows: int, the rows of an [N, K] weight to take (an embedding lookup); no others are read.
    """
    if rows is not None:
        w = w[rows]
    form = w.format
    if form.rule:
        fields = None if w.group_scales is None else numbers(w.group_scales, form.group_scale_bits)
        q = values(form.rule, w.codes, fields)
    else:
        q = unpack_codes(w)
        q = q - form.offset if form.lut is None else mx.array(form.lut, mx.float32)[q.astype(mx.uint32)]
    scales, biases = scales_and_biases(w)
    out = scales[..., None] * q.reshape(*scales.shape, form.group)
    if biases is not None:
        out = out + biases[..., None]
    return out.reshape(w.shape).astype(dtype)


def _ue4m3(x: int) -> float:
    """A scale byte of NVFP4, halved as the table is doubled: 4 bits of exponent (bias 7), 3 of mantissa."""
    e, m = x >> 3 & 15, x & 7
    return 0.0 if x == 0x7F else 0.5 * (m * 2.0**-9 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7))


UE4M3 = tuple(map(_ue4m3, range(256)))


def unpack_codes(w: Packed) -> mx.array:
    """Return the codes as fp32 [.., N, K], by MLX's own unpacking with scales of one."""
    k = w.shape[-1]
    groups = (w.codes.size // w.codes.shape[-1], k // 32)
    codes = w.codes.reshape(groups[0], -1)
    q: mx.array = mx.dequantize(codes, mx.ones(groups), mx.zeros(groups), group_size=32, bits=w.format.bits)
    return q.reshape(w.shape)


def scales_and_biases(w: Packed) -> tuple[mx.array, mx.array | None]:
    """Return fp32 [.., N, K / group]: w = scales * (code - offset, or lut[code]) + biases; None means no biases.

    Of formats with a rule: scales * value."""
    form = w.format
    groups = (*w.shape[:-1], w.shape[-1] // form.group)
    if form.group_scale_kind == "e8m0":
        assert w.group_scales is not None
        e = w.group_scales.astype(mx.uint32)  # 2**(e - 128), with the two smallest as subnormals
        bits = mx.where(e < 2, mx.array(0x00200000, mx.uint32) << e, (e - 1) << 23)
        return bits.view(mx.float32), None
    assert w.block_scales is not None
    if form.per_row:
        assert w.group_scales is not None
        halved = mx.array(UE4M3)[w.group_scales.astype(mx.uint32)]
        return mx.contiguous(w.block_scales).view(mx.float32)[..., 0] * halved, None
    d = w.block_scales[..., 0].astype(mx.float32)
    m = w.block_scales[..., 1].astype(mx.float32) if form.has_min else None
    if not form.group_scale_kind:
        return mx.repeat(d, form.scale_block // form.group, axis=-1), m
    assert w.group_scales is not None
    per_block = (*d.shape, form.scale_block // form.group)
    if form.group_scale_kind == "int8":
        scale = w.group_scales.view(mx.int8)
    elif form.group_scale_kind == "scale-32":
        scale = numbers(w.group_scales, 6).astype(mx.float32) - 32
    elif form.rule:
        s = numbers(w.group_scales, form.group_scale_bits) >> form.rule.scale_at & ((1 << form.rule.scale_bits) - 1)
        d, scale = d * form.rule.factor, 2 * s + 1
    elif form.group_scale_bits == 8:
        scale, low = w.group_scales & 15, w.group_scales >> 4
    else:
        pairs = numbers(w.group_scales, 6).reshape(*groups, 2)
        scale, low = pairs[..., 0], pairs[..., 1]
    scales = (d[..., None] * scale.reshape(per_block).astype(mx.float32)).reshape(groups)
    if m is None:
        return scales, None
    return scales, -(m[..., None] * low.reshape(per_block).astype(mx.float32)).reshape(groups)


def affine_parts(w: Packed) -> tuple[mx.array, mx.array]:
    """Return (scales, biases), fp32 [.., N, K / group]: w = scales * code + biases. Only of affine formats."""
    if not w.format.is_affine:
        raise ValueError(f"{w.format.name} is not affine")
    scales, biases = scales_and_biases(w)
    return scales, -w.format.offset * scales if biases is None else biases
