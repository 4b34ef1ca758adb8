"""Attention of a few tokens over keys and values in parts: attention.metal and its reference.

In and out: MLX arrays for one token, or a handful (T up to 8). Threadgroups share the length; a second launch adds
their sums up. Knows no model and no KV state.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx

from ..gpu.render import Launch, Launcher, prepare, render
from .cases import COUNT, Case, Check, Heads, Sizes, attention_inputs, case, cases, normal, state_dtype
from .long_attention import long_attention, long_attention_pieces, long_launch_config
from .op import Op, OpKey
from .parts import (
    MAX_PARTS,
    MERGE,
    TAIL,
    KVPart,
    PartShapes,
    QueryShape,
    all_parts,
    cut_of,
    merge,
    merge_reference,
    pieces_of,
    shapes_of,
)
from .tuning import Tuning, launch_cache, this_gpu


@dataclass(frozen=True)
class LaunchConfig:
    """The launch configuration of attention; see attention.metal."""

    rows: int  # queries that a threadgroup holds
    simdgroups: int = 4  # of a threadgroup
    keys: int = 2  # tokens a lane scores at once
    threadgroups: int | None = None  # that share the length, at most about so many; None: as this GPU has it

    @property
    def block(self) -> int:
        """Tokens that a threadgroup takes at a time."""
        return 4 * self.keys * self.simdgroups

    def share(self, lengths: Sequence[int], across: int) -> int:
        """Return the tokens of a piece, in whole blocks, for `across` threadgroups to work on each piece."""
        most = max((self.threadgroups or this_gpu().attention_threadgroups) // across, 2 * len(lengths))
        blocks = 1
        while pieces_of(lengths, blocks * self.block) > most:  # parts' last pieces are short
            blocks += 1 + blocks // 16
        return blocks * self.block


# All that a model's layers need: every conversation runs these texts, and `attention_cases` checks them.
FEW_ROWS, MANY_ROWS = LaunchConfig(2), LaunchConfig(8)


@launch_cache
def launch_config(lengths: tuple[int, ...], rows: int, kv_heads: int, gpu: Tuning | None = None) -> LaunchConfig:
    """The configuration for `rows` queries a KV head over parts of up to so many tokens.

    A threadgroup waits for memory twice a block. Where there are blocks enough to give each core one, it holds many
    queries, which share the keys and values it reads; else more threadgroups with few queries each.
    """
    blocks = pieces_of(lengths, MANY_ROWS.block) * -(-rows // MANY_ROWS.rows) * kv_heads
    return MANY_ROWS if rows > 4 and blocks >= (gpu or this_gpu()).cores else FEW_ROWS


def attention(
    launcher: Launcher,
    q: mx.array,
    parts: Sequence[KVPart],
    spans: mx.array,
    *,
    scale: float,
    window: int = 0,
    out: mx.Dtype | None = None,
    config: LaunchConfig | None = None,
) -> Any:
    """A few new tokens attend to all that came before and to themselves.

    Args:
        q: [T, H, D], T up to 8, D a multiple of 32.
        parts: up to MAX_PARTS of keys and values in q's dtype, in the order of the tokens; the last
            ends with the T tokens themselves.
        spans: int32 [MAX_PARTS, 2], `parts.span_rows`: first and one past the last token in use, of each part.
        scale: of the scores.
        window: each token sees only the last `window` ones, itself included; 0: all. Spans may be wider.
        out: dtype of the result, q's by default.
        config: in place of `launch_config`'s.

    Returns:
        [T, H D]
    """
    sums, stats = attention_pieces(launcher, q, parts, spans, scale=scale, window=window, config=config)
    return merge(launcher, sums, stats, q.shape, out or q.dtype)


def attention_pieces(
    launcher: Launcher,
    q: mx.array,
    parts: Sequence[KVPart],
    spans: mx.array,
    *,
    scale: float,
    window: int = 0,
    config: LaunchConfig | None = None,
) -> Any:
    """`attention` whose pieces are not yet added up: sums and stats, as `parts.merge` takes them."""
    shapes = shapes_of(parts)
    config = config or launch_config(shapes.lengths, q.shape[0] * q.shape[1] // shapes.kv_heads, shapes.kv_heads)
    launch, share = _prepared(launcher, q.shape, q.dtype, shapes, scale, config)
    return launch(q, spans, cut_of(shapes.lengths, share, window), *all_parts(parts))


@launch_cache
def _prepared(
    launcher: Launcher,
    shape: QueryShape,
    dtype: mx.Dtype,
    parts: PartShapes,
    scale: float,
    config: LaunchConfig,
) -> tuple[Launch, int]:
    """The launch of attention's own kernel, and the tokens of a piece."""
    (tokens, heads, dim), (kv_heads, lengths) = shape, parts
    rows, total = heads // kv_heads * tokens, tokens * heads
    across = -(-rows // config.rows)
    share = config.share(lengths, across * kv_heads)
    pieces = pieces_of(lengths, share)
    defines: dict[str, Any] = {"D": dim, "GQA": heads // kv_heads, "ROWS": config.rows, "SG": config.simdgroups}
    defines |= {"KEYS": config.keys, "SCALE": float(scale), "PAGED": False}
    kernel = render("attention", "attention.metal", dtype, defines, IN_PAGES)
    results = ((total, pieces, dim), mx.float32), ((total, pieces, 2), mx.float32)
    return prepare(launcher, kernel, (across, pieces, kv_heads), 32 * config.simdgroups, *results), share


def attention_reference(
    q: mx.array, parts: Sequence[KVPart], spans: mx.array, *, scale: float, window: int = 0, out: mx.Dtype | None = None
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


# Inputs of the text's two forms: parts of one sequence; pages of several (paged.py).
SPANS = ("spans", "cut", *(f"{a}{i}" for i in range(MAX_PARTS) for a in "kv"))
IN_PAGES = ("places", "pool_k", "pool_v")

ATTENTION = Op("attention", attention, attention_reference)
LONG_ATTENTION = Op("long_attention", long_attention, attention_reference)


def config_key(config: LaunchConfig) -> OpKey:
    """The name under which attention with a configuration is checked and switched off."""
    return OpKey(ATTENTION.name, f"{config.rows} rows")


def _pieces_case(
    kernel: Callable[..., Any], s: Sizes, h: Heads, spans: Sequence[tuple[int, int, int]], dtype: mx.Dtype
) -> Case:
    """A kernel that gives pieces, of one token over parts of (capacity, start, stop); `merge_reference` adds them."""
    q, parts, rows = attention_inputs(h, spans, dtype)

    def launch(launcher: Launcher) -> mx.array:
        sums, stats = kernel(launcher, q, parts, rows, scale=s.scale)
        return merge_reference(sums, stats, (1, h.heads, h.dim), dtype)

    used = sum(min(h.window or stop, stop) - start for _, start, stop in spans)
    reference = partial(attention_reference, q, parts, rows, scale=s.scale, window=h.window)
    return Case(launch, reference, used * h.kv_heads * h.dim * 2 * dtype.size)


@cases
def attention_cases(s: Sizes) -> Iterator[Check]:
    """With each configuration, over a context that `Sizes.lengths` asks for; a window may cut it."""

    def make(h: Heads, config: LaunchConfig, length: int) -> Case:
        sealed = [(h.window or length, 3, h.window or length)] if length > COUNT else []
        kernel = partial(attention_pieces, window=h.window, config=config)
        return _pieces_case(kernel, s, h, [*sealed, (TAIL, 0, COUNT)], state_dtype())

    for h in dict.fromkeys(s.heads):
        for config in (FEW_ROWS, MANY_ROWS):
            for length in s.lengths[-1:] if h.window else s.lengths:
                kind = f"window {h.window}" if h.window else f"{length} tokens"
                yield Check(config_key(config), f"{h}, {kind}", partial(make, h, config, length))


@cases
def long_attention_cases(s: Sizes) -> Iterator[Check]:
    """With the launch config for many tokens, over fewer."""

    def make(h: Heads) -> Case:
        config = replace(long_launch_config((32768, TAIL), h.heads // h.kv_heads, 1, h.kv_heads, h.dim), share=2)
        parts = [(300, 3, 300), (128, 0, 128), (TAIL, 0, COUNT)]
        return _pieces_case(partial(long_attention_pieces, config=config), s, h, parts, mx.float16)

    for h in dict.fromkeys(s.heads):
        if not h.window and h.dim % 64 == 0:
            yield Check(LONG_ATTENTION.key, f"{h}", partial(make, h))


@cases
def merge_cases(s: Sizes) -> Iterator[Check]:
    def make(h: Heads, pieces: int) -> Case:
        sums, stats = normal(h.heads, pieces, h.dim), mx.abs(normal(h.heads, pieces, 2)) + 0.1
        stats[:, 1] = mx.array([-1e30, 0])
        sums[:, 1] = 0
        return case(MERGE, sums.nbytes, sums, stats, (1, h.heads, h.dim), state_dtype())

    for h in dict.fromkeys(s.heads):
        for pieces in (9, 150):
            yield Check(MERGE.key, f"{h}, {pieces} pieces", partial(make, h, pieces))
