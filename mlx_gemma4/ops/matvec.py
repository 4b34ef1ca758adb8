"""The packed mat-vec: a few tokens through a quantized weight; see matvec.metal.

In: activations and a packed weight. Out: activations, with a norm, GEGLU or a factor folded in. Its reference is
`epilogue.product_reference`, for any weight.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import mlx.core as mx

from ..gpu.render import Launch, Launcher, prepare, render, result_defines
from ..quant.formats import FORMATS, Format, Packed
from .cases import Case, Check, Product, Sizes, cases, product_inputs
from .epilogue import ALONE, PLAIN, Epilogue, Folded, product_reference
from .op import Op, OpKey
from .packed import absent_planes, format_defines, planes
from .tuning import Tiling, TilingKey, Tuning, launch_cache, this_gpu

MAX_TOKENS = 4  # of a mat-vec


def tiling(fmt: Format, n: int, k: int, tokens: int = 1, gpu: Tuning | None = None) -> Tiling:
    """The tiling for a weight of n rows of k: what `mlx-gemma4 tune` found, or rules fitted to times of 10 shapes.

    In a decode step launches wait for each other, so most of all a lane should have few steps, and there should be
    simdgroups enough for every core; then, the lanes of a row should divide its chunks evenly, and a lane's x should
    serve several rows. docs/kernels.md has the measurements.
    """
    gpu = gpu or this_gpu()
    if (found := gpu.tilings.get((fmt.name, n, k))) and tokens <= (2 if found.rows <= 4 else 1):
        return found
    chunks = -(-k // 32)
    if tokens <= 2 and n * k >= gpu.large_weights and n < gpu.head_rows:
        lanes, most = 32 if chunks >= 256 else 16 if chunks >= 32 else 8, 6 if 8192 <= n < 20000 else 4
        for split in (1, 2, 3, 4, 6, 8):
            steps, enough = chunks / (lanes * split), n * split * lanes >= 128 * gpu.busy_simdgroups
            if steps <= most and steps / math.ceil(steps) > gpu.full_steps and enough:
                return Tiling(lanes, 4, split, split if split > 3 else 2 * split)
    by_table = fmt.lut is not None
    if n >= 8192:  # many rows: few lanes for each
        lanes = 16 if fmt.bits > 4 and chunks >= 160 else 8
        rows = 4 if fmt.bits <= 4 and not 32768 <= n < 131072 else 2
        if by_table:  # not measured: whole waves, and x made whole numbers for many rows
            rows = 4 if 32768 <= n < 131072 else 8
        split = max((3, 4, 2), key=lambda s: round(_even(chunks, lanes * s), 2))
    elif chunks >= 512 and fmt.bits <= 4 and not by_table:  # so long an x is worth sharing among many rows
        lanes, rows, split = 8, 8, 2
    else:
        lanes, rows = 16, 4 if by_table else 2
        split = max((1, 2, 3, 4, 6, 8), key=lambda s: _worth(gpu, n, chunks, lanes, rows, s))
    if tokens > 1:  # each row's sums take as many registers again
        rows = min(rows, 4) if tokens == 2 else 4
    return Tiling(lanes, rows, split, simdgroups=split)


def takes(shape: tuple[int, ...], rows: int) -> bool:
    """Return True if the mat-vec of a weight of this shape is faster than few_rows.py for so many rows of x."""
    gpu = this_gpu()
    return rows < gpu.few_rows_from or (rows == 2 and math.prod(shape) <= gpu.pair_weights)


def tiling_key(p: Product) -> TilingKey:
    """What `tiling` knows a product's weight by."""
    return p.type, p.shape[-2] * (p.used or 1), p.shape[-1]


def _even(chunks: int, lanes: int) -> float:
    """Share of a row's lanes that have work, of all their steps."""
    return chunks / (-(-chunks // lanes) * lanes)


def _worth(gpu: Tuning, n: int, chunks: int, lanes: int, rows: int, split: int) -> float:
    """A figure of merit for a split: even lanes, full waves of threadgroups, steps enough to pay for the first."""
    steps = -(-chunks // (lanes * split))
    waves = n * split * lanes / (32 * rows) / (gpu.cores * gpu.simdgroups_per_core * 2 // rows)
    filled: float = (waves / math.ceil(waves)) ** gpu.last_wave if waves > 1 else waves**0.5
    return _even(chunks, lanes * split) * filled * steps / (steps + gpu.step_overhead) if waves < 1.2 else 0.0


def matvec(
    launcher: Launcher,
    x: mx.array,
    w: Packed,
    epilogue: Epilogue = PLAIN,
    folded: Folded = ALONE,
    *,
    config: Tiling | None = None,
) -> Any:
    """A few tokens through a packed weight.

    Args:
        x: [T, K], T from 1 to 4; with `ids`, one token: [1, K] for all experts, or [E', K], one row each.
        w: [N, K], or with `ids` [E, N, K].
        config: in place of `tiling`'s.

    Returns:
        [T, N], [T, N / 2] with glu, [E', ..] with ids.
    """
    norm, times, ids, _ = folded
    slots, there = 0 if ids is None else ids.size, (norm is not None, times is not None)
    launch = _prepared(launcher, w.format.name, w.shape[-2:], x.dtype, x.shape[0], slots, there, epilogue, config)
    return launch.by_name({"x": x, "norm": norm, **planes(w), "ids": ids, "times": times})[0]


@launch_cache
def _prepared(
    launcher: Launcher,
    name: str,
    shape: tuple[int, int],
    dtype: mx.Dtype,
    rows: int,  # of x
    slots: int,  # experts to take, 0 if the weight has none
    there: tuple[bool, bool],  # norm is there, times is there
    epilogue: Epilogue,
    config: Tiling | None,
) -> Launch:
    (n, k), fmt, (norm, times), glu = shape, FORMATS[name], there, epilogue.glu
    tokens, experts, out = 1 if slots else rows, slots or 1, epilogue.out or dtype
    held = tokens if tokens <= 2 else MAX_TOKENS  # by a threadgroup: few texts serve any number of tokens
    config = config or tiling(fmt, n * experts, k, held)
    while k % config.chunk or (fmt.rule and config.chunk > 32):
        config = replace(config, chunk=config.chunk // 2)
    defines: dict[str, Any] = format_defines(fmt, config.chunk, k)
    defines |= {field.upper(): value for field, value in asdict(config).items()}
    defines["SG"] = defines.pop("SIMDGROUPS")
    # Pairs cost accuracy (2^-24 * 2^(2 bits) of a term): too much for wide codes, and for fp32's own precision.
    defines["PAIRS"] = fmt.bits <= 4 and fmt.is_affine and dtype != mx.float32
    # Two steps of x in threadgroup memory, of which Metal has 32 KB, and a grid.
    room = 2 * 4 * held * config.lanes * config.split * config.chunk + fmt.table_bytes
    defines["STAGE"] = (norm or dtype == mx.float32) and room <= 30 << 10
    defines |= {"TOKENS": held, "EPS": epilogue.eps, **epilogue.factors, **result_defines(out)}
    defines |= {"GLU": glu, "TIMES": times, "NORM": norm, "EXPERTS": slots > 0, "EXPERT_X": slots > 0 and rows > 1}
    missing = [plane for plane, there in (("norm", norm), ("ids", slots), ("times", times)) if not there]
    kernel = render("matvec", "matvec.metal", dtype, defines, [*absent_planes(fmt), *missing])
    outs = n // 2 if glu else n
    groups = (-(-outs // config.rows_per_group(glu)), 1, experts)
    return prepare(launcher, kernel, groups, 32 * config.simdgroups, ((tokens * experts, outs), out))


MATVEC = Op("matvec", matvec, product_reference)


@cases
def matvec_cases(s: Sizes) -> Iterator[Check]:
    def make(p: Product) -> Case:
        x, w, epilogue, folded = product_inputs(p, s.rows)
        assert isinstance(w, Packed)
        config = tiling(w.format, *tiling_key(p)[1:], p.tokens)  # as for all rows

        def reference() -> mx.array:
            if p.tokens == 1:
                return product_reference(x, w, epilogue, folded)
            # MLX has a kernel of its own for several rows, which NVIDIA's compiler takes very long for.
            rows = [slice(i, i + 1) for i in range(p.tokens)]
            apart = [folded if folded.times is None else folded._replace(times=folded.times[row]) for row in rows]
            y = [product_reference(x[row], w, epilogue, each) for row, each in zip(rows, apart, strict=True)]
            return mx.concatenate(y)

        n_bytes = w.nbytes * p.used // w.shape[0] if p.used else w.nbytes
        return Case(lambda launcher: matvec(launcher, x, w, epilogue, folded, config=config), reference, n_bytes)

    for p in dict.fromkeys(s.packed):
        yield Check(OpKey(MATVEC.name, p.type), f"{p}", partial(make, p))
