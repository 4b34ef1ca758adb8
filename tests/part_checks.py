"""Run by test_ranks.py in each of several processes: a rank makes the same calls as the others, and rank 0 also alone.

MLX_RANK=0 MLX_HOSTFILE=hosts.json python part_checks.py RESULTS.json CHECK.. (rank 0 writes what it found)
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import make_synthetic
import mlx.core as mx
import numpy as np
from host_player import HostPlayer
from kernel_cases import metal
from kernel_models import Counting
from patient import wait_for_peers
from recorded import KINDS, kl, path, prompts

from mlx_gemma4 import Sampling, load
from mlx_gemma4.conversation.language_model import demo_path
from mlx_gemma4.doctor.published import PUBLISHED
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.loading.assistant import load_assistant
from mlx_gemma4.loading.loader import load_model, open_model
from mlx_gemma4.memory import Holding
from mlx_gemma4.model.exchange import SharedPart, sharing
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops import exchange_many
from mlx_gemma4.ops.dispatch import ALL, Kernels
from mlx_gemma4.ops.op import OpKey
from mlx_gemma4.ops.sample import Draw
from mlx_gemma4.shard import Kind, Part, Shard

Found = dict[str, Any]
SPLITS: tuple[Kind, ...] = ("tensor", "layers")
ASSISTANTS = path("12b", "f32", Path()).parent / "assistants"
PROMPTS: list[list[int]] = json.loads((ASSISTANTS / "recorded.json").read_text())["prompts"]
DEMO_PROMPT = "Once upon a time there was a king who had"
SMALL = ("embed", "ple_inputs", "rotations", "qkv_post", "attention", "add_norm", "top_k", "matvec", "dense", "expand")
UNPACKED = frozenset([OpKey("expand")])  # tiles of a prompt round to fp16
exchange_many.GROUPS, exchange_many.THREADS = 4, 64  # as few as small models' rows need

mx.set_default_device(mx.cpu)
group = mx.distributed.init(strict=True, backend="ring")
wait_for_peers()
RANK, SIZE = group.rank(), group.size()
del os.environ["MLX_RANK"]  # so that `load` without a shard loads the whole model, as one process does
collectives: Counter[str] = Counter()
numbers = count()


def counted(name: str) -> Callable[..., mx.array]:
    real = getattr(mx.distributed, name)

    def call(*args: Any, **kwargs: Any) -> mx.array:
        collectives[name] += 1
        return real(*args, **kwargs)

    return call


for each in ("all_sum", "all_gather", "send", "recv"):
    setattr(mx.distributed, each, counted(each))


def model_of(file: Path | None, split: Kind | None, weights: Holding | Literal["auto"] = "auto") -> Model:
    shard = Shard(RANK, SIZE, split, group) if split else None
    if file is None:
        return load(shard=shard).model
    with open_model(file) as (config, source, _):  # synthetic ones have no tokenizer
        return load_model(config, source, weights, shard=shard)[0]


def compared(
    file: Path | None, calls: Callable[[Model], list[mx.array]], splits: tuple[Kind, ...] = SPLITS, **options: Any
) -> Found:
    """The distance of a model's logits on all ranks together from those of one process."""
    return distances(lambda shard: calls(model_of(file, shard and shard.kind, **options)), splits)


def alone(do: Callable[[], Any]) -> Any:
    """What rank 0 makes by itself. The others sleep: who waits in a collective of the ring's keeps a core busy."""
    done, made = Path(sys.argv[1]).with_name(f"alone-{next(numbers)}"), None
    if RANK == 0:
        made = do()
        done.touch()
    while not done.exists():
        time.sleep(0.02)
    return made


def distances(calls: Callable[[Shard | None], list[mx.array]], splits: tuple[Kind, ...] = SPLITS) -> Found:
    """The distance of logits that are made on all ranks together from those of one process."""
    want = alone(lambda: [np.array(a) for a in calls(None)]) or []
    found: Found = {}
    for split in splits:
        got = [np.array(a) for a in calls(Shard(RANK, SIZE, split, group))]
        if RANK == 0:
            pairs = [(w.reshape(-1, w.shape[-1]), g.reshape(-1, g.shape[-1])) for w, g in zip(want, got, strict=True)]
            found[split] = {
                "worst": max(float(np.abs(w - g).max()) for w, g in pairs),
                "kl": max(kl(w, g) for w, g in pairs),
                "rows": sum(len(w) for w, _ in pairs),
            }
    return found


def conversation(model: Model, ids: list[int], kv: str = "full") -> list[mx.array]:
    """A prompt past all windows, steps, a fork, a rewind, drafts, and a batch of both states."""
    state = model.new_state(kv=kv)
    model.prefill(mx.array(ids[:10]), state)
    logits = [model.forward(mx.array(ids[10:]), state, all_logits=True)]
    logits += [model.step(t, state).logits() for t in (5, 6, 7)]
    other = state.fork()
    logits += [model.forward(mx.array([9, 8, 7]), other), model.step(11, state).logits()]
    other.rewind(len(ids) + 2)
    logits += [model.batch_step([12, 13], [state, other]), model.step(3, other).logits()]
    model.prefill(mx.array([4]), other)
    return [*logits, model.forward(mx.array([1, 2]), other, all_logits=True), model.check([6, 5, 4], state)[0]]


def fixtures() -> Found:
    return {k: compared(path(k, "f32", Path()), lambda m, k=k: conversation(m, prompts(k)[2])) for k in KINDS}


def assistants() -> Found:
    """Logits of two drafts' steps, each over keys and values that ranks have apart; and the tokens that are drafted."""
    found: Found = {}
    for kind in ("e2b", "12b", "26b-a4b", "31b"):
        folder, tokens = ASSISTANTS / kind, list[list[int]]()
        splits = SPLITS[: 1 + (kind != "e2b" and SIZE == 2)]  # its first layers' keys are all that there are

        def calls(shard: Shard | None, folder: Path = folder, tokens: list[list[int]] = tokens) -> list[mx.array]:
            with open_model(folder / "target") as (config, source, _):
                target, _ = load_model(config, source, shard=shard)
            a, ids = load_assistant(folder / "assistant", target, config), PROMPTS[-1]
            state = target.new_state()
            target.prefill(mx.array(ids[:-2]), state)
            hidden = target.check(ids[-2:-1], state)[1][0]
            tokens.append(a.start(ids[-1], state, hidden, 3).tolist())
            logits, attend, token, row = [], a.attention(a.inputs(state)), mx.array([ids[-1]], mx.int32), hidden[None]
            for _ in range(2):
                h = a.step(a.run, token, row, attend)
                logits.append(a.scores(a.run, h))
                mx.eval(logits)
                token, row = mx.array([9]), a.run.product(h, a.weights.post_projection)
            return logits

        found[kind] = distances(calls, splits)
        found[f"{kind} tokens"] = tokens
    return found


def drafted(kernels: Kernels | None, split: Kind | None) -> list[list[int]]:
    """What the built-in assistant drafts at two places, of packed weights; at the second it draws, where steps aren't
    traced: references draw on the host."""
    with open_model(demo_path()) as (config, source, _):
        model, _ = load_model(config, source, "packed", shard=Shard(RANK, SIZE, split, group) if split else None)
        model = Model(model.config, model.weights, kernels, part=model.part)
        a = load_assistant(demo_path().with_name("mtp-gemma4-demo.gguf"), model, config)
    state, found = model.new_state(), list[list[int]]()
    for n in range(2):
        ids = [*range(9 * n + 300, 9 * n + 309)]
        model.prefill(mx.array(ids[:-1]), state)
        hidden = model.check(ids[-1:], state)[1][0]
        draws = [] if kernels and kernels.traced else [Draw(0.8, 20, 0.95, seed=n)] * n
        found.append(a.draft(ids, state, hidden, 3, draws))
    return found


def few() -> Found:
    """For many ranks: with fewer KV heads than ranks, and too few layers before those that share keys for a fifth."""
    return {k: compared(path(k, "f32", Path()), lambda m, k=k: conversation(m, prompts(k)[1])) for k in ("e2b", "31b")}


def quantized() -> Found:
    """Blocks: some layers of these are whole on each rank. E2B's layers share keys and values from the first on."""
    names = [*(f"{kind}-ud" for kind in KINDS), "12b-q4_0", "31b-q8_0", "12b-untied-q4_k_m", "26b-a4b-split-mix"]
    files = {name: SPLITS[: 1 + (name != "e2b-ud")] for name in names}
    here = path("12b", "f32", Path()).parent
    return {
        name: compared(here / f"{name}.gguf", lambda m: conversation(m, [*range(60, 100)]), splits)
        for name, splits in files.items()
    }


def folders() -> Found:
    here = path("12b", "f32", Path()).parent / "folders"
    files = ("26b-a4b-bf16", "26b-a4b-mlx4", "gemma3-mlx4")
    return {name: compared(here / name, lambda m: conversation(m, [*range(60, 100)])) for name in files}


def synthetic(folder: Path, name: str) -> Path:
    """A model with the heads, experts and types of a published one, and few layers, numbers and tokens."""
    if RANK == 0:
        shape = replace(PUBLISHED[name], layers=4, hidden=256, vocab=1001, every=2, window=32)
        shape = replace(shape, shared=1 if shape.shared else 0, experts=min(shape.experts, 8), experts_used=2)
        PUBLISHED[name] = replace(shape, ffn=min(shape.ffn, 768), heads=min(shape.heads, 16))
        make_synthetic.write(name, folder / f"{name}.gguf")
    mx.eval(mx.distributed.all_sum(mx.ones(1), group=group))  # until it is written
    return folder / f"{name}.gguf"


def weight_bytes(model: Model) -> dict[str, int]:
    """Bytes of arrays by name; a slice of another counts nothing."""
    held = {f.name: getattr(model.weights, f.name) for f in fields(model.weights) if f.name != "layers"}
    first = model.part.layers.start if model.part else 0
    for i, layer in enumerate(model.weights.layers, first):
        held |= {f"{i}.{f.name}": getattr(layer, f.name) for f in fields(layer)}
    if held["output"].nbytes < held["token_embd"].nbytes or held["output"] is held["token_embd"]:
        del held["output"]
    return {name: w.nbytes for name, w in held.items() if w is not None}


def memory(folder: Path) -> Found:
    """Bytes of weights and of a state on each rank, and alone, by array name, held packed; and logits, held dense."""
    found: Found = {}
    for name in PUBLISHED:
        file = synthetic(folder, name)
        for split in (None, *SPLITS):
            model = model_of(file, split, "packed")
            mine = {"weights": weight_bytes(model), "state": model.new_state().nbytes}
            found |= {f"{name} {split}": others(mine)} if split else {name: mine}
        found[f"{name} logits"] = compared(file, lambda m: conversation(m, [*range(60, 100)]), SPLITS[:1])
    return found


def others(mine: Found) -> list[Found]:
    """What each rank gives, in their order."""
    raw = np.frombuffer(json.dumps(mine).encode().ljust(1 << 16), np.uint8)
    rows = mx.distributed.all_gather(mx.array(raw)[None], group=group)
    return [json.loads(np.array(row).tobytes()) for row in rows]


def demo() -> Found:
    """500 tokens, greedy, of the built-in model, and 60 drawn; and a long prompt to a state in 4 bits."""
    ids = load().encode_prompt(DEMO_PROMPT, raw=True)
    found: Found = {}
    for n, sampling in ((500, Sampling(temperature=0)), (60, Sampling(top_k=40, top_p=0.95, seed=7))):
        for split in (None, *SPLITS):

            def reply(n: int = n, sampling: Sampling = sampling, split: Kind | None = split) -> Found:
                model = model_of(None, split)
                state = model.new_state()
                tokens = [t.id for t in generate_tokens(model, state, ids, sampling, n)]
                return {"tokens": tokens, "held": state.tokens}

            found[f"{split} {sampling.temperature}"] = reply() if split else alone(reply)
    found["tq4"] = compared(None, lambda m: conversation(m, ids * 40, "tq4"))
    return found


def long() -> Found:
    """A prompt past 4,096 tokens, in chunks, and steps behind it."""

    def calls(model: Model) -> list[mx.array]:
        state, ids = model.new_state(), np.random.default_rng(0).integers(10, 300, 4500)
        for start in range(0, 4096, 1024):
            model.prefill(mx.array(ids[start : start + 1024]), state)
        logits = [model.forward(mx.array(ids[4096:]), state)]
        return [*logits, *(model.step(int(t), state).logits() for t in ids[:3])]

    return compared(path("gemma3", "q8_0", Path()), calls)


def traced() -> Found:
    """Steps of two states in turns, traced once, collectives included: all operations as references."""
    off, found = frozenset([*map(OpKey, SMALL)]), Found()
    for split in SPLITS:
        found[f"drafted {split}"] = drafted(Kernels(metal, off, traced=True), split)
    for kind, splits in (("12b", SPLITS), ("26b-a4b", SPLITS), ("e2b", SPLITS[:1])):

        def calls(model: Model) -> list[mx.array]:
            if model.part:
                kernels = Kernels(metal, frozenset([*map(OpKey, SMALL)]), traced=True)
                model = Model(model.config, model.weights, kernels, part=model.part)
            states = [model.new_state(), model.new_state()]
            return [model.step(i % 50 + 60, states[i % 2]).logits() for i in range(20)]

        found[kind] = compared(path(kind, "q8_0", Path()), calls, splits, weights="packed")
    return found


def fused(m: Model, launcher: Any = metal) -> Model:
    return Model(m.config, m.weights, Kernels(launcher, UNPACKED), part=m.part)


def kernels(folder: Path) -> Found:
    """Steps in kernels on the simulator, beside stock operations alone; launches and collectives of one step."""
    found = Found(drafted=alone(lambda: drafted(None, None)))
    for split in SPLITS:
        found[f"drafted {split}"] = drafted(Kernels(metal, UNPACKED), split)
    for name in ("26B-A4B", "E2B"):
        file = synthetic(folder, name)

        def calls(model: Model) -> list[mx.array]:
            model = fused(model) if model.part else model
            state = model.new_state()
            logits = [model.step(t, state).logits() for t in (60, 70, 80)]
            return [*logits, model.batch_step([90, 95], [state, state.fork()])]

        found[f"{name} logits"] = compared(file, calls, weights="packed")
        for split in (None, *SPLITS):
            launcher = Counting()
            model = fused(model_of(file, split, "packed"), launcher)
            state, before = model.new_state(), collectives.copy()
            step = model.step(60, state)
            made = dict(collectives - before)
            step.token()
            counts = {"launches": launcher.launches, "made": made, "drawn": dict(collectives - before)}
            found[f"{name} {split}"] = others({**counts, "layers": len(model.config.layers)})
    return found


def replayed() -> Found:
    """Recorded steps, alone and in a batch, whose sums the ranks exchange over memory that they share."""
    found: Found = {}
    for kind, tag in (("12b", "q8_0"), ("26b-a4b", "q8_0"), ("31b", "q4_k_m"), ("e2b", "q8_0"), ("gemma3", "q8_0")):
        players = len(HostPlayer.made)

        def calls(model: Model) -> list[mx.array]:
            state = model.new_state()
            model.prefill(mx.array([*range(60, 70)]), state)
            if model.part:
                kernels = Kernels(metal, UNPACKED, player=HostPlayer)
                model = Model(model.config, model.weights, kernels, part=model.part)
            logits = [model.step(t, state).logits() for t in (70, 71)]
            first = model.step(72, state)
            second = model.step(first, state, Draw(0.8, 20, seed=5))
            logits += [second.logits(), model.step(second.token(), state).logits()]
            states = [state, state.fork()]
            step = model.batch([80, 81], states)
            logits += [model.batch(step, states).logits()]
            return [*logits, model.step(82, states[1]).logits()]

        found[kind] = compared(path(kind, tag, Path()), calls, SPLITS[:1], weights="packed")
        made = [player for player in HostPlayer.made[players:] if player.loads]
        found[kind]["players"] = others({"steps": [len(player.tokens) for player in made]})
    return found


def shared() -> Found:
    """Prompts in two chunks and launched steps, whose sums the ranks exchange over memory that they share."""
    found: Found = {}
    for kind in ("12b", "26b-a4b", "e2b"):
        launcher = Counting()

        def calls(model: Model, launcher: Counting = launcher) -> list[mx.array]:
            if part := model.part:
                kernels = Kernels(launcher, frozenset([ALL]), player=HostPlayer)  # else the ranks' products are rounded
                model = Model(model.config, model.weights, kernels, part=part)
                launcher.launches.clear()
                split = part.split
                launcher.launches["sums"] = 1 + len(split["attention"]) + len(split["mlp"] | split["experts"])
            before, state = collectives["all_sum"], model.new_state()
            model.prefill(mx.array([*range(60, 79)]), state)
            logits = [model.forward(mx.array([*range(79, 100)]), state, all_logits=True)]
            logits += [model.step(t, state, replay=False).logits() for t in (70, 71)]
            launcher.launches["all_sum"] = collectives["all_sum"] - before
            return logits

        found[kind] = compared(path(kind, "q8_0", Path()), calls, SPLITS[:1], weights="packed")
        found[kind]["launches"] = others(dict(launcher.launches))
    return found


def sums() -> Found:
    """Sums of many rows over memory that ranks share, beside MLX's, and how many are not alike on all."""
    part = Part(Shard(RANK, SIZE, "tensor", group), 1000, range(500), range(1))
    ours = sharing(part, Kernels(metal, frozenset([ALL]), player=HostPlayer))
    assert isinstance(ours, SharedPart)
    found: Found = {"worst": 0.0, "unlike": 0, "sums": 0}
    for rows, widths in ((1, (8,)), (3, (100, 36)), (1000, (36,)), (3, (7,)), (3, (30, 3)), (2, (4,))):
        chance = np.random.default_rng(RANK)
        arrays = [mx.array(chance.standard_normal((rows, width), np.float32)) for width in widths]
        for made, want in zip(ours.sums(*arrays), part.sums(*arrays), strict=True):
            everywhere = mx.distributed.all_gather(made[None], group=group)
            found["worst"] = max(found["worst"], mx.abs(made - want).max().item())
            found["unlike"] += sum(not mx.array_equal(made, other).item() for other in everywhere)
            found["sums"] += 1
    return found


def main(out: str, *checks: str) -> None:
    folder = Path(out).parent
    found: Found = {}
    for check in checks:
        given = (folder,) if check in ("memory", "kernels") else ()
        found[check] = globals()[check](*given)
    if RANK == 0:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
