"""Sums and rows over ranks, by exchange.metal and exchange_many.metal: each rank a thread here, whose runs of the
simulator write to memory that all share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import shared_boxes
from kernel_cases import metal, normal

from mlx_gemma4.ops import exchange_many as many
from mlx_gemma4.ops.exchange import Boxes, exchange_rows, exchange_sum
from mlx_gemma4.ops.exchange_many import box_bytes, exchange_many
from mlx_gemma4.ops.norms import NormOptions, add_norm
from mlx_gemma4.shard import shares

ROOM = 4096  # numbers
Made = list[list[np.ndarray]]  # of each rank, of each round


def on_ranks(
    given: list[tuple[np.ndarray, ...]],
    make: Callable[..., Any],
    rounds: int = 3,
    nbytes: int = 0,
    room: int = ROOM,
) -> Made:
    """What each rank's exchanges give, one after the other; of the nth, its arrays are n times as large."""
    ranks = len(given)
    places = [shared_boxes.box(nbytes or 2 * ranks * ROOM * 8)[0] for _ in range(ranks)]
    halves = mx.array(np.array([*places, 0, 0, 0, 0], np.uint64).view(np.uint32).reshape(-1, 2))
    found: Made = [[] for _ in range(ranks)]

    def be(rank: int) -> None:
        boxes = Boxes(halves, rank, ranks, room)
        for n in range(rounds):
            arrays = [mx.array(a * a.dtype.type(n + 1)) for a in given[rank]]
            flag = np.array([2**31 - 1 + n], np.uint32).view(np.int32)
            found[rank].append(make(*arrays, flag, boxes))

    threads = [threading.Thread(target=be, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive(), "a rank waits for ever"
    return found


def launcher(**declared: Any) -> Any:
    """The simulator, whose ranks take their threads in the same order, giving numpy's arrays."""
    run = metal(**declared)
    return lambda **arguments: [np.array(a) for a in run(**arguments)]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("rows", [1, 5])
def test_all_ranks_get_the_same_sum(rows: int, ranks: int) -> None:
    """Exchange after exchange, in boxes that still hold the numbers before, over the largest flag that int32 holds."""
    chance = np.random.default_rng(0)
    given = [(chance.standard_normal((rows, 96), np.float32),) for _ in range(ranks)]
    found = on_ranks(given, lambda x, flag, boxes: exchange_sum(launcher, x, flag, boxes, None))
    for n in range(3):
        want = np.zeros((rows, 96), np.float32)
        for (x,) in given:
            want += x * (n + 1)
        assert all(np.array_equal(made[n], want) for made in found)  # to the bit: in the order of ranks


def test_a_mixture_of_experts_comes_with_it() -> None:
    chance = np.random.default_rng(1)
    shapes = (3, 64), (3, 4, 64), (3, 4)
    given = [tuple(chance.standard_normal(shape, np.float32) for shape in shapes) for _ in range(2)]
    found = on_ranks(
        given, lambda x, outputs, share, flag, boxes: exchange_sum(launcher, x, flag, boxes, None, (outputs, share)), 1
    )
    want = sum(np.stack([x, (outputs * share[..., None]).sum(1)]) for x, outputs, share in given)
    for made in found:
        assert np.abs(made[0] - want).max() <= 1e-5
    assert np.array_equal(found[0][0], found[1][0])


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("columns", [120, 121])
def test_columns_are_put_together(columns: int, ranks: int) -> None:
    """Also where ranks have unequal shares of them."""
    whole = np.random.default_rng(2).standard_normal((3, columns), np.float32)
    given = [(np.ascontiguousarray(whole[:, some.start : some.stop]),) for some in shares(columns, ranks)]
    found = on_ranks(given, lambda x, flag, boxes: exchange_rows(launcher, x, flag, boxes, None, columns))
    for n in range(3):
        assert all(np.array_equal(made[n], whole * (n + 1)) for made in found)


@pytest.mark.parametrize("experts", [False, True])
def test_one_rank_alone_runs_on_the_simulator(experts: bool) -> None:
    """Its text is Metal, and nothing is read or written out of bounds."""
    x, boxes = mx.random.normal((2, 64)), Boxes(mx.zeros((4, 2), mx.uint32), 0, 1, ROOM)
    outputs, share = mx.random.normal((2, 3, 64)), mx.random.normal((2, 3))
    flag = mx.array([1])
    made = exchange_sum(metal, x, flag, boxes, None, (outputs, share) if experts else None)
    want = mx.stack([x, (outputs * share[..., None]).sum(1)]) if experts else x
    assert mx.abs(made - want).max().item() <= 1e-5
    assert mx.array_equal(exchange_rows(metal, x, flag, boxes, x, 64), x)


def test_what_is_too_large_for_a_box_is_refused() -> None:
    boxes = Boxes(mx.zeros((4, 2), mx.uint32), 0, 2, 127)
    with pytest.raises(ValueError, match="128 numbers do not go into a box of 127"):
        exchange_sum(metal, mx.zeros((2, 64)), mx.array([1]), boxes, None)


def many_on_ranks(given: list[tuple[np.ndarray, ...]], room: int, rounds: int = 2) -> Made:
    """`on_ranks` of exchange_many; a round's results are put beside each other."""
    return on_ranks(
        given,
        lambda *a: np.concatenate(exchange_many(launcher, a[:-2], a[-1]), axis=-1),
        rounds,
        box_bytes(len(given)),
        room,
    )


@pytest.fixture
def few_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes by which few numbers are many: 3 threadgroups."""
    monkeypatch.setattr(many, "GROUPS", 3)
    monkeypatch.setattr(many, "THREADS", 64)


@pytest.mark.usefixtures("few_groups")
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("rows", "widths"),
    [(1, (96,)), (3, (64, 48)), (1000, (12,)), (3, (7,)), (5, (8, 3)), (2, (4,))],
    ids=lambda given: str(given).replace(", ", "+"),
)
def test_all_ranks_get_the_same_sums_of_many_rows(rows: int, widths: tuple[int, ...], ranks: int) -> None:
    """To the bit, in one piece and in several, whose flags go on from one exchange to the next."""
    chance = np.random.default_rng(3)
    given = [tuple(chance.standard_normal((rows, width), np.float32) for width in widths) for _ in range(ranks)]
    for room in (1024, max(1, rows * sum(widths) // 40)):
        found = many_on_ranks(given, room)
        for n in range(2):
            want = np.zeros((rows, sum(widths)), np.float32)
            for arrays in given:
                want += np.concatenate(arrays, axis=-1) * (n + 1)
            assert all(np.array_equal(made[n], want) for made in found)


@pytest.mark.usefixtures("few_groups")
@pytest.mark.parametrize("width", [24, 6])
def test_sums_of_halves_are_rounded_once(width: int) -> None:
    chance = np.random.default_rng(4)
    given = [(chance.standard_normal((50, width), np.float32).astype(np.float16),) for _ in range(3)]
    want = sum(x.astype(np.float32) for (x,) in given).astype(np.float16)  # type: ignore[union-attr]
    for made in many_on_ranks(given, 16, 1):
        assert made[0].dtype == np.float16 and np.array_equal(made[0], want)


def test_sums_of_many_rows_at_the_size_of_gpus() -> None:
    """As many threads and threadgroups as on a GPU, which number words from one launch to the next."""
    given = [(np.full((64, 192), rank + 1, np.float32),) for rank in range(2)]
    for made in many_on_ranks(given, many.ROOM):
        assert all((round_ == 3 * (n + 1)).all() for n, round_ in enumerate(made))


@pytest.mark.parametrize(("width", "ranks"), [(96, 2), (264, 2), (96, 3)])
def test_a_norm_sums_on_its_way(width: int, ranks: int) -> None:
    """To the bit what a sum gives and the norm behind it, for several rows, next to sums by launches of their own."""
    chance = np.random.default_rng(5)
    given = [(chance.standard_normal((3, width), np.float32),) for _ in range(ranks)]
    x, post, following = normal(3, width, seed=1), normal(width, seed=2), normal(width, seed=3)
    options = NormOptions(1e-6, following, mx.full((4,), 0.37), None, 0.125, mx.float16)
    mx.eval(x, post, following, options.scale)

    def with_norm(h: mx.array, flag: np.ndarray, boxes: Boxes) -> np.ndarray:
        return np.concatenate(add_norm(launcher, x, h, post, options._replace(exchange=(flag, boxes, None))), axis=-1)

    def summed(h: mx.array, flag: np.ndarray, boxes: Boxes) -> np.ndarray:
        return exchange_sum(launcher, h, flag, boxes, None)

    def in_turns(h: mx.array, flag: np.ndarray, boxes: Boxes) -> np.ndarray:
        return (summed, with_norm)[int(flag[0]) & 1](h, flag, boxes)

    sums = on_ranks(given, summed)[0]
    want = [np.concatenate(add_norm(launcher, x, mx.array(h), post, options), axis=-1) for h in sums]
    for made in on_ranks(given, with_norm):
        assert all(np.array_equal(a, b) for a, b in zip(made, want, strict=True))
    for made in on_ranks(given, in_turns):
        assert np.array_equal(made[0], want[0]) and np.array_equal(made[1], sums[1])
        assert np.array_equal(made[2], want[2])
