"""A prompt's attention, run by the Metal simulator, against its reference in stock MLX in fp32; its launches, counted.

The same text runs a second time as CUDA has it: its lanes' places, and a product as PTX lays mma.m16n8k16 out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import as_cuda, check, metal, normal, racing
from metal_sim import kernel as simulator

from mlx_gemma4.gpu import render
from mlx_gemma4.kv import quantization
from mlx_gemma4.kv.segments import KVView, SegmentLayout
from mlx_gemma4.ops import stock
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.op import OpKey
from mlx_gemma4.ops.prompt_attention import (
    PROMPT_ATTENTION,
    PromptLaunchConfig,
    prompt_attention,
    prompt_attention_reference,
    supports,
)
from mlx_gemma4.ops.tuning import Tuning

WHOLE = PromptLaunchConfig(1, 1e13)  # one launch for all queries, and the length is never split
DIMS = [64, 128, 256, 512]
KINDS = ["full", "q8", "tq4"]


def parts_of(heads: int, dim: int, lengths: Sequence[int], kind: str, centered: bool = True) -> list[KVView]:
    """Parts one after the other from position 3 on; all but the last quantized, for such a kind."""
    center = normal(heads, dim, seed=5) * 0.5 if centered else None
    rotation = quantization.rotations(dim, 1 + 0.1 * normal(dim, seed=6), 1 + 0.1 * normal(dim, seed=7), center)
    parts = []
    for i, start in enumerate(accumulate([3, *lengths[:-1]])):
        k, v = (normal(1, heads, lengths[i], dim, dtype=mx.float16, seed=2 * i + n) for n in (1, 2))
        if kind == "full" or i == len(lengths) - 1:
            parts.append(KVView(start, k, v))
        else:
            parts.append(KVView(start, *quantization.quantize(k, v, rotation, kind), rotation))
    return parts


def attend(
    heads: tuple[int, int],
    dim: int,
    tokens: int,
    lengths: Sequence[int],
    kind: str = "full",
    window: int | None = None,
    spans: Sequence[tuple[int, int]] = (),
    launcher: Any = metal,
    config: PromptLaunchConfig = WHOLE,
    factor: float = 1.0,
    parts: list[KVView] | None = None,
) -> mx.array:
    """The last `tokens` tokens attend; those of a span, from and to in these tokens, see each other."""
    parts = parts or parts_of(heads[1], dim, lengths, kind)
    q = normal(1, heads[0], tokens, dim, dtype=mx.float16) * factor
    position = parts[-1].start + lengths[-1] - tokens
    last = np.arange(position, position + tokens)
    for a, b in spans:
        last[a:b] = position + b - 1
    options: dict[str, Any] = {"scale": 1.3 * dim**-0.5, "position": position, "window": window}
    options["last"] = mx.array(last) if spans else None
    got = prompt_attention(launcher, q, parts, config=config, **options)
    wide = [p if p.rotation is not None else KVView(p.start, *(a.astype(mx.float32) for a in p[1:3])) for p in parts]
    check(got, prompt_attention_reference(q.astype(mx.float32), wide, **options), mx.float16, factor=1.5)
    return got


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", DIMS)
def test_random_shapes(dim: int, kind: str) -> None:
    """Tokens, heads, parts, windows and spans that see each other, at random: none is a constant of the text."""
    rng = np.random.default_rng([dim, len(kind)])
    for _ in range(2 if dim == 512 else 3):
        gqa, kv_heads = int(rng.choice([1, 2, 3, 4, 5, 8, 16])), int(rng.integers(1, 3))
        tokens = int(rng.integers(1, 71 if gqa < 5 else 14))
        lengths = [int(n) for n in rng.integers(4, 180, rng.integers(0, 4))] + [tokens + int(rng.integers(0, 70))]
        window = int(rng.integers(1, 150)) if kind == "full" and rng.random() < 0.6 else None
        cuts = sorted(rng.choice(tokens + 1, min(tokens + 1, 4), replace=False).tolist())
        spans = list(zip(cuts[::2], cuts[1::2], strict=False)) if rng.random() < 0.5 else []
        attend((gqa * kv_heads, kv_heads), dim, tokens, lengths, kind, window, spans)


@pytest.mark.parametrize("gqa", [1, 2, 3, 4, 5, 8, 16])
def test_heads_share_keys(gqa: int) -> None:
    attend((2 * gqa, 2), 64, 9, [20, 30])
    attend((gqa, 1), 512, 3, [20, 7])


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 64, 70])
def test_tokens_at_the_edges_of_tiles(tokens: int) -> None:
    attend((1, 1), 64, tokens, [64, tokens])
    attend((2, 1), 256, tokens, [tokens + 1])


@pytest.mark.parametrize("length", [1, 15, 16, 17, 127, 128, 129, 256, 257])
def test_lengths_at_the_edges_of_blocks(length: int) -> None:
    attend((2, 1), 128, 1, [length])
    attend((8, 4), 128, 2, [length, 2], "q8")


@pytest.mark.parametrize("window", [1, 5, 40, 64, 100, 300])
def test_windows(window: int) -> None:
    """Within the new tokens, across parts, and beyond all; first parts that no row or only some rows see."""
    attend((2, 1), 256, 50, [60, 5, 90], window=window)
    attend((2, 1), 64, 40, [30, 64, 64], window=window, spans=[(3, 20), (38, 40)])


def test_keys_that_no_row_sees_are_not_read() -> None:
    parts = parts_of(1, 64, [200, 64, 70], "full")
    unseen = mx.array(float("nan"), mx.float16)
    first = parts[0]
    parts[0] = KVView(first.start, *(mx.full(a.shape, unseen) for a in first[1:3]))
    cut = (mx.arange(64) < 5)[:, None]  # the first row's window begins at the sixth
    parts[1] = KVView(parts[1].start, *(mx.where(cut, unseen, a) for a in parts[1][1:3]))
    got = prompt_attention(
        metal, normal(1, 2, 20, 64, dtype=mx.float16), parts, scale=1.0, position=parts[2].start + 50, window=110
    )
    assert mx.isfinite(got).all().item()


def test_a_row_that_sees_nothing_of_the_first_launch() -> None:
    """Nine parts are two launches; the first one's are before the window of the later rows."""
    attend((2, 1), 64, 60, [10] * 8 + [60], window=30)
    attend((4, 1), 256, 60, [10] * 8 + [60], window=30)


@pytest.mark.parametrize("kind", KINDS)
def test_more_parts_than_a_launch_takes(kind: str) -> None:
    attend((4, 2), 128, 9, [33, 8, 64, 5, 70, 20, 9, 40, 31, 16], kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cores", [2, 7, 132])
def test_few_queries_split_the_length(cores: int, kind: str) -> None:
    config = PromptLaunchConfig(cores, 1e13)
    attend((2, 1), 64, 5, [1500, 64, 700, 15], kind, config=config)
    attend((2, 1), 512, 3, [1100, 40], kind, config=config)


@pytest.mark.parametrize("operations", [1e4, 2e6, 4e6])
def test_several_launches_share_the_queries(operations: float) -> None:
    config = PromptLaunchConfig(1, operations)
    attend((6, 2), 64, 40, [50, 60], spans=[(5, 33)], config=config)
    attend((6, 2), 64, 40, [50, 60], "q8", config=config)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_far_apart(kind: str) -> None:
    """Scores in the hundreds: the running maximum must carry them, across blocks and launches."""
    attend((4, 1), 64, 20, [300, 20], kind, factor=40.0 if kind == "full" else 4.0)  # rotated queries round to halves


def test_a_rotation_without_centers() -> None:
    for kind in ("q8", "tq4"):
        attend((2, 1), 64, 7, [90, 20], parts=parts_of(1, 64, [90, 20], kind, centered=False))


@pytest.mark.parametrize(("dim", "kind"), [(512, "full"), (512, "q8"), (512, "tq4"), (256, "full"), (64, "tq4")])
def test_as_cuda(dim: int, kind: str) -> None:
    """The sums of what Metal's places give, in another order."""
    got = [attend((3, 1), dim, 5, [40, 9], kind, spans=[(1, 4)], launcher=launcher) for launcher in (metal, as_cuda)]
    assert np.abs(np.array(got[0]) - np.array(got[1])).max() <= 1e-4


def rendered() -> Iterator[render.Kernel]:
    """The texts of a real model: D 512 in three kinds, and D 256."""
    seen: dict[str, render.Kernel] = {}

    def keeping(**declared: Any) -> Any:
        kernel = render.Kernel(**{k.replace("_names", "s"): v for k, v in declared.items()})
        seen[kernel.name] = kernel
        return metal(**declared)

    for dim, kind in [(512, "full"), (512, "q8"), (512, "tq4"), (256, "full")]:
        attend((2, 1), dim, 2, [20, 9], kind, launcher=keeping)
    yield from seen.values()


def test_the_text_becomes_cuda_whole() -> None:
    found = list(rendered())
    assert len(found) == 4
    for kernel in found:
        source, header = render.to_cuda_text(kernel.source, kernel.header)
        for text in (source, header[len(render._text("cuda.h")) :]):
            assert not re.search(r"\b(device|constant|threadgroup|thread)\b(?! *\()", text)
        shared = re.findall(r"(?m)^ *__shared__ (\w+ \w+)", source)
        levels = "#define BITS 4\n" in kernel.header  # a table for them, which Metal alone has
        assert len(shared) == len(re.findall(r"\nthreadgroup \w+ ", kernel.source)) == 6 + levels


def test_threadgroup_memory_and_threads() -> None:
    """At most 32 KB and 256 threads; the simulator refuses more than Metal has, this is what the tiling promises."""
    for kernel in rendered():
        constants = dict(re.findall(r"#define (\w+) (\d+)\n", kernel.header))
        dim, sg, tiles, bits = (int(constants[name]) for name in ("D", "SG", "TILES", "BITS"))
        rows = 8 * tiles
        used = 2 * dim * rows + 32 * sg * rows + 4 * sg * rows + 12 * rows + (1024 if bits == 4 else 0)
        assert used <= 26 << 10 and 32 * sg == 256
        assert dim * rows // (32 * sg) == 32 and dim * rows * 2 >= 8 * dim * 4  # sums a lane; room for eight rows


class Planned:
    """A launcher that computes nothing and counts what its launches would take."""

    def __init__(self) -> None:
        self.texts: set[str] = set()
        self.launches = 0
        self.bytes = 0  # of all results

    def __call__(self, **declared: Any) -> Any:
        self.texts.add(declared["name"])

        def call(*, output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
            made = [mx.zeros(s, t) for s, t in zip(output_shapes, output_dtypes, strict=True)]
            self.launches += 1
            self.bytes += sum(a.nbytes for a in made)
            return made

        return call


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_of_31b_behind_128k(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of at most 0.5 s on a base M1, two or three texts, and no memory beyond a few times the result."""
    monkeypatch.setattr(mx, "async_eval", lambda *_: None)
    planned, tokens, length, rotation = Planned(), 1024, 131072, mx.zeros((2, 512))
    bits = quantization.BITS.get(kind, 16)
    parts, start = [], 0
    for end in [*SegmentLayout().ends(length), length + tokens]:
        if kind == "full" or end > length:
            parts.append(KVView(start, *(mx.zeros((1, 4, end - start, 512), mx.float16) for _ in "kv")))
        else:
            shape = (1, 4, end - start, 2)
            codes, scales = mx.zeros((*shape, 512 * bits // 32), mx.uint32), mx.zeros(shape, mx.float16)
            parts.append(KVView(start, codes, scales, rotation))
        start = end
    q = mx.zeros((1, 32, tokens, 512), mx.float16)
    out = prompt_attention(planned, q, parts, scale=1.0, position=length)
    assert out.shape == (tokens, 32 * 512)
    operations = 4 * 32 * 512 * tokens * (length + tokens)
    assert operations / (planned.launches / (1 if kind == "full" else 2)) / 2.6e12 <= 0.5
    assert len(planned.texts) == (1 if kind == "full" else 2)
    assert planned.bytes + out.nbytes <= 250e6


# ---------------------------------------------------------------- who runs it


def test_what_it_supports() -> None:
    def asked(dim: int, kind: str = "full", dtype: mx.Dtype = mx.float16) -> bool:
        return supports(mx.zeros((1, 2, 3, dim), dtype), parts_of(1, dim, [64, 9], kind))

    assert all(asked(dim, kind) for dim in DIMS for kind in KINDS)
    assert asked(32) and asked(32, "q8") and not asked(32, "tq4")
    assert not asked(80) and not asked(64, dtype=mx.float32)


@pytest.mark.parametrize("how", ["works", "fails", "is off", "is off for fp16", "is not wanted here"])
def test_kernels_run_it(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it fails or is off, its reference runs; a kind of quantized KV that fails leaves fp16 on."""
    launched = []

    def counting(**declared: Any) -> Any:
        launched.append(declared["name"].rsplit("_", 1)[0])
        if how == "fails":
            raise RuntimeError("no such function")
        return metal(**declared)

    if how == "is not wanted here":
        monkeypatch.setattr("mlx_gemma4.ops.dispatch.this_gpu", Tuning)
    off = {"is off": OpKey("prompt_attention", "q8"), "is off for fp16": OpKey("prompt_attention", "full")}
    run = Kernels(counting, frozenset([off[how]] if how in off else []))
    q, options = normal(1, 4, 9, 64, dtype=mx.float16), {"scale": 0.1, "position": 94, "window": None}
    for kind in ("q8", "full"):
        parts = parts_of(2, 64, [80, 20], kind)
        got = run.prompt_attention(q, parts, **options)
        check(got, prompt_attention_reference(q, parts, **options), mx.float16, factor=2)
    names = {"works": 3, "fails": 2, "is off": 1, "is off for fp16": 0, "is not wanted here": 0}
    assert launched == ["prompt_attention"] * names[how] or how == "works"
    assert (len(launched) > 0) == (names[how] > 0)
    both = {OpKey("prompt_attention", kind) for kind in ("q8", "full")}
    assert run.off == (both if how == "fails" else {off[how]} if how in off else set())


def test_the_reference_takes_few_queries_at_a_time_on_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that its scores stay small; the result is what all at once give."""
    parts = parts_of(2, 64, [70, 64, 40], "full")
    q, last = normal(1, 4, 33, 64, dtype=mx.float16), mx.arange(144, 177) // 4 * 4 + 3
    options: dict[str, Any] = {"scale": 0.2, "position": 144, "window": 90, "last": last}
    want = PROMPT_ATTENTION.reference(q, parts, **options)
    monkeypatch.setattr(stock, "on_cpu", lambda: False)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    sizes = []
    mask = stock._mask
    monkeypatch.setattr(stock, "_mask", lambda t, *rest: sizes.append(t) or mask(t, *rest))
    monkeypatch.setattr(stock, "SCORE_BYTES", 4 * 4 * 174 * 10)
    check(PROMPT_ATTENTION.reference(q, parts, **options), want, mx.float16)
    assert sizes == [10] * 9 + [3] * 3


@pytest.mark.sanitize
@pytest.mark.parametrize("how", ["thread", "address"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", DIMS)
def test_no_races_and_no_access_out_of_bounds(dim: int, kind: str, how: str) -> None:
    def bounds(**declared: Any) -> Any:
        kernel = simulator(**declared)
        return lambda **arguments: [mx.array(a) for a in kernel(seed=2, sanitize="address", **arguments)]

    launcher = racing if how == "thread" else bounds
    attend((6, 2), dim, 5, [130, 17, 9], kind, launcher=launcher)
    attend((4, 1), dim, 7, [20, 9], kind, 12 if kind == "full" else None, [(2, 6)], launcher)
    attend((1, 1), dim, 2, [600, 9], kind, launcher=launcher, config=PromptLaunchConfig(3, 1e13))
