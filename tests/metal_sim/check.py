"""Says of Metal texts whether Apple's compiler takes them: `ok FILE` or `refused FILE: reason`, a line each.

    python tests/metal_sim/check.py FILE.metal ...

A file without `#include <metal_stdlib>` is what `mx.fast.metal_kernel` renders: MLX's preamble stands before it.
Exits with 0 if all are ok, 1 if any is refused, 2 if a file can't be read or there is no compiler.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

if __name__ == "__main__":  # run as a file: the package without its __init__, which needs numpy
    package = ModuleType("metal_sim")
    package.__path__ = [str(Path(__file__).resolve().parent)]
    sys.modules["metal_sim"] = package

from metal_sim.compile import MetalError
from metal_sim.frontend import PREAMBLE, Wrong, examine


def folders(path: Path) -> list[Path]:
    """Where a file's `#include "..."` may lie: beside it, in the folders above, in an installed MLX, in ours."""
    mlx = importlib.util.find_spec("mlx")
    installed = [Path(p) / "include" for p in (mlx.submodule_search_locations or [] if mlx else [])]
    return [*path.resolve().parents, *(p for p in installed if p.is_dir()), PREAMBLE]


def verdict(file: str) -> tuple[str, str]:
    """A line for stdout on a file, or one for stderr."""
    path = Path(file)
    try:
        text = path.read_text()
        wrong = examine(text, path.name, include=folders(path) if '#include "' in text else ())
    except (OSError, UnicodeDecodeError, MetalError) as error:
        return "", f"{file}: {' '.join(str(error).split())}"
    return (f"refused {file}: {reason(wrong[0], path.name)}" if wrong else f"ok {file}"), ""


def reason(wrong: Wrong, name: str) -> str:
    """The error on one line, with its line of the file if known."""
    file = "line " if wrong.file == name else f"{wrong.file}:"
    return (f"{file}{wrong.line}: " if wrong.line else "") + " ".join(wrong.message.split())


def main(files: Sequence[str]) -> int:
    """The exit code for these files."""
    if not files:
        print("usage: check.py FILE.metal ...", file=sys.stderr)
        return 2
    code = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for line, trouble in pool.map(verdict, files):
            if trouble:
                print(trouble, file=sys.stderr)
            else:
                print(line, flush=True)
            code = max(code, 2 if trouble else int(line.startswith("refused ")))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
