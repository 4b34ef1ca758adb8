"""KV states: whatever is done to them, they equal a fresh reading of the same tokens."""

from __future__ import annotations

import itertools
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from plain_state import PlainState, SmallModel, read, same_contents, small_model

from mlx_gemma4.config import Config
from mlx_gemma4.errors import InputError
from mlx_gemma4.generation.loop import Sampling, generate_tokens
from mlx_gemma4.generation.prefix import PrefixCache
from mlx_gemma4.kv.quantization import KINDS
from mlx_gemma4.kv.segments import SegmentLayout
from mlx_gemma4.kv.state import KVState, kv_bytes, total_nbytes, window_bytes

LAYOUTS = (
    SegmentLayout(4, 2, 2),
    SegmentLayout(2, 3, 1),
    SegmentLayout(8, 2, 4),
)  # merges and doublings within 100 tokens
GREEDY = Sampling(temperature=0)
NEAR = {"full": 5e-4, "q8": 0.05, "tq4": 1.0}  # of logits that should agree
MOST = 260  # tokens of a state in the random test


def some_tokens(n: int, seed: int = 0) -> list[int]:
    return [2, *np.random.default_rng(seed).integers(3, 317, n - 1).tolist()]


# Random operations on several states


class States(RuleBasedStateMachine):
    """States beside plain ones that read the same tokens in the same calls from nothing, and forget nothing."""

    steps = 0  # over all runs
    wraps = 0  # rewinds to where the window had been left
    refusals = 0
    reuses = 0

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

    @rule(data=st.data(), n=st.sampled_from([1, 4, 9]), seed=st.integers(0, 5))
    def decode(self, data: Any, n: int, seed: int) -> None:
        i = self.pick(data)
        for token in some_tokens(n + 1, seed)[1:]:
            if len(self.states[i][2]) < MOST:
                self.extend(i, [token])

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
            with pytest.raises(InputError, match="no mark covers"):
                state.mark(position)

    @rule(data=st.data(), back=st.sampled_from([1, 3, 10, 20, 40, 90]))
    def rewind(self, data: Any, back: int) -> None:
        i = self.pick(data)
        state, plain, tokens = self.states[i]
        to = max(0, len(tokens) - back)
        reach = state.reach(to)
        must = [0, *(m.position for m in state.marks)]
        if plain.top - to <= self.model.layout.tail:
            must.append(to)
        assert to >= reach >= max(p for p in must if p <= to)
        if reach < to:
            States.refusals += 1
            with pytest.raises(InputError, match=f"and before that to {reach} "):
                state.rewind(to)
            self.set(i, state, plain, tokens)
            if reach == 0:
                return
        States.wraps += reach < len(tokens) - self.model.config.window
        state.rewind(reach)
        self.set(i, state, plain.cut(reach), tokens[:reach])

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


def test_random_operations_equal_a_fresh_reading(tmp_path: Path) -> None:
    SAVED[:] = [tmp_path / "state"]
    run_state_machine_as_test(
        States,
        settings=settings(
            max_examples=60, stateful_step_count=50, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
    assert States.steps >= 2000
    assert min(States.wraps, States.refusals, States.reuses) >= 10


# Segments


@pytest.mark.parametrize("layout", [SegmentLayout(), *LAYOUTS])
def test_segments_are_few_and_in_order(layout: SegmentLayout) -> None:
    lengths = range(0, 300_000, 64) if layout == SegmentLayout() else range(300)
    for length in lengths:
        ends = layout.ends(length)
        assert ends == sorted(set(ends))
        assert (ends[-1] if ends else 0) == length // layout.tail * layout.tail
        assert len(ends) <= layout.tops + 3
    for window in (512, 1024, 4096):
        for length in range(0, 9000, 61):
            first = max(0, length - window)
            ends = [end for end in SegmentLayout().sliding_ends(length, window) if end > first]
            assert len(ends) <= 7


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_follow_from_the_lengths(layout: SegmentLayout) -> None:
    """What attention sees is cut alike however the tokens came: the order of its sums is always the same."""
    model = small_model("12b", 9, layout)
    for seed in range(20):
        state, plain = model.new_state(), PlainState(model)
        for n in np.random.default_rng(seed).choice([1, 1, 1, 2, 4, 8, 13], 30).tolist():
            plain.check_room(n)
            for i, shape in enumerate(model.config.layers):
                k = mx.zeros((1, shape.kv_heads, n, shape.head_dim))
                state.append(i, k, k)
                plain.append(i, k, k)
                ours, theirs = ([(p.start, p.keys.shape) for p in s.view(i, n)] for s in (state, plain))
                assert ours == theirs
                assert state.fits_tail(n) == (state.layers[i].count % layout.tail + n <= layout.tail)
            state.advance(mx.zeros(n, mx.int32))
            plain.advance(mx.zeros(n, mx.int32))


def test_a_token_is_copied_some_times_only() -> None:
    """Growing to 128K, one token at a time: how often the segments' tokens are written, a token."""
    layout, have, copied = SegmentLayout(), set(), 0
    for length in range(0, 131_073, 64):
        ends = layout.ends(length)
        now = set(itertools.pairwise([0, *ends]))
        copied += sum(b - a for a, b in now - have)
        have = now
    assert copied <= 12 * 131_072


def test_forks_that_grow_alike_go_on_sharing() -> None:
    model = small_model("12b", 8, LAYOUTS[0])
    trunk = model.new_state()
    read(model, trunk, some_tokens(64))
    a, b = trunk.fork(), trunk.fork()
    for state, token in ((a, 7), (b, 9)):
        for _ in range(100):
            read(model, state, [token])
    alone = [kv_of(a, layer) for layer in a.layers]
    shared = sum(min(s.stop, 64) - min(s.start, 64) for segments in alone for s in segments if s in held_by(b))
    assert shared > 0


def kv_of(state: KVState, layer: int) -> tuple[Any, ...]:
    return state.layers[layer].segments


def held_by(state: KVState) -> list[Any]:
    return [s for layer in state.layers for s in kv_of(state, layer)]


# States side by side


def test_no_bleed_between_interleaved_states() -> None:
    """Eight states in turns give what each gives alone, past the window, to the bit."""
    model = small_model("e2b", 9, SegmentLayout())
    prompts = [some_tokens(40 + i, seed=i) for i in range(8)]
    alone = [[read(model, s, [t]) for t in p] for p in prompts for s in [model.new_state()]]
    states = [model.new_state() for _ in prompts]
    for step in range(40):
        for state, prompt, expected in zip(states, prompts, alone, strict=True):
            np.testing.assert_array_equal(read(model, state, [prompt[step]]), expected[step])


def test_fifty_threads_of_twenty_tokens() -> None:
    """One model, fifty threads: each gets its own tokens and logits, to the bit. Generators change threads too."""
    model = small_model("e2b", 9, SegmentLayout())
    prompts = [some_tokens(5 + i, seed=i) for i in range(50)]

    def run(prompt: list[int], result: dict[int, Any], key: int) -> None:
        state = model.new_state()
        tokens = generate_tokens(model, state, prompt, GREEDY, 20)
        got = [next(tokens)]
        thread = threading.Thread(target=lambda: got.extend(tokens))  # as a server's pool might
        thread.start()
        thread.join()
        result[key] = (got, np.array(model.forward(mx.array([3]), state)))

    alone: dict[int, Any] = {}
    for i, prompt in enumerate(prompts):
        run(prompt, alone, i)
    together: dict[int, Any] = {}
    threads = [threading.Thread(target=run, args=(p, together, i)) for i, p in enumerate(prompts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(50):
        assert len(alone[i][0]) == 20
        assert together[i][0] == alone[i][0]
        np.testing.assert_array_equal(together[i][1], alone[i][1])


# What the state holds after a reply


def after(model: SmallModel, tokens: list[int]) -> np.ndarray:
    state = model.new_state()
    read(model, state, tokens)
    return read(model, state, [3])


@pytest.mark.parametrize("stop_early", [None, 1, 4, 7])
def test_a_reply_leaves_what_was_seen(stop_early: int | None) -> None:
    """Prompt and all tokens handed out, whether it ran to its end or the caller left."""
    model = small_model("e2b", 9, SegmentLayout())
    prompt = some_tokens(30)
    state = model.new_state()
    reply = generate_tokens(model, state, prompt, GREEDY, 7)
    got = [token.id for token in itertools.islice(reply, stop_early)]
    reply.close()  # type: ignore[attr-defined]
    assert len(got) == (stop_early or 7)
    assert state.tokens == prompt + got
    np.testing.assert_allclose(read(model, state, [3]), after(model, prompt + got), atol=5e-4)


@pytest.mark.parametrize("last", [False, True])
def test_the_stop_token_is_in_the_state(last: bool) -> None:
    """Where one ended the reply, the next turn follows it; also when it was the last token allowed."""
    model = small_model("e2b", 9, SegmentLayout())
    prompt = some_tokens(30)
    tokens = [token.id for token in generate_tokens(model, model.new_state(), prompt, GREEDY, 8)]
    stop = next(t for i, t in enumerate(tokens) if i >= 1 and t not in tokens[:i])
    n = tokens.index(stop)
    state = model.new_state()
    reply = generate_tokens(model, state, prompt, GREEDY, n + 1 if last else 8, frozenset([stop]))
    got = [token.id for token in reply]
    assert got == tokens[:n]
    assert state.tokens == prompt + got + [stop]
    np.testing.assert_allclose(read(model, state, [3]), after(model, prompt + got + [stop]), atol=5e-4)


def test_an_interrupt_leaves_no_unseen_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a token is on its way: it is taken back."""
    model = small_model("e2b", 9, SegmentLayout())
    prompt, state, calls = some_tokens(30), model.new_state(), itertools.count()

    def interrupted() -> int:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr("mlx_gemma4.generation.loop.mx.get_peak_memory", lambda: 0)
    monkeypatch.setattr("mlx_gemma4.generation.sampling.int", lambda x: interrupted() or x.item(), raising=False)
    got: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        got.extend(token.id for token in generate_tokens(model, state, prompt, GREEDY, 20))
    assert len(got) == 5
    assert state.tokens == prompt + got
    np.testing.assert_allclose(read(model, state, [3]), after(model, prompt + got), atol=5e-4)


def test_a_failed_pass_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("e2b", 9, SegmentLayout())
    state, other = model.new_state(), model.new_state()
    for s in (state, other):
        read(model, s, some_tokens(30))
    with monkeypatch.context() as patch:
        patch.setattr(model, "_mlp", lambda *_: 1 / 0)  # the first layer's keys and values are there by then
        with pytest.raises(ZeroDivisionError):
            read(model, state, [7, 8, 9])
    assert state.tokens == other.tokens
    np.testing.assert_array_equal(read(model, state, [5]), read(model, other, [5]))


# Refusals


def test_a_rewind_past_the_window_is_refused() -> None:
    model = small_model("12b", 8, SegmentLayout(4, 2, 2))
    state = model.new_state()
    read(model, state, some_tokens(50))
    mark = state.mark()
    for token in range(100, 150):
        read(model, state, [token])
    with pytest.raises(InputError, match=r"can't rewind position 70 of 100: .* and before that to 50 \(marks: 50\)"):
        state.rewind(70)
    assert state.length == 100
    with pytest.raises(InputError, match="holds 100 tokens"):
        state.rewind(101)
    state.rewind(mark)
    assert state.length == 50
    state.rewind(20) if state.reach(20) == 20 else state.rewind(0)
    with pytest.raises(InputError, match="not one of this state's"):
        state.rewind(mark)


def test_a_mark_holds_nothing_of_what_followed_it() -> None:
    """Read past a mark, go back to it, read something else: the first reading never shows again."""
    model = small_model("12b", 8, SegmentLayout(4, 2, 2))
    state, plain = model.new_state(), PlainState(model)
    start = some_tokens(41)
    for s in (state, plain):
        read(model, s, [*start, 7, 7, 7, 7, 7, 7])
    mark = state.mark(41)  # in the middle of a segment
    plain = plain.cut(41)
    state.rewind(mark)
    for token in range(200, 230):
        np.testing.assert_array_equal(read(model, state, [token]), read(model, plain, [token]))
    for length in range(state.length - 1, 40, -1):
        if state.reach(length) == length:
            other = state.fork()
            other.rewind(length)
            assert same_contents(other, plain.cut(length))


@pytest.mark.parametrize("window", range(4, 17))
def test_every_position_that_can_be_reached_is_whole(window: int) -> None:
    """After a long reading with marks here and there: each position is exact or refused, and those promised are."""
    model = small_model("12b", window, SegmentLayout(4, 2, 2))
    state, plain = model.new_state(), PlainState(model)
    for s in (state, plain):
        read(model, s, some_tokens(40))
    for token in range(200, 260):
        if token % 17 == 0:
            state.mark()
        for s in (state, plain):
            read(model, s, [token])
    for length in range(state.length):
        if state.reach(length) == length:
            other = state.fork()
            other.rewind(length)
            assert same_contents(other, plain.cut(length))
        else:
            assert all(not m.position - 4 <= length <= m.position for m in state.marks)
            assert length < state.length - 4


def test_marks_cost_nothing_until_the_window_moves_on() -> None:
    model = small_model("12b", 8, SegmentLayout(4, 2, 2))
    state = model.new_state()
    read(model, state, some_tokens(50))
    before = state.nbytes
    mark = state.mark()
    assert state.nbytes == before
    bare = state.fork()
    bare.unmark(mark)
    for token in range(100, 130):
        read(model, state, [token])
        read(model, bare, [token])
    assert 0 < state.nbytes - bare.nbytes <= window_bytes(model.config, mx.float32, model.layout)


def test_a_state_takes_no_more_than_it_was_made_for() -> None:
    model = small_model("12b", 8, SegmentLayout())
    state = model.new_state(max_tokens=10)
    read(model, state, some_tokens(10))
    with pytest.raises(InputError, match="made for 10"):
        read(model, state, [5])
    state.close()
    with pytest.raises(InputError, match="closed"):
        read(model, state, [5])


@pytest.mark.parametrize("kind", ["e2b", "12b"])
def test_the_worst_case_is_never_exceeded(kind: str) -> None:
    for layout, window in itertools.product((SegmentLayout(), *LAYOUTS), (8, 64)):
        model = small_model(kind, window, layout)
        state, n = model.new_state(), 0
        for size in (1, 90, 5, 1, 1, 64, 1, 200, 3):
            read(model, state, some_tokens(size, size))
            n += size
            assert state.nbytes <= kv_bytes(model.config, mx.float32, n, 200, layout)


# On disk


@pytest.fixture
def saved(tmp_path: Path) -> tuple[SmallModel, KVState, Path]:
    model = small_model("e2b", 9, SegmentLayout())
    state = model.new_state()
    read(model, state, some_tokens(150))
    model.save_state(state, tmp_path / "state")
    return model, state, tmp_path / "state"


def test_a_saved_state_is_a_safetensors_file(saved: tuple[SmallModel, KVState, Path]) -> None:
    _, state, path = saved
    arrays = mx.load(str(path), format="safetensors")
    assert arrays["tokens"].tolist() == state.tokens  # type: ignore[call-overload, index]
    assert os.listdir(path.parent) == ["state"]


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.01, 0.3, 0.7, 0.9999])
def test_a_flipped_bit_or_a_lost_end_is_refused(saved: tuple[SmallModel, KVState, Path], share: float) -> None:
    model, _, path = saved
    good = path.read_bytes()
    bad = bytearray(good)
    bad[int(share * len(good))] ^= 1 << int(share * 10) % 8
    for contents in (bytes(bad), good[: int(share * len(good))]):
        path.write_bytes(contents)
        with pytest.raises(InputError) as caught:
            model.load_state(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_every_byte_of_a_saved_state_is_checked(saved: tuple[SmallModel, KVState, Path]) -> None:
    model, _, path = saved
    good = path.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(good), 200):
        bad = bytearray(good)
        bad[at] ^= 1 << int(at) % 8
        path.write_bytes(bytes(bad))
        with pytest.raises(InputError):
            model.load_state(path)


def test_another_models_state_is_refused(saved: tuple[SmallModel, KVState, Path]) -> None:
    _, _, path = saved
    for other in (small_model("12b", 9, SegmentLayout()), small_model("e2b", 10, SegmentLayout())):
        with pytest.raises(InputError, match="another model"):
            other.load_state(path)
    with pytest.raises(InputError, match="no such file"):
        other.load_state(path.with_name("none"))


def test_a_save_that_fails_leaves_the_old_file(
    saved: tuple[SmallModel, KVState, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, state, path = saved
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        model.save_state(state, path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["state"]


# Memory of the real models

MODELS = {  # layers with keys and values of their own, sliding and global; kv heads of each; window
    "E2B": (12, 3, 1, 1, 512),
    "E4B": (20, 4, 2, 2, 512),
    "12B": (40, 8, 8, 1, 1024),
    "26B-A4B": (25, 5, 8, 2, 1024),
    "31B": (50, 10, 16, 4, 1024),
}


def memory_rows() -> list[str]:
    """The table in docs/kv-state.md: MB of a state in fp16 at several lengths, and of a mark."""
    rows = []
    base = small_model("12b", 8, SegmentLayout()).config
    for name, (sliding, globals_, kv_sliding, kv_global, window) in MODELS.items():
        layers = [
            replace(base.layers[0], sliding=i < sliding, kv_layer=i, kv_heads=heads, head_dim=dim)
            for i in range(sliding + globals_)
            for heads, dim in [(kv_sliding, 256) if i < sliding else (kv_global, 512)]
        ]
        config = replace(base, layers=tuple(layers), window=window)
        for kv in KINDS if name == "31B" else ("full",):
            sizes = [kv_bytes(config, mx.float16, n, kv=kv) / 1e6 for n in (2048, 8192, 32768, 131072)]
            cells = (name + f", {kv}" * (kv != "full"), *(f"{size:,.0f}" for size in (*sizes, _window(config))))
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def _window(config: Config) -> float:
    return window_bytes(config, mx.float16) / 1e6


def test_the_memory_table_in_the_docs_is_computed() -> None:
    text = (Path(__file__).parents[2] / "docs" / "kv-state.md").read_text()
    for row in memory_rows():
        assert row in text
