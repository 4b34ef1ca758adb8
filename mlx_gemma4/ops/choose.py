"""The choice of experts, and of the tokens that an assistant scores: choose.metal, each kernel beside its reference."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import mlx.core as mx

from ..gpu.render import Launcher, prepare, render
from .cases import Case, Check, Sizes, case, cases, norm_weight, normal
from .op import Op


def top_k(launcher: Launcher, scores: mx.array, used: int, *, scale: mx.array | None = None) -> tuple[Any, Any]:
    """The experts of each token.

    Args:
        scores: fp32 [T, E].
        used: how many to choose, up to 32.
        scale: fp32 [E]: multiplies the shares.

    Returns:
        int32 [T, used], best first; their softmax among themselves, fp32 [T, used].
    """
    tokens, n = scores.shape
    defines = {"E": n, "USED": used, "SCALED": scale is not None}
    kernel = render("top_k", "choose.metal", mx.float32, defines, [] if scale is not None else ["scale"])
    results = ((tokens, used), mx.int32), ((tokens, used), mx.float32)
    ids, share = prepare(launcher, kernel, (1, tokens, 1), 32, *results)(*[a for a in (scores, scale) if a is not None])
    return ids, share


def top_k_reference(scores: mx.array, used: int, *, scale: mx.array | None = None) -> tuple[mx.array, mx.array]:
    """`top_k` in stock MLX."""
    ids = mx.argsort(-scores, axis=-1)[:, :used].astype(mx.int32)
    share = mx.softmax(mx.take_along_axis(scores, ids, axis=-1), axis=-1, precise=True)
    return ids, share if scale is None else share * scale[ids]


TOP_K = Op("top_k", top_k, top_k_reference)


def spread(launcher: Launcher, logits: mx.array, near: mx.array, ordering: mx.array) -> Any:
    """Logits of all tokens, fp32 [1, V], where those of some centroids have been scored; others get the lowest less 1.

    Args:
        logits: fp32 [used, tokens of a centroid].
        near: int32 [used], the centroids.
        ordering: int32 [V], the tokens of the first centroid, then of the second ..
    """
    (used, per), n = logits.shape, ordering.size
    kernel = render("spread", "choose.metal", mx.float32, {"USED": used, "PER": per, "V": n})
    launch = prepare(launcher, kernel, (-(-n // 2048), 1, 1), 256, ((1, n), mx.float32))
    return launch(logits, near, ordering)[0]


def spread_reference(logits: mx.array, near: mx.array, ordering: mx.array) -> mx.array:
    """`spread` in stock MLX."""
    tokens = ordering.reshape(-1, logits.shape[1])[near].reshape(1, -1)
    others = mx.broadcast_to(logits.min() - 1, (1, ordering.size))
    return mx.put_along_axis(others, tokens, logits.reshape(1, -1), axis=1)


SPREAD = Op("spread", spread, spread_reference)


@cases
def top_k_cases(s: Sizes) -> Iterator[Check]:
    def make(scaled: bool) -> Case:
        scale = norm_weight(s.experts) if scaled else None
        return case(TOP_K, 8 * s.experts, normal(1, s.experts) * 3, s.used, scale=scale)

    for scaled in (True, False) if s.used else ():
        yield Check(TOP_K.key, f"{s.used} of {s.experts}" + ", unscaled" * (not scaled), partial(make, scaled))


@cases
def spread_cases(s: Sizes) -> Iterator[Check]:
    def make() -> Case:
        per, near = s.centroid_tokens, mx.random.permutation(s.experts)[: s.used].astype(mx.int32)
        ordering = mx.random.permutation(s.experts * per).astype(mx.int32)
        return case(SPREAD, 8 * ordering.size, normal(s.used, per), near, ordering)

    if s.centroid_tokens:
        yield Check(SPREAD.key, f"{s.used} of {s.experts} x {s.centroid_tokens}", make)
