"""Attention over long keys and values on matrix units, run by the Metal simulator, against the reference in stock MLX.

The same text runs a second time as CUDA has it: its lanes' places, and a product as PTX lays mma.m16n8k16 out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import mlx.core as mx
import pytest
from kernel_cases import as_cuda, check, metal, normal, racing

from mlx_gemma4.kv.segments import SegmentLayout
from mlx_gemma4.ops import attention, long_attention
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.long_attention import LongLaunchConfig, long_launch_config
from mlx_gemma4.ops.parts import span_rows
from mlx_gemma4.ops.tuning import Tuning


def attend(
    heads: tuple[int, int],
    dim: int,
    parts: Sequence[tuple[int, int, int]],
    tokens: int = 1,
    config: LongLaunchConfig | None = None,
    launcher: Any = metal,
    factor: float = 1.0,
    **options: Any,
) -> None:
    """Attention over parts (capacity, start, end); what lies outside of start and end is NaN."""
    h, g = heads
    q, made = normal(tokens, h, dim, dtype=mx.float16) * factor, []
    for i, (capacity, start, end) in enumerate(parts):
        used = (mx.arange(capacity) >= start) & (mx.arange(capacity) < end)
        kv = (normal(1, g, capacity, dim, dtype=mx.float16, seed=2 * i + n) for n in (1, 2))
        k, v = (mx.where(used[:, None], a, mx.array(float("nan"), mx.float16)) for a in kv)
        made.append((k, v))
    spans = span_rows(p[1:] for p in parts)
    options = {"scale": 1.3 * dim**-0.5, "out": mx.float32, **options}
    got = long_attention.long_attention(launcher, q, made, spans, config=config, **options)
    check(got, attention.attention_reference(q, made, spans, **options), mx.float16)


LAUNCHERS = pytest.mark.parametrize("launcher", [metal, as_cuda], ids=["metal", "cuda"])


@LAUNCHERS
@pytest.mark.parametrize("dim", [64, 128, 192, 256, 320, 512])
def test_head_sizes(dim: int, launcher: Any) -> None:
    attend((4, 2), dim, [(200, 0, 193), (64, 0, 5)], launcher=launcher)


@pytest.mark.parametrize("gqa", [1, 2, 3, 4, 8, 16])
def test_heads_share_keys(gqa: int) -> None:
    attend((2 * gqa, 2), 64, [(80, 3, 78)])
    attend((gqa, 1), 512, [(200, 3, 178), (64, 0, 9)], config=LongLaunchConfig(8, 1 + (gqa > 8), 1))


@LAUNCHERS
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8])
def test_few_tokens(tokens: int, launcher: Any) -> None:
    attend((6, 2), 64, [(96, 2, 96), (64, 0, 8)], tokens, launcher=launcher)
    attend((8, 1), 256, [(130, 100, 130), (64, 0, 60)], tokens, launcher=launcher)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256])
def test_lengths_at_the_edges(count: int) -> None:
    attend((2, 1), 128, [(256, 0, count)])
    attend((2, 1), 128, [(256, 256 - count, 256), (64, 0, 1)], config=LongLaunchConfig(2, 1, 2))


def test_eight_parts_of_which_some_are_empty() -> None:
    parts = [(64, 0, 64), (96, 40, 96), (64, 0, 0), (128, 0, 128), (70, 1, 70), (64, 63, 64), (300, 0, 300), (64, 0, 9)]
    for tokens in (1, 3):
        for config in (None, LongLaunchConfig(1, 1, 3), LongLaunchConfig(4, 2, 2, 4)):
            attend((4, 1), 256, parts, tokens, config)


@LAUNCHERS
@pytest.mark.parametrize(
    "config",
    [
        LongLaunchConfig(8, 1, 1),
        LongLaunchConfig(8, 2, 2, 4),
        LongLaunchConfig(4, 1, 3, 16, 1),
        LongLaunchConfig(4, 2, 1, 4, 3),
        LongLaunchConfig(1, 1, 9, 4, 1),
    ],
    ids=str,
)
def test_configurations(config: LongLaunchConfig, launcher: Any) -> None:
    attend((16, 1), 512, [(300, 5, 300), (64, 0, 33)], config=config, launcher=launcher)


@LAUNCHERS
def test_scores_far_apart(launcher: Any) -> None:
    """Scores in the hundreds: the running maximum must carry them."""
    attend((4, 1), 64, [(300, 0, 300)], launcher=launcher, factor=40.0)


def test_another_dtype_and_arrays_without_a_batch() -> None:
    attend((2, 1), 64, [(90, 0, 90)], out=mx.float16)
    attend((2, 1), 64, [(90, 0, 90)], out=mx.bfloat16)
    q, k, v = (normal(*s, dtype=mx.float16) for s in ((1, 2, 64), (1, 1, 70, 64), (1, 1, 70, 64)))
    spans = span_rows([(0, 70)])
    got = [long_attention.long_attention(metal, q, [part], spans, scale=1.0) for part in ((k, v), (k[0], v[0]))]
    assert mx.array_equal(*got)


@pytest.mark.parametrize("length", [2048, 5000, 8192, 32768, 40000, 131072, 262144])
@pytest.mark.parametrize("heads", [(32, 4), (16, 2), (16, 1), (8, 1), (8, 2), (32, 16)])
def test_one_wave(heads: tuple[int, int], length: int) -> None:
    ends = [0, *SegmentLayout().ends(length - 33)]
    parts = (*(b - a for a, b in pairwise(ends)), 64)
    config = long_launch_config(parts, heads[0] // heads[1], 1, heads[1], 512)
    assert config.pieces(parts) * heads[1] <= 2 * Tuning().cores
    if config.share > 1:
        assert replace(config, share=config.share - 1).pieces(parts) * heads[1] > 2 * Tuning().cores
    if length > 30000 and heads[1] < 16:  # nearly all of the GPU has work, and as much
        assert config.share * config.pieces(parts) * heads[1] / (2 * Tuning().cores) > 0.9 * config.share * (
            length != 40000
        )


@pytest.mark.parametrize("how", ["works", "fails", "is off"])
def test_attention_takes_it_for_long_contexts(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it fails or is off, the kernel for fewer tokens does its work, not the reference."""
    launched = []

    def counting(**declared: Any) -> Any:
        launched.append(declared["name"].rsplit("_", 1)[0])
        if how == "fails" and launched[-1] == "long_attention":
            raise RuntimeError("no such function")
        return metal(**declared)

    monkeypatch.setattr(long_attention, "LONG", 150)
    q, spans = normal(1, 4, 64, dtype=mx.float16), span_rows([(0, 100), (0, 20)])
    parts = [(normal(1, n, 64, dtype=mx.float16, seed=n), normal(1, n, 64, dtype=mx.float16)) for n in (100, 64)]
    key = attention.LONG_ATTENTION.key
    run = Kernels(counting, frozenset([key] if how == "is off" else []))
    got = run.attention(q, parts, spans, scale=0.1, window=0)
    assert (
        launched
        == {
            "works": ["long_attention", "merge"],
            "fails": ["long_attention", "attention", "merge"],
            "is off": ["attention", "merge"],
        }[how]
    )
    assert run.off == (set() if how == "works" else {key}) and str(key) == "long_attention"
    check(got, attention.attention_reference(q, parts, spans, scale=0.1), mx.float16)
    launched.clear()
    run.attention(q, parts, spans, scale=0.1, window=50)
    run.attention(q, parts[:1], span_rows([(0, 100)]), scale=0.1, window=0)
    fp32 = [(k.astype(mx.float32), v.astype(mx.float32)) for k, v in parts]
    run.attention(q.astype(mx.float32), fp32, spans, scale=0.1, window=0)
    assert "long_attention" not in launched


@pytest.mark.sanitize
def test_no_races_and_no_access_out_of_bounds() -> None:
    attend((16, 1), 256, [(100, 0, 90), (64, 0, 20)], tokens=2, launcher=racing)
    attend((4, 1), 512, [(200, 7, 200), (64, 0, 1)], launcher=racing)
    attend((4, 2), 64, [(50, 0, 50), (64, 0, 33)], launcher=racing)
