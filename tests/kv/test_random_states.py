"""Random operations on several KV states: each equals, to the bit, a fresh reading of the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from pictured import encoded
from plain_state import LAYOUTS, PlainState, read, same_contents, small_model, some_tokens

from mlx_gemma4.config import Kind
from mlx_gemma4.errors import InputError
from mlx_gemma4.generation.prefix import PrefixCache
from mlx_gemma4.kv.segments import SegmentLayout
from mlx_gemma4.kv.state import KVState, total_nbytes
from mlx_gemma4.model.soft import Encoded

pytestmark = pytest.mark.slow

NEAR = {"full": 5e-4, "q8": 0.05, "tq4": 1.0}  # of logits that should agree
MOST = 260  # tokens of a state in the random test


class States(RuleBasedStateMachine):
    """States beside plain ones that read the same tokens in the same calls from nothing, and forget nothing."""

    steps = 0  # over all runs of one seed
    wraps = 0  # rewinds to where the window had been left
    refusals = 0
    reuses = 0
    cuts = 0  # rewinds into pictures, which are refused

    @initialize(
        kind=st.sampled_from(["e2b", "12b"]),
        window=st.sampled_from([4, 5, 8, 13, 20, 33, 64]),
        layout=st.sampled_from(LAYOUTS),
        kv=st.sampled_from(["full", "full", "q8", "tq4"]),
    )
    def start(self, kind: str, window: int, layout: SegmentLayout, kv: str) -> None:
        self.model, self.kv = small_model(kind, window, layout), kv
        self.states: list[tuple[KVState, PlainState, list[int]]] = []
        self.store = PrefixCache(self.model, kv=kv)
        self.put: list[tuple[list[int], PlainState]] = []
        self.shown: list[Encoded] = []
        for seed in range(2):
            self.new()
            self.extend(seed, some_tokens(2 * window + 20, seed))

    def extend(self, i: int, new: list[int]) -> None:
        state, plain, tokens = self.states[i]
        plain = plain.cut(len(tokens))
        np.testing.assert_array_equal(read(self.model, state, new), read(self.model, plain, new))
        self.set(i, state, plain, tokens + new)

    def new(self) -> None:
        self.states.append((self.model.new_state(kv=self.kv), PlainState(self.model, self.kv), []))

    def pick(self, data: Any) -> int:
        States.steps += 1
        return data.draw(st.integers(0, len(self.states) - 1), label="state")

    def set(self, i: int, state: KVState, plain: PlainState, tokens: list[int]) -> None:
        assert state.tokens == tokens
        assert same_contents(state, plain)
        self.states[i] = (state, plain, tokens)

    @rule(data=st.data(), n=st.sampled_from([2, 3, 7, 16, 40]), seed=st.integers(0, 5))
    def append(self, data: Any, n: int, seed: int) -> None:
        i = self.pick(data)
        if len(self.states[i][2]) + n <= MOST:
            self.extend(i, some_tokens(n + 1, seed)[1:])

    @rule(data=st.data(), n=st.sampled_from([1, 5, 30]), kind=st.sampled_from(["image", "audio"]))
    def show(self, data: Any, n: int, kind: Kind) -> None:
        """A picture or a sound, with a word before and after."""
        i = self.pick(data)
        if len(self.states[i][2]) + n + 2 <= MOST:
            made = encoded(kind.encode(), n, self.model.config.hidden, kind, 0.7)
            self.shown.append(made)
            self.model.soft.add(made)
            self.extend(i, [5, *made.ids, 7])
            if kind == "image" and n > 1 and self.model.config.sees_ahead:
                States.cuts += 1
                with pytest.raises(InputError, match="a picture begins"):
                    self.states[i][0].rewind(len(self.states[i][2]) - 2)

    @rule(data=st.data(), n=st.sampled_from([1, 4, 9]), seed=st.integers(0, 5))
    def decode(self, data: Any, n: int, seed: int) -> None:
        i = self.pick(data)
        for token in some_tokens(n + 1, seed)[1:]:
            if len(self.states[i][2]) < MOST:
                self.extend(i, [token])

    @rule(data=st.data(), drafts=st.integers(1, 7), right=st.integers(0, 7), seed=st.integers(0, 5))
    def check_drafts(self, data: Any, drafts: int, right: int, seed: int) -> None:
        """Drafts are read in one step; those that are wrong are taken back. Rows are those of single steps."""
        i = self.pick(data)
        state, plain, tokens = self.states[i]
        rows = min(drafts + 1, self.model.most_checked(state), MOST - len(tokens))
        if rows > 0:
            new, kept = some_tokens(rows + 1, seed)[1:], min(right + 1, rows)
            logits, _ = self.model.check(new, state)
            plain = plain.cut(len(tokens))
            for n, token in enumerate(new):
                np.testing.assert_array_equal(np.array(logits[n]), read(self.model, plain, [token]))
            state.rewind(len(tokens) + kept)
            self.set(i, state, plain.cut(len(tokens) + kept), tokens + new[:kept])

    @precondition(lambda self: len(self.states) < 5)
    @rule(data=st.data())
    def fork(self, data: Any) -> None:
        state, plain, tokens = self.states[self.pick(data)]
        before = total_nbytes([state])
        other = state.fork()
        assert total_nbytes([state, other]) == before
        self.states.append((other, plain, tokens))

    @rule(data=st.data(), back=st.sampled_from([0, 0, 1, 2, 9]))
    def mark(self, data: Any, back: int) -> None:
        state, _, tokens = self.states[self.pick(data)]
        position = max(0, len(tokens) - back)
        if state.reach(position) == position:
            assert state.mark(position).position == position
        else:
            with pytest.raises(InputError, match=r"no mark covers|a picture begins"):
                state.mark(position)

    @rule(data=st.data(), back=st.sampled_from([1, 3, 10, 20, 40, 90]))
    def rewind(self, data: Any, back: int) -> None:
        i = self.pick(data)
        state, plain, tokens = self.states[i]
        to = max(0, len(tokens) - back)
        reach = state.reach(to)
        must = [0, *(m.position for m in state.marks)]
        within = self.model.config.uncut(tokens, to) < to  # a picture, of which no state holds a part
        if plain.top - to <= self.model.layout.tail and not within:
            must.append(to)
        assert to >= reach >= max(p for p in must if p <= to)
        if reach < to:
            States.refusals += 1
            with pytest.raises(InputError, match="a picture begins" if within else f"and before that to {reach} "):
                state.rewind(to)
            self.set(i, state, plain, tokens)
            if reach == 0:
                return
        States.wraps += reach < len(tokens) - self.model.config.window
        state.rewind(reach)
        self.set(i, state, plain.cut(reach), tokens[:reach])

    @precondition(lambda self: len(self.states) > 1)
    @rule(data=st.data(), back=st.sampled_from([0, 1, 10, 40]))
    def take_over(self, data: Any, back: int) -> None:
        """A state goes on from where another is, or was; that one stays as it is."""
        i, j = self.pick(data), self.pick(data)
        other, plain, tokens = self.states[j]
        if i != j:
            reach = other.reach(max(0, len(tokens) - back))
            self.states[i][0].take_over(other, reach)
            self.set(i, self.states[i][0], plain.cut(reach), tokens[:reach])
            self.set(j, other, plain, tokens)

    @rule(data=st.data())
    def rewind_to_mark(self, data: Any) -> None:
        i = self.pick(data)
        state, plain, tokens = self.states[i]
        if state.marks:
            mark = data.draw(st.sampled_from(state.marks))
            States.wraps += mark.position < len(tokens) - self.model.config.window
            state.rewind(mark)
            self.set(i, state, plain.cut(mark.position), tokens[: mark.position])

    @rule(data=st.data())
    def save_and_load(self, data: Any) -> None:
        i = self.pick(data)
        state, plain, tokens = self.states[i]
        self.model.save_state(state, SAVED[0])
        self.set(i, self.model.load_state(SAVED[0]), plain, tokens)

    @precondition(lambda self: len(self.states) > 3)
    @rule(data=st.data())
    def close(self, data: Any) -> None:
        self.states.pop(self.pick(data))[0].close()

    @rule(data=st.data())
    def keep(self, data: Any) -> None:
        state, plain, tokens = self.states[self.pick(data)]
        self.store.put(state)
        self.put.append((tokens, plain))

    @precondition(lambda self: self.put and len(self.states) < 5)
    @rule(data=st.data(), back=st.sampled_from([0, 2, 10, 30]), follow=st.integers(3, 9))
    def take(self, data: Any, back: int, follow: int) -> None:
        States.steps += 1
        tokens = data.draw(st.sampled_from(self.put))[0]
        prompt = [*tokens[: max(0, len(tokens) - back)], follow, follow]
        state, n = self.store.take(prompt, 1000)
        States.reuses += n > 0
        assert state.tokens == prompt[:n]
        # Equal tokens may have been read in other calls, whose products round otherwise: one of them it is.
        candidates = [p.cut(n) for t, p in self.put if t[:n] == prompt[:n]]
        plain = next(p for p in candidates if same_contents(state, p))
        plain.top = MOST * 2  # of which kept state it is a rewound fork, is not known
        self.states.append((state, plain, prompt[:n]))

    @precondition(lambda self: len(self.put) > 3)
    @rule()
    def evict(self) -> None:
        States.steps += 1
        self.store.max_kv_bytes = 0
        self.store.unpin()
        self.store.max_kv_bytes = None
        self.put = []

    def teardown(self) -> None:
        """A fresh state that reads everything in one pass agrees, but for rounding, or for what codes cost."""
        for state, _, tokens in getattr(self, "states", ()):
            if tokens and len(tokens) < MOST:
                fresh = self.model.new_state()
                once = read(self.model, fresh, [*tokens, 5])
                np.testing.assert_allclose(read(self.model, state, [5]), once, atol=NEAR[self.kv])


SAVED: list[Path] = []


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_equal_a_fresh_reading(seed: int, tmp_path: Path) -> None:
    SAVED[:] = [tmp_path / "state"]
    States.steps = States.wraps = States.refusals = States.reuses = States.cuts = 0
    run_state_machine_as_test(
        hypothesis.seed(seed)(States),
        settings=settings(
            max_examples=15, stateful_step_count=50, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
    assert States.steps >= 500
    assert min(States.wraps, States.cuts, States.refusals + States.reuses) >= 1
