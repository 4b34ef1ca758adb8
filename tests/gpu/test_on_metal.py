"""What Apple's compiler and GPU say of the checker's cases and of our kernels.

The first part needs a Mac (.github/workflows/mac.yml) and is skipped elsewhere. METAL_TESTS=gpu has the tests of
tests/ops run their kernels on its GPU too.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kernel_cases
import mlx.core as mx
import numpy as np
import on_metal
import pytest
from kernel_cases import metal
from metal_sim.frontend import examine

from mlx_gemma4.doctor import table
from mlx_gemma4.ops.cases import Product, Sizes

FILES = sorted(path for kind in ("accepted", "refused") for path in (on_metal.CASES / kind).iterdir())
SIZES = on_metal.all_sizes()
needs_metal = pytest.mark.skipif(not mx.metal.is_available(), reason="needs Apple's compiler: MLX has no Metal here")
all_files = pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
METAL_4 = 26  # the macOS from which on MLX compiles Metal 4, which is C++17


# ---------------------------------------------------------------- on a Mac


@pytest.fixture
def gpu() -> Iterator[Any]:
    """MLX's launcher, with MLX on the GPU."""
    before = mx.default_device()
    mx.set_default_device(mx.gpu)
    yield mx.fast.metal_kernel
    mx.set_default_device(before)


@needs_metal
@all_files
def test_apple_agrees_with_the_checker(path: Path, gpu: Any) -> None:
    if path.stem == "language_version" and int(platform.mac_ver()[0].split(".")[0]) >= METAL_4:
        pytest.skip("Metal 4 may take what these are refused for on macOS 14 and 15")
    assert on_metal.wrong_verdicts(path, gpu) == []


@needs_metal
@pytest.mark.parametrize("name", SIZES)
def test_kernels_are_right_on_this_gpu(name: str, gpu: Any) -> None:
    """Compiled as a model of these sizes launches them."""
    assert on_metal.ill_kernels(SIZES[name], gpu) == {}


# ---------------------------------------------------------------- anywhere: put to our checker and simulator

ARGUMENTS = "const constant float* probe_in [[buffer(0)]], device float* probe_out [[buffer(1)]]"


def checker(**declared: Any) -> Any:
    """A launcher that asks our checker, with the text that MLX would render, and fails as MLX does."""

    def call(**arguments: Any) -> list[mx.array]:
        text = f"{declared['header']}[[kernel]] void custom_kernel_probe({ARGUMENTS}) {{\n{declared['source']}\n}}\n"
        if wrong := examine(text, preamble=True):
            raise RuntimeError(f"[metal::Device] Unable to build metal library from source\n{wrong[0].message}")
        return [arguments["inputs"][0] + 1]

    return call


@pytest.mark.slow
@all_files
def test_cases_keep_their_verdicts_as_they_are_asked(path: Path) -> None:
    """Behind MLX's preamble and before a kernel of ours, all but those that `RIGHT_BEHIND_MLX` lists."""
    assert on_metal.wrong_verdicts(path, checker) == []


def test_wrong_verdicts_are_told(tmp_path: Path) -> None:
    for kind in ("accepted", "refused"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "a.metal").write_text("// case: right\n>> y[i] = 1;\n// case: wrong\n>> y[i] = z;\n")
    (wrong,) = on_metal.wrong_verdicts(tmp_path / "accepted" / "a.metal", checker)
    assert wrong.startswith("wrong: [metal::Device] Unable to build metal library from source") and "'z'" in wrong
    assert on_metal.wrong_verdicts(tmp_path / "refused" / "a.metal", checker) == ["right: taken"]


def test_a_failure_that_is_no_verdict_ends_the_test() -> None:
    def full(**_: Any) -> Any:
        def call(**_: Any) -> Any:
            raise RuntimeError("[malloc] Unable to allocate 4 bytes")

        return call

    with pytest.raises(RuntimeError, match="malloc"):
        on_metal.refusal("", full)


TINY = Sizes(64, 256, (), (Product("Q4_0", (32, 64)),), "Q4_0")


def test_kernels_that_are_ill_are_told() -> None:
    def forgetful(**declared: Any) -> Any:
        kernel = metal(**declared)
        name = declared["name"]
        return lambda **arguments: [0 * a if name.startswith("matvec_") else a for a in kernel(**arguments)]

    assert on_metal.ill_kernels(TINY, metal) == {}
    assert on_metal.ill_kernels(TINY, forgetful) == {"matvec Q4_0: 32x64 fp32": "gives wrong numbers"}


def test_every_published_model_is_asked_about() -> None:
    assert set(table.real_sizes()) < set(SIZES)


def test_kernels_go_to_the_gpu_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the GPU's stream and outputs that begin as NaN, or as 0xCD where there is no NaN."""
    asked: list[dict[str, Any]] = []

    def fake(**declared: Any) -> Any:
        return lambda **arguments: asked.append({**declared, **arguments}) or ["made"]

    monkeypatch.setattr(mx.fast, "metal_kernel", fake)
    monkeypatch.setenv("METAL_TESTS", "gpu")
    for dtypes in ([mx.float16, mx.float32], [mx.uint8]):
        assert kernel_cases.metal(name="k")(inputs=[], output_dtypes=dtypes) == ["made"]
    assert [(a["name"], a["stream"]) for a in asked] == [("k", mx.gpu)] * 2
    assert np.isnan(asked[0]["init_value"]) and asked[1]["init_value"] == 0xCD
