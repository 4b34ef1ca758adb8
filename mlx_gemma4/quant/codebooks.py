"""Values of codes that stand for several weights at once: ggml's grids with their signs, trits, single bits.

In: planar codes and fields of groups, as `repack` lays them out. Out: what a group's scale multiplies. This is the
reference of `eight_bytes` in packed.metal, which has each rule under VALUES_ and its name. Grids are gguf-py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import lcm

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class Rule:
    """How the codes and the group fields of 32 weights become values, and where a group's scale s is in its field.

    The scale is the `scale_bits` bits of the field from `scale_at` on, and multiplies as d * factor * (2 s + 1). A rule
    without scale_bits has none in its fields.
    """

    name: str
    grid: int = 0  # entries of its grid; 0: none
    each: int = 8  # weights of an entry
    scale_at: int = 0
    scale_bits: int = 0
    factor: float = 1.0
    step: int = 6  # kernels have values as bytes of 128 + 2**step * value

    @property
    def grid_bytes(self) -> int:
        """Size of the table that kernels read."""
        return self.grid * (2 if self.grid > 1024 else self.each)


@cache
def grid_values(rule: Rule) -> np.ndarray:
    """The grid as gguf-py has it: fp32 [grid, each]."""
    from gguf import quants

    owner = getattr(quants, {"iq1_m": "IQ1_S"}.get(rule.name, rule.name.upper()))  # these two share one
    owner.init_grid()
    grid: np.ndarray = owner.grid
    return grid.reshape(rule.grid, rule.each)


@cache
def grid_table(rule: Rule) -> mx.array:
    """The grid for kernels: values times 2**step as bytes, uint32 [grid * each / 4]. IQ1's, which is long, as
    uint16 [grid]: a value and 1 in 2 bits, the first in the lowest."""
    values = grid_values(rule)
    if rule.grid > 1024:
        return mx.array(((values + 1).astype(np.uint16) << 2 * np.arange(8, dtype=np.uint16)).sum(1, dtype=np.uint16))
    return mx.array(np.ascontiguousarray((values * 2**rule.step).astype(np.uint8)).view(np.uint32).reshape(-1))


def numbers(stream: mx.array, bits: int) -> mx.array:
    """Numbers of a little-endian bit stream, uint8 [.., n bits / 8] to uint32 [.., n]; bits from 4 to 32."""
    period = lcm(bits, 8) // 8  # bytes after which numbers begin with a byte again
    b = stream.reshape(*stream.shape[:-1], -1, period).astype(mx.uint32)
    found = []
    for at in range(0, period * 8, bits):
        first, last, number = at // 8, (at + bits - 1) // 8, mx.array(0, mx.uint32)
        for i in range(first, last + 1):
            shift = 8 * i - at
            number = number | (b[..., i] << shift if shift >= 0 else b[..., i] >> -shift)
        found.append(number & ((1 << bits) - 1))
    return mx.stack(found, axis=-1).reshape(*stream.shape[:-1], -1)


def values(rule: Rule, codes: mx.array, fields: mx.array | None) -> mx.array:
    """fp32 [.., K].

    Args:
        codes: uint32 [.., K / 32 * W], W words for each 32 weights.
        fields: uint32 [.., K / 32 * G], one for each group of 32 or 16 weights, or None.
    """
    if rule.name == "q1_0":
        ones = codes[..., None] >> mx.arange(32, dtype=mx.uint32) & 1
        return (2 * ones.astype(mx.float32) - 1).reshape(*codes.shape[:-1], -1)
    assert fields is not None
    groups_of_16 = rule.name in ("iq2_xs", "iq2_s", "iq1_m")
    chunks = fields.shape[-1] // (1 + groups_of_16)
    lead = (*codes.shape[:-1], chunks)
    words = codes.reshape(*lead, -1)
    b, field = words.view(mx.uint8).astype(mx.uint32), fields.reshape(*lead, -1)
    if rule.name == "tq1_0":
        more = mx.concatenate([field & 255, field >> 8 & 255, field >> 16 << 4], axis=-1)
        five = mx.concatenate([b, more], axis=-1)[..., None] * mx.array([1, 3, 9, 27, 81], mx.uint32) & 255
        trits = (five * 3 >> 8).reshape(*lead, -1)[..., :32]
        return (trits.astype(mx.float32) - 1).reshape(*codes.shape[:-1], -1)

    def of_eights(*shifts: int) -> mx.array:  # bits of the fields for each 8 weights
        return (field[..., None] >> mx.array(shifts, mx.uint32)).reshape(*lead, -1)

    signs = minus = None
    if rule.name in ("iq3_xxs", "iq2_xxs"):
        place, signs = b, _with_parity(of_eights(0, 7, 14, 21) & 127)
    elif rule.name == "iq2_xs":
        halves = words.view(mx.uint16).astype(mx.uint32)
        place, signs = halves & 511, _with_parity(halves >> 9)
    elif rule.name == "iq2_s":
        place, signs = b[..., :4] | (of_eights(0, 2) & 3) << 8, b[..., 4:]
    elif rule.name == "iq3_s":
        place, signs = b[..., :8] | (of_eights(*range(8)) & 1) << 8, b[..., 8:]
    elif rule.name == "iq1_s":
        place, minus = b | (of_eights(0, 3, 6, 9) & 7) << 8, field >> 15
    else:
        assert rule.name == "iq1_m", rule.name
        nibbles = of_eights(0, 4) & 15
        place, minus = b | (nibbles & 7) << 8, nibbles >> 3
    v = mx.array(grid_values(rule))[place].reshape(*lead, 4, 8)
    if signs is not None:
        v = mx.where(signs[..., None] >> mx.arange(8, dtype=mx.uint32) & 1, -v, v)
    else:
        v = v + mx.where(minus == 1, -0.125, 0.125)[..., None]
    return v.reshape(*codes.shape[:-1], -1)


def _with_parity(signs: mx.array) -> mx.array:
    """Seven signs and the eighth, which makes the number of minus signs even."""
    folded = signs ^ signs >> 4
    folded = folded ^ folded >> 2
    return signs | ((folded ^ folded >> 1) & 1) << 7
