"""Layouts of rows among experts, against what they promise: every row in a place of its own, of its expert."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_gemma4 import routing
from mlx_gemma4.routing import Layout, lay_out, padded


def experts_of_places(layout: Layout, tile: int) -> np.ndarray:
    """The expert that each place's product multiplies with."""
    return np.array(
        [
            i * tile + e
            for i, products in enumerate(layout.products)
            for p in products
            for e in range(p.first, p.last)
            for _ in range(p.rows)
        ]
    )


def routed(seed: int, tokens: int, experts: int, used: int, skew: float) -> np.ndarray:
    """Experts of tokens, some liked better: the logarithms of how much differ by `skew`."""
    rng = np.random.default_rng(seed)
    scores = skew * rng.normal(size=experts) + rng.gumbel(size=(tokens, experts))
    return np.argsort(scores, axis=1)[:, -used:].reshape(-1).astype(np.uint32)


@pytest.mark.parametrize("skew", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("tile", [1, 3, 8, 128])
@pytest.mark.parametrize("experts", [128, 60])
def test_a_row_has_a_place_with_its_expert(experts: int, tile: int, skew: float) -> None:
    for tokens in (1, 9, 64, 500):
        chosen = routed(tokens, tokens, experts, 8, skew)
        layout = lay_out(chosen, experts, tile)
        of_place = experts_of_places(layout, tile)
        assert len(layout.products) == -(-experts // tile)
        assert len(of_place) == len(layout.sources) and max(of_place) < experts
        assert (of_place[layout.places] == chosen).all()
        assert (layout.sources[layout.places] == np.arange(chosen.size)).all()
        assert layout.sources.min() >= 0 and layout.sources.max() < chosen.size


def test_one_product_a_tile_where_experts_are_alike() -> None:
    for tokens in (64, 512, 1024, 2048):
        layout = lay_out(routed(0, tokens, 128, 8, 0), 128, 8)
        assert [len(products) for products in layout.products] == [1] * 16
        assert len({products[0].rows for products in layout.products}) <= 2


@pytest.mark.parametrize("skew", [0.5, 1.0, 2.0, 4.0])
def test_padding_is_bounded(skew: float) -> None:
    """By what a product for each expert would cost, of rows and of launches."""
    chosen = routed(1, 2048, 128, 8, skew)
    counts = padded(np.bincount(chosen, minlength=128))
    for tile in (8, 16):
        layout = lay_out(chosen, 128, tile)
        n = sum(map(len, layout.products))
        assert len(layout.sources) + routing.OWN * n <= counts.sum() + routing.OWN * np.count_nonzero(counts)
        assert n < 64


def test_all_rows_to_one_expert() -> None:
    layout = lay_out(np.full(2048, 77, np.uint32), 128, 8)
    assert [len(products) for products in layout.products] == [0] * 9 + [1] + [0] * 6
    (product,) = layout.products[9]
    assert (product.first, product.last, product.rows) == (5, 6, 2048)


def test_padded_numbers_are_few() -> None:
    counts = np.arange(1, 4097)
    rows = padded(counts)
    assert (rows >= counts).all() and (rows - counts < np.maximum(counts / 4, routing.LEAST)).all()
    assert len(set(rows.tolist())) == 28
    assert padded(np.array([0, 1, 16, 17, 64, 65, 128, 129, 2048])).tolist() == [0, 16, 16, 32, 64, 80, 128, 160, 2048]
