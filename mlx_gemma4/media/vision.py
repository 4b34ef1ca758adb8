"""The tower of E2B, E4B, 26B-A4B and 31B (projector type gemma4v): layers over patches of 16 x 16 pixels.

In: pixels and weights. Out: soft tokens, one for each 3 x 3 patches. Formulas: transformers' Gemma4VisionModel, GELU in
its tanh form included (llama.cpp takes another); layouts: those of the GGUF, a patch in the order channel, row, column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache

import mlx.core as mx
import numpy as np

from ..config import MAX_LAYERS, Reader
from ..loading.tensors import Entry, Spec
from ..memory import on_cpu, on_metal
from ..ops.cores import product
from ..ops.stock import fused, geglu
from .layers import EPS, Weights, clipped_linear, linear, project
from .patches import cut, place, positions
from .picture import SIDE

PATCH = 16  # pixels
POOL = SIDE // PATCH  # patches of a soft token, along each side
THETA = 100.0  # base of the rotations' wavelengths
SCORES = 1 << 26  # of attention, that are computed at once at most
LAUNCH = 4e11  # operations of one launch on Metal at most: half a second on the slowest (docs/memory.md)
HEADS = (64, 80, 128)  # head sizes of MLX's attention on Metal; others are padded with zeros. CUDA: multiples of 8


def specs(read: Reader, hidden: int, entries: Mapping[str, Entry]) -> dict[str, Spec]:
    """Do as `patches.specs`."""
    width, ffn = read.count("embedding_length", most=1 << 16), read.count("feed_forward_length", most=1 << 20)
    heads, head_dim = _heads(read)
    if read.count("patch_size", PATCH) != PATCH or read.count("projector.scale_factor", POOL) != POOL:
        raise read.error("patch_size", f"or projector.scale_factor is not {PATCH} or {POOL}")
    found = {
        "v.patch_embd.weight": Spec((width, 3, PATCH, PATCH), "matrix"),
        "v.position_embd.weight": Spec((2, positions(entries), width), "matrix"),
    }
    products = {f"attn_{x}": (heads * head_dim, width) for x in "qkv"}
    products |= {"attn_out": (width, heads * head_dim)}
    products |= {"ffn_gate": (ffn, width), "ffn_up": (ffn, width), "ffn_down": (width, ffn)}
    norms = dict.fromkeys(("ln1", "attn_post_norm", "ln2", "ffn_post_norm"), width)
    norms |= {"attn_q_norm": head_dim, "attn_k_norm": head_dim}
    for i in range(read.count("block_count", most=MAX_LAYERS)):
        for name, shape in products.items():
            found[f"v.blk.{i}.{name}.weight"] = Spec(shape, "matrix")
            bounds = (f"v.blk.{i}.{name}.{side}_{end}" for side in ("input", "output") for end in ("min", "max"))
            found |= {bound: Spec((1,), "vector", optional=True) for bound in bounds}
        found |= {f"v.blk.{i}.{name}.weight": Spec((n,), "vector") for name, n in norms.items()}
    standardized = "v.std_bias" not in entries and "v.std_scale" not in entries  # both or neither
    found |= {name: Spec((width,), "vector", optional=standardized) for name in ("v.std_bias", "v.std_scale")}
    return found | {"mm.input_projection.weight": Spec((hidden, width), "matrix")}


def _heads(read: Reader) -> tuple[int, int]:
    """Return the number of heads and their size, a multiple of 4."""
    heads, width = read.count("attention.head_count"), read.count("embedding_length")
    if width % (4 * heads):
        raise read.error("attention.head_count", f"is {heads} for a width of {width}")
    return heads, width // heads


def rows(read: Reader, weights: Weights, pixels: np.ndarray) -> Iterator[mx.array]:
    """Yield the residual after each layer, and at last the soft tokens, fp32 [n, hidden].

    `pixels`: uint8 [height, width, 3], sides multiples of SIDE.
    """
    down, across = pixels.shape[0] // PATCH, pixels.shape[1] // PATCH
    x, turns = embedded(weights, pixels), rotations(_heads(read)[1], down, across)
    for i in range(read.count("block_count")):
        x = layer(weights, f"v.blk.{i}.", _heads(read), x, turns)
        yield x
    yield project(pooled(weights, x, down, across), weights["mm.input_projection.weight"])


def embedded(weights: Weights, pixels: np.ndarray) -> mx.array:
    """Return a picture's patches with their positions, fp32 [rows * columns, width], row by row."""
    down, across = pixels.shape[0] // PATCH, pixels.shape[1] // PATCH
    w = weights["v.patch_embd.weight"]
    x = linear(2 * (cut(pixels, PATCH) / 255) - 1, w.reshape(w.shape[0], -1))
    return x + place(weights["v.position_embd.weight"], down, across)


def rotations(head_dim: int, down: int, across: int) -> tuple[mx.array, mx.array]:
    """Return cosines and sines, fp32 [rows * columns, 1, 2, head_dim / 4]: of the column, then of the row."""
    steps = head_dim // 4
    angle = THETA ** -(np.arange(steps, dtype=np.float32) / steps)
    places = np.stack([np.tile(np.arange(across), down), np.repeat(np.arange(down), across)], axis=1)
    turns = (places[:, None, :, None] * angle).astype(np.float32)
    return mx.array(np.cos(turns)), mx.array(np.sin(turns))


def layer(
    weights: Weights, name: str, heads: tuple[int, int], x: mx.array, turns: tuple[mx.array, mx.array]
) -> mx.array:
    """Return the residual fp32 [n, width] after the layer whose weights are NAME..; `heads`: their number and size."""
    own = {key.removeprefix(name): w for key, w in weights.items() if key.startswith(name)}
    return _layer_of(heads, on_cpu())(own, x, *turns)


@cache
def _layer_of(heads: tuple[int, int], cpu: bool) -> Callable[..., mx.array]:
    """Return a layer with so many heads of a size: on a GPU what stands between its products is a launch each."""

    def run(own: dict[str, mx.array], x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        def norm(x: mx.array, which: str) -> mx.array:
            return mx.fast.rms_norm(x, own[f"{which}.weight"], EPS)

        u = norm(x, "ln1")
        q, k, v = (clipped_linear(u, own, f"attn_{which}").reshape(-1, *heads) for which in "qkv")
        q, k = (_rotated(norm(each, f"attn_{which}_norm"), cos, sin) for each, which in ((q, "q"), (k, "k")))
        dtype = own["attn_q.weight"].dtype
        a = attention(*(each.astype(dtype) for each in (q, k, mx.fast.rms_norm(v, None, EPS))))
        x = x + norm(clipped_linear(a.astype(mx.float32), own, "attn_out"), "attn_post_norm")
        u = norm(x, "ln2")
        gate, up = (clipped_linear(u, own, f"ffn_{which}") for which in ("gate", "up"))
        u = clipped_linear(geglu(gate, up), own, "ffn_down")
        return x + norm(u, "ffn_post_norm")

    return fused(run, not cpu)


def _rotated(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turn heads [n, heads, head_dim]: the first half by the column, the second by the row, each in halves again."""
    parts = x.reshape(*x.shape[:2], 2, 2, -1)
    a, b = parts[..., 0, :], parts[..., 1, :]
    return mx.stack([a * cos - b * sin, b * cos + a * sin], axis=-2).reshape(x.shape)


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Return the attention of all to all, without a scale, of [n, heads, head_dim] each: [n, heads * head_dim]."""
    n, heads, size = q.shape
    if on_cpu():
        each = [_head_on_cpu(*(np.asarray(part[:, i]) for part in (q, k, v))) for i in range(heads)]
        return mx.array(np.concatenate(each, axis=-1))
    # On Metal MLX has kernels for some sizes alone; what has none makes a matrix of scores, here a piece at a time.
    more = next((known for known in HEADS if known >= size), size) - size if on_metal() else 0
    whole = size + more <= HEADS[-1] and (on_metal() or (q.dtype != mx.float32 and size % 8 == 0))
    if more:
        q, k, v = (mx.pad(each, [(0, 0), (0, 0), (0, more)]) for each in (q, k, v))
    q, k, v = (each.transpose(1, 0, 2)[None] for each in (q, k, v))
    at_once = LAUNCH / (4 * n * heads * (size + more)) if on_metal() else n
    step = max(int(at_once if whole else SCORES // (heads * n)), 1)
    starts = range(0, n, step)
    parts = [mx.fast.scaled_dot_product_attention(q[:, :, i : i + step], k, v, scale=1.0) for i in starts]
    return mx.concatenate(parts, axis=2)[0, ..., :size].transpose(1, 0, 2).reshape(n, -1)


def _head_on_cpu(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the attention of one head, [n, head_dim] each, with numpy's products."""
    columns, step = np.ascontiguousarray(v.T), max(SCORES // len(q), 1)
    parts = []
    for start in range(0, len(q), step):
        scores = mx.softmax(mx.array(product(q[start : start + step], k)), axis=-1)
        parts.append(product(np.asarray(scores), columns))
    return np.concatenate(parts)


def pooled(weights: Weights, x: mx.array, down: int, across: int) -> mx.array:
    """Return the means of POOL x POOL patches each, fp32 [n, width]: scaled, then standardized where the file says how.

    fp16 would not hold them.
    """
    width = x.shape[-1]
    x = x.reshape(down // POOL, POOL, across // POOL, POOL, width).mean(axis=(1, 3)).reshape(-1, width)
    x = x * math.sqrt(width)
    if "v.std_scale" in weights:
        x = (x - weights["v.std_bias"]) * weights["v.std_scale"]
    return x
