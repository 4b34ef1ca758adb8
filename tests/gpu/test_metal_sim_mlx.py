"""MLX's own kernels, which Apple's compiler accepts, in the Metal simulator; headers from the `mlx-metal` wheel."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import metal_sim
import mlx.core as mx
import numpy as np
import pytest
from sim_cases import DTYPES, TOLERANCE, error

MLX_VERSION = "0.32.4"
KERNELS = "mlx/backend/metal/kernels"
# Parts of MLX's headers that do not run: bfloat overloads on builtins of Apple's (the simulator has its own),
# constructors and specializations by address space. They are checked; the kernels below run with only this much:
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
    parent = Path(request.config.cache.mkdir("mlx_metal"))
    folder = parent / f"{MLX_VERSION}-headers"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=parent) as scratch:
            wheel = ["--only-binary=:all:", "--platform", "macosx_14_0_arm64", "--python-version", "3.12"]
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *wheel, "-d", scratch]
            subprocess.run([*pip, f"mlx-metal=={MLX_VERSION}"], check=True)
            (path,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(path) as archive:
                archive.extractall(scratch, [n for n in archive.namelist() if KERNELS in n])
            with contextlib.suppress(OSError):  # another process was first
                (Path(scratch) / "mlx" / "include").rename(folder)
    return folder


def mlx_library(headers: Path, *names: str) -> Any:
    includes = "".join(f'#include "{KERNELS}/{n}"\n' for n in ("utils.h", *names))
    return metal_sim.library(includes, headers, LEFT_OUT, STAND_IN)


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
    run = mlx_library(headers, "steel/gemm/gemm.h", "quantized_utils.h", "quantized.h")
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
