"""The shapes of the published Gemma 4 models: the only table of them.

In: nothing. Out: `PUBLISHED`. The doctor, the benchmarks, the tests and examples/make_synthetic.py read it; loading a
model does not, for a file tells its own shape (config.py).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The shape of a Gemma 4 model. Widths in elements, lengths in tokens."""

    layers: int
    hidden: int
    heads: int  # query heads
    kv_heads: tuple[int, int]  # of sliding and of global layers
    ffn: int
    window: int
    every: int  # each so-many-th layer is global
    shared: int = 0  # last layers without keys and values of their own
    wide_shared: bool = False  # these have an FFN of twice the width
    ple: int = 0  # width of the per-layer embedding; models without one take keys as values on global layers
    experts: int = 0
    experts_used: int = 0
    expert_ffn: int = 0
    head_dims: tuple[int, int] = (256, 512)  # of sliding and of global layers
    vocab: int = 262144
    context: int = 131072

    @property
    def ffns(self) -> tuple[int, ...]:
        """The width of each layer's dense MLP."""
        return tuple(self.ffn * (1 + (self.wide_shared and i >= self.layers - self.shared)) for i in range(self.layers))


PUBLISHED = {
    "E2B": Shape(35, 1536, 8, (1, 1), 6144, 512, 5, shared=20, wide_shared=True, ple=256),
    "E4B": Shape(42, 2560, 8, (2, 2), 10240, 512, 6, shared=18, ple=256),
    "12B": Shape(48, 3840, 16, (8, 1), 15360, 1024, 6),
    "26B-A4B": Shape(30, 2816, 16, (8, 2), 2112, 1024, 6, experts=128, experts_used=8, expert_ffn=704),
    "31B": Shape(60, 5376, 32, (16, 4), 21504, 1024, 6),
}
