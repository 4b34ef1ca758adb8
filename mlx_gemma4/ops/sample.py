"""The next token of each row of logits, drawn as its settings and seed say: sample.metal and its reference."""

import struct
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..gpu.render import Launcher, prepare, render
from . import stock
from .cases import Case, Check, Sizes, case, cases, normal
from .dispatch import Kernels
from .op import Op

MOST = 128  # candidates of a row: the largest top_k that the kernel takes
SG, EACH = 8, 8  # simdgroups of a threadgroup, and logits of a thread, in the first launch
WORDS = 8  # of a `Draw`
GROUP = 64  # logits whose largest the reference looks at first
_FORMAT = struct.Struct("<fiffIIIf")  # of a `Draw`


class Draw(NamedTuple):
    """How a token is drawn: `Sampling`'s filters in their order, and what its noise follows from."""

    temperature: float = 0.0  # 0: the likeliest token, the lowest of equals
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # 64 bits
    position: int = 0  # of the token in its reply
    softcap: float = 0.0  # of the logits, where it is yet to be applied; 0: none

    @property
    def numbers(self) -> np.ndarray:
        """int32 [WORDS], as the kernel reads it."""
        t = max(self.temperature, 1e-30) if self.temperature else 0.0  # no 0 in fp32
        words = self.seed >> 32, self.seed & 0xFFFFFFFF
        packed = _FORMAT.pack(
            t, min(self.top_k, 0x7FFFFFFF), self.top_p, self.min_p, *words, self.position, self.softcap
        )
        return np.frombuffer(packed, np.int32)

    @property
    def in_kernel(self) -> bool:
        """True if the kernel makes this draw; else only the reference does."""
        every = self.top_k == 0 and self.top_p >= 1 and self.min_p == 0
        return self.temperature == 0 or every or 0 < self.top_k <= MOST


LIKELIEST = Draw()


def draws_of(draws: Sequence[Draw]) -> mx.array:
    """Draws of rows as SAMPLE takes them, int32 [B, WORDS]."""
    return mx.array(np.stack([draw.numbers for draw in draws]))


def sample(
    launcher: Launcher, logits: mx.array, draws: mx.array, *, leads: bool = False, before: mx.array | None = None
) -> Any:
    """A token for each row.

    Args:
        logits: [B, V].
        draws: int32 [B, WORDS], of `draws_of`, each `in_kernel`.
        leads: say by how much the likeliest token's logit is above the next best, after any softcap; a large number
            where the temperature is not 0.
        before: int32 [n], n up to 32, tokens that stand before that of one row.

    Returns:
        int32 [B], with `leads` [2, B], of which the second row has the bits of fp32. Of equal logits, which top_k
        compares before any softcap, the lowest token comes first.
    """
    rows, n = logits.shape
    pieces = -(-n // (32 * SG * EACH))
    first = render(
        "sample_pieces", "sample.metal", logits.dtype, {"MOST": MOST, "SG": SG, "EACH": EACH, "LEADS": leads}
    )
    shape = (rows, pieces, MOST)
    made = prepare(launcher, first, (pieces, rows, 1), 32 * SG, (shape, mx.float32), (shape, mx.int32))(logits, draws)
    sg = max(MOST // 32, min(32, -(-pieces * MOST // (32 * EACH))))  # a thread for each candidate that is left
    each = -(-pieces * MOST // (32 * sg))
    second = render(
        "sample_merge",
        "sample.metal",
        logits.dtype,
        {"MOST": MOST, "SG": sg, "EACH": each, "LEADS": leads, "BEFORE": before is not None},
        ["before"] * (before is None),
    )
    left = (2, rows) if leads else (rows + (0 if before is None else before.size),)
    launch = prepare(launcher, second, (1, rows, 1), 32 * sg, (left, mx.int32))
    return launch(*made, draws, *([] if before is None else [before]))[0]


def sample_reference(
    logits: mx.array, draws: mx.array, *, leads: bool = False, before: mx.array | None = None
) -> mx.array:
    """`sample` in stock MLX, for any draws."""
    rows = [_FORMAT.unpack(row.tobytes()) for row in np.array(draws)]
    tokens = mx.stack([_drawn(logits[i], *row) for i, row in enumerate(rows)]).astype(mx.int32)
    if not leads:
        return tokens if before is None else mx.concatenate([before, tokens])
    two = [
        stock.softcap(x.astype(mx.float32), row[-1]) for x, row in zip(mx.topk(logits, 2, axis=-1), rows, strict=True)
    ]
    found = [mx.array(3e38) if row[0] else x.max() - x.min() for x, row in zip(two, rows, strict=True)]
    return mx.stack([tokens, mx.stack(found).view(mx.int32)])


SAMPLE = Op("sample", sample, sample_reference)


def drawn(run: Kernels | None, logits: mx.array, draws: Sequence[Draw]) -> mx.array:
    """A token for each row of logits [B, V], int32 [B], in kernels where there are any for these draws."""
    if run is None or not all(draw.in_kernel for draw in draws):
        return sample_reference(logits, draws_of(draws))
    return run(SAMPLE, logits, draws_of(draws))


def _drawn(
    logits: mx.array,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    high: int,
    low: int,
    position: int,
    softcap: float,
) -> mx.array:
    """Draw a token, int [], from logits [V]."""
    if temperature == 0:
        return mx.argmax(logits)
    vocab, ids = logits.size, None
    logits = logits.astype(mx.float32)
    if 0 < top_k < vocab or top_p < 1:
        ids = likeliest(logits, top_k or vocab)
        logits = logits[ids]
    logits = stock.softcap(logits, softcap)
    logits = logits - logits.max()
    weights = mx.exp(logits)
    kept = weights >= min_p
    if top_p < 1:
        kept = kept & (mx.cumsum(weights, inclusive=False) < top_p * weights.sum())
    all_ids = mx.arange(vocab) if ids is None else ids
    values = mx.where(kept, logits / temperature, -mx.inf) + noise(all_ids, high, low, position)
    drawn = mx.argmax(values)
    return drawn if ids is None else ids[drawn]


def noise(ids: mx.array, high: int, low: int, position: int) -> mx.array:
    """The noise of tokens, int [n], for a seed of two words and a position: fp32 [n], of a Gumbel distribution."""
    a, b = threefry((high, low), (position, 0))
    keys = mx.stack([mx.full(ids.shape, a, mx.uint32), ids.astype(mx.uint32) ^ mx.array(b, mx.uint32)], axis=-1)
    u = mx.vmap(lambda key: mx.random.uniform(key=key))(keys)  # MLX's Threefry of the counter (0, 0)
    return -mx.log(-mx.log1p(-mx.maximum(u, 2.0**-33)))


def threefry(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """Threefry-2x32 in 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)."""
    keys, word = (*key, key[0] ^ key[1] ^ 0x1BD11BDA), 0xFFFFFFFF
    a, b = (counter[0] + keys[0]) & word, (counter[1] + keys[1]) & word
    for r in range(20):
        turn = (13, 15, 26, 6, 17, 29, 16, 24)[r % 8]
        a = (a + b) & word
        b = a ^ ((b << turn | b >> (32 - turn)) & word)
        if r % 4 == 3:
            n = r // 4 + 1
            a, b = (a + keys[n % 3]) & word, (b + keys[(n + 1) % 3] + n) & word
    return a, b


def likeliest(logits: mx.array, k: int) -> mx.array:
    """Ids of the k largest logits, fp32 [V], largest first and of equals the lowest first: int [k].

    They lie within the k groups whose largest come first, by the same order: only these are sorted.
    """
    pad = -logits.size % GROUP
    ids, values = mx.arange(logits.size + pad), mx.pad(logits, (0, pad), constant_values=-mx.inf)
    groups = values.reshape(-1, GROUP)
    if groups.shape[0] > k:
        some = mx.argpartition(_order(groups.max(axis=1), mx.arange(groups.shape[0])), kth=k - 1)[:k]
        ids, values = ids.reshape(-1, GROUP)[some].reshape(-1), groups[some].reshape(-1)
    return ids[mx.argsort(_order(values, ids))[: min(k, logits.size)]]


def _order(values: mx.array, ids: mx.array) -> mx.array:
    """Whole numbers, each different, of the order that `likeliest` has: int64 [n]."""
    bits = (values + 0.0).view(mx.int32)  # -0 becomes 0
    ascending = mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(mx.int64)
    return ids.astype(mx.int64) - ascending * (1 << 32)


@cases
def sample_cases(s: Sizes) -> Iterator[Check]:
    kinds = (
        LIKELIEST,
        Draw(0.8, seed=5, softcap=30.0),
        Draw(1.0, 64, 0.95, seed=6, position=3),
        Draw(1.5, MOST, 1.0, 0.01, 7, softcap=30.0),
    )

    def make(of: Sequence[Draw], leads: bool, before: mx.array | None = None) -> Case:
        logits, draws = normal(len(of), s.vocab) * 3, draws_of(of)
        return case(SAMPLE, 4 * logits.size, logits, draws, leads=leads, before=before)

    if s.vocab:
        yield Check(SAMPLE.key, f"{s.vocab}", partial(make, kinds, False))
        yield Check(SAMPLE.key, f"{s.vocab}, leads", partial(make, (LIKELIEST, kinds[2]), True))
        yield Check(
            SAMPLE.key, f"{s.vocab}, behind others", partial(make, kinds[1:2], False, mx.array([5, 7], mx.int32))
        )
