"""Times a prompt's attention, of one layer, by its kernel and by MLX's own operations, on this machine's GPU.

    python benchmarks/prompt_attention.py [--models 31B E2B 26B-A4B] [--lengths 2048,32768,131072] [--kinds full,q8,tq4]

In: nothing; random queries of a chunk of 1,024 tokens, the last of so many, and keys and values in the segments of a
state, quantized ones as random codes. Out: a table, then all of it as JSON: ms of one layer and the memory that its
attention takes beyond what it is given, for the kernel (on NVIDIA, too, where models don't use it) and for the present
path there; and how far the two are apart, relative to the largest number. On an H200 all of it takes under a minute.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import mlx.core as mx

from mlx_gemma4.doctor.published import PUBLISHED
from mlx_gemma4.doctor.verdict import machine
from mlx_gemma4.gpu.render import default_launcher
from mlx_gemma4.kv import quantization
from mlx_gemma4.kv.segments import KVView, SegmentLayout
from mlx_gemma4.ops.prompt_attention import prompt_attention, prompt_attention_reference

CHUNK = 1024
ENOUGH = 0.3  # seconds of calls, after which no more are timed
MB = 1e6


def made(heads: int, dim: int, length: int, kind: str, window: int | None) -> list[KVView]:
    """Keys and values of `length` tokens as the last CHUNK of them see them, those quantized plain."""
    layout, sealed = SegmentLayout(), length - CHUNK
    ends = layout.ends(sealed) if window is None else layout.sliding_ends(length, window)
    start = 0 if window is None else max(0, sealed - window) // layout.tail * layout.tail
    rotation = quantization.rotations(dim, center=mx.random.normal((heads, dim)))
    parts = []
    for end in [*(n for n in ends if n > start), length]:
        shape = (1, heads, end - start, dim)
        if kind == "full" or end == length:
            pair = (mx.random.normal(shape, mx.float16), mx.random.normal(shape, mx.float16))
            parts.append(KVView(start, *pair))
        else:
            words = dim * quantization.BITS[kind] // 32
            codes = mx.random.randint(-(1 << 31), 1 << 31, (*shape[:3], 2, words), mx.int32).view(mx.uint32)
            scales = mx.random.uniform(0.5, 1.0, (*shape[:3], 2)) / (64 if kind == "q8" else 1)
            parts.append(KVView(start, codes, scales.astype(mx.float16), rotation))
        mx.eval(parts[-1].keys, parts[-1].values)
        start = end
    mx.eval(rotation)
    return parts


def measured(call: Callable[[], mx.array]) -> tuple[mx.array, float, float]:
    """Return a result, ms a call, and MB that a call takes beyond what is held before it."""
    mx.eval(call())  # compiles
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    result = call()
    mx.eval(result)
    peak = mx.get_peak_memory() - held
    times: list[float] = []
    while sum(times) < ENOUGH and len(times) < 20:
        start = time.perf_counter()
        mx.eval(call())
        times.append(time.perf_counter() - start)
    return result, median(times) * 1e3, peak / MB


def row(model: str, length: int, kind: str, sliding: bool, launcher: Any) -> dict[str, Any]:
    """Measure one kind of layer of a model."""
    shape = PUBLISHED[model]
    dim, kv_heads, window = shape.head_dims[not sliding], shape.kv_heads[not sliding], shape.window if sliding else None
    parts = made(kv_heads, dim, length, kind, window)
    q = (mx.random.normal((1, shape.heads, CHUNK, dim)) * 1.5 * dim**-0.5).astype(mx.float16)
    mx.eval(q)
    options: dict[str, Any] = {"scale": 1.0, "position": length - CHUNK, "window": window}
    found: dict[str, Any] = {"model": model, "layer": f"window {window}" if sliding else "global", "length": length}
    found |= {"kind": kind, "operations": 4 * shape.heads * dim * CHUNK * min(length, window or length)}
    results = []
    paths = {"kernel": partial(prompt_attention, launcher), "stock": prompt_attention_reference}
    for name, path in paths.items():
        result, found[f"{name}_ms"], found[f"{name}_mb"] = measured(lambda path=path: path(q, parts, **options))  # type: ignore[misc]
        results.append(result)
        mx.clear_cache()
    found["apart"] = (mx.abs(results[0] - results[1]).max() / mx.abs(results[1]).max()).item()
    return found


def main() -> None:
    """Measure, print a line each, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=["31B", "E2B", "26B-A4B"], choices=PUBLISHED)
    parser.add_argument("--lengths", default="2048,32768,131072")
    parser.add_argument("--kinds", default="full,q8,tq4")
    args = parser.parse_args()
    launcher = default_launcher()
    if launcher is None:
        sys.exit("this needs a GPU that MLX can use")
    rows, lengths = [], [int(n) for n in args.lengths.split(",")]
    print(
        f"{'':8} {'layer':12} {'tokens':>7} {'KV':5} {'kernel':>9} {'TFLOPS':>7} {'MB':>7} {'stock':>9} {'MB':>7} apart"
    )
    for model in args.models:
        wanted = [(n, kind, False) for n in lengths for kind in args.kinds.split(",")]
        for length, kind, sliding in [(max(lengths), "full", True), *wanted]:
            r = row(model, length, kind, sliding, launcher)
            rows.append(r)
            print(
                f"{model:8} {r['layer']:12} {length:7} {kind:5} {r['kernel_ms']:6.2f} ms"
                f" {r['operations'] / r['kernel_ms'] / 1e9:7.1f} {r['kernel_mb']:7.0f}"
                f" {r['stock_ms']:6.2f} ms {r['stock_mb']:7.0f} {r['apart']:.1e}",
                flush=True,
            )
    print(json.dumps({"machine": machine(), "chunk": CHUNK, "rows": rows}))


if __name__ == "__main__":
    main()
