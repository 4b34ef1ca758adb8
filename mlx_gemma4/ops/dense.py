"""A few tokens through an unpacked weight: dense.metal. Its reference is `epilogue.product_reference`."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from ..gpu.render import Launcher, absent, prepare, render, result_defines
from ..quant.formats import FLOATS
from .cases import Case, Check, Product, Sizes, cases, product_inputs
from .epilogue import ALONE, PLAIN, Epilogue, Folded, product_reference
from .op import Op

FOUR_ROWS_FROM = 4096  # from which on a simdgroup takes four, and reads x once for them
TOGETHER = 8  # tokens that a threadgroup takes where there are several
FEW_ROWS = 512  # of an unpacked weight, for which all simdgroups of a threadgroup share a row


class DenseConfig(NamedTuple):
    """The launch configuration for an unpacked weight; see dense.metal."""

    split: int  # simdgroups that share a row
    rows: int  # of a simdgroup


def dense_config(n: int) -> DenseConfig:
    """The configuration for a weight of n rows."""
    return DenseConfig(4 if n <= FEW_ROWS else 1, 4 if n >= FOUR_ROWS_FROM else 1)


def dense(
    launcher: Launcher,
    x: mx.array,
    w: mx.array,
    epilogue: Epilogue = PLAIN,
    folded: Folded = ALONE,
    *,
    config: DenseConfig | None = None,
) -> Any:
    """`matvec.matvec` without glu and experts for an unpacked weight.

    Args:
        x: [T, K], K a multiple of 8.
        w: [N, K], any float type.
        config: in place of `dense_config`'s.

    Returns:
        [T, N]
    """
    tokens, n, out, (norm, times, *_) = x.shape[0], w.shape[0], epilogue.out or x.dtype, folded
    (split, rows), together = config or dense_config(n), 1 if tokens == 1 else TOGETHER
    arrays = {"x": x, "w": w, "norm": norm, "times": times}
    defines = {**result_defines(out), "W_TYPE": w.dtype, "SG": 4, "SPLIT": split, "ROWS": rows, "EPS": epilogue.eps}
    defines["TOKENS"] = together
    defines |= {**epilogue.factors, "NORM": norm is not None, "TIMES": times is not None}
    kernel = render("dense", "dense.metal", x.dtype, defines, absent(arrays))
    groups = (-(-n * split // (4 * rows)), -(-tokens // together), 1)
    return prepare(launcher, kernel, groups, 128, ((tokens, n), out)).by_name(arrays)[0]


DENSE = Op("dense", dense, product_reference)


@cases
def dense_cases(s: Sizes) -> Iterator[Check]:
    def make(p: Product) -> Case:
        x, w, epilogue, folded = product_inputs(p, s.rows)
        kernel = partial(dense, x=x, w=w, epilogue=epilogue, folded=folded, config=dense_config(p.shape[-2]))
        return Case(kernel, partial(product_reference, x, w, epilogue, folded), w.nbytes)

    for p in dict.fromkeys(s.products):
        for tokens in (1, TOGETHER) if p.type in FLOATS else ():
            several = replace(p, tokens=tokens)
            yield Check(DENSE.key, f"{p.type} {several}", partial(make, several))
