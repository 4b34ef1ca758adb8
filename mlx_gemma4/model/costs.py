"""What a model takes beside its weights: bytes of KV and of reading a prompt, and seconds of the longest kernels.

In: a model's shape, tokens. Out: numbers, all of them reckoned: bytes that are alive at once, and times on the slowest
GPU that there is. Nothing is measured here, and no array is made.
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

# A base M1's GPU, 8 cores: "2.6 teraflops" of fp32 (Apple, 2020-11-10, "Apple unleashes M1"), and LPDDR4X-4266 on 128
# bits. Matrix products in fp16 might reach twice the first; they are reckoned at it.
M1_OPERATIONS, M1_BYTES = 2.6e12, 68e9  # a second
LONGEST = 0.5  # seconds of a kernel, at most: macOS ends command buffers that keep a GPU from the screen for seconds
SCORE_BYTES = 512 << 20  # of a layer's scores for a chunk, at most


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


def _keys(config: Config, layer: LayerConfig, tokens: int, context: int) -> int:
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
        attention_bytes(s, tokens, _keys(c, s, tokens, context), dtype.size, kv != "full" and not s.sliding)
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


def kernel_seconds(config: Config, tokens: int, context: int) -> dict[str, float]:
    """Seconds of the longest kernels on a base M1, reckoned: a prompt's chunk, the last of `context` tokens; decoding.

    The larger of operations and bytes over what an M1 does in a second: no kernel can be faster there.
    """
    c, size = config, 2
    layers = [(s, _keys(c, s, tokens, context)) for s in c.layers]
    work = {
        "product of a tile": (2 * tokens * TILE, size * TILE),
        "expansion of a tile": (0, (size + 4) * TILE),  # from fp32 at most
        "experts": (4 * tokens * c.experts_used * c.expert_ffn * c.hidden, 0),
        "scores": (max(2 * tokens * s.heads * s.head_dim * keys for s, keys in layers), 0),
        "softmax": (0, max(2 * score_bytes(s, tokens, keys, size) for s, keys in layers)),
        "keys joined": (0, max(2 * size * s.kv_heads * s.head_dim * keys for s, keys in layers)),
        "decoding: attention": (0, max(2 * size * s.kv_heads * s.head_dim * keys for s, keys in layers)),
        "decoding: head": (0, size * c.vocab * c.hidden),  # in 16 bits at most
    }
    return {name: max(ops / M1_OPERATIONS, n_bytes / M1_BYTES) for name, (ops, n_bytes) in work.items()}


def chunk_at(config: Config, position: int, most: int) -> int:
    """Return the largest chunk, `most` or a half, a quarter of it.., that keeps to SCORE_BYTES and LONGEST on Metal.

    `position`: of its first token.
    """
    chunk = most
    while chunk > 16:
        end = position + chunk
        scores = max(score_bytes(s, chunk, _keys(config, s, chunk, end), 2) for s in config.layers)
        if scores <= SCORE_BYTES and max(kernel_seconds(config, chunk, end).values()) <= LONGEST:
            break
        chunk //= 2
    return chunk
