"""Attention of a few tokens over keys and values in parts: attention.metal and its reference.

In and out: MLX arrays for one token, or a handful (T up to 8). One launch, or two where the length is split among
threadgroups. Knows no model and no KV state.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import mlx.core as mx

from ..gpu.render import Launch, Launcher, prepare, render
from .cases import COUNT, Case, Check, Heads, Sizes, attention_inputs, case, cases, state_dtype
from .long_attention import long_attention, long_launch_config
from .op import Op
from .parts import TAIL, KVPart, PartShapes, QueryShape, prepare_merge, shapes_of
from .tuning import Tuning, this_gpu

SHORT = 64  # tokens up to which attention is one launch


@dataclass(frozen=True)
class LaunchConfig:
    """The launch configuration of attention; see attention.metal."""

    rows: int  # queries that a threadgroup holds
    simdgroups: int = 4  # of a threadgroup
    keys: int = 4  # tokens a lane scores at once
    threadgroups: int = 0  # that share the length, at most about so many; 0: it is one piece, which needs no merge

    def blocks(self, lengths: Sequence[int], share: int = 1) -> int:
        """Pieces of `share` blocks in parts with room for so many tokens: none lies in two parts."""
        block = 4 * self.keys * self.simdgroups  # tokens that a threadgroup takes at a time
        return sum(-(-length // (block * share)) for length in lengths)

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
        """Pieces of the length, for `across` threadgroups to work on each."""
        return self.blocks(lengths, self.share(lengths, across)) if self.threadgroups else 1


def launch_config(lengths: Sequence[int], rows: int, kv_heads: int, gpu: Tuning | None = None) -> LaunchConfig:
    """The configuration for `rows` queries a KV head over parts of up to so many tokens.

    A threadgroup waits for memory twice a block, so as many as a large GPU holds at once share the blocks; only where
    there would be more does one take several, and where there are too few, blocks are small and queries apart. A tail
    alone is one piece: there is nothing to merge.
    """
    gpu = gpu or this_gpu()
    if sum(lengths) <= SHORT:
        return LaunchConfig(min(rows, 2), simdgroups=16, keys=1)
    config = LaunchConfig(-(-rows // -(-rows // 8)), threadgroups=gpu.attention_threadgroups)
    if config.rows > 4:
        config = replace(config, keys=2)  # more would leave room for fewer threadgroups, by their registers
    while config.blocks(lengths) * -(-rows // config.rows) * kv_heads < gpu.cores:
        if config.keys > 2:
            config = replace(config, keys=2)
        elif config.rows > 2:
            config = replace(config, rows=-(-config.rows // 2))
        else:
            break
    return config


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
        spans: int32 [parts, 2]: first and one past the last token in use, of each part.
        scale: of the scores.
        window: each token sees only the last `window` ones, itself included; 0: all. Spans may be wider.
        out: dtype of the result, q's by default.
        config: in place of `launch_config`'s.

    Returns:
        [T, H D]
    """
    cached = q.shape, q.dtype, shapes_of(parts), scale, window, out or q.dtype, config, False
    launch, merge = _prepared(launcher, *cached)
    done = launch(q, spans, *(a for part in parts for a in part))
    return (done if merge is None else merge(*done))[0]


def attention_sums(launcher: Launcher, q: mx.array, parts: Sequence[KVPart], spans: mx.array, *, scale: float) -> Any:
    """`attention` whose pieces are not yet added up, nor divided: for a caller that has more to add.

    Returns:
        sums fp32 [T H, pieces, D] and stats fp32 [T H, pieces, 2]: maximum of the scores over ln 2, sum of
        2^(score - maximum); of a piece without tokens -1e30 and 0.
    """
    launch, _ = _prepared(launcher, q.shape, q.dtype, shapes_of(parts), scale, 0, q.dtype, None, True)
    return launch(q, spans, *(a for part in parts for a in part))


@lru_cache(maxsize=4096)  # hundreds of launches a token: the GPU must not wait for the host
def _prepared(
    launcher: Launcher,
    shape: QueryShape,
    dtype: mx.Dtype,
    parts: PartShapes,
    scale: float,
    window: int,
    out: mx.Dtype,
    config: LaunchConfig | None,
    undivided: bool,
) -> tuple[Launch, Launch | None]:
    """The launch of attention's own kernel, and of the merge if there is one."""
    (tokens, heads, dim), (kv_heads, lengths, _) = shape, parts
    rows, total = heads // kv_heads * tokens, tokens * heads
    config = config or launch_config(lengths, rows, kv_heads)
    across = -(-rows // config.rows)
    pieces = config.pieces(lengths, across * kv_heads)
    split = undivided or config.threadgroups > 0
    defines = {"D": dim, "GQA": heads // kv_heads, "ROWS": config.rows, "SG": config.simdgroups, "KEYS": config.keys}
    defines |= {"WINDOW": window, "SPLIT": split, "WHOLE": config.threadgroups == 0}
    defines |= {"SHARE": config.share(lengths, across * kv_heads) if config.threadgroups else 1}
    described, absent = parts.describe()
    defines |= described | {"U": out, "SCALE": float(scale)}
    kernel = render("attention", "attention.metal", dtype, defines, absent + (["out"] if split else ["sums", "stats"]))
    sums = ((total, pieces, dim), mx.float32), ((total, pieces, 2), mx.float32)
    results = sums if split else (((tokens, heads * dim), out),)
    launch = prepare(launcher, kernel, (across, pieces, kv_heads), 32 * config.simdgroups, *results)
    return launch, prepare_merge(launcher, shape, dtype, out, 8) if split and not undivided else None


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


ATTENTION = Op("attention", attention, attention_reference)
LONG_ATTENTION = Op("attention", long_attention, attention_reference, variant="long")


@cases
def attention_cases(s: Sizes) -> Iterator[Check]:
    def make(h: Heads, length: int) -> Case:
        sealed = [(length, 3, length)] if length > COUNT else []  # a few tokens have left the window
        q, parts, spans = attention_inputs(h, [*sealed, (TAIL, 0, COUNT)], state_dtype())
        n_bytes = min(h.window or length, length + COUNT) * h.kv_heads * h.dim * 2 * q.dtype.size
        return case(ATTENTION, n_bytes, q, parts, spans, scale=1.0, window=h.window)

    for h in dict.fromkeys(s.heads):
        for length in [h.window] if h.window else s.lengths:
            kind = f"window {h.window}" if h.window else f"{length} tokens"
            yield Check(ATTENTION.key, f"{h}, {kind}", partial(make, h, length))


@cases
def long_attention_cases(s: Sizes) -> Iterator[Check]:
    """With the launch config for many tokens, over fewer."""

    def make(h: Heads) -> Case:
        q, parts, spans = attention_inputs(h, [(300, 3, 300), (128, 0, 128), (TAIL, 0, COUNT)], mx.float16)
        config = replace(long_launch_config([32768, TAIL], h.heads // h.kv_heads, h.kv_heads, h.dim), share=2)

        def kernel(launcher: Launcher) -> Any:
            return long_attention(launcher, q, parts, spans, scale=1.0, config=config)

        n_bytes = (300 + 128 + COUNT) * h.kv_heads * h.dim * 2 * mx.float16.size
        return Case(kernel, partial(attention_reference, q, parts, spans, scale=1.0), n_bytes)

    for h in dict.fromkeys(s.heads):
        if not h.window and h.dim % 64 == 0:
            yield Check(LONG_ATTENTION.key, f"{h}", partial(make, h))
