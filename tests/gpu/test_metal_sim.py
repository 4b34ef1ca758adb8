"""The Metal simulator itself: what it must refuse, what it must accept, and what kernels compute in it.

Proven on kernels that Apple's compiler accepts, MLX's own from the headers in the `mlx-metal` wheel, and on kernels
made wrong on purpose. The sanitizers' part runs with `pytest -m sanitize`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import metal_sim
import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from metal_sim import MetalError

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float": np.dtype(np.float32), "half": np.dtype(np.float16), "bfloat": BF16}
TOLERANCE = {"float": 1e-5, "half": 1e-3, "bfloat": 5e-3}  # of the largest value; a bfloat has 8 bits


def launch(
    source: str,
    inputs: dict[str, Any],
    outputs: dict[str, tuple[Any, Any]],
    grid: Any,
    threadgroup: Any,
    **options: Any,
) -> Any:
    """One dispatch of `source`; `outputs` maps a name to (shape, dtype). A single output comes back alone."""
    launcher = {k: options.pop(k) for k in ("header", "atomic_outputs", "ensure_row_contiguous") if k in options}
    run = metal_sim.kernel("test", list(inputs), list(outputs), source, **launcher)
    made = run(
        inputs=list(inputs.values()),
        output_shapes=[s for s, _ in outputs.values()],
        output_dtypes=[d for _, d in outputs.values()],
        grid=grid,
        threadgroup=threadgroup,
        **options,
    )
    return made[0] if len(made) == 1 else made


def error(got: Any, want: Any) -> float:
    """Largest difference over largest value; NaN counts as infinite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.nan_to_num(np.abs(got - want).max() / np.abs(want).max(), nan=np.inf))


# ---------------------------------------------------------------- types

HELPERS = """
struct Pair { float a, b; };
constant float LUT[4] = {1, 2, 3, 4};
template <typename V> V four(float a) { return V(a, a, a, a); }
void fill(threadgroup float* p) { p[0] = 1; }
void change(thread float& v) { v += 1; }
"""


def check_body(body: str, helpers: str = HELPERS) -> None:
    parameters = (
        "const device float* x [[buffer(0)]], device float* y [[buffer(1)]], uint3 gid [[thread_position_in_grid]]"
    )
    metal_sim.check(f"{helpers}\n[[kernel]] void k({parameters}) {{\n{body}\n}}\n")


REFUSED = {  # what is wrong: (body, a piece of the message)
    "device to thread pointer": ("thread const float* p = x; y[0] = p[0];", "cannot initialize"),
    "unqualified pointer": ("float* p = y; p[0] = 1;", "cannot initialize"),
    "threadgroup to device pointer": ("threadgroup float s[4]; device float* p = s; p[0] = 1;", "cannot initialize"),
    "C cast across address spaces": (
        "threadgroup float s[4]; device float* p = (device float*)s; p[0] = 1;", "cast between address spaces",
    ),
    "C cast to thread": ("float* p = (float*)y; p[0] = 1;", "cast between address spaces"),
    "reinterpret_cast across": (
        "threadgroup float s[4]; y[0] = *reinterpret_cast<device float*>(s);", "not allowed",
    ),
    "threadgroup parameter, device argument": ("fill(y);", "no matching function"),
    "thread reference to device": ("change(y[0]);", "no matching function"),
    "write to const": ("const device float* p = x; p[0] = 1;", "read-only"),
    "write to constant": ("LUT[0] = 1;", "const"),
    "undeclared attribute": ("y[simdgroup_index_in_threadgroup] = 1;", "undeclared"),
    "unknown function": ("y[0] = simd_summ(x[0]);", "undeclared"),
    "host library": ("y[0] = std::max(x[0], 1.0f);", "std"),
    "double": ("double d = x[0]; y[0] = float(d);", "poisoned"),
    "new": ("y[0] = *new float(1);", "poisoned"),
    "goto": ("if (gid.x) goto end; y[0] = 1; end: y[1] = 2;", "poisoned"),
    "vector of another size": ("float3 a = float3(1.0f); float4 b = a; y[0] = b.x;", "cannot initialize"),
    "vector of another type": ("half4 a = half4(1.0h); float4 b = a; y[0] = b.x;", "cannot initialize"),
    "product of vector types": ("half4 a = half4(1.0h); y[0] = (a * float4(1.0f)).x;", "half4"),
    "three components of four": ("float4 b = float4(1.0f, 2.0f, 3.0f); y[0] = b.x;", "wrong number of components"),
    "swizzle past the end": ("float2 b = float2(1.0f); y[0] = b.z;", "exceeds type"),
    "as_type to another size": ("y[0] = as_type<float>(half(1));", "different sizes"),
    "ambiguous max": ("y[0] = max(x[0], 1);", "ambiguous"),
    "float to bfloat": ("bfloat h = x[0]; y[0] = h;", "implicit conversion to bfloat"),
    "float constant to bfloat": ("bfloat h = 1.0f; y[0] = h;", "implicit conversion to bfloat"),
    "float added to bfloat": ("bfloat h = bfloat(1.0f); h += x[0]; y[0] = h;", "implicit conversion to bfloat"),
    "half to bfloat": ("half h = 1; bfloat b = h; y[0] = b;", "cannot initialize"),
    "threadgroup with a value": ("threadgroup float s[4] = {0}; y[0] = s[0];", "address space"),
    "matrix from thread memory": ("float s[64]; simdgroup_float8x8 m; simdgroup_load(m, s);", "no matching function"),
    "uninitialized": ("float a; y[0] = a;", "uninitialized"),
}  # fmt: skip

ACCEPTED = {
    "float to half": "half h = x[0]; y[0] = h;",
    "cast to bfloat": "bfloat b = static_cast<bfloat>(x[0]); b = b * b; y[0] = float(b);",
    "integer to bfloat": "bfloat b = 1; y[0] = b;",
    "struct copies": "Pair p = *(const device Pair*)x; threadgroup Pair s[2]; s[0] = p; s[1] = s[0]; y[0] = p.a;",
    "reference to device": "const device float& r = x[1]; y[0] = r;",
    "lambda": "auto f = [&](float a) { return a + x[0]; }; y[0] = f(1.0f);",
    "comparison and select": "float4 a = float4(1.0f); y[0] = select(a, float4(0.0f), a > 0.5f).x + any(a > 1.0f);",
    "packed vector": "packed_float3 p = ((const device packed_float3*)x)[0]; y[0] = p.y;",
    "vec<T, N>": "using V = vec<half, 4>; V v = V(1.0h, 2.0h, 3.0h, 4.0h); y[0] = v.x + vec<float, 2>(1, 2).y;",
    "constructor of a type parameter": "y[0] = four<float4>(x[0]).w;",
    "swizzles": "float4 a = float4(0.0f); a.xy = float2(1.0f, 2.0f); a.zw = a.yx; y[0] = a.w;",
    "bytes of a word": "uchar4 c = as_type<uchar4>(((const device uint*)x)[0]); y[0] = float4((c >> 2) & 0xF).w;",
    "two threadgroup arrays": "if (gid.x < 2) { threadgroup half s[8][4], t[2]; s[0][1] = 1; t[1] = 2; y[0] = t[1]; }",
    "constants": "constexpr float lut[2] = {1, 2}; y[0] = LUT[gid.x & 3] + lut[gid.x & 1];",
    "constants without suffix": "y[0] = max(x[0] * 2.0, 1e-6);",
    "names with metal::": "y[0] = metal::exp(x[0]) + precise::tanh(x[0]) + fast::exp(x[0]) + metal::float2(1.0f).x;",
    "unrolled": "float s = 0;\n_Pragma(\"clang loop unroll(full)\")\nfor (int i = 0; i < 4; i++) s += x[i];\ny[0] = s;",
    "matrix": "threadgroup half s[64]; simdgroup_half8x8 m; simdgroup_load(m, s, 8); simdgroup_float8x8 c(0);"
    " simdgroup_multiply_accumulate(c, m, m, c); simdgroup_store(c, y, 8);",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    body, message = REFUSED[name]
    with pytest.raises(MetalError, match=message):
        check_body(body)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepts(name: str) -> None:
    check_body(ACCEPTED[name])


def test_refuses_threadgroup_memory_outside_a_kernel() -> None:
    helper = "void hidden(device float* y) { threadgroup float s[4]; s[0] = 1; y[0] = s[0]; }"
    with pytest.raises(MetalError, match="outside a kernel function"):
        check_body("hidden(y);", helper)


def test_errors_name_the_source_line() -> None:
    with pytest.raises(MetalError, match=r"kernel\.metal:2:\d+: error"):
        launch("uint i = 0;\n y[i] = z;", {}, {"y": ((1,), np.float32)}, (1, 1, 1), (1, 1, 1), header="\n\n\n")


# ---------------------------------------------------------------- what kernels compute


def test_signature_follows_mlx() -> None:
    source = "uint i = thread_position_in_grid.x; out[i] = T(a[i] + b[0] + c) + a_shape[1] + a_strides[0] + a_ndim;"
    arrays = [("a", np.zeros((2, 4), np.float16)), ("b", np.zeros(7, np.uint8)), ("c", np.zeros((), np.int32))]
    text = metal_sim.signature("f", arrays, [("out", BF16)], source, [("T", np.float32), ("N", 3), ("on", True)])
    assert " ".join(text.split()) == (
        "template <typename T, int N, bool on> [[kernel]] void f( const device float16_t* a [[buffer(0)]], "
        "const constant int* a_shape [[buffer(1)]], const constant int64_t* a_strides [[buffer(2)]], "
        "const constant int& a_ndim [[buffer(3)]], const constant uint8_t* b [[buffer(4)]], "
        "const constant int32_t& c [[buffer(5)]], device bfloat16_t* out [[buffer(6)]], "
        "uint3 thread_position_in_grid [[thread_position_in_grid]]) {"
    )


def test_positions_in_a_ragged_grid() -> None:
    grid, group = np.array([37, 3, 3]), np.array([16, 2, 2])
    source = """
      uint3 p = thread_position_in_grid;
      uint i = (p.z * threads_per_grid.y + p.y) * threads_per_grid.x + p.x;
      uint3 g = threadgroup_position_in_grid, t = thread_position_in_threadgroup, n = threads_per_threadgroup;
      device uint* o = out + i * 16;
      o[0] = p.x; o[1] = p.y; o[2] = p.z; o[3] = g.x; o[4] = g.y; o[5] = g.z; o[6] = t.x; o[7] = t.y; o[8] = t.z;
      o[9] = n.x; o[10] = n.y; o[11] = n.z; o[12] = thread_index_in_threadgroup;
      o[13] = simdgroup_index_in_threadgroup * 32 + thread_index_in_simdgroup;
      o[14] = threadgroups_per_grid.x; o[15] = dispatch_threads_per_threadgroup.x;
    """
    out = launch(source, {}, {"out": ((grid.prod(), 16), np.uint32)}, grid, group)
    z, y, x = np.unravel_index(np.arange(grid.prod()), grid[::-1])
    p = np.stack([x, y, z], 1)
    g, t = p // group, p % group
    n = np.minimum(group, grid - g * group)
    index = (t[:, 2] * n[:, 1] + t[:, 1]) * n[:, 0] + t[:, 0]
    fixed = np.broadcast_to([3, 16], (len(p), 2))
    np.testing.assert_array_equal(out, np.concatenate([p, g, t, n, index[:, None], index[:, None], fixed], 1))


def test_simdgroup_functions() -> None:
    source = """
      uint lane = thread_index_in_simdgroup, i = thread_position_in_grid.x;
      float v = x[i];
      device float* o = out + i * 16;
      o[0] = simd_sum(v); o[1] = simd_max(v); o[2] = simd_min(v); o[3] = simd_product(v);
      o[4] = simd_shuffle(v, (lane * 7) % 32); o[5] = simd_shuffle_xor(v, 5); o[6] = simd_shuffle_down(v, 3);
      o[7] = simd_shuffle_up(v, 3); o[8] = simd_broadcast(v, 9); o[9] = simd_broadcast_first(v);
      o[10] = simd_prefix_inclusive_sum(v); o[11] = simd_prefix_exclusive_sum(v);
      o[12] = simd_shuffle_and_fill_up(v, -v, 4); o[13] = simd_any(v > 1.4f) + 2 * simd_all(v > 0.1f);
      o[14] = quad_sum(v); o[15] = simd_or(as_type<uint>(v)) & 0xFF;
    """
    x = np.random.default_rng(0).uniform(0.5, 1.5, 64).astype(np.float32)
    out = launch(source, {"x": x}, {"out": ((64, 16), np.float32)}, (64, 1, 1), (64, 1, 1), seed=2)
    want = np.empty((2, 32, 16))
    for v, o in zip(x.reshape(2, 32).astype(np.float64), want, strict=True):
        lane, near = np.arange(32), v.astype(np.float32)
        o[:, :4] = v.sum(), v.max(), v.min(), v.prod()
        o[:, 4], o[:, 5] = v[lane * 7 % 32], v[lane ^ 5]
        o[:, 6], o[:, 7] = v[np.where(lane + 3 > 31, lane, lane + 3)], v[np.where(lane < 3, lane, lane - 3)]
        o[:, 8], o[:, 9], o[:, 10], o[:, 11] = v[9], v[0], v.cumsum(), v.cumsum() - v
        o[:, 12] = np.where(lane < 4, -v[(lane - 4) % 32], v[(lane - 4) % 32])
        o[:, 13], o[:, 14] = (v > 1.4).any() + 2 * (v > 0.1).all(), v.reshape(8, 4).sum(1).repeat(4)
        o[:, 15] = np.bitwise_or.reduce(near.view(np.uint32)) & 0xFF
    np.testing.assert_allclose(out, want.reshape(64, 16), rtol=1e-6)


@pytest.mark.parametrize("kind", DTYPES)
def test_element_types_round_as_numpy_does(kind: str) -> None:
    dtype = DTYPES[kind]
    x = np.random.default_rng(1).standard_normal(256).astype(dtype)
    source = "uint i = thread_position_in_grid.x; T a = x[i], b = x[255 - i]; y[i] = a * b + T(s);"
    y = launch(source, {"x": x, "s": 0.3}, {"y": ((256,), dtype)}, (256, 1, 1), (64, 1, 1), template=[("T", dtype)])
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, x * x[::-1] + np.float32(0.3).astype(dtype))


def test_vectors_and_packed_loads() -> None:
    raw = np.random.default_rng(2).integers(0, 256, 64 * 12, dtype=np.uint8)
    source = """
      uint i = thread_position_in_grid.x;
      packed_float3 p = ((const device packed_float3*)w)[i];
      y[i] = as_type<uint>(p.z) ^ as_type<uint>(float3(p).y);
      uchar4 c = ((const device uchar4*)w)[i];
      float4 f = float4(c & 0xF, 0).xyzw;  // an element too many is refused below
    """
    with pytest.raises(MetalError, match="wrong number of components"):
        launch(source, {"w": raw}, {"y": ((64,), np.uint32)}, (64, 1, 1), (64, 1, 1))
    source = source.replace(
        "float4(c & 0xF, 0).xyzw;",
        "float4(c.wzyx & 0xF) * float4(1, half3(2, 3, 4)); y[i] += uint(dot(f, 1.0f + 0 * f));",
    )
    y = launch(source, {"w": raw}, {"y": ((64,), np.uint32)}, (64, 1, 1), (64, 1, 1))
    words, c = raw.view(np.uint32).reshape(64, 3), raw.reshape(-1, 4)[:64, ::-1] & 0xF
    np.testing.assert_array_equal(y, (words[:, 2] ^ words[:, 1]) + (c * [1, 2, 3, 4]).sum(1).astype(np.uint32))


@pytest.mark.parametrize("kind", DTYPES)
def test_simdgroup_matrices(kind: str) -> None:
    source = """
      threadgroup T s[64];
      for (uint i = thread_index_in_simdgroup; i < 64; i += 32) s[i] = b[i];
      threadgroup_barrier(mem_flags::mem_threadgroup);
      simdgroup_matrix<T, 8, 8> ma, mb;
      simdgroup_matrix<float, 8, 8> c = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
      simdgroup_load(ma, a + 4, 16, ulong2(2, 1));
      simdgroup_load(mb, s, 8, 0, true);
      simdgroup_multiply_accumulate(c, ma, mb, c);
      simdgroup_store(c, y, 8);
    """
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((9, 16)).astype(DTYPES[kind]), rng.standard_normal((8, 8)).astype(DTYPES[kind])
    y = launch(
        source, {"a": a, "b": b}, {"y": ((8, 8), np.float32)}, (32, 1, 1), (32, 1, 1), template=[("T", DTYPES[kind])]
    )
    want = a[1:9, 6:14].astype(np.float64) @ b.astype(np.float64).T + 1
    assert error(y, want) < 1e-6


def test_atomics() -> None:
    source = "atomic_fetch_add_explicit(&count[x[thread_position_in_grid.x]], 1, memory_order_relaxed);"
    x = np.random.default_rng(4).integers(0, 10, 500, dtype=np.uint8)
    out = {"count": ((10,), np.int32)}
    y = launch(source, {"x": x}, out, (500, 1, 1), (128, 1, 1), atomic_outputs=True, init_value=0)
    np.testing.assert_array_equal(y, np.bincount(x, minlength=10))


def test_math() -> None:
    names = ["exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "tanh", "floor", "ceil", "round", "rint"]
    source = "uint i = thread_position_in_grid.x; float4 v = ((const device float4*)x)[i];\n"
    source += "device float4* o = (device float4*)out;\n"
    source += "\n".join(f"o[i * {len(names)} + {j}] = {name}(v);" for j, name in enumerate(names))
    x = np.random.default_rng(5).uniform(0.1, 4, 64).astype(np.float32)
    out = launch(source, {"x": x}, {"out": ((16, len(names), 4), np.float32)}, (16, 1, 1), (16, 1, 1))
    away = {"rsqrt": lambda v: 1 / np.sqrt(v), "round": lambda v: np.floor(v + 0.5)}
    for j, name in enumerate(names):
        want = away.get(name, getattr(np, name, None))(x.astype(np.float64)).reshape(16, 4)
        np.testing.assert_allclose(out[:, j], want, rtol=1e-5, atol=1e-6, err_msg=name)


def test_strides_of_inputs_left_as_they_are() -> None:
    source = """
      uint i = thread_position_in_grid.x, n = x_shape[1];
      y[i] = x[(i / n) * x_strides[0] + (i % n) * x_strides[1]];
    """
    x = np.arange(12, dtype=np.int32).reshape(3, 4).T
    y = launch(source, {"x": x}, {"y": ((4, 3), np.int32)}, (12, 1, 1), (12, 1, 1), ensure_row_contiguous=False)
    np.testing.assert_array_equal(y, x)


def test_function_constants() -> None:
    source = """
      constant bool twice [[function_constant(3)]];
      constant int add [[function_constant(4)]];
      kernel void f(device int* y [[buffer(0)]], const constant int& a [[buffer(1)]],
                    const device int* off [[buffer(2), function_constant(twice)]], uint i [[thread_position_in_grid]]) {
        y[i] = (twice ? 2 * off[i] : a) + add;
      }
    """
    run = metal_sim.library(source)
    y, fresh = np.arange(4, dtype=np.int32), np.zeros(4, np.int32)
    out = [run("f", [fresh, 5, None], (4, 1, 1), (4, 1, 1), constants={4: 7})]
    out.append(run("f", [fresh, 5, y], (4, 1, 1), (4, 1, 1), constants={3: True, 4: 7}))
    np.testing.assert_array_equal(np.concatenate([o[0] for o in out]), [12, 12, 12, 12, 7, 9, 11, 13])


# ---------------------------------------------------------------- kernels made wrong on purpose

GROUP = 256
SUM = """
  uint t = thread_position_in_threadgroup.x, g = threadgroup_position_in_grid.x;
  threadgroup float part[8];
  float s = simd_sum(x[thread_position_in_grid.x]);
  if (thread_index_in_simdgroup == 0) part[simdgroup_index_in_threadgroup] = s;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (t == 0) { for (int i = 1; i < 8; i++) s += part[i]; y[g] = s; }
"""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
READ, WRITE = "x[thread_position_in_grid.x]", "y[g] = s;"


def row_sums(source: str, **options: Any) -> float:
    """The error of a kernel that sums 2 rows of 256."""
    x = np.random.default_rng(0).standard_normal((2, GROUP)).astype(np.float32)
    y = launch(source, {"x": x}, {"y": ((2,), np.float32)}, (2 * GROUP, 1, 1), (GROUP, 1, 1), **options)
    return error(y, x.astype(np.float64).sum(1))


def change(old: str, new: str) -> str:
    assert SUM.count(old) == 1
    return SUM.replace(old, new)


STOPPED = {  # in every run: (source, a piece of the message)
    "read past the end": (change(READ, "x[thread_position_in_grid.x + 1]"), "out of bounds at byte 2048 of `x`"),
    "read far away": (change(READ, "x[thread_position_in_grid.x + 100000]"), "out of bounds"),
    "threadgroup memory past the end": (change("i < 8", "i < 9"), "out of bounds at byte 32 of `part`"),
    "write to a const input": (change(WRITE, WRITE + " ((device float*)x)[t] = 0;"), "const buffer `x`"),
    "33 KB of threadgroup memory": (change("part[8]", "part[8448]"), "33792 bytes of threadgroup memory"),
    "barrier that one thread skips": (change(BARRIER, f"if (t != 3) {BARRIER}"), "divergent .* thread 3 "),
    "barrier that a simdgroup skips": (change(BARRIER, f"if (t >= 32) {BARRIER}"), "divergent control flow"),
    "two barriers for one": (
        change(BARRIER, f"if (t < 32) {{ {BARRIER} }}\n else {BARRIER}"),
        "thread 0 waits at line 6, thread 32 waits at line 7",
    ),
    "simd_sum of half a simdgroup": (
        change(f"float s = simd_sum({READ});", f"float s = 0;\n if (t % 32 < 16) s = simd_sum({READ});"),
        "divergent control flow",
    ),
    "return before simd_sum": (change("  float s", "  if (t == 5) return;\n  float s"), "thread 5 has returned"),
}  # fmt: skip

WRONG = {  # seen in the result
    "lost barrier": change(BARRIER, ""),
    "barrier of the simdgroup only": change(BARRIER, "simdgroup_barrier(mem_flags::mem_threadgroup);"),
    "missing lane": change(WRITE, "if (g == 0) y[g] = s;"),
    "read before the start": change(READ, "x[int(thread_position_in_grid.x) - 1]"),
    "uninitialized threadgroup memory": change("thread_index_in_simdgroup == 0", "t == 0"),
}

WIDE = """ }}
  struct Wide {{ float v[8]; }};
  threadgroup Wide room;
  if (t == 64) {{ {} }}
  if (t == 0) {{ for (int i = 0; i < 8; i++) s += 0 * room.v[i]; y[g] = s; """

SANITIZED = {  # only the sanitizers are sure: (source, a piece of the message)
    "lost barrier": (WRONG["lost barrier"], "race on threadgroup memory `part`"),
    "barrier of the simdgroup only": (WRONG["barrier of the simdgroup only"], "race on threadgroup memory `part`"),
    "barrier for other memory": (change(BARRIER, "threadgroup_barrier(mem_flags::mem_device);"), "race on threadgroup"),
    "no barrier before reuse": (
        change(WRITE, WRITE + " } if (thread_index_in_simdgroup == 0) { part[simdgroup_index_in_threadgroup] = 0;"),
        "race on threadgroup memory",
    ),
    "eight floats at once": (
        change(WRITE, WIDE.format("for (int i = 0; i < 8; i++) room.v[i] = s;")),
        "race on threadgroup memory `room`",
    ),
    "a struct at once": (change(WRITE, WIDE.format("room = Wide{{s}};")), "race on threadgroup memory `room`"),
    "two threadgroups write a place": (change("y[g]", "y[0]"), "race on buffer `y`, byte 0"),
    "two threads write a place": (change(WRITE, WRITE + " } if (t < 2) { y[g] = s;"), "race on buffer `y`"),
    "read before the start": (WRONG["read before the start"], "read of 4 bytes out of bounds at byte -4 of `x`"),
    "read in the last 16 bytes": (change("part[8]", "part[7]"), "out of bounds"),
    "misaligned vector": (
        change(WRITE, "float4 q = *(const device float4*)(x + 1 + t); y[g] = s + 0 * q.x + 0 * q.w;"), "misaligned",
    ),
    "thread array past the end": (
        change(WRITE, "float a[4] = {0}; for (uint i = 0; i < 4; i++) a[i] = i; y[g] = s + 0 * a[4 + g];"),
        "array index out of bounds",
    ),
}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_right_kernel_is_right_in_every_order(seed: int) -> None:
    assert row_sums(SUM, seed=seed) < 1e-6
    assert row_sums(change("part[8]", "part[8192]"), seed=seed) < 1e-6, "32 KB are allowed"


@pytest.mark.parametrize("name", STOPPED)
def test_stops(name: str) -> None:
    source, message = STOPPED[name]
    with pytest.raises(MetalError, match=message):
        row_sums(source)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_result(name: str) -> None:
    assert max(row_sums(WRONG[name], seed=seed) for seed in range(3)) > 1e-3


def test_unwritten_elements_are_found() -> None:
    source = "uint i = thread_position_in_grid.x; if (i % 10 != 3) { y[i] = i; h[i] = i; }"
    shapes = {"y": ((50,), np.int32), "h": ((50,), np.float16)}
    for out in launch(source, {}, shapes, (50, 1, 1), (32, 1, 1)):
        np.testing.assert_array_equal(metal_sim.unwritten(out), np.arange(3, 50, 10))


def test_one_threadgroup_has_1024_threads_at_most() -> None:
    with pytest.raises(MetalError, match="more than 1024 threads"):
        launch("y[0] = 1;", {}, {"y": ((1,), np.float32)}, (2048, 1, 1), (1025, 1, 1))


@pytest.mark.sanitize
@pytest.mark.parametrize("name", SANITIZED)
@pytest.mark.parametrize("seed", [0, 1])
def test_sanitizers_stop(name: str, seed: int) -> None:
    source, message = SANITIZED[name]
    with pytest.raises(MetalError, match=message):
        row_sums(source, sanitize="thread", seed=seed)


@pytest.mark.sanitize
@pytest.mark.parametrize("mode", ["address", "thread"])
def test_sanitizers_pass_the_right_kernel(mode: str) -> None:
    for seed in range(3):
        assert row_sums(SUM, sanitize=mode, seed=seed) < 1e-6


# ---------------------------------------------------------------- MLX's own kernels

MLX_VERSION = "0.32.4"
KERNELS = "mlx/backend/metal/kernels"
# Parts of MLX's headers that need Apple's compiler: bfloat overloads on its builtins (the simulator has its own),
# constructors and specializations by address space. None of them is used by the kernels below, or only this much:
STAND_IN = """
template <typename T> struct complex_t { T real, imag; constexpr complex_t(T r, T i) : real(r), imag(i) {} };
typedef complex_t<float> complex64_t;
namespace metal { template <typename P> using pointer_element_t = decltype(msl_plain(*P())); }
"""
LEFT_OUT = ("bf16_math.h", "complex.h", "logging.h", "steel/utils/type_traits.h")


@pytest.fixture(scope="session")
def mlx_headers(request: pytest.FixtureRequest) -> Path:
    """The include folder of the mlx-metal wheel: MLX_METAL_HEADERS, else downloaded once (45 MB) by pip."""
    if given := os.environ.get("MLX_METAL_HEADERS"):
        return Path(given)
    assert request.config.cache is not None
    folder = Path(request.config.cache.mkdir("mlx_metal")) / MLX_VERSION
    if not (folder / "done").exists():
        wheel = ["--only-binary=:all:", "--platform", "macosx_14_0_arm64", "--python-version", "3.12"]
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *wheel, "-d", str(folder)]
        subprocess.run([*pip, f"mlx-metal=={MLX_VERSION}"], check=True)
        for path in folder.glob("*.whl"):
            with zipfile.ZipFile(path) as archive:
                archive.extractall(folder, [n for n in archive.namelist() if KERNELS in n])
            path.unlink()
        (folder / "done").touch()
    return folder / "mlx" / "include"


def mlx_library(headers: Path, *names: str) -> Any:
    includes = "".join(f'#include "{KERNELS}/{n}"\n' for n in ("utils.h", *names))
    return metal_sim.library(STAND_IN + includes, headers, LEFT_OUT)


def mlx_kernel(name: str, kind: str, headers: Path, sanitize: str | None) -> float:
    """The error of one of MLX's kernels in the simulator against MLX on the CPU in fp32."""
    rng = np.random.default_rng(0)
    dtype, zero = DTYPES[kind], np.zeros(1, np.int64)

    def random(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape).astype(dtype)

    def fp32(a: Any) -> mx.array:
        return mx.array(np.asarray(a, np.float32))

    if name == "sdpa_vector":
        heads, kv_heads, length, dim = 4, 2, 77, 64
        q, k, v = random(1, heads, 1, dim), random(1, kv_heads, length, dim), random(1, kv_heads, length, dim)
        strides = [np.uint64(n) for n in (length * dim, dim, length * dim, dim)]
        buffers = [q, k, v, np.zeros_like(q), heads // kv_heads, length, *strides, dim**-0.5, *[None] * 7]
        run = mlx_library(headers, "sdpa_vector.h")
        size = {"grid": (1024 * heads, 1, 1), "threadgroup": (1024, 1, 1), "arguments": f"<{kind}, {dim}, {dim}>"}
        (out,) = run(name, buffers, **size, sanitize=sanitize)
        return error(out, mx.fast.scaled_dot_product_attention(fp32(q), fp32(k), fp32(v), scale=dim**-0.5))
    rows, n, k = (1 if name == "affine_qmv" else 40), 64, 512
    x, w = random(rows, k), random(n, k)
    codes, scales, biases = (np.asarray(a) for a in mx.quantize(fp32(w), group_size=64, bits=4))
    scales, biases = scales.astype(dtype), biases.astype(dtype)
    shapes = [0, zero.astype(np.int32), zero, 0, zero.astype(np.int32), zero, zero, zero]
    buffers = [codes, scales, biases, x, np.zeros((rows, n), dtype), k, n, *([rows] if rows > 1 else []), *shapes]
    run = mlx_library(headers, "steel/gemm/gemm.h", "quantized_utils.h", "quantization.h")
    if rows == 1:
        size = {"grid": (32, 2 * (n // 8), 1), "threadgroup": (32, 2, 1), "arguments": f"<{kind}, 64, 4, false>"}
    else:
        size = {
            "grid": (32 * (n // 32), 2 * 2, 2),
            "threadgroup": (32, 2, 2),
            "arguments": f"<{kind}, 64, 4, true, false>",
        }
    (out,) = run(name, buffers, **size, sanitize=sanitize)
    quantized = [mx.array(codes), fp32(scales), fp32(biases)]
    return error(out, mx.quantized_matmul(fp32(x), *quantized, group_size=64, bits=4))


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("name", ["affine_qmv", "affine_qmm_t", "sdpa_vector"])
def test_mlx_kernels(name: str, kind: str, mlx_headers: Path) -> None:
    assert mlx_kernel(name, kind, mlx_headers, None) <= TOLERANCE[kind]


@pytest.mark.sanitize
@pytest.mark.parametrize("name", ["affine_qmv", "affine_qmm_t", "sdpa_vector"])
def test_mlx_kernels_have_no_races(name: str, mlx_headers: Path) -> None:
    assert mlx_kernel(name, "bfloat", mlx_headers, "thread") <= TOLERANCE["bfloat"]
