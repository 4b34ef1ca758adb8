"""Tiles of rows among experts, against what they promise: every row in one tile, of its expert."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma4.ops.routing import TOKENS, Routing


def routed(seed: int, tokens: int, experts: int, used: int, skew: float) -> np.ndarray:
    """Experts of tokens, some liked better: the logarithms of how much differ by `skew`."""
    rng = np.random.default_rng(seed)
    scores = skew * rng.normal(size=experts) + rng.gumbel(size=(tokens, experts))
    return np.argsort(scores, axis=1)[:, -used:].astype(np.uint32)


def check(chosen: np.ndarray, experts: int) -> np.ndarray:
    """The tiles that have rows, having looked at all."""
    routing = Routing(mx.array(chosen), experts)
    order, tiles = np.array(routing.order), np.array(routing.tiles)
    assert sorted(order) == list(range(chosen.size))
    assert ((tiles[:, 0] >= 0) & (tiles[:, 0] < experts)).all()
    full = tiles[tiles[:, 1] < tiles[:, 2]]
    assert (np.concatenate([np.arange(a, b) for _, a, b in full]) == np.arange(chosen.size)).all()
    assert (full[:, 2] - full[:, 1] <= TOKENS).all()
    for expert, first, last in full:
        assert (chosen.reshape(-1)[order[first:last]] == expert).all()
    counts = np.bincount(chosen.reshape(-1), minlength=experts)
    assert len(full) == (-(-counts // TOKENS)).sum()
    assert (tiles[len(full) :, 1] == tiles[len(full) :, 2]).all()
    return full


@pytest.mark.parametrize("skew", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("experts", [128, 60])
def test_a_row_is_in_one_tile_of_its_expert(experts: int, skew: float) -> None:
    for tokens in (1, 9, 64, 500):
        check(routed(tokens, tokens, experts, 8, skew), experts)


@pytest.mark.parametrize("expert", [0, 77, 127])
def test_all_rows_to_one_expert(expert: int) -> None:
    tiles = check(np.full((256, 8), expert, np.uint32), 128)
    assert (tiles[:, 0] == expert).all() and len(tiles) == 2048 // TOKENS


def test_as_many_tiles_as_there_can_be() -> None:
    """One row more than tiles hold, for each expert."""
    counts = [TOKENS + 1] * 4
    assert len(check(np.repeat(np.arange(4), counts).astype(np.uint32).reshape(-1, 1), 4)) == 8
