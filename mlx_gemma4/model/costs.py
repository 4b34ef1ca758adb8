"""What a model takes beside its weights: bytes of KV and of reading a prompt.

In: a model's shape, tokens. Out: bytes that are alive at once, reckoned: nothing is measured here.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from ..config import Config, LayerConfig
from ..execution import BUFFER_ELEMENTS
from ..gpu.render import cuda_launcher
from ..kv.quantization import allowed_kinds
from ..kv.state import kv_bytes
from ..memory import Needs, on_cpu, on_metal
from ..ops.dispatch import Kernels
from ..ops.many_rows import TILE

PREFILL_CHUNK = 1024  # tokens of a prompt that are read at a time
CHUNK_ROWS = 32 * PREFILL_CHUNK  # query heads x tokens of a chunk, at most, where chunks may be larger

SCORE_BYTES = 512 << 20  # of a layer's scores for a chunk, at most, on Metal: 0.1 s of an M1 (tests/test_memory.py)


def largest_chunk(config: Config, kernels: Kernels | None) -> int:
    """Return how many tokens of a prompt are read at a time if memory allows: on NVIDIA more for models of few heads.

    There a launch costs the host about 10 us, which bounds the prompts of small models. The scores of a chunk, which
    bound its memory, stay those of 31B's 32 heads.
    """
    if kernels is None or kernels.launcher is not cuda_launcher:
        return PREFILL_CHUNK
    heads = max(layer.heads for layer in config.layers)
    return max(PREFILL_CHUNK, min(4 * PREFILL_CHUNK, CHUNK_ROWS // heads))


def score_bytes(layer: LayerConfig, tokens: int, keys: int, size: int) -> int:
    """Bytes of a layer's matrix of scores for a chunk, in numbers of `size` bytes; 0 where attention makes none."""
    return layer.heads * tokens * keys * size


def attention_bytes(layer: LayerConfig, tokens: int, keys: int, size: int, quantized: bool) -> int:
    """Bytes alive while a chunk attends: scores, masked scores and shares; keys and values joined, codes expanded."""
    scores, joined = score_bytes(layer, tokens, keys, size), 2 * layer.kv_heads * layer.head_dim * keys * size
    return 3 * (min(scores, SCORE_BYTES) if on_metal() else scores) + joined * (1 + quantized)


def keys_seen(config: Config, layer: LayerConfig, tokens: int, context: int) -> int:
    """Tokens that a chunk sees, the last of `context`, of a layer."""
    return min(context, config.window + tokens) if layer.sliding else context


def reading_bytes(config: Config, dtype: mx.Dtype, context: int, kv: str, tokens: int) -> int:
    """Bytes alive beside weights and KV while a chunk is read, the last of `context` tokens: one layer's of each kind.

    On a GPU, two tiles of weights too. On Metal MLX starts a second layer while the first is computed where its memory
    limit leaves room for that, and frees what a command buffer reads when the buffer is done: BUFFER_ELEMENTS in fp16.
    """
    c, kinds = config, {layer.sliding: layer for layer in config.layers}.values()
    row = 16 * c.hidden + 16 * len(c.layers) * c.ple  # residual, norms, sums; embeddings of all layers; fp32
    row += 22 * max(layer.ffn for layer in c.layers)  # gate and up in fp16, joined, fp32; their product, in fp16 too
    row += c.experts_used * (16 * c.hidden + 16 * c.expert_ffn)
    # Queries, keys, values in fp16, joined, fp32; then queries and results with norm, RoPE, heads apart, and in fp16.
    row += max(layer.head_dim * (26 * layer.heads + 16 * layer.kv_heads) for layer in kinds)
    seen = (
        attention_bytes(s, tokens, keys_seen(c, s, tokens, context), dtype.size, kv != "full" and not s.sliding)
        for s in kinds
    )
    tiles = 0 if on_cpu() else 2 * 2 * TILE + 2 * BUFFER_ELEMENTS * on_metal()
    return tokens * row + sum(seen) + tiles


def needs_of(config: Config, dtype: mx.Dtype, chunk: int, loading: int = 0) -> Needs:
    """What a model takes beside its weights; `chunk` tokens of a prompt read at a time, `loading` bytes to load."""
    return Needs(
        lambda context, kv: kv_bytes(config, dtype, context, chunk, kv=kv),
        partial(reading_bytes, config, dtype),
        chunk,
        config.context,
        allowed_kinds({layer.head_dim for layer in config.layers if not layer.sliding}),
        loading,
    )


def chunk_at(config: Config, position: int, most: int) -> int:
    """Return the largest chunk from a position on, `most` or a half, a quarter of it.., that keeps to SCORE_BYTES."""

    def scores(chunk: int) -> int:
        return max(score_bytes(s, chunk, keys_seen(config, s, chunk, position + chunk), 2) for s in config.layers)

    chunk = most
    while chunk > 16 and scores(chunk) > SCORE_BYTES:
        chunk //= 2
    return chunk
