"""Attention over quantized keys and values (kv/quantization.py) and a plain tail, for one token or a handful.

In and out: MLX arrays. `quantized_attention` launches a kernel over the codes, `attention`'s own over the tail, and one
that merges the pieces of both. Knows no model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import mlx.core as mx

from ..gpu.render import DEVICE_ELEMENTS, Launch, Launcher, prepare, render
from ..kv import quantization
from ..kv.quantization import QuantizedKV
from .attention import FEW_ROWS, attention_pieces, attention_reference
from .cases import COUNT, Case, Check, Heads, Sizes, case, cases, normal, random_kv, random_queries, state_dtype
from .op import Op
from .parts import TAIL, KVPart, QueryShape, all_parts, span_rows
from .quantize_kv import DIMS, code_book
from .tuning import Tuning, launch_cache, this_gpu

FILE = "quantized_attention.metal"
MAX_QUANTIZED = 7  # parts
MAX_TAIL = 512  # tokens of the tail


@dataclass(frozen=True)
class QuantizedLaunchConfig:
    """The launch configuration of attention over codes; see quantized_attention.metal."""

    simdgroups: int  # of a threadgroup: 1, 2 or 4
    tiles: int  # of 8 queries, a threadgroup
    pieces: int  # of the length


def quantized_launch_config(
    length: int, rows: int, kv_heads: int, words: int, gpu: Tuning | None = None
) -> QuantizedLaunchConfig:
    """The configuration for `rows` queries a KV head over `length` tokens whose keys take `words` words of codes.

    As many threadgroups as a large GPU holds at once (an H100's 132 cores hold three and more), each with at least two
    blocks. Of one KV head with few queries that makes 256 to 396 pieces, of which `merge_quantized` asks for 256 at
    once on NVIDIA where heads are of 512. Two tiles read codes once for 16 queries, but rotate twice as many before
    they begin and need more registers, so they are for drafts (12B's 16 queries of one token on an H200: at 32K tokens
    one tile is faster by 6 us a layer, at 127K two by 7).
    """
    simdgroups, threadgroups = min(4, words // 8), (gpu or this_gpu()).quantized_threadgroups
    blocks = -(-length // (16 * simdgroups))
    tiles = 1 if rows <= 16 else 2
    across = -(-rows // (8 * tiles)) * kv_heads
    share = max(2, -(-blocks * across // threadgroups))
    return QuantizedLaunchConfig(simdgroups, tiles, -(-blocks // share))


def quantized_attention(
    launcher: Launcher,
    q: mx.array,
    quantized: Sequence[QuantizedKV],
    rotation: mx.array,
    tail: KVPart,
    spans: mx.array,
    *,
    scale: float,
    out: mx.Dtype | None = None,
    config: QuantizedLaunchConfig | None = None,
) -> Any:
    """A few new tokens attend to all that came before and to themselves.

    Args:
        q: [T, H, D], T up to 8, D one of DIMS.
        quantized: up to MAX_QUANTIZED parts, of one kind, in the order of the tokens; all of each is seen by all
            queries.
        rotation: fp32 [2 or 2 + G, D], the layer's `kv.quantization.rotations`.
        tail: the keys and values that follow, [1, G, up to MAX_TAIL, D], in q's dtype; its last T tokens are q's.
        spans: int32 [MAX_PARTS, 2]: the first row has the first and one past the last token in use of the tail.
        scale: of the scores.
        out: dtype of the result, q's by default.
        config: in place of `quantized_launch_config`'s.

    Returns:
        [T, H D]
    """
    if q.shape[-1] not in DIMS or any(scales.size < DEVICE_ELEMENTS for _, scales in quantized):
        return quantized_attention_reference(q, quantized, rotation, tail, spans, scale=scale, out=out)
    lengths, kv_heads = tuple(codes.shape[-3] for codes, _ in quantized), tail[0].shape[-3]
    bits, centered = quantization.bits_of(quantized[0], q.shape[-1]), rotation.shape[0] > 2
    cached = q.shape, q.dtype, kv_heads, bits, centered, lengths, scale, out or q.dtype, config
    launch, merge = _prepared(launcher, *cached)
    pieces = launch(q, rotation, _lengths(lengths), *all_parts(quantized, MAX_QUANTIZED))
    of_tail = attention_pieces(launcher, q, [tail], spans, scale=scale, config=FEW_ROWS)
    return merge(*pieces, *of_tail, rotation)[0]


@lru_cache(maxsize=4096)
def _lengths(lengths: tuple[int, ...]) -> mx.array:
    """Lengths of all parts as the kernel takes them, int32 [MAX_QUANTIZED + 1]."""
    return mx.array([*lengths, *[0] * (MAX_QUANTIZED + 1 - len(lengths))], mx.int32)


@launch_cache
def _prepared(
    launcher: Launcher,
    shape: QueryShape,
    dtype: mx.Dtype,
    kv_heads: int,
    bits: int,
    centered: bool,
    lengths: tuple[int, ...],
    scale: float,
    out: mx.Dtype,
    config: QuantizedLaunchConfig | None,
) -> tuple[Launch, Launch]:
    """The launch of the kernel, and of the merge."""
    tokens, heads, dim = shape
    rows, total = heads // kv_heads * tokens, tokens * heads
    config = config or quantized_launch_config(sum(lengths), rows, kv_heads, dim * bits // 32)
    simdgroups, pieces = config.simdgroups, config.pieces
    code = {"D": dim, "BITS": bits, **code_book()}
    defines: dict[str, Any] = {"SG": simdgroups, "CENTERED": centered, "GQA": heads // kv_heads, "TILES": config.tiles}
    kernel = render("quantized_attention", FILE, dtype, code | defines | {"SCALE": float(scale)})
    groups = (-(-rows // (8 * config.tiles)), pieces, kv_heads)
    sums = ((total, pieces, dim), mx.float32), ((total, pieces, 2), mx.float32)
    merge = render("merge_quantized", FILE, dtype, code | {"U": out, "SG": 16, "SLICES": simdgroups})
    return (
        prepare(launcher, kernel, groups, 32 * simdgroups, *sums),
        prepare(launcher, merge, (1, dim // simdgroups // 32, total), 512, ((tokens, heads * dim), out)),
    )


def quantized_attention_reference(
    q: mx.array,
    quantized: Sequence[QuantizedKV],
    rotation: mx.array,
    tail: KVPart,
    spans: mx.array,
    *,
    scale: float,
    out: mx.Dtype | None = None,
) -> mx.array:
    """`quantized_attention` in stock MLX: all of it in the space of the codes, in fp32."""
    tokens, heads, dim = q.shape
    parts = [quantization.dequantize(c, rotation) for c in quantized]
    k, v = (a.reshape(1, *a.shape[-3:]) for a in tail)
    parts.append(quantization.rotate_pair(k, v, rotation))
    ends = mx.array([[0, p[0].shape[-2]] for p in parts[:-1]], mx.int32)
    spans = mx.concatenate([ends, spans[:1]])
    x = attention_reference(quantization.rotate(q, rotation[0]), parts, spans, scale=scale, out=mx.float32)
    x = quantization.unrotate(x.reshape(tokens, heads, dim), rotation[1])
    return x.reshape(tokens, heads * dim).astype(out or q.dtype)


QUANTIZED_ATTENTION = Op("quantized_attention", quantized_attention, quantized_attention_reference)


@cases
def quantized_attention_cases(s: Sizes) -> Iterator[Check]:
    """With a state's tail, or for tq4 a recorded step's, which takes several pieces."""

    def make(h: Heads, length: int, kind: str, tokens: int) -> Case:
        dtype, rotation = state_dtype(), quantization.rotations(h.dim, center=normal(h.kv_heads, h.dim))
        plain = [random_kv(h, n, dtype) for n in (length // 2, length - length // 2)]
        quantized = [quantization.quantize(k, v, rotation, kind) for k, v in plain]
        capacity = MAX_TAIL if kind == "tq4" else TAIL
        used, tail = capacity // 2 + COUNT, random_kv(h, capacity, dtype)
        n_bytes = sum(a.nbytes for part in quantized for a in part) + sum(a.nbytes for a in tail) * used // capacity
        arrays = (random_queries(h, dtype, tokens), quantized, rotation, tail, span_rows([(0, used)]))
        return case(QUANTIZED_ATTENTION, n_bytes, *arrays, scale=1.0)

    for h in dict.fromkeys(s.heads):
        for kind in quantization.BITS if not h.window and h.dim in DIMS else ():
            for tokens in (1, 4) if h.heads > 4 * h.kv_heads else (1,):  # drafts may take two tiles
                shape = f"{h}, {s.lengths[-1]} tokens in {kind}" + f" T={tokens}" * (tokens > 1)
                yield Check(QUANTIZED_ATTENTION.key, shape, partial(make, h, s.lengths[-1], kind, tokens))
