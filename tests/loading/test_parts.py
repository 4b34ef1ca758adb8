"""What each rank reads of the published models, from their shapes alone: everything once, no more than its share."""

from __future__ import annotations

from math import prod

import make_synthetic
import pytest

from mlx_gemma4.config import Config, LayerConfig
from mlx_gemma4.doctor.published import PUBLISHED
from mlx_gemma4.errors import InputError
from mlx_gemma4.loading.parts import PartPlan, heads_by_rank, plan_part, stages, widths
from mlx_gemma4.loading.tensors import Cut, Entry, Spec
from mlx_gemma4.shard import Kind, Shard, shares

SMALL = ("norm", "scale", "rope_freqs", "inp_gate", ".proj.", "per_layer_model_proj", "ffn_gate_inp", "post_")


def published(name: str) -> tuple[Config, dict[str, Entry], dict[str, Spec]]:
    """The configuration and the tensors of a published model in Q4_K_M."""
    made = make_synthetic.tensors(PUBLISHED[name])
    entries, specs = {}, {}
    for tensor, (shape, type) in made.items():
        _, size, n_bytes = make_synthetic.TYPES[type]
        entries[tensor] = Entry(shape, type, prod(shape) // size * n_bytes, size > 1, block=size)
        specs[tensor] = Spec(shape, "matrix" if len(shape) > 1 else "vector")
    return make_synthetic.config_of(PUBLISHED[name]), entries, specs


def plans(name: str, size: int, kind: Kind) -> list[PartPlan]:
    return [plan_part(*published(name), Shard(rank, size, kind)) for rank in range(size)]


def n_bytes(entry: Entry, cut: Cut) -> int:
    return entry.n_bytes * prod(cut.shape(entry.shape)) // prod(entry.shape)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("name", PUBLISHED)
def test_each_layer_in_parts_is_there_once_and_evenly(name: str, size: int) -> None:
    """All but norms, routers, projections of per-layer embeddings and keys that several ranks' queries read."""
    config, entries, _ = published(name)
    made = plans(name, size, "tensor")
    assert not any(plan.whole for plan in made)
    few = {i for i, layer in enumerate(config.layers) if layer.kv_heads < size}
    repeated = {f"blk.{i}.attn_{x}.weight" for i in few for x in "kv"}
    for tensor, entry in entries.items():
        cuts = [plan.tensors[tensor][1] for plan in made]
        held = sum(prod(cut.shape(entry.shape)) for cut in cuts)
        whole = all(cut == Cut() for cut in cuts)
        assert whole == any(part in tensor for part in SMALL), tensor
        assert held == prod(entry.shape) * (size if whole else 1) or tensor in repeated, tensor
        if cuts[0].columns:
            assert all(cut.columns and cut.columns.start % entry.block == 0 for cut in cuts)
    for i, layer in enumerate(config.layers):
        mine = [plan.config.layers[i] for plan in made]
        assert sum(m.heads for m in mine) == layer.heads
        assert all(m.heads % m.kv_heads == 0 for m in mine)
    total = sum(entry.n_bytes for entry in entries.values())
    same = sum(e.n_bytes for t, e in entries.items() if t in repeated or made[0].tensors[t][1] == Cut())
    for plan in made:
        mine_bytes = sum(n_bytes(entries[of], cut) for of, cut in plan.tensors.values())
        uneven = 1.05 if size != 3 else 1.2  # heads and blocks are no multiples of 3
        assert mine_bytes <= (total - same) / size * uneven + same


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", PUBLISHED)
def test_layers_by_rank_are_there_once_with_the_layers_that_share_their_keys(name: str, size: int) -> None:
    config, entries, _ = published(name)
    made = plans(name, size, "layers")
    assert [i for plan in made for i in plan.part.layers] == [*range(len(config.layers))]
    for plan in made:
        assert all(0 <= layer.kv_layer <= i for i, layer in enumerate(plan.config.layers))
        assert any(layer.sliding for layer in plan.config.layers)
    blocks = [of for plan in made for of, _ in plan.tensors.values() if of.startswith("blk.")]
    assert sorted(blocks) == sorted(t for t in entries if t.startswith("blk."))
    if not config.ple:  # those share keys and values with early layers, and embed on every rank
        layers = sum(e.n_bytes for t, e in entries.items() if t.startswith("blk."))
        head = entries["token_embd.weight"].n_bytes
        for rank, plan in enumerate(made):
            mine = sum(n_bytes(entries[of], cut) for of, cut in plan.tensors.values())
            assert mine <= (layers / size + (head if rank == 0 else head / size)) * 1.05


def test_heads_go_by_groups_or_within_one() -> None:
    def by_rank(heads: int, kv_heads: int, block: int, size: int) -> list[tuple[range, range]] | None:
        return heads_by_rank(LayerConfig(True, heads, kv_heads, 64, 1, 0), block, size)

    assert by_rank(8, 4, 32, 2) == [(range(4), range(2)), (range(4, 8), range(2, 4))]
    assert by_rank(9, 3, 1, 2) == [(range(3), range(1)), (range(3, 9), range(1, 3))]
    assert by_rank(4, 1, 128, 2) == [(range(2), range(1)), (range(2, 4), range(1))]
    assert by_rank(4, 2, 64, 3) == [(range(2), range(1)), (range(2, 3), range(1, 2)), (range(3, 4), range(1, 2))]
    assert by_rank(4, 1, 256, 2) is None  # a block holds all heads
    assert by_rank(6, 3, 256, 2) is None  # or two of a group and one of the next
    assert by_rank(2, 2, 64, 4) is None


def test_widths_are_whole_blocks() -> None:
    assert widths(704, 32, 2) == [range(352), range(352, 704)]
    assert widths(768, 256, 2) == [range(256), range(256, 768)]
    assert widths(768, 256, 2, turn=1) == [range(512), range(512, 768)]
    assert widths(256, 256, 2) is None
    assert widths(28, 1, 2) == [range(14), range(14, 28)]
    assert widths(96, 1, 2) == [range(32), range(32, 96)]
    assert [len(share) for share in shares(317, 4)] == [79, 79, 79, 80]


def test_stages_are_of_even_size_and_end_where_they_may() -> None:
    assert stages([1] * 6, 3, 5) == [range(2), range(2, 4), range(4, 6)]
    assert stages([1, 1, 1, 9], 2, 3) == [range(3), range(3, 4)]
    assert stages([1] * 10, 2, 3, unit=2) == [range(2), range(2, 10)]
    with pytest.raises(InputError, match="split among 14 at most"):
        plans("E2B", 15, "layers")
    with pytest.raises(InputError, match="rank 2 of 2"):
        plan_part(*published("E2B"), Shard(2, 2))
