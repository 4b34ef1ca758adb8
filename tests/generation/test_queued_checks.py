"""Checks of drafts that the host does not know yet, and that begin before the tokens before them are handed out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import make_synthetic
import mlx.core as mx
import numpy as np
import pytest
from batched import few_rows_in_fp32
from drafters import Knowing
from host_player import HostPlayer
from kernel_cases import metal
from plain_state import small_model
from recorded import path

from mlx_gemma4 import Sampling, load
from mlx_gemma4.conversation.language_model import demo_path
from mlx_gemma4.generation import drafting
from mlx_gemma4.generation.decoding import Statistics
from mlx_gemma4.generation.drafting import MOST, Drafts, Hidden
from mlx_gemma4.generation.loop import begin, generate_tokens
from mlx_gemma4.generation.scheduler import Scheduler
from mlx_gemma4.kv.segments import SegmentLayout
from mlx_gemma4.kv.state import KVState
from mlx_gemma4.loading.assistant import load_assistant
from mlx_gemma4.model.batch_replay import QueuedTokens
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops import paged
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.op import OpKey
from mlx_gemma4.ops.sample import Draw

GREEDY = Sampling(temperature=0)


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "PAGE", 32)
    monkeypatch.setattr(drafting, "NEAR", -1.0)  # rows are those of single steps here
    few_rows_in_fp32(monkeypatch)


class Left(HostPlayer):
    """A player whose latest start has left some tokens."""

    def __init__(self, tokens: list[int], events: list[str]) -> None:
        self.left, self.best_region, self.events = np.array(tokens, np.int32), None, events  # type: ignore[assignment]

    def _at(self, region: Any, memory: Any = None) -> np.ndarray:
        return self.left

    def best(self, start: int) -> list[int]:
        self.events.append("drafts seen")
        return [*map(int, self.left)]


class OnDevice(Knowing):
    """Knows what comes, and leaves it in the memory of a player."""

    def __init__(self, coming: Sequence[int], right: float, seed: int = 0, events: list[str] | None = None) -> None:
        super().__init__(coming, right, seed)
        self.events: list[str] = [] if events is None else events

    def queue(  # type: ignore[override]
        self, tokens: Sequence[int], state: KVState, hidden: Hidden | None, count: int, draws: Sequence[Draw] = ()
    ) -> QueuedTokens | None:
        drafts = self.draft(tokens, state, None, count, draws)
        drafts += [5] * (count - len(drafts))
        self.events.append("draft begun")
        return QueuedTokens(Left(drafts, self.events), 0, count)


def replayed(kind: str, folder: Path) -> Model:
    plain = load(path(kind, "q8_0", folder), weights="packed").model
    HostPlayer.made.clear()
    return Model(plain.config, plain.weights, Kernels(metal, frozenset([OpKey("expand")]), player=HostPlayer))


def reply(
    model: Model, prompt: list[int], n: int, drafts: Drafts | None = None, sampling: Sampling = GREEDY, **more: Any
) -> tuple[list[int], KVState, Statistics]:
    state, statistics = model.new_state(), Statistics()
    made = generate_tokens(model, state, prompt, sampling, n, drafts=drafts, statistics=statistics, **more)
    return [token.id for token in made], state, statistics


def a_prompt(n: int) -> list[int]:
    return [2, *(3 + (7 * i + i * i) % 199 for i in range(n - 1))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["12b", "e2b"])
def test_replies_at_every_depth(kind: str, tmp_path: Path) -> None:
    """Greedy and sampled, right and wrong; every check is queued, and its drafts are looked at when it is over."""
    model = replayed(kind, tmp_path)
    assert model.batcher is not None
    model.batcher.pool.kept = 1 << 40
    ways = [GREEDY, Sampling(temperature=0.8, top_k=20, seed=2)]
    prompt = a_prompt(27)
    wants = [reply(model, prompt, 12, None, sampling)[0] for sampling in ways]
    for depth in range(1, MOST + 1):
        sampling, want = ways[depth % 2], wants[depth % 2]
        knows = OnDevice(prompt + want, (0.5, 0.8, 1.0)[depth % 3], depth)
        before = sum(player.queued for player in HostPlayer.made)
        got, state, statistics = reply(model, prompt, 12, Drafts(drafter=knows, depth=depth), sampling)
        assert got == want and state.tokens == prompt + want, f"{depth} drafts"
        queued = sum(player.queued for player in HostPlayer.made) - before
        assert queued == knows.events.count("draft begun") > 1 and statistics.drafted_tokens >= queued
        assert knows.events[:3] == ["draft begun", "drafts seen", "draft begun"]


@pytest.mark.slow
def test_the_next_check_begins_before_tokens_are_handed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, events, prompt = replayed("12b", tmp_path), list[str](), a_prompt(20)
    want, _, _ = reply(model, prompt, 20)
    real = HostPlayer.start

    def start(self: HostPlayer, numbers: np.ndarray, chained: bool, after: HostPlayer | None = None) -> int:
        events.append("check begun" if after is not None else "step")
        return real(self, numbers, chained, after)

    monkeypatch.setattr(HostPlayer, "start", start)
    statistics = Statistics()
    drafts = Drafts(drafter=OnDevice(prompt + want, 1.0, events=events), depth=3, least_alike=1 << 30)
    got = []
    for token in generate_tokens(model, model.new_state(), prompt, GREEDY, 20, drafts=drafts, statistics=statistics):
        got.append(token.id)
        events.append("token")
    assert got == want
    cycle = ["drafts seen", "draft begun", "check begun", *["token"] * 4]
    first = events.index("draft begun")
    assert events[first : first + 3] == ["draft begun", "check begun", "token"]  # its first token begins it
    assert events[first + 3 : first + 3 + 2 * len(cycle)] == cycle * 2
    assert statistics.accepted_tokens == statistics.drafted_tokens == 13


@pytest.mark.parametrize("queued", [False, True])
def test_a_reply_that_is_left_between_two_tokens(queued: bool, tmp_path: Path) -> None:
    """While a check is under way that has read more: the state holds what was handed out, and goes on as ever."""
    model = replayed("12b", tmp_path) if queued else small_model("12b", 64, SegmentLayout())
    drafter, prompt, n = OnDevice if queued else Knowing, a_prompt(20 if queued else 50), 18  # at 64 a tail ends
    sampling, aheads = Sampling(seed=3), list[int]()
    want, _, _ = reply(model, prompt, n, None, sampling)
    for taken in (2, 3, 4, 7) if queued else range(1, n):
        state, statistics = model.new_state(), Statistics()
        drafts = Drafts(drafter=drafter(prompt + want, 1.0), depth=4)
        made = generate_tokens(model, state, prompt, sampling, n, drafts=drafts, statistics=statistics)
        got = [next(made).id for _ in range(taken)]
        aheads.append(state.length - len(prompt) - taken)
        made.close()
        assert got == want[:taken] and state.tokens == prompt + got
        assert statistics.reply_tokens == taken and statistics.accepted_tokens < taken
        fresh = model.new_state()
        model.prefill(mx.array(prompt + got), fresh)
        more = [list(generate_tokens(model, each, [9, 17], GREEDY, 3)) for each in (state, fresh)]
        assert more[0] == more[1]
    assert sum(ahead > 4 for ahead in aheads) > 1, "no check was under way behind tokens not handed out"


@pytest.mark.slow
def test_stop_tokens_and_the_last_token(tmp_path: Path) -> None:
    """Drafts may be stop tokens, which nobody looks at before the check: the reply ends as without drafts."""
    model, prompt, n = replayed("12b", tmp_path), a_prompt(20), 13
    want, _, _ = reply(model, prompt, n)
    for at in range(1, n):
        if want[at] in want[:at]:
            continue
        stop = frozenset([want[at]])
        drafts = Drafts(drafter=OnDevice(prompt + want, 1.0), depth=5)
        got, state, statistics = reply(model, prompt, n, drafts, stop_ids=stop)
        assert got == want[:at] and state.tokens == prompt + want[: at + 1]
        assert statistics.stop_reason == "stop" and statistics.reply_tokens == at + 1
    for most in range(1, n):
        drafts = Drafts(drafter=OnDevice(prompt + want, 1.0), depth=5)
        got, state, statistics = reply(model, prompt, most, drafts)
        assert got == want[:most] and state.tokens == prompt + got
        assert statistics.stop_reason == "length" and statistics.reply_tokens == most


@pytest.mark.slow
def test_what_was_found_is_handed_out_when_a_reply_joins_others(tmp_path: Path) -> None:
    """In the middle of accepted tokens, with a check under way whose drafts end in a stop token."""
    model, prompt, n = replayed("12b", tmp_path), a_prompt(20), 13
    want, _, _ = reply(model, prompt, n)
    at = next(i for i in range(8, n) if want[i] not in want[:i])
    for stop in (frozenset[int](), frozenset([want[at]])):
        for taken in (3, 4, 6):
            state, statistics = model.new_state(), Statistics()
            drafts = Drafts(drafter=OnDevice(prompt + want, 1.0), depth=3)
            parts: Any = {"constraint": None, "logprobs": None, "drafts": drafts}
            alone = begin(model, state, prompt, GREEDY, n, stop, statistics, None, **parts)
            while alone.unread:
                alone.read_chunk(alone.chunk)
            got = [alone.turn() for _ in range(taken)] + alone.settled()
            assert alone.check is None and not alone.accepted and len(got) == len(alone.ids) - len(prompt) > taken
            while not alone.over:
                got.append(alone.turn())
            ids = [token.id for token in got if token is not None and token.id not in stop]
            end = at + 1 if stop else n
            assert (
                ids == want[: end - bool(stop)] and state.tokens == prompt + want[:end] and alone.stopped == bool(stop)
            )


@pytest.mark.slow
def test_a_stop_token_is_found_where_a_reply_joins_others(tmp_path: Path) -> None:
    model, prompt, n = replayed("12b", tmp_path), a_prompt(20), 13
    want, _, _ = reply(model, prompt, n)
    other = reply(model, [2, 7, 7, 7], 4)[0]
    at = next(i for i in range(5, n) if want[i] not in want[:i])
    for taken in (1, 3, 5):
        drafts = Drafts(drafter=OnDevice(prompt + want, 1.0), depth=MOST)
        with Scheduler(model, 2, drafts=drafts) as scheduler:
            state = model.new_state()
            made = scheduler.generate_tokens(state, prompt, GREEDY, n, frozenset([want[at]]))
            got = [next(made).id for _ in range(taken)]
            drafts.drafter = None
            assert [t.id for t in scheduler.generate_tokens(model.new_state(), [2, 7, 7, 7], GREEDY, 4)] == other
            got += [t.id for t in made]
        assert got == want[:at] and state.tokens == prompt + want[: at + 1]


@pytest.mark.parametrize("failing", [2, 3, 5])
def test_a_check_that_fails_as_it_begins(failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens not yet handed out are made once more; drafts are off."""
    model, prompt, calls = small_model("12b", 64, SegmentLayout()), a_prompt(20), list[int]()
    want, state, _ = reply(model, prompt, 24)
    real = Model.check

    def check(self: Model, ids: Any, state: Any) -> Any:
        calls.append(len(ids))
        if len(calls) == failing:
            raise RuntimeError("a kernel that this GPU refuses")
        return real(self, ids, state)

    monkeypatch.setattr(Model, "check", check)
    drafts = Drafts(drafter=Knowing(prompt + want, 1.0), depth=4)
    got, after, statistics = reply(model, prompt, 24, drafts)
    assert got == want and after.tokens == state.tokens and drafts.most == 0 and statistics.reply_tokens == 24


@pytest.mark.slow
def test_drafts_that_are_overtaken(tmp_path: Path) -> None:
    """An assistant that drafts for another state before the first one's check: that takes what the host knows."""
    file = tmp_path / "mtp.gguf"
    make_synthetic.write("DEMO", file, spelling="gemma4-assistant")
    plain = load(demo_path(), weights="packed", draft=None).model
    HostPlayer.made.clear()
    model = Model(plain.config, plain.weights, Kernels(metal, frozenset([OpKey("expand")]), player=HostPlayer))
    assistant = load_assistant(file, model)
    texts = [a_prompt(n) for n in (9, 14)]
    states, rows = [model.new_state() for _ in texts], []
    for state, text in zip(states, texts, strict=True):
        plain.prefill(mx.array(text[:-2]), state)
        rows.append(model.check(text[-2:-1], state)[1][0])
        model.seat(state)
    given = list(zip(texts, states, rows, strict=True))
    wants = [assistant.draft(text, state, row, 2) for text, state, row in given]
    assert wants[0] != wants[1]
    queued = [assistant.queue(text, state, row, 2) for text, state, row in given]
    assert queued[0] is not None and queued[0].left == wants[0] and queued[1] is not None and queued[1].left is None
    for some, text, state, want in zip(queued, texts, states, wants, strict=True):
        step = model.replayed_check([text[-1:]], [state], (), some)
        assert step is not None and state.length == len(text) + 2
        found = step.tokens()
        assert state.tokens == text + want
        state.rewind(len(text) - 1)
        again = model.replayed_check([[text[-1], *want]], [state])
        assert again is not None and again.tokens() == found
        state.rewind(len(text) - 1)
    assert [player.queued for player in HostPlayer.made if player.queued] == [1]
