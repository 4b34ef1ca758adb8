"""The scheduler over recorded steps, their launches made by the Metal simulator: alone, together and back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from host_player import HostPlayer
from kernel_cases import metal
from recorded import path, prompts

from mlx_gemma4 import Sampling, load
from mlx_gemma4.generation.decoding import Statistics
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.generation.scheduler import Scheduler
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.op import OpKey

GREEDY = Sampling(temperature=0)
SAMPLED = Sampling(temperature=0.8, seed=5, top_k=20)


@pytest.mark.parametrize(("last", "shared"), [(GREEDY, 64), (SAMPLED, 64), (GREEDY, 3)])
def test_replies_are_the_same(last: Sampling, shared: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One alone, then three, whose lengths differ; greedy steps are chained unless one of them is sampled.

    Where so few tokens are worth it, the others go on from the state that is being stepped.
    """
    monkeypatch.setattr("mlx_gemma4.generation.scheduler.SHARED", shared)
    plain = load(path("12b", "q8_0", tmp_path), weights="packed").model
    HostPlayer.made.clear()
    replayed = Model(plain.config, plain.weights, Kernels(metal, frozenset([OpKey("expand")]), player=HostPlayer))
    ids, ways = prompts("12b")[0], [GREEDY, GREEDY, last]
    lengths = [24, 9, 14 if shared > 5 else 4]  # at its fifth token two are 0.003 apart, and prompts were cut elsewhere
    stepped = Model(plain.config, plain.weights, Kernels(metal, frozenset([OpKey("expand")])))  # the same kernels
    want = [
        [t.id for t in generate_tokens(stepped, stepped.new_state(), ids[: 5 + i], ways[i], lengths[i])]
        for i in range(3)
    ]
    with Scheduler(replayed, 3) as scheduler, ThreadPoolExecutor(2) as pool:
        states = [replayed.new_state() for _ in range(3)]
        figures = [Statistics() for _ in range(3)]
        made = [
            scheduler.generate_tokens(states[i], ids[: 5 + i], ways[i], lengths[i], statistics=figures[i])
            for i in range(3)
        ]
        got = [[next(made[0]).id for _ in range(3)], [], []]
        others = [pool.submit(lambda i=i: [t.id for t in made[i]]) for i in (1, 2)]
        got[0] += [t.id for t in made[0]]
        got[1:] = [other.result() for other in others]
    assert got == want
    assert all(f.reused_tokens == 0 if f is figures[0] or shared > 5 else 5 <= f.reused_tokens <= 6 for f in figures)
    for i in range(3):
        assert states[i].tokens == ids[: 5 + i] + want[i]
    assert len(HostPlayer.made) > 1  # of one reply, and of several
    assert sum(player.chained for player in HostPlayer.made[1:]) > 0 or last is SAMPLED
