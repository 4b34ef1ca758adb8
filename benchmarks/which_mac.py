"""Which model and quantization fit which Mac: docs/models.md's table, by the package's own memory plan.

    python benchmarks/which_mac.py

In: nothing; shapes of the published models, no file and no Mac. Out: for each model and quantization the weights in GB,
and for each size of memory the longest context that the plan would take there with keys and values in 16 bits.
What is computed: weights, keys and values, reading prompts with attention of our own, 0.4 GB for the rest, against the
working set that macOS recommends to a program: two thirds of the memory below 36 GB, three quarters from there on.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterator
from math import prod
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx

from mlx_gemma4.doctor.published import PUBLISHED, Shape
from mlx_gemma4.memory import SMALLEST_CHUNK, Needs
from mlx_gemma4.model import costs
from mlx_gemma4.ops.tuning import apple

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import make_synthetic

MACS = (8, 16, 24, 32, 36, 48, 64, 96, 128, 192)  # GiB of memory, as Apple sells them
TYPES = ("Q4_0", "Q4_K_M", "Q6_K", "Q8_0", "BF16")
LEAST = 4096  # tokens; a shorter context is no conversation


def weight_bytes(shape: Shape, kind: str) -> int:
    """Bytes of a model's tensors in a quantization: llama.cpp's mix for Q4_K_M, else all matrices in one type."""
    total = 0
    for dims, type in make_synthetic.tensors(shape).values():
        if kind != "Q4_K_M" and type not in ("F32", "BF16"):
            type = kind if kind in ("Q8_0", "BF16", "Q4_0") or dims[-1] % 256 == 0 else "Q8_0"
        _, block, block_bytes = make_synthetic.TYPES[type]
        total += prod(dims) // block * block_bytes
    return total


def working_set(gib: int) -> int:
    """Bytes that macOS recommends a program to take of the GPU's memory."""
    return (gib << 30) * 2 // 3 if gib < 36 else (gib << 30) * 3 // 4


def longest(needs: Needs, weights: int, available: int) -> int:
    """Return the longest context, in tokens, that fits beside weights; 0: not one of LEAST."""
    fits = bisect_right(
        range(1, needs.context + 1), available, key=lambda n: weights + needs.beside(n, "full", SMALLEST_CHUNK)
    )
    return fits if fits >= LEAST else 0


def table() -> Iterator[str]:
    """Yield the table's lines, in Markdown."""
    yield "| model | quantization | weights, GB | " + " | ".join(f"{n} GB" for n in MACS) + " |"
    yield "|---" * (3 + len(MACS)) + "|"
    with (
        patch.object(costs, "on_cpu", lambda: False),
        patch.object(costs, "on_metal", lambda: True),
        patch.object(costs, "this_gpu", lambda: apple(80)),
    ):
        for name, shape in PUBLISHED.items():
            config = make_synthetic.config_of(shape)
            needs = costs.needs_of(config, mx.float16, costs.PREFILL_CHUNK, True)
            for kind in TYPES:
                weights = weight_bytes(shape, kind)
                found = (longest(needs, weights, working_set(gib)) for gib in MACS)
                shown = ("" if not n else "all" if n == config.context else f"{n >> 10}K" for n in found)
                yield f"| {name} | {kind} | {weights / 1e9:.1f} | " + " | ".join(shown) + " |"


if __name__ == "__main__":
    print("\n".join(table()))
