"""Keys and values in several parts, and the merge of partial softmaxes: what all attention kernels share."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from ..gpu.render import Launch, Launcher, prepare, render

TAIL = 64  # tokens that the mutable end of a layer's keys and values can hold
MAX_PARTS = 8  # of keys and values; Metal takes 31 buffers a kernel, and a part needs three

QueryShape = tuple[int, int, int]  # T, H, D
KVPart = tuple[mx.array, mx.array]  # keys and values, [G, capacity, D] or [1, G, capacity, D] each


class PartShapes(NamedTuple):
    """Shapes of parts, as launches depend on them."""

    kv_heads: int
    lengths: tuple[int, ...]  # capacities
    dims: tuple[int, ...]  # how many dimensions their arrays have

    def describe(self) -> tuple[dict[str, Any], list[str]]:
        """Constants for a kernel, and the inputs it goes without."""
        defines = {"PARTS": len(self.dims), **{f"LENGTH{i}": n - 2 for i, n in enumerate(self.dims)}}
        return defines, [f"{kv}{i}" for i in range(len(self.dims), MAX_PARTS) for kv in "kv"]


def shapes_of(parts: Sequence[KVPart]) -> PartShapes:
    return PartShapes(parts[0][0].shape[-3], tuple(k.shape[-2] for k, _ in parts), tuple(k.ndim for k, _ in parts))


def prepare_merge(launcher: Launcher, shape: QueryShape, dtype: mx.Dtype, out: mx.Dtype, simdgroups: int) -> Launch:
    """The launch that adds up the pieces of queries [T, H, D], by so many simdgroups a threadgroup."""
    tokens, heads, dim = shape
    kernel = render("merge", "attention.metal", dtype, {"U": out, "D": dim, "SG": simdgroups})
    groups = (1, -(-dim // 128), tokens * heads)
    return prepare(launcher, kernel, groups, 32 * simdgroups, ((tokens, heads * dim), out))
