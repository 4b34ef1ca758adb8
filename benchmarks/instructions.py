"""Counts the machine instructions of the mat-vec's loop, by type, and the speed that they bound. No GPU is needed.

    python benchmarks/instructions.py [--shape 12B] [--types Q2_K IQ1_S] [--measured BY_TYPE.json] [--listing FOLDER]

In: nothing, or a JSON file of by_type.py, whose GB/s go beside the bounds. Out: a table in Markdown, for one row
through gate and up: instructions a weight, those of the loop and of whole numbers among them, and all others of a
thread, counted once, by its weights; GB/s of the file's bytes if nothing but instructions took time.

NVRTC compiles for sm_90 what an H200 would launch, nvdisasm lists it (pip install nvidia-cuda-nvrtc nvidia-cuda-runtime
nvidia-cuda-cccl nvidia-cuda-nvdisasm, or a toolkit). The loop is the longest stretch that a branch goes back over. A
scheduler issues an instruction of 32 lanes a cycle; those of whole numbers take two (CUDA C++ Programming Guide).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import by_type
import few_rows
import mlx.core as mx

from mlx_gemma4.doctor.published import PUBLISHED
from mlx_gemma4.gpu import cuda_compiler
from mlx_gemma4.quant.formats import FORMATS

CORES, SCHEDULERS, CLOCK = 132, 4, 1.98e9  # of an H200
HALF = re.compile(r"LOP3|SHF|PRMT|IADD|ISETP|LEA|IMNMX|VIMNMX|VIADD|SEL|FMNMX|FSETP|FSEL|BMSK|SGXT|IABS|POPC|PLOP3|R2P")
LINE, LABEL, BRANCH = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", r"^(\.L_\S+):", r"BRA.*`\((\.L_\S+)\)"


def nvdisasm() -> str:
    """The path of NVIDIA's disassembler."""
    spec = find_spec("nvidia")
    there = [Path(p) / "cu13/bin/nvdisasm" for p in (spec and spec.submodule_search_locations) or ()]
    found = next((str(p) for p in there if p.is_file()), None) or shutil.which("nvdisasm")
    return found or sys.exit("nvdisasm is missing; pip install nvidia-cuda-nvdisasm")


def listing(shape: str, type: str) -> tuple[str, str]:
    """The CUDA text of a type's mat-vec and its machine code as text."""
    texts: dict[str, str] = {}
    call, *_ = next(by_type.calls_of(shape, type, lazy=True))
    few_rows.note_texts(call, mx.zeros(1), texts)
    ((text, name),) = texts.items()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cuda_compiler.compile_text(text, name, "sm_90"))
        return text, subprocess.run([nvdisasm(), "-c", file.name], capture_output=True, text=True, check=True).stdout


def instructions(code: str) -> tuple[list[str], list[str]]:
    """The opcodes of the longest loop and of all else, without padding."""
    ops: list[str] = []
    labels: dict[str, int] = {}
    loop = (0, 0)
    for line in code.splitlines():
        if label := re.match(LABEL, line):
            labels[label[1]] = len(ops)
        elif op := re.search(LINE, line):
            if op[1] == "NOP":
                continue
            ops.append(op[1])
            if (to := re.search(BRANCH, line)) and to[1] in labels:
                loop = max(loop, (labels[to[1]], len(ops)), key=lambda ends: ends[1] - ends[0])
    end = next((i for i in range(len(ops) - 1, -1, -1) if ops[i] == "EXIT"), len(ops)) + 1
    return ops[slice(*loop)], ops[: loop[0]] + ops[loop[1] : end]


def row_of(shape: str, type: str, folder: Path | None) -> tuple[list[str], float]:
    """A type's cells, and its bound in bytes a second."""
    text, code = listing(shape, type)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{type}.sass").write_text(code)
    define = {n: int(v) for n, v in re.findall(r"#define (\w+) (\d+)$", text, re.M)}
    loop, rest = instructions(code)
    weights = define["ROWS"] * define["CHUNK"]
    steps = -(-PUBLISHED[shape].hidden // define["CHUNK"] // (define["LANES"] * define["SPLIT"]))
    whole = sum(bool(HALF.match(op)) for op in loop)
    per, per_whole, once = len(loop) / weights, whole / weights, len(rest) / (weights * steps)
    bits = by_type.BLOCKS[type].block_bytes * 8 / by_type.BLOCKS[type].block_size
    rate = CORES * SCHEDULERS * CLOCK * 32 / max(per + once, 2 * per_whole) * bits / 8
    counts = f"{len(loop)} / {weights} = {per:.2f}"
    return [type, counts, f"{per_whole:.2f}", f"{once:.2f}", f"{rate / 1e9:.0f}"], rate


def table(options: argparse.Namespace) -> Iterator[str]:
    """Yield the table's lines."""
    measured = {}
    if options.measured:
        rows = json.loads(options.measured.read_text())["types"]
        measured = {r["type"]: r["kernels"]["1 row"]["bytes_per_second"] for r in rows if "kernels" in r}
    yield "| type | loop / weights | whole numbers | once | bound GB/s | measured |"
    yield "|---" * 6 + "|"
    for type in options.types:
        cells, rate = row_of(options.shape, type, options.listing)
        got = f"{measured[type] / 1e9:.0f} ({measured[type] / rate:.0%})" if type in measured else ""
        yield f"| {' | '.join([*cells, got])} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", type=str.upper, default="12B", choices=PUBLISHED)
    parser.add_argument("--types", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--measured", type=Path)
    parser.add_argument("--listing", type=Path, help="a folder for the machine code as text")
    print(*table(parser.parse_args()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
