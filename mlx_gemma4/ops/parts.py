"""Keys and values in several parts, and the merge of partial softmaxes: what all attention kernels share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..gpu.render import METAL_TYPES, Launcher, build, render

MAX_PARTS = 8  # of keys and values; Metal takes 31 buffers a kernel, and a part needs three

KVPart = tuple[mx.array, mx.array]  # keys and values, [G, capacity, D] or [1, G, capacity, D] each
Launch = tuple[Callable[..., Sequence[Any]], dict[str, Any]]  # a kernel and its arguments but for the inputs


def describe_parts(dims: tuple[int, ...]) -> tuple[dict[str, object], list[str]]:
    """Parts whose keys and values have so many dimensions: constants for a kernel, and the inputs it goes without."""
    defines: dict[str, object] = {"PARTS": len(dims), **{f"LENGTH{i}": n - 2 for i, n in enumerate(dims)}}
    return defines, [f"{kv}{i}" for i in range(len(dims), MAX_PARTS) for kv in "kv"]


def merge(launcher: Launcher, shape: tuple[int, int, int], dtype: mx.Dtype, out: mx.Dtype, simdgroups: int) -> Launch:
    """What adds up the pieces of queries [T, H, D], by so many simdgroups a threadgroup: attention.metal's `merge`."""
    tokens, heads, dim = shape
    kernel = render("merge", "attention.metal", dtype, {"U": METAL_TYPES[out], "D": dim, "SG": simdgroups})
    launch = {
        "grid": (32 * simdgroups, -(-dim // 128), tokens * heads),
        "threadgroup": (32 * simdgroups, 1, 1),
        "output_shapes": [(tokens, heads * dim)],
        "output_dtypes": [out],
    }
    return build(launcher, kernel), launch
