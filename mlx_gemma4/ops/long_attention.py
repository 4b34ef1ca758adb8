"""Attention over long keys and values in fp16 on matrix units, for one token or a handful.

In and out: MLX arrays. `long_attention` launches long_attention.metal and the merge of attention.metal; `attention`
takes it where `takes` says so, and `attention_reference` is the reference of both. Nothing here knows a model or a KV
state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..gpu.render import Launcher, build, float_literal, render
from .parts import describe_parts, merge
from .tuning import CORES

if TYPE_CHECKING:
    from .parts import KVPart, Launch

LONG = 8192  # tokens of capacity from which on matrix units pay: fewer fill too few threadgroups


@dataclass(frozen=True)
class LongLaunchConfig:
    """How attention over many tokens is cut; see long_attention.metal."""

    simdgroups: int  # of a threadgroup, a divisor of D / 64
    tiles: int  # of 8 queries, a threadgroup
    share: int  # blocks of 16 * simdgroups tokens, a piece
    batch: int = 8  # loads that a lane asks for at once, two times over; a multiple of 4 that divides D / 16
    resident: int = 2  # threadgroups that a core is to hold, which limits their registers on CUDA
    merging: int = 8  # simdgroups of a threadgroup of the merge

    def pieces(self, lengths: Sequence[int]) -> int:
        """Of parts with these capacities: none lies in two of them."""
        return sum(-(-n // (16 * self.simdgroups * self.share)) for n in lengths)


def long_launch_config(
    lengths: Sequence[int],
    rows: int,
    kv_heads: int,
    dim: int,
    *,
    simdgroups: int = 8,
    tiles: int = 0,
    batch: int = 0,
    resident: int = 0,
    waves: float = 1.0,
) -> LongLaunchConfig:
    """The cut for `rows` queries a KV head over parts with these capacities.

    The smallest pieces of which a large GPU holds all at once (one wave); what is smaller would be more to merge. As
    many threadgroups as fill a core with 16 simdgroups of 128 registers each: two tiles of queries take so many that
    loads come in smaller batches. The options are for measurements; 0: what follows from the rest.
    """
    simdgroups = max(n for n in range(1, simdgroups + 1) if dim // 64 % n == 0)
    tiles = tiles or (1 if rows <= 8 else 2)
    batch = batch if batch and dim // 16 % batch == 0 else 8 if tiles == 1 and dim % 128 == 0 else 4
    resident = resident or 16 // simdgroups
    across, room = -(-rows // (8 * tiles)) * kv_heads, int(CORES * resident * waves)
    cut = LongLaunchConfig(
        simdgroups, tiles, max(1, sum(lengths) * across // (16 * simdgroups * room)), batch, resident
    )
    while cut.pieces(lengths) * across > room and cut.pieces(lengths) > len(lengths):
        cut = replace(cut, share=cut.share + 1)
    step = 1 << max(0, cut.share.bit_length() - 3)  # few different shares, for each is a kernel of its own
    cut = replace(cut, share=-(-cut.share // step) * step)
    few = cut.pieces(lengths)
    return replace(cut, merging=8 if few <= 64 else 16 if few <= 128 else 32)


def supports(q: mx.array, parts: Sequence[KVPart], window: int) -> bool:
    """Whether `attention` is to run as `long_attention`."""
    return (
        window == 0 and q.dtype == mx.float16 and q.shape[-1] % 64 == 0 and sum(k.shape[-2] for k, _ in parts) >= LONG
    )


def long_attention(
    launcher: Launcher,
    q: mx.array,
    parts: Sequence[KVPart],
    spans: mx.array,
    *,
    scale: float,
    out: mx.Dtype | None = None,
    cut: LongLaunchConfig | None = None,
) -> Any:
    """A few new tokens attend to all that came before and to themselves: `attention` without a window.

    Args:
        q: fp16 [T, H, D], T up to 8, D a multiple of 64.
        parts: up to MAX_PARTS of keys and values [G, capacity, D] or [1, G, capacity, D] in fp16, in the order of the
            tokens; the last ends with the T tokens themselves.
        spans: int32 [parts, 2]: first and one past the last token in use, of each part.
        scale: of the scores.
        out: dtype of the result, q's by default.
        cut: instead of `long_cut`'s.

    Returns:
        [T, H D]
    """
    lengths, dims = tuple(k.shape[-2] for k, _ in parts), tuple(k.ndim for k, _ in parts)
    cached = (q.shape, parts[0][0].shape[-3], lengths, dims, launcher, scale, out or q.dtype, cut)
    run, launch, (run_merge, merge_launch) = _prepared(*cached)
    sums, stats = run(inputs=[q, spans, *(a for part in parts for a in part)], **launch)
    return run_merge(inputs=[sums, stats], **merge_launch)[0]


@lru_cache(maxsize=4096)  # several launches a token: the GPU must not wait for this to be worked out
def _prepared(
    shape: tuple[int, int, int],
    kv_heads: int,
    lengths: tuple[int, ...],
    dims: tuple[int, ...],
    launcher: Launcher,
    scale: float,
    out: mx.Dtype,
    cut: LongLaunchConfig | None,
) -> tuple[Callable[..., Sequence[Any]], dict[str, Any], Launch]:
    """The kernel, its arguments but for the inputs, and the merge."""
    tokens, heads, dim = shape
    rows, total = heads // kv_heads * tokens, tokens * heads
    cut = cut or long_launch_config(lengths, rows, kv_heads, dim)
    defines: dict[str, object] = {"D": dim, "GQA": heads // kv_heads, "SG": cut.simdgroups, "TILES": cut.tiles}
    defines |= {
        "SHARE": 16 * cut.simdgroups * cut.share,
        "BATCH": cut.batch,
        "RESIDENT": cut.resident,
        "SCALE": float_literal(scale),
    }
    described, absent = describe_parts(dims)
    defines |= described
    kernel = render("long_attention", "long_attention.metal", mx.float16, defines, absent)
    pieces = cut.pieces(lengths)
    launch = {
        "grid": (32 * cut.simdgroups * -(-rows // (8 * cut.tiles)), pieces, kv_heads),
        "threadgroup": (32 * cut.simdgroups, 1, 1),
        "output_shapes": [(total, pieces, dim), (total, pieces, 2)],
        "output_dtypes": [mx.float32] * 2,
    }
    return build(launcher, kernel), launch, merge(launcher, shape, mx.float16, out, cut.merging)
