"""What a model takes beside its weights: bytes of KV and of reading a prompt.

In: a model's shape, tokens. Out: bytes that are alive at once, reckoned: nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import mlx.core as mx

from ..config import Config, LayerConfig
from ..execution import BUFFER_ELEMENTS
from ..gpu.render import cuda_launcher
from ..kv.quantization import BITS, allowed_kinds, vector_bytes
from ..kv.state import kv_bytes
from ..memory import Needs, on_cpu, on_metal
from ..ops import prompt_attention
from ..ops.dispatch import Kernels
from ..ops.many_rows import TILE
from ..ops.parts import TAIL
from ..ops.tuning import this_gpu

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


def own_attention(kernels: Kernels | None) -> bool:
    """True if prompts are read by attention of our own, which makes no matrix of scores, for heads that it takes."""
    off = kernels is None or any(key.op == prompt_attention.PROMPT_ATTENTION.name for key in kernels.off)
    return on_metal() and this_gpu().prompt_attention and not off


def takes(layer: LayerConfig, kv: str) -> bool:
    """True if attention of our own takes a layer's heads."""
    return prompt_attention.takes(layer.head_dim, 16 if layer.sliding else BITS.get(kv, 16))


def score_bytes(layer: LayerConfig, tokens: int, keys: int, size: int) -> int:
    """Bytes of a layer's matrix of scores for a chunk, in numbers of `size` bytes, where attention makes one."""
    return layer.heads * tokens * keys * size


def attention_bytes(layer: LayerConfig, tokens: int, keys: int, size: int, kv: str, own: bool) -> int:
    """Bytes alive while a chunk attends.

    By attention of our own: sums of two launches, one of which adds the other's to its own, in pieces where few rows
    see many keys; copies of slices of segments, and of a tail joined to the chunk. Else: scores, masked scores and
    shares; keys and values joined, codes expanded.
    """
    key = 2 * layer.kv_heads * layer.head_dim * size  # and its value
    if own and takes(layer, kv):
        rows = layer.heads * tokens + 8 * prompt_attention.tiling(layer.head_dim, 16)[1] * this_gpu().cores
        return 2 * rows * (layer.head_dim + 2) * 4 + key * (keys if layer.sliding else tokens + TAIL)
    scores = score_bytes(layer, tokens, keys, size)
    return 3 * (min(scores, SCORE_BYTES) if on_metal() else scores) + key * keys * (
        1 + (kv in BITS and not layer.sliding)
    )


def keys_seen(config: Config, layer: LayerConfig, tokens: int, context: int) -> int:
    """Tokens that a chunk sees, the last of `context`, of a layer."""
    return min(context, config.window + tokens) if layer.sliding else context


def reading_bytes(config: Config, dtype: mx.Dtype, own: bool, context: int, kv: str, tokens: int) -> int:
    """Bytes alive beside weights and KV while a chunk is read, the last of `context` tokens: one layer's of each kind.

    `own`: see `own_attention`. On a GPU, two tiles of weights too. On Metal MLX starts a second layer while the first
    is computed where its memory limit leaves room for that, and frees what a command buffer reads when the buffer is
    done: BUFFER_ELEMENTS in fp16.
    """
    c, kinds = config, {layer.sliding: layer for layer in config.layers}.values()
    row = 16 * c.hidden + 16 * len(c.layers) * c.ple  # residual, norms, sums; embeddings of all layers; fp32
    row += 22 * max(layer.ffn for layer in c.layers)  # gate and up in fp16, joined, fp32; their product, in fp16 too
    row += c.experts_used * (16 * c.hidden + 16 * c.expert_ffn)
    # Queries, keys, values in fp16, joined, fp32; then queries and results with norm, RoPE, heads apart, and in fp16.
    row += max(layer.head_dim * (26 * layer.heads + 16 * layer.kv_heads) for layer in kinds)
    seen = (attention_bytes(s, tokens, keys_seen(c, s, tokens, context), dtype.size, kv, own) for s in kinds)
    tiles = 0 if on_cpu() else 2 * 2 * TILE + 2 * BUFFER_ELEMENTS * on_metal()
    return tokens * row + sum(seen) + tiles


def needs_of(config: Config, dtype: mx.Dtype, chunk: int, own: bool, loading: int = 0) -> Needs:
    """What a model takes beside its weights.

    Args:
        dtype: of keys and values in full precision.
        chunk: tokens of a prompt that are read at a time.
        own: see `own_attention`.
        loading: bytes that loading takes.
    """
    return Needs(
        lambda context, kv: kv_bytes(config, dtype, context, chunk, kv=kv),
        partial(reading_bytes, config, dtype, own),
        chunk,
        config.context,
        allowed_kinds({layer.head_dim for layer in config.layers if not layer.sliding}),
        loading,
    )


def chunk_at(config: Config, position: int, most: int, own: bool) -> int:
    """Return how many tokens from a position on to read at a time on Metal: `most`, where attention makes no scores.

    Elsewhere the largest of a half, a quarter of it.. whose scores keep to SCORE_BYTES. `own`: see `own_attention`.
    """
    layers = [layer for layer in config.layers if not (own and takes(layer, "full"))]

    def scores(chunk: int) -> int:
        sizes = (score_bytes(s, chunk, keys_seen(config, s, chunk, position + chunk), 2) for s in layers)
        return max(sizes, default=0)

    chunk = most
    while chunk > 16 and scores(chunk) > SCORE_BYTES:
        chunk //= 2
    return chunk


def weights_per_token(config: Config, sizes: Mapping[str, int]) -> int:
    """Bytes of weights that a decoded token reads: one row of each embedding, the experts in use, all of the rest.

    `sizes`: bytes of each tensor, by its GGUF name; a head that is the embedding may be there or not.
    """
    total = 0.0
    for name, n_bytes in sizes.items():
        row = n_bytes / config.vocab
        if name == "token_embd.weight" and "output.weight" not in sizes:
            total += row + n_bytes  # beside its use as the head
        elif name in ("token_embd.weight", "per_layer_token_embd.weight"):
            total += row
        else:
            total += n_bytes * (config.experts_used / config.experts if "_exps" in name else 1)
    return round(total)


def kv_per_token(config: Config, kv: str, context: int, dtype: mx.Dtype) -> int:
    """Bytes of keys and values that a token reads behind `context` others; only global layers are quantized."""
    total = 0
    for shape in config.layers:
        rows, kind = (min(context, config.window), "full") if shape.sliding else (context, kv)
        total += 2 * shape.kv_heads * vector_bytes(kind, shape.head_dim, dtype) * rows
    return total
