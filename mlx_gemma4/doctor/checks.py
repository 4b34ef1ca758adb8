"""All checks of the kernels: those that each module of mlx_gemma4/ops declares for its own.

In: the sizes of a model. Out: `Check`s.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module

from .. import ops
from ..ops.cases import ALL_CASES, Check, Sizes

for _module in pkgutil.iter_modules(ops.__path__):
    import_module(f"{ops.__name__}.{_module.name}")  # registers its cases


def checks(s: Sizes, lengths: Sequence[int], rows: int | None = None) -> Iterator[Check]:
    """Yield a check of each kernel that a model of these sizes needs, by operation.

    Args:
        lengths: contexts in tokens at which to check global attention.
        rows: quick checks: the most rows of a weight to make; its kernel is launched as for all of them.
    """
    s = replace(s, lengths=tuple(lengths), rows=rows)
    for cases in sorted(ALL_CASES, key=lambda cases: cases.__name__):
        yield from cases(s)
