"""The packed mat-vec: a few tokens through a quantized weight; see matvec.metal.

In: activations and a packed weight. Out: activations, with a norm, GEGLU or a factor folded in. Its reference is
`dispatch.product_reference`, for any weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import mlx.core as mx

from ..gpu.render import DEVICE_ELEMENTS, Kernel, Launcher, build, float_literal, render, result_defines
from ..quant.formats import FORMATS, Format, Packed
from .epilogue import product_reference
from .op import Op
from .packed import format_defines
from .tuning import CORES

MAX_TOKENS = 4  # of a mat-vec
LARGE = 8 << 20  # weights of a large matrix
HEAD_ROWS = 65536  # of a head
BUSY = 1900  # simdgroups that keep a large GPU's memory busy, for one launch
RESIDENT = CORES * 36  # simdgroups of a mat-vec with two rows a lane that it holds at once


# ---------------------------------------------------------------- packed mat-vec


@dataclass(frozen=True)
class Tiling:
    """How a mat-vec is cut; see matvec.metal."""

    lanes: int  # lanes of a simdgroup that share a row
    rows: int  # rows a lane works on at once
    split: int  # simdgroups that share a row
    simdgroups: int  # of a threadgroup, a multiple of split
    chunk: int = 32  # weights a lane takes of each row in a step
    prefetch: bool = False  # load the next step's weights during this one

    def rows_per_group(self, glu: bool) -> int:
        """Results that one threadgroup writes."""
        return self.rows // (1 + glu) * (32 // self.lanes) * (self.simdgroups // self.split)


def tiling(fmt: Format, n: int, k: int, tokens: int = 1) -> Tiling:
    """The cut for a weight of n rows of k: rules fitted to what some 100 cuts of each of 10 shapes took on an H100.

    In a decode step launches wait for each other, so most of all a lane should have few steps, and there should be
    simdgroups enough for every core; then, the lanes of a row should divide its chunks evenly, and a lane's x should
    serve several rows. docs/kernels.md has the measurements.
    """
    chunks = -(-k // 32)
    if tokens == 1 and n * k >= LARGE and n < HEAD_ROWS:
        lanes, most = 32 if chunks >= 256 else 16 if chunks >= 32 else 8, 6 if 8192 <= n < 20000 else 4
        for split in (1, 2, 3, 4, 6, 8):
            steps = chunks / (lanes * split)
            if steps <= most and steps / math.ceil(steps) > 0.8 and n * split * lanes >= 128 * BUSY:
                return Tiling(lanes, 4, split, split if split > 3 else 2 * split)

    def even(lanes: int, split: int) -> float:
        """Share of a row's lanes that have work in every step."""
        return chunks / (-(-chunks // (lanes * split)) * lanes * split)

    by_table = fmt.lut is not None
    if n >= 8192:  # many rows: few lanes for each
        lanes = 16 if fmt.bits > 4 and chunks >= 160 else 8
        rows = 4 if fmt.bits <= 4 and not 32768 <= n < 131072 else 2
        if by_table:  # not measured: whole waves, and x made whole numbers for many rows
            rows = 4 if 32768 <= n < 131072 else 8
        split = max((3, 4, 2), key=lambda s: round(even(lanes, s), 2))
    else:
        lanes, rows = 16, 4 if by_table else 2

        def worth(split: int) -> float:
            steps, waves = -(-chunks // (lanes * split)), n * split * lanes / (32 * rows) / (RESIDENT * 2 // rows)
            filled: float = (waves / math.ceil(waves)) ** 0.1 if waves > 1 else waves**0.5
            return even(lanes, split) * filled * steps / (steps + 0.4) if waves < 1.2 else 0.0

        split = max((1, 2, 3, 4, 6, 8), key=worth)
        if chunks >= 512 and fmt.bits <= 4 and not by_table:  # so long an x is worth sharing among many rows
            lanes, rows, split = 8, 8, 2
    if tokens > 1:  # each row's sums take as many registers again
        rows = 4
    return Tiling(lanes, rows, split, simdgroups=split)


def matvec_kernel(
    fmt: Format,
    k: int,
    dtype: mx.Dtype,
    cut: Tiling,
    tokens: int = 1,
    *,
    out: mx.Dtype | None = None,
    norm: bool = False,
    eps: float = 1e-6,
    glu: bool = False,
    factor: float = 1.0,
    times: bool = False,
    experts: bool = False,
    expert_x: bool = False,
) -> Kernel:
    """matvec.metal for a format and a cut; k only decides how wide loads may be."""
    while k % cut.chunk:
        cut = replace(cut, chunk=cut.chunk // 2)
    defines = format_defines(fmt, cut.chunk, k) | {name.upper(): value for name, value in asdict(cut).items()}
    defines["SG"] = defines.pop("SIMDGROUPS")
    # Pairs cost accuracy (2^-24 * 2^(2 bits) of a term): too much for wide codes, and for fp32's own precision.
    defines["PAIRS"] = fmt.bits <= 4 and fmt.lut is None and dtype != mx.float32
    # Two steps of x in threadgroup memory, of which Metal has 32 KB.
    room = 2 * 4 * tokens * cut.lanes * cut.split * cut.chunk
    defines["STAGE"] = (norm or dtype == mx.float32) and room <= 30 << 10
    flags = {"GLU": glu, "TIMES": times, "NORM": norm, "EXPERTS": experts, "EXPERT_X": expert_x}
    defines |= {
        "TOKENS": tokens,
        "EPS": float_literal(eps),
        "FACTOR": float_literal(factor),
        **result_defines(out or dtype),
        **flags,
    }
    present: dict[str, object] = {"group_scales": fmt.group_scale_bits, "block_scales": fmt.scale_block, "norm": norm}
    present |= {"ids": experts, "times": times}
    return render("matvec", "matvec.metal", dtype, defines, [n for n, there in present.items() if not there])


def supports(w: Packed, tokens: int) -> bool:
    """Whether `matvec` can do it: rows of whole 32s, few tokens, arrays that MLX hands over as device memory."""
    arrays = [a for a in (w.codes, w.group_scales, w.block_scales) if a is not None]
    return tokens <= MAX_TOKENS and w.shape[-1] % 32 == 0 and all(a.size >= DEVICE_ELEMENTS for a in arrays)


def matvec(
    launcher: Launcher,
    x: mx.array,
    w: Packed,
    *,
    norm: mx.array | None = None,
    eps: float = 1e-6,
    glu: bool = False,
    factor: float = 1.0,
    times: mx.array | None = None,
    ids: mx.array | None = None,
    out: mx.Dtype | None = None,
    cut: Tiling | None = None,
) -> Any:
    """A few tokens through a packed weight.

    Args:
        x: [T, K], T from 1 to 4; with `ids`, one token: [1, K] for all experts, or [E', K], one row each.
        w: [N, K], or with `ids` [E, N, K].
        norm: fp32 [K]: x goes through RMSNorm with this weight first.
        glu: w holds gate's rows, then up's; the result is gelu(gate x) * (up x).
        times: [T, N], with `ids` [E', N], in x's dtype: the result is gelu(x wᵀ) * times.
        factor: of the result.
        ids: int32 [E'], the experts to take.
        out: dtype of the result, x's by default. What fp16 can't hold becomes the largest number that it can.
        cut: instead of `tiling`'s.

    Returns:
        [T, N], [T, N / 2] with glu, [E', ..] with ids; of whatever kind `launcher` returns.
    """
    kernel, run, launch = _prepared(
        w.format.name,
        w.shape[-2:],
        x.dtype,
        launcher,
        cut,
        x.shape[0] if ids is None else 1,
        0 if ids is None else ids.size,
        out or x.dtype,
        norm is not None,
        eps,
        glu,
        factor,
        times is not None,
        ids is not None and x.shape[0] > 1,
    )
    arrays = {
        "x": x,
        "norm": norm,
        "codes": w.codes,
        "group_scales": w.group_scales,
        "block_scales": w.block_scales,
        "ids": ids,
        "times": times,
    }
    return run(inputs=[arrays[name] for name in kernel.inputs], **launch)[0]


@cache  # a decode step launches hundreds of mat-vecs, and the GPU must not wait for this to be worked out
def _prepared(
    name: str,
    shape: tuple[int, int],
    dtype: mx.Dtype,
    launcher: Launcher,
    cut: Tiling | None,
    tokens: int,
    slots: int,
    out: mx.Dtype,
    norm: bool,
    eps: float,
    glu: bool,
    factor: float,
    times: bool,
    expert_x: bool,
) -> tuple[Kernel, Callable[..., Sequence[Any]], dict[str, Any]]:
    """What `matvec` launches; slots: experts, 0 if the weight has none."""
    n, k = shape
    fmt, experts = FORMATS[name], slots or 1
    cut = cut or tiling(fmt, n * experts, k, tokens)
    flags: dict[str, Any] = {
        "norm": norm,
        "eps": eps,
        "glu": glu,
        "factor": factor,
        "times": times,
        "experts": slots > 0,
        "expert_x": expert_x,
    }
    kernel = matvec_kernel(fmt, k, dtype, cut, tokens, out=out, **flags)
    outs = n // 2 if glu else n
    threads = 32 * cut.simdgroups
    launch = {
        "grid": (threads * -(-outs // cut.rows_per_group(glu)), 1, experts),
        "threadgroup": (threads, 1, 1),
        "output_shapes": [(tokens * experts, outs)],
        "output_dtypes": [out],
    }
    return kernel, build(launcher, kernel), launch


MATVEC = Op("matvec", matvec, product_reference)
