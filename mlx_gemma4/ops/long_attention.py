"""Attention over many keys and values in fp16 on matrix units, for one token or a handful: long_attention.metal.

In and out: MLX arrays. One launch, and the merge of attention.metal. `attention.attention_reference` is its reference.
Knows no model and no KV state.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import mlx.core as mx

from ..gpu.render import Launch, Launcher, prepare, render
from .parts import KVPart, PartShapes, QueryShape, all_parts, cut_of, merge, pieces_of, shapes_of
from .tuning import Tuning, launch_cache, this_gpu

LONG = 8192  # tokens of capacity from which on matrix units pay: fewer fill too few threadgroups


@dataclass(frozen=True)
class LongLaunchConfig:
    """The launch configuration of attention over many tokens; see long_attention.metal."""

    simdgroups: int  # of a threadgroup, a divisor of D / 64
    tiles: int  # of 8 queries, a threadgroup
    share: int  # blocks of a piece
    batch: int = 8  # loads that a lane asks for at once, two times over; a multiple of 4 that divides D / 16
    resident: int = 2  # threadgroups that a core is to hold, which limits their registers on CUDA

    @property
    def piece(self) -> int:
        """Tokens of a piece."""
        return 16 * self.simdgroups * self.share

    def pieces(self, lengths: Sequence[int]) -> int:
        """Of parts with these capacities: none lies in two of them."""
        return pieces_of(lengths, self.piece)


@launch_cache
def long_launch_config(
    lengths: tuple[int, ...], heads: int, tokens: int, kv_heads: int, dim: int, gpu: Tuning | None = None
) -> LongLaunchConfig:
    """The configuration for `heads` queries a token and KV head over parts with these capacities.

    The smallest pieces of which a large GPU holds all at once (one wave); what is smaller would be more to merge. As
    many threadgroups as fill a core with 16 simdgroups of 128 registers each: two tiles of queries take so many that
    loads come in smaller batches. All but the share follows from the model, so that it needs one text.
    """
    simdgroups, tiles = max(n for n in range(1, 9) if dim // 64 % n == 0), 1 if heads <= 8 else 2
    batch, resident = 8 if tiles == 1 and dim % 128 == 0 else 4, 16 // simdgroups
    across, room = -(-heads * tokens // (8 * tiles)) * kv_heads, (gpu or this_gpu()).cores * resident
    share = max(1, sum(lengths) * across // (16 * simdgroups * room))
    config = LongLaunchConfig(simdgroups, tiles, share, batch, resident)
    while config.pieces(lengths) * across > room and config.pieces(lengths) > len(lengths):
        config = replace(config, share=config.share + 1)
    return config


def supports(q: mx.array, parts: Sequence[KVPart], window: int) -> bool:
    """Returns True if `long_attention` takes it and is faster than `attention`."""
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
    config: LongLaunchConfig | None = None,
) -> Any:
    """A few new tokens attend to all that came before and to themselves: `attention` without a window.

    Args:
        q: fp16 [T, H, D], D a multiple of 64; the others as of `attention`.
        config: in place of `long_launch_config`'s.

    Returns:
        [T, H D]
    """
    sums, stats = long_attention_pieces(launcher, q, parts, spans, scale=scale, config=config)
    return merge(launcher, sums, stats, q.shape, out or q.dtype)


def long_attention_pieces(
    launcher: Launcher,
    q: mx.array,
    parts: Sequence[KVPart],
    spans: mx.array,
    *,
    scale: float,
    config: LongLaunchConfig | None = None,
) -> Any:
    """`long_attention` whose pieces are not yet added up: sums and stats, as `parts.merge` takes them."""
    (tokens, heads, dim), shapes = q.shape, shapes_of(parts)
    kv_heads = shapes.kv_heads
    config = config or long_launch_config(shapes.lengths, heads // kv_heads, tokens, kv_heads, dim)
    launch = _prepared(launcher, q.shape, shapes, scale, config)
    return launch(q, spans, cut_of(shapes.lengths, config.piece), *all_parts(parts))


@lru_cache(maxsize=4096)  # several launches a token: the GPU must not wait for the host
def _prepared(
    launcher: Launcher, shape: QueryShape, parts: PartShapes, scale: float, config: LongLaunchConfig
) -> Launch:
    (tokens, heads, dim), (kv_heads, lengths) = shape, parts
    rows, total, pieces = heads // kv_heads * tokens, tokens * heads, config.pieces(lengths)
    defines: dict[str, Any] = {"D": dim, "GQA": heads // kv_heads, "SG": config.simdgroups, "TILES": config.tiles}
    defines |= {"BATCH": config.batch, "RESIDENT": config.resident, "SCALE": float(scale)}
    kernel = render("long_attention", "long_attention.metal", mx.float16, defines)
    groups = (-(-rows // (8 * config.tiles)), pieces, kv_heads)
    results = ((total, pieces, dim), mx.float32), ((total, pieces, 2), mx.float32)
    return prepare(launcher, kernel, groups, 32 * config.simdgroups, *results)
