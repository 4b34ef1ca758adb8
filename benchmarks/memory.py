"""Peak memory of a prompt's chunk at several depths, on a GPU, beside what the memory plan reckons.

    python benchmarks/memory.py [--model 31B] [--layers 7] [--depths 2048,32768,131072] [--kv full] [--limit]

In: nothing; weights are zeros in the types of a Q4_K_M file, of the first layers alone, and so are keys and values.
Out: a table in GB (1e9 bytes): the most that MLX held beside weights and KV while the last chunk up to a depth was
read, whole and as a Mac would read it there. Run it with MLX_MAX_MB_PER_BUFFER=200 and without, to compare: NVIDIA's
backend counts bytes and frees what graphs read in its own way, so this bounds, and does not tell, what Metal holds.
--limit: MLX may hold no more than reckoned (`mx.set_memory_limit`), as on a Mac that has no more.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from unittest.mock import patch

import mlx.core as mx
import precompile

from mlx_gemma4.doctor.published import PUBLISHED
from mlx_gemma4.doctor.verdict import usable_kernels
from mlx_gemma4.memory import device_info, on_cpu
from mlx_gemma4.model.costs import PREFILL_CHUNK, chunk_at, own_attention, reading_bytes

GB = 1e9


def main() -> None:
    """Read the last chunks up to each depth, and print a line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="31B", choices=PUBLISHED)
    parser.add_argument("--layers", type=int, default=7, help="the first so many; the last makes keys alone")
    parser.add_argument("--depths", default="2048,32768,131072", help="tokens")
    parser.add_argument("--kv", default="full")
    parser.add_argument("--limit", action="store_true")
    options = parser.parse_args()
    kernels = usable_kernels()
    if kernels is None or on_cpu():
        sys.exit("this needs a GPU that MLX can use, and kernels")
    few = {options.model: replace(PUBLISHED[options.model], layers=options.layers, shared=0, wide_shared=False)}
    with patch.object(precompile, "PUBLISHED", few):
        model = precompile.lazy_model(options.model, kernels)
    mx.eval([p for layer in model.weights.layers for w in vars(layer).values() if w is not None for p in planes(w)])
    mx.eval(planes(model.weights.token_embd))
    own = own_attention(kernels)
    print(f"{options.model}, {options.layers} layers, kv {options.kv}, {device_info().get('device_name')}")
    print(f"GB beside weights and KV; MLX_MAX_MB_PER_BUFFER={os.environ['MLX_MAX_MB_PER_BUFFER']}")
    print("| depth | chunk | peak | reckoned | s |\n|---|---|---|---|---|")
    for depth in map(int, options.depths.split(",")):
        least = chunk_at(model.config, depth - PREFILL_CHUNK, PREFILL_CHUNK, own)
        for chunk in dict.fromkeys((PREFILL_CHUNK, least)):
            state = model.new_state(kv=options.kv)
            precompile.lazy_fill(state, depth - chunk)
            mx.eval(state.arrays)
            mx.clear_cache()
            reckoned = reading_bytes(model.config, state.dtype, own, depth, options.kv, chunk)
            before, start = mx.get_active_memory(), time.perf_counter()
            limit = mx.set_memory_limit(before + reckoned) if options.limit else None
            mx.reset_peak_memory()
            model.prefill(mx.zeros(chunk, mx.int32), state)
            mx.eval(state.arrays)
            peak, took = mx.get_peak_memory() - before, time.perf_counter() - start
            if limit is not None:
                mx.set_memory_limit(limit)
            print(f"| {depth} | {chunk} | {peak / GB:.2f} | {reckoned / GB:.2f} | {took:.1f} |", flush=True)
            state.close()


def planes(weight: object) -> list[mx.array]:
    """The arrays of a weight, packed or not."""
    return [weight] if isinstance(weight, mx.array) else [a for a in vars(weight).values() if isinstance(a, mx.array)]


if __name__ == "__main__":
    main()
