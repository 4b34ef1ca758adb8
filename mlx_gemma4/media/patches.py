"""The tower of the 12B (projector type gemma4uv): a product for each patch of 48 x 48 pixels, and no layers.

In: pixels and weights. Out: soft tokens. Formulas: transformers' Gemma4UnifiedVisionEmbedder; layouts: those of the
GGUF, where a patch's numbers are in the order channel, row, column.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import mlx.core as mx
import numpy as np

from ..config import Reader
from ..errors import InputError
from ..loading.tensors import Entry, Spec
from .layers import Weights, linear, project
from .picture import SIDE

NORM_EPS = 1e-5  # PyTorch's default


def specs(read: Reader, hidden: int, entries: Mapping[str, Entry]) -> dict[str, Spec]:
    """Return the tensors by name.

    Args:
        read: the metadata `clip.vision.*`.
        hidden: the text model's hidden size.
        entries: the tensors that the file has; they alone say how many positions there are.
    """
    width, patch = read.count("embedding_length", most=1 << 16), 3 * SIDE**2
    found = {
        "v.patch_embd.weight": Spec((width, patch), "matrix"),
        "v.patch_embd.bias": Spec((width,), "vector"),
        "v.position_embd.weight": Spec((2, positions(entries), width), "matrix"),
        "mm.input_projection.weight": Spec((hidden, width), "matrix"),
    }
    for i, n in ((1, patch), (2, width), (3, width)):
        found |= {f"v.patch_norm.{i}.{x}": Spec((n,), "vector") for x in ("weight", "bias")}
    return found


def positions(entries: Mapping[str, Entry]) -> int:
    """Return the number of rows and of columns that a file's table of positions has; 0: it has no such table."""
    table = entries.get("v.position_embd.weight")
    return table.shape[1] if table and len(table.shape) == 3 else 0


def place(table: mx.array, rows: int, columns: int) -> mx.array:
    """Return what a table [2, positions, width] adds at each place of a grid: fp32 [rows * columns, width], by row.

    Raises InputError if the grid has more places than the table, along one side.
    """
    if max(rows, columns) > table.shape[1]:
        raise InputError(f"image: is too long for this projector, which knows {table.shape[1]} places a side; crop it")
    table = table.astype(mx.float32)
    return (table[0, None, :columns] + table[1, :rows, None]).reshape(rows * columns, -1)


def rows(read: Reader, weights: Weights, pixels: np.ndarray) -> Iterator[mx.array]:
    """Yield the soft tokens, fp32 [n, hidden], of pixels, uint8 [height, width, 3], sides multiples of SIDE."""
    yield project(embedded(weights, pixels), weights["mm.input_projection.weight"])


def embedded(weights: Weights, pixels: np.ndarray) -> mx.array:
    """Return the patches of a picture before the projection: fp32 [n, width], row by row."""
    patches = cut(pixels, SIDE)
    # Their mean is taken off first, which the norm does not see: its own fp32 sums of 6,912 fractions would be 1e-3
    # off; those of whole numbers, below 2^24, are exact.
    x = _norm(weights, 1, (patches - patches.sum(axis=-1, keepdims=True) / patches.shape[-1]) / 255)
    x = _norm(weights, 2, linear(x, weights["v.patch_embd.weight"]) + weights["v.patch_embd.bias"])
    return _norm(weights, 3, x + place(weights["v.position_embd.weight"], *(n // SIDE for n in pixels.shape[:2])))


def cut(pixels: np.ndarray, side: int) -> mx.array:
    """Return a picture's squares, fp32 [n, 3 * side * side] from 0 to 255: by row, each in the order of the weights."""
    down, across = pixels.shape[0] // side, pixels.shape[1] // side
    squares = mx.array(pixels).reshape(down, side, across, side, 3).transpose(0, 2, 4, 1, 3)
    return squares.astype(mx.float32).reshape(down * across, -1)


def _norm(weights: Weights, i: int, x: mx.array) -> mx.array:
    return mx.fast.layer_norm(x, weights[f"v.patch_norm.{i}.weight"], weights[f"v.patch_norm.{i}.bias"], NORM_EPS)
