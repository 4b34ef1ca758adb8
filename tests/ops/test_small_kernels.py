"""The kernels beside the mat-vecs, run by the Metal simulator, against their references in stock MLX.

Outputs start as NaN (or 0xCD bytes): what a kernel leaves unwritten fails. Errors are relative to the largest value.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from blocks import put_scales, random_blocks
from kernel_cases import DTYPES, check, eager, metal, normal, racing

from mlx_gemma4.ops import attention, choose, dense, embed, norms, qkv
from mlx_gemma4.ops.epilogue import Epilogue, Folded, product_reference
from mlx_gemma4.ops.parts import pieces_of, span_rows
from mlx_gemma4.quant import formats

EPS = 1e-6


# ---------------------------------------------------------------- attention


def attend(
    dtype: mx.Dtype,
    heads: tuple[int, int],
    dim: int,
    parts: Sequence[tuple[int, int, int]],
    tokens: int = 1,
    window: int = 0,
    launcher: Any = metal,
    out: mx.Dtype | None = None,
    config: attention.LaunchConfig | None = None,
) -> None:
    """Attention over parts (capacity, start, end); what lies outside of start and end is NaN."""
    h, g = heads
    q = normal(tokens, h, dim, dtype=dtype)
    made = []
    for i, (capacity, start, end) in enumerate(parts):
        used = (mx.arange(capacity) >= start) & (mx.arange(capacity) < end)
        kv = (normal(g, capacity, dim, dtype=dtype, seed=2 * i + n) for n in (1, 2))
        k, v = (mx.where(used[:, None], a, mx.array(float("nan"), dtype)) for a in kv)
        made.append((k, v))
    spans = span_rows(p[1:] for p in parts)
    kwargs: dict[str, Any] = {"scale": 1.3 * dim**-0.5, "window": window, "out": out}
    got = attention.attention(launcher, q, made, spans, config=config, **kwargs)
    check(got, attention.attention_reference(q, made, spans, **kwargs), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gqa", [1, 2, 3, 4, 8, 16])
def test_attention_shares_keys_among_heads(gqa: int, dtype: mx.Dtype) -> None:
    attend(dtype, (2 * gqa, 2), 64, [(80, 3, 78)])


@pytest.mark.parametrize("dim", [32, 96, 256, 512])
@pytest.mark.parametrize("length", [50, 200, 700])
def test_attention_head_sizes(dim: int, length: int) -> None:
    attend(mx.float16, (4, 2), dim, [(length, 0, length - 7)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_in_pieces(dtype: mx.Dtype) -> None:
    attend(dtype, (8, 1), 512, [(1100, 0, 1090), (64, 0, 5)])


@pytest.mark.parametrize(("heads", "dim"), [((8, 1), 256), ((32, 2), 64), ((6, 2), 96)])
def test_attention_model_heads_in_pieces(heads: tuple[int, int], dim: int) -> None:
    attend(mx.float16, heads, dim, [(640, 0, 640), (64, 0, 64)])


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 255, 256, 257, 511, 512])
def test_attention_lengths_at_the_edges(count: int) -> None:
    attend(mx.float32, (2, 1), 32, [(512, 0, count)])


@pytest.mark.parametrize("count", [1, 63, 64, 65, 127, 128, 129, 640, 1023, 1024])
def test_attention_pieces_at_the_edges(count: int) -> None:
    attend(mx.float32, (2, 1), 32, [(1024, 0, count)])


def test_attention_over_eight_parts() -> None:
    parts = [(64, 0, 64), (96, 40, 96), (64, 0, 0), (128, 0, 128), (70, 1, 70), (64, 63, 64), (300, 0, 300), (64, 0, 9)]
    attend(mx.float16, (4, 1), 64, parts)
    attend(mx.float16, (4, 1), 64, parts, tokens=3, window=100)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("window", [0, 20])
def test_attention_few_tokens_under_a_window(tokens: int, window: int) -> None:
    attend(mx.float32, (6, 2), 32, [(96, 2, 96), (64, 0, 8)], tokens, window)
    attend(mx.float32, (6, 2), 32, [(600, 300, 600), (64, 0, 8)], tokens, window)


def test_attention_takes_arrays_with_a_batch_of_one() -> None:
    q, k, v, spans = normal(1, 2, 32), normal(1, 1, 70, 32), normal(1, 1, 70, 32, seed=1), span_rows([(0, 70)])
    got = attention.attention(metal, q, [(k, v)], spans, scale=1.0)
    assert mx.array_equal(got, attention.attention(metal, q, [(k[0], v[0])], spans, scale=1.0))


@pytest.mark.parametrize("window", [1, 90])
def test_attention_windows(window: int) -> None:
    attend(mx.float16, (2, 1), 32, [(96, 2, 96), (64, 0, 8)], 2, window)
    attend(mx.float16, (2, 1), 32, [(600, 300, 600), (64, 0, 8)], 2, window)


CONFIGS = [
    attention.LaunchConfig(2, 1, 2, 40),
    attention.LaunchConfig(4, 8, 3, 999),
    attention.LaunchConfig(3, 2, 1),
    attention.LaunchConfig(8, 4, 2, 1),
    attention.LaunchConfig(5, 2, 2, 9),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_attention_configurations(config: attention.LaunchConfig) -> None:
    attend(mx.float16, (8, 2), 64, [(300, 5, 300), (64, 0, 33)], 2, config=config)
    attend(mx.float32, (4, 1), 96, [(70, 66, 70), (130, 129, 129), (64, 0, 20)], 2, window=15, config=config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (2, 4), (4, 2), (8, 2)])
@pytest.mark.parametrize("dim", [32, 96, 256, 512])
def test_attention_that_loads_all_at_once(dim: int, rows: int, keys: int, dtype: mx.Dtype) -> None:
    config = attention.LaunchConfig(rows, 4, keys, 50)
    attend(dtype, (4, 1), dim, [(90, 80, 90), (64, 0, 64), (64, 0, 9)], 2, window=70, launcher=eager, config=config)


@pytest.mark.parametrize("threadgroups", [1, 12, 40, 200, 10_000])
def test_attention_pieces_with_nothing_in_use(threadgroups: int) -> None:
    """Pieces of a part whose span begins late, ends early or is empty, and of one that the window does not reach."""
    config = attention.LaunchConfig(2, 1, 1, threadgroups)
    parts = [(90, 80, 90), (64, 0, 3), (64, 64, 64), (200, 0, 200), (64, 0, 7)]
    for tokens, window in ((1, 0), (1, 10), (4, 0), (4, 100), (7, 1)):
        attend(mx.float16, (2, 1), 32, parts, tokens, window, config=config)


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("heads", [(4, 2), (8, 1)], ids=str)
def test_attention_of_a_sliding_layer(heads: tuple[int, int], tokens: int) -> None:
    """As decode.py has them: the first part begins inside, where the first query's window does."""
    used, window = 5 + tokens, 512
    first = 5 * 128 + 64 + used - tokens - window + 1
    parts = [(128, first - 128, 128), *[(128, 0, 128)] * 3, (64, 0, 64), (64, 0, used)]
    attend(mx.float16, heads, 256, parts, tokens, window)


@pytest.mark.parametrize(
    "lengths", [[1], [64], [65], [1024, 64], [8192] * 3 + [7168, 896, 64, 64], [131072] * 4 + [64]]
)
@pytest.mark.parametrize("across", [1, 4, 16, 64])
def test_attention_pieces_are_about_as_many_as_asked_for(lengths: list[int], across: int) -> None:
    config = attention.LaunchConfig(8, keys=2, threadgroups=384)
    share = config.share(lengths, across)
    pieces = pieces_of(lengths, share)
    assert share % config.block == 0 and len(lengths) <= pieces <= max(384 // across, 2 * len(lengths))
    assert share == config.block or 2 * pieces >= 384 // across


def test_attention_gives_another_dtype() -> None:
    attend(mx.float16, (2, 1), 32, [(90, 0, 90)], out=mx.float32)
    attend(mx.float16, (2, 1), 32, [(990, 0, 990)], out=mx.bfloat16)


def test_attention_of_a_key_far_above_the_rest() -> None:
    """Scores in the hundreds: the running maximum must carry them."""
    q = normal(1, 2, 64) * 40
    k, v = normal(1, 300, 64, seed=1) * 10, normal(1, 300, 64, seed=2)
    spans = span_rows([(0, 300)])
    check(
        attention.attention(metal, q, [(k, v)], spans, scale=1.0),
        attention.attention_reference(q, [(k, v)], spans, scale=1.0),
        mx.float32,
    )


# ---------------------------------------------------------------- q, k and v


def wavelengths(dim: int) -> mx.array:
    return mx.array([10000 ** (2 * i / dim) if i % 3 else np.inf for i in range(dim // 2)], mx.float32)


def check_qkv(
    dtype: mx.Dtype,
    kind: str,
    heads: tuple[int, int],
    dim: int,
    tokens: int = 1,
    count: int = 5,
    kv_dtype: mx.Dtype = mx.float32,
    launcher: Any = metal,
) -> None:
    """kind: apart, joined, joined k (v apart), k=v, k=v joined, q alone; gemma3 leaves values as they are."""
    h, g = heads
    widths = {"joined": h + 2 * g, "joined k": h + g, "k=v joined": h + g}
    q = normal(tokens, widths.get(kind, h) * dim, dtype=dtype)
    k = normal(tokens, g * dim, dtype=dtype, seed=1) if kind in ("apart", "k=v", "gemma3") else None
    v = normal(tokens, g * dim, dtype=dtype, seed=2) if kind in ("apart", "joined k", "gemma3") else None
    rope = qkv.rotations_reference(mx.array([1000], mx.int32), wavelengths(dim), tokens=tokens)
    used = mx.arange(attention.TAIL)[:, None] < count
    old = (normal(1, g, attention.TAIL, dim, dtype=kv_dtype, seed=s) for s in (3, 4))
    tail = tuple(mx.where(used, a, mx.array(float("nan"), kv_dtype)) for a in old)
    alone = kind == "q alone"
    arrays = qkv.QKVArrays(
        *(q, k, v, 1 + normal(dim, seed=5), None if alone else 1 + normal(dim, seed=6), rope),
        *(None if alone else tail, None if alone else mx.array([count], mx.int32)),
    )
    options = qkv.QKVOptions(h, g, EPS, kv_dtype, value_norm=kind != "gemma3", v_is_k=kind.startswith("k=v"))
    got, want = qkv.qkv_post(launcher, arrays, options), qkv.qkv_post_reference(arrays, options)
    limit = kv_dtype if dtype == mx.float32 else dtype
    check(got[0], want[0], limit)
    assert (got[1] is None) == alone == (want[1] is None)
    if not alone:
        for a, b in zip(got[1:], want[1:], strict=True):
            check(a[:, :, : count + tokens], b[:, :, : count + tokens], limit)
            assert mx.array_equal(a[:, :, :count], b[:, :, :count])


@pytest.mark.parametrize("kind", ["apart", "joined", "joined k", "k=v", "k=v joined", "q alone", "gemma3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qkv_post_kinds(kind: str, dtype: mx.Dtype) -> None:
    check_qkv(dtype, kind, (6, 2), 64)
    check_qkv(dtype, kind, (6, 2), 64, tokens=3, count=61)


@pytest.mark.parametrize("kv_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim"), [((32, 4), 512), ((8, 1), 256), ((3, 1), 96), ((4, 4), 32)])
def test_qkv_post_shapes(heads: tuple[int, int], dim: int, kv_dtype: mx.Dtype) -> None:
    check_qkv(mx.float32, "joined", heads, dim, kv_dtype=kv_dtype)


@pytest.mark.parametrize("count", [0, 1, 62, 63])
def test_qkv_post_tail_at_the_edges(count: int) -> None:
    check_qkv(mx.float16, "apart", (2, 1), 32, count=count, kv_dtype=mx.float16)


@pytest.mark.parametrize("position", [0, 1, 511, 131_071, 1_000_000])
@pytest.mark.parametrize(("dim", "tokens"), [(32, 1), (96, 3), (512, 4)])
def test_rotations(dim: int, tokens: int, position: int) -> None:
    """Of angles rounded to fp32, as stock RoPE has them; then to fp32's last bits, far from 0 too."""
    far = mx.array([position], mx.int32)
    got = qkv.rotations(metal, far, wavelengths(dim), tokens=tokens)
    a = np.arange(position, position + tokens, dtype=np.float32)[:, None] * (np.float32(1) / np.array(wavelengths(dim)))
    want = np.stack([np.cos(a.astype(np.float64)), np.sin(a.astype(np.float64))], axis=1)
    np.testing.assert_allclose(np.array(got), want, rtol=0, atol=2e-7)
    check(got, qkv.rotations_reference(far, wavelengths(dim), tokens=tokens), mx.float32)


def test_rotations_turn_as_stock_rope() -> None:
    x, norm, position = normal(3, 2 * 64), mx.ones(64), mx.array([777], mx.int32)
    rope = qkv.rotations_reference(position, wavelengths(64), tokens=3)
    got, *_ = qkv.qkv_post_reference(
        qkv.QKVArrays(x, None, None, norm, None, rope, None, None), qkv.QKVOptions(2, 1, EPS, mx.float32)
    )
    heads = mx.fast.rms_norm(x.reshape(1, 3, 2, 64), norm, EPS).swapaxes(1, 2)
    options: dict[str, Any] = {"traditional": False, "base": None, "scale": 1.0, "offset": 777}
    want = mx.fast.rope(heads, 64, freqs=wavelengths(64), **options)
    check(got, want[0].swapaxes(0, 1), mx.float32)


# ---------------------------------------------------------------- norms


def add_norm(
    dtypes: tuple[mx.Dtype, mx.Dtype], k: int, tokens: int, options: Sequence[str], launcher: Any = metal
) -> None:
    """dtypes: of the residual and of the rest."""
    parts = (3,) * ("parts" in options)
    x, h = normal(tokens, k, dtype=dtypes[0]) * 30, normal(*parts, tokens, k, dtype=dtypes[1], seed=1)
    post, next_norm, norm1, norm2 = (1 + normal(k, seed=s) for s in (2, 3, 4, 5))
    share = mx.softmax(normal(tokens, 3, seed=6), axis=-1)
    kwargs: dict[str, Any] = {
        "parts": {},
        "next": {"next_norm": next_norm},
        "copy": {"copied": 1 / 16},
        "scale": {"scale": mx.array([0.37])},
        "experts": {"experts": (normal(tokens, 3, k, dtype=dtypes[1], seed=7), share, norm1, norm2)},
    }
    chosen = norms.NormOptions(EPS, **{name: a for option in options for name, a in kwargs[option].items()})
    got, want = norms.add_norm(launcher, x, h, post, chosen), norms.add_norm_reference(x, h, post, chosen)
    check(got[0], want[0], dtypes[0])
    if {"next", "copy"} & {*options}:
        check(got[1], want[1], dtypes[1])
    else:
        assert got[1] is got[0] and want[1] is want[0]


@pytest.mark.parametrize("parts", [(), ("parts",)], ids=["whole", "parts"])
@pytest.mark.parametrize(
    "options", [(), ("next",), ("scale",), ("copy",), ("next", "scale"), ("experts", "next", "scale")], ids="+".join
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_norm_variants(options: Sequence[str], dtype: mx.Dtype, parts: Sequence[str]) -> None:
    add_norm((mx.float32, dtype), 264, 2, (*options, *parts))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_norm_residual_in_each_dtype(dtype: mx.Dtype) -> None:
    add_norm((dtype, dtype), 96, 1, ("next",))


@pytest.mark.parametrize("k", [8, 256, 640, 1152, 1536, 2560, 2816, 3840, 5376, 8200, 12288])
def test_add_norm_widths(k: int) -> None:
    add_norm((mx.float32, mx.float16), k, 1, ("next", "experts"))


# ---------------------------------------------------------------- unpacked weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("w_dtype", DTYPES, ids=str)
def test_dense(dtype: mx.Dtype, w_dtype: mx.Dtype) -> None:
    for tokens, n, k in ((1, 128, 2816), (3, 5, 40), (2, 601, 264), (1, 4097, 72)):
        x, w = normal(tokens, k, dtype=dtype) * 5, normal(n, k, dtype=w_dtype, seed=1) * k**-0.5
        check(dense.dense(metal, x, w), product_reference(x, w), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_with_norm_and_times(dtype: mx.Dtype) -> None:
    """The router's product, and the gate of the per-layer embedding."""
    x, w = normal(2, 264, dtype=dtype) * 5, normal(33, 264, seed=1) * 0.1
    router = Epilogue(factor=264**-0.5, out=mx.float32, eps=EPS), Folded(norm=1 + normal(264, seed=2))
    check(dense.dense(metal, x, w, *router), product_reference(x, w, *router), mx.float32)
    gate = Epilogue(factor=1 / 16, given=1 / 4), Folded(times=normal(2, 33, dtype=dtype, seed=3))
    check(dense.dense(metal, x, w, *gate), product_reference(x, w, *gate), dtype)


# ---------------------------------------------------------------- choices


@pytest.mark.parametrize(("experts", "used"), [(128, 8), (8, 2), (60, 32), (33, 1), (256, 5)])
def test_top_k(experts: int, used: int) -> None:
    scores = normal(4, experts) * 3
    scale = 1 + normal(experts, seed=1) if used != 2 else None
    ids, share = choose.top_k(metal, scores, used, scale=scale)
    want_ids, want_share = choose.top_k_reference(scores, used, scale=scale)
    assert mx.array_equal(ids, want_ids)
    check(share, want_share, mx.float32)


def test_top_k_takes_the_lower_of_equals() -> None:
    scores = mx.zeros((1, 64))
    scores[0, 40] = 1.0
    assert choose.top_k(metal, scores, 4)[0].tolist() == [[40, 0, 1, 2]]


@pytest.mark.parametrize(("used", "centroids", "per"), [(1, 3, 5), (7, 40, 70), (32, 2048, 4)])
def test_spread(used: int, centroids: int, per: int) -> None:
    """Tokens of centroids, in an order of their own, among all: several threadgroups, the last one cut."""
    rng = np.random.default_rng(used)
    near = mx.array(rng.permutation(centroids)[:used].astype(np.int32))
    ordering, logits = mx.array(rng.permutation(centroids * per).astype(np.int32)), normal(used, per)
    got, want = choose.spread(metal, logits, near, ordering), choose.spread_reference(logits, near, ordering)
    np.testing.assert_array_equal(np.array(got), np.array(want))


# ---------------------------------------------------------------- embeddings


def table(name: str, rows: int, k: int) -> mx.array | formats.Packed:
    """A random table [rows, k]; packed ones from random blocks whose fp16 scales are small."""
    if name in formats.FLOATS:
        return normal(rows, k, dtype=formats.FLOATS[name])
    rng = np.random.default_rng(len(name))
    raw = random_blocks(name, rng, rows * k // formats.FORMATS[name].layout.size)
    put_scales(name, raw, lambda: rng.uniform(-0.02, 0.02, len(raw)).astype(np.float16))
    if name == "MXFP4":
        raw[:, 0] = rng.integers(118, 128, len(raw))
    return formats.pack_on_cpu(raw.reshape(rows, -1), name, (rows, k))


@pytest.mark.parametrize("name", [*formats.FORMATS, *formats.FLOATS])
def test_embed(name: str) -> None:
    ids = mx.array([3, 0, 4], mx.int32)
    weights = table(name, 5, 512)
    check(embed.embed(metal, ids, weights, 7.5), embed.embed_reference(ids, weights, 7.5), mx.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embed_with_rows_behind(dtype: mx.Dtype) -> None:
    ids, weights, behind = mx.array([3, 0, 4], mx.int32), table("Q8_0", 5, 512), normal(3, 300, dtype=dtype)
    got = embed.embed(metal, ids, weights, 7.5, behind=behind)
    check(got, embed.embed_reference(ids, weights, 7.5, behind=behind), mx.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["Q6_K", "Q5_K", "F16"])
def test_ple_inputs(name: str, dtype: mx.Dtype) -> None:
    ids, weights, norm = mx.array([1, 4], mx.int32), table(name, 5, 5 * 256), 1 + normal(256, seed=1)
    proj = normal(2, 5 * 256, dtype=dtype) * 3
    got = embed.ple_inputs(metal, ids, proj, norm, weights, 0.03, eps=EPS)
    check(got, embed.ple_inputs_reference(ids, proj, norm, weights, 0.03, eps=EPS), dtype)


def test_ple_inputs_of_an_odd_width() -> None:
    ids, weights, norm = mx.array([2], mx.int32), table("Q8_0", 3, 3 * 96), 1 + normal(96, seed=1)
    proj = normal(1, 3 * 96)
    got = embed.ple_inputs(metal, ids, proj, norm, weights, 0.03, eps=EPS)
    check(got, embed.ple_inputs_reference(ids, proj, norm, weights, 0.03, eps=EPS), mx.float32)


# ---------------------------------------------------------------- races and bounds


@pytest.mark.sanitize
def test_no_races_and_no_access_out_of_bounds() -> None:
    attend(mx.float16, (8, 1), 256, [(200, 3, 200), (64, 0, 7)], tokens=2, launcher=racing)
    attend(mx.float16, (8, 1), 256, [(900, 3, 900), (64, 0, 7)], window=500, launcher=racing)
    attend(mx.float32, (6, 2), 96, [(900, 3, 899)], launcher=racing)
    attend(mx.float16, (2, 1), 256, [(90, 3, 90), (64, 0, 7)], launcher=partial(eager, base=racing))
    attend(
        mx.float16,
        (2, 1),
        32,
        [(90, 70, 90), (64, 9, 9), (64, 0, 7)],
        2,
        launcher=racing,
        config=attention.LaunchConfig(2, 8, 1),
    )
    attend(mx.float16, (4, 1), 64, [(90, 70, 90), (64, 9, 9), (64, 0, 7)], 2, launcher=racing, config=CONFIGS[0])
    for kind in ("apart", "joined", "q alone"):
        check_qkv(mx.float16, kind, (6, 2), 64, tokens=2, kv_dtype=mx.float16, launcher=racing)
    qkv.rotations(racing, mx.array([5]), wavelengths(96), tokens=2)
    add_norm((mx.float32, mx.float16), 2816, 1, ("next", "experts", "scale"), launcher=racing)
    add_norm((mx.float32, mx.float16), 96, 2, ("next",), launcher=racing)
    add_norm((mx.float32, mx.float32), 5376, 2, ("next", "parts"), launcher=racing)
    ids, weights = mx.array([3, 0, 4], mx.int32), table("Q6_K", 5, 512)
    embed.embed(racing, ids, weights, 7.5)
    embed.ple_inputs(racing, ids, normal(3, 512), normal(256), weights, 1.0, eps=EPS)
    dense.dense(racing, normal(2, 40), normal(5, 40), folded=Folded(normal(40), normal(2, 5)))
    choose.top_k(racing, normal(4, 60), 8)
