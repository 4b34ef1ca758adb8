"""Steps for several states in kernels over a pool of pages, run by the Metal simulator: as each state steps alone."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from batched import alone, converse, read
from kernel_cases import metal
from kernel_models import BUDGET, UNIFORM, Counting, both
from recorded import prompts

from mlx_gemma4.kv.state import total_nbytes
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops import few_rows, paged, tuning
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.op import OpKey

NEAR = 1e-3
OFF = frozenset(map(OpKey, ["expand", "few_rows"]))  # which round to fp16


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that fixtures' prompts take several, and windows leave some behind."""
    monkeypatch.setattr(paged, "PAGE", 32)


@pytest.mark.parametrize("kind", BUDGET)
def test_rows_are_as_alone(kind: str, tmp_path: Path) -> None:
    """Of different lengths, among them none, and one past the window; then they have all that they would have alone."""
    plain, fused = both(kind, "q4_k_m", tmp_path, off=OFF)
    texts = [prompts(kind)[1], [], prompts(kind)[2][:31]]
    together, solo = ([read(plain, ids) for ids in texts] for _ in "ab")
    for step in range(3):
        tokens = [5 + step, 2, 7]
        got = np.array(fused.batch_step(tokens, together))
        want = np.stack([alone(plain, *pair) for pair in zip(solo, tokens, strict=True)])
        np.testing.assert_allclose(got, want, atol=NEAR)
    assert fused.batcher is not None and len(fused.batcher.pool.arrays) == fused.config.own_kv_layers
    for a, b in zip(together, solo, strict=True):
        assert a.borrower is not None and a.tokens == b.tokens and a.length == b.length
        assert [(s.start, s.stop) for kv in a.layers.values() for s in kv.segments] == [
            (s.start, s.stop) for kv in b.layers.values() for s in kv.segments
        ]
        assert a.borrower is None
        for x, y in zip(a.arrays, b.arrays, strict=True):
            np.testing.assert_allclose(np.array(x), np.array(y), atol=NEAR)
    assert not fused.batcher.pool.arrays  # nobody is in


@pytest.mark.parametrize("kind", BUDGET)
def test_launches_do_not_grow_with_states(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most three a layer more than for one, whatever their number; in fp16, as on a GPU."""
    monkeypatch.setattr(Model, "kv_dtype", mx.float16)
    counting = Counting()
    plain, fused = both(kind, UNIFORM[kind], tmp_path, counting)
    found = []
    for n in (0, 2, 6):
        states = [read(plain, prompts(kind)[0]) for _ in range(n or 1)]
        if n:
            mx.eval(fused.batch_step([5] * n, states))
        counting.launches.clear()
        mx.eval(fused.batch_step([5] * n, states) if n else fused.forward(mx.array([5]), states[0]))
        found.append(counting.launches.copy())
    alone, two, six = found
    for counted in (two, six):  # two rows of a small weight go through the mat-vec
        counted["few_rows"] += counted.pop("matvec", 0)
    assert two == six
    assert alone.total() <= two.total() <= alone.total() + 3 * len(fused.config.layers)


@pytest.mark.parametrize("kind", ["e2b", "26b-a4b"])
def test_products_in_parts(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the norm after them adds up is what they make otherwise."""
    plain, fused = both(kind, UNIFORM[kind], tmp_path)
    states = [read(plain, prompts(kind)[1]) for _ in range(3)]
    want = np.array(fused.batch_step([5, 2, 7], [state.fork() for state in states]))
    rule, in_parts = few_rows.rows_tiling, list[bool]()

    def tiling(*args: Any, added: bool = False, **options: Any) -> few_rows.RowsTiling:
        in_parts.append(added)
        return replace(rule(*args, **options), parts=1 + added)

    monkeypatch.setattr(few_rows, "rows_tiling", tiling)
    tuning.use(None)  # forget launches
    try:
        got = np.array(fused.batch_step([5, 2, 7], states))
    finally:
        tuning.use(None)
    assert any(in_parts) and not all(in_parts)
    np.testing.assert_allclose(got, want, atol=NEAR)


@pytest.mark.parametrize("seed", range(3))
def test_states_come_and_go(seed: int, tmp_path: Path) -> None:
    plain, fused = both("e2b", "q8_0", tmp_path, off=OFF)
    one, other = (converse(fused, plain, batched, seed, 40) for batched in (True, False))
    assert one[1] == other[1]
    for a, b in zip(one[0], other[0], strict=True):
        np.testing.assert_allclose(a, b, atol=NEAR)


def test_pages_are_given_back(tmp_path: Path) -> None:
    """By a state that is closed, one that nobody has any more, and those behind a window."""
    plain, fused = both("12b", "q8_0", tmp_path, off=OFF)
    assert fused.batcher is not None
    pool = fused.batcher.pool
    states = [read(plain, prompts("12b")[0]) for _ in range(3)]
    mx.eval(fused.batch_step([2, 2, 2], states))
    used = sum(len(pages) for seat in pool.seats for pages in seat.pages.values())
    states[0].close()
    assert sum(len(pages) for seat in pool.seats for pages in seat.pages.values()) == used * 2 // 3
    del states[0], states[0]
    gc.collect()
    mx.eval(fused.batch_step([2, 3], [states[0], read(plain, [])]))
    assert len(pool.seats) == 2
    long = read(plain, [2])
    for i in range(140):
        logits = fused.batch_step([i], [long])
    (seat,) = (seat for seat in pool.seats if seat.state() is long)
    assert len(seat.pages[False]) == 5 and len(seat.pages[True]) < 5
    np.testing.assert_allclose(np.array(logits[0]), alone(plain, read(plain, [2, *range(139)]), 139), atol=NEAR)


def test_a_prefix_that_others_hold_is_shared_again(tmp_path: Path) -> None:
    plain, fused = both("12b", "q8_0", tmp_path, off=OFF)
    kept = read(plain, [2] * 70)
    states = [kept.fork() for _ in "ab"]
    mx.eval(fused.batch_step([3, 4], states))
    for state in states:
        for i, kv in state.layers.items():
            assert kv.segments[0] is kept.layers[i].segments[0]


def test_nobody_leaves_to_be_measured(tmp_path: Path) -> None:
    plain, fused = both("12b", "q8_0", tmp_path, off=OFF)
    states = [read(plain, [2] * 70) for _ in "ab"]
    before = total_nbytes(states)
    mx.eval(fused.batch_step([3, 4], states))
    assert before // 2 <= states[0].nbytes <= total_nbytes(states) <= 3 * before
    assert all(state.borrower is not None for state in states)


@pytest.mark.parametrize("traced", [False, True])
def test_operations_that_are_off_run_as_references(traced: bool, tmp_path: Path) -> None:
    """All, which MLX can trace; without tracing those of the pool alone: its arrays are then not written in place."""
    plain, _ = both("12b", "q8_0", tmp_path, off=OFF)
    names = ["qkv_post", "paged_attention", "fill_pages", "few_rows"]
    names += ["embed", "rotations", "add_norm", "matvec", "dense"] if traced else []
    model = Model(plain.config, plain.weights, Kernels(metal, frozenset(map(OpKey, names)), traced))
    together, solo = ([read(plain, prompts("12b")[n]) for n in range(2)] for _ in "ab")
    for step in range(40 if traced else 3):
        got = np.array(model.batch_step([step, 7], together))
        want = np.stack([alone(plain, *pair) for pair in zip(solo, (step, 7), strict=True)])
        np.testing.assert_allclose(got, want, atol=NEAR)


def test_quantized_states_step_alone(tmp_path: Path) -> None:
    plain, fused = both("12b", "q8_0", tmp_path, off=OFF)
    together, solo = ([read(plain, prompts("12b")[2][:70], kv) for kv in ("full", "q8", "full")] for _ in "ab")
    for i in range(2):
        got = np.array(fused.batch_step(mx.array([5 + i, 6, 7]), together))
        want = np.stack([alone(plain, s, t) for s, t in zip(solo, (5 + i, 6, 7), strict=True)])
        np.testing.assert_allclose(got, want, atol=5e-3)
    assert [state.borrower is None for state in together] == [False, True, False]
