"""Kernels on an NVIDIA GPU, through MLX's CUDA backend.

In: CUDA text. Out: kernels to launch, or machine code. NVRTC compiles the text (MLX loads that library anyway),
`mx.fast.precompiled_cuda_kernel` launches it. `mx.fast.cuda_kernel` would do both, but it puts MLX's own headers before
each kernel, which take NVRTC 1.9 s where ours take 0.05 to 0.5, and compiles anew in every process: 40 s before a
model's first token. Here machine code is kept on disk, under a name that follows from the text, the GPU's architecture
and NVRTC's version.

MLX hashes a kernel's code, 17 KB on average, each time it launches it: half of what a launch costs the host. It looks
for the code under that hash in its folder of compiled modules first. So kernels are put there, and a short key that
hashes to their name is handed over in place of the code, once a trial has shown that this MLX finds them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..execution import cores
from ..memory import device_info
from ..paths import cache_folder, whole_file

# MLX's folder of compiled modules, which MLX reads once. Its own choice would be a temporary folder.
with suppress(RuntimeError):  # there is no home folder
    os.environ.setdefault("MLX_PTX_CACHE_DIR", str(cache_folder() / "cuda"))

TRIAL = "mlx_gemma4_trial"
_TYPES = {
    mx.float32: "float",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.int32: "int",
    mx.uint32: "unsigned int",
    mx.uint16: "unsigned short",
    mx.uint8: "unsigned char",
}


def kernel(
    name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str
) -> Callable[..., Sequence[mx.array]]:
    """Return a kernel, compiled when it is first called; for a call's arguments see `mx.fast.metal_kernel`.

    `X_shape` in the source is the shape of input X, as in Metal texts. A header may define LAUNCH_BOUNDS, from which
    the compiler knows how many registers a thread may have.
    """
    shaped = shaped_inputs(tuple(input_names), source)

    @cache
    def compiled(types: tuple[mx.Dtype, ...], ranks: tuple[int, ...]) -> bytes:
        return module(text(name, input_names, output_names, source, header, types, ranks), name)

    def call(
        inputs: Sequence[mx.array],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> Sequence[mx.array]:
        shapes = [inputs[i].shape for i in shaped]
        types = (*(a.dtype for a in inputs), *output_dtypes)
        return mx.fast.precompiled_cuda_kernel(
            name=name,
            compiled_source=compiled(types, tuple(map(len, shapes))),  # or a key to it
            inputs=inputs,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            scalars=[size for shape in shapes for size in shape],
            grid=grid,
            threadgroup=threadgroup,
            ensure_row_contiguous=True,
        )

    return call


@cache
def shaped_inputs(input_names: tuple[str, ...], source: str) -> list[int]:
    """Return the inputs whose shapes a kernel asks for: it takes their sizes after its arrays."""
    return [i for i, n in enumerate(input_names) if f"{n}_shape" in source]


def text(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str,
    types: Sequence[mx.Dtype],
    ranks: Sequence[int],
) -> str:
    """Return a kernel as a whole CUDA text, for arrays of these types and shaped inputs of these ranks."""
    bounds = "LAUNCH_BOUNDS " if "#define LAUNCH_BOUNDS " in header else ""
    pointers = [
        f"{'const ' if i < len(input_names) else ''}{_TYPES[t]}* {n}"
        for i, (t, n) in enumerate(zip(types, [*input_names, *output_names], strict=True))
    ]
    shaped = shaped_inputs(tuple(input_names), source)
    shapes = {f"{input_names[i]}_shape": rank for i, rank in zip(shaped, ranks, strict=True)}
    sizes = [f"int {n}_{j}" for n, rank in shapes.items() for j in range(rank)]
    arrays = (f"const int {n}[] = {{{', '.join(f'{n}_{j}' for j in range(k))}}};\n" for n, k in shapes.items())
    starts = "" if "INPUTS_READY()" in source else "INPUTS_READY();\n"
    starts = f"LAUNCH_NEXT();\n{starts}" if "define LAUNCH_NEXT()" in header else ""
    signature = f'extern "C" __global__ void {bounds}{name}({", ".join(pointers + sizes)})'
    return f"{header}\n{signature} {{\n{''.join(arrays)}{starts}{source}\n}}\n"


def machine_code(text: str, name: str) -> bytes:
    """Return a whole CUDA text's machine code for this GPU, from disk or compiled now."""
    kept = _kept(text, name)
    return kept if isinstance(kept, bytes) else kept[1].read_bytes()


def module(text: str, name: str) -> bytes:
    """Return what MLX takes as the compiled text: a key under which it finds it, or the machine code itself."""
    kept = _kept(text, name)
    if isinstance(kept, bytes):
        return kept
    key, code_file = kept
    return key if name == TRIAL or keys_work() else code_file.read_bytes()


def compile_all(texts: Mapping[str, str], done: Callable[[], None], threads: int | None = None) -> None:
    """Have the machine code of whole CUDA texts on disk, compiling on all cores what isn't there.

    NVRTC takes calls from several threads, and from CUDA 12.3 on generates code in all of them at once (its manual,
    "Thread safety"). What can't be compiled is left to whoever launches it.

    Args:
        texts: each with its kernel's name.
        done: called after each, in this thread.
        threads: that compile; None: one for each core that this process may use.
    """
    pool = ThreadPoolExecutor(threads or cores())
    try:
        for _ in as_completed([pool.submit(_kept, text, name) for text, name in texts.items()]):
            done()
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C only those under way are waited for


def _kept(text: str, name: str) -> tuple[bytes, Path] | bytes:
    """Return a compiled text's key and the file of its machine code; if the disk takes none, the machine code."""
    architecture = str(device_info()["architecture"])
    key = hashlib.sha256(f"{_version()} {architecture}\n{text}".encode()).hexdigest()[:32].encode()
    folder = Path(os.environ.get("MLX_PTX_CACHE_DIR", os.devnull))
    stem = f"{name}_{_hash(key):x}"  # as MLX names it
    code_file, names_file = folder / f"{stem}.ptx", folder / f"{stem}.txt"
    if not (code_file.is_file() and names_file.is_file()):
        code = compile_text(text, name, architecture)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path, content in ((code_file, code), (names_file, f"{name}\t{name}\n".encode())):
                with whole_file(path) as file:
                    file.write(content)
        except OSError:  # a disk that is full or read-only costs time, no more
            return code
    return key, code_file


def _hash(key: bytes) -> int:
    """Return libstdc++'s std::hash of a string."""
    hash_bytes = ctypes.CDLL("libstdc++.so.6")["_ZSt11_Hash_bytesPKvmm"]
    hash_bytes.restype, hash_bytes.argtypes = ctypes.c_size_t, [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t]
    return int(hash_bytes(key, len(key), 0xC70F6907))


@cache
def keys_work() -> bool:
    """Return True if this MLX finds a compiled kernel by its key."""
    add = kernel(TRIAL, ["x"], ["y"], "y[threadIdx.x] = x[threadIdx.x] + 1;", "")
    x = mx.arange(8, dtype=mx.int32)
    try:
        (y,) = add([x], (8, 1, 1), (8, 1, 1), [(8,)], [mx.int32])
        return bool(mx.array_equal(y, x + 1).item())
    except RuntimeError:
        return False


def compile_text(text: str, name: str, architecture: str) -> bytes:
    """Compile CUDA text for an architecture such as "sm_90", by NVRTC, which needs no GPU; return the machine code.

    Raises:
        RuntimeError: NVRTC or CUDA's headers are missing, or the text is wrong.
    """
    library = _nvrtc()
    program = ctypes.c_void_p()

    def check(status: int) -> None:
        if status:
            raise RuntimeError(f"NVRTC can't compile {name} (status {status}): {_log(library, program)}")

    check(library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), f"{name}.cu".encode(), 0, None, None))
    try:
        options = [f"--gpu-architecture={architecture}", "--std=c++17", _headers()]
        listed = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        check(library.nvrtcCompileProgram(program, len(options), listed))
        size = ctypes.c_size_t()
        check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        check(library.nvrtcGetCUBIN(program, code))
        return code.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _log(library: Any, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    if not program or library.nvrtcGetProgramLogSize(program, ctypes.byref(size)):
        return "no log"
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    return log.value.decode(errors="replace")


@cache
def _nvrtc() -> Any:
    for name in ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)  # the one that MLX has loaded, if it has that name
        except OSError:
            continue
    raise RuntimeError("libnvrtc, CUDA's run-time compiler, is missing; install mlx[cuda13]")


@cache
def _version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


@cache
def _headers() -> str:
    """Return the compiler's argument for CUDA's headers, of its Python packages or else of a toolkit."""
    spec, names = find_spec("nvidia"), ("cu13", "cuda_runtime")  # where CUDA 13's and 12's packages have them
    packages = [Path(p) / d / "include" for p in (spec and spec.submodule_search_locations) or () for d in names]
    toolkits = [Path(os.environ[v]) / "include" for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
    there = [d for d in (*packages, *toolkits, Path("/usr/local/cuda/include")) if (d / "cuda_fp16.h").is_file()]
    if not there:
        raise RuntimeError("CUDA's headers (cuda_fp16.h) are missing; install mlx[cuda13], or set CUDA_HOME")
    return f"-I{there[0]}"
