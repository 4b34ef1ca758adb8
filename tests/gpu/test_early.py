"""Launches that begin before those ahead of them have ended: what kernels do until INPUTS_READY (kernels/cuda.h).

Texts are held to what they may name till then, whole steps to the bit: `EarlyPlayer` begins all launches of a step at
once, so that a kernel that reads too early finds no number.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from batched import read
from host_player import EarlyPlayer, HostPlayer
from kernel_cases import metal, normal
from recorded import path, prompts

from mlx_gemma4 import load
from mlx_gemma4.gpu import cuda_compiler, render
from mlx_gemma4.gpu.recording import Arena, RecordedLaunch, Recording, recorded, recorder
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops import paged
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.long_attention import LongLaunchConfig, long_attention
from mlx_gemma4.ops.op import OpKey
from mlx_gemma4.ops.qkv import QKV_POST, QKVArrays, QKVOptions

KERNEL_FILES = sorted((Path(__file__).parents[2] / "kernels").glob("*.metal"))
# What no launch of a step writes, so that a kernel may read it before its inputs are there: weights and how a layer
# turns its vectors;
WEIGHTS = {"codes", "group_scales", "block_scales", "grid", "rotation"}
WEIGHTS |= {"norm", "post", "next", "norm1", "norm2", "scale", "q_norm", "k_norm"}
# numbers, which are uploaded before a step's first launch or are there from the beginning;
NUMBERS = {"spans", "cut", "places", "count", "lengths", "boxes", "flag"}
# keys and values in codes, which are sealed between steps;
CODES = {f"{what}{i}" for what in "cs" for i in range(7)}
# and keys and values, of all tokens but the step's own: that it leaves these alone is up to the steps below.
OLDER = {"pool_k", "pool_v", *(f"{what}{i}" for what in "kv" for i in range(8))}
EARLY = WEIGHTS | NUMBERS | CODES | OLDER


def until_ready(body: str) -> str:
    """Return what of a body may run before INPUTS_READY: it counts to the end of the block that it stands in."""
    ready, found = [False], []
    for piece in re.split(r"(INPUTS_READY\(\);|[{}])", body):
        if piece == "{":
            ready.append(ready[-1])
        elif piece == "}":
            ready.pop()
        elif piece == "INPUTS_READY();":
            ready[-1] = True
        elif not ready[-1]:
            found.append(piece)
    assert len(ready) == 1
    return "".join(found)


def named_early(body: str, names: set[str]) -> set[str]:
    """Return the names that a body has before INPUTS_READY, but for `const device T* NAME = ..` without a load."""
    plain = re.sub(r"#if EXPERTS\n.*?#endif", "", re.sub(r"(?m)//.*$", "", body), flags=re.DOTALL)
    macros = re.findall(r"(?m)^#define ((?:.*\\\n)*.*)$", plain)
    plain = until_ready(re.sub(r"(?m)^#(?:.*\\\n)*.*$", "", plain))
    plain = re.sub(r"const device \w+\* \w+ = [^;\[]*;|\.\w+", "", plain)
    used = [text for text in macros if re.search(rf"\b{re.split(r'[( ]', text)[0]}\b", plain)]
    return set(re.findall(r"\w+", " ".join([plain, *used]))) & names


@pytest.mark.parametrize("file", KERNEL_FILES, ids=lambda f: f.stem)
def test_kernels_wait_for_their_inputs(file: Path) -> None:
    """On CUDA each waits first of all, or where its text says; until then it names what is EARLY, and no result."""
    for body in re.split(r"(?m)^(?=// kernel: )", file.read_text())[1:]:
        declared = re.match(r"// kernel: \w+\((.*?)\) -> \((.*?)\)", body)
        assert declared
        inputs, outputs = ([n.strip().rstrip("?") for n in listed.split(",")] for listed in declared.groups())
        arrays = [n for n in sorted(inputs) if n]
        types, ranks = [mx.float32] * (len(arrays) + 1), [1] * len(cuda_compiler.shaped_inputs(tuple(arrays), body))
        text = cuda_compiler.text("k", arrays, ["out"], render.to_cuda(body), render._text("cuda.h"), types, ranks)
        code = text[text.index('extern "C"') :]
        assert code.index("LAUNCH_NEXT()") < code.index("INPUTS_READY()")
        if "INPUTS_READY()" in body:
            assert named_early(body, {*inputs, *outputs}) <= EARLY


def test_what_a_text_names_early() -> None:
    body = "int a = x[0];\nif (a) {\n  INPUTS_READY();\n  b = y[0];\n}\nc = z[0];\nINPUTS_READY();\nd = w[0];\n"
    assert named_early(body, {*"xyzw"}) == {*"xz"}
    assert named_early("#define LOAD(i) \\\n  x[i]\nLOAD(0)\nINPUTS_READY();", {"x"}) == {"x"}
    assert named_early("const device T* p = x + 3;\nINPUTS_READY();", {"x"}) == set()
    assert named_early("const device T* p = x + at[3];\nINPUTS_READY();", {"x", "at"}) == {"x", "at"}


# ---------------------------------------------------------------- steps

PLAYERS = (HostPlayer, EarlyPlayer)
OFF = frozenset([OpKey("expand")])  # tiles of a prompt, which round to fp16


def model_of(kind: str, folder: Path, player: type[HostPlayer]) -> Model:
    plain = load(path(kind, "q8_0", folder), weights="packed").model
    HostPlayer.made.clear()
    return Model(plain.config, plain.weights, Kernels(metal, OFF, player=player))


def alike(kind: str, folder: Path, run: Callable[[Model], Any], steps: int) -> None:
    """Hold what a model makes on either player, in so many replayed steps, to be the same to the bit."""
    found = []
    for player in PLAYERS:
        found.append(run(model_of(kind, folder, player)))
        assert isinstance(HostPlayer.made[-1], player) and len(HostPlayer.made[-1].tokens) == steps
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    ("kind", "kv"), [("12b", "full"), ("12b", "tq4"), ("26b-a4b", "full"), ("31b", "full"), ("e2b", "full")]
)
def test_a_step(kind: str, kv: str, tmp_path: Path) -> None:
    def run(model: Model) -> Any:
        state = model.new_state(kv=kv)
        model.prefill(mx.array((prompts(kind)[1] * 64)[:130]), state)
        return [np.array(model.forward(mx.array([i]), state)) for i in (5, 6, 7)]

    alike(kind, tmp_path, run, 3)


@pytest.mark.parametrize("kind", ["12b", "e2b"])
def test_a_step_for_several_states(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(model: Model) -> Any:
        states = [read(model, ids) for ids in (prompts(kind)[1], [], (prompts(kind)[2] * 9)[:70])]
        return [np.array(model.batch_step([5 + step, 2, 7], states)) for step in range(3)]

    monkeypatch.setattr(paged, "PAGE", 32)
    alike(kind, tmp_path, run, 3)


@pytest.mark.parametrize("kind", ["12b", "31b"])
def test_rows_of_one_state(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts that are checked: what a row sees of earlier rows is written by the step itself, in another block too."""

    def run(model: Model) -> Any:
        state, rows = read(model, (prompts(kind)[2] * 9)[:62]), []
        for tokens in ([5, 2, 7, 11], [3, 9, 4]):
            step = model.replayed_check([tokens], [state])
            assert step is not None
            rows.append(np.array(step.logits()))
        return np.concatenate(rows)

    monkeypatch.setattr(paged, "PAGE", 32)
    alike(kind, tmp_path, run, 2)


@pytest.mark.parametrize("count", [0, 1, 62, 63])
def test_attention_on_matrix_units(count: int) -> None:
    """Over a segment and a tail of so many tokens, behind the launch that writes the newest."""
    heads, kv_heads, dim, room = 4, 2, 64, 64
    segment = normal(1, kv_heads, 200, dim, dtype=mx.float16), normal(1, kv_heads, 200, dim, dtype=mx.float16, seed=1)
    old = [normal(1, kv_heads, room, dim, dtype=mx.float16, seed=2 + i) for i in range(2)]
    q, k, v = (normal(1, n * dim, seed=4 + i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    given = QKVArrays(q, k, v, normal(dim), normal(dim, seed=1), normal(1, 2, dim // 2))
    found = []
    for made in PLAYERS:
        recording, player = Recording(Arena()), made()
        numbers: Any = recording.buffer((17,), mx.int32)
        tail: Any = tuple(recording.buffer((1, kv_heads, room, dim), mx.float16) for _ in "kv")
        with recorded(recording):
            run: Any = Kernels(recorder, strict=True)
            options = QKVOptions(heads, kv_heads, 1e-6, mx.float16)
            queries, *tail = run(QKV_POST, given._replace(tail=tail, in_tail=numbers[:1]), options)
            parts: Any = [segment, tuple(tail)]
            config = LongLaunchConfig(simdgroups=1, tiles=1, batch=4, resident=1, share=1)
            out: Any = long_attention(recorder, queries, parts, numbers[1:], scale=0.1, config=config)
        player.load(recording.launches, recording.arena.nbytes, 17, out.region)
        player.write([a.region for a in tail], [mx.where(mx.arange(room)[:, None] < count, a, 0) for a in old])
        player.start(np.array([count, 3, 200, 0, count + 1, *[0] * 12], np.int32), chained=False)
        found.append(np.array(player.read(out.region)))
    assert np.isfinite(found[0]).all()
    np.testing.assert_array_equal(*found)


def test_who_reads_too_early_finds_no_number(tmp_path: Path) -> None:
    """A step whose kernels wait at their end alone."""

    class Hasty(EarlyPlayer):
        def load(self, launches: Any, *arguments: Any) -> None:
            super().load(list(map(hasty, launches)), *arguments)

    def hasty(launch: RecordedLaunch) -> RecordedLaunch:
        source = launch.kernel.source.replace("INPUTS_READY();", "")
        kernel = replace(launch.kernel, name=f"hasty_{launch.kernel.name}", source=f"{source}\nINPUTS_READY();\n")
        return replace(launch, kernel=kernel if launch.kernel.name.startswith("add_norm") else launch.kernel)

    model = model_of("12b", tmp_path, Hasty)
    assert np.isnan(np.array(model.forward(mx.array([5]), model.new_state()))).all()
