"""Prompts in fp16, as on a GPU, whose attention runs in its kernel on the simulator, against the stock forward pass."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import metal
from kernel_models import both
from pictured import encoded
from recorded import kl, prompts

from mlx_gemma4.kv.segments import SegmentLayout
from mlx_gemma4.model import forward
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops.op import OpKey

# All that a prompt runs in kernels but its attention.
OTHERS = frozenset(map(OpKey, ("expand", "halve", "grouped", "quantize_kv")))
LAYOUT = SegmentLayout(tail=16, fan=2, tops=2)  # several segments, of which some are quantized, in a short text


@pytest.mark.parametrize(
    ("kind", "tag", "kv"),
    [
        *((kind, tag, kv) for kind, tag in (("31b", "q8_0"), ("e2b", "q4_k_m")) for kv in ("full", "q8")),
        *((kind, "q8_0", kv) for kind in ("26b-a4b", "gemma3", "12b") for kv in ("full", "q8", "tq4")),
    ],
)
def test_chunks_of_a_prompt_give_the_stock_logits(
    kind: str, tag: str, kv: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks that no multiple of a tile or a segment fits, past the window, and behind quantized segments."""
    launched: Counter[tuple[str, str]] = Counter()

    def counting(**declared: Any) -> Any:
        name = declared["name"].rsplit("_", 1)[0]
        constants = dict(line.split()[1:3] for line in declared["header"].splitlines() if line.startswith("#define D "))
        launched[name, constants.get("D", "")] += 1
        return metal(**declared)

    monkeypatch.setattr(Model, "kv_dtype", mx.float16)
    plain, fused = both(kind, tag, tmp_path, counting, OTHERS)
    ids = prompts(kind)[-1] * 3
    found, chosen, choose = [], [], forward.choose_experts
    for model in (plain, fused):

        def choose_as_before(*args: Any, first: bool = model is plain) -> mx.array:
            """Stock attention's experts: of two with like scores rounding would choose."""
            if first:
                chosen.append(choose(*args))
            return chosen[-1] if first else chosen.pop(0)

        monkeypatch.setattr(forward, "choose_experts", choose_as_before)
        state = model.new_state(kv=kv, layout=LAYOUT)
        for start in range(0, len(ids), 37):
            logits = model.forward(mx.array(ids[start : start + 37]), state, all_logits=True)
        found.append(np.array(logits))
    dims = {str(layer.head_dim) for layer in plain.config.layers if layer.head_dim >= 32}
    quantized = {str(layer.head_dim) for layer in plain.config.layers if not layer.sliding}
    assert {d for name, d in launched if name == "prompt_attention"} >= (dims - quantized if kv == "tq4" else dims)
    if kv == "full":
        assert np.abs(found[0] - found[1]).max() <= 2e-3 * np.abs(found[0]).max()
    assert 0 < kl(*found) <= (1e-5 if kv == "full" else 1e-4)  # rounding can change codes, too


@pytest.mark.parametrize("kind", ["12b", "e2b"])
def test_a_picture_reads_as_in_stock_operations(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention kernel lets its tokens see each other, on sliding layers, where the model has it."""
    monkeypatch.setattr(Model, "kv_dtype", mx.float16)
    plain, fused = both(kind, "q8_0", tmp_path, metal, OTHERS)
    cat = encoded(b"cat", 21, plain.config.hidden, scale=0.7)
    text, found = prompts(kind)[-1], []
    ids = text[:9] + cat.ids + text[:5]
    for model in (plain, fused):
        model.soft.add(cat)
        state = model.new_state(layout=LAYOUT)
        model.forward(mx.array(text), state)
        found.append(np.array(model.forward(mx.array(ids), state, all_logits=True, soft=model.soft.rows(ids))))
    assert np.abs(found[0] - found[1]).max() <= 2e-3 * np.abs(found[0]).max()
    state = plain.new_state(layout=LAYOUT)
    plain.forward(mx.array(text), state)
    soft = plain.soft.rows(ids)
    assert soft is not None and (soft.last is not None) == (kind == "12b")
    causal = np.array(plain.forward(mx.array(ids), state, all_logits=True, soft=soft._replace(last=None)))
    assert (np.abs(causal - found[0]).max() > 0.1) == (kind == "12b")
