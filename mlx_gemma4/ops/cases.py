"""Cases: each kernel beside its reference, at the shapes of a model, on random numbers.

In: the sizes of a model. Out: `Check`s, which make their arrays only when asked. Each module of this folder declares
its own with `@cases`; the doctor runs them. Knows no model. Numbers are scaled so that results are near one, as a
trained model's are: an error can't hide behind a saturated GELU.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np

from ..gpu.render import Launcher
from ..memory import on_cpu
from ..quant import formats
from ..quant.formats import FLOATS, FORMATS, Packed
from .epilogue import Epilogue, Folded
from .op import Op, OpKey, P
from .parts import KVPart, span_rows

EPS = 1e-6
COUNT = 5  # tokens in a tail
RANDOM_WORDS = (1 << 20) + 7  # no multiple of any row's length, so that no two rows of repeated words are alike

# ---------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Product:
    """A weight and what is folded into its mat-vec."""

    type: str  # a GGUF type
    shape: tuple[int, ...]  # [N, K] or experts [E, N, K]
    norm: bool = False
    glu: bool = False
    times: bool = False
    factor: float = 1.0
    used: int = 0  # experts chosen
    own_x: bool = False  # each expert has its own input
    tokens: int = 1
    narrow: bool = False  # input in the dtype of KV states, else fp32
    narrow_out: bool = False  # the result likewise
    given: float = 1.0  # `Epilogue.given`

    def __str__(self) -> str:
        folded = ["fp32"] if self.type in FORMATS and not (self.narrow or self.norm or self.used) else []
        folded += [name for name in ("norm", "glu", "times") if getattr(self, name)]
        folded += ["shrunk"] if self.given != 1 else []
        used = [f"{self.used} used"] if self.used else []
        tokens = [f"T={self.tokens}"] if self.tokens > 1 else []
        return " ".join(["x".join(map(str, self.shape)), *used, *folded, *tokens])


@dataclass(frozen=True)
class Heads:
    """Attention of one kind of layer."""

    heads: int
    kv_heads: int
    dim: int
    window: int  # 0: global
    joined: str  # what follows q in its rows: "kv", "k" or ""
    has_kv: bool = True
    v_is_k: bool = False
    value_norm: bool = True

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads} heads of {self.dim}"


@dataclass(frozen=True)
class Sizes:
    """The sizes that decide a model's kernels, and how much of them to check."""

    hidden: int
    vocab: int
    heads: tuple[Heads, ...]
    products: tuple[Product, ...]  # of a decode step
    table: str  # type of the embedding
    ple_table: str = ""
    layers: int = 0  # with per-layer embeddings
    ple: int = 0
    experts: int = 0
    used: int = 0
    prompts: tuple[Product, ...] = ()  # products that only prompts run in kernels
    scale: float = 1.0  # of attention's scores
    lengths: tuple[int, ...] = ()  # contexts at which to check global attention
    rows: int | None = None  # quick checks: the most rows of a weight to make, launched as all of them would be
    centroid_tokens: int = 0  # an assistant's, of whose `experts` centroids so many are `used`
    target_hidden: int = 0  # of what an assistant reads behind its target's embedding

    @property
    def packed(self) -> tuple[Product, ...]:
        return tuple(p for p in self.products if p.type in FORMATS)


# ---------------------------------------------------------------- checks


@dataclass(frozen=True)
class Case:
    """One kernel with its arrays: kernel(launcher) and reference() give one array, or several."""

    kernel: Callable[[Launcher], Any]
    reference: Callable[[], Any]
    n_bytes: int  # that must move
    compared: Callable[[Sequence[mx.array]], Sequence[mx.array]] = list  # the part of the results that counts


@dataclass(frozen=True)
class Check:
    """A case to be made."""

    op: OpKey  # switched off if the kernel fails
    shape: str  # for people
    make: Callable[[], Case]

    @property
    def key(self) -> str:
        """The name under which a verdict remembers it."""
        return f"{self.op}: {self.shape}"


Cases = Callable[[Sizes], Iterator[Check]]
ALL_CASES: list[Cases] = []


def cases(function: Cases) -> Cases:
    """Register a function that yields the checks of an operation."""
    ALL_CASES.append(function)
    return function


def case(op: Op[P, Any], n_bytes: int, *args: P.args, **kwargs: P.kwargs) -> Case:
    """Return an operation's case on these arguments."""
    return Case(lambda launcher: op.kernel(launcher, *args, **kwargs), partial(op.reference, *args, **kwargs), n_bytes)


# ---------------------------------------------------------------- random numbers


def normal(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape).astype(dtype)


def norm_weight(n: int) -> mx.array:
    """A weight of an RMSNorm, fp32 [n]."""
    return 1 + normal(n) * 0.1


def state_dtype() -> mx.Dtype:
    """The dtype of keys and values, as `Model.new_state` has them."""
    return mx.float32 if on_cpu() else mx.float16


def weight(type: str, shape: tuple[int, ...]) -> mx.array | Packed:
    """A random weight of a GGUF type, such that a normal x gives results near one."""
    if type in FLOATS:
        dense: mx.array = normal(*shape) * shape[-1] ** -0.5
        return dense.astype(FLOATS[type])
    fmt, (*rows, k) = FORMATS[type], shape
    codes = random_bytes(4 * prod(shape) * fmt.bits // 32).view(mx.uint32).reshape(*rows, -1)
    group_scales = None
    if fmt.group_scale_bits:
        group_scales = random_bytes(prod(shape) // fmt.group * fmt.group_scale_bits // 8).reshape(*rows, -1)
        if fmt.group_scale_kind == "e8m0":
            group_scales = 116 + group_scales % 8
    if not fmt.scale_block and not fmt.per_row:
        return Packed(fmt, shape, codes, group_scales, None)
    scales = mx.random.uniform(1, 2, tuple(rows) if fmt.per_row else (*rows, k // fmt.scale_block, 1 + fmt.has_min))

    def held(scales: mx.array) -> mx.array:
        return formats.row_factors(scales) if fmt.per_row else scales.astype(mx.float16)

    def first_row(a: mx.array) -> mx.array:
        return a.reshape(-1, *a.shape[len(rows) :])[:1]

    row_groups = None if group_scales is None else first_row(group_scales)
    row = Packed(fmt, (1, k), first_row(codes), row_groups, held(first_row(scales)))
    size = mx.sqrt((formats.dequantize(row) ** 2).sum())
    return Packed(fmt, shape, codes, group_scales, held(scales / size))


@cache
def _random_words() -> mx.array:
    return mx.array(np.random.default_rng(0).integers(0, 1 << 32, RANDOM_WORDS, np.uint32))


def random_bytes(n: int) -> mx.array:
    """uint8 [n], always the same for an n, and others for another. Lazy: each load describes kernels by such arrays."""
    base = mx.roll(_random_words(), n % RANDOM_WORDS).view(mx.uint8)
    return mx.tile(base, -(-n // base.size))[:n]


def random_queries(h: Heads, dtype: mx.Dtype, tokens: int = 1) -> mx.array:
    """[T, H, D], for scores with a scale of 1."""
    q: mx.array = normal(tokens, h.heads, h.dim, dtype=dtype) * (1.5 * h.dim**-0.5)
    return q


def random_kv(h: Heads, tokens: int, dtype: mx.Dtype) -> KVPart:
    """Keys and values, [1, G, tokens, D] each."""
    shape = (1, h.kv_heads, tokens, h.dim)
    return normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)


def attention_inputs(
    h: Heads, parts: Sequence[tuple[int, int, int]], dtype: mx.Dtype
) -> tuple[mx.array, list[KVPart], mx.array]:
    """Return q, parts of (capacity, start, stop) in tokens, and spans."""
    made = [random_kv(h, capacity, dtype) for capacity, *_ in parts]
    return random_queries(h, dtype), made, span_rows(span for _, *span in parts)


def product_inputs(p: Product, most_rows: int | None) -> tuple[mx.array, Any, Epilogue, Folded]:
    """Return x, a weight of at most so many rows, and the options of `matvec`, `few_rows` or `dense`."""
    *_, n, k = p.shape
    made = (*([min(p.shape[0], 4 * p.used)] if p.used else []), min(n, most_rows or n), k)
    x, epilogue, folded = product_arguments(p, made)
    return x, weight(p.type, made), epilogue, folded


def product_arguments(p: Product, made: tuple[int, ...]) -> tuple[mx.array, Epilogue, Folded]:
    """Return x and the options of `matvec`, `few_rows` or `dense` for a product whose weight has this shape."""
    k = p.shape[-1]
    dtype, out = (state_dtype() if narrow else mx.float32 for narrow in (p.narrow, p.narrow_out))
    norm = norm_weight(k) if p.norm else None
    rows = (p.tokens, p.used) if p.used and p.tokens > 1 else (p.used or p.tokens,)  # of the result
    times = normal(*rows, made[-2], dtype=dtype) if p.times else None
    ids = (
        mx.stack([mx.random.permutation(made[0])[: p.used] for _ in range(p.tokens)]).astype(mx.int32)
        if p.used
        else None
    )
    if ids is not None and p.tokens == 1:
        ids = ids[0]
    x = (normal(*(rows if p.own_x else (p.tokens,)), k) * p.given).astype(dtype)
    return x, Epilogue(p.glu, p.factor, out, EPS, p.given), Folded(norm, times, ids)
