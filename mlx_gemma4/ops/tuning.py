"""Numbers that launch configurations are fitted to, of a family of GPUs."""

import logging
from dataclasses import dataclass, replace
from functools import cache

import mlx.core as mx

from ..memory import device_info

log = logging.getLogger("mlx_gemma4")


@dataclass(frozen=True)
class Tuning:
    """Of one family of GPUs. The defaults are an H100's, fitted to what many configurations took there."""

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
    # products of a few rows: `few_rows.rows_tiling`
    few_rows_from: int = 2  # rows of x from which on it is faster than the mat-vec
    # attention
    attention_threadgroups: int = 384  # that share the keys and values of a layer
    quantized_threadgroups: int = 396  # the same over quantized keys and values: three a core
    prompt_attention: bool = False  # prompts by prompt_attention.metal; False: by MLX's fused attention
    launch_operations: float = 1e13  # of one launch of it, at most


@cache
def this_gpu() -> Tuning:
    """The numbers for this machine's GPU: those of an H100 everywhere, a guess on other families."""
    name = str(device_info().get("device_name", "this device"))
    if "H100" in name or "H200" in name:
        return Tuning()
    log.info("Launch configurations are fitted to an H100 and a guess on %s", name)
    # macOS stops launches that take seconds. On a base M1 (2.6e12 operations a second, 60 GB/s) one of these takes
    # 0.15 s, or 0.4 s if no cache held anything of the keys and values.
    return replace(Tuning(), measured=False, prompt_attention=not mx.cuda.is_available(), launch_operations=4e11)
