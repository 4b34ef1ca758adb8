"""Shared by tests of kernels: the simulator as a launcher, random inputs and weights, and the comparison of results.

Outputs start as NaN (or 0xCD bytes): what a kernel leaves unwritten fails. Errors are relative to the largest value.
"""

from __future__ import annotations

import math
import os
import re
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
from blocks import numbers_of, put_scales, random_blocks
from metal_sim import kernel as simulator

from mlx_gemma4.quant.formats import FORMATS, Packed, pack_on_cpu

POOL = ("pool_k", "pool_v")  # inputs that kernels write in place: kernels/paged.metal
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
LIMIT = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 1e-3}


# Where PTX's manual has them: a's element (i, k) with lane i % 8 * 4 + k % 8 / 2, in its word k / 8 * 2 + i / 8; b's
# (k, j) with lane j * 4 + k % 8 / 2, in its word k / 8; c's (i, j) with lane i % 8 * 4 + j / 2, its number
# i / 8 * 2 + j % 2.
PTX = """
METAL_FUNC uint firsts(uint a, uint b) { return (a & 0xFFFFu) | b << 16; }
METAL_FUNC uint seconds(uint a, uint b) { return a >> 16 | (b & 0xFFFF0000u); }
METAL_FUNC void multiply(thread float* c, const thread uint* a, uint b0, uint b1) {
  const int lane = int(simd_prefix_exclusive_sum(1));
  float sums[4];
  for (int n = 0; n < 4; n++) sums[n] = c[n];
  for (int k = 0; k < 16; k++) {
    for (int n = 0; n < 4; n++) {
      const uint left0 = simd_shuffle(a[k / 8 * 2], ushort(lane / 4 * 4 + k % 8 / 2));
      const uint left1 = simd_shuffle(a[k / 8 * 2 + 1], ushort(lane / 4 * 4 + k % 8 / 2));
      const uint right = simd_shuffle(k / 8 ? b1 : b0, ushort((lane % 4 * 2 + n % 2) * 4 + k % 8 / 2));
      const uint left = n / 2 ? left1 : left0;
      sums[n] += (k % 2 ? high_half(left) : low_half(left)) * (k % 2 ? high_half(right) : low_half(right));
    }
  }
  for (int n = 0; n < 4; n++) c[n] = sums[n];
}
"""
# Of few_rows.metal.
HALVES = """
METAL_FUNC uint fma_halves(uint a, uint b, uint c) {
  return as_type<uint>(fma(as_type<half2>(a), as_type<half2>(b), as_type<half2>(c)));
}
METAL_FUNC uint mul_halves(uint a, uint b) { return as_type<uint>(as_type<half2>(a) * as_type<half2>(b)); }
METAL_FUNC uint add_halves(uint a, uint b) { return as_type<uint>(as_type<half2>(a) + as_type<half2>(b)); }
METAL_FUNC void copy_async(threadgroup uint4* to, const device half* from, bool there) {
  for (int i = 0; i < 4; i++) ((threadgroup uint*)to)[i] = there ? ((const device uint*)from)[i] : 0;
}
template <int COUNT>
METAL_FUNC void copy_words(threadgroup uint* to, const device uint* from) {
  for (int i = 0; i < COUNT; i++) to[i] = from[i];
}
METAL_FUNC void copies_arrived() { simdgroup_barrier(mem_flags::mem_threadgroup); }
"""
# Of quantized.metal, by the table.
CODES = """
METAL_FUNC uint less_1152(uint pair) {
  const half a = as_type<half>(ushort(pair)) - half(1152), b = as_type<half>(ushort(pair >> 16)) - half(1152);
  return uint(as_type<ushort>(a)) | uint(as_type<ushort>(b)) << 16;
}
METAL_FUNC uint level_of(uint code, uint low_0, uint low_1, uint high_0, uint high_1) {
  const uint at = 8 * (code & 3), low = code & 4 ? low_1 : low_0, high = code & 4 ? high_1 : high_0;
  return (low >> at & 0xFFu) | (high >> at & 0xFFu) << 8 | (code & 8) << 12;
}
METAL_FUNC void levels_by_bytes(uint word, uint low_0, uint low_1, uint high_0, uint high_1, thread uint* pairs) {
  for (int i = 0; i < 4; i++)
    pairs[i] = level_of(word >> (8 * i), low_0, low_1, high_0, high_1) |
               level_of(word >> (8 * i + 4), low_0, low_1, high_0, high_1) << 16;
}
"""


def metal(**declared: Any) -> Any:
    """The simulator as a launcher whose kernels give MLX arrays, in scrambled order; METAL_TESTS=gpu: `on_gpu`."""
    if os.environ.get("METAL_TESTS") == "gpu":
        return on_gpu(**declared)
    kernel = simulator(**declared, in_place=POOL)

    def call(**arguments: Any) -> list[mx.array]:
        return [to_mlx(a) for a in kernel(seed=2, **arguments)]

    return call


def on_gpu(**declared: Any) -> Any:
    """This Mac's GPU as a launcher, while MLX computes references on the CPU."""
    kernel = mx.fast.metal_kernel(**declared)

    def call(**arguments: Any) -> Any:
        floats = all(mx.issubdtype(dtype, mx.floating) for dtype in arguments["output_dtypes"])
        return kernel(stream=mx.gpu, init_value=math.nan if floats else 0xCD, **arguments)

    return call


def racing(**declared: Any) -> Any:
    """`metal` that also fails on races and on accesses out of bounds."""
    kernel = simulator(**declared, in_place=POOL)

    def call(**arguments: Any) -> list[mx.array]:
        return [to_mlx(a) for a in kernel(seed=3, sanitize="thread", **arguments)]

    return call


def as_cuda(*, header: str, base: Any = metal, **declared: Any) -> Any:
    """The simulator, with the text as CUDA sees it."""
    if "void multiply(" in header:
        before, high_half, after = re.split(r"(METAL_FUNC float high_half\(.*\n)", header)  # which PTX needs
        defines = "#define CUDA 1\n#define INPUTS_READY()\n"
        header = f"{defines}{before}{high_half}{PTX}{HALVES}{CODES}{after}"
    return base(header=header, **declared)


def eager(header: str, base: Any = metal, **declared: Any) -> Any:
    """A launcher for the texts as an NVIDIA GPU has them where they ask for more at once."""
    assert ("#define EAGER 0\n" in header) == declared["name"].startswith("attention_")
    return base(header=header.replace("#define EAGER 0\n", "#define EAGER 1\n"), **declared)


def to_mlx(a: np.ndarray[Any, Any]) -> mx.array:
    if a.dtype == ml_dtypes.bfloat16:
        return mx.array(a.view(np.uint16)).view(mx.bfloat16)
    return mx.array(a)


def normal(*shape: int, dtype: mx.Dtype = mx.float32, seed: int = 0) -> mx.array:
    """Random numbers, rounded to dtype."""
    values = np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)
    return mx.array(values).astype(dtype)


def check(got: mx.array, want: mx.array, dtype: mx.Dtype, factor: float = 1.0) -> None:
    """Same shape and dtype, and near: 1e-3 for 16-bit results (bf16's own rounding apart), 1e-5 for fp32."""
    assert got.shape == want.shape and got.dtype == want.dtype
    a, b = (np.array(x.astype(mx.float32)) for x in (got, want))
    assert np.isfinite(b).all()
    scale = np.abs(b).max()
    # Two values on either side of a rounding boundary are one unit in the last place apart.
    unit = {mx.float32: 0.0, mx.float16: 2**-10, mx.bfloat16: 2**-7}[got.dtype]
    error = np.maximum(np.abs(a - b) - unit * np.abs(b), 0).max() / scale
    assert error <= LIMIT[dtype] * factor, f"relative error {error:.1e}"


def random(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def exact(x: Any) -> np.ndarray:
    """In double precision."""
    return np.array(x.astype(mx.float32) if isinstance(x, mx.array) else x).astype(np.float64)


def weight(name: str, *shape: int) -> tuple[Packed, np.ndarray]:
    """A random weight of a type, packed, and its values."""
    rng = np.random.default_rng(sum(shape))
    count = int(np.prod(shape)) // FORMATS[name].layout.size
    blocks = random_blocks(name, rng, count)
    put_scales(name, blocks, lambda: rng.uniform(0.001, 0.02, count).astype(np.float16))
    if name == "MXFP4":
        blocks[:, 0] = rng.integers(118, 130, count)
    if name == "NVFP4":
        blocks[:, :4] = rng.integers(30, 60, (count, 4))
    raw = blocks.reshape(int(np.prod(shape[:-1])), -1)
    return pack_on_cpu(raw, name, shape), numbers_of(name, raw).reshape(shape).astype(np.float64)
