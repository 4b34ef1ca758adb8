"""Compiles the kernels that the published models launch on an NVIDIA GPU, on a machine without one.

    python benchmarks/precompile.py FOLDER [--architecture sm_90] [--models e2b 31b]

In: nothing; weights and states are lazy zeros of the full sizes that nothing evaluates. Out: compiled kernels in FOLDER
and a line a model; the exit code is 1 if one doesn't compile. A machine with such a GPU finds them, and starts at once,
where MLX_PTX_CACHE_DIR names FOLDER and NVRTC has the same version. NVRTC and CUDA's headers must be here
(pip install nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-cccl, or a toolkit under CUDA_HOME).
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from mlx_gemma4.doctor import sizes, verdict
from mlx_gemma4.doctor.published import PUBLISHED
from mlx_gemma4.execution import execution
from mlx_gemma4.gpu import cuda_compiler, cuda_driver, cuda_graph, render
from mlx_gemma4.gpu.recording import RecordedLaunch, Region
from mlx_gemma4.kv.state import KVState
from mlx_gemma4.loading import loader
from mlx_gemma4.loading.loader import load_model
from mlx_gemma4.loading.tensors import Entry
from mlx_gemma4.memory import MemoryPlan
from mlx_gemma4.model import decode
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops import cases
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.expand import expand
from mlx_gemma4.quant import formats

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import make_synthetic

DEPTHS = (0, 1, 530, 2100, 8200, 32800, 130100)  # tokens before a step: as many arrangements of a state's parts
QUANTIZED_DEPTHS = (8200, 32800, 130100)  # likewise with quantized KV
BATCHES = (1, 2, 4, 8, 16, 32)  # states that step together
CHUNK = 1024


def zeros(type: str, shape: tuple[int, ...]) -> Any:
    """Return a lazy weight of a GGUF type: it takes no memory unless it is evaluated."""
    if type not in formats.FORMATS:
        return mx.zeros(shape, formats.FLOATS[type])
    f, (*rows, k) = formats.FORMATS[type], shape
    group_scales = mx.zeros((*rows, k // f.group * f.group_scale_bits // 8), mx.uint8) if f.group_scale_bits else None
    blocks = 1 if f.per_row else k // f.scale_block if f.scale_block else 0
    top = mx.zeros((*rows, blocks, f.block_numbers), mx.float16) if blocks else None
    return formats.Packed(f, shape, mx.zeros((*rows, k * f.bits // 32), mx.uint32), group_scales, top)


class LazySource:
    """The tensors of a published model in these types, of zeros."""

    def __init__(self, kind: str, tensors: dict[str, tuple[tuple[int, ...], str]]) -> None:
        self.name = kind
        self.entries = {name: Entry(shape, type, prod(shape)) for name, (shape, type) in tensors.items()}

    def read(self, names: Sequence[str], *_: Any) -> Any:
        shape, type = self.entries[names[0]].shape, self.entries[names[0]].type
        if len(names) > 1:
            shape = (*shape[:-2], sum(self.entries[name].shape[-2] for name in names), shape[-1])
        return zeros(type, shape)


def lazy_model(name: str, run: Kernels, packed: bool = True) -> Model:
    """Load a published model of such weights as a file would be, in the types of a Q4_K_M file or all in BF16."""
    tensors = make_synthetic.tensors(PUBLISHED[name])
    if not packed:
        tensors = {name: (shape, type if type == "F32" else "BF16") for name, (shape, type) in tensors.items()}
    # No memory is taken, so none need be free.
    with patch.object(loader, "make_plan", lambda *_: MemoryPlan("packed", 0, 1 << 40, 8192)):
        config = make_synthetic.config_of(PUBLISHED[name])
        return load_model(config, LazySource(name, tensors), "packed", kernels=run)[0]


def lazy_fill(state: KVState, length: int) -> None:
    """Grow a state to `length` tokens of zeros, in the chunks of a prompt."""
    while state.length < length:
        n = min(CHUNK - state.length % CHUNK, length - state.length)
        for i, shape in enumerate(state.config.layers):
            if shape.kv_layer == i:
                some = mx.zeros((1, shape.kv_heads, n, shape.head_dim), state.dtype)
                state.append(i, some, some)
        state.advance(mx.zeros(n, mx.int32))


class Idle:
    """A player of recorded steps (replay.py) that plays nothing."""

    def load(self, launches: Sequence[RecordedLaunch], nbytes: int, *_: Any) -> None: ...

    def start(self, *_: Any) -> int:
        return 0

    def best(self, _: int) -> list[int]:
        return [0] * cuda_graph.ROWS

    def box(self, nbytes: int) -> tuple[int, list[int]]:
        raise RuntimeError("there is one process")

    def opened(self, handle: Sequence[int]) -> int:
        raise RuntimeError("there is one process")

    def write(self, *_: Any) -> None: ...
    def copy(self, *_: Any) -> None: ...
    def wait(self) -> None: ...
    def forget(self) -> None: ...

    def read(self, region: Region) -> mx.array:
        return mx.zeros(region.shape, region.dtype)


class Compiler(Idle):
    def load(self, launches: Sequence[RecordedLaunch], nbytes: int, *_: Any) -> None:
        for kernel, types, ranks in dict.fromkeys(map(cuda_graph.text_arguments, launches)):
            cuda_compiler.machine_code(cuda_graph.text(kernel, types, ranks), kernel.name)


def add_rotations(model: Model) -> None:
    """Give a lazy model the rotations of its quantized KV, which it would otherwise find by reading tokens."""
    shapes = {i: s for i, s in enumerate(model.config.layers) if s.kv_layer == i and not s.sliding}
    model.rotations = {i: mx.zeros((2 + s.kv_heads, s.head_dim)) for i, s in shapes.items()}


def launch_all(model: Model, run: Kernels) -> None:
    """Launch each kernel that loading, prompts and decode steps need."""
    for check in sizes.checks(sizes.sizes_of(model), verdict.QUICK_LENGTHS, verdict.QUICK_ROWS):
        check.make().kernel(run.launcher)
    weights = [w for layer in model.weights.layers for w in vars(layer).values()]
    for w in {(w.format.name, w.shape[-1]): w for w in weights if isinstance(w, formats.Packed)}.values():
        expand(run.launcher, w)
    step, replayer = decode.make_step(model.loaded, run), model.replayer
    assert replayer
    add_rotations(model)
    with execution():
        for kv, depth in [*(("full", n) for n in DEPTHS), *itertools.product(("q8", "tq4"), QUANTIZED_DEPTHS)]:
            states = [model.new_state(kv=kv) for _ in range(2)]
            for state in states:
                lazy_fill(state, depth)
            step(mx.array([1]), states[0])
            replayer.take_on(states[1])
        with patch.object(mx, "eval", lambda *_: None):
            for rows in BATCHES:
                states = [model.new_state() for _ in range(rows)]
                lazy_fill(states[0], 70)
                model.batch([1] * rows, states)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--architecture", default="sm_90")
    parser.add_argument("--models", nargs="*", type=str.upper, default=list(PUBLISHED), choices=PUBLISHED)
    options = parser.parse_args()
    os.environ["MLX_PTX_CACHE_DIR"] = str(options.folder.absolute())

    def launched(*, output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
        return [mx.zeros(s, t) for s, t in zip(output_shapes, output_dtypes, strict=True)]

    # What stands between here and such a machine: its name, its launches, its state's dtype, and that keys work.
    mx.device_info = lambda *_: {"architecture": options.architecture}
    mx.fast.precompiled_cuda_kernel = launched
    Model.kv_dtype = mx.float16  # type: ignore[assignment, method-assign]
    cases.on_cpu = lambda: False  # type: ignore[attr-defined]
    cuda_compiler.keys_work = lambda: True  # type: ignore[assignment]
    trial = cuda_compiler.kernel(cuda_compiler.TRIAL, ["x"], ["y"], "y[threadIdx.x] = x[threadIdx.x] + 1;", "")
    trial([mx.arange(8, dtype=mx.int32)], (8, 1, 1), (8, 1, 1), [(8,)], [mx.int32])
    for text, name in ((cuda_driver.WHERE_TEXT, cuda_driver.WHERE), (cuda_graph.TAKE_TEXT, cuda_graph.TAKE)):
        cuda_driver.module(text, name)
    failed = 0
    for name in options.models:
        run = Kernels(render.cuda_launcher, player=Compiler)
        launch_all(lazy_model(name, run), run)
        print(
            f"{name}: {len(list(options.folder.glob('*.ptx')))} kernels so far", *sorted(map(str, run.off)), flush=True
        )
        failed += len(run.off)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
