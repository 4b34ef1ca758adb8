"""The choice of a split follows from the link, the memory and the bytes of a token."""

from __future__ import annotations

import pytest
import several_macs
from recorded import HERE
from several_macs import MACHINES, token

from mlx_gemma4.distributed.split import Link, alone_time, choose, layers_time, tensor_time
from mlx_gemma4.distributed.team import plan, possible
from mlx_gemma4.doctor.published import PUBLISHED
from mlx_gemma4.loading.loader import open_model
from mlx_gemma4.shard import Kind, Shard

FAST, SLOW = Link(5e-6, 10e9), Link(1e-3, 1e9)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_fast_link_is_for_tensors_a_slow_one_for_layers(name: str) -> None:
    machine = MACHINES["M4 Max"]
    assert choose(token(name), machine, 2, FAST)[0][0] == "tensor"
    kinds, line = choose(token(name), machine, 2, SLOW)
    assert kinds == ["layers", "tensor"]
    assert "--split layers" in line
    assert "1 ms a sum" in line


def test_what_cannot_be_is_said_and_the_other_split_taken(caplog: pytest.LogCaptureFixture) -> None:
    with open_model(HERE / "31b-f32.gguf") as (config, source, _):

        def planned(kind: Kind) -> object:
            return plan(config, source, Shard(0, 500, kind))

        assert possible(["tensor", "layers"], planned) == "layers"
        assert possible(["layers", "tensor"], planned) == "tensor"
    tensor, layers = caplog.messages
    assert tensor == "500 ranks: no layer has enough heads or blocks for so many; so --split layers"
    assert "500 ranks: this model's layers can be split among " in layers
    assert layers.endswith("; so --split tensor")


@pytest.mark.parametrize("name", PUBLISHED)
def test_terms(name: str) -> None:
    """What is shared is read once in all; a free link leaves the bytes; a sum's latency counts once for each."""
    t, machine, free = token(name), MACHINES["M4 Max"], Link(0, 1e18)
    launches = t.launches * machine.launch
    read = (alone_time(t, machine) - launches) * machine.bandwidth
    assert read == pytest.approx(t.weights + t.kv)
    halves = (tensor_time(t, machine, 2, free) - launches) * machine.bandwidth
    assert read / 2 < halves < read * 0.53
    assert layers_time(t, machine, 2, free) == pytest.approx(alone_time(t, machine) - t.head / 2 / machine.bandwidth)
    late = tensor_time(t, machine, 2, Link(1e-3, 1e18)) - tensor_time(t, machine, 2, free)
    assert late == pytest.approx(1e-3 * (2 * t.layers + 2))
    assert t.sums == 2 * PUBLISHED[name].layers + 1


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_ranks_share_is_the_loaders(name: str, ranks: int) -> None:
    taken, cut = (float(part) for part in several_macs.shares_of(name, ranks).split(" ranks ")[1].split(" / "))
    assert taken == pytest.approx(cut, rel=0.02)
