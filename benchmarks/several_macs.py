"""Projects tokens a second of several Macs from a model of step time, and checks the model's terms here.

    python benchmarks/several_macs.py             # the tables of docs/several-macs.md
    mlx.launch -n 2 --backend ring python benchmarks/several_macs.py --check [--model FILE.gguf]

In: shapes of published models in the types of a Q4_K_M file, memory bandwidth as Apple states it, links as published.
Out: tables. None of it is a measurement of a Mac. --check, on ranks: sums of several sizes beside `Link.sum_time`, what
steps and prompts of the published models exchange beside what the model takes for it, and sums of a step counted.
"""

from __future__ import annotations

import argparse
import sys
import time
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from mlx_gemma4.conversation.language_model import load
from mlx_gemma4.distributed.place import group_of, placed
from mlx_gemma4.distributed.split import (
    Link,
    Machine,
    Token,
    alone_time,
    gathering,
    layers_time,
    measure_link,
    tensor_time,
    token_of,
)
from mlx_gemma4.doctor.published import PUBLISHED
from mlx_gemma4.execution import execution, host_stream
from mlx_gemma4.loading.parts import plan_part
from mlx_gemma4.loading.tensors import Entry, Spec
from mlx_gemma4.shard import Shard

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import make_synthetic

REACHED = 0.8  # of the stated bandwidth, in a decode step: what 31B reaches where others have measured it
LAUNCH = 5e-6  # seconds; taken, not measured
MACHINES = {
    name: Machine(REACHED * gb * 1e9, LAUNCH) for name, gb in {"M3 Ultra": 819, "M4 Max": 546, "M5 Max": 614}.items()
}
HOP, MESH = 150e-6, 50e-6  # seconds of a message of a TCP ring over Thunderbolt, and of a sum over JACCL's mesh
LINKS = {"ring 10 Gb/s": 1.25e9, "ring 40 Gb/s": 5e9, "JACCL": 10e9}  # bytes/s in each direction
PROMPT = 128  # tokens, whose sums --check makes
SEEN = {"E2B": (177, 210), "E4B": (114, 134), "26B-A4B": (103, 125), "31B": (25.3, 28.3)}  # M5 Max: llama.cpp, mlx-lm


def entries(name: str) -> dict[str, Entry]:
    """The tensors of a published model in Q4_K_M."""
    found = {}
    for tensor, (shape, type) in make_synthetic.tensors(PUBLISHED[name]).items():
        _, size, n_bytes = make_synthetic.TYPES[type]
        found[tensor] = Entry(shape, type, prod(shape) // size * n_bytes, size > 1, block=size)
    return found


def token(name: str, context: int = 512) -> Token:
    sizes = {tensor: entry.n_bytes for tensor, entry in entries(name).items()}
    return token_of(make_synthetic.config_of(PUBLISHED[name]), sizes, context=context)


def link(name: str, ranks: int) -> Link:
    """A ring's sum passes 2 (n - 1) messages one after the other; a mesh's takes one."""
    return Link(MESH if name == "JACCL" else 2 * (ranks - 1) * HOP, LINKS[name])


def best(t: Token, machine: Machine, ranks: int, over: Link) -> str:
    times = {"T": tensor_time(t, machine, ranks, over), "L": layers_time(t, machine, ranks, over)}
    kind = min(times, key=lambda k: times[k])
    return f"{1 / times[kind]:.0f} {kind}"


def below(wanted: float, t: Token, machine: Machine, ranks: int, over: Link) -> float:
    """Latency of a sum, in seconds, at which a tensor split takes `wanted` seconds a token; negative: never."""
    return (wanted - tensor_time(t, machine, ranks, over._replace(latency=0))) / (t.sums + 1)


def even_context(name: str, machine: Machine, over: Link) -> str:
    """The context from which on two ranks beat one, in a tensor split."""
    longest = PUBLISHED[name].context
    for context in (n for n in (0, *(2**i for i in range(9, 18)), longest) if n <= longest):
        t = token(name, context)
        if tensor_time(t, machine, 2, over) < alone_time(t, machine):
            return f"{context:,}" if context else "any"
    return "none"


def tables() -> None:
    for name, machine in MACHINES.items():
        print(f"\n**{name}**, tokens/s behind 512 others\n")
        columns = [f"{n} x {over}" for n in (2, 4) for over in LINKS]
        print(f"| | one | {' | '.join(columns)} |\n|---|{'---|' * (1 + len(columns))}")
        for model in PUBLISHED:
            t = token(model)
            cells = [best(t, machine, n, link(over, n)) for n in (2, 4) for over in LINKS]
            print(f"| {model} | {1 / alone_time(t, machine):.0f} | {' | '.join(cells)} |")
    print(
        "\n**Break-even of two in a tensor split**: microseconds of a sum; context over a ring of 40 Gb/s, over JACCL\n"
    )
    print(f"| | {' | '.join(MACHINES)} |\n|---|{'---|' * len(MACHINES)}")
    for model in PUBLISHED:
        cells = []
        for machine in MACHINES.values():
            t, over = token(model), link("JACCL", 2)
            contexts = [even_context(model, machine, link(name, 2)) for name in ("ring 40 Gb/s", "JACCL")]
            cells.append(f"{below(alone_time(t, machine), t, machine, 2, over) * 1e6:.0f}; {'; '.join(contexts)}")
        print(f"| {model} | {' | '.join(cells)} |")
    print("\n**One M5 Max beside others' figures**, tokens/s: this model; llama.cpp; mlx-lm\n")
    for model, (llama, mlx) in SEEN.items():
        print(f"- {model}: {1 / alone_time(token(model), MACHINES['M5 Max']):.0f}; {llama}; {mlx}")
    print("\n**A rank's share of the bytes a token reads**, this model / the loader's plan\n")
    for model in PUBLISHED:
        print(f"- {model}: {', '.join(shares_of(model, ranks) for ranks in (2, 4))}")


def shares_of(model: str, ranks: int) -> str:
    """The largest rank's bytes of weights over the whole model's: as `tensor_time` takes them, and as they are cut."""
    held, config, t = entries(model), make_synthetic.config_of(PUBLISHED[model]), token(model)
    specs = {name: Spec(e.shape, "matrix" if len(e.shape) > 1 else "vector") for name, e in held.items()}
    parts = []
    for rank in range(ranks):
        sizes = {}
        for name, (of, cut) in plan_part(config, held, specs, Shard(rank, ranks)).tensors.items():
            sizes[name] = held[of].n_bytes * prod(cut.shape(held[of].shape)) // prod(held[of].shape)
        parts.append(token_of(config, sizes).weights)
    taken = (t.weights - t.replicated) / ranks + t.replicated
    return f"{ranks} ranks {taken / t.weights:.3f} / {max(parts) / t.weights:.3f}"


def exchanged(group: Any, numbers: int, sums: int, logits: int, rounds: int) -> tuple[float, float]:
    """Seconds of so many sums of fp32 numbers, one after the other, and of gathering logits: best, median."""
    times = []
    with execution():
        for _ in range(rounds + 1):
            x, own = mx.zeros(numbers), mx.zeros((1, logits)) if logits else None
            mx.eval(x, [] if own is None else own)
            start = time.perf_counter()
            for _ in range(sums):
                x = mx.distributed.all_sum(x, group=group, stream=host_stream())
            last = (
                x if own is None else mx.distributed.all_gather(mx.depends(own, x), group=group, stream=host_stream())
            )
            mx.eval(last)
            times.append(time.perf_counter() - start)
    return min(times[1:]), sorted(times[1:])[rounds // 2]


def check(path: str | None) -> None:
    place = placed()
    assert place, "run this under mlx.launch -n 2"
    group, show = group_of(place.backend), place.rank == 0
    link_here = measure_link(group)
    if show:
        print(f"link: {link_here}\n\n| bytes | measured, ms | usual, ms | taken, ms |\n|---|---|---|---|")
    for n_bytes in (1 << k for k in range(10, 25, 2)):
        best, usual = exchanged(group, n_bytes // 4, 1, 0, 30)
        taken = link_here.sum_time(n_bytes, place.size)
        if show:
            print(f"| {n_bytes:,} | {best * 1e3:.3f} | {usual * 1e3:.3f} | {taken * 1e3:.3f} |")
    for tokens, rounds in ((1, 20), (PROMPT, 3)):
        what = "a step of a tensor split" if tokens == 1 else f"{tokens} tokens of a prompt"
        if show:
            print(f"\n| {what} | sums | MB | measured, ms | usual, ms | taken, ms |\n|---|---|---|---|---|---|")
        for name in PUBLISHED:
            t = token(name)
            logits = t.vocab if tokens == 1 else 0  # a prompt's are wanted of its last token alone
            best, usual = exchanged(group, tokens * t.hidden, t.sums, logits // place.size, rounds)
            taken = t.sums * link_here.sum_time(4 * tokens * t.hidden, place.size)
            taken += gathering(t, place.size, link_here) if logits else 0
            n_bytes = 4 * (t.sums * tokens * t.hidden + logits)
            if show:
                times = " | ".join(f"{seconds * 1e3:.1f}" for seconds in (best, usual, taken))
                print(f"| {name} | {t.sums} | {n_bytes / 1e6:.1f} | {times} |")
    lm = load(path, shard=Shard(place.rank, place.size, "tensor", group))
    state, summed = lm.model.new_state(), mx.distributed.all_sum
    mx.eval(lm.model.forward(mx.array([2, 3]), state))
    calls: list[int] = []

    def counted(x: mx.array, **rest: Any) -> mx.array:
        calls.append(x.size)
        return summed(x, **rest)

    with patch.object(mx.distributed, "all_sum", counted):
        mx.eval(lm.model.forward(mx.array([4]), state))
    if show:
        layers = len(lm.config.layers)
        print(f"\nsums of a step of {layers} layers: {len(calls)}, at most {2 * layers + 1}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--model")
    options = parser.parse_args()
    check(options.model) if options.check else tables()
