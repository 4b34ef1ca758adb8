"""Sums and rows over ranks, by exchange.metal: each rank a thread here, in memory that all write to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import exchange_host
import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import metal

from mlx_gemma4.gpu.recording import Arena, RecordedLaunch, Recording, recorded, recorder
from mlx_gemma4.ops.exchange import Boxes, exchange_rows, exchange_sum
from mlx_gemma4.shard import shares

ROOM = 4096  # numbers


def on_ranks(given: list[tuple[np.ndarray, ...]], make: Callable[..., Any], rounds: int = 3) -> list[list[np.ndarray]]:
    """What each rank's exchanges give, one after the other; of the nth, its arrays are n times as large."""
    ranks = len(given)
    memory = [np.zeros(2 * ranks * ROOM, np.uint64) for _ in range(ranks)]
    halves = np.array([m.ctypes.data for m in memory] + [0] * 4, np.uint64).view(np.uint32).reshape(-1, 2)
    found: list[list[np.ndarray]] = [[] for _ in range(ranks)]

    def be(rank: int) -> None:
        boxes = Boxes(mx.array(halves), rank, ranks, ROOM)
        for n in range(rounds):
            launch = launch_of(given[rank], make, boxes)
            inputs = [a * (n + 1) for a in given[rank]] + [np.array([2**31 - 1 + n], np.uint32).view(np.int32), halves]
            out = np.full(launch.outputs[0].shape, np.nan, np.float32)
            exchange_host.run(launch, inputs, out)
            found[rank].append(out)

    threads = [threading.Thread(target=be, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a rank waits for ever"
    return found


def launch_of(arrays: tuple[np.ndarray, ...], make: Callable[..., Any], boxes: Boxes) -> RecordedLaunch:
    recording = Recording(Arena())
    with lock, recorded(recording):
        make(*(recording.buffer(a.shape, mx.float32) for a in arrays), recording.buffer((1,), mx.int32), boxes)
    return recording.launches[0]


lock = threading.Lock()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("rows", [1, 5])
def test_all_ranks_get_the_same_sum(rows: int, ranks: int) -> None:
    """Exchange after exchange, in boxes that still hold the numbers before, over the largest flag that int32 holds."""
    chance = np.random.default_rng(0)
    given = [(chance.standard_normal((rows, 96), np.float32),) for _ in range(ranks)]
    found = on_ranks(given, lambda x, flag, boxes: exchange_sum(recorder, x, flag, boxes, None))
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
        given, lambda x, outputs, share, flag, boxes: exchange_sum(recorder, x, flag, boxes, None, (outputs, share)), 1
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
    found = on_ranks(given, lambda x, flag, boxes: exchange_rows(recorder, x, flag, boxes, None, columns))
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
