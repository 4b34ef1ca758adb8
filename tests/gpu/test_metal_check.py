"""The check of Metal texts against Apple's compiler: cases of every class, MLX's own kernels, the command line."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import metal_sim
import pytest
from metal_sim.frontend import examine
from on_metal import CASES, WHOLE, cases

FOLDER = Path(metal_sim.__file__).parent


def wrong_verdicts(path: Path, refused: bool) -> list[str]:
    """The cases of a file that come out wrong."""
    listed = list(cases(path))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda c: examine(c[1]), listed)
        return [
            f"{name}: {errors[0] if errors else 'taken'}"
            for (name, _), errors in zip(listed, found, strict=True)
            if bool(errors) != refused
        ]


@pytest.mark.parametrize("name", sorted(p.stem for p in (CASES / "refused").iterdir()))
def test_refuses(name: str) -> None:
    assert wrong_verdicts(CASES / "refused" / f"{name}.metal", True) == []


@pytest.mark.parametrize("name", sorted(p.stem for p in (CASES / "accepted").iterdir()))
def test_accepts(name: str) -> None:
    assert wrong_verdicts(CASES / "accepted" / f"{name}.metal", False) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("void g(float* p) {}", "2:1: error: pointer type must have explicit address space qualifier"),
        ("struct S {\n  thread float* p;\n  float& r;\n};", "4:1: error: reference type must have explicit"),
        ("int n;", "2:1: error: program scope variable must reside in constant address space"),
        ("#define P(n) float* n\n\n\nvoid g(P(p)) {}", "5:1: error: pointer type must have explicit"),
        ("kernel int f(device float* y [[buffer(0)]]) { return 0; }", "2:1: error: a kernel function must return void"),
        ("// double\nvoid g() {\n  double x;\n}", "4:1: error: 'double' is not supported in Metal"),
        ("void g() {\n  auto f = [] { return 1; };\n}", "3:1: error: lambda expressions are not supported"),
    ],
)
def test_says_what_is_wrong_and_where(text: str, reason: str) -> None:
    assert reason in str(examine("#include <metal_stdlib>\n" + text + "\n")[0])


# ---------------------------------------------------------------- MLX's own kernels, which Apple's compiler takes

HEADERS = "mlx/backend/metal/kernels"
INSTANCES = {  # header: kernels, as MLX's .metal files instantiate them
    "softmax.h": ["softmax_single_row<bfloat16_t, float>", "softmax_looped<half, float>"],
    "logsumexp.h": ["logsumexp<half>"],
    "gemv.h": ["gemv<bfloat16_t, 1, 8, 1, 32, 4, 4, false, true>", "gemv_t<half, 1, 2, 8, 4, 4, 4, true, false>"],
    "sdpa_vector.h": ["sdpa_vector<bfloat16_t, 256, 256>", "sdpa_vector_2pass_2<half, 128>"],
    "quantized.h": [
        "affine_qmv<bfloat16_t, 64, 4, false>", "affine_qmm_t<half, 64, 4, true, false>",
        "affine_quantize<float, 32, 8>",
    ],
    "fp_quantized.h": ["fp_qmv<bfloat16_t, 32, 4, false>", "fp_qmm_t<half, 32, 8, true, false>"],
    "steel/gemm/kernels/steel_gemm_fused.h": ["gemm<half, 64, 64, 16, 2, 2, false, true, float>"],
    "steel/gemm/kernels/steel_gemm_splitk.h": [
        "gemm_splitk<bfloat16_t, float, 32, 32, 16, 2, 2, false, true, true, true>",
    ],
    "steel/attn/kernels/steel_attention.h": ["attention<bfloat16_t, 32, 16, 128, 128, 4, 1, bool, float>"],
}  # fmt: skip
BEFORE = {
    "quantized.h": [f"{HEADERS}/steel/gemm/gemm.h", f"{HEADERS}/quantized_utils.h"],
    "fp_quantized.h": [f"{HEADERS}/steel/gemm/gemm.h", f"{HEADERS}/quantized_utils.h"],
    "steel/gemm/kernels/steel_gemm_fused.h": [f"{HEADERS}/steel/gemm/gemm.h"],
    "steel/gemm/kernels/steel_gemm_splitk.h": [f"{HEADERS}/steel/gemm/gemm.h"],
}  # fmt: skip


@pytest.mark.parametrize("header", INSTANCES)
def test_takes_mlx_kernels(header: str) -> None:
    spec = importlib.util.find_spec("mlx")
    assert spec and spec.submodule_search_locations
    root = next(p for p in map(Path, spec.submodule_search_locations) if (p / "include" / HEADERS / header).exists())
    includes = [f"{HEADERS}/utils.h", *BEFORE.get(header, []), f"{HEADERS}/{header}"]
    text = "#include <metal_stdlib>\n" + "".join(f'#include "{i}"\n' for i in includes)
    text += "".join(
        f'template [[host_name("k{n}")]] [[kernel]] decltype({k}) {k};\n' for n, k in enumerate(INSTANCES[header])
    )
    assert [str(e) for e in examine(text, include=[root / "include"])] == []


# ---------------------------------------------------------------- the command


def command(*files: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, FOLDER / "check.py", *files], text=True, capture_output=True)


def test_command_line(tmp_path: Path) -> None:
    good, bad, gone = tmp_path / "good.metal", tmp_path / "bad.metal", tmp_path / "gone.metal"
    good.write_text("kernel void f(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i] = 1; }")
    bad.write_text(f"{WHOLE}\nvoid g(float* p) {{}}\n")
    done = command(good)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ok {good}\n", "")
    done = command(bad, good, bad)
    refused = f"refused {bad}: line 4: pointer type must have explicit address space qualifier\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, f"{refused}ok {good}\n{refused}", "")
    done = command(good, gone)
    assert done.returncode == 2
    assert done.stdout == f"ok {good}\n"
    assert done.stderr.count("\n") == 1


def test_command_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.metal"
    path.write_text("int n;\n")
    monkeypatch.setenv("METAL_SIM_CC", str(tmp_path / "no-such-compiler"))
    done = command(path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
