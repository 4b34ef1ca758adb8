"""Every kernel that a conversation of a published model launches is one that `doctor` and the first load check, and
that each load makes ready.

Weights and states are lazy zeros of the full sizes; what is compared is texts, with what else a kernel is made of:
the dtypes of its arrays, which of them are so small that Metal has them in its constant address space, and the ranks of
those whose shapes are asked for (CUDA).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import make_synthetic
import mlx.core as mx
import pytest
from precompile import Idle, LazySource, add_rotations, lazy_fill, lazy_model

from mlx_gemma4.doctor import ready, sizes, verdict
from mlx_gemma4.doctor.published import PUBLISHED
from mlx_gemma4.execution import execution
from mlx_gemma4.gpu.cuda_compiler import shaped_inputs
from mlx_gemma4.gpu.recording import RecordedLaunch
from mlx_gemma4.gpu.render import DEVICE_ELEMENTS
from mlx_gemma4.kv import quantization
from mlx_gemma4.loading.assistant import Renamed, assistant_from_gguf, read_assistant
from mlx_gemma4.model import decode, forward
from mlx_gemma4.model.model import Model
from mlx_gemma4.model.weights import Layer, Loaded
from mlx_gemma4.ops import cases, tuning
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.matvec import tiling_key
from mlx_gemma4.ops.tuning import Tiling

ATTENTION = ("attention", "long_attention", "merge", "quantized_attention", "merge_quantized", "prompt_attention")
# Tokens before a step: all kinds of arrangements of segments, up to the longest context.
DEPTHS = (0, 14, 63, 64, 70, 127, 530, 700, 1100, 2100, 4200, 7700, 8200, 12_000, 32_800, 70_000, 130_900)
CHUNKS = (2, 3, 5, 16, 17, 63, 64, 1024)  # tokens of a prompt that are read at once

BATCHES = ((5,), (0, 70), (3, 600, 9000), (40,) * 8, (7,) * 17)  # tokens before a step of each of several states

MOST = {"full": 8, "together": 3}  # kernels of attention; 10 with quantized keys and values

Launched = set[tuple[Any, ...]]


def noting(launched: Launched) -> Any:
    """Return a launcher that computes nothing and notes what Metal would compile."""

    def launcher(*, name: str, input_names: Sequence[str], source: str, **_: Any) -> Any:
        shaped = shaped_inputs(tuple(input_names), source)

        def call(*, inputs: Any, output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
            arrays = [(a.dtype, a.size < DEVICE_ELEMENTS) for a in inputs]
            launched.add((name, *arrays, *output_dtypes, *(inputs[i].ndim for i in shaped)))
            return [mx.zeros(s, t) for s, t in zip(output_shapes, output_dtypes, strict=True)]

        return call

    return launcher


def route(m: Loaded, layer: Layer, x: mx.array) -> tuple[mx.array, mx.array]:
    shape = (x.shape[0], m.config.experts_used)
    return mx.zeros(shape, mx.uint32), mx.zeros(shape)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision, and experts are chosen by nobody: the router's own product is no kernel's on a CPU."""
    monkeypatch.setattr(Model, "kv_dtype", mx.float16)
    monkeypatch.setattr(cases, "on_cpu", lambda: False)
    monkeypatch.setattr(forward, "route", route)


def as_player(launched: Launched) -> Any:
    """Return a player of recorded steps that notes the same of them."""

    class Noting(Idle):
        def load(self, launches: Sequence[RecordedLaunch], nbytes: int, *_: Any) -> None:
            for launch in launches:
                arrays = [(a.dtype, prod(a.shape) < DEVICE_ELEMENTS) for a in launch.inputs]
                shaped = shaped_inputs(launch.kernel.inputs, launch.kernel.source)
                ranks = [len(launch.inputs[i].shape) for i in shaped]
                launched.add((launch.kernel.name, *arrays, *(region.dtype for region in launch.outputs), *ranks))

    return Noting


def converse(model: Model, kv: str) -> None:
    """Decode at all depths, with drafts, launched one by one and recorded; read prompts in chunks of many sizes."""
    assert model.kernels is not None and model.replayer is not None
    step = decode.make_step(model.loaded, model.kernels)
    drafts = [n for n in range(1, decode.MAX_TOKENS + 1) if decode.can_step(model.config, n)]
    for depth in DEPTHS:
        state = model.new_state(kv=kv)
        lazy_fill(state, depth)
        for tokens in drafts:
            if state.fits_tail(tokens):
                step(mx.zeros(tokens, mx.int32), state.fork())
        model.replayer.take_on(state)
    for depth in (0, 9000):
        for tokens in CHUNKS:
            state = model.new_state(kv=kv)
            lazy_fill(state, depth)
            model.forward(mx.zeros(tokens, mx.int32), state)


def at_a_later_load(model: Model, monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Return what a load launches on a machine that has checked all kernels of such a model before."""
    noted: Launched = set()
    again = Model(model.config, model.weights, Kernels(noting(noted)))
    listed = sizes.checks(sizes.sizes_of(again), verdict.QUICK_LENGTHS, verdict.QUICK_ROWS)
    keys = {c.key + verdict.tuned_mark() for c in listed}
    monkeypatch.setattr(verdict, "recall", lambda: verdict.Verdict(keys))
    monkeypatch.setattr(verdict, "run_check", lambda *_: pytest.fail("checked again"))
    ready.make_ready(again)
    return noted


def converse_together(model: Model) -> None:
    for lengths in BATCHES:
        states = [model.new_state() for _ in lengths]
        for state, length in zip(states, lengths, strict=True):
            lazy_fill(state, length)
        model.batch_step(mx.zeros(len(lengths), mx.int32), states)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_launched_less_checked_is_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched_less_checked(kind, monkeypatch)


def test_so_it_is_when_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the numbers of a small GPU and tilings of its own: other kernels, for which other verdicts do not hold."""
    rows = sizes.sizes_of(lazy_model("E2B", Kernels(noting(set())))).packed
    found = {tiling_key(p): Tiling(8, 4, 3, 6) for p in rows[::2]}
    try:
        tuning.use(replace(tuning.apple(10), tilings=found))
        # One more over quantized KV: few threadgroups fill a small GPU, so that it has use for both of `attention`'s.
        launched_less_checked("E2B", monkeypatch, quantized=11)
    finally:
        tuning.use(None)


def test_so_it_is_where_products_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        tuning.use(tuning.Tuning(rows_parts=4, rows_ahead=True))
        launched_less_checked("E2B", monkeypatch)
    finally:
        tuning.use(None)


def launched_less_checked(kind: str, monkeypatch: pytest.MonkeyPatch, quantized: int = 10) -> None:
    launched: dict[str, Launched] = {}
    checked: Launched = set()
    for kv in (*quantization.KINDS, "together"):
        noted = launched[kv] = set()
        model = lazy_model(kind, Kernels(noting(noted), strict=True, player=as_player(noted)))
        add_rotations(model)
        with execution(), monkeypatch.context() as patched:
            for name in ("eval", "async_eval"):
                patched.setattr(mx, name, lambda *_: None)
            if kv == "together":
                converse_together(model)
            else:
                converse(model, kv)
    for check in sizes.checks(sizes.sizes_of(model), verdict.QUICK_LENGTHS, verdict.QUICK_ROWS):
        check.make().kernel(noting(checked))
    launched_at_load = at_a_later_load(model, monkeypatch)
    for kv, noted in launched.items():
        assert not sorted(name for name, *_ in noted - checked), kv
        assert not sorted(name for name, *_ in noted - launched_at_load), kv
        attention = {name for name, *_ in noted if name.rsplit("_", 1)[0] in ATTENTION}
        assert len(attention) <= MOST.get(kv, quantized), (kv, sorted(attention))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "spelling"), [("E2B", "gemma4_assistant"), ("31B", "gemma4-assistant")])
def test_launched_less_checked_of_an_assistant_is_nothing(
    kind: str, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With centroids and without; over all arrangements of segments, plain and quantized."""
    noted: Launched = set()
    checked: Launched = set()
    model = lazy_model(kind, Kernels(noting(noted), strict=True))
    add_rotations(model)
    shape = PUBLISHED[kind]
    metadata, tensors = make_synthetic.assistant(shape, make_synthetic.ASSISTANTS[kind], spelling)

    class Source(LazySource):
        def read(self, names: Sequence[str], *how: Any) -> Any:
            return mx.arange(shape.vocab) if "ordering" in names[0] else super().read(names, *how)

    source = Renamed(Source(kind, tensors))
    assistant = read_assistant(assistant_from_gguf(metadata, source), source, model)
    with execution(), monkeypatch.context() as patched:
        for name in ("eval", "async_eval"):
            patched.setattr(mx, name, lambda *_: None)
        for kv in quantization.KINDS:
            for depth in DEPTHS[2::3]:
                state = model.new_state(kv=kv)
                lazy_fill(state, depth)
                inputs = assistant.inputs(state)
                assistant.drafted(2, mx.zeros(1, mx.int32), mx.zeros((1, shape.hidden)), inputs)
    for s in (sizes.sizes_of(model), sizes.assistant_sizes(assistant)):
        for check in sizes.checks(s, verdict.QUICK_LENGTHS, verdict.QUICK_ROWS):
            check.make().kernel(noting(checked))
    assert not sorted(name for name, *_ in noted - checked)
