"""What kernels compute in the Metal simulator, against numpy: positions, SIMD-group functions, element types, math."""

from __future__ import annotations

import metal_sim
import numpy as np
import pytest
from metal_sim import MetalError
from sim_cases import BF16, DTYPES, error, launch


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
