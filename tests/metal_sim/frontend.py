"""Whether Apple's compiler would take a Metal text: clang on a translation of it, and rules on clang's syntax tree.

In: Metal text, whole or as `mx.fast.metal_kernel` renders it. Out: what is wrong, each with its place. Metal 3.1's
standard library stands in `spec/`, what MLX puts before a kernel in `vendor/mlx`; both are precompiled once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from .compile import MetalError, cache_dir, compiler
from .language import Rewriter, Source
from .rules import Rules

HERE = Path(__file__).parent
SPEC = HERE / "spec"
PREAMBLE = HERE / "vendor"
UTILS = "mlx/backend/metal/kernels/utils.h"
HEADERS = (  # metal_array, metal_atomic ..
    "array", "atomic", "common", "compute", "config", "extended_vector", "geometric", "graphics", "integer", "limits",
    "math", "matrix", "numeric", "pack", "quadgroup", "relational", "simdgroup", "simdgroup_matrix", "stdlib",
    "texture", "type_traits", "types", "uniform", "utility",
)  # fmt: skip
LANGUAGE = ["-x", "c++", "-std=c++14", "-ferror-limit", "0", "-fno-rtti"]
# Extensions that clang 14 to 16, which Apple's compilers come from, may not have; C++17's are warnings for Apple, too.
NEWER = [
    "-Werror=c++20-extensions", "-Wno-c++20-designator", "-Wno-error=c++20-designator", "-Werror=c++23-extensions",
    "-Werror=c++26-extensions", "-Werror=vla-cxx-extension", "-Werror=vla", "-Werror=gnu-folding-constant",
]  # fmt: skip
CHECK = [
    "-Wno-everything", "-Werror=c++11-narrowing", *NEWER, "-fsyntax-only", "-flax-vector-conversions=none",
]  # fmt: skip
MANY = 4  # explicit instances
LINT = [  # what no kernel should have, though Metal only warns
    "-Werror=return-type", "-Werror=uninitialized", "-Werror=sometimes-uninitialized", "-Werror=array-bounds",
    "-Werror=shift-count-overflow",
]  # fmt: skip


@dataclass(frozen=True)
class Wrong:
    """One error: its file ("" if it is none of the text's), line from 1 and message."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file or 'kernel.metal'}:{self.line}:1: error: {self.message}"


@functools.cache
def _frontend() -> tuple[str, ...]:
    """The compiler's front end, which takes a tenth of its driver's time."""
    command = compiler()
    return (*command[:-1], "clang", "-cc1") if command[-1] == "cc" else (*command, "-cc1")


def _clang(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*_frontend(), *map(str, args)], text=True, capture_output=True)


@functools.cache
def _key() -> str:
    """The hash of what precompiled headers depend on."""
    files = [*sorted(SPEC.iterdir()), *sorted(PREAMBLE.rglob("*.h")), HERE / "language.py", HERE / "frontend.py"]
    version = subprocess.run([*compiler(), "--version"], text=True, capture_output=True, check=True).stdout
    texts = [version, str(HERE), *(f.read_text() for f in files)]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@functools.cache
def _home() -> Path:
    """The folder of what is made once: headers and precompiled ones."""
    folder = cache_dir() / f"checker-{_key()}"
    folder.mkdir(exist_ok=True)
    return folder


@functools.cache
def _system() -> Path:
    """A folder of empty files with the names of Metal's headers: their text is in every program already."""
    folder = _home() / "include"
    folder.mkdir(exist_ok=True)
    for name in HEADERS:
        (folder / f"metal_{name}").touch()
    return folder


@functools.cache
def _precompiled(preamble: bool) -> Path:
    """The library, with MLX's preamble or without, for `-include-pch`."""
    out = _home() / ("mlx.pch" if preamble else "metal.pch")
    if out.exists():
        return out
    parts = ("types.h", "functions.h", "metal.h", "textures.h")
    text = "".join(re.sub(r"(?m)^#(?:include|pragma once).*", "", (SPEC / n).read_text()) for n in parts)
    if preamble:
        lines, _ = _preprocess(f'#include "{UTILS}"\n', "preamble.metal", False, [PREAMBLE], _system())
        text += Rewriter("\n".join(line for _, _, line in lines)).run()
    with tempfile.TemporaryDirectory(dir=_home()) as folder:
        path, fresh = out.with_suffix(".h"), Path(folder) / "prelude.pch"
        (Path(folder) / "prelude.h").write_text(text)
        os.replace(Path(folder) / "prelude.h", path)
        flags = ["-std=c++23" if f == "-std=c++14" else f for f in (*LANGUAGE, *CHECK) if f != "-fsyntax-only"]
        done = _clang(*flags, "-emit-pch", path, "-o", fresh)
        wrong = [b for b in _blocks(done.stderr) if not _allowed(b)]
        if wrong or not fresh.exists():
            raise MetalError(f"the library in {SPEC} does not compile:\n" + "\n".join(wrong or [done.stderr]))
        os.replace(fresh, out)
    return out


# ---- the text
def has_preamble(text: str) -> bool:
    """Whether MLX's preamble belongs before a text: it is not whole without."""
    bare = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S)
    return not re.search(r'(?m)^[ \t]*#[ \t]*include[ \t]*(<metal_stdlib>|")', bare)


Line = tuple[str, int, str]  # file, line, text


def _preprocess(
    text: str, name: str, preamble: bool, include: Sequence[Path], system: Path
) -> tuple[list[Line], list[str]]:
    """The lines of a text after the preprocessor, without what stands before it; and its errors."""
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        path = Path(folder) / "text.metal"
        path.write_text(text)
        folders: list[str | Path] = [a for p in include for a in ("-I", p)]
        before: list[str | Path] = ["-include", SPEC / "macros.h"]
        if preamble:
            folders += ["-I", PREAMBLE]
            before += ["-include", UTILS]
        done = _clang(
            *LANGUAGE, "-Wno-everything", "-E", *folders, "-internal-isystem", system, *before, path, "-o", "-"
        )
        lines: list[Line] = []
        file, number = "", 0
        for line in done.stdout.splitlines():
            marker = re.match(r'# (\d+) "((?:[^"\\]|\\.)*)"', line)
            if marker:
                file, number = str(json.loads(f'"{marker[2]}"')), int(marker[1])
                continue
            if (
                line.strip()
                and not file.startswith(("<", str(SPEC)))
                and not (preamble and file.startswith(str(PREAMBLE)))
            ):
                lines.append((name if file == str(path) else file, number, line))
            number += 1
        return lines, [b.replace(str(path), name) for b in _blocks(done.stderr)]


def _blocks(diagnostics: str) -> list[str]:
    """The compiler's errors, each with its notes."""
    parts = re.split(r"\n(?=\S*?:\d+:\d+: (?:error|warning|fatal error): )|\n(?=error: )", "\n" + diagnostics)
    return [p.strip("\n") for p in parts if re.search(r"(?:^|: )(?:fatal )?error: ", p)]


_ASSIGNED = re.compile(r":(\d+):(\d+): error: no viable overloaded '='")
_COPY = re.compile(r"error: no (?:matching|viable) constructor")
_FROM_SPACE = re.compile(r"the implicit copy .* not viable: (?:1st argument \('|'this' object is )?.*address space")
_COPY_19 = re.compile(
    r"error: no viable conversion from '[^']*\b(\w+)(?: const)?' to .*\n.*\b\1 +\w+ *="
)  # until clang 19
_ALLOWED = re.compile(
    r"error: no matching constructor for initialization of '(?:threadgroup|__attribute__\(\(address_space\(3\)\)\)) "
    r"|error: conditional expression is ambiguous; '(?:const )?(\w+[^']*)' and '(?:const )?\1' can be converted"
    r"|error: no matching conversion for C-style cast from"
    r" '(?:const |device |threadgroup |constant )*(\w+)(?: const)?'.* to '\2'"
    r"|error: C-style cast from vector .* to vector .* of different size"
    r"|error: (?:cannot initialize .* of type|assigning to) '(?:const )?bool[234]'"  # a comparison, until clang 20
    r".*(?:with an rvalue of|from incompatible) type '(?:signed )?(?:char|short|int|long) __attribute__"
    r"|error: explicit object parameters are incompatible|error: failed to rename .*: FileNotFound"
    r"|error: static_cast from '(?:const )?(?:half|float16_t|_Float16|bfloat|bfloat16_t|__bf16)'.* to"
    r" '(?:bfloat|bfloat16_t|__bf16|half|float16_t|_Float16)'"
)


def _allowed(block: str, conversions: Collection[int] = ()) -> bool:
    """Whether clang's error is none in Metal: copies of a struct from one address space to another, and the like.

    `conversions`: the lines on which something else than such a struct is assigned, as the syntax tree has them.
    """
    assigned = _ASSIGNED.search(block)
    if assigned and "the implicit copy" in block and "address space" in block:
        return int(assigned[1]) not in conversions
    copied = bool(_COPY.search(block) and _FROM_SPACE.search(block))
    values = "no matching function" in block and re.search(r"initializer list argument to '.*' \(vector of", block)
    copied |= bool(_COPY.search(block)) and "cannot be used to construct an object in address space" in block
    values = values or re.search(
        r"from 'const char\[\d+\]' to 'const __attribute__\(\(address_space\(2\)\)\) char \*'", block
    )
    return bool(copied or values or _COPY_19.search(block) or _ALLOWED.search(block))


def examine(
    text: str, name: str = "kernel.metal", *, preamble: bool | None = None, include: Sequence[Path] = (),
    instance: str = "", lint: bool = False,
) -> list[Wrong]:  # fmt: skip
    """What Apple's compiler refuses in a text, first things first; nothing if it takes it.

    `preamble`: whether MLX's stands before it (None: as `has_preamble` says). `include`: folders of `#include "..."`.
    `instance` ("f<float, 4>"): an instance of a template to check besides. `lint`: refuse some of what Metal warns of.
    """
    preamble = has_preamble(text) if preamble is None else preamble
    if instance:
        text += f"\ntemplate decltype({instance}) {instance};\n"
    lines, wrong = _preprocess(text, name, preamble, include, _system())
    if wrong:
        return [_placed(b, name, None) for b in wrong]
    rewriter = Rewriter("\n".join(line for _, _, line in lines))
    program = rewriter.run()
    found = [_at(lines, line, message) for line, message in rewriter.errors]
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        path = Path(folder) / "kernel.cpp"
        flags: list[str | Path] = [
            *LANGUAGE,
            *CHECK,
            *(LINT if lint else []),
            "-fno-validate-pch",
            "-include-pch",
            _precompiled(preamble),
        ]
        path.write_text(program)
        if len(rewriter.instances()) > MANY:  # the tree of all of them would be huge
            done = _clang(*flags, path)
            program = rewriter.without_instances()
            path.write_text(program)
            tree = _clang(*flags, "-ast-dump", path)
        else:
            done = tree = _clang(*flags, "-ast-dump", path)
    rules = Rules(Source(program))
    more = rules.run(tree.stdout, str(path))
    errors = [b for b in _blocks(done.stderr) if not _allowed(b, rules.conversions)]
    if done.returncode and not _blocks(done.stderr):
        raise MetalError(f"the compiler failed: {done.stderr}")
    found += [_placed(b, str(path), lines) for b in errors]
    found += [_at(lines, line, message) for line, message in more]
    return list(dict.fromkeys(found))


def check(source: str, instance: str = "", *, preamble: bool | None = None, include: Sequence[Path] = ()) -> None:
    """Type-check Metal source as Apple's compiler would; raises MetalError with all that is wrong. See `examine`."""
    instance = instance if "<" in instance else ""
    if wrong := examine(source, preamble=preamble, include=include, instance=instance, lint=True):
        raise MetalError("\n".join(map(str, wrong)))


def _at(lines: Sequence[Line], line: int, message: str) -> Wrong:
    if not lines:
        return Wrong("", 0, message)
    file, number, _ = lines[min(max(line, 1), len(lines)) - 1]
    return Wrong(file, number, message)


def _placed(block: str, file: str, lines: Sequence[Line] | None) -> Wrong:
    """A compiler's error with its place in the text, in a library's header that of the call."""
    message = re.search(r"error: (.*)", block)
    place = re.search(rf"(?m)^{re.escape(file)}:(\d+):\d+: ", block) or re.search(rf"{re.escape(file)}:(\d+):", block)
    words = re.sub(r"\s*\[-W[^\]]*\]$", "", message[1]) if message else block
    line = int(place[1]) if place else 0
    return _at(lines, line, words) if lines else Wrong(file, line, words)
