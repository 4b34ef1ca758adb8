"""Recorded decode steps, their launches made by the Metal simulator in an arena of host memory, token after token."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from host_player import HostPlayer
from kernel_cases import metal
from kernel_models import BUDGET
from recorded import kl, path, prompts

from mlx_gemma4 import Sampling, load
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.gpu.recording import Arena, Recording, dependencies, recorded, recorder
from mlx_gemma4.model import replay
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.op import OpKey
from mlx_gemma4.ops.sample import Draw

OFF = frozenset([OpKey("expand")])  # tiles of a prompt, which round to fp16


def both(kind: str, tag: str, folder: Path, weights: Any = "packed") -> tuple[Model, Model]:
    """A model with stock operations, and the same weights with steps that are replayed."""
    plain = load(path(kind, tag, folder), weights=weights).model
    HostPlayer.made.clear()
    return plain, Model(plain.config, plain.weights, Kernels(metal, OFF, player=HostPlayer))


# The last three: gate and up of different types, in an MLP and in experts, and of no packed type.
@pytest.mark.parametrize(
    ("kind", "tag", "weights"),
    [
        *((kind, "q8_0", "packed") for kind in BUDGET),
        ("12b", "untied-q4_k_m", "packed"),
        ("26b-a4b", "split-mix", "packed"),
        ("31b", "q8_0", "dense"),
    ],
)
def test_replayed_steps_give_the_stock_logits(kind: str, tag: str, weights: str, tmp_path: Path) -> None:
    plain, replayed = both(kind, tag, tmp_path, weights)
    ids = prompts(kind)[1]
    states = [model.new_state() for model in (plain, replayed)]
    for state in states:
        plain.prefill(mx.array(ids[:-3]), state)
    for i in ids[-3:]:
        want, got = (np.array(m.forward(mx.array([i]), s)) for m, s in zip((plain, replayed), states, strict=True))
        assert np.abs(got - want).max() <= 1e-3
        assert kl(want, got) <= 1e-8
    assert len(HostPlayer.made[-1].tokens) == 3 and HostPlayer.made[-1].loads == 1
    assert states[0].tokens == states[1].tokens
    for a, b in zip(states[0].arrays, states[1].arrays, strict=True):
        assert a.shape == b.shape


@pytest.mark.parametrize(
    ("kind", "tag", "apart"), [("31b", "ud", 0), ("26b-a4b", "ud", 0), ("12b", "ud", 0), ("26b-a4b", "split-mix", 1)]
)
def test_a_mix_of_types_makes_no_step_longer(kind: str, tag: str, apart: int, tmp_path: Path) -> None:
    """q, k and v of different types are launches that wait for the same one and not for each other: of those that do
    wait for each other there are as many as in a file of one type, and one more where gate and up differ."""
    chains, launches = [], []
    for file in ("q8_0", tag):
        _, replayed = both(kind, file, tmp_path)
        state = replayed.new_state()
        replayed.prefill(mx.array(prompts(kind)[0][:5]), state)
        replayed.forward(mx.array([7]), state)
        lengths: list[int] = []
        for waits in dependencies(HostPlayer.made[-1].launches):
            lengths.append(1 + max((lengths[i] for i in waits), default=0))
        chains.append(max(lengths))
        launches.append(len(lengths))
    layers = len(replayed.config.layers)
    assert chains[1] <= chains[0] + apart * layers
    assert launches[1] <= launches[0] + (2 + 2 * apart) * layers


@pytest.mark.parametrize("working", [64, 66, 512])
def test_a_full_tail_is_sealed_and_others_see_their_own(
    working: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across the end of a tail: forks, marks and rewinds on the way are as with stock operations."""
    monkeypatch.setattr(replay, "WORKING", working)
    plain, replayed = both("12b", "q8_0", tmp_path)
    found = []
    for model in (plain, replayed):
        state, logits = model.new_state(), []
        plain.prefill(mx.array(prompts("12b")[0][:1] * 61), state)
        for i in range(3):
            logits.append(model.forward(mx.array([i]), state))
        fork = state.fork()  # at 64, the tail full
        logits.append(model.forward(mx.array([9]), state))
        mark = state.mark()
        logits += [model.forward(mx.array([i]), state) for i in (10, 11)]
        logits += [model.forward(mx.array([12]), fork) for _ in range(2)]  # the second time it steps, it's taken on
        state.rewind(mark)
        logits += [model.forward(mx.array([i]), state) for i in (13, 14)]
        cut = [[(s.start, s.stop) for s in kv.segments] for kv in state.layers.values()]
        found.append((np.stack([np.array(a) for a in logits]), state.tokens, fork.tokens, state.length, cut))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-3)
    assert found[0][1:] == found[1][1:]
    assert HostPlayer.made[-1].loads >= 3


def test_states_in_turns(tmp_path: Path) -> None:
    """A state that steps right after another is not taken on, and both go on as alone."""
    plain, replayed = both("e2b", "q8_0", tmp_path)
    found = []
    for model in (plain, replayed):
        states = [model.new_state() for _ in "ab"]
        for n, state in enumerate(states):
            plain.prefill(mx.array(prompts("e2b")[n]), state)
        turns = [0, 0, 1, 0, 1, 1, 1, 0]
        found.append(np.stack([np.array(model.forward(mx.array([5 + i]), states[t])) for i, t in enumerate(turns)]))
    np.testing.assert_allclose(*found, atol=1e-3)
    assert 0 < len(HostPlayer.made[-1].tokens) < 8


def test_a_step_under_way_when_another_begins(tmp_path: Path) -> None:
    _, replayed = both("12b", "q8_0", tmp_path)
    state = replayed.new_state()
    replayed.prefill(mx.array([3, 4]), state)
    fork = state.fork()
    first, second = replayed.step(5, state), replayed.step(6, state)
    late = np.array(first.logits()), np.array(second.logits())
    assert [first.token(), second.token()] == [int(logits.argmax()) for logits in late]
    for i, logits in zip((5, 6), late, strict=True):
        np.testing.assert_array_equal(np.array(replayed.forward(mx.array([i]), fork)), logits)


@pytest.mark.parametrize(("kv", "working", "loads"), [("full", 64, 2), ("full", 512, 1), ("tq4", 64, 2)])
def test_replies_are_the_same(
    kv: str, working: int, loads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy tokens past a tail's end, where global layers are in codes as well; and what the state holds then."""
    monkeypatch.setattr(replay, "WORKING", working)
    plain, replayed = both("26b-a4b", "q8_0", tmp_path)
    ids, found = prompts("26b-a4b")[0], []
    for model in (plain, replayed):
        state = model.new_state(kv=kv)
        tokens = [t.id for t in generate_tokens(model, state, (ids * 64)[:60], Sampling(temperature=0), 8)]
        found.append((tokens, state.tokens))
    assert found[0] == found[1]
    player = HostPlayer.made[-1]
    assert (len(player.tokens), player.loads) == (8, loads)  # the last is read, too
    assert player.chained == 8 - loads  # but for the first, and the one that seals a tail


def test_a_sampled_reply(tmp_path: Path) -> None:
    """Which needs the logits of each step, and a stop token that ends it: as with the same kernels, one by one."""
    plain, replayed = both("12b", "q8_0", tmp_path)
    stepped = Model(plain.config, plain.weights, Kernels(metal, OFF))
    ids, found = prompts("12b")[0], []
    for model in (stepped, replayed):
        state, how = model.new_state(), Sampling(temperature=0.7, seed=3, repetition_penalty=1.1)
        tokens = [t.id for t in generate_tokens(model, state, ids, how, 6)]
        again = [t.id for t in generate_tokens(model, state, [4], how, 6, frozenset(tokens[3:4]))]
        found.append((tokens, again, state.tokens))
    assert found[0] == found[1]
    assert not HostPlayer.made[-1].chained


@pytest.mark.parametrize(
    "how",
    [
        Sampling(temperature=1, top_k=64, top_p=0.95, seed=3),
        Sampling(temperature=0.7, seed=4),
        Sampling(temperature=1.2, top_k=20, min_p=0.05, seed=5),
    ],
)
def test_a_reply_drawn_within_the_steps(how: Sampling, tmp_path: Path) -> None:
    """As with the same kernels one by one, in one recording with a greedy one; each step starts with the one before."""
    plain, replayed = both("12b", "q8_0", tmp_path)
    stepped = Model(plain.config, plain.weights, Kernels(metal, OFF))
    ids, found = prompts("12b")[0], []
    for model in (stepped, replayed):
        state = model.new_state()
        tokens = [t.id for t in generate_tokens(model, state, ids, how, 8)]
        more = [t.id for t in generate_tokens(model, state, [4], Sampling(temperature=0), 3)]
        again = [t.id for t in generate_tokens(model, state, [4], how, 6, frozenset(tokens[3:4]))]
        found.append((tokens, more, again, state.tokens))
    assert found[0] == found[1]
    player = HostPlayer.made[-1]
    assert player.loads == 1 and player.chained >= 7 + 2 + 1


def test_a_draw_that_no_kernel_makes(tmp_path: Path) -> None:
    """A step of such a draw is not replayed, but drawn all the same; a reply takes the logits of replayed steps."""
    plain, replayed = both("e2b", "q8_0", tmp_path)
    draw, ids, how = Draw(1.0, top_p=0.8, seed=2), prompts("e2b")[0], Sampling(top_p=0.8, seed=2)
    steps = [model.step(7, model.new_state(), draw) for model in (plain, replayed)]
    assert steps[0].token() == steps[1].token()
    assert not HostPlayer.made[-1:]
    replies = [[t.id for t in generate_tokens(model, model.new_state(), ids, how, 5)] for model in (plain, replayed)]
    assert replies[0] == replies[1]
    assert len(HostPlayer.made[-1].tokens) == 5 and not HostPlayer.made[-1].chained


def test_a_greedy_reply_that_stops(tmp_path: Path) -> None:
    """The step that is under way when the stop token is seen, is taken back."""
    plain, replayed = both("e2b", "q8_0", tmp_path)
    ids, greedy = prompts("e2b")[0], Sampling(temperature=0)
    stop = [t.id for t in generate_tokens(plain, plain.new_state(), ids, greedy, 4)][3]
    found = []
    for model in (plain, replayed):
        state = model.new_state()
        tokens = [t.id for t in generate_tokens(model, state, ids, greedy, 9, frozenset([stop]))]
        more = [t.id for t in generate_tokens(model, state, [5], greedy, 3)]
        found.append((tokens, more, state.tokens, state.length))
    assert found[0] == found[1]


def test_what_cannot_be_recorded_runs_as_before(tmp_path: Path) -> None:
    """An operation that is off is stock MLX, which no recording takes."""
    plain, _ = both("12b", "q8_0", tmp_path)
    model = Model(plain.config, plain.weights, Kernels(metal, OFF | {OpKey("add_norm")}, player=HostPlayer))
    states = [plain.new_state(), model.new_state()]
    got = [np.array(m.forward(mx.array([7]), s)) for m, s in zip((plain, model), states, strict=True)]
    np.testing.assert_allclose(*got, atol=1e-3)
    assert len(HostPlayer.made[-1].tokens) == 0


@pytest.mark.parametrize("begin", [57, 121])  # tokens that are there already: just before a tail is full
@pytest.mark.parametrize(
    ("seed", "kind", "kv", "working"),
    [(9, "gemma3", "full", 64), (2, "26b-a4b", "tq4", 64), (7, "26b-a4b", "q8", 64), (6, "e2b", "full", 66)],
)
def test_random_operations(
    seed: int, kind: str, kv: str, working: int, begin: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several states that step, reply, fork, mark, rewind, are saved, loaded and closed, past full tails.

    To the bit as with the same kernels one by one; where a step's own tails are longer, attention is cut otherwise.
    """
    monkeypatch.setattr(replay, "WORKING", working)
    plain, replayed = both(kind, "q8_0", tmp_path)
    models = Model(plain.config, plain.weights, Kernels(metal, OFF)), replayed
    chance = random.Random(seed + begin)

    def tokens(n: int) -> list[int]:
        return [chance.randrange(4, 300) for _ in range(n)]

    pairs, marks = [[model.new_state(kv=kv) for model in models]], [[0]]
    ids = mx.array(tokens(begin))
    for state in pairs[0]:
        plain.prefill(ids, state)
    for n in range(40):
        at = chance.randrange(len(pairs)) if chance.random() < 0.3 else len(pairs) - 1
        pair, op = pairs[at], chance.random()
        if op < 0.45:
            for token in tokens(chance.randrange(1, 4)):
                made = (model.forward(mx.array([token]), state) for model, state in zip(models, pair, strict=True))
                want, got = map(np.array, made)
                np.testing.assert_allclose(got, want, rtol=0, atol=0 if working == 64 else 1e-3)
        elif op < 0.6:
            prompt, stops = tokens(chance.choice([1, 1, 2, 5])), frozenset(tokens(chance.choice([0, 40])))
            how = Sampling(temperature=chance.choice([0, 0, 0.8]), seed=n)
            most = chance.randrange(1, 9)
            replies = [
                [t.id for t in generate_tokens(model, state, prompt, how, most, stops)]
                for model, state in zip(models, pair, strict=True)
            ]
            assert replies[0] == replies[1]
        elif op < 0.7 and len(pairs) < 4:
            pairs.append([state.fork() for state in pair])
            marks.append(list(marks[at]))
        elif op < 0.78:
            marks[at].append(pair[0].length)
            for state in pair:
                state.mark()
        elif op < 0.9:
            to = chance.choice([p for p in (*marks[at], pair[0].length - 1) if p > 0])
            marks[at] = [p for p in marks[at] if p <= to]
            for state in pair:
                state.rewind(to)
        elif op < 0.94 and len(pairs) > 1:
            for state in pair:
                state.close()
            del pairs[at], marks[at]
        else:
            file = tmp_path / f"{n}.safetensors"
            replayed.save_state(pair[1], file)
            pairs[at], marks[at] = [pair[0], replayed.load_state(file)], [0]
        for one, other in pairs:
            assert one.tokens == other.tokens and one.length == other.length
    assert len(HostPlayer.made[-1].tokens) > 20


# ---------------------------------------------------------------- recordings


def take(recording: Recording, name: str, reads: list[Any], *shapes: tuple[int, ...]) -> Any:
    kernel = recorder(name, [f"x{i}" for i in range(len(reads))], [f"y{i}" for i in range(len(shapes))], "", "")
    with recorded(recording):
        return kernel(reads, (1, 1, 1), (1, 1, 1), shapes, [mx.float32] * len(shapes))


def test_dependencies() -> None:
    r = Recording(Arena())
    (a,) = take(r, "a", [mx.zeros(4)], (4,))
    (b,) = take(r, "b", [a], (4,))
    (c,) = take(r, "c", [a], (4,))
    (d,) = take(r, "d", [a, b], (4,))  # waits for a anyway, through b
    take(r, "e", [c, d], (4,))
    assert dependencies(r.launches) == [[], [0], [0], [1], [2, 3]]


def test_memory_that_is_used_again_waits_for_its_readers() -> None:
    r = Recording(Arena())
    (a,) = take(r, "a", [mx.zeros(4)], (4,))
    (b,) = take(r, "b", [a], (8,))
    del a
    (c,) = take(r, "c", [mx.zeros(4)], (4,))
    assert c.region.allocation == r.launches[0].outputs[0].allocation
    assert dependencies(r.launches)[2] == [1]
    assert b.region.allocation != c.region.allocation


def test_the_same_demands_get_the_same_memory() -> None:
    arena, found = Arena(), []
    for _ in range(2):
        arena.reset()
        r = Recording(arena)
        (a,) = take(r, "a", [mx.zeros(4)], (400,))
        b, c = take(r, "b", [a], (4,), (400,))
        del a
        take(r, "c", [b, c], (400,))
        found.append([region for launch in r.launches for region in launch.outputs])
        del b, c
    assert found[0] == found[1]


def test_views_keep_their_memory() -> None:
    arena = Arena()
    r = Recording(arena)
    whole = r.buffer((4, 6), mx.float16)
    row, rows, wide = whole[1], whole[1:3], whole[None]
    assert (row.shape, row.start - whole.start) == ((6,), 12)
    assert (rows.shape, rows.ndim, rows.size) == ((2, 6), 2, 12)
    assert wide.shape == (1, 4, 6) and whole.reshape(-1, 2).shape == (12, 2)
    place = whole.allocation.start
    del whole, rows, wide
    assert r.buffer((4, 6), mx.float16).allocation.start != place
    del row
    assert place in [p.start for p in (arena.allocate(48), arena.allocate(48))]
