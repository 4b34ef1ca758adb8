"""The memory that this machine has free, and how a model's weights are held in it.

In: the bytes that the tensors will take. Out: a `MemoryPlan`, or an error before anything is loaded.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from .errors import InputError

Holding = Literal["packed", "dense"]

# Bytes beside the weights: activations of a prompt's chunk, a KV state of some thousand tokens, Python itself.
HEADROOM = 400_000_000


@dataclass(frozen=True)
class MemoryPlan:
    """The form in which the weights are held. Sizes in bytes."""

    holding: Holding  # "packed": quantized blocks as they are; "dense": fp32
    weights: int
    available: int

    def describe(self) -> str:
        kind = "as packed quantized arrays" if self.holding == "packed" else "as fp32"
        return f"weights {self.weights / 1e9:.2f} GB {kind}, {self.available / 1e9:.1f} GB of memory free"


def make_plan(
    packed: int, dense: int, wanted: Literal["auto", "packed", "dense"], source: str, kv_per_token: int = 0
) -> MemoryPlan:
    """Choose how to hold a model.

    A GPU multiplies packed weights directly. MLX's CPU products of quantized weights are slow (docs/log.md), so a CPU
    holds them as fp32 if two thirds of the free memory suffice.

    Args:
        packed, dense: bytes of the weights in either form.
        wanted: "auto" chooses; the others force a form.
        source: the file's name, for the error.
        kv_per_token: bytes of KV state a token; 1,024 tokens must fit beside the weights.

    Raises:
        InputError: the weights don't fit (exit code 3).
    """
    available = available_memory()
    beside = HEADROOM + 1024 * kv_per_token
    holding: Holding = "packed"
    if wanted == "dense" or (wanted == "auto" and on_cpu() and dense + beside < available * 2 / 3):
        holding = "dense"
    weights = dense if holding == "dense" else packed
    if weights + beside > available:
        raise InputError(
            f"{source}: needs {(weights + beside) / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are free; "
            "close other programs or take a smaller quantization",
            exit_code=3,
        )
    return MemoryPlan(holding, weights, available)


def device_info() -> dict[str, Any]:
    """Return what MLX knows of the device it computes on: names, and sizes in bytes. Keys differ between backends."""
    return mx.device_info()


def on_cpu() -> bool:
    """True if MLX computes on the CPU."""
    return mx.default_device().type == mx.DeviceType.cpu


def available_memory() -> int:
    """Return the bytes that a model may take: of the GPU, or else of the system's free memory."""
    if not on_cpu():
        info = device_info()
        for key in ("max_recommended_working_set_size", "free_memory", "total_memory", "memory_size"):
            if info.get(key):
                return int(info[key]) - mx.get_active_memory()
    if sys.platform == "linux":
        return min(_linux_available(), _cgroup_available())
    return int(device_info().get("memory_size", 1 << 63))


def _linux_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 63


def _cgroup_available() -> int:
    """Return the bytes left under a container's limit; pages that cache files can be dropped, so they count as free."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - used + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):  # no cgroup v2, or no limit ("max")
        return 1 << 63
