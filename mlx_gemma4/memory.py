"""The memory that this machine can give, and how a model is held in it.

In: the bytes that weights, KV and prompts take. Out: a `MemoryPlan`, or an error before anything is loaded.
docs/memory.md says what is counted.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from .errors import InputError

Holding = Literal["packed", "dense"]

HEADROOM = 400_000_000  # bytes beside all that is counted: Python, small arrays, what MLX keeps
SMALLEST_CHUNK = 128  # tokens of a prompt that are read at a time, at least
DEFAULT_CONTEXT = 8192  # tokens that memory is planned for where nobody says how many
SHORTEST_CONTEXT = 1024  # the same where there is no room for more
CACHE = 1 << 30  # bytes of free buffers that MLX may keep on a Mac, at most


@dataclass(frozen=True)
class Needs:
    """What a model takes beside its weights (model/costs.py). In bytes; contexts and chunks in tokens."""

    kv: Callable[[int, str], int]  # of a context, of a kind of `kv.quantization.KINDS`
    reading: Callable[[int, str, int], int]  # of both, and tokens of a prompt that are read at a time
    chunk: int  # tokens of a prompt that are read at a time if memory allows
    context: int  # the model's own
    kinds: list[str]  # of KV that the model can have
    loading: int  # while weights are loaded

    def beside(self, context: int, kind: str, chunk: int, kv: int = 0) -> int:
        """Bytes in all; `kv`: at least so many of KV."""
        held = max(self.kv(context, kind), kv) + self.reading(context, kind, chunk)
        return HEADROOM + max(held, self.loading)

    def chunks(self) -> Iterator[int]:
        """Tokens of a prompt that may be read at a time, the most first."""
        chunk = self.chunk
        while chunk > SMALLEST_CHUNK:
            yield chunk
            chunk //= 2
        yield chunk


@dataclass(frozen=True)
class Room:
    """What somebody wants to have room for, beside the weights: KV, and what is read later."""

    context: int | None = None  # tokens; None: DEFAULT_CONTEXT, or fewer where that doesn't fit
    kind: str = "full"  # of `kv.quantization.KINDS`
    n_bytes: int = 0  # of all states together, at least
    later: int = 0  # bytes that are taken later, by the towers of a projector


SOME_ROOM = Room()


@dataclass(frozen=True)
class MemoryPlan:
    """The form in which the weights are held, and what is held beside them. Sizes in bytes, lengths in tokens."""

    holding: Holding  # "packed": quantized blocks as they are; "dense": fp32
    weights: int
    available: int
    context: int = 0
    kv: int = 0  # for that context
    chunk: int = 1024  # of a prompt, read at a time
    reading: int = 0  # beside weights and KV while it is
    idle: int = 1 << 63  # that no other program uses
    limit: int = 1 << 63  # that this process may hold, earlier models included
    later: int = 0  # of `Room`

    def describe(self) -> str:
        kind = "as packed quantized arrays" if self.holding == "packed" else "as fp32"
        return (
            f"weights {self.weights / 1e9:.2f} GB {kind}, KV of {self.context:,} tokens {self.kv / 1e9:.2f} GB, "
            f"reading prompts {self.chunk} tokens at a time {self.reading / 1e9:.2f} GB{_gb_later(self.later)}; "
            f"{self.available / 1e9:.1f} GB of memory free"
        )

    @property
    def total(self) -> int:
        return HEADROOM + self.weights + self.kv + self.reading + self.later


def _gb_later(n_bytes: int) -> str:
    return f", its projector {n_bytes / 1e9:.2f} GB" if n_bytes else ""


def make_plan(
    packed: int, dense: int, wanted: Literal["auto", "packed", "dense"], source: str, needs: Needs, room: Room
) -> MemoryPlan:
    """Choose how to hold a model, and how many tokens of a prompt are read at a time: as many as fit.

    A GPU multiplies packed weights directly. MLX's CPU products of quantized weights are slow (docs/log.md), so a CPU
    holds them as fp32 if two thirds of the free memory suffice.

    Args:
        packed, dense: bytes of the weights in either form.
        wanted: "auto" chooses; the others force a form.
        source: the file's name, for the error.
        needs, room: what comes beside the weights.

    Raises:
        InputError: it doesn't fit, even if prompts are read in small chunks (exit code 3).
    """
    available, idle = available_memory(), idle_memory()
    most = min(room.context or DEFAULT_CONTEXT, needs.context)
    beside = needs.beside(most, room.kind, needs.chunk, room.n_bytes) + room.later
    dense_fits = on_cpu() and dense + beside < available * 2 / 3
    holding: Holding = "dense" if wanted == "dense" or (wanted == "auto" and dense_fits) else "packed"
    weights = dense if holding == "dense" else packed

    def fits(context: int, chunk: int, memory: int, kind: str = room.kind) -> bool:
        return weights + needs.beside(context, kind, chunk, room.n_bytes) + room.later <= memory

    contexts = [most]
    while room.context is None and contexts[-1] // 2 >= SHORTEST_CONTEXT:
        contexts.append(contexts[-1] // 2)
    # What other programs use is the system's to move away; smaller chunks come before that.
    choices = [(most, chunk, min(available, idle)) for chunk in needs.chunks()]
    choices += [(context, chunk, available) for context in contexts for chunk in needs.chunks()]
    found = next(((context, chunk) for context, chunk, memory in choices if fits(context, chunk, memory)), None)
    context, chunk = found or (contexts[-1], SMALLEST_CHUNK)
    kv, reading = max(needs.kv(context, room.kind), room.n_bytes), needs.reading(context, room.kind, chunk)
    limit = available + mx.get_active_memory()
    plan = MemoryPlan(holding, weights, available, context, kv, chunk, reading, idle, limit, room.later)
    if found:
        return plan
    ways = []
    if room.kind != "tq4" and "tq4" in needs.kinds and fits(context, chunk, available, "tq4"):
        ways.append("take --kv tq4")
    shorter = bisect_left(range(1, context), True, key=lambda n: not fits(n, chunk, available))  # that fit
    if shorter:
        ways.append(f"keep to a context of {shorter:,} tokens with shorter prompts and replies (--max-tokens)")
    raise InputError(
        f"{source}: needs {plan.total / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are free "
        f"(weights {weights / 1e9:.1f} GB, KV of {context:,} tokens {kv / 1e9:.1f}, reading prompts {chunk} tokens at "
        f"a time {reading / 1e9:.1f}{_gb_later(room.later)}); "
        f"{', '.join([*ways, 'take a smaller quantization or close other programs'])}",
        exit_code=3,
    )


def limit_memory(plan: MemoryPlan) -> None:
    """Have MLX keep to a plan on a Mac, once its weights are loaded.

    Over the memory limit MLX waits for what it has started, so that work under way holds less. Weights and KV are wired
    (MLX does so on macOS 15 and later), or macOS may take them away between two tokens; it keeps 8 GB and a third of
    the memory for the rest of the system.
    """
    if not on_metal():
        return
    info = device_info()
    ram = int(info["memory_size"])
    mx.set_memory_limit(plan.limit)
    mx.set_cache_limit(min(CACHE, ram // 16))
    wired = min(mx.get_active_memory() + plan.kv + plan.later, int(info["max_recommended_working_set_size"]))
    wired = min(wired, ram - max(8 << 30, ram * 35 // 100))
    if wired > 0 and int(platform.mac_ver()[0].partition(".")[0] or 0) >= 15:
        mx.set_wired_limit(wired)


def device_info() -> dict[str, Any]:
    """Return what MLX knows of the device it computes on: names, and sizes in bytes. Keys differ between backends."""
    return mx.device_info()


def memory_size() -> int:
    """Return the bytes of memory of the device that MLX computes on; 0: unknown."""
    info = device_info()
    return int(info.get("total_memory", info.get("memory_size", 0)))


def on_cpu() -> bool:
    """True if MLX computes on the CPU."""
    return mx.default_device().type == mx.DeviceType.cpu


def on_metal() -> bool:
    """True if MLX computes on a Mac's GPU."""
    return not on_cpu() and mx.metal.is_available()


def kv_dtype() -> mx.Dtype:
    """Return the dtype of keys and values in full precision on this device."""
    return mx.float32 if on_cpu() else mx.float16


def available_memory() -> int:
    """Return the bytes that this process may take beside those it has: of the GPU, or else of the system's."""
    if not on_cpu():
        info = device_info()
        if most := int(info.get("max_recommended_working_set_size", 0)):  # on a Mac
            return min(most - mx.get_active_memory(), int(info["memory_size"]) - vm_pages().get("wired down", 0))
        if "free_memory" in info:  # on NVIDIA, as of now; what MLX caches it can use again
            return int(info["free_memory"]) + mx.get_cache_memory()
    if sys.platform == "linux":
        return min(_linux_available(), _cgroup_available())
    return int(device_info().get("memory_size", 1 << 63))


def idle_memory() -> int:
    """Return the bytes that no program uses; on other systems than macOS they are `available_memory`."""
    pages = vm_pages() if on_metal() else {}
    return sum(pages[kind] for kind in ("free", "speculative", "inactive", "purgeable")) if pages else 1 << 63


def vm_pages() -> dict[str, int]:
    """Return macOS' pages by what `vm_stat` says of them ("free", "wired down"), in bytes; {} if that can't be had."""
    try:
        text = subprocess.run(["/usr/bin/vm_stat"], capture_output=True, text=True, timeout=2, check=True).stdout
        size = int(re.findall(r"page size of (\d+) bytes", text)[0])
        return {kind: int(n) * size for kind, n in re.findall(r"^Pages ([a-z ]+): +(\d+)\.$", text, re.M)}
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}


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
