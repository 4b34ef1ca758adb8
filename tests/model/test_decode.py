"""The decode step in kernels, run by the Metal simulator, against the stock forward pass; and its launches, counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import metal
from kernel_models import BUDGET, UNIFORM, Counting, both
from recorded import kl, prompts

from mlx_gemma4.model.decode import can_step
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.op import OpKey

STEPS = 3


@pytest.mark.parametrize(
    ("kind", "tag"),
    [(kind, "q4_k_m") for kind in BUDGET] + [("31b", "rare"), ("26b-a4b", "split-mix"), ("e2b", "ud"), ("12b", "f32")],
)
def test_decode_step_gives_the_stock_logits(kind: str, tag: str, tmp_path: Path) -> None:
    """Past the window, one token at a time, then two at once where a model takes them."""
    plain, fused = both(kind, tag, tmp_path)
    ids = prompts(kind)[1]
    states = [model.new_state() for model in (plain, fused)]
    for state in states:
        plain.prefill(mx.array(ids[: -STEPS - 2]), state)  # what kernels make of a prompt: test_many_rows
    steps = [[i] for i in ids[-STEPS - 2 : -2]] + ([ids[-2:]] if can_step(fused.config, 2) else [])
    for step in steps:
        want, got = (
            np.array(model.forward(mx.array(step), state, all_logits=True))
            for model, state in zip((plain, fused), states, strict=True)
        )
        assert got.shape == want.shape
        few = len(step) > 1  # go into products as halves (few_rows), as a prompt's do
        assert np.abs(got - want).max() <= (1e-2 if few else 1e-3)
        assert kl(want, got) <= (2e-6 if few else 1e-8)
    assert states[0].length == states[1].length
    assert states[0].tokens == states[1].tokens


@pytest.mark.parametrize("kind", BUDGET)
def test_decode_step_in_fp16(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where what norms give and what the state holds is fp16: within what is asked of one."""
    plain, fused = both(kind, "q4_k_m", tmp_path)
    ids = prompts(kind)[1]
    want = logits_after(plain, ids)
    monkeypatch.setattr(Model, "kv_dtype", mx.float16)
    got = logits_after(fused, ids)
    assert 0 < kl(want, got) <= 1e-4


def logits_after(model: Model, ids: list[int]) -> np.ndarray:
    """Of the last tokens, one at a time."""
    state = model.new_state()
    model.prefill(mx.array(ids[:-STEPS]), state)
    return np.stack([np.array(model.forward(mx.array([i]), state)) for i in ids[-STEPS:]])


@pytest.mark.parametrize("kind", ["12b", "e2b", "26b-a4b"])
def test_traced_steps_are_those_built_anew(kind: str, tmp_path: Path) -> None:
    """Past full tails, with two states in turns; all operations as their references, which MLX can trace, and fuse."""
    small = ("embed", "ple_inputs", "rotations", "qkv_post", "attention", "add_norm", "top_k")
    off = frozenset(map(OpKey, (*small, "matvec", "dense", "expand")))
    plain, _ = both(kind, "q8_0", tmp_path)
    models = [Model(plain.config, plain.weights, Kernels(metal, off, traced)) for traced in (False, True)]
    found = []
    for model in models:
        states = [_read(model, prompts(kind)[0]), _read(model, [5] * 63)]
        found.append([np.array(model.forward(mx.array([i % 50]), states[i % 2])) for i in range(140)])
    np.testing.assert_allclose(*found, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", BUDGET)
def test_launches_per_layer(kind: str, tmp_path: Path) -> None:
    """At one token, all launches but those before the first and after the last layer, shared among the layers."""
    counting = Counting()
    _, fused = both(kind, UNIFORM[kind], tmp_path, counting)
    state = fused.new_state()
    fused.prefill(mx.array(prompts(kind)[0]), state)
    counting.launches.clear()
    mx.eval(fused.forward(mx.array([5]), state))
    assert counting.launches["rotations"] == len({layer.sliding for layer in fused.config.layers})
    outside = 3 + (2 if fused.config.ple else 0)  # embed, first norm, head; per_layer_model_proj, ple_inputs
    outside += counting.launches["rotations"]
    per_layer = (counting.launches.total() - outside) / len(fused.config.layers)
    assert per_layer <= BUDGET[kind], counting.launches


def test_an_operation_switched_off_runs_as_its_reference(tmp_path: Path) -> None:
    """Each on its own, and all at once: the same logits, and none of its launches."""
    ops = ("embed", "rotations", "qkv_post", "attention", "add_norm", "matvec", "dense", "top_k")
    for names in [{op} for op in ops] + [set(ops)]:
        counting = Counting()
        plain, fused = both("26b-a4b", "q4_k_m", tmp_path, counting, frozenset(map(OpKey, names)))
        want, got = (
            np.array(model.forward(mx.array([7]), _read(plain, prompts("26b-a4b")[0]))) for model in (plain, fused)
        )
        assert np.abs(got - want).max() <= 1e-3
        assert not counting.launches.keys() & names


def _read(model: Model, ids: list[int]) -> Any:
    state = model.new_state()
    model.prefill(mx.array(ids), state)
    return state
