"""Decode steps at the published models' full sizes: all of a step runs in kernels, in as few launches as are budgeted.
A prompt through experts, too.

Weights and states are lazy zeros that nothing evaluates, so 31B takes no memory: what is seen is which kernels a step
asks for. Fixtures can't show it: with two experts chosen, what takes four rows at a time takes them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import mlx.core as mx
import pytest
from precompile import Idle, add_rotations, lazy_fill, lazy_model

from mlx_gemma4.execution import execution
from mlx_gemma4.gpu import recording
from mlx_gemma4.model import decode, forward, replay
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops import attention, dispatch, norms, quantized_attention
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.sample import LIKELIEST

BUDGET = {"E2B": 12, "E4B": 12, "12B": 9, "31B": 9, "26B-A4B": 13}  # launches a layer; one more where v's type differs
BF16 = ("E2B", "E4B", "12B", "31B")  # in which experts run as stock operations
OUTSIDE = 7  # of the layers: embedding, first norm, two rotations, the head, and what per-layer embeddings start with


def counting(made: Counter[str]) -> Any:
    """Return a launcher that computes nothing and counts launches by kernel."""

    def launcher(**declared: Any) -> Any:
        def call(*, output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
            made[declared["name"].rsplit("_", 1)[0]] += 1
            return [mx.zeros(s, t) for s, t in zip(output_shapes, output_dtypes, strict=True)]

        return call

    return launcher


@pytest.mark.parametrize(
    ("kind", "depth", "packed"),
    [*((kind, depth, True) for kind in BUDGET for depth in (600, 9000)), *((kind, 600, False) for kind in BF16)],
)
def test_a_step_of_a_real_size_runs_in_kernels(
    kind: str, depth: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Counter[str] = Counter()
    launcher = counting(made)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a reference runs")

    attempt = Kernels.attempt  # an Op holds its reference: the name in its module is not what is called
    monkeypatch.setattr(
        Kernels, "attempt", lambda self, kernel, _, *keys, **how: attempt(self, kernel, refuse, *keys, **how)
    )
    monkeypatch.setattr(dispatch, "product_reference", refuse)
    for module in (norms, attention, quantized_attention):
        for name in [name for name in vars(module) if name.endswith("_reference")]:
            monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(Model, "kv_dtype", mx.float16)
    run = Kernels(launcher)
    model = lazy_model(kind, run, packed)
    state = model.new_state()
    with execution():
        lazy_fill(state, depth)
        logits, _ = decode.make_step(model.loaded, run)(mx.array([1]), state)
    assert logits.shape == (1, model.config.vocab)
    layers, apart = model.config.layers, sum(layer.attn_v is not None for layer in model.weights.layers)
    apart += 0 if packed else len(layers)  # of an unpacked weight, gate and up
    assert 0 < made.total() <= BUDGET[kind] * len(layers) + apart + OUTSIDE, made
    assert made["merge"] == len(layers)
    assert made["rotations"] == 2
    long = sum(not layer.sliding for layer in layers) if depth > 8192 else 0
    assert (made["long_attention"], made["attention"]) == (long, len(layers) - long)


@pytest.mark.parametrize("depth", [9000])
@pytest.mark.parametrize("kv", ["full", "tq4"])
@pytest.mark.parametrize("kind", BUDGET)
def test_a_step_of_a_real_size_can_be_recorded(kind: str, kv: str, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but launches, in a few MB beside the tails; the same again gives the same launches in the same places."""
    monkeypatch.setattr(Model, "kv_dtype", mx.float16)
    model = lazy_model(kind, Kernels(recording.recorder, player=Sink))
    add_rotations(model)
    found = []
    with execution():
        for _ in range(2):
            state = model.new_state(kv=kv)
            lazy_fill(state, depth)
            assert model.replayer
            assert model.replayer.start(1, state, LIKELIEST)
            found.append([(x.kernel.name, x.grid, x.outputs) for x in Sink.launches])
    assert found[0] == found[1]
    rows = sum(s.kv_heads * s.head_dim for i, s in enumerate(model.config.layers) if s.kv_layer == i)
    tails = 2 * mx.float16.size * rows * (256 if kind == "31B" else replay.WORKING)
    assert tails < Sink.nbytes < tails + (32 << 20)
    waits = recording.dependencies(Sink.launches)
    assert sum(map(len, waits)) < 2 * len(waits)


@pytest.mark.parametrize("packed", [True, False])
def test_experts_of_a_prompt_are_two_launches(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,048 tokens of 26B-A4B: gate and up, then down. Nothing is evaluated, so nothing waits for the GPU."""
    monkeypatch.setattr(forward, "mlp", lambda *_: mx.zeros((2048, 2816)))
    made: Counter[str] = Counter()
    launcher = counting(made)

    model = lazy_model("26B-A4B", Kernels(launcher, strict=True), packed)
    mx.eval(mx.zeros(1))
    before = mx.get_active_memory()
    y = forward.mlp_and_experts(model.loaded, 0, model.weights.layers[0], mx.zeros((2048, 2816)))
    assert y.shape == (2048, 2816)
    assert made == {"halve": 2, "grouped": 2}
    assert mx.get_active_memory() - before < 2048 * 2816


class Sink(Idle):
    launches: ClassVar[list[recording.RecordedLaunch]] = []
    nbytes = 0

    def load(self, launches: Sequence[recording.RecordedLaunch], nbytes: int, *_: Any) -> None:
        Sink.launches, Sink.nbytes = list(launches), nbytes
