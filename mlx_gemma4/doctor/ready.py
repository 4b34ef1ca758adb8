"""Makes ready at each load all kernels that conversations with a model launch: none is compiled in a reply.

In: a loaded model; its checks (sizes.py) are the list. Out: kernels that have been checked, once on a machine, and
compiled, in each process. MLX keeps what it compiled for Metal in memory alone, so there each kernel is launched once;
on NVIDIA machine code stays on disk, and what is missing there is compiled on all cores.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any

import mlx.core as mx

from ..execution import execution
from ..gpu import cuda_compiler, render
from ..model.assistant import Assistant
from ..model.model import Model
from ..ops.cases import Check
from ..ops.dispatch import STOCK
from ..ops.few_rows import MAX_ROWS
from ..ops.many_rows import GROUPED_ROWS_FROM
from ..ops.op import OpKey
from . import verdict
from .sizes import assistant_sizes, checks, sizes_of

log = logging.getLogger("mlx_gemma4")

Progress = Callable[[int, int], None]  # kernels that are ready, of how many


def make_ready(model: Model, progress: Progress | None = None, assistant: Assistant | None = None) -> None:
    """Check the kernels of a model that have no verdict yet, and compile all; on a CPU nothing happens.

    Args:
        model: its kernels that fail are switched off.
        progress: called after each check; on NVIDIA also after each kernel that is compiled or found on disk.
        assistant: drafts for the model.
    """
    if model.kernels is None:
        return
    of = [sizes_of(model), *([assistant_sizes(assistant)] if assistant else [])]
    off, listed = model.kernels.off, (c for s in of for c in checks(s, verdict.QUICK_LENGTHS, verdict.QUICK_ROWS))
    wanted = list({c.key: c for c in listed if off.isdisjoint((c.op, OpKey(c.op.op)))}.values())
    on_disk = model.kernels.launcher is render.cuda_launcher
    texts = cuda_texts(wanted) if on_disk else {}
    total, number = len(texts) + len(wanted), count(1)

    def done() -> None:
        if progress:
            progress(min(next(number), total), total)

    cuda_compiler.compile_all(texts, done)
    passed = verdict.check_model(model, wanted, done)
    if not on_disk:
        launch_once(model, passed, done)
    if model.kernels.traced:
        read_some(model)


_texts: dict[str, str] = {}  # CUDA texts that `_describer` was asked for, and their kernels' names


def _describer(name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str) -> Any:
    """A `Launcher` that launches nothing: it notes what NVRTC is to compile."""
    source, header = render.to_cuda_text(source, header)
    shaped = cuda_compiler.shaped_inputs(tuple(input_names), source)

    def call(*, inputs: Any, output_shapes: Any, output_dtypes: Any, **_: Any) -> Sequence[mx.array]:
        types, ranks = [*(a.dtype for a in inputs), *output_dtypes], [inputs[i].ndim for i in shaped]
        _texts[cuda_compiler.text(name, input_names, output_names, source, header, types, ranks)] = name
        return [mx.zeros(s, t) for s, t in zip(output_shapes, output_dtypes, strict=True)]

    return call


@execution()
def cuda_texts(some: Iterable[Check]) -> dict[str, str]:
    """Return the texts that NVRTC compiles for these checks, with their kernels' names."""
    _texts.clear()
    for check in some:
        try:
            check.make().kernel(_describer)
        except Exception as error:  # the check itself will tell
            log.debug("%s: %s", check.key, error)
    return dict(_texts)


@execution()
def launch_once(model: Model, some: Iterable[Check], done: Callable[[], None]) -> None:
    """Launch the kernels of checks, without a look at their results; switch off what can't be launched."""
    assert model.kernels is not None
    for check in some:
        try:
            if check.op in model.kernels.off:
                continue
            mx.async_eval(verdict.arrays_of(check.make().kernel(model.kernels.launcher)))
        except Exception as error:  # anything that a backend's compiler or launch raises
            model.kernels.off |= {check.op}
            log.warning("Kernel %s fails here and is off, %s: %s", check.op, STOCK, verdict.reason_of(error))
        finally:
            done()
    mx.clear_cache()


def read_some(model: Model) -> None:
    """Read the shortest prompt that takes all paths, and a token: MLX compiles some of its own kernels at first use."""
    c = model.config
    grouped = -(-GROUPED_ROWS_FROM * c.experts // c.experts_used) if c.experts else 0
    try:
        state = model.new_state()
        model.forward(mx.arange(max(MAX_ROWS + 1, grouped)) % c.vocab, state)
        mx.eval(model.step(1, state).logits())
        mx.clear_cache()
    except Exception as error:  # a reply will tell, or do without
        log.debug("Reading a first prompt: %s", error)
