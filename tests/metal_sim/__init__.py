"""Run Metal kernels on the CPU, without Apple hardware: type-checked first, then thread by thread.

`kernel` looks like `mx.fast.metal_kernel` and is called the same way, with numpy arrays; `library` runs plain
`[[kernel]]` functions from any Metal source; `check` only type-checks. All raise `MetalError`. See README.md.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .compile import ATTRIBUTES, MetalError, build, cache_dir, parameters
from .frontend import check

__all__ = ["MetalError", "check", "kernel", "library", "unwritten"]

SANITIZE = os.environ.get("METAL_SIM_SANITIZE")  # what kernels and libraries do that are not told
ABSENT = 2  # of a buffer, to runtime.cpp: neither const (0) nor writable (1)
MAX_CONSTANT = 8  # mx.fast.metal_kernel: inputs of fewer elements go to the constant address space
_METAL_TYPES = {
    "float32": "float", "float16": "float16_t", "bfloat16": "bfloat16_t", "bool": "bool",
    "uint8": "uint8_t", "uint16": "uint16_t", "uint32": "uint32_t", "uint64": "uint64_t",
    "int8": "int8_t", "int16": "int16_t", "int32": "int32_t", "int64": "int64_t",
}  # fmt: skip


def _dtype(spec: Any) -> np.dtype[Any]:
    """A numpy dtype from a numpy, ml_dtypes or MLX dtype or its name."""
    name = str(spec).removeprefix("mlx.core.")
    return (
        np.dtype(ml_dtypes.bfloat16)
        if "bfloat16" in name
        else np.dtype(getattr(np, name, spec) if isinstance(name, str) else spec)
    )


def _array(value: Any) -> np.ndarray[Any, Any]:
    """A numpy array from a numpy or MLX array or a number (which MLX makes int32 or float32)."""
    if type(value).__module__ == "mlx.core" and str(value.dtype).endswith("bfloat16"):
        import mlx.core as mx

        return np.array(value.view(mx.uint16)).view(ml_dtypes.bfloat16)
    if isinstance(value, (bool, int, float)):
        return np.array(value, {bool: np.bool_, int: np.int32, float: np.float32}[type(value)])
    return np.asarray(value)


def _poison(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """An array as fresh device memory may look: NaN for floats, 0xCD bytes for the rest."""
    out = np.empty(shape, dtype)
    out.view(np.uint8).reshape(-1)[...] = 0xFF if out.dtype.kind in "fV" else 0xCD
    return out


def unwritten(out: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Indices (flat) of the elements of an output that still hold the poison."""
    raw = np.ascontiguousarray(out).view(np.uint8).reshape(out.size, out.itemsize)
    return np.flatnonzero((raw == _poison((1,), out.dtype).view(np.uint8)).all(axis=1))


def _memory(array: np.ndarray[Any, Any]) -> bytes:
    """The bytes that the array spans, in the order they lie in memory: a kernel that asks for strides needs those."""
    if array.flags.c_contiguous or not array.size:
        return array.tobytes()
    spread = sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True))
    return ctypes.string_at(array.ctypes.data, spread + array.itemsize)


def _run(
    exe: Path, buffers: Sequence[tuple[str, np.ndarray[Any, Any] | None, bool]], grid: Sequence[int],
    threadgroup: Sequence[int], seed: int, sanitize: str | None,
) -> list[np.ndarray[Any, Any]]:  # fmt: skip
    """Run the program on (name, array or None, writable) buffers; the writable ones come back."""
    job = [struct.pack("<10Q", len(buffers), seed, sanitize is not None, sanitize == "thread", *grid, *threadgroup)]
    contents = [b"" if array is None else _memory(array) for _, array, _ in buffers]
    for (name, array, writable), content in zip(buffers, contents, strict=True):
        job.append(struct.pack("<QQ48s", len(content), ABSENT if array is None else writable, name.encode()[:47]))
    done = subprocess.run([exe], input=b"".join(job + contents), capture_output=True)
    if done.returncode:
        raise MetalError(
            _with_line(exe, done.stderr.decode(errors="replace").strip() or f"crashed ({done.returncode})")
        )
    results, at = [], 0
    for _, array, writable in buffers:
        if array is not None and writable:
            results.append(np.frombuffer(done.stdout, array.dtype, array.size, at).reshape(array.shape).copy())
            at += array.nbytes
    return results


class _NotBuilt(Exception):
    pass


def _not_built() -> None:
    raise _NotBuilt


def _built(
    text: str, name: str, arguments: str, sanitize: bool, constants: dict[int, object] | None,
    check: Callable[[], object],
) -> Path:  # fmt: skip
    """`build`, by one of several processes that come to a kernel at the same time, as ranks do; the others wait."""
    try:
        return build(text, name, arguments, sanitize, constants, _not_built)
    except _NotBuilt:
        with (cache_dir() / f"building-{zlib.crc32(text.encode()) % 64}").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return build(text, name, arguments, sanitize, constants, check)


def _with_line(exe: Path, message: str) -> str:
    """Add the source line to a message that ends in a program counter, if a tool to find it is installed."""
    pc = re.search(r" pc=0x([0-9a-f]+)$", message)
    tool = shutil.which("llvm-symbolizer") or shutil.which("addr2line")
    nm = shutil.which("nm")
    if not (pc and tool and nm):
        return message
    symbols = subprocess.run([nm, exe], text=True, capture_output=True).stdout
    body = re.search(r"^([0-9a-f]+) T _?msl_body$", symbols, re.M)
    if not body:
        return message
    address = hex((int(body[1], 16) + int(pc[1], 16) - 1) % 2**64)
    found = subprocess.run([tool, "-e", exe, address], text=True, capture_output=True).stdout
    line = re.search(r"\w+\.metal:[1-9]\d*", found)
    return message[: pc.start()] + (f" at {line[0]}" if line else "")


def signature(
    name: str, inputs: Sequence[tuple[str, np.ndarray[Any, Any]]], outputs: Sequence[tuple[str, np.dtype[Any]]],
    source: str, template: Sequence[tuple[str, Any]] = (), atomic_outputs: bool = False,
) -> str:  # fmt: skip
    """The function that mx.fast.metal_kernel wraps around `source`, up to its opening brace."""
    kinds = [
        ("bool" if isinstance(v, bool) else "int" if isinstance(v, int) else "typename") + f" {k}" for k, v in template
    ]
    params = []
    for key, array in inputs:
        space = "constant" if array.size < MAX_CONSTANT else "device"
        params.append(f"const {space} {_METAL_TYPES[array.dtype.name]}{'*' if array.ndim else '&'} {key}")
        params += [f"const constant {kind} {key}{suffix}" for suffix, kind, _ in _extras(key, array, source)]
    for key, dtype in outputs:
        kind = _METAL_TYPES[dtype.name]
        params.append(f"device {f'atomic<{kind}>' if atomic_outputs else kind}* {key}")
    params = [f"{p} [[buffer({i})]]" for i, p in enumerate(params)]
    params += [f"{kind} {key} [[{key}]]" for key, (kind, _) in ATTRIBUTES.items() if key in source]
    head = f"template <{', '.join(kinds)}>\n" if kinds else ""
    return f"{head}[[kernel]] void {name}(\n  " + ",\n  ".join(params) + ") {\n"


def _extras(key: str, array: np.ndarray[Any, Any], source: str) -> list[tuple[str, str, np.ndarray[Any, Any]]]:
    """(suffix, type, value) of the shape, strides (elements) and ndim arguments that the source asks for."""
    if not array.ndim:
        return []
    strides = [s // array.itemsize for s in array.strides]
    known = [
        ("_shape", "int*", np.array(array.shape, np.int32)),
        ("_strides", "int64_t*", np.array(strides, np.int64)),
        ("_ndim", "int&", np.array(array.ndim, np.int32)),
    ]
    return [e for e in known if key + e[0] in source]


def _template_value(value: Any) -> str:
    if isinstance(value, (bool, int)):
        return str(value).lower()
    return _METAL_TYPES[_dtype(value).name]


def kernel(
    name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str = "",
    ensure_row_contiguous: bool = True, atomic_outputs: bool = False, sanitize: str | None = SANITIZE, seed: int = 0,
    in_place: Sequence[str] = (),
) -> Callable[..., list[np.ndarray[Any, Any]]]:  # fmt: skip
    """A kernel with the arguments of `mx.fast.metal_kernel`; errors name lines of `header` and `source`.

    What it writes to the inputs `in_place`, by a cast that takes their const away, is there afterwards, as on a GPU.

    The result is called with keywords, as MLX's: inputs, output_shapes, output_dtypes, grid, threadgroup, template,
    init_value (and verbose, stream: ignored). Besides, here or there: sanitize (None; "address": bounds to the byte,
    alignment; "thread": also races), seed (0: threads in order; odd and even: two kinds of scrambled order).
    """

    def call(
        *, inputs: Sequence[Any], output_shapes: Sequence[Sequence[int]], output_dtypes: Sequence[Any],
        grid: Sequence[int], threadgroup: Sequence[int], template: Sequence[tuple[str, Any]] = (),
        init_value: float | None = None, sanitize: str | None = sanitize, seed: int = seed, **_: Any,
    ) -> list[np.ndarray[Any, Any]]:  # fmt: skip
        arrays = [_array(i) for i in inputs]
        written = [array for key, array in zip(input_names, arrays, strict=True) if key in in_place]
        if ensure_row_contiguous:
            arrays = [a if a.flags.c_contiguous else a.copy() for a in arrays]
        dtypes = [_dtype(d) for d in output_dtypes]
        function = f"custom_kernel_{name}"
        head = signature(
            function, list(zip(input_names, arrays, strict=True)), list(zip(output_names, dtypes, strict=True)),
            source, template, atomic_outputs,
        )  # fmt: skip
        text = (
            f'#line 1 "header.metal"\n{header}\n#line 1 "signature.metal"\n{head}#line 1 "kernel.metal"\n{source}\n}}\n'
        )
        arguments = f"<{', '.join(_template_value(v) for _, v in template)}>" if template else ""
        check_it = partial(check, text, function + arguments, preamble=True)
        exe = _built(text, function, arguments, sanitize is not None, None, check_it)
        buffers: list[tuple[str, Any, bool]] = []
        for key, array in zip(input_names, arrays, strict=True):
            buffers.append((key, array, key in in_place))
            buffers += [(key + suffix, value, False) for suffix, _, value in _extras(key, array, source)]
        for key, shape, dtype in zip(output_names, output_shapes, dtypes, strict=True):
            fresh = _poison(shape, dtype) if init_value is None else np.full(shape, init_value, dtype)
            buffers.append((key, fresh, True))
        results = _run(exe, buffers, grid, threadgroup, seed, sanitize)
        for array, result in zip(written, results, strict=False):
            array[...] = result
        return results[len(written) :]

    return call


def _inline(text: str, root: Path, seen: set[str], skip: Sequence[str]) -> str:
    """Metal source with its `#include "..."` files (under `root`) put in place, each once; `<...>` ones dropped."""

    def put(match: re.Match[str]) -> str:
        path = match[1]
        if path in seen or any(path.endswith(s) for s in skip):
            return ""
        seen.add(path)
        return _inline((root / path).read_text(), root, seen, skip)

    text = re.sub(r"(?m)^\s*#pragma once.*$|^\s*#include\s*<[^>]*>.*$", "", text)
    return re.sub(r'(?m)^\s*#include\s*"([^"]+)".*$', put, text)


def library(
    source: str, include: Path | None = None, skip: Sequence[str] = (), stand_in: str = ""
) -> Callable[..., list[np.ndarray[Any, Any]]]:
    """Plain Metal kernels: `run(name, buffers, grid, threadgroup, arguments="<float>", constants={20: True}, ...)`.

    `include`: root of `#include "..."`. To run, includes that end in one of `skip` are left out and `stand_in` stands
    before the text, which is checked as it is. `buffers`: arrays, numbers, or None
    for an unused one, by index; those that the kernel takes as `device` without const come back, in order. `grid` is
    in threads; `constants` are function constants by index. sanitize and seed as in `kernel`.
    """
    text = _inline(stand_in + source, include or Path(), set(), skip)

    def run(
        name: str, buffers: Sequence[Any], grid: Sequence[int], threadgroup: Sequence[int], arguments: str = "",
        constants: dict[int, object] | None = None, sanitize: str | None = SANITIZE, seed: int = 0,
    ) -> list[np.ndarray[Any, Any]]:  # fmt: skip
        declared = {}
        for declaration, attribute in parameters(text, name):
            index = re.match(r"buffer\((\d+)\)", attribute)
            if index:
                declared[int(index[1])] = declaration
        check_it = partial(check, source, name + arguments, include=[include] if include else [])
        exe = _built(text, name, arguments, sanitize is not None, constants, check_it)
        triples = []
        for i, value in enumerate(buffers):
            declaration = declared[i]
            writable = "device" in declaration.split() and "const" not in declaration.split()
            triples.append((declaration.split()[-1], None if value is None else _array(value), writable))
        return _run(exe, triples, grid, threadgroup, seed, sanitize)

    return run
