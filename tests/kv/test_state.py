"""KV states: whatever is done to them, they equal a fresh reading of the same tokens."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import make_synthetic
import mlx.core as mx
import numpy as np
import pytest
from plain_state import LAYOUTS, PlainState, SmallModel, read, same_contents, small_model, some_tokens

from mlx_gemma4.config import Config
from mlx_gemma4.doctor.published import PUBLISHED
from mlx_gemma4.errors import InputError
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.generation.sampling import Sampling
from mlx_gemma4.kv.quantization import KINDS
from mlx_gemma4.kv.segments import SegmentLayout
from mlx_gemma4.kv.state import KVState, kv_bytes, window_bytes
from mlx_gemma4.model import forward

GREEDY = Sampling(temperature=0)


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


@pytest.mark.slow
def test_no_bleed_between_interleaved_states() -> None:
    """Eight states in turns give what each gives alone, past the window, to the bit."""
    model = small_model("e2b", 9, SegmentLayout())
    prompts = [some_tokens(40 + i, seed=i) for i in range(8)]
    alone = [[read(model, s, [t]) for t in p] for p in prompts for s in [model.new_state()]]
    states = [model.new_state() for _ in prompts]
    for step in range(40):
        for state, prompt, expected in zip(states, prompts, alone, strict=True):
            np.testing.assert_array_equal(read(model, state, [prompt[step]]), expected[step])


@pytest.mark.slow
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
        patch.setattr(forward, "mlp", lambda *_: 1 / 0)  # the first layer's keys and values are there by then
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


# Memory of the real models


def memory_rows() -> list[str]:
    """The table in docs/kv-state.md: MB of a state in fp16 at several lengths, and of a mark."""
    rows = []
    for name, shape in PUBLISHED.items():
        config = make_synthetic.config_of(shape)
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
