"""Decode steps at the published models' full sizes: all of a step runs in kernels, in as few launches as are budgeted.

Weights and states are lazy zeros that nothing evaluates, so 31B takes no memory: what is seen is which kernels a step
asks for. Fixtures can't show it: with two experts chosen, what takes four rows at a time takes them all.
"""

from __future__ import annotations

import sys
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import make_synthetic

from mlx_gemma4 import attention, coded_attention, decode, fused, loader, ple, quant
from mlx_gemma4.config import config_from_gguf
from mlx_gemma4.decode import Kernels
from mlx_gemma4.execution import execution
from mlx_gemma4.loader import Entry, Source, load_model
from mlx_gemma4.memory import Plan
from mlx_gemma4.model import Model

BUDGET = {"e2b": 9, "e4b": 9, "12b": 9, "31b": 9, "26b-a4b": 13}  # launches a layer; one more where v's type differs
OUTSIDE = 4  # of the layers: embedding, the head, and what per-layer embeddings start with


def zeros(type: str, shape: tuple[int, ...]) -> Any:
    """A weight that is never evaluated."""
    if type not in quant.FORMATS:
        return mx.zeros(shape, {"F32": mx.float32, "BF16": mx.bfloat16}[type])
    f, (*rows, k) = quant.FORMATS[type], shape
    sub = mx.zeros((*rows, k // f.group * f.sub_bits // 8), mx.uint8) if f.sub_bits else None
    top = mx.zeros((*rows, k // f.super_block, 1 + f.has_min), mx.float16) if f.super_block else None
    return quant.Packed(f, shape, mx.zeros((*rows, k * f.bits // 32), mx.uint32), sub, top)


def lazy_model(kind: str, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> tuple[Model, int]:
    """A model of a real size in a Q4_K_M's types, and how many of its layers have a v of another type than q and k."""
    keys = make_synthetic.metadata(kind)
    tensors = make_synthetic.tensors(kind, keys)
    entries = {name: Entry(shape, type, prod(shape)) for name, (shape, type) in tensors.items()}

    def read(names: list[str], *_: Any) -> Any:
        shape, type = tensors[names[0]]
        if len(names) > 1:
            shape = (*shape[:-2], sum(tensors[name][0][-2] for name in names), shape[-1])
        return zeros(type, shape)

    monkeypatch.setattr(loader, "make_plan", lambda *_: Plan("packed", 0, 1 << 40))
    monkeypatch.setattr(Model, "kv_dtype", mx.float16)
    source = Source(kind, entries, read, lambda name, _: prod(tensors[name][0]))
    model, _ = load_model(config_from_gguf(keys, kind), source, "packed", True, None, kernels)
    return model, sum(layer.attn_v is not None for layer in model.weights.layers)


@pytest.mark.parametrize("kind", BUDGET)
def test_a_step_of_a_real_size_runs_in_kernels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Counter[str] = Counter()

    def maker(**declared: Any) -> Any:
        def call(*, output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
            made[declared["name"].rsplit("_", 1)[0]] += 1
            return [mx.zeros(s, t) for s, t in zip(output_shapes, output_dtypes, strict=True)]

        return call

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a twin runs")

    monkeypatch.setattr(decode, "product_twin", refuse)
    for each in (fused, attention, coded_attention, ple):
        for name in [name for name in vars(each) if name.endswith("_twin")]:
            monkeypatch.setattr(each, name, refuse)
    model, apart = lazy_model(kind, Kernels(maker), monkeypatch)
    state = model.new_state()
    with execution():
        for i, shape in enumerate(model.config.layers):
            if shape.kv_layer == i:
                some = mx.zeros((1, shape.kv_heads, 600, shape.head_dim), mx.float16)
                state.append(i, some, some)
        state.advance(mx.array(np.zeros(600, np.int32)))
        step = decode.make_step(model, model.kernels, model._rope_of)
        logits = step(mx.array([1]), state)
    assert logits.shape == (1, model.config.vocab)
    layers = len(model.config.layers)
    assert 0 < made.total() <= BUDGET[kind] * layers + apart + OUTSIDE, made
    assert made["attention"] == made["merge"] == layers
