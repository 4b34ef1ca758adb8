"""Attention over keys and values in codes (kv/quantization.py) and a plain tail, for one token or a handful; with its
reference.

In and out: MLX arrays. `quantized_attention` launches a kernel over the codes, `attention`'s own over the tail, and one
that merges the pieces of both; `coded_attention_reference` has the same arguments and result in stock MLX. Nothing here
knows a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from ..gpu.render import DEVICE_ELEMENTS, METAL_TYPES, Launcher, build, float_literal, render
from ..kv import quantization
from ..kv.quantization import LEVELS, QuantizedKV
from .attention import attention_reference, attention_sums
from .op import Op
from .parts import KVPart, Launch

MAX_QUANTIZED = 7  # parts
DIMS = (64, 128, 256, 512)  # of heads that the kernel takes


@dataclass(frozen=True)
class QuantizedLaunchConfig:
    """How attention over codes is cut; see coded.metal."""

    simdgroups: int  # of a threadgroup: 1, 2 or 4
    tiles: int  # of 8 queries, a threadgroup
    pieces: int  # of the length


def quantized_launch_config(
    length: int, rows: int, kv_heads: int, words: int, threadgroups: int = 396
) -> QuantizedLaunchConfig:
    """The cut for `rows` queries a KV head over `length` tokens whose keys take `words` words of codes.

    As many threadgroups as a large GPU holds at once (an H100's 132 cores hold three and more), each with at least two
    blocks. Of one KV head with few queries that makes 256 to 396 pieces, of which `merge_quantized` asks for 256 at
    once on NVIDIA where heads are of 512. Two tiles read codes once for 16 queries, but rotation twice as many before
    they begin and need more registers: worth it where each threadgroup has several blocks all the same (12B on an H200:
    at 32K tokens one tile is faster by 6 us a layer, at 127K two by 7).
    """
    simdgroups = min(4, words // 8)
    blocks = -(-length // (16 * simdgroups))
    tiles = 1 if rows <= 8 or blocks * kv_heads < 4 * threadgroups else 2
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
    cut: QuantizedLaunchConfig | None = None,
) -> Any:
    """A few new tokens attend to all that came before and to themselves.

    Args:
        q: [T, H, D], T up to 8, D one of DIMS.
        quantized: up to MAX_QUANTIZED parts, of one kind, in the order of the tokens; all of each is seen by all
        queries.
        rotation: fp32 [2 or 2 + G, D], the layer's `kv.quantization.rotations`.
        tail: keys and values that follow, [1, G, up to 512, D], in q's dtype; it ends with the T tokens themselves.
        spans: int32 [1, 2]: first and one past the last token in use of the tail.
        scale: of the scores.
        out: dtype of the result, q's by default.
        cut: instead of `coded_cut`'s.

    Returns:
        [T, H D]
    """
    if q.shape[-1] not in DIMS or any(scales.size < DEVICE_ELEMENTS for _, scales in quantized):
        return quantized_attention_reference(q, quantized, rotation, tail, spans, scale=scale, out=out)
    lengths, kv_heads = tuple(codes.shape[-3] for codes, _ in quantized), tail[0].shape[-3]
    bits, centered = quantization.bits_of(quantized[0], q.shape[-1]), rotation.shape[0] > 2
    cached = (q.shape, q.dtype, kv_heads, bits, centered, lengths, launcher, scale, out or q.dtype, cut)
    run, launch, merge = _prepared(*cached)
    arrays = [a for codes, scales in quantized for a in (_rows(codes, kv_heads), scales.reshape(kv_heads, -1, 2))]
    sums, stats = run(inputs=[q, rotation, *arrays], **launch)
    tail_sums, tail_stats = attention_sums(launcher, q, [tail], spans, scale=scale)
    return merge[0](inputs=[sums, stats, tail_sums, tail_stats, rotation], **merge[1])[0]


def _rows(codes: mx.array, kv_heads: int) -> mx.array:
    """[1, G, n, 2, words] -> [G, n, 2 words]."""
    return codes.reshape(kv_heads, codes.shape[-3], -1)


@lru_cache(maxsize=4096)  # several launches a token: the GPU must not wait for this to be worked out
def _prepared(
    shape: tuple[int, int, int],
    dtype: mx.Dtype,
    kv_heads: int,
    bits: int,
    centered: bool,
    lengths: tuple[int, ...],
    launcher: Launcher,
    scale: float,
    out: mx.Dtype,
    cut: QuantizedLaunchConfig | None,
) -> tuple[Callable[..., Sequence[Any]], dict[str, Any], Launch]:
    """The kernel, its arguments but for the inputs, and the same of the merge."""
    tokens, heads, dim = shape
    rows, total = heads // kv_heads * tokens, tokens * heads
    cut = cut or quantized_launch_config(sum(lengths), rows, kv_heads, dim * bits // 32)
    code: dict[str, object] = {"D": dim, "BITS": bits, **_levels()}
    defines = code | {
        "SG": cut.simdgroups,
        "CENTERED": centered,
        "GQA": heads // kv_heads,
        "TILES": cut.tiles,
        "PARTS": len(lengths),
        "SCALE": float_literal(scale),
    }
    absent = [f"{which}{i}" for i in range(len(lengths), MAX_QUANTIZED) for which in "cs"]
    launch = {
        "grid": (32 * cut.simdgroups * -(-rows // (8 * cut.tiles)), cut.pieces, kv_heads),
        "threadgroup": (32 * cut.simdgroups, 1, 1),
        "output_shapes": [(total, cut.pieces, dim), (total, cut.pieces, 2)],
        "output_dtypes": [mx.float32] * 2,
    }
    merge = render(
        "merge_quantized", "coded.metal", dtype, code | {"U": METAL_TYPES[out], "SG": 16, "SLICES": cut.simdgroups}
    )
    merge_launch = {
        "grid": (512, dim // cut.simdgroups // 32, total),
        "threadgroup": (512, 1, 1),
        "output_shapes": [(tokens, heads * dim)],
        "output_dtypes": [out],
    }
    kernel = render("quantized_attention", "coded.metal", dtype, defines, absent)
    return build(launcher, kernel), launch, (build(launcher, merge), merge_launch)


def quantize_kv(launcher: Launcher, keys: mx.array, values: mx.array, rotation: mx.array, kind: str) -> Any:
    """Codes and scales of keys and values [1, G, n, D]: `kv.quantization.encode` in one launch."""
    _, heads, n, dim = keys.shape
    kernel, bits = _quantizer(kind, dim, keys.dtype, rotation.shape[0] > 2, launcher), quantization.BITS[kind]
    codes, scales = kernel(
        inputs=[keys.reshape(-1, dim), values.reshape(-1, dim), rotation],
        grid=(256 * -(-heads * n // 4), 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(1, heads, n, 2, dim * bits // 32), (1, heads, n, 2)],
        output_dtypes=[mx.uint32, mx.float16],
    )
    return codes, scales


quantize_kv_reference = quantization.quantize


QUANTIZE_KV = Op("quantize_kv", quantize_kv, quantize_kv_reference)


@lru_cache
def _quantizer(
    kind: str, dim: int, dtype: mx.Dtype, centered: bool, launcher: Launcher
) -> Callable[..., Sequence[Any]]:
    defines: dict[str, object] = {"D": dim, "BITS": quantization.BITS[kind], "CENTERED": centered, "SG": 1, **_levels()}
    for name, numbers in (("MAGNITUDES", LEVELS), ("BOUNDS", quantization.BOUNDS)):
        defines[name] = f"{{{', '.join(map(float_literal, numbers))}}}"
    return build(launcher, render("quantize_kv", "coded.metal", dtype, defines))


def _levels() -> dict[str, object]:
    """The code book of 4 bits as coded.metal wants it."""
    halves = np.array(LEVELS, np.float16)
    low, high = halves.view(np.uint8).reshape(8, 2).T.copy().view(np.uint32).tolist()
    found: dict[str, object] = {"LEVELS": ", ".join(f"{bits:#x}u" for bits in halves.view(np.uint16).tolist())}
    for name, words in (("LOW", low), ("HIGH", high)):
        found |= {f"{name}_{i}": f"{word:#x}u" for i, word in enumerate(words)}
    return found


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
    spans = mx.concatenate([ends, spans])
    x = attention_reference(quantization.rotate(q, rotation[0]), parts, spans, scale=scale, out=mx.float32)
    x = quantization.unrotate(x.reshape(tokens, heads, dim), rotation[1])
    return x.reshape(tokens, heads * dim).astype(out or q.dtype)


QUANTIZED_ATTENTION = Op("quantized_attention", quantized_attention, quantized_attention_reference)
