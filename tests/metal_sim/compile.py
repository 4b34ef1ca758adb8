"""From Metal source to a program that runs one dispatch of one kernel on the CPU.

In: Metal source text, the kernel's name and template arguments. Out: the path of an executable, kept in a per-user
cache by the hash of everything it depends on; or `MetalError` with the compiler's words. Address spaces are erased
here: `frontend.py` has checked them before.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
HEADERS = sorted((HERE / "msl").glob("*.h"))
CHECKER = [*sorted((HERE / "spec").iterdir()), *(HERE / f"{n}.py" for n in ("frontend", "language", "rules"))]
RUNTIME = HERE / "runtime.cpp"
MAX_KERNELS = 5000  # kept in the cache, about 25 KB each
PRELUDE = '#include "msl/simd.h"\nusing namespace metal;\n'

LANGUAGE = [
    "-x", "c++", "-std=c++20", "-Wno-everything", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics",
    "-Xclang", "-cl-single-precision-constant", f"-I{HERE}",
]  # fmt: skip
EXACT = [
    "-ffp-contract=off",
    "-Xclang",
    "-ffloat16-excess-precision=none",
    "-Xclang",
    "-fbfloat16-excess-precision=none",
]
SANITIZE = [  # one call per access, answered by runtime.cpp: AddressSanitizer's, without its own runtime
    "-Xclang", "-fsanitize=kernel-address", "-mllvm", "-asan-instrumentation-with-call-threshold=0",
    "-mllvm", "-asan-opt=0", "-mllvm", "-asan-stack=0", "-mllvm", "-asan-globals=0",
    "-fsanitize=alignment,bounds", "-fsanitize-trap=alignment,bounds",
    "-gline-tables-only",  # a message ends in the source line of the access
]  # fmt: skip
PLAIN = ["-fno-sanitize=all", "-g0", "-Wl,-s"]


class MetalError(Exception):
    """What Apple's compiler or a GPU would refuse, or must not be trusted with; str() says what and where."""


@functools.cache
def compiler() -> tuple[str, ...]:
    """The command of the C compiler: a clang on the PATH that knows half and bfloat, else that of the ziglang wheel."""
    chosen = os.environ.get("METAL_SIM_CC")
    if chosen:
        return tuple(chosen.split())
    clang = shutil.which("clang")
    if clang:
        probe = (
            "static_assert(__clang_major__ >= 18); int f(__bf16 a, _Float16 b) { return (int)(a * a) + (int)(b * b); }"
        )
        args = [clang, *LANGUAGE, *EXACT, "-S", "-", "-o", os.devnull]
        if subprocess.run(args, input=probe, text=True, capture_output=True).returncode == 0:
            return (clang,)
    wheel = importlib.util.find_spec("ziglang")
    if wheel and wheel.origin:
        return (str(Path(wheel.origin).with_name("zig")), "cc")
    raise MetalError("no compiler: install clang 18 or newer, or `pip install ziglang`")


@functools.cache
def cache_dir() -> Path:
    """The per-user folder of compiled kernels (METAL_SIM_CACHE, else below the temporary folder)."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    path = Path(os.environ.get("METAL_SIM_CACHE") or Path(tempfile.gettempdir()) / f"metal_sim-{user}")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.scandir(path) as entries:
        kernels = [e.path for e in entries if re.fullmatch(r"[0-9a-f]{24}", e.name)]
    if len(kernels) > MAX_KERNELS:
        with contextlib.suppress(FileNotFoundError):  # another process is removing the same ones
            for old in sorted(kernels, key=os.path.getmtime)[:-MAX_KERNELS]:
                os.unlink(old)
    return path


@functools.cache
def _environment() -> str:
    """What compiled kernels depend on besides their own text."""
    version = subprocess.run([*compiler(), "--version"], text=True, capture_output=True, check=True).stdout
    texts = [p.read_text() for p in (*HEADERS, *CHECKER, RUNTIME, Path(__file__))]
    return "\n".join([version, platform.node(), platform.machine(), *texts])


def _cc(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the compiler; what zig caches of kernels is thrown away, what it caches of its libraries stays."""
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        env = {"ZIG_GLOBAL_CACHE_DIR": str(cache_dir() / "zig"), **os.environ, "ZIG_LOCAL_CACHE_DIR": scratch}
        return subprocess.run([*compiler(), *map(str, args)], text=True, capture_output=True, env=env)


# ---- Metal syntax that clang's C++ does not take
_ATTRIBUTE = re.compile(r"\[\[(?:[^\[\]]|\[[^\[\]]*\])*\]\]")
_FUNCTION_CONSTANT = re.compile(r"\bconstant\s+(\w+)\s+(\w+)\s*\[\[\s*function_constant\((\d+)\)\s*\]\]\s*;")
_TEMPLATE = r"\s*<[^;<>]*(?:<[^;<>]*>[^;<>]*)*>"
_SHARED = re.compile(
    rf"(?m)(?P<indent>^[ \t]*|[;{{}}][ \t]*)threadgroup\s+(?P<type>(?:typename\s+)?[A-Za-z_][\w:]*(?:{_TEMPLATE})?)"
    r"\s+(?P<vars>\w+\s*(?:\[[^;]*?\])*(?:\s*,\s*\w+\s*(?:\[[^;,]*?\])*)*)\s*;"
)
_ARRAY_PARAMETER = re.compile(r"\b((?:(?:const|constant|device|threadgroup)\s+)+\w+)\s+(\w+)\[\w*\](?=\s*[,)])")
_TYPE_PARAMETER = re.compile(r"\btypename\s+(\w+)\s*(?=[,>=])")
_VEC_CALL = re.compile(r"\b((?:metal::)?vec<\s*\w+\s*,\s*\w+\s*>)\s*\(")
_VEC_ALIAS = re.compile(
    r"\busing\s+(\w+)\s*=\s*(?:metal::)?(?:vec<[^;]*>|[a-z]+[234])\s*;|\btypedef\s+(?:metal::)?(?:vec<[^;]*>|[a-z]+[234])\s+(\w+)\s*;"
)


def _shared_declarations(match: re.Match[str]) -> str:
    """`threadgroup T a[N], b;`: memory from the runtime."""
    out = []
    for variable in re.split(r",(?![^\[]*\])", match["vars"]):
        name, dims = re.fullmatch(r"\s*(\w+)\s*(.*?)\s*", variable, re.S).groups()  # type: ignore[union-attr]
        out.append(
            f"typedef {match['type']} msl_t_{name}{dims}; static char msl_k_{name}; msl_t_{name}& {name} = "
            f'*(msl_t_{name}*)msl_threadgroup_alloc(&msl_k_{name}, sizeof(msl_t_{name}), "{name}");'
        )
    return match["indent"] + " ".join(out) + "\n" * match[0].count("\n")


def rewrite(source: str, constants: dict[int, object] | None = None) -> str:
    """The source as clang's C++, line for line. `constants`: values of function constants by index."""

    def constant(match: re.Match[str]) -> str:
        kind, name, index = match.groups()
        value = (constants or {}).get(int(index), False)
        return f"constant {kind} {name} = ({kind}){str(value).lower()};" + "\n" * match[0].count("\n")

    source = _FUNCTION_CONSTANT.sub(constant, source)
    source = _ATTRIBUTE.sub(lambda m: "".join(re.findall(r"\\?\n", m[0])), source)
    source = _ARRAY_PARAMETER.sub(r"\1* \2", source)
    source = _VEC_CALL.sub(r"msl::make<\1>(", source)
    names = {a or b for a, b in _VEC_ALIAS.findall(source)} | set(_TYPE_PARAMETER.findall(source))
    if names:  # what may be a vector is made by a function
        calls = rf"(?<![\w:<.~])(?<!operator )({'|'.join(sorted(names))})\((?!\s*\*)"
        source = re.sub(calls, r"msl::make<\1>(", source)
    return _SHARED.sub(_shared_declarations, source)


# ---- the entry point
ATTRIBUTES = {  # name: (type that mx.fast.metal_kernel gives it, field of msl_context)
    "dispatch_threads_per_threadgroup": ("uint3", "full_group_size"),
    "grid_size": ("uint3", "grid"),
    "simdgroup_index_in_threadgroup": ("uint", "simdgroup"),
    "simdgroups_per_threadgroup": ("uint", "simdgroups"),
    "dispatch_simdgroups_per_threadgroup": ("uint", "simdgroups"),
    "thread_execution_width": ("uint", "32"),
    "thread_index_in_simdgroup": ("uint", "lane"),
    "thread_index_in_threadgroup": ("uint", "index"),
    "thread_position_in_grid": ("uint3", "position_in_grid"),
    "thread_position_in_threadgroup": ("uint3", "position_in_group"),
    "threadgroup_position_in_grid": ("uint3", "group"),
    "threadgroups_per_grid": ("uint3", "groups"),
    "threads_per_grid": ("uint3", "grid"),
    "threads_per_simdgroup": ("uint", "32"),
    "threads_per_threadgroup": ("uint3", "group_size"),
}


def parameters(source: str, name: str) -> list[tuple[str, str]]:
    """(declaration, attribute) of each parameter of kernel `name`, e.g. ("device float* y", "buffer(1)")."""
    start = re.search(rf"\bvoid\s+{re.escape(name)}\s*\(", source)
    if not start:
        raise MetalError(f"no kernel named {name}")
    parts, depth, i = [""], 1, start.end()
    while True:
        ch = source[i]
        depth += (ch in "([<{") - (ch in ")]>}")
        if not depth:
            break
        if ch == "," and depth == 1:
            parts.append("")
        else:
            parts[-1] += ch
        i += 1
    found = []
    for part in parts:
        attribute = re.search(r"\[\[(.*)\]\]", part, re.S)
        if not attribute:
            raise MetalError(f"{name}: the parameter `{' '.join(part.split())}` has no attribute")
        found.append((" ".join(part[: attribute.start()].split()), attribute[1].strip()))
    return found


def _entry(params: list[tuple[str, str]], call: str) -> str:
    args = []
    for declaration, attribute in params:
        index = re.match(r"buffer\((\d+)\)", attribute)
        if index:
            args.append(f"msl_buffer{{b[{index[1]}]}}")
        elif attribute in ATTRIBUTES:
            field = ATTRIBUTES[attribute][1]
            scalar = ATTRIBUTES[attribute][0] == "uint"
            args.append(
                field if field == "32" else f"msl_cur->{field}" if scalar else f"msl_position{{msl_cur->{field}}}"
            )
        else:
            raise MetalError(f"[[{attribute}]] of `{declaration}` is unknown")
    return f'\nextern "C" void msl_body(void** b) {{ {call}({", ".join(args)}); }}\n'


# ---- compile
def _must(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        raise MetalError(done.stderr[:6000])


@functools.cache
def _runtime() -> Path:
    out = cache_dir() / f"runtime-{hashlib.sha256(_environment().encode()).hexdigest()[:16]}.o"
    if not out.exists():
        fresh = out.with_suffix(f".{os.getpid()}.o")
        _must(_cc(*LANGUAGE, "-O2", "-g0", "-fno-sanitize=all", "-c", RUNTIME, "-o", fresh))
        os.replace(fresh, out)
    return out


def build(
    source: str,
    name: str,
    arguments: str = "",
    sanitize: bool = False,
    constants: dict[int, object] | None = None,
    check: Callable[[], object] = lambda: None,
) -> Path:
    """The program that runs kernel `name` (its template `arguments`: "<float, 4>"), from the cache or after `check`."""
    key = "\0".join([source, name, arguments, str(sanitize), str(sorted((constants or {}).items())), _environment()])
    exe = cache_dir() / hashlib.sha256(key.encode()).hexdigest()[:24]
    if exe.exists():
        return exe
    entry = _entry(parameters(source, name), name + arguments)
    check()
    fresh = exe.with_suffix(f".{os.getpid()}")
    path = Path(f"{fresh}.cpp")
    path.write_text(PRELUDE + '#line 1 "kernel.metal"\n' + rewrite(source, constants) + entry)
    flags = SANITIZE if sanitize else PLAIN
    _must(_cc(*LANGUAGE, *EXACT, "-O1", *flags, path, "-x", "none", _runtime(), "-lm", "-o", fresh))
    os.replace(fresh, exe)  # in one step: others may be building the same
    path.unlink()
    return exe
