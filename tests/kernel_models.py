"""Fixture models whose decode steps run in kernels on the Metal simulator, and the launches each may make a layer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from kernel_cases import metal
from recorded import path

from mlx_gemma4 import load
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.op import OpKey

# Files whose q, k and v, and whose gate and up, share a type: what the launch budget is stated for.
UNIFORM = {"12b": "q8_0", "31b": "q8_0", "gemma3": "q8_0", "e2b": "q8_0", "e4b": "q8_0", "26b-a4b": "q8_0"}
BUDGET = {"12b": 9, "31b": 9, "gemma3": 9, "e2b": 12, "e4b": 12, "26b-a4b": 14}


def both(
    kind: str, tag: str, folder: Path, launcher: Any = metal, off: frozenset[OpKey] = frozenset([OpKey("expand")])
) -> tuple[Model, Model]:
    """A model with stock operations, and the same weights with kernels; tiles of a prompt, which round to fp16, off."""
    plain = load(path(kind, tag, folder), weights="packed").model
    return plain, Model(plain.config, plain.weights, Kernels(launcher, off))


class Counting:
    """A launcher that runs kernels on the simulator and counts their launches."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()

    def __call__(self, **declared: Any) -> Any:
        kernel = metal(**declared)
        name = declared["name"].rsplit("_", 1)[0]

        def call(**arguments: Any) -> Any:
            self.launches[name] += 1
            return kernel(**arguments)

        return call
