"""Embedding rows, and the inputs of per-layer embeddings: embed.metal, each kernel beside its reference."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from ..gpu.render import METAL_TYPES, Launcher, build, float_literal, render
from ..quant.formats import Packed
from . import stock
from .op import Op
from .packed import format_defines
from .stock import Affine, Weight

# ---------------------------------------------------------------- embeddings


def _table(table: mx.array | Packed) -> tuple[dict[str, object], list[Any], list[str]]:
    """A table for embed.metal: constants, arrays, absent inputs."""
    if isinstance(table, mx.array):
        return {"PACKED": 0, "K": table.shape[-1]}, [table], ["group_scales", "block_scales"]
    planes = {"codes": table.codes, "group_scales": table.group_scales, "block_scales": table.block_scales}
    defines = {"PACKED": 1, **format_defines(table.format, 32, table.shape[-1]), "K": table.shape[-1]}
    arrays = [a for a in planes.values() if a is not None]
    return defines, arrays, [name for name, a in planes.items() if a is None]


def embed(launcher: Launcher, ids: mx.array, table: Weight, factor: float, *, out: mx.Dtype = mx.float32) -> Any:
    """Rows of a table, times a factor.

    Args:
        ids: int32 [T].
        table: [V, K].

    Returns:
        [T, K] in `out`.
    """
    if isinstance(table, Affine):
        return embed_reference(ids, table, factor, out=out)
    k = table.shape[-1]
    defines, arrays, absent = _table(table)
    defines |= {"U": METAL_TYPES[out], "FACTOR": float_literal(factor)}
    kernel = render("embed", "embed.metal", out, defines, absent)
    return build(launcher, kernel)(
        inputs=[ids, *arrays],
        grid=(256 * -(-k // 256), ids.size, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(ids.size, k)],
        output_dtypes=[out],
    )[0]


def embed_reference(ids: mx.array, table: Weight, factor: float, *, out: mx.Dtype = mx.float32) -> mx.array:
    """`embed` in stock MLX."""
    return (stock.embed(ids, table) * factor).astype(out)


EMBED = Op("embed", embed, embed_reference)


def ple_inputs(
    launcher: Launcher,
    ids: mx.array,
    proj: mx.array,
    norm: mx.array,
    table: Weight,
    factor: float,
    *,
    eps: float,
) -> Any:
    """What each layer adds of the token itself: (rms(proj factor) norm + table[ids] sqrt(P)) / sqrt(2).

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
    defines, arrays, absent = _table(table)
    defines |= {
        "U": METAL_TYPES[proj.dtype],
        "FACTOR": float_literal(math.sqrt(p)),
        "PROJ_FACTOR": float_literal(factor),
        "P": p,
        "EPS": float_literal(eps),
    }
    kernel = render("ple_inputs", "embed.metal", proj.dtype, defines, absent)
    return build(launcher, kernel)(
        inputs=[ids, proj, norm, *arrays],
        grid=(128 * -(-(width // p) // 4), tokens, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(width // p, tokens, p)],
        output_dtypes=[proj.dtype],
    )[0]


def ple_inputs_reference(
    ids: mx.array, proj: mx.array, norm: mx.array, table: Weight, factor: float, *, eps: float
) -> mx.array:
    """`ple_inputs` in stock MLX."""
    shape = (ids.size, -1, norm.size)
    projected = stock.rms_norm(proj.astype(mx.float32).reshape(shape) * factor, norm, eps)
    p = (projected + stock.embed(ids, table).reshape(shape) * math.sqrt(norm.size)) * 2**-0.5
    return p.swapaxes(0, 1).astype(proj.dtype)


PLE_INPUTS = Op("ple_inputs", ple_inputs, ple_inputs_reference)
