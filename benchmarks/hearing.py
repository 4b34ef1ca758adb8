"""Measures how long sound takes to become soft tokens: towers at their full size with random weights.

    python benchmarks/hearing.py [--only E2B] [--seconds 30] [--rounds 5] [--json OUT.json]

In: nothing. Out, for each tower that hears: milliseconds of decoding a WAV of 44.1 kHz stereo, of the front end (frames
or mel spectra, in numpy) and of the tower, each the median, and the peak of MLX's memory. Weights are in BF16 as in the
published files; on a CPU they are widened to fp32 once, as they are there (set OPENBLAS_NUM_THREADS=1, as the command
line does). Sound longer than 30 s is encoded in pieces.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gemma4.config import Reader
from mlx_gemma4.execution import execution
from mlx_gemma4.loading.tensors import Spec
from mlx_gemma4.media import sounds
from mlx_gemma4.media.content import Content
from mlx_gemma4.media.layers import by_layers
from mlx_gemma4.media.projector import TOWERS
from mlx_gemma4.memory import on_cpu

CONFORMER = {"embedding_length": 1024, "feed_forward_length": 4096, "block_count": 12, "attention.head_count": 8}
SIZES = {"E2B": ("gemma4a", CONFORMER, 1536), "E4B": ("gemma4a", CONFORMER, 2560), "12B": ("gemma4ua", {}, 3840)}


def random_weight(name: str, spec: Spec) -> mx.array:
    if name.endswith(("_min", "_max")):  # bounds, which the published files have
        return mx.full(spec.shape, -1e3 if name.endswith("_min") else 1e3)
    scale = spec.shape[-1] ** -0.5 if len(spec.shape) > 1 else 1.0
    wide = spec.role == "vector" or on_cpu()
    return (scale * mx.random.normal(spec.shape)).astype(mx.float32 if wide else mx.bfloat16)


def wav_of(seconds: float, seed: int = 0) -> bytes:
    """A WAV file of noise, 44.1 kHz, 16 bits, stereo."""
    import av  # only for who hears: benchmarks of pictures take this module, too

    out = io.BytesIO()
    samples = np.random.default_rng(seed).integers(-9000, 9000, (1, int(2 * 44_100 * seconds)), np.int16)
    with av.open(out, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=44_100, layout="stereo")
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
        frame.sample_rate = 44_100
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return out.getvalue()


def milliseconds(rounds: int, run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """The median of `rounds` runs after one that warms up."""
    times = []
    for _ in range(rounds + 1):
        start = clock()
        run()
        times.append(1e3 * (clock() - start))
    return median(times[1:])


def measure(name: str, content: Content, decoding: float, rounds: int) -> dict[str, float]:
    """What one model's tower takes for a sound that takes `decoding` ms to decode."""
    kind, sizes, hidden = SIZES[name]
    tower, read = TOWERS[kind], Reader(sizes, "", name)
    specs = tower.specs(read, hidden, {})
    with execution():
        weights = {key: random_weight(key, spec) for key, spec in specs.items()}
        mx.eval(weights)
    inputs = tower.inputs(content, {})

    def encode() -> int:
        rows = 0
        for each in inputs:
            with execution():
                made = by_layers(tower.rows(read, weights, each))
                mx.eval(made)
            rows += made.shape[0]
        return rows

    front = milliseconds(rounds, lambda: tower.inputs(content, {})) - decoding
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    took = milliseconds(rounds, encode)
    peak = mx.get_peak_memory() - before
    cpu = milliseconds(1, encode, time.process_time)
    parameters = sum(int(np.prod(spec.shape)) for spec in specs.values())
    return {
        "parameters": parameters,
        "rows": encode(),
        "front end ms": front,
        "tower ms": took,
        "tower cpu ms": cpu,
        "peak bytes": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=SIZES)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    content = Content("noise", wav_of(options.seconds))
    decoding = milliseconds(options.rounds, lambda: sounds.decode(content))
    print(f"{mx.device_info().get('device_name', 'CPU')}: {options.seconds:g} s of sound, decoded in {decoding:.0f} ms")
    results = {"decoding": {"ms": decoding}}
    for name in [options.only] if options.only else SIZES:
        r = results[name] = measure(name, content, decoding, options.rounds)
        print(
            f"{name} {r['parameters'] / 1e6:.1f}M: {r['rows']:.0f} rows, front end {r['front end ms']:.0f} ms, "
            f"tower {r['tower ms']:.0f} ms ({r['tower cpu ms']:.0f} of CPU time), "
            f"{r['peak bytes'] / 1e6:.0f} MB beside the weights"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
