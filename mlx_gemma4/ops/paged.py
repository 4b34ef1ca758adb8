"""Keys and values of several sequences in pages: attention of one token each, and a sequence's way into its pages.

In and out: MLX arrays, of which a pool's are written in place by kernels (paged.metal says how rows and pages are told)
and replaced by references. Knows no model and no KV state.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..gpu.render import Launch, Launcher, prepare, render
from .attention import FEW_ROWS, MANY_ROWS, SPANS, LaunchConfig
from .cases import Case, Check, Heads, Sizes, cases, normal, random_queries, state_dtype
from .op import Op
from .parts import KVPart, QueryShape, merge, merge_reference
from .tuning import this_gpu

PAGE = 128  # tokens
POSITION, FROM, TO, SHARE, OWN, PAGES = range(6)  # in a row of places, as in paged.metal: the last, where pages begin
MIN_PAGES = 8  # of a row's places, so that kernels find them in one address space; for each twice as many a new text


def page_room(pages: int) -> int:
    """Return for how many pages a row has places: a power of two."""
    return max(MIN_PAGES, 1 << (pages - 1).bit_length())


def row_config(gqa: int) -> LaunchConfig:
    """The launch configuration for so many query heads a KV head: a threadgroup takes all of up to 8."""
    return MANY_ROWS if gqa > 2 else FEW_ROWS


def pieces_for(rows: int, heads: int, kv_heads: int, pages: int, page: int = PAGE) -> int:
    """Return in how many pieces each row's tokens are taken: enough for all cores, a power of two."""
    config = row_config(heads // kv_heads)
    across = -(-heads // kv_heads // config.rows) * kv_heads * rows
    wanted = max(1, this_gpu().attention_threadgroups // across)
    return min(1 << (wanted - 1).bit_length(), pages * page // config.block)


def share_for(most: int, pieces: int) -> int:
    """Return the tokens of a piece, in whole blocks, where the longest row has so many."""
    block = MANY_ROWS.block
    return -(-most // (pieces * block)) * block


def paged_pieces(
    launcher: Launcher, q: mx.array, pool: KVPart, places: mx.array, *, scale: float, pieces: int
) -> tuple[Any, Any]:
    """Attention of each of several sequences' newest token to what it sees, not yet added up.

    Args:
        q: [B, H, D], D a multiple of 32.
        pool: keys and values, [pages, G, page, D] each, in q's dtype.
        places: int32 [B, 4 + pages of a row], rows as POSITION to PAGES have them.
        scale: of the scores.
        pieces: of each row; with their share they reach to the end of the longest.

    Returns:
        sums and stats, as `parts.merge` takes them.
    """
    launch = _prepared(launcher, q.shape, q.dtype, (pool[0].shape[1], pool[0].shape[2]), float(scale), pieces)
    sums, stats = launch(q, places, *pool)
    return sums, stats


@lru_cache(maxsize=4096)
def _prepared(
    launcher: Launcher, shape: QueryShape, dtype: mx.Dtype, pool: tuple[int, int], scale: float, pieces: int
) -> Launch:
    (rows, heads, dim), (kv_heads, page) = shape, pool
    gqa, config = heads // kv_heads, row_config(heads // kv_heads)
    defines: dict[str, Any] = {"D": dim, "GQA": gqa, "ROWS": config.rows, "SG": config.simdgroups}
    defines |= {"KEYS": config.keys, "SCALE": scale, "PAGED": True, "PAGE": page}
    kernel = render("attention", "attention.metal", dtype, defines, SPANS)
    results = ((rows * heads, pieces, dim), mx.float32), ((rows * heads, pieces, 2), mx.float32)
    groups = (-(-gqa // config.rows), pieces, kv_heads * rows)
    return prepare(launcher, kernel, groups, 32 * config.simdgroups, *results)


def paged_attention(
    launcher: Launcher, q: mx.array, pool: KVPart, places: mx.array, *, scale: float, pieces: int
) -> Any:
    """`paged_pieces`, added up: [B, H D] in q's dtype."""
    sums, stats = paged_pieces(launcher, q, pool, places, scale=scale, pieces=pieces)
    return merge(launcher, sums, stats, q.shape, q.dtype)


def paged_attention_reference(q: mx.array, pool: KVPart, places: mx.array, *, scale: float, pieces: int) -> mx.array:
    """`paged_attention` in stock MLX, over all pages of each row under a mask."""
    (rows, heads, dim), (_, kv_heads, page, _) = q.shape, pool[0].shape
    at = mx.arange((places.shape[1] - PAGES) * page)
    seen = (at >= places[:, FROM, None]) & (at < places[:, TO, None])  # [B, tokens]
    table = mx.where(seen.reshape(rows, -1, page).any(axis=-1), places[:, PAGES:], 0)  # what is unused is no page
    k, v = (a[table].swapaxes(1, 2).reshape(rows, kv_heads, -1, dim).astype(mx.float32) for a in pool)
    k, v = (mx.where(seen[:, None, :, None], a, 0) for a in (k, v))  # what is unused may be NaN
    queries = q.astype(mx.float32)[:, :, None]
    out = mx.fast.scaled_dot_product_attention(queries, k, v, scale=scale, mask=seen[:, None, None])
    return out.reshape(rows, heads * dim).astype(q.dtype)


PAGED_ATTENTION = Op("paged_attention", paged_attention, paged_attention_reference)


def place_row(
    position: int, first: int, stop: int, pages: Sequence[int], room: int, share: int = 0, own: int = 1
) -> np.ndarray:
    """Return a row of places with room for so many pages, int32. `own`: its last tokens that a step itself writes."""
    row = np.zeros(PAGES + room, np.int32)
    row[:PAGES] = position, first, stop, share, own
    row[PAGES : PAGES + len(pages)] = pages
    return row


def place_rows(rows: Sequence[tuple[int, int, int, Sequence[int], int]], room: int, share: int) -> np.ndarray:
    """Return rows of places, int32: of each position, first, stop, pages and own as `place_row` has them."""
    table, before = np.zeros((len(rows), PAGES + room), np.int32), None
    for n, (position, first, stop, pages, own) in enumerate(rows):
        row = table[n]
        row[:PAGES] = position, first, stop, share, own
        if pages == before:  # of the same state
            row[PAGES:] = table[n - 1, PAGES:]
        else:
            row[PAGES : PAGES + len(pages)] = before = pages
    return table


def fill_pages(launcher: Launcher, new: KVPart, pool: KVPart, row: np.ndarray) -> tuple[KVPart, mx.array]:
    """Copy some of a sequence's keys and values into its pages, which nobody may be reading.

    Args:
        new: [1, G, rows, D] each, in the pool's dtype.
        row: a row of places, in which POSITION is the first row of `new` to copy, FROM and TO are the tokens that it
            and those behind it become.

    Returns:
        the pool, [pages, G, page, D] each, and an array that is computed when it has been written.
    """
    launch = _fill_prepared(launcher, pool[0].shape[1:], pool[0].dtype, int(row[TO] - row[FROM]))
    return pool, launch(*new, mx.array(row), *pool)[0]


@lru_cache(maxsize=4096)
def _fill_prepared(launcher: Launcher, page: tuple[int, int, int], dtype: mx.Dtype, tokens: int) -> Launch:
    kv_heads, size, dim = page
    defines: dict[str, Any] = {"G": kv_heads, "D": dim, "C": dtype, "C_BYTES": dtype.size, "PAGE": size}
    kernel = render("fill_pages", "qkv.metal", dtype, defines)
    groups = (-(-tokens * dim * dtype.size // 16 // 128), kv_heads, 1)
    return prepare(launcher, kernel, groups, 128, ((1,), mx.int32))


def fill_pages_reference(new: KVPart, pool: KVPart, row: np.ndarray) -> tuple[KVPart, mx.array]:
    """`fill_pages` in stock MLX: the pool it returns is another one."""
    at, page = np.arange(row[FROM], row[TO]), pool[0].shape[2]
    rows = slice(int(row[POSITION]), int(row[POSITION]) + at.size)
    some = new[0][:, :, rows], new[1][:, :, rows]
    made = _written(pool, mx.array(row[PAGES:][at // page]), mx.array(at % page), some)
    return made, made[0]


def write_rows(pool: KVPart, places: mx.array, new: KVPart) -> KVPart:
    """Return a pool with each row's new token in its place: [1, G, B, D] keys and values, in stock MLX."""
    at, page = places[:, TO] - 1, pool[0].shape[2]
    pages = mx.take_along_axis(places[:, PAGES:], (at // page)[:, None], axis=1)[:, 0]
    return _written(pool, pages, at % page, new)


def _written(pool: KVPart, pages: mx.array, rows: mx.array, new: KVPart) -> KVPart:
    made = []
    for old, some in zip(pool, new, strict=True):
        changed = old[:]
        changed[pages, :, rows] = some[0].swapaxes(0, 1)
        made.append(changed)
    return made[0], made[1]


FILL_PAGES = Op("fill_pages", fill_pages, fill_pages_reference)


def pool_case(h: Heads, lengths: Sequence[int], dtype: mx.Dtype, pieces: int) -> tuple[KVPart, mx.array]:
    """Return a pool and the places of rows of so many tokens, each with its own pages, out of order."""
    needed = [-(-length // PAGE) for length in lengths]
    order = np.random.default_rng(0).permutation(sum(needed)) + 1
    shape = (sum(needed) + 1, h.kv_heads, PAGE, h.dim)
    pool = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)
    room, share, rows, at = page_room(max(needed)), share_for(max(lengths), pieces), [], 0
    for length, pages in zip(lengths, needed, strict=True):
        seen = max(0, length - h.window) if h.window else 0
        rows.append(place_row(length - 1, seen, length, order[at : at + pages].tolist(), room, share))
        at += pages
    return pool, mx.array(np.stack(rows))


@cases
def paged_attention_cases(s: Sizes) -> Iterator[Check]:
    """Rows that end in other pieces, and one that has no token in most; a window may cut them."""

    def make(h: Heads) -> Case:
        lengths = (300, 1, 129, 70)
        pool, places = pool_case(h, lengths, state_dtype(), 4)
        q = random_queries(h, state_dtype(), len(lengths))

        def launch(launcher: Launcher) -> mx.array:
            sums, stats = paged_pieces(launcher, q, pool, places, scale=s.scale, pieces=4)
            sums = mx.where(stats[..., 1:] > 0, sums, 0)
            return merge_reference(sums, stats, q.shape, q.dtype)

        reference = partial(paged_attention_reference, q, pool, places, scale=s.scale, pieces=4)
        return Case(launch, reference, sum(lengths) * 2 * h.kv_heads * h.dim * q.dtype.size)

    for h in dict.fromkeys(s.heads):
        yield Check(PAGED_ATTENTION.key, f"{h}" + f", window {h.window}" * (h.window > 0), partial(make, h))


@cases
def fill_pages_cases(s: Sizes) -> Iterator[Check]:
    def make(h: Heads) -> Case:
        new = (
            normal(1, h.kv_heads, 160, h.dim, dtype=state_dtype()),
            normal(1, h.kv_heads, 160, h.dim, dtype=state_dtype()),
        )
        pool = tuple(mx.zeros((4, h.kv_heads, PAGE, h.dim), state_dtype()) for _ in "kv")
        row = place_row(7, 5, 155, [3, 1], MIN_PAGES)
        mx.eval(new, pool)

        def launch(launcher: Launcher) -> KVPart:
            made, done = fill_pages(launcher, new, (pool[0], pool[1]), row)
            mx.eval(done)
            return made

        reference = partial(fill_pages_reference, new, (pool[0], pool[1]), row)
        return Case(launch, lambda: reference()[0], 4 * new[0].nbytes)

    for h in dict.fromkeys(s.heads):
        if h.has_kv:
            yield Check(FILL_PAGES.key, f"{h}", partial(make, h))
