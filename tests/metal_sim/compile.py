"""From Metal source to a program that runs one dispatch of one kernel on the CPU.

In: Metal source text, the kernel's name and template arguments. Out: the path of an executable, kept in a per-user
cache by the hash of everything it depends on; or `MetalError` with the compiler's words. Every kernel is compiled
twice: once with real address spaces, for errors only, and once with them erased, to run.
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
from pathlib import Path

HERE = Path(__file__).parent
HEADERS = sorted((HERE / "msl").glob("*.h"))
RUNTIME = HERE / "runtime.cpp"
MAX_KERNELS = 5000  # kept in the cache, about 25 KB each
PRELUDE = '#include "msl/simd.h"\nusing namespace metal;\n'

LANGUAGE = [
    "-x", "c++", "-std=c++20", "-Wno-everything", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics",
    "-Xclang", "-cl-single-precision-constant", f"-I{HERE}",
]  # fmt: skip
WARNINGS = [  # only those that Metal calls errors, or that no kernel should have
    "-Werror=return-type", "-Werror=uninitialized", "-Werror=sometimes-uninitialized", "-Werror=array-bounds",
    "-Werror=shift-count-overflow", "-Werror=c++11-narrowing", "-ferror-limit=0",
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
        probe = 'extern "C" int f(__bf16 a, _Float16 b) { return (int)(a * a) + (int)(b * b); }'
        args = [clang, *LANGUAGE, *EXACT, "-S", "-", "-o", os.devnull]
        if subprocess.run(args, input=probe, text=True, capture_output=True).returncode == 0:
            return (clang,)
    wheel = importlib.util.find_spec("ziglang")
    if wheel and wheel.origin:
        return (str(Path(wheel.origin).with_name("zig")), "cc")
    raise MetalError("no compiler: install clang 17 or newer, or `pip install ziglang`")


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
    texts = [p.read_text() for p in (*HEADERS, RUNTIME, Path(__file__))]
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


def _shared_declarations(match: re.Match[str], check: bool) -> str:
    """`threadgroup T a[N], b;`: a static in its address space to check, memory from the runtime to run."""
    out = []
    for variable in re.split(r",(?![^\[]*\])", match["vars"]):
        name, dims = re.fullmatch(r"\s*(\w+)\s*(.*?)\s*", variable, re.S).groups()  # type: ignore[union-attr]
        if check:
            out.append(f"static threadgroup {match['type']} {name}{dims};")
        else:
            out.append(
                f"typedef {match['type']} msl_t_{name}{dims}; static char msl_k_{name}; msl_t_{name}& {name} = "
                f'*(msl_t_{name}*)msl_threadgroup_alloc(&msl_k_{name}, sizeof(msl_t_{name}), "{name}");'
            )
    return match["indent"] + " ".join(out) + "\n" * match[0].count("\n")


def rewrite(source: str, check: bool, constants: dict[int, object] | None = None) -> str:
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
    return _SHARED.sub(lambda m: _shared_declarations(m, check), source)


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
_COPY = re.compile(r"error: no (?:viable overloaded '='|(?:matching|viable) constructor)")
_COPY_19 = re.compile(
    r"error: no viable conversion from '[^']*\b(\w+)(?: const)?' to .*\n.*\b\1 +\w+ *="
)  # until clang 19
_KERNEL = re.compile(r"(?:\[\[\s*kernel\s*\]\]|\bkernel)\s+void\s+(\w+)")
_TO_BFLOAT = re.compile(
    r"ImplicitCastExpr .* '(?:bfloat|bfloat16_t|__bf16)'(?::'\S+')? <FloatingCast>$"
    r"|CompoundAssignOperator .* '(?:bfloat|bfloat16_t|__bf16)'.* ComputeResultTy='float'"
)


def _errors(diagnostics: str) -> list[str]:
    """The compiler's errors, each with its notes, without one kind that Metal allows and clang does not: copies of a
    whole struct from one address space to another."""
    found = []
    for block in re.split(r"\n(?=\S*?:\d+:\d+: (?:error|warning|fatal error): )", "\n" + diagnostics):
        copies = _COPY.search(block) and "the implicit copy" in block and "address space" in block
        copies = copies or _COPY_19.search(block)
        ours = not re.search(r"error: failed to rename .*: FileNotFound", block)  # zig misses the dump's object file
        if re.search(r": (fatal )?error: ", block) and not copies and ours:
            found.append(block.strip("\n"))
    return found


def _more_errors(ast: str, kernels: set[str]) -> list[str]:
    """Errors in Metal that clang lets pass, from its dump of the syntax tree: casts between address spaces, implicit
    conversions to bfloat, threadgroup variables outside the kernel functions."""
    file, line, found = "", "", []
    functions: list[tuple[int, str]] = []  # those we are in: depth in the tree, name
    for node in ast[max(ast.find(".metal:") - 200, 0) :].splitlines():  # the prelude comes first
        for at in re.finditer(r"(?<=[<, ])(line|[^\s<>,:]+):(\d+):\d+", node):  # each says only what has changed
            file, line = file if at[1] == "line" else at[1], at[2]
        if "Decl 0x" in node:
            depth = len(node) - len(node.lstrip(" |`-"))
            functions = [f for f in functions if f[0] < depth]
        if "FunctionDecl 0x" in node or "CXXMethodDecl 0x" in node:
            signature = re.search(r" (\S+) '[^']*\(.*'", node)
            functions.append((depth, signature[1] if signature else ""))
        elif "<AddressSpaceConversion>" in node:
            found.append(f"{file}:{line}: error: cast between address spaces")
        elif "bf" in node and _TO_BFLOAT.search(node):
            found.append(f"{file}:{line}: error: implicit conversion to bfloat")
        elif "VarDecl 0x" in node and re.search(r"(?:address_space\(3\)|'threadgroup ).* static", node):
            misplaced = not functions or functions[-1][1] not in kernels
            found += [f"{file}:{line}: error: threadgroup variable outside a kernel function"] * misplaced
    return found


def check(source: str, instance: str = "", constants: dict[int, object] | None = None) -> None:
    """Type-check Metal source under Metal's address-space rules; raises MetalError with what is wrong.

    `instance` ("f<float, 4>"): the instance to check of a template, which is otherwise only parsed. `constants`: see
    `rewrite`.
    """
    text = PRELUDE + '#line 1 "kernel.metal"\n' + rewrite(source, True, constants)
    if "<" in instance:
        text += f"\ntemplate decltype({instance}) {instance};\n"
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        path = Path(folder) / "check.cpp"
        path.write_text(text)
        flags = [*WARNINGS, "-DMSL_CHECK", "-Xclang", "-ast-dump"]
        done = _cc(*LANGUAGE, *flags, "-S", path, "-o", path.with_suffix(".s"))
    errors = _errors(done.stderr.replace(str(path), "kernel.metal"))
    if done.returncode and "error: " not in done.stderr:
        errors.append(f"the compiler failed: {done.stderr}")
    errors += _more_errors(done.stdout, set(_KERNEL.findall(source)))
    if errors:
        raise MetalError("\n".join(dict.fromkeys(errors)))


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
) -> Path:
    """The program that runs kernel `name` (its template `arguments`: "<float, 4>"), from the cache or checked first."""
    key = "\0".join([source, name, arguments, str(sanitize), str(sorted((constants or {}).items())), _environment()])
    exe = cache_dir() / hashlib.sha256(key.encode()).hexdigest()[:24]
    if exe.exists():
        return exe
    entry = _entry(parameters(source, name), name + arguments)
    check(source, name + arguments, constants)
    fresh = exe.with_suffix(f".{os.getpid()}")
    path = Path(f"{fresh}.cpp")
    path.write_text(PRELUDE + '#line 1 "kernel.metal"\n' + rewrite(source, False, constants) + entry)
    flags = SANITIZE if sanitize else PLAIN
    _must(_cc(*LANGUAGE, *EXACT, "-O1", *flags, path, "-x", "none", _runtime(), "-lm", "-o", fresh))
    os.replace(fresh, exe)  # in one step: others may be building the same
    path.unlink()
    return exe
