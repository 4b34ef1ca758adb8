"""The attention kernels: norms and RoPE of q, k and v with the write to the KV tail, and attention itself; with
references.

In and out: MLX arrays for one token, or a handful (T up to 8). `rotations` and `qkv_post` launch one kernel through a
`Launcher` (kernels.py), `attention` one or two; the function named `.._twin` has the same arguments and result in stock
MLX. Nothing here knows a model or a KV state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import mlx.core as mx

from ..gpu.render import METAL_TYPES, Launcher, build, float_literal, render
from . import long_attention, parts
from .op import Op
from .parts import KVPart, Launch
from .tuning import CORES

TAIL = 64  # tokens that the mutable end of a layer's keys and values can hold
SHORT = 64  # tokens up to which attention is one launch


# ---------------------------------------------------------------- attention


@dataclass(frozen=True)
class LaunchConfig:
    """How attention is cut; see attention.metal."""

    rows: int  # queries that a threadgroup holds
    simdgroups: int = 4  # of a threadgroup
    keys: int = 4  # tokens a lane scores at once
    threadgroups: int = 0  # that share the length, at most about so many; 0: it is one piece, which needs no merge

    @property
    def block(self) -> int:
        """Tokens that a threadgroup takes at a time."""
        return 4 * self.keys * self.simdgroups

    def blocks(self, lengths: Sequence[int], share: int = 1) -> int:
        """Pieces of `share` blocks in parts with room for so many tokens: none lies in two parts."""
        return sum(-(-length // (self.block * share)) for length in lengths)

    def share(self, lengths: Sequence[int], across: int) -> int:
        """Blocks of a piece, for `across` threadgroups to work on each piece."""
        if self.blocks(lengths) * across <= self.threadgroups:
            return 1
        most = max(self.threadgroups // across, 2 * len(lengths))
        share = -(-self.blocks(lengths) // most)
        while self.blocks(lengths, share) > most:  # parts' last pieces are short
            share += 1 + share // 16
        return share

    def pieces(self, lengths: Sequence[int], across: int) -> int:
        """Of the length, likewise."""
        return self.blocks(lengths, self.share(lengths, across)) if self.threadgroups else 1


def launch_config(lengths: Sequence[int], rows: int, kv_heads: int, threadgroups: int = 384) -> LaunchConfig:
    """The cut for `rows` queries a KV head over parts of up to so many tokens.

    A threadgroup waits for memory twice a block, so as many as a large GPU holds at once share the blocks; only where
    there would be more does one take several, and where there are too few, blocks are small and queries apart. A tail
    alone is one piece: there is nothing to merge.
    """
    if sum(lengths) <= SHORT:
        return LaunchConfig(min(rows, 2), simdgroups=16, keys=1)
    cut = LaunchConfig(-(-rows // -(-rows // 8)), threadgroups=threadgroups)
    if cut.rows > 4:
        cut = replace(cut, keys=2)  # more would leave room for fewer threadgroups, by their registers
    while cut.blocks(lengths) * -(-rows // cut.rows) * kv_heads < CORES:
        if cut.keys > 2:
            cut = replace(cut, keys=2)
        elif cut.rows > 2:
            cut = replace(cut, rows=-(-cut.rows // 2))
        else:
            break
    return cut


def attention(
    launcher: Launcher,
    q: mx.array,
    parts: Sequence[KVPart],
    spans: mx.array,
    *,
    scale: float,
    window: int = 0,
    out: mx.Dtype | None = None,
    cut: LaunchConfig | None = None,
) -> Any:
    """A few new tokens attend to all that came before and to themselves.

    Args:
        q: [T, H, D], T up to 8, D a multiple of 32.
        parts: up to `long_attention.MAX_PARTS` of keys and values in q's dtype, in the order of the tokens; the last
            ends with the T tokens themselves.
        spans: int32 [parts, 2]: first and one past the last token in use, of each part.
        scale: of the scores.
        window: each token sees only the last `window` ones, itself included; 0: all. Spans may be wider.
        out: dtype of the result, q's by default.
        cut: instead of `attention_cut`'s.

    Returns:
        [T, H D]
    """
    done, merge = _launched(q, parts, spans, launcher, scale, window, out, cut, False)
    return done[0] if merge is None else merge[0](inputs=list(done), **merge[1])[0]


def attention_sums(launcher: Launcher, q: mx.array, parts: Sequence[KVPart], spans: mx.array, *, scale: float) -> Any:
    """`attention` whose pieces are not yet added up, nor divided: for those who have more to add.

    Returns:
        sums fp32 [T H, pieces, D] and stats fp32 [T H, pieces, 2]: maximum of the scores over ln 2, sum of
        2^(score - maximum); of a piece without tokens -1e30 and 0.
    """
    return _launched(q, parts, spans, launcher, scale, 0, None, None, True)[0]


def _launched(
    q: mx.array,
    parts: Sequence[KVPart],
    spans: mx.array,
    launcher: Launcher,
    scale: float,
    window: int,
    out: mx.Dtype | None,
    cut: LaunchConfig | None,
    undivided: bool,
) -> tuple[Sequence[Any], Launch | None]:
    """What attention's own kernel gives, and the merge that is to follow."""
    lengths = tuple(k.shape[-2] for k, _ in parts)
    dims = tuple(k.ndim for k, _ in parts)
    cached = (q.shape, q.dtype, parts[0][0].shape[-3], lengths, dims, launcher, scale, window, out, cut, undivided)
    run, launch, merge = _prepared_attention(*cached)
    return run(inputs=[q, spans, *(a for part in parts for a in part)], **launch), merge


@lru_cache(maxsize=4096)  # hundreds of launches a token: the GPU must not wait for this to be worked out
def _prepared_attention(
    shape: tuple[int, int, int],
    dtype: mx.Dtype,
    kv_heads: int,
    lengths: tuple[int, ...],
    dims: tuple[int, ...],
    launcher: Launcher,
    scale: float,
    window: int,
    out: mx.Dtype | None,
    cut: LaunchConfig | None,
    undivided: bool,
) -> tuple[Callable[..., Sequence[Any]], dict[str, Any], Launch | None]:
    """The kernel, its arguments but for the inputs, and the same of the merge if there is one."""
    tokens, heads, dim = shape
    rows, total = heads // kv_heads * tokens, tokens * heads
    cut = cut or launch_config(lengths, rows, kv_heads)
    across = -(-rows // cut.rows)
    pieces = cut.pieces(lengths, across * kv_heads)
    split = undivided or cut.threadgroups > 0
    out = out or dtype
    defines = {"D": dim, "GQA": heads // kv_heads, "ROWS": cut.rows, "SG": cut.simdgroups, "KEYS": cut.keys}
    defines |= {"WINDOW": window, "SPLIT": split, "WHOLE": cut.threadgroups == 0}
    defines |= {"SHARE": cut.share(lengths, across * kv_heads) if cut.threadgroups else 1}
    described, absent = parts.describe_parts(dims)
    kernel = render(
        "attention",
        "attention.metal",
        dtype,
        defines | described | {"U": METAL_TYPES[out], "SCALE": float_literal(scale)},
        absent + (["out"] if split else ["sums", "stats"]),
    )
    launch: dict[str, Any] = {
        "grid": (32 * cut.simdgroups * across, pieces, kv_heads),
        "threadgroup": (32 * cut.simdgroups, 1, 1),
        "output_shapes": [(total, pieces, dim), (total, pieces, 2)] if split else [(tokens, heads * dim)],
        "output_dtypes": [mx.float32] * 2 if split else [out],
    }
    if undivided or not split:
        return build(launcher, kernel), launch, None
    return build(launcher, kernel), launch, parts.merge(launcher, shape, dtype, out, 8)


def attention_reference(
    q: mx.array,
    parts: Sequence[KVPart],
    spans: mx.array,
    *,
    scale: float,
    window: int = 0,
    out: mx.Dtype | None = None,
) -> mx.array:
    """`attention` in stock MLX, over whole capacities under a mask."""
    tokens, heads, dim = q.shape
    places = [mx.arange(k.shape[-2]) for k, _ in parts]
    used = mx.concatenate([(p >= spans[i, 0]) & (p < spans[i, 1]) for i, p in enumerate(places)])  # [S]
    k, v = (mx.concatenate([part[i].reshape(1, *part[i].shape[-3:]) for part in parts], axis=2) for i in range(2))
    k, v = (mx.where(used[:, None], a, 0).astype(mx.float32) for a in (k, v))  # what is unused may be NaN
    after = mx.cumsum(used[::-1].astype(mx.int32))[::-1]  # 1 for the last token, 2 for the one before ..
    ahead = after[None] - (tokens - mx.arange(tokens))[:, None]  # tokens behind each query's own
    seen = used[None] & (ahead >= 0)
    if window:
        seen = seen & (ahead < window)
    queries = q.astype(mx.float32).swapaxes(0, 1)[None]
    x = mx.fast.scaled_dot_product_attention(queries, k, v, scale=scale, mask=seen)
    return x[0].swapaxes(0, 1).reshape(tokens, heads * dim).astype(out or q.dtype)


ATTENTION = Op("attention", attention, attention_reference)
LONG_ATTENTION = Op("attention", long_attention.long_attention, attention_reference, variant="long")
