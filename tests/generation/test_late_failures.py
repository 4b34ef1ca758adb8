"""Kernels that fail only when their results are evaluated, as all do on Metal: the reply goes on, and is the right one.

On Metal it is the encoding of a launch that raises, in the thread that evaluates; here an operation stands for it that
MLX has for one dtype alone on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from kernel_cases import metal
from kernel_models import both
from recorded import prompts

from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.generation.sampling import Sampling
from mlx_gemma4.generation.scheduler import Scheduler
from mlx_gemma4.model.model import Model
from mlx_gemma4.model.step import LazyBatchStep
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.op import OpKey
from mlx_gemma4.ops.sample import LIKELIEST

GREEDY = Sampling(temperature=0)
TOKENS = 12


def poisoned(a: mx.array) -> mx.array:
    """The same numbers, which can't be evaluated: MLX refuses this product when it is to be computed, not before."""
    half = mx.zeros((32, 32), mx.float16)
    refused = mx.block_masked_mm(half, half, 32, mx.ones((1, 1), mx.bool_))[0, 0]
    return a + (refused * 0).astype(a.dtype)


def lost(output_shapes: Any, output_dtypes: Any) -> list[mx.array]:
    return [poisoned(mx.zeros(s, t)) for s, t in zip(output_shapes, output_dtypes, strict=True)]


def refusing(names: Iterable[str], after: int = 0) -> Any:
    """A launcher on the simulator in which these kernels fail when they are evaluated, from their n-th launch on."""
    left = dict.fromkeys(names, after)

    def launcher(**declared: Any) -> Any:
        name, kernel = declared["name"].rsplit("_", 1)[0], metal(**declared)

        def call(**arguments: Any) -> Any:
            fails = left.get(name) == 0
            if name in left and not fails:
                left[name] -= 1
            try:
                mx.eval(arguments["inputs"])  # the simulator reads them, as no GPU would yet
            except RuntimeError:
                fails = True
            return lost(arguments["output_shapes"], arguments["output_dtypes"]) if fails else kernel(**arguments)

        return call

    return launcher


def nothing_works(**_: Any) -> Any:
    """A launcher whose results all fail when they are evaluated, and can be traced."""
    return lambda *, output_shapes, output_dtypes, **_: lost(output_shapes, output_dtypes)


def reply(model: Model, prompt: list[int], kv: str = "full", sampling: Sampling = GREEDY, **options: Any) -> list[int]:
    state = model.new_state(kv=kv)
    ids = [token.id for token in generate_tokens(model, state, prompt, sampling, TOKENS, **options)]
    assert state.tokens == prompt + ids
    return ids


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


STEPS = ["embed", "rotations", "qkv_post", "attention", "merge", "matvec", "add_norm"]


@pytest.mark.parametrize("after", [0, 40])
@pytest.mark.parametrize("name", [*STEPS, "ple_inputs", "halve", "expand", "sample_pieces"])
def test_one_kernel_fails(name: str, after: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At its first launch, or in the middle of the reply."""
    before = frozenset([OpKey("expand")] if name != "expand" else [])  # tiles round to fp16
    plain, fused = both("e2b", "q4_k_m", tmp_path, refusing([name], after), before)
    prompt = [*prompts("e2b")[0], *range(5, 60 if name == "expand" else 25)]  # which few rows do without
    assert reply(fused, prompt) == reply(plain, prompt)
    assert fused.kernels is not None
    off = {str(key) for key in fused.kernels.off - before}
    assert all(key.split(" ")[0] == name.removesuffix("_pieces") for key in off)
    assert len(warned(caplog)) == len(off) and (off or after)
    caplog.clear()
    assert reply(fused, prompt) == reply(plain, prompt) and len(warned(caplog)) <= 1


@pytest.mark.parametrize("kv", ["full", "tq4"])
def test_all_kernels_fail_in_traced_steps(kv: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, fused = both("31b", "q8_0", tmp_path)
    fused = Model(fused.config, fused.weights, Kernels(nothing_works, traced=True))
    prompt = [*prompts("31b")[0], *range(5, 75)]
    assert reply(fused, prompt, kv) == reply(plain, prompt, kv)
    assert fused.kernels is not None and fused.kernels.off
    assert len(warned(caplog)) == len(fused.kernels.off)


# Several replies at once


def replies(model: Model, prompt: list[int], n: int = 3) -> tuple[list[list[int]], bool]:
    """Replies of different lengths to beginnings of a prompt, made together; and whether they took turns in the end."""
    with Scheduler(model, n) as scheduler, ThreadPoolExecutor(n) as pool:
        states = [model.new_state() for _ in range(n)]
        made = [scheduler.generate_tokens(states[i], prompt[: 9 + i], GREEDY, TOKENS + 2 * i) for i in range(n)]
        got = list(pool.map(lambda tokens: [token.id for token in tokens], made))
    assert [state.tokens for state in states] == [prompt[: 9 + i] + got[i] for i in range(n)]
    return got, scheduler.exact


@pytest.mark.parametrize(
    ("name", "after", "op"),
    [("attention", 0, "paged_attention"), ("fill_pages", 0, "fill_pages"), ("few_rows", 200, "few_rows")],
)
def test_one_kernel_fails_in_steps_of_several(
    name: str, after: int, op: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, fused = both("e2b", "q4_k_m", tmp_path, refusing([name], after))
    prompt = [*prompts("e2b")[0], *range(5, 25)]
    got, turns = replies(fused, prompt)
    assert got == replies(plain, prompt)[0] and not turns
    assert fused.kernels is not None and any(key.op == op for key in fused.kernels.off)
    assert warned(caplog)


def test_steps_of_several_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    """Whatever the reason: then replies take turns."""
    plain, fused = both("e2b", "q4_k_m", tmp_path)
    prompt = [*prompts("e2b")[0], *range(5, 25)]
    real = Model.batch

    def failing(self: Model, tokens: Any, states: Any, draws: Any = None) -> Any:
        logits = real(self, tokens, states, draws).logits()
        return LazyBatchStep(poisoned(logits), draws or [LIKELIEST] * len(states))

    want = replies(plain, prompt)
    monkeypatch.setattr(Model, "batch", failing)
    assert replies(fused, prompt) == (want[0], True)
    assert "replies take turns instead" in warned(caplog)[-1]
