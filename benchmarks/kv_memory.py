"""Memory of a KV state of 31B's shape: computed, and measured by filling one with random numbers.

    python benchmarks/kv_memory.py [--length 131072] [--measure]

In: nothing; no model is loaded. Out: a table in MB (1e6 bytes): the most it may take by `kv_bytes`, read in chunks of
512 tokens; with `--measure` also the sum of its arrays, what MLX holds once it is full, and the most that MLX held
during the last chunk.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlx_gemma4.doctor.published import PUBLISHED
from mlx_gemma4.execution import execution
from mlx_gemma4.gpu.render import default_launcher
from mlx_gemma4.kv import quantization
from mlx_gemma4.kv.segments import KVQuantizer
from mlx_gemma4.kv.state import KVState, kv_bytes
from mlx_gemma4.memory import device_info, on_cpu
from mlx_gemma4.ops.quantize_kv import quantize_kv

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import make_synthetic

MODEL = PUBLISHED["31B"]
CONFIG = make_synthetic.config_of(MODEL)
CHUNK = 512  # tokens read at once


def quantizers(kind: str) -> dict[int, KVQuantizer]:
    """What quantizes each global layer; {} for "full"."""
    if kind not in quantization.BITS:
        return {}
    launcher = default_launcher()
    quantize = partial(quantize_kv, launcher) if launcher else quantization.quantize
    dims = {i: layer.head_dim for i, layer in enumerate(CONFIG.layers) if not layer.sliding}
    return {i: KVQuantizer(kind, quantization.rotations(dim), quantize) for i, dim in dims.items()}


def filled(made: Mapping[int, KVQuantizer], length: int, kind: str) -> tuple[KVState, float, int]:
    """Return a state that has read `length` tokens, the seconds it took, and MLX's peak memory in the last chunk."""
    state = KVState(CONFIG, mx.float16, kv=kind, quantizers=made)
    shapes = {(layer.kv_heads, layer.head_dim) for layer in CONFIG.layers}
    random = {shape: mx.random.normal((1, shape[0], CHUNK, shape[1])).astype(mx.float16) for shape in shapes}
    ids, start = mx.zeros(CHUNK, mx.int32), time.perf_counter()
    for at in range(0, length, CHUNK):
        if at + CHUNK >= length:
            mx.clear_cache()
            mx.reset_peak_memory()
        n = min(CHUNK, length - at)
        with execution():
            for i, layer in enumerate(CONFIG.layers):
                keys, values = (random[layer.kv_heads, layer.head_dim][:, :, :n] * sign for sign in (1, -1))
                state.append(i, keys, values)
                if not layer.sliding:  # as a forward pass does: a few layers at a time
                    mx.eval([state._staged[j].tail_keys for j in range(i - MODEL.every + 1, i + 1)])
                    mx.eval([s.keys for s in state._staged[i].segments])
            state.advance(ids[:n])
            mx.eval(state.arrays)
    return state, time.perf_counter() - start, mx.get_peak_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=131_072, help="tokens")
    parser.add_argument("--measure", action="store_true", help="fill states and ask MLX what it holds")
    options = parser.parse_args()
    print(f"31B shape, {options.length} tokens, fp16; MB on {'a CPU' if on_cpu() else device_info()['device_name']}")
    head = (
        "| kv | at most | arrays | held by MLX | at most, last chunk | s |" if options.measure else "| kv | at most |"
    )
    print(head + "\n" + "|---" * (head.count("|") - 1) + "|")
    for kind in quantization.KINDS:
        line = f"| {kind} | {kv_bytes(CONFIG, mx.float16, options.length, CHUNK, kv=kind) / 1e6:,.0f} |"
        if options.measure:
            made = quantizers(kind)
            mx.eval([q.rotation for q in made.values()])
            mx.clear_cache()
            before = mx.get_active_memory()
            state, took, peak = filled(made, options.length, kind)
            mx.clear_cache()
            held = mx.get_active_memory() - before
            line += f" {state.nbytes / 1e6:,.0f} | {held / 1e6:,.0f} | {(peak - before) / 1e6:,.0f} | {took:.0f} |"
            state.close()
            del state
        print(line, flush=True)


if __name__ == "__main__":
    main()
