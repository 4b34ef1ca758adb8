"""Times the towers that see, at full size with random weights: soft tokens of one picture, on this machine.

    python benchmarks/pictures.py [--models 12B E2B 31B] [--tokens 280 1120] [--dtype bfloat16] [--eager]

In: nothing. Out: a table, then all of it as JSON: ms to encode pixels that are there, the first time (libraries prepare
themselves for each size) and the median of what fits in ENOUGH seconds after that, the memory that it takes beyond the
weights, and ms to decode and resize a photo of 12 megapixels. --eager: layers are not compiled as one, which on NVIDIA
takes seconds once on a machine. On a CPU weights are fp32, as `load` makes them there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from io import BytesIO
from statistics import median
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_gemma4.config import Reader
from mlx_gemma4.doctor.verdict import machine
from mlx_gemma4.execution import execution
from mlx_gemma4.loading.tensors import Entry
from mlx_gemma4.media import patches, picture, vision
from mlx_gemma4.media.content import Content
from mlx_gemma4.media.kind import BUDGETS
from mlx_gemma4.media.layers import by_layers
from mlx_gemma4.memory import on_cpu

ENOUGH = 10.0  # seconds of encoding, after which no more is timed
# Hidden size of the text model; width, MLP, heads, layers and positions of the tower.
SIZES = {
    "12B": (3840, 3840, 0, 0, 0, 1120),
    "E2B": (1536, 768, 3072, 12, 16, 10240),
    "E4B": (2560, 768, 3072, 12, 16, 10240),
    "26B-A4B": (2816, 1152, 4304, 16, 27, 10240),
    "31B": (5376, 1152, 4304, 16, 27, 10240),
}


def tower(model: str, dtype: mx.Dtype) -> tuple[Any, Reader, dict[str, mx.array]]:
    """Return the module of a model's tower, its metadata and random weights."""
    hidden, width, ffn, heads, layers, places = SIZES[model]
    keys = {"embedding_length": width, "feed_forward_length": ffn, "attention.head_count": heads, "block_count": layers}
    read, module = Reader(keys, "", model), vision if layers else patches
    table = {"v.position_embd.weight": Entry((2, places, width), "F32", 0)}
    if layers and width > 1000:
        table |= {name: Entry((width,), "F32", 0) for name in ("v.std_bias", "v.std_scale")}
    weights = {}
    for name, spec in module.specs(read, hidden, table).items():
        if spec.optional and ("std" in name) == (width < 1000):
            continue  # small encoders have bounds, large ones are standardized
        if name.endswith(("_min", "_max")):
            weights[name] = mx.full(spec.shape, -1e3 if name.endswith("_min") else 1e3)
        elif spec.role == "vector":
            weights[name] = mx.ones(spec.shape) if name.endswith("weight") else mx.zeros(spec.shape)
        else:
            fan_in = int(np.prod(spec.shape[1:])) if len(spec.shape) != 3 else 4
            weights[name] = (mx.random.normal(spec.shape) * fan_in**-0.5).astype(mx.float32 if on_cpu() else dtype)
        mx.eval(weights[name])
    return module, read, weights


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Return the median of a call's ms, without the first, unless that alone takes ENOUGH; and the first's."""
    took: list[float] = []
    while not took or (sum(took) < ENOUGH and len(took) < 20):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return 1e3 * median(took[1:] or took), 1e3 * took[0]


def photo() -> Content:
    """A JPEG of 4,000 x 3,000."""
    rng, out = np.random.default_rng(0), BytesIO()
    small = Image.fromarray(rng.integers(0, 256, (300, 400, 3), dtype=np.uint8))
    small.resize((4000, 3000)).save(out, "JPEG", quality=90)
    return Content("photo", out.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["12B", "E2B", "31B"], choices=SIZES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[280, 1120], choices=BUDGETS)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--eager", action="store_true")
    given = parser.parse_args()
    dtype = "float32" if on_cpu() else given.dtype
    figures: dict[str, Any] = {"machine": machine(), "dtype": dtype, "eager": given.eager, "encode": []}
    if given.eager:
        patch.object(vision, "fused", lambda f, _: f).start()
    content = photo()
    print(f"{'model':<10}{'tokens':>8}{'ms':>12}{'first':>12}{'MB beside weights':>20}{'finite':>8}")
    for model in given.models:
        with execution():
            module, read, weights = tower(model, getattr(mx, given.dtype))
            held = sum(each.nbytes for each in weights.values())
            for tokens in given.tokens:
                height, width = picture.fitted(672, 960, tokens)
                pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)

                def encode(pixels: np.ndarray = pixels) -> mx.array:
                    rows: mx.array = by_layers(module.rows(read, weights, pixels))  # noqa: B023
                    mx.eval(rows)
                    return rows

                mx.reset_peak_memory()
                (ms, first), peak = timed(encode), (mx.get_peak_memory() - held) / 1e6
                finite = bool(mx.isfinite(encode()).all()) if ms < 1e3 * ENOUGH else None
                print(
                    f"{model:<10}{height * width // 2304:>8}{ms:>12.1f}{first:>12.1f}{peak:>20.0f}{finite!s:>8}",
                    flush=True,
                )
                row = {"model": model, "tokens": height * width // 2304, "ms": ms, "first": first}
                figures["encode"].append(row | {"mb": peak, "finite": finite})
    for tokens in given.tokens:
        figures[f"decode and resize, {tokens}"] = timed(lambda: picture.inputs(content, {"tokens": tokens}))[0]  # noqa: B023
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
