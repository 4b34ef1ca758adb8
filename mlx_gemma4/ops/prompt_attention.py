"""Attention of a prompt's tokens over keys and values in parts: prompt_attention.metal and its reference.

In and out: MLX arrays, for any number of tokens. No matrix of scores is made, and no part is copied. Knows no model and
no KV state.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, gcd
from typing import Any

import mlx.core as mx

from ..gpu.render import DEVICE_ELEMENTS, Launcher, prepare, render
from ..kv import quantization
from ..kv.segments import KVView
from . import stock
from .cases import Case, Check, Heads, Sizes, cases, normal, random_kv
from .op import Op, OpKey
from .parts import MAX_PARTS, all_parts
from .quantize_kv import code_book
from .tuning import this_gpu

DIMS = (32, 64, 128, 256, 512)
EVERYTHING = 1 << 30  # a window that leaves nothing out


@dataclass(frozen=True)
class PromptLaunchConfig:
    """How much one launch does; the results are the same."""

    threadgroups: int  # with fewer than these for a launch, the length is split
    operations: float  # multiplications and additions of a launch, at most


def tiling(dim: int, bits: int) -> tuple[int, int]:
    """Simdgroups of a threadgroup, and its tiles of 8 queries, for numbers of `bits` (16: fp16).

    8 lanes of a simdgroup have a word of every value each. A lane has at most 32 sums, and queries take at most half of
    the threadgroup memory; expanding codes takes registers that two more tiles would need. See prompt_attention.metal.
    """
    simdgroups = min(8, dim * bits // 256)
    return simdgroups, min(4 if bits == 16 else 2, 128 * simdgroups // dim)


def takes(dim: int, bits: int) -> bool:
    """Returns True for heads of this size with numbers of `bits` (16: fp16)."""
    return dim in DIMS and dim * bits >= 256


def supports(q: mx.array, parts: Sequence[KVView]) -> bool:
    """Returns True if `prompt_attention` takes queries [1, H, T, D] and parts like these."""
    dim = q.shape[-1]
    bits = [16 if part.rotation is None else quantization.bits_of((part.keys, part.values), dim) for part in parts]
    return (
        q.dtype == mx.float16 and takes(dim, min(bits)) and all(part.values.size >= DEVICE_ELEMENTS for part in parts)
    )


def prompt_attention(
    launcher: Launcher,
    q: mx.array,
    parts: Sequence[KVView],
    *,
    scale: float,
    position: int,
    window: int | None = None,
    last: mx.array | None = None,
    config: PromptLaunchConfig | None = None,
) -> mx.array:
    """`stock.attention` by one kernel, with its arguments.

    Args:
        q: fp16 [1, H, T, D].
        parts: in fp16 or quantized; positions ascend.
        config: in place of this GPU's.

    Returns:
        fp32 [T, H D]
    """
    _, heads, tokens, dim = q.shape
    kv_heads, gpu = parts[0].keys.shape[1], this_gpu()
    config = config or PromptLaunchConfig(gpu.cores, gpu.launch_operations)
    q = q.reshape(heads, tokens, dim)
    if last is None:
        last = mx.arange(position, position + max(tokens, DEVICE_ELEMENTS), dtype=mx.int32)
    else:  # fewer would lie in another address space, and need another kernel
        last = mx.pad(last.astype(mx.int32), (0, max(0, DEVICE_ELEMENTS - tokens)))
    length = sum(part.keys.shape[2] for part in parts)
    length = min(length, window) if window else length
    launches = ceil(tokens * 4 * heads * dim * length / config.operations)
    rows = 8 * tiling(dim, 16)[1]
    step = rows // gcd(rows, heads // kv_heads)  # tokens that fill whole threadgroups
    count = ceil(tokens / launches / step) * step
    made = []
    for first in range(0, tokens, count):
        queries = (first, min(count, tokens - first), position, window or EVERYTHING)
        made.append(_some(launcher, q, last, parts, queries, scale, config))
        if count < tokens:
            mx.async_eval(made[-1])  # a command buffer of its own: macOS stops those that take seconds
    return made[0] if len(made) == 1 else mx.concatenate(made)


def _some(
    launcher: Launcher,
    q: mx.array,
    last: mx.array,
    parts: Sequence[KVView],
    queries: tuple[int, int, int, int],
    scale: float,
    config: PromptLaunchConfig,
) -> mx.array:
    """`prompt_attention` of some queries, [count, H D]: a launch for each MAX_PARTS parts of a kind."""
    (heads, tokens, dim), kv_heads, (_, count, _, window) = q.shape, parts[0].keys.shape[1], queries
    kinds = [[part for part in parts if part.rotation is not None], [part for part in parts if part.rotation is None]]
    groups = [kind[i : i + MAX_PARTS] for kind in kinds for i in range(0, len(kind), MAX_PARTS)]
    carried: Sequence[Any] = [mx.array([0.0] * DEVICE_ELEMENTS)] * 2
    pieces = 0  # in `carried`
    while groups or pieces != 1:
        group = groups.pop(0) if groups else []
        rotation = group[0].rotation if group else None
        bits = 16 if rotation is None else quantization.bits_of((group[0].keys, group[0].values), dim)
        simdgroups, tiles = tiling(dim, bits)
        defines: dict[str, Any] = {"D": dim, "BITS": bits, "SG": simdgroups, "TILES": tiles}
        defines |= {"SCALE": float(scale), "CENTERED": rotation is not None and rotation.shape[0] > 2, **code_book()}
        absent = ["rotation"] if rotation is None else []
        kernel = render("prompt_attention", "prompt_attention.metal", mx.float16, defines, absent)
        across, all_across = (ceil(n * (heads // kv_heads) / (8 * tiles)) for n in (count, tokens))
        # Few queries over many keys: pieces of at least four blocks, as many as give all of the GPU work.
        length = min(window, sum(part.keys.shape[2] for part in group))
        split = min(ceil(config.threadgroups / (all_across * kv_heads)), max(1, length // (64 * simdgroups)))
        settings = [*queries, pieces, int(not groups and split == 1), len(group), 0]
        there = group or [parts[-1]]
        for part in [*there, *there[:1] * (MAX_PARTS - len(there))]:
            settings += [part.start, part.keys.shape[2]]
        shapes = [((count * heads, split, n), mx.float32) for n in (dim, 2)]
        launch = prepare(launcher, kernel, (across, split, kv_heads), 32 * simdgroups, *shapes)
        arrays = [] if rotation is None else [rotation]
        # Slices of a segment are copied here, once: MLX would copy them for each input, and most are absent parts.
        pairs = [[mx.contiguous(a.reshape(kv_heads, *a.shape[2:])) for a in (p.keys, p.values)] for p in there]
        arrays += all_parts([(k, v) for k, v in pairs])
        carried = launch(q, last, mx.array(settings, mx.int32), *carried, *arrays)
        pieces = split
    sums: mx.array = carried[0]
    return sums.reshape(count, heads * dim)


def prompt_attention_reference(
    q: mx.array,
    parts: Sequence[KVView],
    *,
    scale: float,
    position: int,
    window: int | None = None,
    last: mx.array | None = None,
    together: int = 1,
) -> mx.array:
    """`prompt_attention` in stock MLX: in q's dtype but for the scores. `together`: `stock.attention`."""
    x = stock.attention(q, parts, scale, position, window, last, together)
    return x.astype(mx.float32).swapaxes(1, 2).reshape(q.shape[2], -1)


PROMPT_ATTENTION = Op("prompt_attention", prompt_attention, prompt_attention_reference)


def keys_of(parts: Sequence[KVView], dim: int) -> list[OpKey]:
    """What attention over parts like these consists of, as it is switched off: a variant for each kind of KV."""
    kinds = {bits: kind for kind, bits in quantization.BITS.items()}
    bits = {quantization.bits_of((p.keys, p.values), dim) for p in parts if p.rotation is not None}
    return [OpKey(PROMPT_ATTENTION.name, kind) for kind in ["full", *(kinds[b] for b in sorted(bits))]]


@cases
def prompt_attention_cases(s: Sizes) -> Iterator[Check]:
    """A few tokens, two of which see each other, behind two parts; numbers of heads are no constants of the text."""

    def make(h: Heads, kind: str) -> Case:
        group, tokens = h.heads // h.kv_heads, 7
        h = replace(h, heads=2 * group, kv_heads=2)
        parts, start = [], 0
        rotation = quantization.rotations(h.dim, center=normal(h.kv_heads, h.dim))
        for n in (150, 70, 30 + tokens):
            k, v = random_kv(h, n, mx.float16)
            plain = kind == "full" or start == 220
            codes = (k, v) if plain else quantization.quantize(k, v, rotation, kind)
            parts.append(KVView(start, *codes, None if plain else rotation))
            start += n
        position = start - tokens
        q = normal(1, h.heads, tokens, h.dim, dtype=mx.float16) * (1.5 * h.dim**-0.5)
        last = mx.array([position + max(i, 4 * (i in (3, 4))) for i in range(tokens)], mx.int32)
        options: dict[str, Any] = {"scale": 1.0, "position": position, "window": 100 if h.window else None}
        options["last"] = last
        wide = [
            p if p.rotation is not None else KVView(p.start, *(a.astype(mx.float32) for a in p[1:3])) for p in parts
        ]
        return Case(
            lambda launcher: prompt_attention(launcher, q, parts, **options),
            partial(prompt_attention_reference, q.astype(mx.float32), wide, **options),
            sum(a.nbytes for p in parts for a in p[1:3]),
        )

    for h in dict.fromkeys(s.heads):
        for kind in ("full",) if h.window else quantization.KINDS:
            if h.dim in DIMS and h.dim * quantization.BITS.get(kind, 16) >= 256:
                seen = f"a window of {h.window}" if h.window else "all tokens"
                yield Check(OpKey(PROMPT_ATTENTION.name, kind), f"{h}, {seen}", partial(make, h, kind))
