"""One model in several processes: which part of it this one holds, and what they exchange in a forward pass.

In: a group of MLX's distributed engine. Out: sums, logits of the whole vocabulary, a residual handed on. Every rank
makes the same calls on its own `Model` in the same order; that is what puts collectives in one order on all of them.
Knows no weights. docs/several-macs.md says what is split and how.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Literal, cast

import mlx.core as mx

from .execution import host_stream
from .memory import on_cpu

Kind = Literal["tensor", "layers"]
counted = [0]  # collectives of this process


@dataclass(frozen=True)
class Shard:
    """One of `size` processes that run a model together."""

    rank: int
    size: int
    kind: Kind = "tensor"  # each layer in parts, of heads and widths; or so many layers for each rank
    group: Any = field(default=None, repr=False, compare=False)  # mx.distributed.Group; None: the process's first one


def shares(n: int, parts: int, turn: int = 0) -> list[range]:
    """Return 0..n cut into `parts` ranges whose lengths differ by 1 at most; `turn` moves the longer ones on."""
    lengths = [n * (i + 1) // parts - n * i // parts for i in range(parts)]
    return [range(a, b) for a, b in pairwise([0, *accumulate(lengths[(i + turn) % parts] for i in range(parts))])]


@dataclass(frozen=True)
class Part:
    """What a rank holds of a model, and the collectives of its forward pass. Arrays are lazy."""

    shard: Shard
    vocab: int  # of the model
    rows: range  # of the head that are here; with kind "tensor" of tables of embeddings too
    layers: range  # of the model's that are here
    # By "attention", "mlp" and "experts": the layers here whose products are in parts, to be summed over ranks.
    split: Mapping[str, frozenset[int]] = field(default_factory=dict)
    # By layer of the model with keys of its own: the KV heads here that no rank before has. Only they draft from them.
    kv_heads: Mapping[int, range] = field(default_factory=dict)

    @property
    def records(self) -> bool:
        """True if steps may be recorded: they add up over ranks, and hand nothing on."""
        return self.shard.kind == "tensor"

    @property
    def receives(self) -> bool:
        """True if the residual comes from the rank before."""
        return self.shard.kind == "layers" and self.shard.rank > 0

    @property
    def sends(self) -> bool:
        """True if the residual goes on to the next rank."""
        return self.shard.kind == "layers" and self.shard.rank < self.shard.size - 1

    def sums(self, *arrays: mx.array) -> list[mx.array]:
        """Return the sums over all ranks of arrays [T, any], in one collective."""
        joined = mx.concatenate([*arrays], axis=-1)
        total = mx.distributed.all_sum(joined, group=self.shard.group, stream=collective_stream())
        stops = [0, *accumulate(a.shape[-1] for a in arrays)]
        return [total[..., start:stop] for start, stop in pairwise(stops)]

    def sums_with_experts(self, x: mx.array, outputs: mx.array, share: mx.array) -> list[mx.array]:
        """Return the sums of x [T, K] and of experts' outputs [T, used, K] times their shares [T, used], as `sums`."""
        return self.sums(x, (share[:, None] @ outputs).squeeze(1))

    def agreed(self, ok: bool) -> bool:
        """Return True if it is so on all ranks."""
        everywhere = mx.distributed.all_min(
            mx.array([ok], mx.int32), group=self.shard.group, stream=collective_stream()
        )
        return bool(everywhere.item())

    def everyones(self, numbers: Sequence[int]) -> list[list[int]]:
        """Return the numbers, of 32 bits, of each rank."""
        return cast("list[list[int]]", self._all(mx.array([*numbers], mx.int32)).tolist())

    def gathered(self, logits: mx.array) -> mx.array:
        """Return logits of the whole vocabulary, [T, vocab], of those here, [T, rows]: the same on each rank."""
        all_rows = shares(self.vocab, self.shard.size)
        most = max(map(len, all_rows))
        padded = mx.pad(logits, [(0, 0), (0, most - logits.shape[-1])])
        by_rank = self._all(padded)
        return mx.concatenate([by_rank[i, :, : len(rows)] for i, rows in enumerate(all_rows)], axis=-1)

    def likeliest(self, logits: mx.array) -> mx.array:
        """Return the likeliest token of each row, the lowest of equals, int32 [T], of the logits here, [T, rows]."""
        best = mx.argmax(logits, axis=-1, keepdims=True)
        found = [mx.take_along_axis(logits, best, axis=-1), (best + self.rows.start).astype(mx.float32)]
        by_rank = self._all(mx.concatenate(found, axis=-1))  # ids are below 2^24: exact
        winner = mx.argmax(by_rank[..., 0], axis=0)  # the lowest rank of equals, whose rows come first
        return mx.take_along_axis(by_rank[..., 1], winner[None], axis=0)[0].astype(mx.int32)

    def _all(self, x: mx.array) -> mx.array:
        """Return x of each rank, [ranks, *x.shape]."""
        return mx.distributed.all_gather(x[None], group=self.shard.group, stream=collective_stream())

    def receive(self, tokens: int, hidden: int) -> mx.array:
        """Return the residual after the layers of the rank before, fp32 [T, hidden]."""
        shape, source = (tokens, hidden), self.shard.rank - 1
        return mx.distributed.recv(shape, mx.float32, source, group=self.shard.group, stream=collective_stream())

    def hand_on(self, x: mx.array) -> mx.array:
        """Return the residual x, fp32 [T, hidden]; evaluated, it goes to the next rank."""
        return mx.distributed.send(x, self.shard.rank + 1, group=self.shard.group, stream=collective_stream())

    def of_last(self, x: mx.array, sent: mx.array | None = None) -> mx.array:
        """Return x [T, hidden] of the last rank; `sent`: what another has handed on, after which it adds nothing."""
        return self.sums(x if sent is None else mx.depends(mx.zeros_like(x), sent))[0]


def collective_stream() -> Any:
    """Return where a collective runs: on the CPU, all on one stream, so in the order in which they are scheduled; with
    NCCL on the GPU. To be asked once for each."""
    counted[0] += 1
    return host_stream() if on_cpu() or mx.metal.is_available() else None
