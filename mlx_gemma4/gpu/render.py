"""Renders a kernel from `kernels/*.metal` for a weight format, a dtype and a backend, and launches it.

In: constants, MLX arrays. Out: MLX arrays. One Metal text serves three ways to run it, each a `Launcher` with the
arguments of `mx.fast.metal_kernel`: `metal_launcher` and `cuda_launcher` below (MLX's two GPU backends), and the CPU
simulator of the tests. What differs between formats and shapes is rendered as `#define`s before the text; preprocess.py
leaves of it what a compiler sees.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..memory import on_cpu
from . import cuda_compiler
from .preprocess import Macros, lean, macros_of

Launcher = Callable[..., Callable[..., Sequence[Any]]]
Define = str | int | float | mx.Dtype
Defines = Mapping[str, Define]
Output = tuple[tuple[int, ...], mx.Dtype]  # shape and dtype of a result

_IN_WHEEL, _IN_TREE = Path(__file__).parents[1] / "metal", Path(__file__).parents[2] / "kernels"
FOLDER = _IN_WHEEL if _IN_WHEEL.is_dir() else _IN_TREE
DEVICE_ELEMENTS = 8  # elements from which on MLX passes an input in Metal's device address space, not constant
METAL_TYPES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat"}


@dataclass(frozen=True, eq=False)
class Kernel:
    """One rendered kernel, as `mx.fast.metal_kernel` takes it, in Metal. `render` makes each just once."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    header: str
    source: str


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel with all that a launch of it needs but the inputs. Called with those, it returns the outputs."""

    kernel: Kernel
    run: Callable[..., Sequence[Any]]
    grid: tuple[int, int, int]  # in threads
    threadgroup: tuple[int, int, int]
    output_shapes: list[tuple[int, ...]]
    output_dtypes: list[mx.Dtype]

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        """Launch with inputs in the kernel's order."""
        return self.run(
            inputs=list(inputs),
            grid=self.grid,
            threadgroup=self.threadgroup,
            output_shapes=self.output_shapes,
            output_dtypes=self.output_dtypes,
        )

    def by_name(self, arrays: Mapping[str, Any]) -> Sequence[Any]:
        """Launch with inputs by their names; `arrays` may hold others beside them."""
        return self(*[arrays[name] for name in self.kernel.inputs])


@lru_cache(maxsize=4096)
def prepare(launcher: Launcher, kernel: Kernel, groups: tuple[int, int, int], threads: int, *outputs: Output) -> Launch:
    """A launch of so many threadgroups of `threads` threads each."""
    x, y, z = groups
    shapes, dtypes = [shape for shape, _ in outputs], [dtype for _, dtype in outputs]
    kernel = _bounded(kernel, threads)
    return Launch(kernel, build(launcher, kernel), (threads * x, y, z), (threads, 1, 1), shapes, dtypes)


@cache
def _bounded(kernel: Kernel, threads: int) -> Kernel:
    """The kernel for threadgroups of at most so many threads: Apple's compiler then gives each registers accordingly.

    Without it, it may take so many registers that only fewer threads fit, and MLX refuses the launch. The attribute
    belongs to the kernel, whose signature MLX puts right behind the header.
    """
    return replace(kernel, header=f"{kernel.header}[[max_total_threads_per_threadgroup({threads})]]\n")


def absent(arrays: Mapping[str, Any]) -> list[str]:
    """Names of the optional inputs that are None."""
    return [name for name, a in arrays.items() if a is None]


def float_literal(x: float) -> str:
    """A number as a float literal of C."""
    return f"{float(x)!r}f"


@cache
def _text(file: str) -> str:
    return (FOLDER / file).read_text()


def render(entry: str, file: str, dtype: mx.Dtype, defines: Defines, absent: Sequence[str] = ()) -> Kernel:
    """The kernel `entry` of kernels/`file`.

    A file holds helpers, then kernels: a line `// kernel: NAME(INPUT, OPTIONAL?, ...) -> (OUTPUT, ...)` and its body.
    Helpers that several files share stand in files of their own: `// uses: FILE` puts one before this text.

    Args:
        dtype: of the activations, T in the text.
        defines: constants that the text reads: bools and integers as they are, floats as literals, dtypes as types.
        absent: optional inputs and outputs that this kernel goes without.
    """
    return _render(entry, file, dtype, tuple(defines.items()), tuple(absent))


@cache
def _render(
    entry: str, file: str, dtype: mx.Dtype, defines: tuple[tuple[str, Define], ...], absent: tuple[str, ...]
) -> Kernel:
    helpers, *kernels = re.split(r"(?m)^(?=// kernel: )", _text(file))
    body = next(k for k in kernels if k.startswith(f"// kernel: {entry}("))
    declared = re.match(r"// kernel: \w+\((.*?)\) -> \((.*?)\)", body)
    assert declared, f"{file}: {entry} declares no inputs and outputs"
    names = ([n.strip().rstrip("?") for n in listed.split(",")] for listed in declared.groups())
    inputs, outputs = (tuple(n for n in some if n not in absent) for some in names)
    lines = {"T": dtype, f"T_{METAL_TYPES[dtype].upper()}": 1, **dict(defines)}
    header = "".join(f"#define {name} {_constant(value)}\n" for name, value in lines.items())
    used = re.findall(r"(?m)^// uses: (\S+)$", helpers)
    header += "".join(map(_text, ("common.metal", *used))) + helpers
    header, body = lean(header, body, _cuda_macros())
    digest = hashlib.sha256((header + body).encode()).hexdigest()[:12]
    return Kernel(f"{entry}_{digest}", inputs, outputs, header, body)


def _constant(value: Define) -> str:
    if isinstance(value, mx.Dtype):
        return METAL_TYPES[value]
    return float_literal(value) if isinstance(value, float) else str(int(value) if isinstance(value, bool) else value)


@cache
def _cuda_macros() -> Macros:
    return macros_of(_text("cuda.h"))


def metal_launcher(name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str) -> Any:
    """A `Launcher` for a Mac's GPU: MLX's own, without what only CUDA's compiler sees."""
    header, source = lean(header, source)
    return mx.fast.metal_kernel(name, input_names, output_names, source, header)


def cuda_launcher(name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str) -> Any:
    """A `Launcher` for MLX's CUDA backend."""
    return cuda_compiler.kernel(name, input_names, output_names, *to_cuda_text(source, header))


def to_cuda_text(source: str, header: str) -> tuple[str, str]:
    """A rendered kernel's source and header for `cuda.kernel`."""
    return to_cuda(source), _text("cuda.h") + to_cuda(header)


def to_cuda(text: str) -> str:
    """Metal text as CUDA: threadgroup arrays become shared memory, the other address spaces vanish."""
    text = re.sub(r"(?m)//.*$", "", text)
    text = re.sub(r"(?m)^(\s*)threadgroup (?=\w+ \w+(\[[^;]*\])*;)", r"\1__shared__ ", text)
    text = re.sub(r"\[\[max_total_threads_per_threadgroup\(\d+\)\]\]\n", "", text)
    return re.sub(r"\b(device|constant|threadgroup|thread) ", "", text)


def default_launcher() -> Launcher | None:
    """The launcher for this machine's default device; None on a CPU."""
    if on_cpu():
        return None
    return metal_launcher if mx.metal.is_available() else cuda_launcher


def observed(launcher: Launcher, launches: list[dict[str, Any]]) -> Launcher:
    """A launcher that also notes each launch: the kernel's name, and the threads of a threadgroup and of the grid."""

    def declare(**declared: Any) -> Callable[..., Sequence[Any]]:
        kernel = launcher(**declared)

        def call(**arguments: Any) -> Sequence[Any]:
            sizes = {"threads": math.prod(arguments["threadgroup"]), "grid": math.prod(arguments["grid"])}
            launches.append({"kernel": declared["name"], **sizes})
            return kernel(**arguments)

        return call

    return declare


@cache
def build(launcher: Launcher, kernel: Kernel) -> Callable[..., Sequence[Any]]:
    """Compile a kernel, or what a launcher does in its place."""
    return launcher(
        name=kernel.name,
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=kernel.source,
        header=kernel.header,
    )


def result_defines(dtype: mx.Dtype) -> dict[str, int | mx.Dtype]:
    """Constants for a kernel whose results are of this dtype."""
    return {"U": dtype, "U_HALF": dtype == mx.float16}
