"""Times a model's decoding and each kernel that reads weights, for every type that a GGUF may have. No file is needed.

    python benchmarks/by_type.py [--shape 12B] [--types Q4_K IQ2_XXS UD-Q4_K_XL] [--no-kernels] [--json OUT.json]
    python benchmarks/by_type.py --table OUT.json

In: nothing; random weights of the published shape are made here, in one type each or as make_synthetic.py's mix. Out:
for each type decoded tokens a second behind 512 tokens, and the share of the speed of large copies at which they read
their bytes, which are as many as a file has; and of the kernels, in the same bytes, GB/s at the shape of gate and up:
the mat-vec of one row, 4 and 16 rows, the expansion to fp16, and 4096 rows of an embedding. The second form prints the
table again.

The step is whole, with each of the model's layers; but every sixth one, which is of the same kind, has the same weights
in memory (12B in Q4_K: 0.8 GB between two uses, and caches hold 0.05). All kernels are compiled first, on all cores.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gemma4.doctor.published import PUBLISHED
from mlx_gemma4.doctor.verdict import MLX, device_name, kernels_of, usable_kernels
from mlx_gemma4.execution import execution
from mlx_gemma4.files.gguf import TENSOR_TYPES
from mlx_gemma4.gpu import cuda_compiler, cuda_graph
from mlx_gemma4.gpu.recording import RecordedLaunch
from mlx_gemma4.gpu.render import Launcher, cuda_launcher
from mlx_gemma4.loading.loader import load_model
from mlx_gemma4.loading.tensors import Entry, Spec
from mlx_gemma4.measure import bench
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops.cases import norm_weight, weight
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.embed import embed
from mlx_gemma4.ops.expand import expand
from mlx_gemma4.quant.formats import FLOATS, FORMATS

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import few_rows
import make_synthetic
import precompile

PERIOD = 6  # layers, of which each has weights of its own: the published models' pattern of sliding and global ones
DEPTH = 512
EMBEDDED = 4096  # rows of an embedding
KERNELS = ("1 row", "4 rows", "16 rows", "expand", "embed")
BLOCKS = {t.name: t for t in TENSOR_TYPES.values()}


class RandomSource:
    """The tensors of a published model as random weights; with `lazy`, of zeros that are never made."""

    def __init__(self, shape: str, type: str, lazy: bool = False) -> None:
        self.name, self.lazy = f"{shape} {type}", lazy
        self._made: dict[Any, Any] = {}
        self.entries = {
            name: Entry(
                size,
                t,
                math.prod(size) // BLOCKS[t].block_size * BLOCKS[t].block_bytes,
                t in FORMATS,
                block=BLOCKS[t].block_size,
            )
            for name, (size, t) in make_synthetic.tensors(PUBLISHED[shape], type).items()
        }

    def read(self, names: Sequence[str], spec: Spec, *_: Any) -> Any:
        sizes, kind = [self.entries[name].shape for name in names], self.entries[names[0]].type
        size = (*sizes[0][:-2], sum(s[-2] for s in sizes), sizes[0][-1]) if len(sizes) > 1 else sizes[0]
        if spec.role == "vector":
            return mx.ones(size) if "scale" in names[0] or "rope" in names[0] else norm_weight(size[0])
        if self.lazy:
            return precompile.zeros(kind, size)
        words = names[0].split(".")
        key = (kind, size, int(words[1]) % PERIOD, words[2]) if words[0] == "blk" else names[0]
        if key not in self._made:
            made = weight(kind, size)
            mx.eval([made] if isinstance(made, mx.array) else [made.codes, made.group_scales, made.block_scales])
            self._made[key] = made
        return self._made[key]


def model_of(shape: str, type: str, kernels: Kernels, lazy: bool = False) -> Model:
    """Return a model of such weights."""
    config = make_synthetic.config_of(PUBLISHED[shape])
    return load_model(config, RandomSource(shape, type, lazy), "packed", kernels=kernels)[0]


class Texts(precompile.Idle):
    """A player of recorded steps that notes the texts of their kernels."""

    found: dict[str, str]  # text -> name

    def load(self, launches: Sequence[RecordedLaunch], nbytes: int, *_: Any) -> None:
        for kernel, types, ranks in dict.fromkeys(map(cuda_graph.text_arguments, launches)):
            Texts.found[cuda_graph.text(kernel, types, ranks)] = kernel.name


def compile_ahead(shape: str, types: list[str], kernels: bool) -> int:
    """Compile on all cores what decoding in these types launches, and the kernels by themselves; return how many."""
    Texts.found = {}
    for type in types:
        model = model_of(shape, type, Kernels(cuda_launcher, player=Texts), lazy=True)
        assert model.replayer
        with execution():
            state = model.new_state()
            precompile.lazy_fill(state, DEPTH)
            model.replayer.take_on(state)
        if kernels and type in FORMATS:
            for call, *_ in calls_of(shape, type, lazy=True):
                few_rows.note_texts(call, mx.zeros(1), Texts.found)
    cuda_compiler.compile_all(Texts.found, lambda: None)
    return len(Texts.found)


def calls_of(shape: str, type: str, lazy: bool = False) -> Iterator[tuple[few_rows.Call, mx.array, float]]:
    """Yield of each of KERNELS what launches it, an x, and the bytes of weights that a launch reads."""
    s = PUBLISHED[shape]
    size = (2 * s.ffn, s.hidden)
    made = few_rows.Weight(size, type, False, lazy, made=partial(precompile.zeros, type, size) if lazy else None)
    yield made.one(), made.x, made.n_bytes(1)
    for rows in (4, 16):
        yield made.several(rows, None), made.x, made.n_bytes(rows)

    def expanded(launcher: Launcher, _: Any, i: int) -> Any:
        return expand(launcher, made.copies[i % len(made.copies)])

    ids = mx.random.randint(0, size[0], (EMBEDDED,)).astype(mx.int32)

    def embedded(launcher: Launcher, _: Any, i: int) -> Any:
        return embed(launcher, ids, made.copies[i % len(made.copies)], 1.0)

    yield expanded, made.x, made.n_bytes(1)
    yield embedded, made.x, made.n_bytes(1) * EMBEDDED / size[0]


def decode(shape: str, type: str, kernels: Kernels, copy: float) -> dict[str, Any]:
    """Return what decoding a model of a type was measured to take."""
    model = model_of(shape, type, kernels)
    plan = bench.BenchPlan(prompts=(), depths=(DEPTH,), reply=64, repetitions=3)
    (cell,) = bench.measure(model, plan, [bench.Cell("decode", DEPTH)], plan.repetitions)
    assert cell.n_bytes
    return {
        "weight_bytes": bench.weight_bytes(model),
        "bytes_per_token": cell.n_bytes,
        "tokens_per_second": round(cell.rate, 2),
        "samples": [round(s, 2) for s in cell.samples],
        "share_of_copy": round(cell.n_bytes * cell.rate / copy, 4),
        "launches": cell.launches,
        "host_time": cell.host_time and round(cell.host_time, 6),
        "kernels_off": sorted(map(str, kernels.off)),
    }


def table(result: dict[str, Any]) -> Iterator[str]:
    """Yield a result's table, in Markdown."""
    shown = [name for name in KERNELS if any(name in row.get("kernels", {}) for row in result["types"])]
    yield f"{result['shape']} on {result['chip']}, MLX {result['versions']['mlx']}, {result['date'][:10]}: decoded"
    yield f"tokens a second behind {result['depth']} tokens, and GB/s of the file's bytes; large copies run at"
    yield f"{result['copy_bandwidth'] / 1e9:.0f} GB/s (`{result['command']}`)."
    yield ""
    yield "| type | GB a token | tokens/s | of copies | " + "".join(f"{name} | " for name in shown).rstrip()
    yield "|---" * (4 + len(shown)) + "|"
    for row in result["types"]:
        cells = [row["type"], *([row["error"], "", ""] if "error" in row else [])]
        if "error" not in row:
            cells += [f"{row['bytes_per_token'] / 1e9:.2f}", f"{row['tokens_per_second']:.0f}"]
            cells.append(f"{row['share_of_copy']:.0%}" + " (kernels off)" * bool(row["kernels_off"]))
        rates = row.get("kernels", {})
        cells += [f"{rates[name]['bytes_per_second'] / 1e9:.0f}" if name in rates else "" for name in shown]
        yield f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", type=str.upper, default="12B", choices=PUBLISHED)
    parser.add_argument("--types", nargs="*", default=list(FORMATS), choices=[*FORMATS, *FLOATS, make_synthetic.UD])
    parser.add_argument("--no-kernels", action="store_true", help="only decode")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, help="a JSON file of this program, whose table to print")
    options = parser.parse_args()
    if options.table:
        print("\n".join(table(json.loads(options.table.read_text()))))
        return 0
    kernels = usable_kernels()
    if kernels is None:
        print("no GPU: the kernels run on Metal, or on NVIDIA with MLX's cuda extra", file=sys.stderr)
        return 2
    begun, wanted = time.perf_counter(), not options.no_kernels
    if kernels.launcher is cuda_launcher:
        count = compile_ahead(options.shape, options.types, wanted)
        print(f"{count} kernels compiled or found on disk in {time.perf_counter() - begun:.0f} s", flush=True)
    words = ["python", "benchmarks/by_type.py", *(w for w in sys.argv[1:] if not w.endswith(".json") and w != "--json")]
    copy = bench.copy_bandwidth()
    result: dict[str, Any] = {**bench.made_by("benchmarks/by_type.py"), "command": shlex.join(words)}
    result |= {"chip": device_name(), "shape": options.shape, "depth": DEPTH, "copy_bandwidth": round(copy)}
    result["types"] = []
    print(f"{device_name()}, MLX {MLX}, {options.shape}; large copies run at {copy / 1e9:.0f} GB/s")
    for type in options.types:
        row: dict[str, Any] = {"type": type}
        try:
            row |= decode(options.shape, type, kernels_of(kernels.launcher, kernels.off), copy)
            mx.clear_cache()
            if wanted and type in FORMATS:
                rates = row["kernels"] = {}
                for name, (call, x, n_bytes) in zip(KERNELS, calls_of(options.shape, type), strict=True):
                    took = few_rows.seconds(call, x, n_bytes, kernels.launcher)
                    rates[name] = {"seconds": took, "bytes_per_second": round(n_bytes / took)}
        except Exception as error:  # the other types are still to be measured
            row["error"] = " ".join(f"{type}: {error}".split())[:120]
        mx.clear_cache()
        result["types"].append(row)
        rates = {name: f"{rate['bytes_per_second'] / 1e9:.0f}" for name, rate in row.get("kernels", {}).items()}
        said = row.get("error") or f"{row['tokens_per_second']:7.1f} tokens/s, {row['share_of_copy']:4.0%} of copies"
        print(f"{type:10} {said}  {rates or ''}  {time.perf_counter() - begun:.0f} s", flush=True)
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    print("", *table(result), sep="\n")
    return int(any("error" in row for row in result["types"]))


if __name__ == "__main__":
    sys.exit(main())
