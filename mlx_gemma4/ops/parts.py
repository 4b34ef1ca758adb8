"""Keys and values in several parts, how they are cut into pieces, and the merge of partial softmaxes.

In and out: MLX arrays. What the kernels of `attention` and `long_attention` share; see parts.metal.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx

from ..gpu.render import Launcher, prepare, render
from .op import Op

TAIL = 64  # tokens that the mutable end of a layer's keys and values can hold
MAX_PARTS = 8  # of keys and values; Metal takes 31 buffers a kernel, and a part needs two
MERGE_SIMDGROUPS = 16  # of a threadgroup of the merge

QueryShape = tuple[int, int, int]  # T, H, D
KVPart = tuple[mx.array, mx.array]  # keys and values, [G, capacity, D] or [1, G, capacity, D] each


class PartShapes(NamedTuple):
    """Shapes of parts, as launches depend on them."""

    kv_heads: int
    lengths: tuple[int, ...]  # capacities


def shapes_of(parts: Sequence[KVPart]) -> PartShapes:
    return PartShapes(parts[0][0].shape[-3], tuple(k.shape[-2] for k, _ in parts))


def span_rows(spans: Iterable[Sequence[int]]) -> mx.array:
    """Return the first token in use and one past the last, of each part, as kernels take them: int32 [MAX_PARTS, 2]."""
    rows = [list(span) for span in spans]
    return mx.array(rows + [[0, 0]] * (MAX_PARTS - len(rows)), mx.int32)


def pieces_of(lengths: Iterable[int], share: int) -> int:
    """Return how many pieces of at most `share` tokens parts of these capacities make: none lies in two parts."""
    return sum(-(-n // share) for n in lengths)


@lru_cache(maxsize=4096)
def cut_of(lengths: tuple[int, ...], share: int, window: int = 0) -> mx.array:
    """Return how parts are cut, as kernels take it: int32 [2 + 2 MAX_PARTS], in the order of parts.metal's *_AT."""
    firsts = [pieces_of(lengths[:i], share) for i in range(MAX_PARTS)]
    return mx.array([share, window, *lengths, *[0] * (MAX_PARTS - len(lengths)), *firsts], mx.int32)


def all_parts(parts: Sequence[tuple[Any, Any]], most: int = MAX_PARTS) -> list[Any]:
    """Return the arrays of parts in a kernel's order; absent ones are the first part's."""
    return [a for part in [*parts, *[parts[0]] * (most - len(parts))] for a in part]


def merge(launcher: Launcher, sums: mx.array, stats: mx.array, shape: tuple[int, ...], out: mx.Dtype) -> Any:
    """Add up the pieces of an attention.

    Args:
        sums: fp32 [T H, pieces, D], of each piece the sum of 2^(score - maximum) times values.
        stats: fp32 [T H, pieces, 2]: maximum of the scores over ln 2, sum of 2^(score - maximum); of a piece without
            tokens -1e30 and 0.
        shape: T, H, D.
        out: dtype of the result.

    Returns:
        [T, H D]
    """
    tokens, heads, dim = shape
    kernel = render("merge", "attention.metal", mx.float16, {"U": out, "SG": MERGE_SIMDGROUPS})
    groups = (1, -(-dim // 128), tokens * heads)
    return prepare(launcher, kernel, groups, 32 * MERGE_SIMDGROUPS, ((tokens, heads * dim), out))(sums, stats)[0]


def merge_reference(sums: mx.array, stats: mx.array, shape: tuple[int, ...], out: mx.Dtype) -> mx.array:
    """`merge` in stock MLX."""
    weights = 2 ** (stats[..., 0] - stats[..., 0].max(axis=-1, keepdims=True))  # [T H, pieces]
    total = (weights * stats[..., 1]).sum(axis=-1, keepdims=True)
    merged = (weights[..., None] * sums).sum(axis=-2) / total
    return merged.reshape(shape[0], -1).astype(out)


MERGE = Op("merge", merge, merge_reference)
