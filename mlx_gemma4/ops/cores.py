"""numpy's products on a CPU, shared among its cores.

OpenBLAS's own threads spin while they wait: on a busy machine they take the time of the one that is waited for. These
sleep. The command line keeps OpenBLAS to one thread; a program that imports numpy first decides for itself.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

from ..execution import cores

SHARED = 1 << 22  # multiplications from which on cores share a product
PARTS = 4  # for each core: one that is busy with something else takes fewer


def product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x @ wᵀ for fp32 x [.., K] and w [N, K]: fp32 [.., N]."""
    if x.size * len(w) < SHARED or cores() == 1:
        return np.asarray(x @ w.T)
    out = np.empty((*x.shape[:-1], len(w)), np.float32)
    step = -(-len(w) // (PARTS * cores()))

    def part(start: int) -> None:
        out[..., start : start + step] = x @ w[start : start + step].T

    list(_pool().map(part, range(0, len(w), step)))
    return out


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores(), "mlx-gemma4-product")
