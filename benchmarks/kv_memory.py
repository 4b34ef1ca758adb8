"""Memory of a KV state of a 31B-shaped model: computed, and measured by filling one with random numbers.

    python benchmarks/kv_memory.py [--length 131072] [--measure]

In: nothing; no model is loaded. Out: a table in MB (1e6 bytes): the most it may take by `kv_bytes`, read in chunks of
512; with `--measure` also what its arrays add up to, what MLX holds once it is full, and the most it held while the
last chunk came.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from mlx_gemma4.config import LayerConfig
from mlx_gemma4.execution import execution
from mlx_gemma4.gpu.render import default_launcher
from mlx_gemma4.kv import quantization
from mlx_gemma4.kv.segments import KVQuantizer
from mlx_gemma4.kv.state import KVState, kv_bytes
from mlx_gemma4.memory import on_cpu
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.quantize_kv import QUANTIZE_KV

LAYERS, EVERY = 60, 6  # every 6th layer is global
SLIDING, GLOBAL = (16, 256), (4, 512)  # KV heads, and their size
HEADS, WINDOW = 32, 1024
CHUNK = 512  # tokens read at once


def stand_in() -> Any:
    """Return the parts of a model that a state takes."""
    layers = []
    for i in range(LAYERS):
        kv_heads, dim = GLOBAL if i % EVERY == EVERY - 1 else SLIDING
        sliding = i % EVERY != EVERY - 1
        layers.append(LayerConfig(sliding=sliding, heads=HEADS, kv_heads=kv_heads, head_dim=dim, ffn=0, kv_layer=i))
    rotations = {i: quantization.rotations(layer.head_dim) for i, layer in enumerate(layers) if not layer.sliding}
    config, launcher = SimpleNamespace(layers=tuple(layers), window=WINDOW), default_launcher()
    return SimpleNamespace(config=config, rotations=rotations, kernels=Kernels(launcher) if launcher else None)


def filled(model: Any, length: int, kind: str) -> tuple[KVState, float, int]:
    """Return a state that has read `length` tokens, the seconds it took, and the most memory during the last chunk."""
    quantize = partial(model.kernels, QUANTIZE_KV) if model.kernels else quantization.quantize
    quantizers = {i: KVQuantizer(kind, rotation, quantize) for i, rotation in model.rotations.items()}
    state = KVState(model.config, mx.float16, None, None, kind, quantizers if kind != "full" else None)
    random = {shape: mx.random.normal((1, shape[0], CHUNK, shape[1])).astype(mx.float16) for shape in (SLIDING, GLOBAL)}
    ids, start = mx.zeros(CHUNK, mx.int32), time.perf_counter()
    for at in range(0, length, CHUNK):
        if at + CHUNK >= length:
            mx.clear_cache()
            mx.reset_peak_memory()
        n = min(CHUNK, length - at)
        with execution():
            for i, layer in enumerate(model.config.layers):
                pair = (random[layer.kv_heads, layer.head_dim][:, :, :n] * sign for sign in (1, -1))
                state.append(i, *pair)
                if i % EVERY == EVERY - 1:  # as a forward pass does: a few layers at a time
                    mx.eval([state._staged[j].tail_keys for j in range(i - EVERY + 1, i + 1)])
                    mx.eval([s.keys for s in state._staged[i].segments])
            state.advance(ids[:n])
            mx.eval(state.arrays)
    return state, time.perf_counter() - start, mx.get_peak_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=131_072, help="tokens")
    parser.add_argument("--measure", action="store_true", help="fill states and ask MLX what it holds")
    options = parser.parse_args()
    model = stand_in()
    mx.eval(list(model.rotations.values()))
    print(f"31B shape, {options.length} tokens, fp16; MB on {'a CPU' if on_cpu() else mx.device_info()['device_name']}")
    head = (
        "| kv | at most | arrays | held by MLX | at most, last chunk | s |" if options.measure else "| kv | at most |"
    )
    print(head + "\n" + "|---" * (head.count("|") - 1) + "|")
    for kind in quantization.KINDS:
        most = kv_bytes(model.config, mx.float16, options.length, CHUNK, kv=kind)
        line = f"| {kind} | {most / 1e6:,.0f} |"
        if options.measure:
            mx.clear_cache()
            before = mx.get_active_memory()
            state, took, peak = filled(model, options.length, kind)
            mx.clear_cache()
            held = mx.get_active_memory() - before
            line += f" {state.nbytes / 1e6:,.0f} | {held / 1e6:,.0f} | {(peak - before) / 1e6:,.0f} | {took:.0f} |"
            state.close()
            del state
        print(line, flush=True)


if __name__ == "__main__":
    main()
