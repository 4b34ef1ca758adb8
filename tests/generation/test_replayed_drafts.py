"""Drafts where steps are replayed: checks are recorded too, a reply never falls back to tracing and is as without."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import make_synthetic
import mlx.core as mx
import numpy as np
import pytest
from batched import few_rows_in_fp32
from constraints import Alternating
from drafters import Knowing, KnowingAll
from host_player import HostPlayer
from kernel_cases import metal
from recorded import path, prompts

from mlx_gemma4 import Sampling, load
from mlx_gemma4.conversation.language_model import demo_path
from mlx_gemma4.generation import drafting
from mlx_gemma4.generation.decoding import Statistics
from mlx_gemma4.generation.drafting import MOST, Drafts
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.generation.scheduler import Scheduler
from mlx_gemma4.loading.assistant import load_assistant
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops import paged
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.op import OpKey
from mlx_gemma4.ops.sample import Draw

GREEDY = Sampling(temperature=0)
OFF = frozenset([OpKey("expand")])  # tiles of a prompt, which round to fp16


stepped: list[int] = []  # lengths of states before steps that were not replayed


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "PAGE", 32)
    few_rows_in_fp32(monkeypatch)


def pair(kind: str, folder: Path, tag: str = "q8_0") -> tuple[Model, Model]:
    """A model with stock operations, and the same weights with steps that are replayed."""
    plain = load(path(kind, tag, folder), weights="packed").model
    HostPlayer.made.clear()
    replayed = Model(plain.config, plain.weights, Kernels(metal, OFF, player=HostPlayer))
    real, _ = replayed._step, stepped.clear()
    assert real is not None
    replayed._step = lambda ids, state: (stepped.append(state.length), real(ids, state))[1]
    return plain, replayed


def reply(
    model: Model, prompt: list[int], n: int, drafts: Drafts | None, sampling: Sampling = GREEDY, **more: Any
) -> tuple[list[int], Any, Statistics]:
    state, statistics = more.pop("state", None) or model.new_state(), Statistics()
    made = generate_tokens(model, state, prompt, sampling, n, drafts=drafts, statistics=statistics, **more)
    return [token.id for token in made], state, statistics


def held(state: Any) -> list[np.ndarray]:
    """Keys and values of all layers, as far as attention sees them."""
    views = [kv.views(max(0, state.length - state.config.window)) for kv in state.layers.values()]
    return [np.concatenate([np.array(part[i]) for part in parts], axis=2) for parts in views for i in (1, 2)]


def starts() -> list[tuple[int, int]]:
    """Rows and starts of each player that was loaded."""
    return sorted((p.best_region.shape[-1], len(p.tokens)) for p in HostPlayer.made if p.loads)


@pytest.mark.parametrize("kind", ["12b", "31b", "gemma3", "e2b", "e4b"])
def test_rows_of_one_state_are_single_steps(kind: str, tmp_path: Path) -> None:
    """Logits, hidden rows, tokens, leads, keys and values: over the borders of pages, behind the window's edge."""
    plain, replayed = pair(kind, tmp_path)
    window = plain.config.window
    for before in (0, 30, window - 2, window + 61):
        one, several = plain.new_state(), replayed.new_state()
        ids = (prompts(kind)[0] * (before + 1))[:before]
        for state in (one, several):
            if ids:
                plain.prefill(mx.array(ids), state)
        for n in (4, 3):
            tokens = [5 + 7 * i + n for i in range(n)]
            step = replayed.replayed_check([tokens], [several])
            assert step is not None
            logits = np.array(step.logits())
            rows = [np.array(plain.forward(mx.array([token]), one)) for token in tokens]
            np.testing.assert_allclose(logits, np.stack(rows), atol=2e-3)
            assert step.tokens() == logits.argmax(axis=1).tolist()
            top = np.sort(logits, axis=1)[:, -2:]
            np.testing.assert_allclose(step.leads(), top[:, 1] - top[:, 0], atol=1e-4)
            several.rewind(several.length - 1)
            one.rewind(one.length - 1)
        assert replayed.batcher is not None and replayed.batcher.holds(several)
        fork = several.fork()
        assert not replayed.batcher.holds(several) and fork.tokens == several.tokens == one.tokens
        for x, y in zip(held(one), held(several), strict=True):
            np.testing.assert_allclose(x, y, atol=2e-3)


KINDS = ("12b", "26b-a4b", "31b", "e2b", "e4b", "gemma3")


def an_id(i: int) -> int:
    return 3 + (7 * i + i * i) % 199


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_replies_are_as_without_drafts(kind: str, tmp_path: Path) -> None:
    """At every depth, over page borders, tails' ends and the window's edge; nothing is traced or recorded twice."""
    plain, replayed = pair(kind, tmp_path)
    assert replayed.batcher is not None
    replayed.batcher.pool.kept = 1 << 40
    n, window = 14, plain.config.window
    coming = []
    for length in (23, window - 7, 121):
        prompt = [2, *map(an_id, range(length - 1))]
        coming.append((prompt, reply(replayed, prompt, n, None)[0]))
    HostPlayer.made.clear()
    drafted = accepted = 0
    for depth in range(1, MOST + 1):
        prompt, want = coming[depth % 3]
        knows = Knowing(prompt + want, (0.5, 0.8, 1.0)[depth // 3], depth, needs_hidden=depth % 2 == 1)
        got, state, statistics = reply(replayed, prompt, n, Drafts(drafter=knows, depth=depth))
        assert got == want and state.tokens == prompt + want, f"{depth} drafts"
        drafted, accepted = drafted + statistics.drafted_tokens, accepted + statistics.accepted_tokens
        assert all(before < len(prompt) for before in stepped), "a step that is not replayed"
        stepped.clear()
    assert drafted > accepted > 20 and {rows for rows, _ in starts()} == {1, 2, 4, 8}
    assert all(p.loads == 1 for p in HostPlayer.made), "recorded twice"


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["gemma4-assistant", "gemma4_assistant"])
def test_an_assistants_drafts_are_replayed(spelling: str, tmp_path: Path) -> None:
    """A dense head and centroids; the hidden row where the target's step left it, or as an array; drawn and not."""
    file = tmp_path / "mtp.gguf"
    make_synthetic.write("DEMO", file, spelling=spelling)
    plain = load(demo_path(), weights="packed", draft=None).model
    HostPlayer.made.clear()
    replayed = Model(plain.config, plain.weights, Kernels(metal, OFF, player=HostPlayer), plain.plan)
    theirs, mine = (load_assistant(file, model) for model in (plain, replayed))
    ids = [2, *np.random.default_rng(3).integers(300, 4000, 40).tolist()]
    one, several = plain.new_state(), replayed.new_state()
    for state in (one, several):
        plain.prefill(mx.array(ids[:-4]), state)
    rows = plain.check(ids[-4:-1], one)[1]
    step = replayed.replayed_check([ids[-4:-1]], [several])
    assert step is not None
    step.tokens()
    for draws in ([], [Draw(1.0, 40, 0.95, seed=7), Draw(1.0, 40, 0.95, seed=7, position=1)]):
        want = theirs.draft(ids, one, rows[2], 3, draws)
        assert mine.draft(ids, several, step.hidden(2), 3, draws) == want
        assert mine.draft(ids, several, rows[2], 3, draws) == want
    assert len(HostPlayer.made) == 2 and HostPlayer.made[1].loads == 1 and len(HostPlayer.made[1].tokens) == 4
    assert replayed.batcher is not None and replayed.batcher.holds(several) and step.hidden(0).there
    row = step.hidden(1)
    np.testing.assert_allclose(np.array(row.of.player.read(row.region))[0], np.array(rows[1]), atol=1e-2)
    replayed.step(5, several)
    replayed.replayed_check([[5, 6, 7]], [several])
    assert not step.hidden(0).there


WAYS: list[tuple[Sampling, dict[str, Any]]] = [
    (Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=2), {}),
    (Sampling(seed=5), {"stop_ids": frozenset(range(3, 300, 29))}),
    (Sampling(seed=3, repetition_penalty=1.3, presence_penalty=0.1), {}),  # of these logits are read
    (GREEDY, {"logprobs": 2}),
    (GREEDY, {"constraint": 40}),
]


@pytest.mark.slow
@pytest.mark.parametrize("way", range(len(WAYS)))
def test_equal_seeds_give_equal_replies(way: int, tmp_path: Path) -> None:
    """Drawn in the step, or from its logits: the tokens that come without drafts."""
    _, replayed = pair("12b", tmp_path)
    sampling, more = WAYS[way]
    prompt, found = [2, *map(an_id, range(20))], []
    for drafts in (None, Drafts(depth=3, drafter=Knowing([], 1.0))):
        given = {**more, "constraint": Alternating(14)} if "constraint" in more else more
        if drafts is not None:
            drafts.drafter = Knowing(prompt + found[0], 0.8)
            stepped.clear()
        got, _, statistics = reply(replayed, prompt, 14, drafts, sampling, **given)
        found.append(got)
    assert found[0] == found[1] and (statistics.accepted_tokens or len(found[0]) < 4)
    assert all(before < len(prompt) for before in stepped)


@pytest.mark.slow
def test_near_ties_are_decided_by_a_replayed_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, replayed = pair("12b", tmp_path)
    prompt = [2, *map(an_id, range(20))]
    want, _, _ = reply(replayed, prompt, 10, None)
    monkeypatch.setattr(drafting, "NEAR", 1e9)
    stepped.clear()
    got, _, statistics = reply(replayed, prompt, 10, Drafts(drafter=Knowing(prompt + want, 1.0), depth=3))
    assert got == want and not statistics.accepted_tokens and all(before < len(prompt) for before in stepped)


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["full", "tq4"])
def test_forks_marks_and_undo_while_a_reply_drafts(kv: str, tmp_path: Path) -> None:
    """Whoever looks at the state in between gets what a reply without drafts has. Quantized states are not in pools."""
    _, replayed = pair("12b", tmp_path)
    prompt, found = [2, *map(an_id, range(70))], []
    for right in (None, 0.7):
        state = replayed.new_state(kv=kv)
        drafts = None if right is None else Drafts(drafter=Knowing(prompt + found[0][0], right), depth=3)
        made, forks = generate_tokens(replayed, state, prompt, GREEDY, 16, drafts=drafts), []
        tokens = []
        for n, token in enumerate(made):
            tokens.append(token.id)
            if n % 6 == 5:
                fork = state.fork()
                fork.rewind(len(prompt) + n - 2)
                forks.append(fork)
        state.rewind(state.length - 7)
        undone, _, _ = reply(replayed, [9, 11], 5, None, state=state)
        others = [reply(replayed, [17, 19], 4, None, state=fork)[0] for fork in forks]
        found.append((tokens, undone, others))
    assert found[0] == found[1]


def test_a_pool_that_stays_is_not_recorded_anew(tmp_path: Path) -> None:
    """When the last state leaves: its pages go to the next, and what was recorded serves it, the assistants' too."""
    _, replayed = pair("12b", tmp_path)
    assert replayed.batcher is not None
    pool = replayed.batcher.pool
    for kept, loads in ((1 << 40, 1), (0, 2)):
        pool.kept = kept
        for _ in range(2):
            state = replayed.new_state()
            replayed.prefill(mx.array([2, 5, 7]), state)
            assert replayed.replayed_check([[3, 4]], [state]) is not None
            assert len(state.arrays) > 0 and not pool.seats
        assert [p.loads for p in HostPlayer.made if p.loads] == [loads]
        assert bool(pool.arrays) == bool(kept)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_over_pages_has_as_many_launches_as_a_plain_one(kind: str, tmp_path: Path) -> None:
    _, replayed = pair(kind, tmp_path)
    state = replayed.new_state()
    replayed.prefill(mx.array([2, *map(an_id, range(9))]), state)
    replayed.step(3, state).token()
    replayed.seat(state)
    replayed.step(4, state).token()
    plain, paged = (player.launches for player in HostPlayer.made)
    assert len(plain) == len(paged) and replayed.batcher is not None and replayed.batcher.holds(state)


@pytest.mark.slow
def test_a_reply_that_drafts_is_joined_by_another(tmp_path: Path) -> None:
    """Alone, beside another, and alone again, by repetition: tokens are those without drafts, steps all replayed."""
    _, replayed = pair("12b", tmp_path)
    texts, lengths = [[2, 5, 9, 5, 9, 5, 9, 5], [2, 7, 7, 7, 7, 7]], [26, 8]
    want = [reply(replayed, text, n, None)[0] for text, n in zip(texts, lengths, strict=True)]
    states, figures = [replayed.new_state() for _ in texts], [Statistics() for _ in texts]
    stepped.clear()
    with Scheduler(replayed, 2, drafts=Drafts(depth=3)) as scheduler, ThreadPoolExecutor(1) as pool:
        made = [
            scheduler.generate_tokens(states[i], texts[i], GREEDY, lengths[i], statistics=figures[i]) for i in (0, 1)
        ]
        first = [next(made[0]).id for _ in range(3)]
        other = pool.submit(lambda: [t.id for t in made[1]])
        first += [t.id for t in made[0]]
    assert [first, other.result()] == want and figures[0].drafted_tokens >= 3
    assert all(before < 8 for before in stepped)
    assert [state.tokens for state in states] == [a + b for a, b in zip(texts, want, strict=True)]


def beside(model: Model, count: int, drafts: Drafts, asked: Any) -> list[tuple[list[int], Any, Statistics]]:
    """What `reply` returns of each of several that begin at once. `asked`: arguments behind the model, of each."""
    with Scheduler(model, count, drafts=drafts) as scheduler, ThreadPoolExecutor(count) as pool:

        def one(i: int) -> tuple[list[int], Any, Statistics]:
            (prompt, n, sampling, more), state, statistics = asked(i), model.new_state(), Statistics()
            made = scheduler.generate_tokens(state, prompt, sampling, n, statistics=statistics, **more)
            return [token.id for token in made], state, statistics

        return list(pool.map(one, range(count)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["12b", "e2b"])
def test_replies_that_step_together_are_as_alone(kind: str, tmp_path: Path) -> None:
    """Four of other lengths: greedy, under a constraint, drawn in the step, and with penalties. Nothing is traced."""
    _, replayed = pair(kind, tmp_path)

    def asked(i: int) -> tuple[list[int], int, Sampling, dict[str, Any]]:
        given, more = WAYS[(3, 4, 0, 2)[i]]
        given, more = (GREEDY, {}) if i == 0 else (given, {"constraint": Alternating(9)} if more else {})
        return [2, 20 + i, *map(an_id, range(9 * i + 5))], (20, 30, 11, 14)[i], given, more

    want = [reply(replayed, prompt, n, None, way, **more)[0] for prompt, n, way, more in map(asked, range(4))]
    knows = {20 + i: asked(i)[0] + want[i] for i in range(4)}
    HostPlayer.made.clear()
    stepped.clear()
    got = beside(replayed, 4, Drafts(drafter=KnowingAll(knows, 0.8, needs_hidden=True), depth=3), asked)
    assert [g[0] for g in got] == want
    assert [g[1].tokens for g in got] == [asked(i)[0] + want[i] for i in range(4)]
    assert all(g[2].drafted_tokens > g[2].accepted_tokens > 0 for g in got)
    assert all(before < len(asked(3)[0]) for before in stepped), "a step that is not replayed"
    assert {rows for rows, starts in starts() if starts} >= {16}


@pytest.mark.slow
def test_an_assistant_drafts_for_several() -> None:
    """From hidden rows that one step has left for all; each reply is what it is alone without drafts."""
    lm = load(demo_path(), weights="packed", draft=None)
    replayed = Model(lm.config, lm.model.weights, Kernels(metal, OFF, player=HostPlayer), lm.plan)
    texts = [lm.tokenizer.encode(text) for text in ("Once upon a time a goose", "The miller and")]

    def asked(i: int) -> tuple[list[int], int, Sampling, dict[str, Any]]:
        return texts[i], 8 + 2 * i, (GREEDY, Sampling(seed=3, top_k=30))[i], {}

    want = [reply(lm.model, prompt, n, None, way)[0] for prompt, n, way, _ in map(asked, range(2))]
    drafter = load_assistant(demo_path().with_name("mtp-gemma4-demo.gguf"), replayed)
    got = beside(replayed, 2, Drafts(drafter=drafter, depth=3, least_alike=1 << 30), asked)
    assert [g[0] for g in got] == want
    assert all(g[2].drafted_tokens > 3 for g in got) and sum(g[2].accepted_tokens for g in got) > 3
