"""Every quantization on random blocks, against gguf-py and against the formulas in plain Python."""

from __future__ import annotations

import itertools
from math import prod
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from blocks import numbers_of, put_scales, random_blocks

from mlx_gemma4.errors import InputError
from mlx_gemma4.files.gguf import TENSOR_TYPES, TensorInfo
from mlx_gemma4.quant import formats
from mlx_gemma4.quant.formats import FORMATS, Packed, affine_parts, dense, dequantize, pack_on_cpu
from mlx_gemma4.quant.repack import Plane

TYPES = list(FORMATS)
RECORDED = np.load(Path(__file__).parents[1] / "fixtures" / "ggml-types.npz")
AFFINE = [name for name, f in FORMATS.items() if f.is_affine]


def random_rows(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """uint8 [rows, row_bytes]: random bytes, so all codes and scales occur, with finite fp16 scales, some 0 or -0."""
    rng = np.random.default_rng(seed)
    n_rows, blocks = int(np.prod(shape[:-1])), shape[-1] // FORMATS[name].layout.size
    raw = random_blocks(name, rng, n_rows * blocks)

    def scales() -> np.ndarray:
        d = rng.standard_normal(len(raw)).astype(np.float16) * np.float16(0.1)
        d[rng.random(len(raw)) < 0.1] = 0.0
        d[rng.random(len(raw)) < 0.1] *= -0.0
        return d

    put_scales(name, raw, scales)
    return raw.reshape(n_rows, -1)


def reference(raw: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name in FORMATS:
        return numbers_of(name, raw).reshape(shape)
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]).reshape(shape)


def bits(a: np.ndarray | mx.array) -> np.ndarray:
    """fp32 as integers: 0 and -0 differ."""
    return np.array(a).view(np.uint32)


def stream(data: bytes, width: int) -> list[int]:
    """A little-endian bit stream of `width`-bit numbers, the slow and obvious way."""
    whole = int.from_bytes(data, "little")
    return [whole >> at & ((1 << width) - 1) for at in range(0, len(data) * 8 - width + 1, width)]


def formula(w: Packed, row: int) -> np.ndarray:
    """Row `row` of a packed [N, K] by the formulas of `Format`'s docstring, one weight after the other, in fp32."""
    f = w.format
    codes = stream(np.array(w.codes)[row].tobytes(), f.bits)
    group_scales = (
        stream(np.array(w.group_scales)[row].tobytes(), f.group_scale_bits) if w.group_scales is not None else []
    )
    halves = np.array(w.block_scales)[row].astype(np.float32) if w.block_scales is not None else None
    out = []
    for k, q in enumerate(codes):
        value = np.float32(f.lut[q] if f.lut else q - f.offset)
        d, m = (
            halves[k // f.scale_block][i] if halves is not None and f.scale_block and i <= f.has_min else None
            for i in (0, 1)
        )
        s = group_scales[k // f.group] if group_scales else 0
        if f.group_scale_kind == "e8m0":
            value *= np.float32(2.0 ** (s - 128))
        elif f.group_scale_kind == "ue4m3":
            value *= gguf.quants.NVFP4.ue4m3_to_fp32(np.array(s, np.uint8)).astype(np.float32)
        elif f.group_scale_kind == "scale-min":
            half = f.group_scale_bits // 2
            value = d * np.float32(s & ((1 << half) - 1)) * value - m * np.float32(s >> half)
        elif f.group_scale_kind == "scale-32":
            value *= d * np.float32(s - 32)
        elif f.group_scale_kind == "int8":
            value *= d * np.float32(s - 256 * (s > 127))
        else:
            value = value * d + m if f.has_min else value * d
        out.append(value)
    return np.array(out, np.float32)


@pytest.mark.parametrize("name", TYPES)
def test_round_trip_is_exact_to_the_bit(name: str) -> None:
    size = FORMATS[name].layout.size
    odd_k = 704 if size == 32 else 3 * size
    for shape in ((7, odd_k), (3, 5, 2 * size), (1, size), (size,), (333, 5 * size)):
        raw = random_rows(name, shape)
        w = pack_on_cpu(raw, name, shape)
        assert w.shape == shape
        rows = 4 * prod(shape[:-1]) * w.format.per_row
        assert w.nbytes == raw.nbytes + rows, "the file's bits per weight, nothing added but a row's factor"
        np.testing.assert_array_equal(bits(dequantize(w)), bits(reference(raw, name, shape)))


@pytest.mark.parametrize("name", TYPES)
def test_values_are_those_of_ggmls_own_code(name: str) -> None:
    """tests/fixtures/ggml-types.json tells who made them. Signs of zeros are not compared: ggml.h does not fix them."""
    blocks, want = (RECORDED[f"{name}/{what}"] for what in ("blocks", "values"))
    got = np.array(dequantize(pack_on_cpu(blocks, name, want.shape)))
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(numbers_of(name, blocks), want)


@pytest.mark.parametrize("name", TYPES)
def test_packing_in_stripes_and_chunks_changes_nothing(name: str) -> None:
    """More codes than one thread takes at once, and no round number of blocks."""
    size = FORMATS[name].layout.size
    shape = (1031, 2_300_000 // 1031 // size * size + size)
    raw = random_rows(name, shape)
    read: list[tuple[int, int]] = []
    w = pack_on_cpu(raw, name, shape, on_read=lambda a, b: read.append((a, b)))
    np.testing.assert_array_equal(bits(dequantize(w)), bits(reference(raw, name, shape)))
    read.sort()
    assert read[0][0] == 0 and read[-1][1] == raw.nbytes
    assert len(read) > 1 and all(a[1] == b[0] for a, b in itertools.pairwise(read)), "each byte let go once"


@pytest.mark.parametrize("name", TYPES)
def test_layout_is_the_documented_one(name: str) -> None:
    shape = (3, 2 * FORMATS[name].layout.size)
    raw = random_rows(name, shape, seed=1)
    w = pack_on_cpu(raw, name, shape)
    f = FORMATS[name]
    assert w.codes.dtype == mx.uint32 and w.codes.shape == (3, shape[1] * f.bits // 32)
    assert w.group_scales is None or (
        w.group_scales.dtype == mx.uint8 and w.group_scales.shape == (3, shape[1] // f.group * f.group_scale_bits // 8)
    )
    blocks = 1 if f.per_row else shape[1] // (f.scale_block or 1)
    assert w.block_scales is None or (
        w.block_scales.dtype == mx.float16 and w.block_scales.shape == (3, blocks, f.block_numbers)
    )
    assert (w.group_scales is None) == (f.group_scale_bits == 0)
    assert (w.block_scales is None) == (f.scale_block == 0 and not f.per_row)
    want = reference(raw, name, shape)
    for row in range(3 if f.rule is None else 0):  # values of a rule are held to gguf-py alone
        np.testing.assert_array_equal(formula(w, row), want[row])


@pytest.mark.parametrize("name", [name for name, f in FORMATS.items() if f.rule is None])
def test_every_code_value_at_every_place(name: str) -> None:
    """Blocks whose codes are all equal, for each value: no bit may stray to a neighbour."""
    layout = FORMATS[name].layout
    assert isinstance(layout.codes, tuple)
    for q in range(1 << layout.bits):
        block = np.zeros(layout.n_bytes, np.uint8)
        done = 0
        for plane in layout.codes:
            assert isinstance(plane, Plane)
            part = (q >> done) & ((1 << plane.bits) - 1)
            byte = sum(part << i for i in range(0, 8, plane.bits))
            block[plane.at : plane.at + layout.size * plane.bits // 8] = byte
            done += plane.bits
        w = pack_on_cpu(block.reshape(1, -1), name, (1, layout.size))
        stored = q ^ 0x80 if name == "Q8_0" else q
        assert stream(np.array(w.codes).tobytes(), layout.bits) == [stored] * layout.size


@pytest.mark.parametrize("name", TYPES)
def test_rows_are_looked_up(name: str) -> None:
    shape = (11, 2 * FORMATS[name].layout.size)
    raw = random_rows(name, shape, seed=2)
    w = pack_on_cpu(raw, name, shape)
    rows = mx.array([[10, 0], [3, 3]])
    got = dequantize(w, rows=rows)
    assert got.shape == (2, 2, shape[1])
    np.testing.assert_array_equal(bits(got), bits(reference(raw, name, shape)[np.array(rows)]))
    assert dequantize(w, mx.bfloat16, rows=rows).dtype == mx.bfloat16


@pytest.mark.parametrize("name", AFFINE)
def test_affine_parts(name: str) -> None:
    shape = (5, 3 * 256)
    raw = random_rows(name, shape, seed=3)
    w = pack_on_cpu(raw, name, shape)
    scales, biases = affine_parts(w)
    assert scales.shape == biases.shape == (5, shape[1] // w.format.group)
    codes = np.array([stream(row.tobytes(), w.format.bits) for row in np.array(w.codes)], np.float64)
    groups = codes.reshape(5, -1, w.format.group)
    got = np.array(scales, np.float64)[..., None] * groups + np.array(biases, np.float64)[..., None]
    want = reference(raw, name, shape)
    np.testing.assert_allclose(got.reshape(shape), want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("name", [n for n in AFFINE if FORMATS[n].group == 32])
def test_stock_quantized_matmul_reads_the_codes(name: str) -> None:
    shape = (64, 2 * 256)
    raw = random_rows(name, shape, seed=4)
    w = pack_on_cpu(raw, name, shape)
    x = mx.random.normal((3, shape[1]), key=mx.random.key(0))
    scales, biases = affine_parts(w)
    got = mx.quantized_matmul(x, w.codes, scales, biases, group_size=32, bits=w.format.bits)
    want = np.array(x, np.float64) @ reference(raw, name, shape).astype(np.float64).T
    np.testing.assert_allclose(np.array(got), want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_stock_mxfp4_reads_codes_and_scales() -> None:
    shape = (4, 96)
    raw = random_rows("MXFP4", shape, seed=5)
    raw.reshape(-1, 17)[:, 0] = np.random.default_rng(0).integers(100, 140, raw.size // 17)
    w = pack_on_cpu(raw, "MXFP4", shape)
    got = mx.dequantize(w.codes, w.group_scales, group_size=32, bits=4, mode="mxfp4", dtype=mx.float32)
    np.testing.assert_array_equal(np.array(got), reference(raw, "MXFP4", shape))


@pytest.mark.parametrize("name", [*TYPES, "F32", "F16", "BF16"])
@pytest.mark.parametrize("dtype", [mx.float32, None, mx.float16])
def test_dense(name: str, dtype: mx.Dtype | None) -> None:
    shape = (3, 4, 256)
    if name in FORMATS:
        raw = random_rows(name, shape, seed=6)
    else:
        values = np.random.default_rng(0).standard_normal((12, 256)).astype(np.float32)
        raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name]).view(np.uint8)
    got = dense(raw, name, shape, dtype)
    want = reference(raw, name, shape)
    kept = {"F16": mx.float16, "BF16": mx.bfloat16}.get(name, mx.float32)
    assert got.dtype == (dtype or kept)
    if dtype is mx.float16:
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(np.array(got), want.astype(np.float16))
    else:
        np.testing.assert_array_equal(bits(got.astype(mx.float32)), bits(want))


def test_vector_keeps_its_shape() -> None:
    values = np.arange(48, dtype=np.float32)
    got = dense(values.view(np.uint8).reshape(1, -1), "F32", (48,))
    np.testing.assert_array_equal(np.array(got), values)


@pytest.mark.parametrize("where", ["no alignment", "read-only"])
def test_rows_anywhere_in_memory(where: str) -> None:
    """A file may align its data to one byte, and a memory map can't be written."""
    for name, shape in (("F32", (2, 33)), ("F16", (2, 33)), ("BF16", (2, 33)), ("Q6_K", (2, 256)), ("Q4_K", (2, 256))):
        raw = random_rows(name, shape) if name in FORMATS else np.zeros((2, 33 * (4 if name == "F32" else 2)), np.uint8)
        space = np.empty(raw.size + 3, np.uint8)
        moved = space[3:].reshape(raw.shape) if where == "no alignment" else raw.copy()
        moved[:] = raw
        moved.flags.writeable = where != "read-only"
        np.testing.assert_array_equal(np.array(dense(moved, name, shape)), reference(raw, name, shape))


def test_bytes_that_do_not_fit_the_shape() -> None:
    raw = random_rows("Q4_K", (2, 256))
    for shape in ((3, 256), (2, 512), (2, 128)):
        with pytest.raises(ValueError, match="no tensor of shape"):
            pack_on_cpu(raw, "Q4_K", shape)


def test_table_agrees_with_gguf_py() -> None:
    for name, form in FORMATS.items():
        size, n_bytes = form.layout.size, form.layout.n_bytes
        if name != "Q2_0":  # which gguf-py 0.19 has not
            assert (size, n_bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        per_block = size * form.bits // 8 + form.layout.group_scale_bytes + 2 * len(form.block_scales_at)
        assert per_block == n_bytes, "every byte of a block has its place"
    for number, kind in TENSOR_TYPES.items():
        if number in list(gguf.GGMLQuantizationType):
            known = gguf.GGMLQuantizationType(number)
            if known.name != "Q8_K":  # gguf-py's size of it lacks the sums that ggml stores as 16 bits each
                assert (kind.name, (kind.block_size, kind.block_bytes)) == (known.name, gguf.GGML_QUANT_SIZES[known])


def test_check_supported() -> None:
    for kind in TENSOR_TYPES.values():
        info = TensorInfo("blk.0.ffn_up.weight", (1, 256), kind.name, 1, 1, 0, 0)
        if kind.name in formats.SUPPORTED:
            formats.check_supported(info, Path("m.gguf"))
        else:
            with pytest.raises(InputError, match=rf"m\.gguf: tensor 'blk\.0\.ffn_up\.weight' is {kind.name},"):
                formats.check_supported(info, Path("m.gguf"))
    assert len(formats.SUPPORTED) == 28
