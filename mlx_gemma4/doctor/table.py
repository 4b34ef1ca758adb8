"""The command `mlx-gemma4 doctor`: every kernel at the sizes of every published model.

In: this machine's launcher. Out: a table of checks, printed line by line, and the verdict to remember (verdict.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import mlx.core as mx

from ..gpu import render
from ..ops import matvec
from ..ops.cases import Check, Heads, Product, Sizes
from ..ops.epilogue import SHRINK
from ..quant.formats import FORMATS
from . import verdict
from .published import PUBLISHED, Shape
from .sizes import checks
from .verdict import STOCK, Result, Verdict

# Inputs without a kernel, on every machine: stock operations run them.
WITHOUT_KERNEL = (
    ("matvec, expand", "weights that MLX quantized itself (folders of safetensors)"),
    ("matvec", "rows that are no multiple of 32 long"),
    ("dense", "experts in F32, F16 or BF16"),
    ("embed, ple_inputs", "tables that MLX quantized itself"),
)


# Of each type of a Q4_K_M file the one that unsloth's UD-IQ2 files mostly have instead; heads are of more bits.
TWO_BITS = {
    "31B": {"Q4_K": "IQ2_XXS", "Q6_K": "IQ3_XXS"},
    "26B-A4B": {"Q4_K": "IQ2_S", "Q6_K": "IQ3_S", "Q5_0": "IQ4_NL"},
}

# ---------------------------------------------------------------- sizes


def real_sizes() -> dict[str, Sizes]:
    """The published models, in the types of a Q4_K_M file and the largest in those of files of 2 bits; every format and
    F16 at one shape, and several tokens.
    """
    models = {name: sizes_of_shape(shape) for name, shape in PUBLISHED.items()}
    for name, types in TWO_BITS.items():
        few = tuple(replace(p, type=types.get(p.type, p.type)) for p in models[name].products[1:])
        models[f"{name} UD"] = replace(models[name], products=few, heads=())
    formats = [Product(name, (5376, 8192), narrow=name in FORMATS) for name in (*FORMATS, "F16")]
    formats.append(Product("Q4_K", (5376, 8192), tokens=matvec.MAX_TOKENS, narrow=True))
    return models | {"any": Sizes(0, 0, (), tuple(formats), "")}


def sizes_of_shape(m: Shape) -> Sizes:
    """The sizes of a model in the types of a Q4_K_M file: Q4_K; Q6_K for the head and most of what leads back to the
    residual; Q5_0 where rows are no multiple of 256.
    """
    sliding, full = (
        Heads(m.heads, kv_heads, dim, window, "kv" if window or m.ple else "k", v_is_k=not (window or m.ple))
        for kv_heads, dim, window in zip(m.kv_heads, m.head_dims, (m.window, 0), strict=True)
    )
    heads, products = [sliding, full], [Product("Q6_K", (m.vocab, m.hidden), narrow=True)]
    for h in heads:
        rows = h.heads + h.kv_heads * (2 if h.joined == "kv" else 1)
        products.append(Product("Q4_K", (rows * h.dim, m.hidden), narrow=True))
        products.append(Product("Q4_K", (m.hidden, h.heads * h.dim), narrow=True))
    for ffn in dict.fromkeys(m.ffns):
        products.append(Product("Q4_K", (2 * ffn, m.hidden), glu=True, factor=SHRINK, narrow=True, narrow_out=True))
        products.append(Product("Q5_0" if ffn % 256 else "Q6_K", (m.hidden, ffn), narrow=True))
    if m.ple:
        heads += [replace(h, joined="", has_kv=False) for h in heads]
        gate = Product("Q4_K", (m.ple, m.hidden), times=True, factor=SHRINK, narrow=True, narrow_out=True, given=SHRINK)
        products += [gate, Product("Q4_K", (m.hidden, m.ple), narrow=True)]
        products.append(Product("BF16", (m.layers * m.ple, m.hidden), narrow_out=True))
    if m.experts:
        up, down = (m.experts, 2 * m.expert_ffn, m.hidden), (m.experts, m.hidden, m.expert_ffn)
        products.append(Product("F32", (m.experts, m.hidden), norm=True, factor=m.hidden**-0.5))
        products.append(Product("Q4_K", up, norm=True, glu=True, factor=SHRINK, used=m.experts_used, narrow_out=True))
        products.append(Product("Q5_0", down, used=m.experts_used, own_x=True, narrow=True))
    tables = ("Q6_K", "Q5_K" if m.ple else "")
    experts = (m.experts, m.experts_used)
    return Sizes(m.hidden, m.vocab, tuple(heads), tuple(products), *tables, m.layers, m.ple, *experts)


def small_sizes() -> dict[str, Sizes]:
    """Small sizes for machines without a GPU: enough to see each reference run."""
    small = Shape(2, 256, 4, (2, 1), 512, 128, 2, 0, False, 256, 8, 2, 96, head_dims=(64, 128), vocab=512)
    every = tuple(Product(name, (32, 256)) for name in FORMATS)
    return {"small": sizes_of_shape(small), "any": Sizes(0, 0, (), every, "")}


# ---------------------------------------------------------------- the table


def all_checks(models: dict[str, Sizes], lengths: Sequence[int]) -> list[tuple[str, Check]]:
    """Return each check once, with the first model that needs it."""
    found: dict[str, tuple[str, Check]] = {}
    for name, sizes in models.items():
        for check in checks(sizes, lengths):
            found.setdefault(check.key, (name, check))
    return list(found.values())


def examine(
    echo: Callable[[str], None],
    as_json: bool = False,
    models: dict[str, Sizes] | None = None,
    timed: bool = True,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> bool:
    """Run every check, print a table line by line, and remember the verdict. Return True if every kernel passed.

    Args:
        echo: prints a line of the report.
        as_json: print one JSON object instead.
        models: sizes to check at; None: those of the published models, or small ones without a GPU.
        timed: time the kernels too.
        keep: is called before each check and at the end, with the object of `as_json` as far as it is known.
    """
    launcher = render.default_launcher()
    models = models or (real_sizes() if launcher else small_sizes())
    note = f"{verdict.device_name()}, MLX {verdict.MLX}: "
    if launcher is None:
        note += "no GPU, so stock operations run everything, and no kernel needs a check"
    elif verdict.usable_kernels() is None:
        note += "MLX_GEMMA4_KERNELS=off, so stock operations run everything; here are the kernels all the same"
    else:
        note += "each kernel beside stock operations, on random numbers (NVIDIA's compiler takes minutes for them)"
    if not as_json:
        echo(note)
    if not as_json and launcher:
        echo(_line("kernel", "model", "shape", "error", "time", "GB/s", "verdict"))
    results: list[Result] = []
    failed: dict[str, str] = {}
    table: list[dict[str, Any]] = []
    found = {"machine": verdict.machine(), "gpu": launcher is not None, "off": failed, "checks": table}
    for name, check in all_checks(models, verdict.LENGTHS if launcher else verdict.QUICK_LENGTHS):
        keep({**found, "running": check.key})
        result = verdict.run_check(check, launcher, timed)
        results.append(result)
        table.append({"model": name, **asdict(result)})
        if result.failed:
            failed.setdefault(result.op, result.verdict)
        mx.clear_cache()  # the next arrays have other sizes
        if not as_json and (launcher or result.verdict != STOCK):
            echo(_row(name, result))
    keep({**found, "running": None})
    if launcher:
        verdict.remember(Verdict({f"{r.op}: {r.shape}" for r in results}, failed))
    if as_json:
        echo(json.dumps(found))
    else:
        for op, shape in WITHOUT_KERNEL if launcher else ():
            echo(_line(op, "", shape, "", "", "", "no kernel: stock operations"))
        if failed:
            echo(verdict.switched_off(failed)[0].upper() + verdict.switched_off(failed)[1:])
        elif launcher:
            echo("All kernels are right. This is remembered until MLX, the kernels or the device change.")
    return not failed and not (launcher is None and any(r.verdict != STOCK for r in results))


def _row(model: str, r: Result) -> str:
    error = "" if r.error is None else f"{r.error:.1e}"
    took = "" if r.seconds is None else f"{r.seconds * 1e6:.1f} us"
    return _line(r.op, model, r.shape, error, took, "" if r.rate is None else f"{r.rate:.0f}", r.verdict)


def _line(op: str, model: str, shape: str, error: str, took: str, rate: str, verdict: str) -> str:
    return f"{op:<14} {model:<10} {shape:<44} {error:>8} {took:>11} {rate:>6}  {verdict}".rstrip()
