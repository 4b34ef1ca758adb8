"""Attention over pages and what writes them, run by the Metal simulator, against their references in stock MLX.

Pages that no row has, and what rows do not see of theirs, are NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import DTYPES, check, eager, metal, normal, racing

from mlx_gemma4.ops import paged
from mlx_gemma4.ops.cases import Heads
from mlx_gemma4.ops.qkv import QKVArrays, QKVOptions, qkv_post, qkv_post_reference, rotations, rotations_reference

HEADS = Heads(4, 2, 32, 0, "")


def pool_of(
    lengths: Sequence[int], heads: Heads = HEADS, dtype: mx.Dtype = mx.float32, page: int = 32, pieces: int = 4
) -> tuple[Any, mx.array]:
    """A pool with NaN where no row sees, and the rows' places."""
    needed = [-(-length // page) for length in lengths]
    order = (np.random.default_rng(1).permutation(sum(needed)) + 1).tolist()
    shape = (sum(needed) + 1, heads.kv_heads, page, heads.dim)
    seen = np.zeros((shape[0], 1, page, 1), bool)
    rows, share = [], paged.share_for(max(lengths), pieces)
    for length, pages in zip(lengths, needed, strict=True):
        mine, order = order[:pages], order[pages:]
        first = max(0, length - heads.window) if heads.window else 0
        at = np.arange(first, length)
        seen[np.array(mine)[at // page], 0, at % page] = True
        rows.append(paged.place_row(length - 1, first, length, mine, paged.page_room(max(needed)), share))
    kv = [mx.where(mx.array(seen), normal(*shape, seed=n), mx.nan).astype(dtype) for n in (1, 2)]
    mx.eval(kv)
    return (kv[0], kv[1]), mx.array(np.stack(rows))


def attend(
    lengths: Sequence[int],
    heads: Heads = HEADS,
    dtype: mx.Dtype = mx.float32,
    page: int = 32,
    pieces: int = 4,
    launcher: Any = metal,
) -> None:
    pool, places = pool_of(lengths, heads, dtype, page, pieces)
    q = normal(len(lengths), heads.heads, heads.dim, dtype=dtype)
    scale = 1.3 * heads.dim**-0.5
    got = paged.paged_attention(launcher, q, pool, places, scale=scale, pieces=pieces)
    want = paged.paged_attention_reference(q, pool, places, scale=scale, pieces=1)
    check(got, want, dtype)
    for n, length in enumerate(lengths):  # the reference itself, a row on its own
        first = max(0, length - heads.window) if heads.window else 0
        at, table = np.arange(first, length), np.array(places[n, paged.PAGES :])
        k, v = (np.array(a.astype(mx.float32))[table[at // page], :, at % page] for a in pool)  # [n, G, D]
        rows = np.array(q[n].astype(mx.float32)).reshape(heads.kv_heads, -1, heads.dim)
        s = np.einsum("grd,ngd->grn", rows, k) * scale
        weights = np.exp(s - s.max(axis=-1, keepdims=True))
        out = np.einsum("grn,ngd->grd", weights / weights.sum(axis=-1, keepdims=True), v).reshape(-1)
        check(want[n], mx.array(out).astype(dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gqa", [1, 2, 4, 8, 16])
def test_rows_of_different_lengths(gqa: int, dtype: mx.Dtype) -> None:
    attend([70, 1, 33, 200], replace(HEADS, heads=2 * gqa), dtype)


@pytest.mark.parametrize("dim", [32, 96, 256, 512])
def test_head_sizes(dim: int) -> None:
    attend([150, 40], replace(HEADS, dim=dim), mx.float16, page=128)


@pytest.mark.parametrize("rows", [1, 2, 5, 32])
def test_numbers_of_rows(rows: int) -> None:
    attend([1 + 37 * n % 150 for n in range(rows)])


@pytest.mark.parametrize("window", [1, 31, 32, 33, 90])
def test_windows(window: int) -> None:
    attend([70, 1, 33, 200, 32, 96], replace(HEADS, window=window))


@pytest.mark.parametrize("pieces", [1, 2, 16, 64])
def test_pieces(pieces: int) -> None:
    """A piece of several pages, a page of several pieces, pieces that no row reaches."""
    attend([700, 5, 129, 130], HEADS, mx.float16, 128, pieces)


def test_loading_all_at_once() -> None:
    attend([300, 2, 129], replace(HEADS, heads=8, dim=64, window=140), mx.float16, 128, launcher=eager)


def test_no_races() -> None:
    attend([70, 1, 200], replace(HEADS, window=90), launcher=racing)


def test_pieces_are_a_power_of_two_and_reach_the_end() -> None:
    for rows in (1, 2, 8, 32):
        for heads, kv_heads in ((8, 1), (16, 8), (16, 1), (32, 4)):
            for pages in (8, 16, 64, 1024):
                pieces = paged.pieces_for(rows, heads, kv_heads, pages)
                assert pieces & (pieces - 1) == 0 and 1 <= pieces <= pages * 4
                for most in (1, 129, pages * paged.PAGE):
                    share = paged.share_for(most, pieces)
                    assert share % 32 == 0 and share * pieces >= most


def test_rotations_by_row() -> None:
    position, wavelengths = mx.array([[7, 1], [0, 2], [130_000, 3]], mx.int32), normal(16) ** 2 + 1
    got = rotations(metal, position, wavelengths, tokens=3, by_row=True)
    check(got, rotations_reference(position, wavelengths, tokens=3, by_row=True), mx.float16)
    for n in range(3):
        alone = rotations_reference(position[n, :1], wavelengths, tokens=1)
        check(got[n : n + 1], alone, mx.float16)


@pytest.mark.parametrize("launcher", [metal, racing])
@pytest.mark.parametrize("joined", ["kv", "k", ""])
def test_new_tokens_go_into_their_pages(joined: str, launcher: Any) -> None:
    """And nothing else changes. q is as without a pool."""
    lengths, h = [33, 1, 64, 100], replace(HEADS, window=50)
    for dtype in (mx.float32, mx.float16):
        pool, places = pool_of(lengths, h, dtype)
        before = [np.array(a.astype(mx.float32)) for a in pool]
        behind = {"kv": 2, "k": 1, "": 0}[joined] * h.kv_heads
        q = normal(4, (h.heads + behind) * h.dim)
        k = normal(4, h.kv_heads * h.dim, seed=1) if not joined else None
        v = normal(4, h.kv_heads * h.dim, seed=2) if joined != "kv" else None
        rope = rotations_reference(places, normal(16) ** 2 + 1, tokens=4, by_row=True)
        norms = normal(h.dim), normal(h.dim, seed=3)
        given = QKVArrays(q, k, v, *norms, rope, pool=pool, places=places)
        options = QKVOptions(h.heads, h.kv_heads, 1e-6, dtype)
        want = qkv_post_reference(given, options)
        assert want[1] is not None and want[2] is not None
        mx.eval(want)
        got = qkv_post(launcher, given, options)
        check(got[0], want[0], dtype)
        changed = 0
        for old, new, wanted in zip(before, got[1:], want[1:], strict=True):
            mine, theirs = (np.array(a.astype(mx.float32)) for a in (new, wanted))
            np.testing.assert_allclose(mine, theirs, atol=2e-3 if dtype == mx.float16 else 1e-5)
            changed += (~np.isclose(mine, old, equal_nan=True)).any(axis=(1, 3)).sum()
        assert changed == 2 * len(lengths)


@pytest.mark.parametrize("launcher", [metal, racing])
@pytest.mark.parametrize(("n", "first", "skip"), [(1, 0, 0), (32, 0, 3), (70, 25, 0), (3, 31, 9)])
def test_a_sequence_is_copied_into_its_pages(n: int, first: int, skip: int, launcher: Any) -> None:
    """From some row on of arrays that are longer."""
    for dtype in (mx.float32, mx.float16):
        shape = (6, 2, 32, 16)
        pool, new = ([normal(*s, dtype=dtype, seed=i) for i in (1, 2)] for s in (shape, (1, 2, n + skip + 5, 16)))
        mx.eval(pool)
        pages = [4, 1, 5, 2]
        row = paged.place_row(skip, first, first + n, pages, paged.MIN_PAGES)
        want, _ = paged.fill_pages_reference((new[0], new[1]), (pool[0], pool[1]), row)
        mx.eval(want)
        got, done = paged.fill_pages(launcher, (new[0], new[1]), (pool[0], pool[1]), row)
        mx.eval(done)
        for a, b, whole in zip(got, want, new, strict=True):
            assert mx.array_equal(a, b)
            at = [(pages[t // 32], t % 32) for t in range(first, first + n)]
            assert mx.array_equal(mx.stack([a[p, :, r] for p, r in at], axis=1), whole[0, :, skip : skip + n])
