"""The Metal simulator's type check: what Apple's compiler refuses, and what it accepts."""

from __future__ import annotations

import metal_sim
import numpy as np
import pytest
from metal_sim import MetalError
from sim_cases import launch

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
    "double": ("double d = x[0]; y[0] = float(d);", "not supported"),
    "new": ("y[0] = *new float(1);", "not supported"),
    "goto": ("if (gid.x) goto end; y[0] = 1; end: y[1] = 2;", "not supported"),
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
    "threadgroup with a value": ("threadgroup float s[4] = {1}; y[0] = s[0];", "address space"),
    "matrix from thread memory": ("float s[64]; simdgroup_float8x8 m; simdgroup_load(m, s);", "no matching function"),
    "lambda": ("auto f = [&](float a) { return a + x[0]; }; y[0] = f(1.0f);", "lambda"),
    "uninitialized": ("float a; y[0] = a;", "uninitialized"),
}  # fmt: skip
ACCEPTED = {
    "float to half": "half h = x[0]; y[0] = h;",
    "cast to bfloat": "bfloat b = static_cast<bfloat>(x[0]); b = b * b; y[0] = float(b);",
    "integer to bfloat": "bfloat b = 1; y[0] = b;",
    "struct copies": "Pair p = *(const device Pair*)x; threadgroup Pair s[2]; s[0] = p; s[1] = s[0]; y[0] = p.a;",
    "reference to device": "const device float& r = x[1]; y[0] = r;",
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
