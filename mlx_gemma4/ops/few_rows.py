"""Products of a few rows, 2 to MAX_ROWS, each weight read and decoded once: few_rows.metal.

In: activations and a packed weight. Out: activations, with a norm, GEGLU or a factor folded in, for the replies of a
batch. Experts' rows are sorted by expert first (routing.py). Its reference is `epilogue.product_reference`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx

from ..gpu.render import Launch, Launcher, prepare, render, result_defines
from ..quant.formats import FORMATS, Format, Packed
from .cases import Case, Check, Product, Sizes, cases, product_inputs
from .epilogue import ALONE, PLAIN, Epilogue, Folded, product_reference
from .halve import halve
from .op import Op, OpKey
from .packed import absent_planes, format_defines, planes
from .routing import ROWS, most_tiles, route, route_reference
from .tuning import Tuning, launch_cache, this_gpu

MAX_ROWS = 32
EVEN = 0.9  # share of the simdgroups' steps, at least, in which they have work
ROOM, CUDA_ROOM = 32 << 10, 48 << 10  # bytes of threadgroup memory, at most: Metal's


@dataclass(frozen=True)
class RowsTiling:
    """The tiling of a product of a few rows; see few_rows.metal."""

    blocks: int  # of 16 rows of the weight, a simdgroup; with glu an even number
    split: int  # simdgroups that share the rows
    fold: bool = False  # k-quants' scales and mins are multiplied in before the product, as halves
    parts: int = 1  # threadgroups that share the rows, and leave sums of their own
    ahead: bool = False  # on CUDA what a step reads is on its way during the step before

    def room(self, rows: int, fmt: Format) -> int:
        """Bytes of threadgroup memory, for sums, or on CUDA for x and codes before, and for a table."""
        staged = 2 * (256 * rows + 256 * self.blocks * fmt.bits) if self.ahead else 256 * rows
        return 1088 * (fmt.lut is not None) + fmt.table_bytes + self.split * max(staged, 64 * self.blocks * rows)


def rows_tiling(
    fmt: Format,
    n: int,
    k: int,
    rows: int,
    used: int = 0,
    glu: bool = False,
    gpu: Tuning | None = None,
    added: bool = False,
) -> RowsTiling:
    """The tiling for a weight of n rows of k and so many rows of x (8, 16 or 32), fitted to an H200's times.

    Args:
        used: experts of a token; two tokens at least are sure to fill so many tiles.
        added: the result may come in parts.
    """
    gpu = gpu or this_gpu()
    stretches = -(-k // 128)
    fold = rows >= gpu.fold_from
    blocks = 4 if (rows == 16 and gpu.measured) or (rows == 32 and fold) else 2
    few = n * max(1, 2 * used) < 48 * blocks * gpu.cores  # threadgroups: more simdgroups in each
    split = 8 if few and rows < 32 and RowsTiling(blocks, 8).room(rows, fmt) <= ROOM else 4
    ahead = gpu.rows_ahead and rows <= 8 and not used and fmt.bits <= 5
    if split == 8 and rows <= 8 and gpu.measured and not glu and not used and not ahead:
        blocks = 3
    most = gpu.rows_parts if added and rows <= 8 and not used else 1
    parts = max(1, min(most, 128 * gpu.cores // n, stretches // 8))  # four threadgroups a core; two steps of each
    if parts > 1:
        return RowsTiling(2, 4, fold, parts, ahead)
    # The simdgroups should have as many stretches of a row each, and several.
    fit = [RowsTiling(blocks, s, fold, 1, ahead) for s in range(min(split, max(1, stretches // 2)), 0, -1)]
    even = (t for t in fit if stretches / (-(-stretches // t.split) * t.split) > EVEN)
    return next(t for t in even if t.room(rows, fmt) <= (CUDA_ROOM if ahead else ROOM))


def few_rows(
    launcher: Launcher,
    x: mx.array,
    w: Packed,
    epilogue: Epilogue = PLAIN,
    folded: Folded = ALONE,
    *,
    config: RowsTiling | None = None,
) -> Any:
    """A few rows through a packed weight.

    Args:
        x: [T, K], T up to MAX_ROWS; with `folded.ids` int32 [T, E'] of any T: [T, K], or [T, E', K], one row each.
        w: [N, K], or with `ids` [E, N, K].
        config: in place of `rows_tiling`'s.

    Returns:
        [T, N], [T, N / 2] with glu; [T, E', ..] with ids. Where the tiling has several parts, and `config` or
        `epilogue.added` allows them, [parts, T, N], of which the sum is the result.
    """
    norm, times, ids, routed = folded
    rows, scale, used = x.reshape(-1, x.shape[-1]), None, 0
    if x.dtype != mx.float16 or norm is not None:
        rows, scale = halve(launcher, rows, norm, epilogue.eps)
    arrays = {"x": rows, "scale": scale, "times": times}
    if ids is not None:
        used = ids.shape[1]
        arrays["order"], arrays["tiles"] = routed or route(launcher, ids, w.shape[0])
    form, out, each = w.format.name, epilogue.out or x.dtype, x.ndim == 3
    times_type = None if times is None else times.dtype
    launch = _prepared(
        launcher, form, w.shape, x.shape[0], used, each, scale is not None, times_type, out, epilogue, config
    )
    return launch.by_name({**arrays, **planes(w)})[0]


@launch_cache
def _prepared(
    launcher: Launcher,
    name: str,
    shape: tuple[int, ...],
    tokens: int,
    used: int,  # experts of a token, 0 if the weight has none
    each: bool,  # each of them has its own x
    scaled: bool,
    times: mx.Dtype | None,
    out: mx.Dtype,
    epilogue: Epilogue,
    config: RowsTiling | None,
) -> Launch:
    (*experts, n, k), fmt, glu = shape, FORMATS[name], epilogue.glu
    rows = ROWS if used else next(r for r in (8, 16, 32) if tokens <= r)  # of x, in a threadgroup
    tiles = most_tiles(tokens * used, experts[0]) if used else 1
    config = config or rows_tiling(fmt, n, k, rows, used, glu, added=epilogue.added)
    defines: dict[str, Any] = format_defines(fmt, 32, k)
    defines |= {field.upper(): value for field, value in asdict(config).items()}
    defines |= {"TOKENS": rows, **epilogue.factors, "TAIL": k % 128 > 0}
    defines |= {"GLU": glu, "TIMES": times is not None, "SCALED": scaled, "EXPERTS": used > 0}
    defines |= {"USED": 1 if each else max(used, 1), **result_defines(out)}
    there = {"scale": scaled, "order": used, "tiles": used, "times": times is not None}
    missing = [name for name, here in there.items() if not here]
    kernel = render("few_rows", "few_rows.metal", mx.float16, defines, [*absent_planes(fmt), *missing])
    outs = n // 2 if glu else n
    parts = (config.parts,) if config.parts > 1 else ()
    result = (tokens, used, outs) if used else (*parts, tokens, outs)
    groups = (-(-n // (16 * config.blocks)), tiles, config.parts)
    return prepare(launcher, kernel, groups, 32 * config.split, (result, out))


FEW_ROWS = Op("few_rows", few_rows, product_reference)


@cases
def few_rows_cases(s: Sizes) -> Iterator[Check]:
    def tiling(p: Product, added: bool) -> RowsTiling:  # as for all rows
        return rows_tiling(FORMATS[p.type], p.shape[-2], p.shape[-1], p.tokens, p.used, p.glu, added=added)

    def make(p: Product, added: bool) -> Case:
        x, w, epilogue, folded = product_inputs(p, s.rows)
        assert isinstance(w, Packed)
        if folded.ids is not None:
            folded = folded._replace(routed=route_reference(folded.ids, w.shape[0]))

        def reference() -> mx.array:  # row by row: see matvec.py
            def row(t: int) -> mx.array:
                norm, times, ids, _ = folded
                if ids is None:
                    return product_reference(
                        x[t : t + 1], w, epilogue, Folded(norm, None if times is None else times[t : t + 1])
                    )[0]
                own = x[t] if x.ndim == 3 else x[t : t + 1]
                return product_reference(own, w, epilogue, Folded(norm, None if times is None else times[t], ids[t]))

            return mx.stack([row(t) for t in range(p.tokens)])

        def kernel(launcher: Launcher) -> Any:
            y = few_rows(launcher, x, w, epilogue, folded, config=tiling(p, added))
            return y.sum(axis=0) if added else y

        return Case(kernel, reference, w.nbytes)

    for p in dict.fromkeys(p for p in (*s.packed, *s.prompts) if p.type in FORMATS and p.tokens == 1):
        few = (3,) * (p.norm or not p.narrow)  # scales of few rows lie elsewhere on Metal
        for rows in (*few, 8) if p.used else (*few, 8, 16, 32):
            many = replace(p, tokens=rows)
            yield Check(OpKey(FEW_ROWS.name, p.type), f"{many}", partial(make, many, False))
            plain = p.narrow and not (p.narrow_out or p.norm or p.glu or p.times or p.used)
            if plain and tiling(many, True).parts > 1:
                yield Check(OpKey(FEW_ROWS.name, p.type), f"{many} in parts", partial(make, many, True))
