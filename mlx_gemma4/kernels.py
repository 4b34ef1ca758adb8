"""Renders a kernel from `kernels/*.metal` for a weight format, a dtype and a backend, and launches it.

In: MLX arrays and packed weights. Out: MLX arrays. One Metal text serves three ways to run it, each a `Maker` with the
arguments of `mx.fast.metal_kernel`: that function itself, `cuda_maker` below (MLX's CUDA backend), and the CPU
simulator of the tests. What differs between formats and shapes is rendered as `#define`s before the text.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from . import cuda
from .memory import on_cpu
from .quant import FORMATS, Format, Packed

Maker = Callable[..., Callable[..., Sequence[Any]]]

_FOLDERS = (Path(__file__).parent / "metal", Path(__file__).parent.parent / "kernels")  # in a wheel, in the tree
_DEVICE = 8  # elements from which on MLX passes an input in Metal's device address space, not constant
MAX_TOKENS = 4  # of a mat-vec
LARGE = 8 << 20  # weights of a large matrix
MANY_ROWS = 65536  # of a head
BUSY = 1900  # simdgroups that keep a large GPU's memory busy, for one launch
CORES = 132  # of a large GPU, an H100
RESIDENT = CORES * 36  # simdgroups of a mat-vec with two rows a lane that it holds at once
_TYPES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat"}


@dataclass(frozen=True, eq=False)
class Kernel:
    """One rendered kernel: what `mx.fast.metal_kernel` wants to know, in Metal. `render` makes each just once."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    header: str
    source: str


def _f(x: float) -> str:
    """A number as a float literal of C."""
    return f"{float(x)!r}f"


@cache
def _text(file: str) -> str:
    for folder in _FOLDERS:
        if (folder / file).exists():
            return (folder / file).read_text()
    raise FileNotFoundError(f"kernel source {file} is missing from the installation")


def render(entry: str, file: str, dtype: mx.Dtype, defines: dict[str, object], absent: Sequence[str] = ()) -> Kernel:
    """The kernel `entry` of kernels/`file`.

    A file holds helpers, then kernels: a line `// kernel: NAME(INPUT, OPTIONAL?, ...) -> (OUTPUT, ...)` and its body.
    Helpers that several files share stand in files of their own: `// uses: FILE` puts one before this text.

    Args:
        dtype: of the activations.
        defines: constants that the text reads.
        absent: optional inputs and outputs that this kernel goes without.
    """
    return _render(entry, file, dtype, tuple(defines.items()), tuple(absent))


@cache
def _render(
    entry: str, file: str, dtype: mx.Dtype, defines: tuple[tuple[str, object], ...], absent: tuple[str, ...]
) -> Kernel:
    helpers, *kernels = re.split(r"(?m)^(?=// kernel: )", _text(file))
    body = next(k for k in kernels if k.startswith(f"// kernel: {entry}("))
    declared = re.match(r"// kernel: \w+\((.*?)\) -> \((.*?)\)", body)
    assert declared, f"{file}: {entry} declares no inputs and outputs"
    names = ([n.strip().rstrip("?") for n in listed.split(",")] for listed in declared.groups())
    inputs, outputs = (tuple(n for n in some if n not in absent) for some in names)
    metal = _TYPES[dtype]
    lines = {"T": metal, f"T_{metal.upper()}": 1, **dict(defines)}
    header = "".join(f"#define {k} {int(v) if isinstance(v, bool) else v}\n" for k, v in lines.items())
    used = re.findall(r"(?m)^// uses: (\S+)$", helpers)
    header += "".join(map(_text, ("common.metal", *used))) + helpers
    digest = hashlib.sha256((header + body).encode()).hexdigest()[:12]
    return Kernel(f"{entry}_{digest}", inputs, outputs, header, body)


def cuda_maker(name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str) -> Any:
    """A `Maker` for MLX's CUDA backend."""
    return cuda.kernel(name, input_names, output_names, *to_cuda_text(source, header))


def to_cuda_text(source: str, header: str) -> tuple[str, str]:
    """A rendered kernel's source and header for `cuda.kernel`."""
    return to_cuda(source), _text("cuda.h") + to_cuda(header)


def to_cuda(text: str) -> str:
    """Metal text as CUDA: threadgroup arrays become shared memory, the other address spaces vanish."""
    text = re.sub(r"(?m)//.*$", "", text)
    text = re.sub(r"(?m)^(\s*)threadgroup (?=\w+ \w+(\[[^;]*\])*;)", r"\1__shared__ ", text)
    return re.sub(r"\b(device|constant|threadgroup|thread) ", "", text)


def default_maker() -> Maker | None:
    """How kernels run on this machine's default device, or None on a CPU."""
    if on_cpu():
        return None
    return cast(Maker, mx.fast.metal_kernel if mx.metal.is_available() else cuda_maker)


def is_lazy(maker: Maker) -> bool:
    """Whether launches by this maker wait to be evaluated, as MLX's own do, so that they can be traced."""
    return maker in (mx.fast.metal_kernel, cuda_maker)


@cache
def _build(maker: Maker, kernel: Kernel) -> Callable[..., Sequence[Any]]:
    return maker(
        name=kernel.name,
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=kernel.source,
        header=kernel.header,
    )


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
    if tokens == 1 and n * k >= LARGE and n < MANY_ROWS:
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


def result_type(dtype: mx.Dtype) -> dict[str, object]:
    """U, the dtype of results, as constants."""
    return {"U": _TYPES[dtype], "U_HALF": dtype == mx.float16}


def _traits(fmt: Format, chunk: int, k: int) -> dict[str, object]:
    """A format as constants for matvec.metal."""
    words = chunk * fmt.bits // 32
    row = k * fmt.bits // 32
    lut = ", ".join(f"{v}.0f" for v in fmt.lut) if fmt.lut is not None else ""
    return {
        "BITS": fmt.bits,
        "GROUP": fmt.group,
        "SUB_BITS": fmt.sub_bits,
        "SUPER": fmt.super_block,
        "OFFSET": fmt.offset,
        "HAS_MIN": fmt.has_min,
        "HAS_LUT": fmt.lut is not None,
        "LUT": f"{{{lut}}}",
        **(_table_words(fmt.lut) if fmt.lut is not None else {}),
        f"SUB_{fmt.sub_kind.upper().replace('-', '_') or 'NONE'}": 1,
        "VEC": next(v for v in (4, 2, 1) if words % v == 0 and row % v == 0),
    }


def _table_words(values: Sequence[int]) -> dict[str, object]:
    """A table as whole numbers of 8 bits, four a word, for matvec.metal's table_dot.

    To each value comes 1 where the other half's of the same low bits is below 0.
    """
    table = bytes((v + (values[i ^ 8] < 0)) & 255 for i, v in enumerate(values))
    return {f"LUT_{i}": f"0x{int.from_bytes(table[4 * i : 4 * i + 4], 'little'):08x}u" for i in range(4)}


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
    defines = _traits(fmt, cut.chunk, k) | {name.upper(): value for name, value in asdict(cut).items()}
    defines["SG"] = defines.pop("SIMDGROUPS")
    # Pairs cost accuracy (2^-24 * 2^(2 bits) of a term): too much for wide codes, and for fp32's own precision.
    defines["PAIRS"] = fmt.bits <= 4 and fmt.lut is None and dtype != mx.float32
    # Two steps of x in threadgroup memory, of which Metal has 32 KB.
    room = 2 * 4 * tokens * cut.lanes * cut.split * cut.chunk
    defines["STAGE"] = (norm or dtype == mx.float32) and room <= 30 << 10
    flags = {"GLU": glu, "TIMES": times, "NORM": norm, "EXPERTS": experts, "EXPERT_X": expert_x}
    defines |= {"TOKENS": tokens, "EPS": _f(eps), "FACTOR": _f(factor), **result_type(out or dtype), **flags}
    present: dict[str, object] = {"sub": fmt.sub_bits, "super": fmt.super_block, "norm": norm}
    present |= {"ids": experts, "times": times}
    return render("matvec", "matvec.metal", dtype, defines, [n for n, there in present.items() if not there])


def takes(w: Packed, tokens: int) -> bool:
    """Whether `matvec` can do it: rows of whole 32s, few tokens, arrays that MLX hands over as device memory."""
    arrays = [a for a in (w.codes, w.sub, w.super) if a is not None]
    return tokens <= MAX_TOKENS and w.shape[-1] % 32 == 0 and all(a.size >= _DEVICE for a in arrays)


def matvec(
    x: mx.array,
    w: Packed,
    maker: Maker,
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
        [T, N], [T, N / 2] with glu, [E', ..] with ids; of whatever kind `maker` returns.
    """
    kernel, run, launch = _prepared(
        w.format.name,
        w.shape[-2:],
        x.dtype,
        maker,
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
    arrays = {"x": x, "norm": norm, "codes": w.codes, "sub": w.sub, "super": w.super, "ids": ids, "times": times}
    return run(inputs=[arrays[name] for name in kernel.inputs], **launch)[0]


@cache  # a decode step launches hundreds of mat-vecs, and the GPU must not wait for this to be worked out
def _prepared(
    name: str,
    shape: tuple[int, int],
    dtype: mx.Dtype,
    maker: Maker,
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
    return kernel, _build(maker, kernel), launch
