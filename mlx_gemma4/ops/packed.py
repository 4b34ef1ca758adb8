"""A quantization format as the constants that the Metal texts read (packed.metal)."""

from __future__ import annotations

from collections.abc import Sequence

from ..quant.formats import Format


def format_defines(fmt: Format, chunk: int, k: int) -> dict[str, object]:
    """A format as constants for matvec.metal."""
    words = chunk * fmt.bits // 32
    row = k * fmt.bits // 32
    lut = ", ".join(f"{v}.0f" for v in fmt.lut) if fmt.lut is not None else ""
    return {
        "BITS": fmt.bits,
        "GROUP": fmt.group,
        "GROUP_SCALE_BITS": fmt.group_scale_bits,
        "SCALE_BLOCK": fmt.scale_block,
        "OFFSET": fmt.offset,
        "HAS_MIN": fmt.has_min,
        "HAS_LUT": fmt.lut is not None,
        "LUT": f"{{{lut}}}",
        **(_table_words(fmt.lut) if fmt.lut is not None else {}),
        f"GROUP_SCALE_{fmt.group_scale_kind.upper().replace('-', '_') or 'NONE'}": 1,
        "VEC": next(v for v in (4, 2, 1) if words % v == 0 and row % v == 0),
    }


def _table_words(values: Sequence[int]) -> dict[str, object]:
    """A table as whole numbers of 8 bits, four a word, for matvec.metal's table_dot.

    To each value comes 1 where the other half's of the same low bits is below 0.
    """
    table = bytes((v + (values[i ^ 8] < 0)) & 255 for i, v in enumerate(values))
    return {f"LUT_{i}": f"0x{int.from_bytes(table[4 * i : 4 * i + 4], 'little'):08x}u" for i in range(4)}
