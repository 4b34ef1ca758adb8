"""An assistant's forward pass: against transformers in fp32, in kernels on the simulator, over all kinds of KV."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import make_synthetic
import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import metal
from recorded import kl

from mlx_gemma4 import ReplyOptions, Sampling, chat, load
from mlx_gemma4.conversation.language_model import demo_path
from mlx_gemma4.generation.drafting import Drafts
from mlx_gemma4.kv.segments import SegmentLayout
from mlx_gemma4.kv.state import KVState
from mlx_gemma4.loading.assistant import load_assistant
from mlx_gemma4.loading.loader import load_model, open_model
from mlx_gemma4.model.assistant import Assistant, kv_layers
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.op import OpKey
from mlx_gemma4.ops.sample import Draw, drawn

FOLDER = Path(__file__).parents[1] / "fixtures" / "assistants"
KINDS = ("e2b", "12b", "26b-a4b", "31b")
PROMPTS: list[list[int]] = json.loads((FOLDER / "recorded.json").read_text())["prompts"]


def pair(kind: str, assistant: Path | None = None) -> Assistant:
    with open_model(FOLDER / kind / "target") as (config, source, _):
        target, _ = load_model(config, source)
    return load_assistant(assistant or FOLDER / kind / "assistant", target)


def read(target: Model, ids: list[int], **how: Any) -> tuple[KVState, mx.array]:
    """A state of all tokens but the last, and the hidden row behind them."""
    state = target.new_state(**how)
    target.prefill(mx.array(ids[:-2]), state)
    _, hidden = target.check(ids[-2:-1], state)
    return state, hidden[0]


def steps(a: Assistant, ids: list[int], state: KVState, hidden: mx.array, count: int = 3) -> list[np.ndarray]:
    """Logits [vocab] of each step of a draft."""
    attend, token, row, made = a.attention(a.inputs(state)), mx.array([ids[-1]], mx.int32), hidden[None], []
    for _ in range(count):
        logits = a.scores(a.run, h := a.step(a.run, token, row, attend))
        made.append(np.array(logits[0]))
        token, row = mx.argmax(logits, axis=-1).astype(mx.int32), a.run.product(h, a.weights.post_projection)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str) -> None:
    """In fp32, with prompts within a window, past it, up to a segment's end and past that."""
    a = pair(kind)
    with np.load(FOLDER / f"{kind}.npz") as recorded:
        for i, ids in enumerate(PROMPTS):
            state, hidden = read(a.target, ids)
            np.testing.assert_allclose(hidden, recorded[f"{i}/hidden"][0], atol=2e-5)
            for mine, theirs in zip(steps(a, ids, state, hidden), recorded[f"{i}/logits"], strict=True):
                assert kl(theirs[None], mine[None]) <= 1e-10  # 1e-6 is what was asked for
            assert a.draft(ids, state, hidden, 3) == recorded[f"{i}/tokens"].tolist()
            assert state.tokens == ids[:-1]


def test_it_reads_the_last_keys_of_each_kind() -> None:
    """Where layers share keys, of those that have some of their own (E2B's 13 and 14)."""
    assert kv_layers(pair("e2b").target.config) == {True: 0, False: 1}
    assert kv_layers(pair("12b").target.config) == {True: 1, False: 2}
    e2b = make_synthetic.config_of(make_synthetic.PUBLISHED["E2B"])
    e4b = make_synthetic.config_of(make_synthetic.PUBLISHED["E4B"])
    assert [kv_layers(c) for c in (e2b, e4b)] == [{True: 13, False: 14}, {True: 22, False: 23}]


@pytest.mark.parametrize("kind", KINDS)
def test_position_window_and_cuts(kind: str) -> None:
    """Drafts depend on the tokens alone: not on where segments end, on what was rewound, or on the KV's dtype kept."""
    a, ids = pair(kind), PROMPTS[-1]
    state, hidden = read(a.target, ids)
    want = steps(a, ids, state, hidden)
    longer, _ = read(a.target, [*ids[:-1], 7, 9, 11])
    longer.rewind(len(ids) - 1)
    others = [longer, state.fork(), read(a.target, ids, layout=SegmentLayout(tail=16, fan=2, tops=2))[0]]
    for other in others:
        for mine, theirs in zip(steps(a, ids, other, hidden), want, strict=True):
            assert kl(theirs[None], mine[None]) <= 1e-9
    later, _ = read(a.target, [5, *ids])  # other positions, other keys
    assert kl(want[0][None], steps(a, ids, later, hidden)[0][None]) > 1e-6


def test_nothing_is_drafted_without_a_hidden_row() -> None:
    a = pair("12b")
    state, hidden = read(a.target, PROMPTS[0])
    assert a.needs_hidden
    assert a.draft(PROMPTS[0], state, None, 3) == a.draft(PROMPTS[0], state, hidden, 0) == []
    assert a.draft([2], a.target.new_state(), hidden, 3) == []


@pytest.mark.parametrize("kind", ["e2b", "31b"])
def test_drafts_are_drawn_as_the_target_draws(kind: str) -> None:
    """Each from the assistant's logits by the numbers that the target will use."""
    a, ids = pair(kind), PROMPTS[2]
    state, hidden = read(a.target, ids)
    logits = steps(a, ids, state, hidden, 1)[0]
    seen = set()
    for seed in range(12):
        draw = Draw(1.0, 40, 0.95, seed=seed)
        made = a.draft(ids, state, hidden, 2, [draw])
        assert made[0] == drawn(None, mx.array(logits)[None], [draw]).item()
        seen.add(made[0])
    assert len(seen) > 3


def demo_pair(folder: Path, spelling: str, kernels: Kernels | None = None) -> Assistant:
    """The built-in model, and a random assistant of its shape in Q8_0."""
    file = folder / f"mtp-{spelling}.gguf"
    if not file.exists():
        make_synthetic.write("DEMO", file, spelling=spelling)
    plain = load(demo_path(), weights="packed", draft=None).model
    return load_assistant(file, Model(plain.config, plain.weights, kernels) if kernels else plain)


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["gemma4-assistant", "gemma4_assistant"])
def test_kernels_draft_what_references_draft(spelling: str, tmp_path: Path) -> None:
    """Packed weights, with a dense head and with centroids; over plain and quantized keys and values."""
    plain = demo_pair(tmp_path, spelling)
    fused = demo_pair(tmp_path, spelling, Kernels(metal, frozenset([OpKey("expand")]), strict=True))
    ids = [2, *np.random.default_rng(3).integers(300, 4000, 150).tolist()]
    for kv in ("full", "q8"):
        state, hidden = read(plain.target, ids, kv=kv)
        want, got = (steps(a, ids, state, hidden, 2) for a in (plain, fused))
        for mine, theirs in zip(got, want, strict=True):
            assert np.abs(mine - theirs).max() <= 1e-3 * np.abs(theirs).max()
        assert fused.draft(ids, state, hidden, 2) == plain.draft(ids, state, hidden, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["full", "tq4"])
def test_traced_drafts_are_those_built_anew(kv: str, tmp_path: Path) -> None:
    """Before a tail is full, when it is, and once it is sealed; operations as references, which MLX can trace."""
    names = ("embed", "rotations", "qkv_post", "attention", "quantized_attention", "add_norm", "matvec", "dense")
    off = frozenset(map(OpKey, (*names, "top_k", "spread", "expand", "few_rows")))
    plain = demo_pair(tmp_path, "gemma4_assistant")
    target = Model(plain.target.config, plain.target.weights, Kernels(metal, off, traced=True))
    traced = Assistant(plain.config, plain.weights, target)
    ids = [2, *np.random.default_rng(4).integers(300, 4000, 140).tolist()]
    state, hidden = read(plain.target, ids[:63], kv=kv)
    for n in (63, 64, 65, 66, 67):
        assert traced.draft(ids[:n], state, hidden, 2) == plain.draft(ids[:n], state, hidden, 2)
        plain.target.prefill(mx.array(ids[n - 1 : n]), state)


def test_the_built_in_pair_accepts() -> None:
    """A tale with its drafts is the tale without; of three a step most are right (the model card has figures)."""
    lm = load()
    assert lm.drafts is not None and isinstance(lm.drafts.drafter, Assistant)
    said, options = (
        [{"role": "user", "content": "Tell me a story about a fox."}],
        ReplyOptions(60, Sampling(temperature=0)),
    )
    drafts = Drafts(3, lm.drafts.drafter, depth=3, least_alike=1 << 30)
    want, got = (chat(replace(lm, drafts=d), said, options) for d in (None, drafts))
    assert got.text == want.text
    assert got.statistics.accepted_tokens >= 0.6 * got.statistics.drafted_tokens > 20


@pytest.mark.slow
def test_llama_cpp_accepts_as_many_drafts() -> None:
    # Along llama.cpp's own replies: what both draft from differs by its activations in 8 bits alone.
    recorded = json.loads((FOLDER / "llama-cpp.json").read_text())
    lm = load()
    assert lm.drafts is not None and isinstance(lm.drafts.drafter, Assistant)
    assistant, counted = lm.drafts.drafter, []
    for reply in recorded["replies"]:
        prompt, ids = (lm.tokenizer.encode(text) for text in (reply["prompt"], reply["prompt"] + reply["text"]))
        state, drafted, accepted, hidden = lm.model.new_state(), 0, 0, mx.array(0)
        lm.model.prefill(mx.array(ids[: len(prompt) - 1]), state)
        while state.length < len(ids) - 1:
            if state.length >= len(prompt):
                drafts = assistant.draft(ids[: state.length + 1], state, hidden, recorded["drafts"])
                following = ids[state.length + 1 :]
                pairs = enumerate(zip(drafts, following, strict=False))
                right = next((n for n, (a, b) in pairs if a != b), min(len(drafts), len(following)))
                drafted, accepted = drafted + len(drafts), accepted + right
                unread = ids[state.length : state.length + right + 1]
            else:
                unread = ids[state.length : len(prompt)]
            for token in unread[: len(ids) - 1 - state.length]:
                hidden = lm.model.check([token], state)[1][0]
        counted.append((drafted, accepted, reply["drafted"], reply["accepted"]))
    drafted, accepted, theirs, their_accepted = (sum(column) for column in zip(*counted, strict=True))
    assert abs(accepted / drafted - their_accepted / theirs) < 0.01, (accepted / drafted, their_accepted / theirs)
    assert all(abs(row[1] - row[3]) <= 3 for row in counted), counted
