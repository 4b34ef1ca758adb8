"""gemma4a, how Gemma 4 E2B and E4B hear: mel spectra through convolutions and conformer blocks.

In: samples at 16 kHz. Out: rows fp32 [n, hidden], one for 40 ms. In each block a row sees itself and the 11 rows before
it (4 more in its convolution), never later ones. All arithmetic is fp32. Formulas: transformers'
Gemma4AudioFeatureExtractor and Gemma4AudioModel (a Universal Speech Model, arXiv:2303.01037); its clamps at 1e10 are
left out, which fp32 doesn't need. Every norm has EPS 1e-6, though files may say 1e-5. Names and layouts of tensors are
those of llama.cpp's converter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import Reader
from ..errors import InputError
from ..loading.tensors import Entry, Spec
from . import sounds
from .content import Content
from .layers import EPS, Weights, clipped_linear, exact_linear, project

HOP, WINDOW, FFT = 160, 320, 512  # samples: 10 ms, 20 ms, and with zeros behind
MELS, FLOOR = 128, 1e-3
CHANNELS = (128, 32)  # of the two convolutions, which halve time and frequency each
CHUNK = 12  # queries that attend together, each to as many keys
DEPTH = 5  # rows that the convolution inside a block sees
CAP = 50.0  # of attention scores
NORMS = ("ffn_norm", "ffn_post_norm", "attn_pre_norm", "attn_post_norm", "conv_norm", "norm_conv", "ffn_norm_1")
CLAMPED = ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down", "ffn_up_1", "ffn_down_1", "conv_pw1")


def specs(read: Reader, hidden: int, entries: Mapping[str, Entry]) -> dict[str, Spec]:
    """Return the tower's tensors, by GGUF name; `hidden` is the text model's width."""
    d, heads = read.count("embedding_length", most=1 << 16), read.count("attention.head_count")
    ffn = read.count("feed_forward_length", 4 * d, most=1 << 20)  # which folders don't say
    if d % heads:
        raise read.error("attention.head_count", f"is {heads}, which does not divide {d}")
    shapes: dict[str, tuple[int, ...]] = {"a.input_projection": (d, MELS // 4 * CHANNELS[1])}
    for i, (of, to) in enumerate(((1, CHANNELS[0]), CHANNELS)):
        shapes |= {f"a.conv1d.{i}": (to, of, 3, 3), f"a.conv1d.{i}.norm": (to,)}
    own = entries.get("a.pre_encode.out.weight")
    out = own.shape[0] if own else 1536  # the encoder's width at its end, which no key says
    shapes |= {"a.pre_encode.out": (out, d), "mm.a.input_projection": (hidden, out)}
    block: dict[str, tuple[int, ...]] = dict.fromkeys((*NORMS, "ffn_post_norm_1", "ln2"), (d,))
    block |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out", "attn_k_rel", "conv_pw2"), (d, d))
    block |= {"ffn_up": (ffn, d), "ffn_up_1": (ffn, d), "ffn_down": (d, ffn), "ffn_down_1": (d, ffn)}
    block |= {"conv_pw1": (2 * d, d), "conv_dw": (d, DEPTH), "per_dim_scale": (d // heads,)}
    bounds: dict[str, Spec] = {}
    for i in range(read.count("block_count", most=1000)):
        shapes |= {f"a.blk.{i}.{name}": shape for name, shape in block.items()}
        for name in (*CLAMPED, "conv_pw2"):
            keys = (f"a.blk.{i}.{name}.{side}_{end}" for side in ("input", "output") for end in ("min", "max"))
            bounds |= dict.fromkeys(keys, Spec((1,), "vector", True))
    small = {name for name, shape in shapes.items() if len(shape) != 2 or name.endswith("conv_dw")}  # these stay fp32
    weights = {f"{name}.weight": Spec(shape, "vector" if name in small else "matrix") for name, shape in shapes.items()}
    return weights | {"a.pre_encode.out.bias": Spec((out,), "vector")} | bounds


def inputs(content: Content, part: Mapping[str, Any]) -> list[np.ndarray]:
    """Return the mel spectrum of each piece of a sound, fp32 [frames, MELS]."""
    found = [log_mel(piece) for piece in sounds.pieces(content)]
    found = [mel for mel in found if len(mel)]  # the last piece may be shorter than a frame
    if not found:
        raise InputError(f"{content.name}: is too short to hear; give at least {HOP + 1} samples at 16 kHz")
    return found


@cache
def mel_filters() -> np.ndarray:
    """Return how much of each frequency goes into each bin, fp64 [FFT // 2 + 1, MELS]: triangles on HTK's mel scale."""
    mels = np.linspace(0, 2595 * math.log10(1 + 8000 / 700), MELS + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    frequencies = np.linspace(0, 8000, FFT // 2 + 1)[:, None]
    rising = (frequencies - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - frequencies) / np.diff(edges)[1:]
    filters: np.ndarray = np.maximum(0, np.minimum(rising, falling))
    return filters


def log_mel(samples: np.ndarray) -> np.ndarray:
    """Return the logarithms of a sound's mel spectra, fp32 [(n - 1) // HOP, MELS], of samples fp32 [n].

    Half a window of silence stands before the sound. A frame counts only where all its samples, and one after them, are
    the sound's: the reference masks the others, and what it pads to a multiple of 128 samples is in those alone.
    """
    frames = (len(samples) - 1) // HOP
    padded = np.concatenate([np.zeros(WINDOW // 2, np.float32), samples, np.zeros(WINDOW, np.float32)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[: frames * HOP : HOP]
    hann = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)
    magnitudes = np.abs(np.fft.rfft(windows * hann, FFT))
    mel: np.ndarray = np.log(magnitudes @ mel_filters() + FLOOR)
    return mel.astype(np.float32)


def rows(read: Reader, weights: Weights, mel: np.ndarray) -> Iterator[mx.array]:
    """Yield the rows after each block of a mel spectrum [frames, MELS], and at last the soft tokens.

    These are fp32 [ceil(ceil(frames / 2) / 2), hidden].
    """
    h = subsample(weights, mx.array(mel))
    for i in range(read.count("block_count")):
        h = block(weights, f"a.blk.{i}.", h, read.count("attention.head_count"))
        yield h
    h = exact_linear(h, weights["a.pre_encode.out.weight"]) + weights["a.pre_encode.out.bias"]
    yield project(h, weights["mm.a.input_projection.weight"], exact_linear)


def subsample(weights: Weights, mel: mx.array) -> mx.array:
    """Return [frames / 4, d] of a spectrum [frames, MELS]: time and frequency are halved twice."""
    x = mel[:, :, None]  # [time, frequency, channels]
    for i in range(2):
        x = halved(x, weights[f"a.conv1d.{i}.weight"])
        x = mx.maximum(mx.fast.layer_norm(x, weights[f"a.conv1d.{i}.norm.weight"], None, EPS), 0)
    return exact_linear(x.reshape(x.shape[0], -1), weights["a.input_projection.weight"])


def halved(x: mx.array, kernel: mx.array) -> mx.array:
    """Return x [time, frequency, of] under a kernel [to, of, 3, 3] in steps of 2: [time / 2, frequency / 2, to].

    As one product: on a CPU MLX's own convolution takes several times as long.
    """
    times, frequencies = (-(-n // 2) for n in x.shape[:2])
    x = mx.pad(x, [(1, 1), (1, 1), (0, 0)])
    near = [x[i : i + 2 * times - 1 : 2, j : j + 2 * frequencies - 1 : 2] for i in range(3) for j in range(3)]
    return exact_linear(mx.concatenate(near, axis=-1), kernel.transpose(0, 2, 3, 1).reshape(len(kernel), -1))


def block(weights: Weights, name: str, h: mx.array, heads: int) -> mx.array:
    """Return rows [n, d] after a conformer block: half a step of MLP, attention, a convolution, half a step of MLP."""

    def norm(x: mx.array, which: str) -> mx.array:
        return mx.fast.rms_norm(x, weights[f"{name}{which}.weight"], EPS)

    def linear(x: mx.array, which: str) -> mx.array:
        return clipped_linear(x, weights, name + which, exact_linear)

    def mlp(x: mx.array, end: str) -> mx.array:
        inner = linear(silu(linear(norm(x, "ffn_norm" + end), "ffn_up" + end)), "ffn_down" + end)
        return 0.5 * norm(inner, "ffn_post_norm" + end)

    h = h + mlp(h, "")
    u = norm(h, "attn_pre_norm")
    q, k, v = (linear(u, which).reshape(len(h), heads, -1) for which in ("attn_q", "attn_k", "attn_v"))
    mixed = attention(q * weights[f"{name}per_dim_scale.weight"], k, v, weights[f"{name}attn_k_rel.weight"])
    h = h + norm(linear(mixed, "attn_out"), "attn_post_norm")
    values, gates = mx.split(linear(norm(h, "conv_norm"), "conv_pw1"), 2, axis=-1)
    x = mx.pad(values * mx.sigmoid(gates), [(DEPTH - 1, 0), (0, 0)])
    kernel = weights[f"{name}conv_dw.weight"]  # [d, DEPTH], the last one meets the row itself
    x = mx.stack([x[i : i + len(h)] * kernel[:, i] for i in range(DEPTH)]).sum(0)
    h = h + linear(silu(norm(x, "norm_conv")), "conv_pw2")
    h = h + mlp(h, "_1")
    return norm(h, "ln2")


def silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


def attention(q: mx.array, k: mx.array, v: mx.array, relative: mx.array) -> mx.array:
    """Return what each query takes from the values of itself and the CHUNK - 1 rows before it.

    Args:
        q, k, v: [n, heads, head_dim], without scales.
        relative: [heads * head_dim, heads * head_dim], makes keys of distances.

    Returns:
        [n, heads * head_dim].
    """
    n, heads, d = q.shape
    chunks = -(-n // CHUNK)
    q = q * (d**-0.5 / math.log(2))
    k = k * (math.log1p(math.e) / math.log(2))

    def chunked(x: mx.array) -> mx.array:
        x = mx.pad(x, [(0, chunks * CHUNK - n), (0, 0), (0, 0)])
        return x.reshape(chunks, CHUNK, heads, d).transpose(0, 2, 1, 3)  # [chunks, heads, CHUNK, d]

    def with_chunk_before(x: mx.array) -> mx.array:
        x = chunked(x)
        return mx.concatenate([mx.pad(x, [(1, 0), (0, 0), (0, 0), (0, 0)])[:-1], x], axis=2)

    q, k, v = chunked(q), with_chunk_before(k), with_chunk_before(v)
    # A key i of the context is i - CHUNK rows after its chunk's first query: query t is t + CHUNK - i rows after it.
    away = np.arange(CHUNK)[:, None] + CHUNK - np.arange(2 * CHUNK)  # [CHUNK, 2 * CHUNK]
    seen = np.tile((away >= 0) & (away < CHUNK), (chunks, 1, 1, 1))  # [chunks, 1, CHUNK, 2 * CHUNK]
    seen[0, ..., :CHUNK] = False  # nothing is before the first chunk
    distances = exact_linear(mx.array(_sinusoids(heads * d)), relative).reshape(CHUNK, heads, d).transpose(1, 2, 0)
    by_distance = mx.take_along_axis(q @ distances, mx.array(np.clip(away, 0, CHUNK - 1))[None, None], axis=-1)
    scores = CAP * mx.tanh((q @ k.swapaxes(-1, -2) + by_distance) / CAP)
    mixed = mx.softmax(mx.where(mx.array(seen), scores, -1e9), axis=-1, precise=True) @ v
    return mixed.transpose(0, 2, 1, 3).reshape(chunks * CHUNK, heads * d)[:n]


def _sinusoids(width: int) -> np.ndarray:
    """Return vectors of distances 0 to CHUNK - 1, fp32 [CHUNK, width]: sines, then cosines."""
    half = width // 2
    angles = np.arange(CHUNK)[:, None] * 10_000.0 ** (-np.arange(half) / max(half - 1, 1))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)
