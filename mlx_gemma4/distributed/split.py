"""How a model is split over ranks: what a token costs either way, by a model of step time, on a link that is measured.

In: bytes, counts of launches and sums, the link and the memory's speed. Out: seconds a token, and the better split.
docs/several-macs.md has the model's terms, and what it makes of published machines (benchmarks/several_macs.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import mlx.core as mx

from ..config import Config
from ..execution import execution
from ..memory import on_cpu
from ..model.costs import kv_per_token, weights_per_token
from ..shard import Kind, collective_stream

LAUNCHES, MORE_LAUNCHES = 8, 4  # of a layer's decode step; more with experts or per-layer embeddings
REPLICATED = ("norm", "scale", "ffn_gate_inp", "inp_gate", ".proj.", "per_layer_model_proj")  # in names of tensors


class Token(NamedTuple):
    """What one decoded token takes of one machine that has the whole model."""

    weights: int  # bytes read
    replicated: int  # of them, bytes that each rank of a tensor split reads
    head: int  # of them, the head's, which every split shares
    kv: int  # bytes of keys and values read
    kv_heads: int  # in the layers that keep most of those: no more ranks share them
    launches: int
    layers: int
    hidden: int
    vocab: int

    @property
    def sums(self) -> int:
        """Sums of a tensor split: two a layer, and the embedding's."""
        return 2 * self.layers + 1


class Machine(NamedTuple):
    """What a rank runs on."""

    bandwidth: float  # of its memory, bytes/s, as decode steps reach it
    launch: float  # seconds


class Link(NamedTuple):
    """What joins the ranks."""

    latency: float  # seconds of a sum of a few bytes over all ranks, seen from the call
    bandwidth: float  # bytes/s in each direction

    def sum_time(self, n_bytes: int, ranks: int) -> float:
        """Seconds of a sum over all ranks, as a ring makes it: each byte is sent 2 (n - 1) / n times."""
        return self.latency + 2 * (ranks - 1) / ranks * n_bytes / self.bandwidth

    def __str__(self) -> str:
        return f"{self.latency * 1e3:.3g} ms a sum, {self.bandwidth / 1e9:.3g} GB/s"


def token_of(config: Config, sizes: Mapping[str, int], kv: str = "full", context: int = 512) -> Token:
    """Return what a token behind `context` others takes; sizes: bytes of each tensor, by its GGUF name."""
    layers = len(config.layers)
    wide = [layer.kv_heads for layer in config.layers if not layer.sliding]
    return Token(
        weights_per_token(config, sizes),
        sum(n for name, n in sizes.items() if any(part in name for part in REPLICATED)),
        sizes.get("output.weight", sizes.get("token_embd.weight", 0)),
        kv_per_token(config, kv, context, mx.float16),
        min(wide or [layer.kv_heads for layer in config.layers]),
        layers * (LAUNCHES + MORE_LAUNCHES * (bool(config.experts) + bool(config.ple))),
        layers,
        config.hidden,
        config.vocab,
    )


def alone_time(token: Token, machine: Machine) -> float:
    """Seconds of a token on one machine."""
    return (token.weights + token.kv) / machine.bandwidth + token.launches * machine.launch


def tensor_time(token: Token, machine: Machine, ranks: int, link: Link) -> float:
    """Seconds of a token where each layer is in parts: bytes are shared, sums are added."""
    read = (token.weights - token.replicated) / ranks + token.replicated + token.kv / min(ranks, token.kv_heads)
    sums = token.sums * link.sum_time(4 * token.hidden, ranks) + gathering(token, ranks, link)
    return read / machine.bandwidth + token.launches * machine.launch + sums


def gathering(token: Token, ranks: int, link: Link) -> float:
    """Seconds in which all ranks get all logits, of which each has its rows."""
    return link.latency + 4 * token.vocab * (ranks - 1) / ranks / link.bandwidth


def layers_time(token: Token, machine: Machine, ranks: int, link: Link) -> float:
    """Seconds of a token where each rank has some of the layers: one after the other, with a message between.

    A message takes the 2 (n - 1)th part of a sum's latency, as in a ring. The last residual goes to all by a sum.
    """
    shared = token.head * (ranks - 1) / ranks / machine.bandwidth
    residual = 4 * token.hidden
    links = link.latency / 2 + (ranks - 1) * residual / link.bandwidth + link.sum_time(residual, ranks)
    return alone_time(token, machine) - shared + links + gathering(token, ranks, link)


def choose(token: Token, machine: Machine, ranks: int, link: Link) -> tuple[list[Kind], str]:
    """Return the splits, the faster one first, and a line that says what is expected of either."""
    ways: dict[Kind, Callable[..., float]] = {"tensor": tensor_time, "layers": layers_time}
    times = {kind: way(token, machine, ranks, link) for kind, way in ways.items()}
    kinds = sorted(times, key=lambda kind: times[kind])
    expected = ", ".join(f"{kind} {seconds * 1e3:.1f}" for kind, seconds in times.items())
    return kinds, (
        f"{ranks} ranks, {link}, {machine.bandwidth / 1e9:.0f} GB/s of memory: --split {kinds[0]}. Expected, in ms a "
        f"token: {expected}, one machine alone {alone_time(token, machine) * 1e3:.1f}"
    )


def measure_link(group: mx.distributed.Group) -> Link:
    """Measure sums over all ranks, which all measure together: the same everywhere."""

    def seconds(n_bytes: int, rounds: int) -> float:
        x = mx.zeros(n_bytes // 4)
        return _best_time(lambda: mx.distributed.all_sum(x, group=group, stream=collective_stream()), rounds)

    small, large, n = 256, 512 << 10, group.size()  # the large one: as what a step gathers
    with execution():
        both = mx.array([seconds(small, 50), seconds(large, 20)]) / n
        both = mx.distributed.all_sum(both, group=group, stream=collective_stream())
        latency, whole = cast("list[float]", both.tolist())
    return Link(latency, 2 * (n - 1) / n * large / max(whole - latency, 1e-9))


def measure_machine() -> Machine:
    """Measure this machine's memory: a sum over 64 MB. A launch is taken for 5 us on a GPU, 20 on a CPU."""
    with execution():
        x = mx.ones(16 << 20)
        seconds = _best_time(lambda: x.sum(), 5)
    return Machine(x.nbytes / seconds, 20e-6 if on_cpu() else 5e-6)


def _best_time(make: Callable[[], mx.array], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        mx.eval(make())
        times.append(time.perf_counter() - start)
    return min(times[1:])  # the first one warms up; what else runs here is not the link's
