"""Times products of a few rows on this machine's GPU, in many tilings, beside the mat-vec of one row.

    python benchmarks/few_rows.py [--models 31B E2B] [--types Q4_K] [--rows 4 16 32] [--quick] [--json OUT.json]

In: nothing; random weights are made here, at the shapes of the published models. Out: for each weight the mat-vec's
time, and for 2 to 32 rows the fastest tilings, that of `rows_tiling`, and their ratios to the mat-vec's, at the end all
in one table; the exit code is 1 if one gives another result. Up to 8 rows some tilings leave products in parts; what
a norm takes to add these up stands behind each model. As in a decode step on NVIDIA, launches wait for each other in a
CUDA graph; copies of the weight take turns, so that no cache holds them. Experts: routes of random experts take turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "20")

import mlx.core as mx
import numpy as np

from mlx_gemma4.doctor.published import PUBLISHED
from mlx_gemma4.doctor.verdict import MLX, device_name, kernels_of
from mlx_gemma4.gpu import cuda_compiler, cuda_graph
from mlx_gemma4.gpu.recording import Arena, Recording, recorded, recorder
from mlx_gemma4.gpu.render import Launcher, cuda_launcher, default_launcher
from mlx_gemma4.measure.tune import Job, Timer, timer_of
from mlx_gemma4.ops.cases import normal, weight
from mlx_gemma4.ops.epilogue import ALONE, Epilogue, Folded
from mlx_gemma4.ops.few_rows import RowsTiling, few_rows
from mlx_gemma4.ops.matvec import MAX_TOKENS, matvec
from mlx_gemma4.ops.norms import NormOptions, add_norm
from mlx_gemma4.ops.routing import route
from mlx_gemma4.quant.formats import FORMATS, Format, Packed

LIMIT = 1e-3  # of the difference from the mat-vec's results, as norms
Call = Callable[[Launcher, Any, int], Any]  # (launcher, x, number of the launch)
COPIES = 250e6  # bytes of copies, several times the largest cache
ROOM = 48 << 10  # bytes of threadgroup memory: CUDA's


def weights(model: str) -> Iterator[tuple[str, tuple[int, ...], bool, list[str]]]:
    """Name, shape, whether gate and up, and types of the weights that a step spends its time on."""
    s = PUBLISHED[model]
    dims, kv = s.head_dims, s.kv_heads
    types = ["Q4_K", "Q6_K"] if s.hidden % 256 == 0 else ["Q4_K", "Q5_0", "Q8_0"]
    yield "attn sliding", (s.heads * dims[0] + 2 * kv[0] * dims[0], s.hidden), False, ["Q4_K"]
    yield "attn output", (s.hidden, s.heads * dims[0]), False, ["Q4_K"]
    if s.ple:
        yield "layer gate", (s.ple, s.hidden), False, ["Q4_K"]
        yield "layer projection", (s.hidden, s.ple), False, ["Q4_K"]
    rare = ["Q5_K", "Q8_0", "Q4_0", "IQ4_XS"] if model == "31B" else []
    yield "gate up", (2 * s.ffn, s.hidden), True, ["Q4_K", *rare]
    yield "down", (s.hidden, s.ffn), False, ["Q4_K", "Q6_K"] if s.ffn % 256 == 0 else ["Q8_0", "Q5_0"]
    yield "head", (s.vocab, s.hidden), False, ["Q6_K"] if model in ("31B", "E2B") else []
    if s.experts:
        yield "experts gate up", (s.experts, 2 * s.expert_ffn, s.hidden), True, ["Q4_K"]
        yield "experts down", (s.experts, s.hidden, s.expert_ffn), False, ["Q5_0", "Q8_0"]
    assert all(t in FORMATS for t in types)


def tilings(rows: int, quick: bool, fmt: Format, alone: bool) -> list[RowsTiling]:
    """The tilings to try for so many rows of x (8, 16 or 32); quick: those that are likely. alone: not in parts."""
    likely = {8: [(2, 4), (2, 8), (3, 8)], 16: [(4, 4), (4, 8), (2, 3)], 32: [(2, 3), (2, 4)]}[rows]
    every = likely if quick else itertools.product((1, 2, 3, 4), (1, 2, 3, 4, 6, 8, 12))
    made = [RowsTiling(*sizes) for sizes in every]
    made += [RowsTiling(*sizes, fold=True) for sizes in itertools.product((2, 4), (2, 3, 4, 6, 8)) if rows > 8]
    if rows == 16:
        made += [RowsTiling(*sizes, fold=True, ahead=True) for sizes in ((2, 3), (2, 4), (4, 2), (4, 3))]
    if rows == 8:
        ahead = [(1, 4), (1, 6), (2, 2), (2, 3), (2, 4), (2, 6), (3, 4), (4, 3)]
        in_parts = [(2, 4, 2), (2, 4, 3), (2, 4, 4), (2, 3, 4), (3, 4, 2), (3, 4, 3), (1, 4, 2), (2, 2, 6)]
        made += [RowsTiling(*sizes, ahead=True) for sizes in ahead]
        made += [RowsTiling(*sizes, fold=True, ahead=True) for sizes in ((2, 3), (2, 4), (3, 4))]
        made += [RowsTiling(b, s, False, p, a) for b, s, p in in_parts for a in (False, True) if not alone]
    most = {False: 64, True: 128}  # registers
    return [t for t in made if t.room(rows, fmt) <= ROOM and t.blocks * rows <= most[t.fold]]


class Weight:
    """Copies of a random weight and what else its products take."""

    def __init__(
        self, shape: tuple[int, ...], type: str, glu: bool, small: bool, made: Callable[[], Any] | None = None
    ) -> None:
        """small: no copies. made: makes the weight in place of `ops.cases.weight`."""
        self.shape, self.type, self.glu = shape, type, glu
        self.experts, self.k = (shape[0] if len(shape) == 3 else 0), shape[-1]
        first = weight(type, shape) if made is None else made()
        assert isinstance(first, Packed)
        self.copies = [first]
        if not self.experts and not small:
            self.copies += [weight(type, shape) for _ in range(min(64, int(COPIES // first.nbytes)))]  # type: ignore[misc]
        self.routes: dict[int, list[Any]] = {}
        self.epilogue = Epilogue(glu=glu, out=mx.float16 if glu else mx.float32)
        self.x = normal(32, self.k, dtype=mx.float16)
        self.own_x = normal(32, 8, self.k, dtype=mx.float16) if self.experts and not glu else None
        rng = np.random.default_rng(0)
        ids = [
            np.stack([rng.permutation(self.experts)[:8] for _ in range(32)]) for _ in range(16 if self.experts else 0)
        ]
        self.ids = [mx.array(i.astype(np.int32)) for i in ids]
        planes = [a for c in self.copies for a in (c.codes, c.group_scales, c.block_scales) if a is not None]
        mx.eval([] if made else planes, self.x, *self.ids)

    def one(self) -> Call:
        """The mat-vec of one row."""
        singles = [mx.contiguous(ids[0]) for ids in self.ids]
        x = self.x[:1] if self.own_x is None else self.own_x[0]

        def call(launcher: Launcher, _: mx.array, i: int) -> Any:
            folded = Folded(ids=singles[i % len(singles)] if singles else None)
            return matvec(launcher, x, self.copies[i % len(self.copies)], self.epilogue, folded)

        return call

    def several(self, rows: int, config: RowsTiling | None, mat_vec: bool = False) -> Call:
        """A product of several rows, of experts without the sorting."""
        x = mx.contiguous((self.x if self.own_x is None else self.own_x)[:rows])
        ids = [mx.contiguous(i[:rows]) for i in self.ids]
        if ids and rows not in self.routes:
            launcher = default_launcher()
            assert launcher is not None
            self.routes[rows] = [route(launcher, i, self.experts) for i in ids]
        routes = self.routes.get(rows, [None])
        mx.eval(x, ids, [r for r in routes if r])

        def call(launcher: Launcher, _: mx.array, i: int) -> Any:
            w = self.copies[i % len(self.copies)]
            if mat_vec:
                return matvec(launcher, x, w, self.epilogue)
            folded = Folded(ids=ids[i % len(ids)], routed=routes[i % len(routes)]) if ids else ALONE
            return few_rows(launcher, x, w, self.epilogue, folded, config=config)

        return call

    def n_bytes(self, rows: int) -> float:
        """Bytes of weights that a product of so many rows reads."""
        if not self.experts:
            return self.copies[0].nbytes
        chosen = [len(np.unique(np.array(i[:rows]))) for i in self.ids]
        return self.copies[0].nbytes / self.experts * sum(chosen) / len(chosen)


def compile_all(calls: list[tuple[Call, mx.array]]) -> None:
    """Compile the kernels of many launches at once, on all cores."""
    texts: dict[str, str] = {}
    for call, x in calls:
        note_texts(call, x, texts)
    cuda_compiler.compile_all(texts, lambda: None)


def note_texts(call: Call, x: mx.array, texts: dict[str, str]) -> None:
    """Add the texts of what a call launches to `texts`, with their kernels' names."""
    recording = Recording(Arena())
    with recorded(recording):
        call(recorder, x, 0)
    for arguments in dict.fromkeys(map(cuda_graph.text_arguments, recording.launches)):
        texts[cuda_graph.text(*arguments)] = arguments[0].name


def seconds(call: Call, x: mx.array, n_bytes: float, launcher: Launcher) -> float:
    """Time one of many launches that wait for each other, each of which reads so many bytes; the median of five."""
    run = _timer(launcher)(Job(None, x, call, int(n_bytes)))
    return median(run() for _ in range(5))


@cache
def _timer(launcher: Launcher) -> Timer:
    return timer_of(kernels_of(launcher))


def tune(name: str, made: Weight, options: argparse.Namespace, launcher: Launcher) -> dict[str, Any]:
    """Print the lines of one weight and return them; "worst" is the largest difference from the mat-vec's rows."""
    classes, fmt, alone = list(options.rows), FORMATS[made.type], made.glu or made.experts > 0
    configs = {r: tilings(8 if made.experts or r <= 8 else 16 << (r > 16), options.quick, fmt, alone) for r in classes}
    configs = {r: [c for c in cs if not (made.glu and c.blocks % 2)] for r, cs in configs.items()}
    if launcher is cuda_launcher:
        compile_all([(made.several(r, c), made.x) for r, cs in configs.items() for c in [None, *cs]])

    def timed(call: Call, rows: int) -> float:
        return seconds(call, made.x, made.n_bytes(rows), launcher) * 1e6

    one = timed(made.one(), 1)
    line: dict[str, Any] = {"name": name, "type": made.type, "shape": made.shape, "one": one, "rows": [], "worst": 0.0}
    n_bytes = made.n_bytes(1)
    print(f"{name:22} {made.type:7} {made.shape} {n_bytes / 1e6:.0f} MB: {one:.1f} us, {n_bytes / one / 1e3:.0f} GB/s")

    def show(rows: int, took: float, what: str) -> None:
        rate = made.n_bytes(rows) / took / 1e3
        print(f"    T={rows:<3} {took:7.1f} us  x{took / one:.2f}  {rate:5.0f} GB/s  {what}", flush=True)

    fastest: RowsTiling | None = None
    for rows in classes:
        found = []
        want = _rows_by_matvec(launcher, made, rows)
        for config in [None, *configs[rows]]:
            call = made.several(rows, config)
            try:
                got = call(launcher, made.x, 0).astype(mx.float32)
                got = got.sum(axis=0) if config and config.parts > 1 else got
                error = (mx.linalg.norm(got.reshape(want.shape) - want) / mx.linalg.norm(want)).item()
                found.append((timed(call, rows), config, error))
            except Exception as reason:  # too many registers, say
                print(f"    T={rows} {config}: {str(reason)[:100]}")
        line["worst"] = max(line["worst"], *(e if e == e else 1e9 for *_, e in found))
        own, *rest = found
        show(rows, own[0], f"rows_tiling, error {own[2]:.1e}")
        rest.sort(key=lambda r: r[0])
        for took, config, _ in rest[: options.shown]:
            show(rows, took, _brief(config))
        if not fastest and rest:
            fastest = rest[0][1]
        all_times = [(_brief(config), took) for took, config, _ in rest]
        line["rows"].append({"rows": rows, "own": own[0], "error": own[2], "times": all_times})
    if not made.experts and 8 in classes:
        for rows in (2, 4):
            took = timed(made.several(rows, fastest), rows)
            show(rows, took, f"{_brief(fastest)}")
            old = timed(made.several(rows, None, mat_vec=True), rows)
            show(rows, old, f"the mat-vec of {2 if rows == 2 else f'up to {MAX_TOKENS}'}")
            line["rows"].append({"rows": rows, "few": took, "matvec": old})
    return line


def _brief(t: RowsTiling | None) -> str:
    if t is None:
        return ""
    return f"{t.blocks}x{t.split}" + f" in {t.parts}" * (t.parts > 1) + " folded" * t.fold + " ahead" * t.ahead


def _rows_by_matvec(launcher: Launcher, made: Weight, rows: int) -> mx.array:
    """The results of the first launch, row by row."""
    done = []
    for t in range(rows):
        x = made.x[t : t + 1] if made.own_x is None else made.own_x[t]
        folded = Folded(ids=mx.contiguous(made.ids[0][t]) if made.ids else None)
        done.append(matvec(launcher, mx.contiguous(x), made.copies[0], made.epilogue, folded).astype(mx.float32))
    return mx.stack(done).reshape(rows, -1)


def adding_time(launcher: Launcher, hidden: int, rows: int) -> None:
    """Print what a norm takes behind a product in one part, or in several."""
    x, post, told = normal(rows, hidden), normal(hidden), []
    options = NormOptions(1e-6, post, out=mx.float16)
    for parts in (1, 2, 3, 4):
        h = normal(parts, rows, hidden)
        mx.eval(x, post, h)

        def call(launcher: Launcher, x: mx.array, i: int, h: mx.array = h) -> Any:
            return add_norm(launcher, x, h, post, options)

        told.append(f"{parts}: {seconds(call, x, 1e7, launcher) * 1e6:.1f}")
    print(f"norm of {rows} rows of {hidden} behind a product in so many parts, us: {', '.join(told)}")


def summary(lines: list[dict[str, Any]]) -> Iterator[str]:
    """The fastest tiling of each weight and number of rows: lines of a table in Markdown."""
    yield "| weight | type | rows x length | rows of x | one row, us | as now | fastest | us | ratio |"
    yield "|---" * 9 + "|"
    for line in lines:
        for cell in (c for c in line["rows"] if c.get("times")):
            name, took = min(cell["times"], key=lambda each: each[1])
            sizes, one = " x ".join(map(str, line["shape"])), line["one"]
            yield (
                f"| {line['name']} | {line['type']} | {sizes} | {cell['rows']} | {one:.1f} | {cell['own']:.1f} "
                f"({cell['own'] / one:.2f}) | {name} | {took:.1f} | {took / one:.2f} |"
            )


def routing_time(launcher: Launcher) -> None:
    """Print what sorting the rows of experts takes."""
    for rows in (2, 8, 32):
        ids = mx.random.randint(0, 128, (rows, 8)).astype(mx.int32)
        mx.eval(ids)

        def call(launcher: Launcher, x: mx.array, i: int, ids: mx.array = ids) -> Any:
            return route(launcher, ids, 128)

        print(f"route of {rows} x 8 rows among 128 experts: {seconds(call, ids, 1e7, launcher) * 1e6:.1f} us")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--models", nargs="*", type=str.upper, default=["31B", "26B-A4B", "E2B", "12B"], choices=PUBLISHED
    )
    parser.add_argument("--types", nargs="*", help="only weights of these GGUF types")
    parser.add_argument("--names", nargs="*", help='only weights of these names, such as "gate up"')
    parser.add_argument("--rows", nargs="*", type=int, default=[8, 16, 32])
    parser.add_argument("--quick", action="store_true", help="fewer tilings")
    parser.add_argument("--shown", type=int, default=4, help="fastest tilings to print")
    parser.add_argument("--small", action="store_true", help="no copies: for a try without a GPU's memory")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    launcher = default_launcher()
    if launcher is None:
        print("no GPU: the kernels run on Metal, or on NVIDIA with MLX's cuda extra", file=sys.stderr)
        return 2
    print(f"{device_name()}, MLX {MLX}")
    begun, lines = time.perf_counter(), []
    for model in options.models:
        for name, shape, glu, types in weights(model):
            for type in types:
                if (options.types is None or type in options.types) and (
                    options.names is None or name in options.names
                ):
                    made = Weight(shape, type, glu, options.small)
                    lines.append({"model": model, **tune(f"{model} {name}", made, options, launcher)})
                    if options.json:
                        options.json.write_text(json.dumps({"device": device_name(), "mlx": MLX, "lines": lines}))
        if PUBLISHED[model].experts:
            routing_time(launcher)
        adding_time(launcher, PUBLISHED[model].hidden, min(options.rows))
        print(f"{model}: {time.perf_counter() - begun:.0f} s", flush=True)
    print(*summary(lines), sep="\n")
    return int(any(line["worst"] > LIMIT for line in lines))


if __name__ == "__main__":
    sys.exit(main())
