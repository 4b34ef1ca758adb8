"""The packed mat-vec, run thread by thread on the Metal simulator, against plain numpy in double precision.

Where there is a GPU (`pytest -k device` on a Mac, or with MLX's CUDA backend), the same tests run on it too.

Outputs start as NaN (the simulator poisons them). The reference is rounded to the output's dtype, so that what is
measured is the kernel's own error: ||got - want|| / ||want|| at most 1e-3 for 16-bit types, 1e-5 for fp32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import metal_sim
import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import exact, random, weight

from mlx_gemma4.gpu import cuda_compiler, render
from mlx_gemma4.ops import matvec
from mlx_gemma4.ops.epilogue import Epilogue, Folded
from mlx_gemma4.ops.packed import planes
from mlx_gemma4.quant.formats import FORMATS, Packed

LIMITS = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 1e-3}
DTYPES = list(LIMITS)
NUMPY = {mx.float32: np.float32, mx.float16: np.float16, mx.bfloat16: ml_dtypes.bfloat16}
CONFIGS = [  # by turns, so that every kind of tiling meets several formats
    matvec.Tiling(lanes=8, rows=2, split=4, simdgroups=4, prefetch=False),
    matvec.Tiling(lanes=16, rows=4, split=1, simdgroups=2, prefetch=True),
    matvec.Tiling(lanes=4, rows=2, split=2, simdgroups=4, chunk=64, prefetch=False),
    matvec.Tiling(lanes=32, rows=2, split=1, simdgroups=1, prefetch=True),
    matvec.Tiling(lanes=8, rows=4, split=2, simdgroups=2, chunk=64, prefetch=True),
]


LAUNCHERS = {"simulator": metal_sim.kernel, "device": render.default_launcher()}


@pytest.fixture(params=[name for name, made in LAUNCHERS.items() if made])
def launcher(request: pytest.FixtureRequest) -> Iterator[render.Launcher]:
    """What runs the kernels."""
    device = mx.default_device()
    if request.param == "device":
        mx.set_default_device(mx.gpu)
    yield LAUNCHERS[request.param]
    mx.set_default_device(device)


def close(got: Any, want: np.ndarray, dtype: mx.Dtype) -> None:
    want = want.astype(NUMPY[dtype]).astype(np.float64)
    assert got.dtype == (dtype if isinstance(got, mx.array) else NUMPY[dtype])
    error = np.linalg.norm(exact(got) - want) / np.linalg.norm(want)
    assert error <= LIMITS[dtype], f"relative error {error:.1e}"


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


def rms(x: np.ndarray, weight: np.ndarray | float = 1.0, eps: float = 1e-6) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


# ---------------------------------------------------------------- mat-vec


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_matvec(name: str, dtype: mx.Dtype, launcher: render.Launcher) -> None:
    """Rows that fill no threadgroup, lengths that fill no step: 704 is the expert width of 26B-A4B."""
    config = CONFIGS[(list(FORMATS).index(name) + DTYPES.index(dtype)) % len(CONFIGS)]
    size = FORMATS[name].layout.size
    lengths = (256, 1280) if size == 256 else (size, 640 if size == 128 else 704) if size > 32 else (64, 704)
    for n, k in zip((9, 45), lengths, strict=True):
        w, values = weight(name, n, k)
        x = random(1, 1, k, dtype=dtype)
        close(matvec.matvec(launcher, x, w, config=config), exact(x) @ values.T, dtype)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.lanes}x{config.rows}x{config.split}")
def test_configurations(config: matvec.Tiling, launcher: render.Launcher) -> None:
    """A type with pairs and mins under every tiling, several tokens at once."""
    w, values = weight("Q4_K", 45, 1280)
    x = random(2, 3, 1280, dtype=mx.float16)
    close(matvec.matvec(launcher, x, w, config=config), exact(x) @ values.T, mx.float16)


@pytest.mark.parametrize("name", FORMATS)
def test_two_rows(name: str, launcher: render.Launcher) -> None:
    """In a text of their own and the tiling of one, also where x is given as a part of it."""
    w, values = weight(name, 45, 1280)
    x, times = random(5, 2, 1280, dtype=mx.float16), random(6, 2, 45, dtype=mx.float16)
    close(matvec.matvec(launcher, x, w), exact(x) @ values.T, mx.float16)
    part = Epilogue(factor=1 / 16, out=mx.float32, given=1 / 4)
    want = gelu(4 * exact(x) @ values.T) * exact(times) / 16
    close(matvec.matvec(launcher, x, w, part, Folded(times=times)), want, mx.float32)


def test_the_tiling_of_one_row_serves_two() -> None:
    for n, k in ((2560, 1536), (1536, 12288), (24576, 1536), (43008, 5376)):
        one, two = (matvec.tiling(FORMATS["Q4_K"], n, k, tokens) for tokens in (1, 2))
        assert one == two


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "IQ4_XS"])
def test_short_rows_narrow_the_loads(name: str, launcher: render.Launcher) -> None:
    """An odd number of 32s: chunks of 64 do not fit, nor 16-byte loads."""
    k = 96 if name == "Q4_0" else 256
    w, values = weight(name, 33, k)
    x = random(3, 1, k)
    close(matvec.matvec(launcher, x, w, config=CONFIGS[2]), exact(x) @ values.T, mx.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_gate_up(name: str, dtype: mx.Dtype, launcher: render.Launcher) -> None:
    """RMSNorm, gate and up, GEGLU, a factor, in one, for two tokens."""
    w, values = weight(name, 2 * 35, 512)
    x, norm = random(4, 2, 512, dtype=dtype), mx.abs(random(5, 512)) + 0.5
    gate, up = np.split(rms(exact(x), exact(norm)) @ values.T, 2, axis=-1)
    got = matvec.matvec(launcher, x, w, Epilogue(glu=True, factor=1 / 16), Folded(norm), config=CONFIGS[0])
    close(got, gelu(gate) * up / 16, dtype)


def test_gelu_times(launcher: render.Launcher) -> None:
    """The gate of per-layer embeddings: GELU, times the token's own embedding."""
    w, values = weight("Q5_K", 40, 512)
    x, times = random(9, 2, 512, dtype=mx.float16), random(10, 2, 40, dtype=mx.float16)
    got = matvec.matvec(launcher, x, w, folded=Folded(times=times), config=CONFIGS[0])
    close(got, gelu(exact(x) @ values.T) * exact(times), mx.float16)


def test_experts_whose_gate_and_up_are_apart(launcher: render.Launcher) -> None:
    """Up's rows of each chosen expert, then gate's: GELU, times those."""
    w, values = weight("Q4_K", 3, 24, 256)
    x, times, ids = random(9, 1, 256), random(10, 2, 24), mx.array([2, 0], mx.int32)
    got = matvec.matvec(launcher, x, w, Epilogue(factor=1 / 16), Folded(times=times, ids=ids))
    want = values[[2, 0]] @ exact(x)[0]
    close(got, gelu(want) * exact(times) / 16, mx.float32)


def test_gate_up_far_from_zero(launcher: render.Launcher) -> None:
    """GELU neither overflows nor loses its sign at gates in the thousands."""
    w, values = weight("Q8_0", 2 * 8, 64)
    x = random(6, 1, 64) * 1000
    gate, up = np.split(exact(x) @ values.T, 2, axis=-1)
    assert np.abs(gate).max() > 1e3
    close(matvec.matvec(launcher, x, w, Epilogue(glu=True), config=CONFIGS[0]), gelu(gate) * up, mx.float32)


@pytest.mark.parametrize("name", ["Q4_K", "Q5_1", "IQ4_NL"])
def test_experts(name: str, launcher: render.Launcher) -> None:
    """Rows of the chosen experts only, for one shared input and for one each."""
    k = 256 if name == "Q4_K" else 704
    w, values = weight(name, 5, 2 * 18, k)
    ids = mx.array([3, 0, 4], mx.int32)
    for rows in (1, 3):
        x = random(7, rows, k, dtype=mx.float16)
        products = np.einsum("enk,ek->en", values[[3, 0, 4]], np.broadcast_to(exact(x), (3, k)))
        got = matvec.matvec(launcher, x, w, folded=Folded(ids=ids), config=CONFIGS[0])
        close(got, products, mx.float16)
        gate, up = np.split(products, 2, axis=-1)
        got = matvec.matvec(launcher, x, w, Epilogue(glu=True), Folded(ids=ids), config=CONFIGS[1])
        close(got, gelu(gate) * up, mx.float16)


def test_own_tiling(launcher: render.Launcher) -> None:
    """The tiling that is chosen for a shape, many rows and few."""
    for n, k in ((8200, 64), (50, 2880)):
        w, values = weight("Q8_0", n, k)
        x = random(11, 1, k, dtype=mx.float16)
        close(matvec.matvec(launcher, x, w), exact(x) @ values.T, mx.float16)


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "IQ4_XS"])
def test_staged_x_has_no_race(name: str) -> None:
    """x under a norm goes through threadgroup memory, two steps by turns; 45 rows leave lanes without work."""

    def racing(**declared: Any) -> Any:
        kernel = metal_sim.kernel(**declared)
        return lambda **arguments: kernel(seed=3, sanitize="thread", **arguments)

    w, values = weight(name, 45, 1280)
    x, norm = random(12, 1, 1280), mx.abs(random(13, 1280)) + 0.5
    config = matvec.Tiling(lanes=8, rows=4, split=3, simdgroups=6)
    want = rms(exact(x), exact(norm)) @ values.T
    close(matvec.matvec(racing, x, w, folded=Folded(norm), config=config), want, mx.float32)


def test_cuda_text_keeps_threadgroup_memory_shared() -> None:
    """Each threadgroup variable of every kernel becomes __shared__, and no word of Metal's address spaces is left."""
    for file in (
        "matvec.metal",
        "attention.metal",
        "long_attention.metal",
        "norms.metal",
        "choose.metal",
        "qkv.metal",
        "embed.metal",
    ):
        metal = re.sub(r"(?m)//.*$", "", render._text(file))
        cuda = render.to_cuda(metal)
        declared = re.findall(r"(?m)^\s*threadgroup \w+ (\w+)(?:\[.*\])*;", metal)
        assert declared == re.findall(r"(?m)^\s*__shared__ \w+ (\w+)(?:\[.*\])*;", cuda)
        assert not re.search(r"\b(threadgroup|device|constant|thread)\s", cuda)
    assert "__shared__ float4 staged" in render.to_cuda(render._text("matvec.metal"))


@pytest.mark.parametrize("name", FORMATS)
def test_cuda_knows_the_types_of_planes(name: str) -> None:
    """Of each array of a weight, so tables of 16 bits as well."""
    made = {n: a for n, a in planes(weight(name, 8, 256)[0]).items() if a is not None}
    text = cuda_compiler.text("k", [*made], [], "", "", [a.dtype for a in made.values()], [])
    assert all(n in text for n in made)


# What cuda.h has as instructions of NVIDIA's, for the simulator.
EMULATED = """
#define CUDA 1
#define INPUTS_READY()
METAL_FUNC uint bytes_or_signs(uint a, uint b, uint selector) {
  uint four = 0;
  for (int i = 0; i < 4; i++) {
    const uint at = selector >> (4 * i), byte = ((at & 4u ? b : a) >> (8 * (at & 3u))) & 0xFFu;
    four |= (at & 8u ? (byte & 0x80u ? 0xFFu : 0u) : byte) << (8 * i);
  }
  return four;
}
METAL_FUNC float max_or_nan(float a, float b) { return a != a || a > b ? a : b; }
METAL_FUNC int dot4(uint x0, uint x1, uint w, int sum) {
  const uint x[2] = {x0, x1};
  for (int i = 0; i < 4; i++) sum += (int(x[i / 2] << (16 - i % 2 * 16)) >> 16) * (int(w << (24 - i * 8)) >> 24);
  return sum;
}
"""


def as_cuda(name: str, input_names: Any, output_names: Any, source: str, header: str) -> Any:
    """A launcher: the simulator, with the text that is CUDA's."""
    return metal_sim.kernel(name, input_names, output_names, source, header=EMULATED + header)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if not form.is_affine])
def test_tables_by_bytes(name: str, dtype: mx.Dtype) -> None:
    """Look-up types, grids, trits and bits as on CUDA: values as bytes, x as whole numbers, outliers or none."""
    w, values = weight(name, 45, 1280)
    for factor, limit in ((1, 2e-5), (1000, 1e-4)):
        x = np.array(random(14, 1, 1280))
        x[0, 7::64] *= factor
        x[0, 64:96] = 0
        few = mx.array(x).astype(dtype)
        for config in (CONFIGS[0], CONFIGS[2], matvec.Tiling(lanes=16, rows=8, split=3, simdgroups=3)):
            (got,) = np.array(matvec.matvec(as_cuda, few, w, Epilogue(out=mx.float32), config=config))
            (want,) = exact(few) @ values.T
            assert np.linalg.norm(got - want) / np.linalg.norm(want) <= limit
    for odd in (np.nan, np.inf):
        x[0, 40] = odd
        (got,) = np.array(
            matvec.matvec(as_cuda, mx.array(x).astype(dtype), w, Epilogue(out=mx.float32), config=CONFIGS[0])
        )
        assert not np.isfinite(got).any()


@pytest.mark.parametrize("name", ["IQ4_NL", "MXFP4"])
def test_every_pair_of_codes_by_bytes(name: str) -> None:
    """All 256 bytes of codes, at each of the 4 places of a word, against each of its 8 numbers alone: exact."""
    codes = np.zeros((256, 32), np.uint32)
    patterns = np.arange(256, dtype=np.uint32)
    for i in range(32):  # a word holds one pattern four times, then three others
        codes[:, i] = patterns * 0x01010101 if i % 2 else patterns | patterns[::-1] << 8 | (patterns ^ 85) << 16
    w = Packed(
        FORMATS[name],
        (256, 256),
        mx.array(codes),
        mx.full((256, 8), 128, mx.uint8) if name == "MXFP4" else None,
        None if name == "MXFP4" else mx.ones((256, 8, 1), mx.float16),
    )
    lut = np.array(FORMATS[name].lut)
    for j in range(8):
        x = np.zeros((1, 256), np.float32)
        x[0, 8 + j] = 3
        x[0, 16 + j] = 5
        got = matvec.matvec(as_cuda, mx.array(x).astype(mx.float16), w, Epilogue(out=mx.float32), config=CONFIGS[0])
        value = [lut[(codes[:, word] >> (4 * j)) & 15] for word in (1, 2)]
        assert np.array_equal(np.array(got)[0], 3 * value[0] + 5 * value[1])


def test_logits_in_fp32(launcher: render.Launcher) -> None:
    w, values = weight("Q6_K", 40, 512)
    x = random(8, 1, 512, dtype=mx.bfloat16)
    close(matvec.matvec(launcher, x, w, Epilogue(out=mx.float32), config=CONFIGS[0]), exact(x) @ values.T, mx.float32)
