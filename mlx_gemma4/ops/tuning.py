"""Numbers that launch configurations are fitted to: a row for each family of GPUs, and what `tune` found on this one.

In: the GPU's name. Out: a `Tuning`, the same for all launches of this process until `use` changes it.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any, TypeVar

from ..memory import device_info

log = logging.getLogger("mlx_gemma4")

R = TypeVar("R")
TilingKey = tuple[str, int, int]  # of a weight: format, rows (of all experts used), length of a row


@dataclass(frozen=True)
class Tiling:
    """The tiling of a mat-vec; see matvec.metal."""

    lanes: int  # lanes of a simdgroup that share a row
    rows: int  # rows a lane works on at once
    split: int  # simdgroups that share a row
    simdgroups: int  # of a threadgroup, a multiple of split
    chunk: int = 32  # weights a lane takes of each row in a step
    prefetch: bool = False  # load the next step's weights during this one

    def rows_per_group(self, glu: bool) -> int:
        """Results that one threadgroup writes."""
        return self.rows // (1 + glu) * (32 // self.lanes) * (self.simdgroups // self.split)

    def is_sound(self) -> bool:
        """Returns True if the kernel takes it, for weights of any kind."""
        sizes = self.lanes in (4, 8, 16, 32) and self.rows in (2, 4, 8) and self.chunk == 32
        return sizes and 1 <= self.split <= self.simdgroups <= 16 and self.simdgroups % self.split == 0


@dataclass(frozen=True)
class Tuning:
    """Of one GPU. The defaults are an H100's, fitted to what many configurations took there."""

    measured: bool = True  # on this family; else a guess
    cores: int = 132
    # mat-vec: `matvec.tiling`
    large_weights: int = 8 << 20  # of a matrix from which on rows are split for short steps
    head_rows: int = 65536  # of a matrix from which on it has rows enough without
    busy_simdgroups: int = 1900  # that keep the memory busy, for one launch
    simdgroups_per_core: int = 36  # resident at once, with two rows a lane
    full_steps: float = 0.8  # share of a large matrix's steps, at least, in which all lanes have work
    last_wave: float = 0.1  # exponent of the penalty for a last wave of threadgroups that is not full
    step_overhead: float = 0.4  # of the first step of a lane, in steps
    tilings: Mapping[TilingKey, Tiling] = field(default_factory=dict, hash=False)  # that `tune` found better
    # products of a few rows: `few_rows.rows_tiling`
    few_rows_from: int = 2  # rows of x from which on it is faster than the mat-vec
    pair_weights: int = 20 << 20  # of a matrix up to which the mat-vec takes two rows
    fold_from: int = 16  # rows of x from which on scales are folded into weights; more than 32: never
    rows_ahead: bool = True  # up to 8 rows: `RowsTiling.ahead`
    rows_parts: int = 4  # `RowsTiling.parts` of up to 8 rows, at most
    # attention
    attention_threadgroups: int = 384  # that share the keys and values of a layer
    quantized_threadgroups: int = 396  # the same over quantized keys and values: three a core
    prompt_attention: bool = False  # prompts by prompt_attention.metal; False: by MLX's fused attention
    launch_operations: float = 1e13  # of one launch of it, at most

    def scaled(self, cores: int) -> "Tuning":
        """The same for another number of cores: what is to fill the GPU goes along."""
        names = ("busy_simdgroups", "attention_threadgroups", "quantized_threadgroups")
        numbers: dict[str, Any] = {name: max(1, round(getattr(self, name) * cores / self.cores)) for name in names}
        return replace(self, cores=cores, **numbers)


H100 = Tuning()  # measured
OTHER_NVIDIA = replace(H100, measured=False)  # MLX says nothing about their size


def apple(cores: int) -> Tuning:
    """A Mac's GPU with so many cores: a guess, from an H100's numbers a core.

    A core is to have five threadgroups of attention: with an H100's three, fewer loads would be under way than its
    memory can answer. macOS stops launches that take seconds: on a base M1 (2.6e12 operations a second, 60 GB/s) one
    of 4e11 operations takes 0.15 s, or 0.4 s if no cache held anything of the keys and values.
    """
    row = replace(H100.scaled(cores), measured=False, fold_from=64, prompt_attention=True, launch_operations=4e11)
    row = replace(row, rows_ahead=False, rows_parts=1)
    return replace(row, attention_threadgroups=5 * cores, quantized_threadgroups=4 * cores)


# Of the largest GPU of a class: of an M1, of later ones. A Mac's name ends in the class; its architecture tells less.
APPLE_CORES = {"": (8, 10), "Pro": (16, 20), "Max": (32, 40), "Ultra": (64, 80)}
APPLE_CLASSES = {"g": "", "s": "Max", "d": "Ultra"}  # by the last letter of the architecture


def row_of(info: Mapping[str, Any]) -> Tuning:
    """The table's row for a GPU that MLX describes so."""
    name, architecture = str(info.get("device_name", "")), str(info.get("architecture", ""))
    if "H100" in name or "H200" in name:
        return H100
    if architecture.startswith("sm_") or "NVIDIA" in name:
        return OTHER_NVIDIA
    if "apple" in (name + architecture).lower():
        chip = re.search(r"\bM(\d+)(?: (Pro|Max|Ultra))?\b", name)
        kind = (chip[2] or "") if chip else APPLE_CLASSES.get(architecture[-1:], "")
        return apple(APPLE_CORES[kind][not chip or chip[1] != "1"])
    return replace(apple(H100.cores), fold_from=H100.fold_from, attention_threadgroups=384, quantized_threadgroups=396)


@cache
def row_of_this_gpu() -> Tuning:
    """The table's row for this machine's GPU."""
    info = device_info()
    row = row_of(info)
    if not row.measured:
        name = info.get("device_name", "this device")
        log.info("Launch configurations are a guess on %s; `mlx-gemma4 tune` measures them", name)
    return row


_in_use: list[Tuning] = []  # one, or none: the table's
_caches: list[Any] = []


def this_gpu() -> Tuning:
    """The numbers that launches on this machine's GPU follow."""
    return _in_use[0] if _in_use else row_of_this_gpu()


def use(tuning: Tuning | None) -> None:
    """Have all later launches follow these numbers; None: the table's. Steps that are traced or recorded stay."""
    _in_use[:] = [] if tuning is None else [tuning]
    for cached in _caches:
        cached.cache_clear()


def launch_cache(function: Callable[..., R]) -> Callable[..., R]:
    """Keep results that follow from `this_gpu`: a step launches hundreds, and the GPU must not wait for the host."""
    cached = lru_cache(maxsize=4096)(function)
    _caches.append(cached)
    return cached
