"""A step's numbers: the examples of spans.py, and rows of all parts against the window's definition."""

from __future__ import annotations

import pytest
from plain_state import LAYOUTS, read, small_model, some_tokens

from mlx_gemma4.model.decode import with_room
from mlx_gemma4.model.spans import FIXED, Spans, in_sight, spans_of


def test_the_examples() -> None:
    of_global = [((FIXED, FIXED), (0, 64)), ((FIXED, -63), (0, 0))]
    with_window = [((-15, FIXED), (0, 64)), ((-79, -63), (0, 0))]
    spans = Spans([((0, -64), (0, 0)), *of_global, *with_window], {False: 2, True: 2})
    assert spans.at(70).tolist() == [70, 6, 0, 64, 0, 7, 55, 64, 0, 7]
    assert spans.at(80).tolist()[6:] == [64, 64, 1, 17]


@pytest.mark.parametrize("window", [5, 13, 64])
def test_a_step_sees_its_window(window: int) -> None:
    """At every position until the tail is full, each token in sight is in one part, and no other is."""
    model = small_model("12b", window, LAYOUTS[2])
    for length in (1, 7, 8, 30, 61):
        state = model.new_state()
        read(model, state, some_tokens(length))
        layers = with_room(model.loaded, state)
        spans = spans_of(model.config, layers, 1)
        count = next(iter(layers.values())).count
        for position in range(length, length + LAYOUTS[2].tail - count):
            numbers = spans.at(position).tolist()
            assert numbers[:2] == [position, count + position - length]
            at = 2
            for sliding, n in spans.lengths.items():
                kv = next(kv for i, kv in layers.items() if model.config.layers[i].sliding == sliding)
                starts = [s.start for s in in_sight(kv, window if sliding else None)] + [kv.stop - kv.count]
                rows = [numbers[at + 2 * i : at + 2 * i + 2] for i in range(n)]
                assert set(map(tuple, rows[len(starts) :])) <= {(0, 0)}
                seen = [s + row for s, (a, b) in zip(starts, rows, strict=False) for row in range(a, b)]
                assert seen == list(range(max(0, position - window + 1) if sliding else 0, position + 1))
                at += 2 * n
            assert at == len(numbers) == spans.size
