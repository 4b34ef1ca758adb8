"""Which part of each tensor a rank reads, so that a model runs in several processes.

In: a configuration, the tensors of a file, a `Shard`. Out: the configuration of the rank's part, its `Part`, and for
each tensor that it reads a `Cut`. Rows are cut anywhere; within rows, only whole blocks of a quantization, so
shares may be uneven, and what has too few blocks stays whole on each rank.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm, prod

from ..config import Config, LayerConfig
from ..errors import InputError
from ..memory import Holding
from ..ops.dispatch import Kernels
from ..ops.stock import Weight
from ..shard import Part, Shard, shares
from .tensors import Cut, Entry, Source, Spec

log = logging.getLogger("mlx_gemma4")

Heads = tuple[range, range]  # of a rank in a layer: query heads, KV heads


@dataclass(frozen=True)
class PartPlan:
    """What a rank loads."""

    config: Config  # of its part; `vocab` stays the model's
    part: Part
    tensors: dict[str, tuple[str, Cut]]  # by the part's own name: the name in the file, and what of it
    whole: str = ""  # what could not be split


class PartSource:
    """The tensors of a rank's part, cut out of another source's as they are read."""

    def __init__(self, source: Source, tensors: Mapping[str, tuple[str, Cut]]) -> None:
        self.name = source.name
        self.entries: dict[str, Entry] = {}
        for name, (of, cut) in tensors.items():
            entry, shape = source.entries[of], cut.shape(source.entries[of].shape)
            n_bytes = entry.n_bytes * prod(shape) // prod(entry.shape)
            self.entries[name] = replace(entry, shape=shape, n_bytes=n_bytes)
        self._source, self._tensors = source, tensors

    def read(
        self, names: Sequence[str], spec: Spec, holding: Holding, kernels: Kernels | None, cuts: Sequence[Cut] = ()
    ) -> Weight:
        of, cuts = zip(*(self._tensors.get(name, (name, Cut())) for name in names), strict=True)  # a scale is whole
        return self._source.read(of, spec, holding, kernels, cuts)


def part_of(
    config: Config, source: Source, present: Mapping[str, Spec], shard: Shard
) -> tuple[PartPlan, PartSource, dict[str, Spec]]:
    """Return a rank's part of a model: its plan, its source, and the tensors that it has. Raises InputError."""
    plan = plan_part(config, source.entries, present, shard)
    specs = {name: replace(present[of], shape=cut.shape(present[of].shape)) for name, (of, cut) in plan.tensors.items()}
    some = PartSource(source, plan.tensors)
    mine, all_ = (sum(s.entries[name].n_bytes for name in names) for s, names in ((some, specs), (source, present)))
    numbers = shard.rank, shard.size, plan.part.layers.start, plan.part.layers[-1], mine / 1e9, all_ / 1e9
    log.info("Rank %d of %d: of layers %d to %d, %.2f of %.2f GB", *numbers)
    if plan.whole:
        log.warning("Too few heads or blocks for %d ranks, so whole on each: %s", shard.size, plan.whole)
    return plan, some, specs


def plan_part(config: Config, entries: Mapping[str, Entry], present: Mapping[str, Spec], shard: Shard) -> PartPlan:
    """Plan the part of one rank; the others' follow from the same arguments. Raises InputError."""
    if not 0 <= shard.rank < shard.size:
        raise InputError(f"rank {shard.rank} of {shard.size}: ranks count from 0; check the hostfile")
    return (by_tensors if shard.kind == "tensor" else by_layers)(config, entries, present, shard)


# ---- each layer in parts


def by_tensors(config: Config, entries: Mapping[str, Entry], present: Mapping[str, Spec], shard: Shard) -> PartPlan:
    c, size, rank = config, shard.size, shard.rank
    rows = shares(c.vocab, size)[rank]
    cuts = {name: Cut((rows,)) for name in ("token_embd", "per_layer_token_embd", "output")}
    blocks = {name: entry.block for name, entry in entries.items()}
    heads = [_heads_of(c, i, blocks, size) for i in range(len(c.layers))]
    layers, split = [], {"attention": set[int](), "mlp": set[int](), "experts": set[int]()}
    for i, layer in enumerate(c.layers):
        blk, dim, chosen = f"blk.{i}.", layer.head_dim, heads[layer.kv_layer]
        if chosen is not None:
            q, kv = chosen[rank]
            cuts |= {f"{blk}attn_q": Cut((_times(q, dim),)), f"{blk}attn_output": Cut((), _times(q, dim))}
            cuts |= {f"{blk}attn_{x}": Cut((_times(kv, dim),)) for x in "kv"}
            layer = replace(layer, heads=len(q), kv_heads=len(kv))
            split["attention"].add(i)
        for what, name, n in (("mlp", "", layer.ffn), ("experts", "_exps", c.expert_ffn)):
            if n and (share := widths(n, blocks[f"{blk}ffn_down{name}.weight"], size, i)) is not None:
                f = share[rank]
                cuts |= {f"{blk}ffn_{x}{name}": Cut((f,)) for x in ("gate", "up")}
                cuts[f"{blk}ffn_gate_up{name}"] = Cut((f, range(f.start + n, f.stop + n)))
                cuts[f"{blk}ffn_down{name}"] = Cut((), f)
                layer = replace(layer, ffn=len(f)) if what == "mlp" else layer
                split[what].add(i)
        layers.append(layer)
    kept = {what: len(layers) - len(some) for what, some in split.items() if what != "experts" or c.experts}
    whole = ", ".join(f"{what} of {n} layers" for what, n in kept.items() if n)
    tensors = {name: (name, cuts.get(name.removesuffix(".weight"), Cut())) for name in present}
    own = {i: _first_kept(heads[i], rank, layer) for i, layer in enumerate(c.layers) if layer.kv_layer == i}
    part = Part(shard, c.vocab, rows, range(len(layers)), {what: frozenset(some) for what, some in split.items()}, own)
    wide = -(-c.expert_ffn // (1 if kept.get("experts") else size))  # about: memory is planned by it
    return PartPlan(replace(c, layers=tuple(layers), expert_ffn=wide), part, tensors, whole)


def _first_kept(heads: list[Heads] | None, rank: int, layer: LayerConfig) -> range:
    """Return the KV heads of a layer that a rank is the first to have; all of them, where it stays whole."""
    if heads is None:
        return range(layer.kv_heads)
    kv = heads[rank][1]
    return range(0) if rank and heads[rank - 1][1] == kv else kv


def _heads_of(c: Config, i: int, blocks: Mapping[str, int], size: int) -> list[Heads] | None:
    """Return each rank's heads in layer i and those that share its keys and values; None: they stay whole."""
    sharing = [j for j, layer in enumerate(c.layers) if layer.kv_layer == i]
    if len({c.layers[j].heads for j in sharing}) != 1:  # none, where i shares another's itself
        return None
    block = lcm(*(blocks[f"blk.{j}.attn_output.weight"] for j in sharing))
    return heads_by_rank(c.layers[i], block, size, i)


def heads_by_rank(layer: LayerConfig, block: int, size: int, turn: int = 0) -> list[Heads] | None:
    """Return each rank's query heads and the KV heads that these read: whole groups, or parts of one group.

    A KV head that several ranks' queries read is on each of them. `block`: numbers of a row of attn_output that are
    told apart only together. None: there are too few heads.
    """
    heads, kv_heads = layer.heads, layer.kv_heads
    group, unit = heads // kv_heads, lcm(block, layer.head_dim) // layer.head_dim  # query heads
    if kv_heads >= size:
        together = lcm(unit, group) // group  # KV heads
        if kv_heads % together or kv_heads // together < size:
            return None
        kv = [_times(share, together) for share in shares(kv_heads // together, size, turn)]
        return [(_times(each, group), each) for each in kv]
    ranks = shares(size, kv_heads, turn)
    if group % unit or group // unit < max(map(len, ranks)):
        return None
    found = []
    for g, some in enumerate(ranks):
        for share in shares(group // unit, len(some)):
            q = _times(share, unit)
            found.append((range(g * group + q.start, g * group + q.stop), range(g, g + 1)))
    return found


def widths(n: int, block: int, size: int, turn: int = 0) -> list[range] | None:
    """Return n columns by rank, in whole blocks; None: there are too few. Of plain numbers, 32 go together: kernels
    load 8 at a time."""
    unit = 32 if block == 1 and n % 32 == 0 and n // 32 >= size else block
    if n % unit or n // unit < size:
        return None
    return [_times(share, unit) for share in shares(n // unit, size, turn)]


def _times(share: range, n: int) -> range:
    return range(share.start * n, share.stop * n)


# ---- so many layers for each rank


def by_layers(config: Config, entries: Mapping[str, Entry], present: Mapping[str, Spec], shard: Shard) -> PartPlan:
    c, size, rank = config, shard.size, shard.rank
    sizes = [0] * len(c.layers)
    for name in present:
        if name.startswith("blk."):
            sizes[int(name.split(".")[1])] += entries[name].n_bytes
    # Layers that share keys and values lie with the layers that make them, on the last rank; and a rank's columns of
    # per-layer embeddings are whole blocks.
    limit = min((s.kv_layer for i, s in enumerate(c.layers) if s.kv_layer != i), default=len(sizes) - 1)
    together = lcm(entries["per_layer_token_embd.weight"].block, c.ple) // c.ple if c.ple else 1
    if limit // together + 1 < size:
        raise InputError(f"{size} ranks: this model's layers can be split among {limit // together + 1} at most")
    mine = stages(sizes, size, limit, together)[rank]
    rows = shares(c.vocab, size)[rank]
    layers = tuple(replace(layer, kv_layer=layer.kv_layer - mine.start) for layer in c.layers[mine.start : mine.stop])
    tensors: dict[str, tuple[str, Cut]] = {}
    for name in present:
        found = _of_layers(c, name, mine, rank, rows, "output.weight" not in present)
        tensors |= {} if found is None else {found[0]: (name, found[1])}
    own = {i: range(c.layers[i].kv_heads) for i in mine if c.layers[i].kv_layer == i}
    part = Part(shard, c.vocab, rows, mine, {what: frozenset() for what in ("attention", "mlp", "experts")}, own)
    return PartPlan(replace(c, layers=layers), part, tensors)


def _of_layers(c: Config, name: str, mine: range, rank: int, rows: range, tied: bool) -> tuple[str, Cut] | None:
    """Return what a rank with the layers `mine` reads of a tensor, and its own name for it; None: nothing."""
    columns = _times(mine, c.ple)
    if name.startswith("blk."):
        _, i, rest = name.split(".", 2)
        return (f"blk.{int(i) - mine.start}.{rest}", Cut()) if int(i) in mine else None
    if name == "token_embd.weight" and rank > 0 and not c.ple:
        # The first rank embeds tokens; where layers take per-layer embeddings, all do. The head's rows are everybody's.
        return ("output.weight", Cut((rows,))) if tied else None
    cuts = {"output": Cut((rows,)), "per_layer_token_embd": Cut((), columns), "per_layer_model_proj": Cut((columns,))}
    return name, cuts.get(name.removesuffix(".weight"), Cut())


def stages(sizes: list[int], ranks: int, limit: int, unit: int = 1) -> list[range]:
    """Cut layers of so many bytes into ranges of about equal bytes, none empty.

    They end at multiples of `unit`; the last one begins at `limit` or before.
    """
    stop, found = len(sizes), list[range]()
    for left in range(ranks - 1, 0, -1):
        goal = sum(sizes[:stop]) * left / (left + 1)
        starts = range(left * unit, min(stop - 1, limit) + 1, unit)
        start = min(starts, key=lambda n: abs(sum(sizes[:n]) - goal))
        found.insert(0, range(start, stop))
        stop = start
    return [range(stop), *found]
