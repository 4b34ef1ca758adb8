"""What there is to check of the kernels: each beside its reference, at the shapes of a model, on random numbers.

In: the sizes of a model. Out: `Check`s, which make their arrays only when asked. `doctor` runs them. Numbers
are scaled so that results are near one, as a trained model's are: an error can't hide behind a saturated GELU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np

from ..gpu.render import Launcher
from ..kv import quantization
from ..memory import on_cpu
from ..model.replay import WORKING
from ..ops import (
    attention,
    choose,
    dense,
    embed,
    expand,
    grouped,
    halve,
    long_attention,
    matvec,
    norms,
    pack,
    qkv,
    quantize_kv,
    quantized_attention,
    stock,
)
from ..ops.epilogue import SHRINK, Epilogue, product_reference
from ..ops.routing import Routing
from ..quant import formats
from ..quant.formats import FLOATS, FORMATS, Packed
from .sizes import Heads, Product, Sizes

EPS = 1e-6
POSITION = 5000  # of a token under RoPE: its angles must be right far from 0
COUNT = 5  # tokens in a tail
EXPANDED = 4096  # rows of a weight made plain for a prompt
HALVED = 64  # rows of activations
GROUPED = (70, 0, 3, 31)  # rows of each expert: of two tiles, none, few
RANDOM_WORDS = (1 << 20) + 7  # no multiple of any row's length: repeated, they make no two rows alike


@dataclass(frozen=True)
class Case:
    """One kernel with its arrays: kernel(launcher) and reference() give one array, or several."""

    kernel: Callable[[Launcher], Any]
    reference: Callable[[], Any]
    n_bytes: int  # that must move
    defined: Callable[[Sequence[mx.array]], Sequence[mx.array]] = list  # what of the results counts


@dataclass(frozen=True)
class Check:
    """A case to be made."""

    op: str  # as `Kernels.off` names it
    shape: str  # for people
    make: Callable[[], Case]

    @property
    def key(self) -> str:
        """What a verdict remembers it by."""
        return f"{self.op}: {self.shape}"


def checks(s: Sizes, lengths: Sequence[int], rows: int | None = None) -> Iterator[Check]:
    """Every kernel that a model of these sizes needs.

    Args:
        lengths: of the contexts that global attention is checked over.
        rows: a quick form: the most rows of a weight to make; its kernel is cut as for all of them.
    """
    for product in dict.fromkeys(s.products):
        yield _product(product, rows)
    for type, k in {p.type: p.shape[-1] for p in s.products if p.type in FORMATS}.items():
        yield _expand(type, k, rows or EXPANDED)
    for k in dict.fromkeys(p.shape[-1] for p in s.products if p.type in FORMATS):
        yield _halve(k)
    for product in dict.fromkeys((*s.products, *s.prompts)):
        if product.used:
            yield _grouped(product, rows)
    if rows is None:  # when a model is loaded, packing comes first and tries its kernels by itself
        types = dict.fromkeys([*(p.type for p in s.products), s.table, s.ple_table])
        yield from (_pack(type) for type in types if type in FORMATS)
    if s.hidden == 0:  # products alone
        return
    for dim, window in dict.fromkeys((h.dim, h.window) for h in s.heads):
        yield _rotations(dim, window)
    for h in dict.fromkeys(s.heads):
        yield _qkv_post(h)
        for length in [h.window] if h.window else lengths:
            yield _attention(h, length)
        if not h.window and h.dim % 64 == 0:
            yield _long_attention(h)
        if not h.window and h.dim in quantized_attention.DIMS:
            for length, kind in itertools.product(lengths[-1:], quantization.BITS):
                yield _coded_attention(h, length, kind, WORKING if kind == "tq4" else attention.TAIL)
            yield from (_encode(h, kind) for kind in quantization.BITS)
    for scaled, experts in ((False, 0), (True, 0), *([(True, s.used)] if s.used else [])):
        yield _add_norm(s.hidden, scaled, experts)
    if s.table:
        yield _embed(s.table, s.hidden)
    if s.ple_table:
        yield _ple_inputs(s)
    if s.used:
        yield _top_k(s.experts, s.used)
    if rows is None:  # generation takes the stock one
        yield _argmax(s.vocab)


# ---------------------------------------------------------------- random numbers


def normal(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape).astype(dtype)


def weight(type: str, shape: tuple[int, ...]) -> mx.array | Packed:
    """A random weight of a type, such that a normal x gives results near one."""
    if type in FLOATS:
        dense: mx.array = normal(*shape) * shape[-1] ** -0.5
        return dense.astype(FLOATS[type])
    fmt, (*rows, k) = FORMATS[type], shape
    codes = _random(4 * prod(shape) * fmt.bits // 32).view(mx.uint32).reshape(*rows, -1)
    group_scales = (
        _random(prod(shape) // fmt.group * fmt.group_scale_bits // 8).reshape(*rows, -1)
        if fmt.group_scale_bits
        else None
    )
    if group_scales is not None and fmt.group_scale_kind == "e8m0":
        group_scales = 116 + group_scales % 8
    if not fmt.scale_block:
        return Packed(fmt, shape, codes, group_scales, None)
    scales = mx.random.uniform(1, 2, (*rows, k // fmt.scale_block, 1 + fmt.has_min))

    def first(a: mx.array, dims: int = 1) -> mx.array:
        return a.reshape(-1, *a.shape[-dims:])[:1]

    row = Packed(
        fmt,
        (1, k),
        first(codes),
        None if group_scales is None else first(group_scales),
        first(scales, 2).astype(mx.float16),
    )
    size = mx.sqrt((formats.dequantize(row) ** 2).sum())
    return Packed(fmt, shape, codes, group_scales, (scales / size).astype(mx.float16))


def _random(n_bytes: int) -> mx.array:
    """uint8 [n_bytes]."""
    base = mx.array(np.random.default_rng(n_bytes).integers(0, 1 << 32, RANDOM_WORDS, np.uint32)).view(mx.uint8)
    return mx.tile(base, -(-n_bytes // base.size))[:n_bytes]


# ---------------------------------------------------------------- one check a kernel


def _product(p: Product, most: int | None) -> Check:
    *_, n, k = p.shape
    folded = [name for name in ("norm", "glu", "times") if getattr(p, name)] + ([f"T={p.tokens}"] * (p.tokens > 1))
    shape = " ".join(["x".join(map(str, p.shape)), *([f"{p.used} used"] if p.used else []), *folded])
    made = (*([min(p.shape[0], 4 * p.used)] if p.used else []), min(n, most or n), k)

    def make() -> Case:
        dtype, out = (state_dtype() if narrow else mx.float32 for narrow in (p.narrow, p.narrow_out))
        w, x = weight(p.type, made), normal(p.used if p.own_x else p.tokens, k, dtype=dtype)
        options: dict[str, Any] = {"epilogue": Epilogue(p.glu, p.factor, out, EPS)}
        if p.norm:
            options["norm"] = 1 + normal(k) * 0.1
        if p.times:
            options["times"] = normal(p.used or p.tokens, made[-2], dtype=dtype)
        if p.used:
            options["ids"] = mx.random.permutation(made[0])[: p.used].astype(mx.int32)
        n_bytes = w.nbytes * (p.used or 1) // (made[0] if p.used else 1)
        if isinstance(w, mx.array):
            return Case(
                lambda launcher: dense.dense(launcher, x, w, **options),
                lambda: product_reference(x, w, **options),
                n_bytes,
            )
        config = matvec.tiling(w.format, n * (p.used or 1), k, p.tokens)

        def reference() -> mx.array:
            if p.tokens == 1:
                return product_reference(x, w, **options)
            # For several rows MLX has a kernel of its own, which NVIDIA's compiler takes very long for.
            return mx.concatenate([product_reference(x[i : i + 1], w, **options) for i in range(p.tokens)])

        return Case(lambda launcher: matvec.matvec(launcher, x, w, config=config, **options), reference, n_bytes)

    return Check("dense", f"{p.type} {shape}", make) if p.type in FLOATS else Check(f"matvec {p.type}", shape, make)


def _expand(type: str, k: int, rows: int) -> Check:
    def make() -> Case:
        w = weight(type, (rows, k))
        assert isinstance(w, Packed)
        n_bytes = w.nbytes + 2 * rows * k
        return Case(lambda launcher: expand.expand(launcher, w), lambda: expand.expand_reference(w), n_bytes)

    return Check(f"expand {type}", f"{rows}x{k}", make)


def _halve(k: int) -> Check:
    def make() -> Case:
        x = normal(HALVED, k) * mx.exp(3 * normal(HALVED, 1))
        return Case(lambda launcher: halve.halve(launcher, x), lambda: halve.halve_reference(x), 6 * HALVED * k)

    return Check("halve", f"{HALVED}x{k}", make)


def _grouped(p: Product, most: int | None) -> Check:
    """Rows of a prompt through experts, of which GROUPED are so many's."""
    n, k = p.shape[-2:]
    made = (len(GROUPED), min(n, most or n), k)
    mixed = np.random.default_rng(0).permutation(np.repeat(np.arange(made[0]), GROUPED))
    chosen = mixed[: mixed.size // p.used * p.used].reshape(-1, p.used)

    def make() -> Case:
        w, x = weight(p.type, made), normal(len(chosen), p.used if p.own_x else 1, k)
        routing = Routing(mx.array(chosen), made[0])

        def reference() -> mx.array:
            each = np.array(mx.broadcast_to(x, (*chosen.shape, k))).reshape(-1, k)
            found = np.zeros((chosen.size, made[1]), np.float32)
            for e in np.unique(chosen).tolist():  # not all: MLX on CUDA crashes over a product of no rows
                one = w[e : e + 1]
                plain = formats.dequantize(one, mx.float32) if isinstance(one, Packed) else one.astype(mx.float32)
                rows = chosen.reshape(-1) == e
                found[rows] = np.array(mx.array(each[rows]) @ plain[0].T)
            y = mx.array(found.reshape(*chosen.shape, -1))
            return stock.geglu(*mx.split(y, 2, axis=-1)) if p.glu else y

        return Case(lambda launcher: grouped.grouped(launcher, x, w, routing, p.glu), reference, w.nbytes + x.nbytes)

    name = f"grouped {p.type}" if p.type in FORMATS else "grouped"
    return Check(name, f"{n}x{k}, {chosen.size} rows" + " glu" * p.glu, make)


def _pack(type: str) -> Check:
    layout = FORMATS[type].layout
    blocks = (1 << (14 if on_cpu() else 24)) // layout.size

    def make() -> Case:
        raw = _random(blocks * layout.n_bytes)

        def reference() -> list[mx.array]:
            w = formats.pack_on_cpu(np.array(raw), type, (blocks, layout.size))
            return [a.reshape(-1) for a in (w.codes, w.group_scales, w.block_scales) if a is not None]

        return Case(
            lambda launcher: tuple(pack.pack_blocks(launcher, raw, type).values()),
            lambda: tuple(reference()),
            2 * raw.nbytes,
            lambda made: [a.view(mx.uint16) if a.dtype == mx.float16 else a for a in made],  # to the bit
        )

    return Check(f"pack {type}", f"{blocks} blocks", make)


def state_dtype() -> mx.Dtype:
    """Of keys and values, as `Model.new_state` has them."""
    return mx.float32 if on_cpu() else mx.float16


def _wavelengths(dim: int, window: int) -> mx.array:
    """Of RoPE: a global head turns only in part."""
    turns = mx.arange(dim // 2) < (dim // 2 if window else dim // 8)
    return mx.where(turns, 10000 ** (mx.arange(dim // 2) * 2 / dim), mx.inf)


def _rotations(dim: int, window: int) -> Check:
    def make() -> Case:
        position, wavelengths = mx.array([POSITION], mx.int32), _wavelengths(dim, window)
        return Case(
            lambda launcher: qkv.rotations(launcher, position, wavelengths, tokens=1),
            lambda: qkv.rotations_reference(position, wavelengths, tokens=1),
            3 * wavelengths.nbytes,
        )

    return Check("rotations", f"heads of {dim}, {'sliding' if window else 'global'}", make)


def _qkv_post(h: Heads) -> Check:
    def make() -> Case:
        dtype, dim = state_dtype(), h.dim
        behind = {"kv": 2, "k": 1, "": 0}[h.joined] * h.kv_heads if h.has_kv else 0
        q = normal(1, (h.heads + behind) * dim)
        apart = [h.joined == "" and h.has_kv, h.joined != "kv" and not h.v_is_k and h.has_kv]
        k, v = (normal(1, h.kv_heads * dim) if there else None for there in apart)
        rope = qkv.rotations_reference(mx.array([POSITION], mx.int32), _wavelengths(dim, h.window), tokens=1)
        tail = tuple(normal(1, h.kv_heads, attention.TAIL, dim, dtype=dtype) for _ in "kv") if h.has_kv else None
        norms = (1 + normal(dim) * 0.1, 1 + normal(dim) * 0.1 if h.has_kv else None)
        count = mx.array([COUNT], mx.int32) if tail else None
        arguments: tuple[Any, ...] = (q, k, v, *norms, rope, tail, count)
        options: dict[str, Any] = {"heads": h.heads, "kv_heads": h.kv_heads, "eps": EPS, "dtype": dtype}
        options |= {"value_norm": h.value_norm, "v_is_k": h.v_is_k}
        old = sum(a.nbytes for a in tail) // attention.TAIL if tail else 0
        return Case(
            lambda launcher: qkv.qkv_post(launcher, *arguments, **options),
            lambda: qkv.qkv_post_reference(*arguments, **options),
            q.nbytes + h.heads * dim * dtype.size + old * (2 * COUNT + 1),
            lambda made: [made[0], *(a[..., : COUNT + 1, :] for a in made[1:])],
        )

    kinds = ("q alone" if not h.has_kv else f"q+{h.joined} joined" if h.joined else "q k v") + ", k=v" * h.v_is_k
    raw = "" if h.value_norm else ", raw v"
    return Check("qkv_post", f"{h.heads}/{h.kv_heads} heads of {h.dim}, {kinds}{raw}", make)


def _attention(h: Heads, length: int) -> Check:
    def make() -> Case:
        dtype = state_dtype()
        # What is sealed, with a few tokens that have left the window, and the tail.
        sealed = [(length, 3, length)] if length > COUNT else []
        capacities = [*sealed, (attention.TAIL, 0, COUNT)]
        shapes = [(1, h.kv_heads, n, h.dim) for n, *_ in capacities]
        parts = [(normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)) for shape in shapes]
        spans = mx.array([used for _, *used in capacities], mx.int32)
        q = normal(1, h.heads, h.dim, dtype=dtype) * (1.5 * h.dim**-0.5)
        options: dict[str, Any] = {"scale": 1.0, "window": h.window}
        seen = min(h.window or length, length + COUNT)
        return Case(
            lambda launcher: attention.attention(launcher, q, parts, spans, **options),
            lambda: attention.attention_reference(q, parts, spans, **options),
            seen * h.kv_heads * h.dim * 2 * dtype.size,
        )

    kind = f"window {h.window}" if h.window else f"{length} tokens"
    return Check("attention", f"{h.heads}/{h.kv_heads} heads of {h.dim}, {kind}", make)


def _long_attention(h: Heads) -> Check:
    """`attention` over fp16 as it is where there are many tokens, cut as for many but over fewer."""
    lengths = (300, 128)

    def make() -> Case:
        ends = [*lengths, COUNT]
        shapes = [(1, h.kv_heads, n, h.dim) for n in (*lengths, attention.TAIL)]
        parts = [(normal(*shape, dtype=mx.float16), normal(*shape, dtype=mx.float16)) for shape in shapes]
        spans = mx.array([(3 * (i == 0), end) for i, end in enumerate(ends)], mx.int32)
        q = normal(1, h.heads, h.dim, dtype=mx.float16) * (1.5 * h.dim**-0.5)
        config = long_attention.long_launch_config([32768, attention.TAIL], h.heads // h.kv_heads, h.kv_heads, h.dim)
        return Case(
            lambda launcher: long_attention.long_attention(
                launcher, q, parts, spans, scale=1.0, config=replace(config, share=2)
            ),
            lambda: attention.attention_reference(q, parts, spans, scale=1.0),
            sum(ends) * h.kv_heads * h.dim * 2 * mx.float16.size,
        )

    return Check("attention long", f"{h.heads}/{h.kv_heads} heads of {h.dim}", make)


def _coded_attention(h: Heads, length: int, kind: str, room: int) -> Check:
    """With a tail of so many tokens' room: of a state, or of a replayed step, which is cut into pieces."""
    used = room // 2 + COUNT

    def make() -> Case:
        dtype, rotation = state_dtype(), quantization.rotations(h.dim, center=normal(h.kv_heads, h.dim))
        ends = [length // 2, length - length // 2]
        plain = [(normal(1, h.kv_heads, n, h.dim, dtype=dtype), normal(1, h.kv_heads, n, h.dim)) for n in ends]
        quantized = [quantization.quantize(k, v, rotation, kind) for k, v in plain]
        shape, spans = (1, h.kv_heads, room, h.dim), mx.array([[0, used]], mx.int32)
        tail = (normal(*shape, dtype=dtype), normal(*shape, dtype=dtype))
        q = normal(1, h.heads, h.dim, dtype=dtype) * (1.5 * h.dim**-0.5)
        options: dict[str, Any] = {"scale": 1.0}
        return Case(
            lambda launcher: quantized_attention.quantized_attention(
                launcher, q, quantized, rotation, tail, spans, **options
            ),
            lambda: quantized_attention.quantized_attention_reference(q, quantized, rotation, tail, spans, **options),
            sum(a.nbytes for part in quantized for a in part) + sum(a.nbytes for a in tail) * used // room,
        )

    return Check("quantized_attention", f"{h.heads}/{h.kv_heads} heads of {h.dim}, {length} tokens in {kind}", make)


def _encode(h: Heads, kind: str) -> Check:
    def make() -> Case:
        rotation, dtype = quantization.rotations(h.dim, center=normal(h.kv_heads, h.dim)), state_dtype()
        shape = (1, h.kv_heads, attention.TAIL, h.dim)
        k, v = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)

        def lengths(made: Sequence[mx.array]) -> Sequence[mx.array]:
            """Of what was decoded, along what was encoded: a number on the edge of two levels may take either."""
            pairs = zip(
                quantization.dequantize((made[0], made[1]), rotation),
                quantization.rotate_pair(k, v, rotation),
                strict=True,
            )
            return [(a * b).sum(axis=-1) / (b * b).sum(axis=-1) for a, b in pairs]

        return Case(
            lambda launcher: quantize_kv.quantize_kv(launcher, k, v, rotation, kind),
            lambda: quantization.quantize(k, v, rotation, kind),
            k.nbytes + v.nbytes,
            lengths,
        )

    return Check("quantize_kv", f"{h.kv_heads} heads of {h.dim} to {kind}", make)


def _add_norm(k: int, scaled: bool, used: int) -> Check:
    def make() -> Case:
        x, h, post = normal(1, k) * 20, normal(1, k), 1 + normal(k) * 0.1
        options: dict[str, Any] = {"eps": EPS, "scale": mx.array([0.37]) if scaled else None}
        if used:
            share = mx.softmax(normal(1, used), axis=-1)
            options["experts"] = (normal(1, used, k), share, 1 + normal(k) * 0.1, 1 + normal(k) * 0.1)
        options |= {"next_norm": 1 + normal(k) * 0.1, "shrunk": SHRINK, "out": state_dtype()}
        return Case(
            lambda launcher: norms.add_norm(launcher, x, h, post, **options),
            lambda: norms.add_norm_reference(x, h, post, **options),
            4 * k * (5 + (used + 2 if used else 0)) + state_dtype().size * k,
        )

    return Check("add_norm", f"{k}" + ", scaled" * scaled + f", {used} experts" * (used > 0), make)


def _embed(type: str, k: int) -> Check:
    def make() -> Case:
        table, ids = weight(type, (100, k)), mx.array([77], mx.int32)
        return Case(
            lambda launcher: embed.embed(launcher, ids, table, k**0.5),
            lambda: embed.embed_reference(ids, table, k**0.5),
            table.nbytes // 100 + 4 * k,
        )

    return Check("embed", f"{type} {k}", make)


def _ple_inputs(s: Sizes) -> Check:
    def make() -> Case:
        width = s.layers * s.ple
        table, ids, proj = weight(s.ple_table, (100, width)), mx.array([77], mx.int32), normal(1, width)
        norm, factor = 1 + normal(s.ple) * 0.1, s.hidden**-0.5
        return Case(
            lambda launcher: embed.ple_inputs(launcher, ids, proj, norm, table, factor, eps=EPS),
            lambda: embed.ple_inputs_reference(ids, proj, norm, table, factor, eps=EPS),
            table.nbytes // 100 + 8 * width,
        )

    return Check("ple_inputs", f"{s.ple_table} {s.layers}x{s.ple}", make)


def _top_k(experts: int, used: int) -> Check:
    def make() -> Case:
        scores, scale = normal(1, experts) * 3, 1 + normal(experts) * 0.1
        return Case(
            lambda launcher: choose.top_k(launcher, scores, used, scale=scale),
            lambda: choose.top_k_reference(scores, used, scale=scale),
            8 * experts,
        )

    return Check("top_k", f"{used} of {experts}", make)


def _argmax(vocab: int) -> Check:
    def make() -> Case:
        logits = normal(1, vocab)
        return Case(
            lambda launcher: choose.argmax(launcher, logits), lambda: choose.argmax_reference(logits), 4 * vocab
        )

    return Check("argmax", f"{vocab}", make)
