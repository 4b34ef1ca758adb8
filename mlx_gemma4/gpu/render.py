"""Renders a kernel from `kernels/*.metal` for a weight format, a dtype and a backend, and launches it.

In: MLX arrays and packed weights. Out: MLX arrays. One Metal text serves three ways to run it, each a `Launcher` with
the arguments of `mx.fast.metal_kernel`: that function itself, `cuda_launcher` below (MLX's CUDA backend), and the CPU
simulator of the tests. What differs between formats and shapes is rendered as `#define`s before the text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from ..memory import on_cpu
from . import cuda_compiler

Launcher = Callable[..., Callable[..., Sequence[Any]]]

_FOLDERS = (Path(__file__).parents[1] / "metal", Path(__file__).parents[2] / "kernels")  # in a wheel, in the tree
DEVICE_ELEMENTS = 8  # elements from which on MLX passes an input in Metal's device address space, not constant
METAL_TYPES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat"}


@dataclass(frozen=True, eq=False)
class Kernel:
    """One rendered kernel: what `mx.fast.metal_kernel` wants to know, in Metal. `render` makes each just once."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    header: str
    source: str


def float_literal(x: float) -> str:
    """A number as a float literal of C."""
    return f"{float(x)!r}f"


def metal_files() -> list[Path]:
    """All kernel sources, Metal and CUDA headers included."""
    folder = next(f for f in _FOLDERS if f.is_dir())
    return sorted(f for f in folder.iterdir() if f.suffix in (".metal", ".h"))


@cache
def _text(file: str) -> str:
    for folder in _FOLDERS:
        if (folder / file).exists():
            return (folder / file).read_text()
    raise FileNotFoundError(f"kernel source {file} is missing from the installation")


def render(entry: str, file: str, dtype: mx.Dtype, defines: dict[str, object], absent: Sequence[str] = ()) -> Kernel:
    """The kernel `entry` of kernels/`file`.

    A file holds helpers, then kernels: a line `// kernel: NAME(INPUT, OPTIONAL?, ...) -> (OUTPUT, ...)` and its body.
    Helpers that several files share stand in files of their own: `// uses: FILE` puts one before this text.

    Args:
        dtype: of the activations.
        defines: constants that the text reads.
        absent: optional inputs and outputs that this kernel goes without.
    """
    return _render(entry, file, dtype, tuple(defines.items()), tuple(absent))


@cache
def _render(
    entry: str, file: str, dtype: mx.Dtype, defines: tuple[tuple[str, object], ...], absent: tuple[str, ...]
) -> Kernel:
    helpers, *kernels = re.split(r"(?m)^(?=// kernel: )", _text(file))
    body = next(k for k in kernels if k.startswith(f"// kernel: {entry}("))
    declared = re.match(r"// kernel: \w+\((.*?)\) -> \((.*?)\)", body)
    assert declared, f"{file}: {entry} declares no inputs and outputs"
    names = ([n.strip().rstrip("?") for n in listed.split(",")] for listed in declared.groups())
    inputs, outputs = (tuple(n for n in some if n not in absent) for some in names)
    metal = METAL_TYPES[dtype]
    lines = {"T": metal, f"T_{metal.upper()}": 1, **dict(defines)}
    header = "".join(f"#define {k} {int(v) if isinstance(v, bool) else v}\n" for k, v in lines.items())
    used = re.findall(r"(?m)^// uses: (\S+)$", helpers)
    header += "".join(map(_text, ("common.metal", *used))) + helpers
    digest = hashlib.sha256((header + body).encode()).hexdigest()[:12]
    return Kernel(f"{entry}_{digest}", inputs, outputs, header, body)


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
    return re.sub(r"\b(device|constant|threadgroup|thread) ", "", text)


def default_launcher() -> Launcher | None:
    """How kernels run on this machine's default device, or None on a CPU."""
    if on_cpu():
        return None
    return cast(Launcher, mx.fast.metal_kernel if mx.metal.is_available() else cuda_launcher)


def is_lazy(launcher: Launcher) -> bool:
    """Whether launches by this launcher wait to be evaluated, as MLX's own do, so that they can be traced."""
    return launcher in (mx.fast.metal_kernel, cuda_launcher)


@cache
def build(launcher: Launcher, kernel: Kernel) -> Callable[..., Sequence[Any]]:
    return launcher(
        name=kernel.name,
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=kernel.source,
        header=kernel.header,
    )


def result_defines(dtype: mx.Dtype) -> dict[str, object]:
    """U, the dtype of results, as constants."""
    return {"U": METAL_TYPES[dtype], "U_HALF": dtype == mx.float16}
