"""Questions to Apple's compiler and GPU, through `mx.fast.metal_kernel`: is this text taken, are these kernels right?

A launcher comes in, so that the same questions can be put to the simulator and to its checker.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gemma4.doctor import table, verdict
from mlx_gemma4.doctor.sizes import checks
from mlx_gemma4.ops.cases import Sizes

CASES = Path(__file__).parent / "metal_sim" / "cases"
WHOLE = "#include <metal_stdlib>\nusing namespace metal;\n"
BUFFERS = "device float* y [[buffer(0)]], const device float* x [[buffer(1)]]"
KERNEL = f"kernel void f({BUFFERS}, uint i [[thread_position_in_grid]])"
# Refused alone, but right behind MLX's preamble, which has math on bfloat, and simd functions on 64 bits and bool.
RIGHT_BEHIND_MLX = {
    "bf exp",
    "simd sum bool",
    "simd size t",
    "simd prod long",
    "simd min ulong",
    "simd bcast long",
    "simd shuffle ulong",
    "simd down long",
    "simd prefix long",
}
COMPILER = "[metal::Device]"  # how MLX begins an error of Apple's compiler


def cases(path: Path) -> Iterator[tuple[str, str]]:
    """Names and texts of a file of cases. `>> ` begins a kernel's body; [mlx]: as MLX renders it; [whole]: as is."""
    for block in path.read_text().split("// case: ")[1:]:
        name, text = block.split("\n", 1)
        text = re.sub(r"(?ms)^>> (.*?)\s*\Z", lambda m: f"{KERNEL} {{\n{m[1]}\n}}\n", text)
        yield name, text if re.search(r"\[(mlx|whole)\]", name) else WHOLE + text


def refusal(text: str, launcher: Any) -> str:
    """Return what the compiler says against a Metal text, on one line; "" if it takes it.

    The text stands before a kernel of ours that writes one number, and so behind MLX's preamble.
    """
    run = launcher(
        name=f"probe_{hashlib.sha256(text.encode()).hexdigest()[:12]}",
        input_names=["probe_in"],
        output_names=["probe_out"],
        header=f"{text}\n",
        source="probe_out[0] = probe_in[0] + 1;",
    )
    one = (1, 1, 1)
    try:
        (out,) = run(inputs=[mx.ones(1)], grid=one, threadgroup=one, output_shapes=[(1,)], output_dtypes=[mx.float32])
        mx.eval(out)
    except RuntimeError as error:
        if COMPILER not in str(error):  # no verdict on the text: no memory, no GPU
            raise
        return " ".join(str(error).split())
    assert out.item() == 2
    return ""


def wrong_verdicts(path: Path, launcher: Any) -> list[str]:
    """Return the cases of a file in cases/refused or cases/accepted that come out wrong, and why."""
    refused = path.parent.name == "refused"
    found = {name: refusal(text, launcher) for name, text in cases(path)}
    wanted = {name: refused and name not in RIGHT_BEHIND_MLX for name in found}
    return [f"{name}: {said or 'taken'}" for name, said in found.items() if bool(said) != wanted[name]]


def all_sizes() -> dict[str, Sizes]:
    """The sizes of every published model, every format, and a small one."""
    return {**table.real_sizes(), "small": table.small_sizes()["small"]}


def ill_kernels(sizes: Sizes, launcher: Any) -> dict[str, str]:
    """Return the checks of these sizes whose kernels don't give what their references give, and their verdicts.

    Weights have a few rows; launches are those of all of them.
    """
    results = {c.key: verdict.run_check(c, launcher) for c in checks(sizes, verdict.LENGTHS, verdict.QUICK_ROWS)}
    return {key: result.verdict for key, result in results.items() if result.verdict != "ok"}
