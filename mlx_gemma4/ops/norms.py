"""The residual with the norms around it: norms.metal and its reference.

In and out: MLX arrays for one token, or a handful (T up to 8). Knows no model. Weights of norms are fp32.
"""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import mlx.core as mx

from ..gpu.render import Launcher, absent, prepare, render, result_defines
from . import stock
from .cases import EPS, Case, Check, Sizes, case, cases, norm_weight, normal, state_dtype
from .epilogue import SHRINK
from .exchange import Boxes
from .op import Op
from .tuning import this_gpu


class NormOptions(NamedTuple):
    """What `add_norm` does beside."""

    eps: float
    next_norm: mx.array | None = None  # fp32 [K]
    scale: mx.array | None = None  # fp32 [1 or more], of which the first counts
    # (outputs [T, used, K] in h's dtype, their shares fp32 [T, used], norm1, norm2): in place of h stands
    # rms(h) norm1 + rms(sum of share * output) norm2.
    experts: tuple[mx.array, mx.array, mx.array, mx.array] | None = None
    shrunk: float = 1.0  # h and the experts' outputs are so many times their true value, which their norms' eps follows
    # Of the second result, h's by default. What fp16 can't hold becomes the largest number that it can.
    out: mx.Dtype | None = None
    copied: float = 0.0  # without next_norm: so many times the residual are the second result
    # (flag, boxes, after) as in `exchange_sum`: h, fp32, is this rank's part of what is summed over ranks first.
    exchange: tuple[mx.array, Boxes, mx.array | None] | None = None


def add_norm(launcher: Launcher, x: mx.array, h: mx.array, post: mx.array, options: NormOptions) -> tuple[Any, Any]:
    """x + rms(h) post, times the layer's scalar, and that under the next norm.

    Args:
        x: [T, K], the residual; K a multiple of 8.
        h: [T, K], in any float type; or [parts, T, K], of which the sum counts (`Epilogue.added`).
        post: fp32 [K].

    Returns:
        the new residual [T, K] in x's dtype; rms of it times next_norm, or it times `copied`, or itself again.
    """
    eps, next_norm, scale, experts, shrunk, out, copied, exchange = options
    (tokens, k), out = x.shape, out or h.dtype
    flag, boxes, after = exchange or (None,) * 3
    simdgroups = min(32, -(-k // 256))
    outputs, share, norm1, norm2 = experts or (None,) * 4
    arrays = {"x": x, "h": h, "post": post, "experts": outputs, "share": share, "norm1": norm1, "norm2": norm2}
    arrays |= {"scale": scale, "next": next_norm}
    arrays |= {"flag": flag, "boxes": boxes.addresses if boxes else None, "after": after}
    defines: dict[str, Any] = {"R": x.dtype, "K": k, "SG": simdgroups, "EPS": eps, "EPS_H": eps * shrunk**2}
    defines |= {"BRANCHES": outputs is not None, "USED": 0 if outputs is None else outputs.shape[1]}
    defines["PARTS"] = h.shape[0] if h.ndim == 3 else 1
    defines |= {"SCALED": scale is not None, **result_defines(out), "NEXT": next_norm is not None}
    defines |= {"COPIES": copied > 0, "COPIED": float(copied)}
    defines |= boxes.defines(tokens * k) if boxes else {}
    missing = absent(arrays) + (["normed"] if next_norm is None and not copied else [])
    kernel = render("add_norm", "norms.metal", h.dtype, defines, missing)
    results = ((tokens, k), x.dtype), ((tokens, k), out)
    launch = prepare(launcher, kernel, (1, tokens, 1), 32 * simdgroups, *results[: len(kernel.outputs)])
    done = launch.by_name(arrays)
    return done[0], done[-1]


def add_norm_reference(x: mx.array, h: mx.array, post: mx.array, options: NormOptions) -> tuple[mx.array, mx.array]:
    """`add_norm` in stock MLX."""
    eps, next_norm, scale, experts, shrunk, out, copied, exchange = options
    assert exchange is None, "ranks exchange in kernels alone"
    c = h.astype(mx.float32)
    c = c.sum(axis=0) if c.ndim == 3 else c
    if experts is not None:
        outputs, share, norm1, norm2 = experts
        e = (outputs.astype(mx.float32) * share[..., None]).sum(axis=1)
        c = stock.rms_norm(c, norm1, eps * shrunk**2) + stock.rms_norm(e, norm2, eps * shrunk**2)
    y = x.astype(mx.float32) + stock.rms_norm(c, post, eps if experts is not None else eps * shrunk**2)
    if scale is not None:
        y = y * scale[:1]
    new = y.astype(x.dtype)
    if next_norm is None:
        return new, stock.within(y * copied, out or h.dtype) if copied else new
    return new, stock.within(stock.rms_norm(y, next_norm, eps), out or h.dtype)


ADD_NORM = Op("add_norm", add_norm, add_norm_reference)


@cases
def add_norm_cases(s: Sizes) -> Iterator[Check]:
    k = s.hidden

    def make(scaled: bool, used: int, shrunk: float, following: bool, parts: int) -> Case:
        # What a per-layer embedding's product takes follows where no norm does.
        # [4]: MLX keeps less than that in the host's memory (CUDA)
        scale, experts = mx.full((4,), 0.37) if scaled else None, None
        if used:
            experts = normal(1, used, k), mx.softmax(normal(1, used), axis=-1), norm_weight(k), norm_weight(k)
        follow = {"next_norm": norm_weight(k)} if following else {"copied": SHRINK}
        options = NormOptions(EPS, scale=scale, experts=experts, shrunk=shrunk, out=state_dtype(), **follow)
        n_bytes = 4 * k * (5 + (used + 2 if used else 0)) + state_dtype().size * k
        h = normal(1, k) if parts == 1 else normal(parts, 1, k)
        return case(ADD_NORM, n_bytes, normal(1, k) * 20, h, norm_weight(k), options)

    # After attention; after the MLP, where the layer may have a scale, experts, or an embedding's share to come.
    kinds = [(False, 0, 1.0, True), (False, 0, SHRINK, True), (True, s.used, SHRINK, True), (True, 0, SHRINK, True)]
    kinds += [(False, 0, SHRINK, False)] if s.ple else []
    several = range(1, this_gpu().rows_parts + 1)  # parts of a product
    for (scaled, used, shrunk, following), parts in product(dict.fromkeys(kinds) if k else (), several):
        shape = f"{k}" + ", scaled" * scaled + f", {used} experts" * (used > 0) + ", shrunk" * (shrunk != 1)
        shape += ", last" * (not following) + f", {parts} parts" * (parts > 1)
        yield Check(ADD_NORM.key, shape, partial(make, scaled, used, shrunk, following, parts))
