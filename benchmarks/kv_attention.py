"""Times attention alone over a long context, over full-precision and quantized KV, on this machine's GPU.

    python benchmarks/kv_attention.py [--lengths 2048,8192,32768,131072] [--kinds full] [--tune]

In: nothing; random keys, values and queries are made here, in the segments of a state. Out: a table: time of one
layer's attention for one token, TB/s of keys and values as they are held, the kernel's error against double precision.
Full precision has two kernels, both timed at every length: `old`, attention.metal's, and long_attention.metal's, on
matrix units. Each call waits for the one before, and copies of the keys and values take turns, so that no cache holds
them; unused tokens of the tail are NaN. `--tune` tries other launch configs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "20")  # the GPU begins while the host still hands over the rest

import mlx.core as mx
import numpy as np

from mlx_gemma4.doctor.published import PUBLISHED
from mlx_gemma4.gpu.render import default_launcher
from mlx_gemma4.kv import quantization
from mlx_gemma4.kv.segments import SegmentLayout
from mlx_gemma4.ops import attention, long_attention, quantized_attention
from mlx_gemma4.ops.parts import span_rows

SHAPES = sorted({(m.heads, m.kv_heads[1]) for m in PUBLISHED.values()}, reverse=True)  # query heads, KV heads
DIM, TAIL, IN_TAIL = 512, 64, 33
TOGETHER = 300e6  # bytes that copies of keys and values hold at least: six times an H100's cache
CHUNK = 8192  # tokens made at once
CALLS = 40

Layer = tuple[list[Any], Any]  # parts of sealed tokens, and the tail


def made(heads: int, length: int, kind: str, rotation: mx.array) -> Layer:
    """Keys and values of one layer of `length` tokens."""
    tail = [normal(heads, TAIL) for _ in range(2)]
    used = (mx.arange(TAIL) < IN_TAIL)[:, None]
    tail = [mx.where(used, a, mx.array(float("nan"), a.dtype)) for a in tail]
    parts, start = [], 0
    for end in SegmentLayout().ends(length - IN_TAIL):
        pieces = []
        for at in range(start, end, CHUNK):
            k, v = (normal(heads, min(CHUNK, end - at)) for _ in range(2))
            pieces.append((k, v) if kind == "full" else quantization.quantize(k, v, rotation, kind))
            mx.eval(pieces[-1])
        parts.append(tuple(mx.concatenate(list(arrays), axis=2) for arrays in zip(*pieces, strict=True)))
        mx.eval(parts)
        start = end
    return parts, tuple(tail)


def normal(heads: int, n: int) -> mx.array:
    return mx.random.normal((1, heads, n, DIM)).astype(mx.float16)


def another(layer: Layer, i: int) -> Layer:
    """Return a copy with other contents."""
    parts = [tuple(a ^ i if a.dtype == mx.uint32 else a * (-1) ** i for a in part) for part in layer[0]]
    mx.eval(parts)
    return parts, layer[1]


def nbytes(layer: Layer) -> int:
    sealed = sum(int(a.nbytes) for part in layer[0] for a in part)
    return sealed + sum(int(a.nbytes) * IN_TAIL // TAIL for a in layer[1])


def call(
    layer: Layer, kind: str, rotation: mx.array, scale: float, config: Any = None
) -> Callable[[mx.array], mx.array]:
    """Return the attention of q [1, H, D] over a layer, as a function of q."""
    parts, tail = layer
    launcher = default_launcher()
    assert launcher is not None
    ends = [(0, part[0].shape[2]) for part in parts]
    spans, all_spans = span_rows([(0, IN_TAIL)]), span_rows([*ends, (0, IN_TAIL)])
    if isinstance(config, attention.LaunchConfig):
        return lambda q: attention.attention(
            launcher, q, [*parts, tail], all_spans, scale=scale, out=mx.float32, config=config
        )
    if kind == "full":
        return lambda q: long_attention.long_attention(
            launcher, q, [*parts, tail], all_spans, scale=scale, out=mx.float32, config=config
        )
    return lambda q: quantized_attention.quantized_attention(
        launcher, q, parts, rotation, tail, spans, scale=scale, out=mx.float32, config=config
    )


def seconds(calls: list[Callable[[mx.array], mx.array]], q: mx.array) -> float:
    """Time one call among many, each of which waits for the one before."""

    @mx.compile  # traced, as a decode step is: else building each launch takes the host longer than the kernel runs
    def chain(q: mx.array) -> mx.array:
        done = calls[0](q)
        for i in range(1, CALLS):
            done = calls[i % len(calls)](mx.depends([q], [done])[0])
        return done

    def run() -> float:
        start = time.perf_counter()
        mx.eval(chain(q))
        return (time.perf_counter() - start) / CALLS

    run()
    return median(run() for _ in range(7))


# ---------------------------------------------------------------- double precision


def reference(q: mx.array, layer: Layer, rotation: mx.array, scale: float, heads: int) -> np.ndarray:
    """Attention of the queries of the first KV head, fp64 [heads, D], over what the layer holds."""
    q64, (signs, back) = exact(q)[0, :heads], exact(rotation)
    rotated = hadamard(q64 * signs) / DIM
    scores, values = [], []
    for a, b in layer[0]:
        if a.dtype == mx.uint32:
            y = dequantized(a[0, 0], b[0, 0])
            scores.append(rotated @ y[:, 0].T)
            values.append((y[:, 1], True))
        else:
            scores.append(q64 @ exact(a[0, 0]).T)
            values.append((exact(b[0, 0]), False))
    scores.append(q64 @ exact(layer[1][0][0, 0, :IN_TAIL]).T)
    values.append((exact(layer[1][1][0, 0, :IN_TAIL]), False))
    top = max(s.max() for s in scores)
    weights = [np.exp(scale * (s - top)) for s in scores]
    sums = {True: np.zeros((heads, DIM)), False: np.zeros((heads, DIM))}
    for w, (v, quantized) in zip(weights, values, strict=True):
        sums[quantized] += w @ v
    whole: np.ndarray = sum(w.sum(axis=1, keepdims=True) for w in weights)
    result: np.ndarray = (sums[False] + hadamard(sums[True]) * back / DIM) / whole
    return result


def dequantized(codes: mx.array, scales: mx.array) -> np.ndarray:
    """Return fp64 [n, 2, D] from codes [n, 2, words] and scales [n, 2], without kv/quantization.py's functions."""
    words = np.array(codes)
    bits = words.shape[-1] * 32 // DIM
    each = (words[..., None] >> (np.arange(32 // bits, dtype=np.uint32) * bits)) & ((1 << bits) - 1)
    each = each.reshape(*words.shape[:-1], DIM)
    levels = np.array(quantization.LEVELS)[each & 7] * np.where(each & 8, -1.0, 1.0) if bits == 4 else each - 128.0
    return np.asarray(levels * exact(scales)[..., None])


def hadamard(x: np.ndarray) -> np.ndarray:
    one = np.ones((1, 1))
    while len(one) < x.shape[-1]:
        one = np.block([[one, one], [one, -one]])
    return np.asarray(x @ one)


def exact(a: mx.array) -> np.ndarray:
    return np.array(a.astype(mx.float32)).astype(np.float64)


# ---------------------------------------------------------------- the table


def configs(kind: str, heads: tuple[int, int], layer: Layer, tune: bool) -> list[Any]:
    """Return the launch configs to time; None is the kernel's own."""
    rows, kv_heads = heads[0] // heads[1], heads[1]
    lengths = tuple(part[0].shape[2] for part in layer[0])
    found: list[Any] = [None]
    if kind == "full":
        lengths = (*lengths, TAIL)
        found.append(attention.launch_config(lengths, rows, kv_heads))
        if tune:
            own = long_attention.long_launch_config(lengths, rows, 1, kv_heads, DIM)
            options: list[dict[str, Any]] = [
                {"share": max(1, own.share // 2)},
                {"share": 2 * own.share},
                {"resident": 1, "batch": 8, "share": 2 * own.share},
                {"simdgroups": 4, "batch": 4, "resident": 4, "share": own.share},
                {"simdgroups": 4, "batch": 8, "resident": 3, "share": 4 * own.share // 3},
                {"simdgroups": 2, "batch": 4, "resident": 4, "share": 4 * own.share},
                {"batch": 4},
                {"batch": 8},
            ]
            three = {"simdgroups": 4, "batch": 4, "resident": 3, "share": 4 * own.share // 3}
            options += [{"tiles": 1, "share": 2 * own.share}, three] if rows > 8 else []
            made = [replace(own, **o) for o in options]
            found += [config for config in dict.fromkeys(made) if config != own]
    elif tune:
        blocks = -(-sum(lengths) // 64)
        for tiles in (1, 2) if rows > 8 else (1,):
            across = -(-rows // (8 * tiles)) * kv_heads
            for groups in (132, 264, 396, 528, 660, 792):
                pieces = -(-blocks // max(1, -(-blocks * across // groups)))
                found.append(quantized_attention.QuantizedLaunchConfig(4, tiles, pieces))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", default="2048,8192,32768,131072", help="tokens, separated by commas")
    parser.add_argument("--kinds", default=",".join(quantization.KINDS), help="of keys and values, separated by commas")
    parser.add_argument("--heads", default="", help="only these, such as 16/1, separated by commas")
    parser.add_argument("--tune", action="store_true", help="also try other launch configurations")
    options = parser.parse_args()
    if default_launcher() is None:
        print("No GPU here: nothing to time.")
        return 1
    mx.random.seed(0)
    rotation, scale, failed = quantization.rotations(DIM), DIM**-0.5, False
    print("| query / KV heads of 512 | tokens | kv | MB | us | TB/s | error |\n|---|---|---|---|---|---|---|")
    for heads, kv_heads in SHAPES:
        if options.heads and f"{heads}/{kv_heads}" not in options.heads.split(","):
            continue
        q = (mx.random.normal((1, heads, DIM)) * 3).astype(mx.float16)
        mx.eval(q, rotation)
        for length in map(int, options.lengths.split(",")):
            for kind in options.kinds.split(","):
                layer = made(kv_heads, length, kind, rotation)
                size, group = nbytes(layer), heads // kv_heads
                want = reference(q, layer, rotation, scale, group)
                layers = [layer, *(another(layer, i) for i in range(1, max(2, int(-(-TOGETHER // size)))))]
                for config in configs(kind, (heads, kv_heads), layer, options.tune):
                    got = exact(call(layer, kind, rotation, scale, config)(q)).reshape(heads, DIM)[:group]
                    error = np.linalg.norm(got - want) / np.linalg.norm(want)
                    failed |= not error < 2e-3
                    took = seconds([call(one, kind, rotation, scale, config) for one in layers], q)
                    tried = " old" if isinstance(config, attention.LaunchConfig) else f" {config}" if config else ""
                    print(
                        f"| {heads} / {kv_heads} | {length} | {kind}{tried} | {size / 1e6:.1f} | {took * 1e6:.1f} "
                        f"| {size / took / 1e12:.2f} | {error:.1e} |",
                        flush=True,
                    )
                del layers, layer
                mx.clear_cache()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
