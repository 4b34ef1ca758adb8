"""Packed weights as kernels read them: a format as constants of the Metal texts (packed.metal), planes as inputs."""

from collections.abc import Sequence

import mlx.core as mx

from ..gpu.render import DEVICE_ELEMENTS
from ..quant.codebooks import Rule, grid_table
from ..quant.formats import Format, Packed

PLANES = ("codes", "group_scales", "block_scales", "grid")  # inputs of kernels: attributes of `Packed`, and a table


def planes(w: Packed) -> dict[str, mx.array | None]:
    """A weight's arrays by the names of a kernel's inputs."""
    grid = grid_table(w.format.rule) if w.format.rule and w.format.rule.grid else None
    return {"codes": w.codes, "group_scales": w.group_scales, "block_scales": w.block_scales, "grid": grid}


def absent_planes(fmt: Format) -> list[str]:
    """Inputs that a kernel for this format goes without."""
    there = {"group_scales": fmt.group_scale_bits, "block_scales": fmt.scale_block or fmt.per_row}
    there["grid"] = fmt.rule.grid if fmt.rule else 0
    return [name for name, size in there.items() if not size]


def is_readable(w: Packed) -> bool:
    """Returns True if kernels can read a weight: rows of whole 32s, planes that MLX passes as device memory."""
    if w.shape[-1] % 32 or w.codes.size < DEVICE_ELEMENTS:
        return False
    scales, blocks = w.group_scales, w.block_scales
    return (scales is None or scales.size >= DEVICE_ELEMENTS) and (blocks is None or blocks.size >= DEVICE_ELEMENTS)


def format_defines(fmt: Format, chunk: int, k: int) -> dict[str, str | int | float]:
    """A format as constants.

    Args:
        chunk: weights that a thread takes of a row at a time.
        k: length of a row, which decides how wide loads may be.
    """
    words, row = chunk * fmt.bits // 32, k * fmt.bits // 32
    lut = ", ".join(f"{v}.0f" for v in fmt.lut) if fmt.lut is not None else ""
    return {
        "CHUNK": chunk,
        "BITS": fmt.bits,
        "GROUP": fmt.group,
        "GROUP_SCALE_BITS": fmt.group_scale_bits,
        "SCALE_BLOCK": k if fmt.per_row else fmt.scale_block,
        "BLOCK_NUMBERS": fmt.block_numbers,
        "ROW_SCALE": fmt.per_row,
        "OFFSET": 128 >> fmt.rule.step if fmt.rule else fmt.offset,  # bytes, in place of a rule's codes
        "HAS_MIN": fmt.has_min,
        "HAS_LUT": fmt.lut is not None,
        "LUT": f"{{{lut}}}",
        **(_table_words(fmt.lut) if fmt.lut is not None else {}),
        **_rule_defines(fmt.rule),
        f"GROUP_SCALE_{fmt.group_scale_kind.upper().replace('-', '_') or 'NONE'}": 1,
        "VEC": next(v for v in (4, 2, 1) if words % v == 0 and row % v == 0),
    }


def _rule_defines(rule: Rule | None) -> dict[str, str | int | float]:
    """Constants of a format whose codes stand for several weights: packed.metal's `eight_bytes`."""
    if rule is None:
        return {"RULE": 0, "BYTE_STEP": 0}
    table = grid_table(rule) if rule.grid else None
    grid: dict[str, str | int] = {"GRID_EACH": rule.each, "GRID": table.size if table is not None else 0}
    grid["GRID_TYPE"] = "ushort" if table is not None and table.dtype == mx.uint16 else "uint"
    scale = {"SCALE_AT": rule.scale_at, "SCALE_MASK": (1 << rule.scale_bits) - 1, "SCALE_FACTOR": rule.factor}
    grid["BYTE_STEP"] = rule.step
    return {"RULE": 1, f"VALUES_{rule.name.upper()}": 1, **grid, **scale}


def _table_words(values: Sequence[int]) -> dict[str, str | int]:
    """A table as whole numbers of 8 bits, four a word, for matvec.metal's table_dot.

    1 is added to each value where the other half's value of the same low bits is below 0.
    """
    table = bytes((v + (values[i ^ 8] < 0)) & 255 for i, v in enumerate(values))
    return {f"LUT_{i}": f"0x{int.from_bytes(table[4 * i : 4 * i + 4], 'little'):08x}u" for i in range(4)}
