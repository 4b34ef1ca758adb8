"""Making ready on NVIDIA, without such a GPU: what is compiled, by how many threads, and what the disk keeps."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from recorded import HERE

from mlx_gemma4 import load
from mlx_gemma4.doctor import ready, verdict
from mlx_gemma4.gpu import cuda_compiler, render
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.op import OpKey


class Compiler:
    """In NVRTC's place: notes texts, and waits until another thread compiles too."""

    def __init__(self, threads: int = 1) -> None:
        self.compiled: list[str] = []
        self.together, self.met = threading.Barrier(threads), False

    def __call__(self, text: str, name: str, architecture: str) -> bytes:
        assert f"void {name}(" in text.replace("LAUNCH_BOUNDS ", "") and architecture == "sm_90"
        if not self.met:
            self.together.wait(10)
            self.met = True
        self.compiled.append(text)
        if name.startswith("embed"):
            raise RuntimeError("NVRTC can't compile embed")
        return b"machine code"


@pytest.fixture
def nvidia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model on a machine with such a GPU, whose kernels have all been checked."""
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cuda_compiler, "device_info", lambda: {"architecture": "sm_90"})
    monkeypatch.setattr(cuda_compiler, "_version", lambda: "13.0")
    monkeypatch.setattr(verdict, "check_model", lambda model, wanted, done: [done() for _ in wanted] and [])
    plain = load(HERE / "e2b-q4_k_m.gguf", weights="packed").model
    return Model(plain.config, plain.weights, Kernels(render.cuda_launcher))


def test_all_is_compiled_on_all_cores_once(nvidia: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later process finds all but what can't be compiled; progress counts texts and checks in both."""
    monkeypatch.setattr(cuda_compiler.os, "sched_getaffinity", lambda _: {0, 1, 2})
    first, later, counts = Compiler(3), Compiler(), []
    monkeypatch.setattr(cuda_compiler, "compile_text", first)
    ready.make_ready(nvidia, lambda *seen: counts.append(seen))
    assert first.met and len(set(first.compiled)) == len(first.compiled) > 30
    assert counts == [(n, len(counts)) for n in range(1, len(counts) + 1)]
    failed = {text for text in first.compiled if " embed_" in text}  # of the two tables
    assert len(list(tmp_path.glob("*.ptx"))) == len(first.compiled) - len(failed)

    monkeypatch.setattr(cuda_compiler, "compile_text", later)
    ready.make_ready(nvidia)
    assert set(later.compiled) == failed and len(failed) == len(later.compiled) == 2

    nvidia.kernels.off |= {OpKey("embed")}  # type: ignore[union-attr]
    ready.make_ready(nvidia)
    assert len(later.compiled) == 2


def test_what_was_lost_is_compiled_again(nvidia: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_compiler, "compile_text", Compiler())
    ready.make_ready(nvidia)
    lost = sorted(tmp_path.glob("*.ptx"))[::5]
    for file in lost:
        file.unlink()
    again = Compiler()
    monkeypatch.setattr(cuda_compiler, "compile_text", again)
    ready.make_ready(nvidia)
    assert len(again.compiled) == len(lost) + 2 and all(file.is_file() for file in lost)


def test_on_a_cpu_nothing_happens(lm: Any) -> None:
    ready.make_ready(lm.model, lambda *_: pytest.fail("something is made ready"))


@pytest.mark.parametrize("kind", ["e2b", "26b-a4b"])
def test_a_first_prompt_takes_all_paths(kind: str) -> None:
    """Where MLX compiles at first use: tiles of weights, experts' groups, a step."""
    plain = load(HERE / f"{kind}-q8_0.gguf", weights="packed").model
    launched: set[str] = set()

    def launcher(*, name: str, **_: Any) -> Any:
        def call(*, output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
            launched.add(name.rsplit("_", 1)[0])
            return [mx.zeros(s, t) for s, t in zip(output_shapes, output_dtypes, strict=True)]

        return call

    ready.read_some(Model(plain.config, plain.weights, Kernels(launcher, traced=True)))
    assert {"expand", "halve", "add_norm", "attention", "merge"} | ({"grouped"} if "26b" in kind else set()) <= launched
