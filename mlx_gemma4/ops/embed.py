"""Embedding rows, and the inputs of per-layer embeddings: embed.metal, each kernel beside its reference."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import mlx.core as mx

from ..gpu.render import DEVICE_ELEMENTS, Launcher, absent, prepare, render
from ..quant.formats import Packed
from . import stock
from .cases import EPS, Case, Check, Sizes, case, cases, norm_weight, normal, state_dtype, weight
from .op import Op
from .packed import PLANES, format_defines, planes
from .stock import Affine, Weight

FP32 = mx.float32


def _table(table: mx.array | Packed) -> tuple[dict[str, Any], dict[str, mx.array | None]]:
    """A table for embed.metal: constants, and arrays by the names of their inputs."""
    k = table.shape[-1]
    if isinstance(table, Packed):
        return {"PACKED": 1, **format_defines(table.format, 32, k), "K": k}, planes(table)
    return {"PACKED": 0, "K": k}, {**dict.fromkeys(PLANES), "codes": table}


def embed(
    launcher: Launcher,
    ids: mx.array,
    table: Weight,
    factor: float,
    *,
    rows: range | None = None,
    out: mx.Dtype = mx.float32,
    behind: mx.array | None = None,
) -> Any:
    """Rows of a table [V, K] for ids int32 [T], times a factor: [T, K] in `out`; [T, K + K'] with [T, K'] behind.

    `rows`: of a larger table, those that this one has; others give zeros.
    """
    if isinstance(table, Affine):
        return embed_reference(ids, table, factor, rows=rows, out=out, behind=behind)
    more = 0 if behind is None else behind.shape[1]
    k, (defines, arrays) = table.shape[-1] + more, _table(table)
    arrays |= {"behind": behind}
    defines |= {"U": out, "FACTOR": factor, "BEHIND": more}
    defines |= {"FIRST": rows.start if rows else 0, "STOP": rows.stop if rows else 0}
    kernel = render("embed", "embed.metal", out, defines, absent(arrays))
    launch = prepare(launcher, kernel, (-(-k // 256), ids.size, 1), 256, ((ids.size, k), out))
    return launch.by_name({"ids": ids, **arrays})[0]


def embed_reference(
    ids: mx.array,
    table: Weight,
    factor: float,
    *,
    rows: range | None = None,
    out: mx.Dtype = mx.float32,
    behind: mx.array | None = None,
) -> mx.array:
    """`embed` in stock MLX."""
    made = (stock.embed(ids, table, rows) * factor).astype(out)
    return made if behind is None else mx.concatenate([made, behind.astype(out)], axis=1)


EMBED = Op("embed", embed, embed_reference)


def ple_inputs(
    launcher: Launcher, ids: mx.array, proj: mx.array, norm: mx.array, table: Weight, factor: float, *, eps: float
) -> Any:
    """Each layer's share of the token itself: (rms(proj factor) norm + table[ids] sqrt(P)) / sqrt(2).

    Args:
        ids: int32 [T].
        proj: [T, layers P], the tokens' embeddings through per_layer_model_proj.
        norm: fp32 [P].
        table: [V, layers P].
        factor: of proj (it matters beside eps).

    Returns:
        [layers, T, P] in proj's dtype.
    """
    if isinstance(table, Affine):
        return ple_inputs_reference(ids, proj, norm, table, factor, eps=eps)
    tokens, width, p = ids.size, table.shape[-1], norm.size
    defines, arrays = _table(table)
    defines |= {"U": proj.dtype, "FACTOR": math.sqrt(p), "PROJ_FACTOR": factor, "P": p, "EPS": eps}
    kernel = render("ple_inputs", "embed.metal", proj.dtype, defines, absent(arrays))
    groups, result = (-(-(width // p) // 4), tokens, 1), ((width // p, tokens, p), proj.dtype)
    return prepare(launcher, kernel, groups, 128, result).by_name({"ids": ids, "proj": proj, "norm": norm, **arrays})[0]


def ple_inputs_reference(
    ids: mx.array, proj: mx.array, norm: mx.array, table: Weight, factor: float, *, eps: float
) -> mx.array:
    """`ple_inputs` in stock MLX."""
    shape = (ids.size, -1, norm.size)
    projected = stock.rms_norm(proj.astype(mx.float32).reshape(shape) * factor, norm, eps)
    p = (projected + stock.embed(ids, table).reshape(shape) * math.sqrt(norm.size)) * 2**-0.5
    return p.swapaxes(0, 1).astype(proj.dtype)


PLE_INPUTS = Op("ple_inputs", ple_inputs, ple_inputs_reference)


TOKENS = (1, DEVICE_ELEMENTS)  # ids of so many lie in another address space, and need a kernel of their own


@cases
def embed_cases(s: Sizes) -> Iterator[Check]:
    def make(type: str, width: int, factor: float, tokens: int) -> Case:
        table, ids = weight(type, (100, width)), mx.arange(77, 77 + tokens, dtype=mx.int32)
        return case(EMBED, tokens * (table.nbytes // 100 + 4 * width), ids, table, factor)

    def make_behind(dtype: mx.Dtype) -> Case:
        table, behind = weight(s.table, (100, s.target_hidden)), normal(1, s.target_hidden, dtype=dtype)
        return case(EMBED, table.nbytes // 100, mx.array([77], mx.int32), table, s.target_hidden**0.5, behind=behind)

    for type, width, unit in ((s.table, s.hidden, s.hidden), (s.ple_table, s.layers * s.ple, s.ple)):
        for tokens in TOKENS if type and not s.target_hidden else ():
            yield Check(EMBED.key, f"{type} {width}, T={tokens}", partial(make, type, width, unit**0.5, tokens))
    for dtype in {state_dtype(): 0, mx.float32: 0} if s.table and s.target_hidden else ():
        yield Check(EMBED.key, f"{s.table} {s.target_hidden}, {dtype} behind", partial(make_behind, dtype))


@cases
def ple_inputs_cases(s: Sizes) -> Iterator[Check]:
    def make(tokens: int) -> Case:
        width = s.layers * s.ple
        table, ids = weight(s.ple_table, (100, width)), mx.arange(77, 77 + tokens, dtype=mx.int32)
        arrays = (ids, normal(tokens, width, dtype=state_dtype()), norm_weight(s.ple), table)
        return case(PLE_INPUTS, tokens * (table.nbytes // 100 + 8 * width), *arrays, s.hidden**-0.5, eps=EPS)

    for tokens in TOKENS if s.ple_table else ():
        yield Check(PLE_INPUTS.key, f"{s.ple_table} {s.layers}x{s.ple}, T={tokens}", partial(make, tokens))
