"""Measures a model on two GPUs of this machine beside one, over NCCL, and holds its tokens to those of one.

    python benchmarks/two_gpus.py [FILE.gguf ..] [--json OUT.json] [--parts sums,equal,led,one,two] [--limit 60]

Starts its ranks itself, each part of the work in processes of its own with a time limit. Parts: `sums`, what a sum
over ranks takes by MLX over NCCL, by kernels over shared memory, and in a recorded step; `equal`, greedy tokens of the
built-in model and of the tests' fixtures, whole and in two parts, behind a short prompt and one of several chunks;
`led`, `generate` as `mlx.launch` starts it; and for each FILE `one` and `two` GPUs: prompts, and decoding behind them.
`profile` shows where a step's time goes (with PyTorch), `drift` if ranks have the same residual all through a long
prompt. The exit code is 1 where tokens differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

import mlx_gemma4
from mlx_gemma4.distributed import team
from mlx_gemma4.distributed.hosts import free_port, read_hosts
from mlx_gemma4.distributed.place import group_of, placed
from mlx_gemma4.doctor.ready import make_ready
from mlx_gemma4.doctor.verdict import MLX, device_name, usable_kernels
from mlx_gemma4.execution import execution
from mlx_gemma4.generation.decoding import Statistics
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.generation.sampling import Sampling
from mlx_gemma4.gpu.recording import Arena, Recording, recorded, recorder
from mlx_gemma4.loading.loader import load_model, open_model
from mlx_gemma4.measure.bench import random_ids, size_label, warm_until_steady
from mlx_gemma4.memory import on_cpu
from mlx_gemma4.model import forward
from mlx_gemma4.model.exchange import Exchange, SharedPart, sharing
from mlx_gemma4.model.forward import run_layers
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops import exchange_many
from mlx_gemma4.ops.exchange import exchange_sum
from mlx_gemma4.shard import Part, Shard, collective_stream

GREEDY = Sampling(temperature=0)
HERE = "127.0.0.1"
ROOT = Path(__file__).parents[1]
FIXTURES = [f"{kind}-q8_0" for kind in ("e2b", "e4b", "12b", "26b-a4b", "31b", "gemma3")]
TOKENS = 200  # that are compared
LONG, FEW, CHUNK = 1500, 32, 256  # the longer prompt of `equal`, at most; its reply; small models' chunk
REPLY, ROUNDS = 96, 3  # tokens of a reply that is timed; replies, of which the first warms up; prompts that are timed
SUMS = 120  # of a step of 60 layers
TOLD = "TWO_GPUS "  # before a line of results


# ---- in a rank


def shard_here() -> tuple[Shard, mx.distributed.Group]:
    place = placed()
    assert place, "this part runs in ranks"
    group = group_of(place.backend)
    return Shard(place.rank, place.size, "tensor", group), group


def model_of(path: Path | None, shard: Shard | None) -> Model:
    if path is None:
        return mlx_gemma4.load(shard=shard, draft=None, mmproj=None).model
    with open_model(path) as (config, source, _):  # synthetic ones have no tokenizer
        model, _ = load_model(config, source, kernels=usable_kernels(), shard=shard)
    make_ready(model)
    return model


def sums() -> Any:
    """Microseconds of sums: one alone, in a chain that is evaluated as a whole, and in one that runs as it is built; by
    MLX, and by kernels of some numbers of threads over shared memory. In a recorded step, with nothing between them."""
    shard, _ = shard_here()
    found: dict[str, Any] = {}
    part = Part(shard, 1000, range(500), range(1))
    kernels = usable_kernels()
    sizes = [(1, 5376), (512, 5376), (1024, 2816), (1024, 3840), (1024, 5376)]
    found |= {f"mlx, {rows} x {width}": timed_sums(part, rows, width) for rows, width in sizes}
    if kernels is None or kernels.player is None:
        return found
    table, usual = sizes, (exchange_many.GROUPS, exchange_many.THREADS)
    for way in (usual, (32, 1024), (64, 512), (128, 512), (128, 1024)):
        exchange_many.GROUPS, exchange_many.THREADS = way
        ours = sharing(part, kernels)
        name = f"kernel of {way[0]} x {way[1]}"
        if not isinstance(ours, SharedPart):
            found[name] = "ranks sum by MLX"
            continue
        for rows, width in table:
            found[f"{name}, {rows} x {width}"] = timed_sums(ours, rows, width)
        found[f"{name}, 1024 x 5376 fp16"] = timed_sums(ours, 1024, 5376, mx.float16)
        table = sizes[-2:]
    exchange_many.GROUPS, exchange_many.THREADS = usual
    for rows in (1, 8):
        with execution():
            found[f"recorded, {rows} rows"] = recorded_sums(part, kernels.player(), rows)
    return found


def timed_sums(part: Part, rows: int, width: int, dtype: mx.Dtype = mx.float32) -> Any:
    """`sums` of [rows, width], where rank r has r + 1 everywhere, and if they are right."""
    x = mx.full((rows, width), 1 + part.shard.rank, dtype)
    rounds = SUMS if rows == 1 else 40
    times: dict[str, list[float]] = {"alone_us": [], "chained_us": [], "running_us": []}
    with execution():
        mx.eval(x)
        (made,) = part.sums(x)
        right = bool(mx.array_equal(made, mx.full((rows, width), 3, dtype)).item())
        for _ in range(10):
            part.agreed(True)  # all begin together
            start = time.perf_counter()
            mx.eval(part.sums(x))
            times["alone_us"].append(time.perf_counter() - start)
        for name, run in (("chained_us", lambda _: None), ("running_us", mx.async_eval)):
            for _ in range(5):
                part.agreed(True)
                start, y = time.perf_counter(), x
                for _ in range(rounds):
                    (y,) = part.sums(y * 0.5)
                    run(y)
                mx.eval(y)
                times[name].append((time.perf_counter() - start) / rounds)
    return {"right": right, **{name: round(min(some) * 1e6, 1) for name, some in times.items()}}


def recorded_sums(part: Part, player: Any, rows: int) -> Any:
    """Microseconds of each of SUMS sums of a recorded step, and if they are right."""
    exchange = Exchange.of(part, player, rows * 5376, SUMS)
    recording = Recording(Arena())
    flags, result = recording.buffer((SUMS,), mx.int32), recording.buffer((rows, 5376), mx.float32)
    first = result
    with recorded(recording):
        for i in range(SUMS):
            result = exchange_sum(recorder, result, flags[i : i + 1], exchange.boxes, result if i else None)
    player.load(recording.launches, recording.arena.nbytes, SUMS, flags[:1].region)
    player.write([first.region], [mx.full((rows, 5376), 2.0**-100) * (1 + part.shard.rank)])
    exchange.used, times = SUMS, []
    for n in range(8):
        part.agreed(True)  # all begin together
        start = time.perf_counter()
        player.start(exchange.next_flags(), False)
        player.wait()
        times.append(time.perf_counter() - start)
        if n == 0:  # each sum doubles all but the first, which adds 1 and 2
            made = np.array(player.read(result.region))
    right = bool((made == 3 * 2.0 ** (SUMS - 1 - 100)).all())
    return {"us": min(times) / SUMS * 1e6, "right": right, "made": float(made.flat[0])}


def equal(name: str) -> Any:
    """Greedy tokens of a small model, whole on this rank and in parts: how many are equal before the first other.

    Behind a short prompt, and behind one of several chunks, or as many tokens as the model's context allows.
    """
    shard, _ = shard_here()
    path = None if name == "built-in" else ROOT / "tests" / "fixtures" / f"{name}.gguf"
    found: dict[str, Any] = {"replayed": [], "seconds": []}
    tokens: dict[str, list[list[int]]] = {"short": [], "long": []}
    for given in (None, shard):
        start = time.perf_counter()
        model = alone(path) if given is None else model_of(path, given)
        model.chunk = min(model.chunk, CHUNK)
        length = min(LONG, model.config.context - FEW - 2)
        for what, n, reply in (("short", 40, TOKENS), ("long", length, FEW)):
            ids = [2, *random_ids(model, n)]
            made = generate_tokens(model, model.new_state(), ids, GREEDY, reply)
            tokens[what].append([t.id for t in made])
        found["replayed"].append(model.replays)
        found["seconds"].append(round(time.perf_counter() - start, 1))
    found["sums by kernel"] = isinstance(model.loaded.part, SharedPart)
    for what, (whole, parted) in tokens.items():
        same = next((i for i, (a, b) in enumerate(zip(whole, parted, strict=True)) if a != b), len(whole))
        found[what] = {"equal": same, "of": len(whole)}
        if same < len(whole):
            found[what]["tokens"] = [some[max(0, same - 1) : same + 3] for some in (whole, parted)]
    found["long"]["prompt"] = length + 1
    if shard.rank == 0:
        print(f"{name}: {json.dumps(found)}", flush=True)
    return {name: found}


def alone(path: Path | None) -> Model:
    """A whole model in a rank's process."""
    rank = os.environ.pop("MLX_RANK")
    try:
        return model_of(path, None)
    finally:
        os.environ["MLX_RANK"] = rank


def led(path: Path) -> Model:
    """Rank 0's model, which leads; in other ranks this makes its calls, and ends with it."""
    place = placed()
    if place is None:
        return model_of(path, None)
    if place.rank:
        team.follow_rank_0(place, Path, lambda path, shard, _, __: (model_of(path, shard), None))
    return team.lead(model_of(path, team.gather(place, path, str(path.absolute()), "tensor", None, {})[0]))


def speed(file: str, prompts: str, depth: str, ahead: str) -> Any:
    """Tokens a second of prompts, and of replies behind `depth` tokens and behind the longest prompt."""
    start = time.perf_counter()
    forward.AHEAD = int(ahead)
    model = led(Path(file))
    found: dict[str, Any] = {"load_s": time.perf_counter() - start, "prompt": {}, "decode": {}, "samples": {}}
    lengths = [int(n) for n in prompts.split(",")]

    def show(what: str, n: int, rates: list[float]) -> None:
        found[what][n], found["samples"][f"{what} {n}"] = median(rates), rates
        found["replays"], found["sums by kernel"] = model.replays, isinstance(model.loaded.part, SharedPart)
        print(TOLD + json.dumps(found), flush=True)  # what there is, should time run out

    def read(n: int) -> tuple[Any, float]:
        state, s = model.new_state(), Statistics()
        for _ in generate_tokens(model, state, random_ids(model, n), GREEDY, 1, statistics=s):
            pass
        return state, s.prompt_rate

    def decode(state: Any) -> list[float]:
        rates = []
        for _ in range(ROUNDS):
            s = Statistics()
            fork = state.fork()  # each from the same depth
            for _ in generate_tokens(model, fork, [7], GREEDY, REPLY + 1, statistics=s):
                pass
            fork.close()
            rates.append(s.reply_rate)
        return rates[1:]

    warm_until_steady(lambda: read(lengths[0])[1])
    for n in lengths[:-1]:
        show("prompt", n, [read(n)[1] for _ in range(ROUNDS)])
    show("decode", int(depth), decode(read(int(depth))[0]))
    if lengths[1:]:  # behind more tokens other kernels may run
        read(2 * model.chunk)
    rates = []
    for _ in range(ROUNDS):
        state, rate = read(lengths[-1])
        rates.append(rate)
        show("prompt", lengths[-1], rates)
    show("decode", lengths[-1], decode(state))
    return found


def profiled(file: str, depth: str) -> Any:
    """Where the time goes on this GPU, by kernel and without the gaps: of a step, and of a prompt of 2,048 tokens."""
    import step_profile  # PyTorch
    from torch.profiler import ProfilerActivity, profile

    model = led(Path(file))
    state = model.new_state()
    for _ in generate_tokens(model, state, random_ids(model, int(depth)), GREEDY, 1):
        pass
    found: dict[str, Any] = {"step": step_profile.summary(step_profile.records(model, state, 1))}

    def read() -> float:
        s = Statistics()
        for _ in generate_tokens(model, model.new_state(), random_ids(model, 2048), GREEDY, 1, statistics=s):
            pass
        return s.prompt_time

    read()
    found["prompt_ms"] = read() * 1e3
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        found["prompt_ms, profiled"] = read() * 1e3
    spent: dict[str, list[float]] = {}
    for event in seen.events():
        took = spent.setdefault(event.name.split("<")[0].split("(")[0][:60], [0.0, 0])
        took[0], took[1] = took[0] + event.device_time / 1e3, took[1] + 1
    rows = sorted(spent.items(), key=lambda row: -row[1][0])
    found["prompt, busy ms"] = sum(took[0] for _, took in rows)
    found["prompt"] = [[name, round(took[0], 2), took[1]] for name, took in rows[:24]]
    return found


def drift(file: str, tokens: str) -> Any:
    """If ranks have the same residual, and each the same twice, behind every chunk of a long prompt; and MLX's sums."""
    shard, group = shard_here()
    found: dict[str, Any] = {"sums": 0, "sums that differ": 0, "chunks": 0, "odd": []}
    chance = np.random.default_rng(shard.rank)
    with execution():
        for n in range(200):
            rows = (1, 64, 1024)[n % 3]
            x = mx.array(chance.standard_normal((rows, 5376), np.float32)).astype((mx.float32, mx.float16)[n // 3 % 2])
            both = mx.distributed.all_gather(x[None], group=group, stream=collective_stream())
            mx.eval(both)
            made = mx.distributed.all_sum(x, group=group, stream=collective_stream())
            found["sums"] += 1
            found["sums that differ"] += not mx.array_equal(made, both[0] + both[1]).item()
    model = model_of(Path(file), shard)
    part = model.part
    assert part is not None
    state, ids = model.new_state(), random_ids(model, int(tokens))
    while state.length < len(ids):
        chunk = mx.array(ids[state.length : state.length + model.chunk], mx.int32)
        model.prefill(chunk, state)
        with execution():
            mx.eval(state.arrays)
            mx.clear_cache()
            hidden = []
            for _ in range(2):
                hidden.append(run_layers(model.loaded, chunk[-1:], [state.fork()], 1).astype(mx.float32).reshape(-1))
                mx.async_eval(hidden[-1])
            both = mx.distributed.all_gather(hidden[0][None], group=group, stream=collective_stream())
            mx.eval(both)
            by_rank, mine = [*np.array(both)], [np.array(a) for a in hidden]
        found["chunks"] += 1
        apart = [int((by_rank[0] != by_rank[1]).sum()), int((mine[0] != mine[1]).sum())]
        if any(apart) or not np.isfinite(by_rank).all():
            row: dict[str, Any] = {"at": state.length, "ranks differ in": apart[0], "once more in": apart[1]}
            row["norm"] = float(np.linalg.norm(by_rank[0]))
            row["difference"] = float(np.linalg.norm(by_rank[0] - by_rank[1]))
            row["not finite"] = [int((~np.isfinite(a)).sum()) for a in by_rank]
            found["odd"].append(row)
            if shard.rank == 0:
                print(json.dumps(row), flush=True)
        if found["chunks"] % 8 == 0:
            print(TOLD + json.dumps(found), flush=True)
    return found


def rank_main(part: str, *given: str) -> None:
    if os.environ.get("TWO_GPUS_BACKEND") == "ring":  # to try the script without GPUs
        mx.set_default_device(mx.cpu)
    makers: dict[str, Any] = {"sums": sums, "equal": equal, "speed": speed, "profile": profiled, "drift": drift}
    found = makers[part](*given)
    found = found if part != "speed" else {**found, "peak_gb": mx.get_peak_memory() / 1e9}
    print(TOLD + json.dumps(found), flush=True)


# ---- the whole


def environments(ranks: int, backend: str, folder: Path) -> list[dict[str, str]]:
    """What ranks are started with, as `mlx.launch -n 2 --backend ..` would; each sees one GPU."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MLX_RANK")}
    env |= {"TWO_GPUS_BACKEND": backend, "PYTHONUNBUFFERED": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), env.get("PYTHONPATH", "")])
    if ranks == 1:
        return [env | {"CUDA_VISIBLE_DEVICES": "0"}]
    port = free_port(read_hosts(",".join([HERE] * ranks)))
    if backend == "ring":
        (folder / "ring.json").write_text(json.dumps([[f"{HERE}:{port + i}"] for i in range(ranks)]))
        return [env | {"MLX_HOSTFILE": str(folder / "ring.json"), "MLX_RANK": str(i)} for i in range(ranks)]
    env |= {"NCCL_HOST_IP": HERE, "NCCL_PORT": str(port), "MLX_WORLD_SIZE": str(ranks)}
    return [env | {"MLX_RANK": str(i), "CUDA_VISIBLE_DEVICES": str(i)} for i in range(ranks)]


def run(command: list[str], ranks: int, backend: str, limit: float) -> dict[str, Any]:
    """Run a command in so many ranks; return rank 0's exit code, seconds, lines and last results."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        outs = [(folder / f"out{i}").open("w+") for i in range(ranks)]
        errs = [(folder / f"err{i}").open("w+") for i in range(ranks)]
        started = [
            subprocess.Popen([sys.executable, *command], env=env, stdout=out, stderr=err, stdin=subprocess.DEVNULL)
            for env, out, err in zip(environments(ranks, backend, folder), outs, errs, strict=True)
        ]
        late = False
        while any(p.poll() is None for p in started):
            late = time.perf_counter() - start > limit
            if late or any(p.poll() for p in started):  # one has failed: the others wait for it
                time.sleep(0 if late else 3)
                break
            time.sleep(0.05)
        for process in started:
            process.kill()
            process.wait()
        said = [Path(file.name).read_text() for file in (*outs, *errs)]
    told = [line for line in said[0].splitlines() if line.startswith(TOLD)]
    result: dict[str, Any] = {"seconds": time.perf_counter() - start, "late": late}
    result["code"] = [p.returncode for p in started]
    result["found"] = json.loads(told[-1].removeprefix(TOLD)) if told else None
    result["out"] = "\n".join(line for line in said[0].splitlines() if not line.startswith(TOLD))
    result["err"] = ["\n".join(text.splitlines()[-12:]) for text in said[ranks:]]
    return result


def show(name: str, result: dict[str, Any]) -> None:
    print(f"--- {name}: {result['seconds']:.1f} s, exit codes {result['code']}{', too late' * result['late']}")
    print(result["out"] or json.dumps(result["found"]), flush=True)
    if result["late"] or any(result["code"]) or result["found"] is None:
        print("\n".join(f"rank {i}: {text}" for i, text in enumerate(result["err"]) if text), flush=True)


def cells_of(model: str, one: Any, two: Any) -> list[dict[str, Any]]:
    """The cells of docs/benchmarks: tokens a second of one GPU and of two."""
    cells = []
    for what in ("prompt", "decode"):
        for n, rate in (two or {}).get(what, {}).items():
            before = (one or {}).get(what, {}).get(n)
            cell = {"kind": "two-gpus", "what": what, "model": model, "context": int(n), "kv": "full", "ours": rate}
            cells.append(cell | {"one": before, "ratio": rate / before if before else None})
    return cells


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--parts", default="sums,equal,led,one,two")
    parser.add_argument("--prompts", default="2048,32768")
    parser.add_argument("--depth", default="512")
    parser.add_argument("--ahead", default=str(forward.AHEAD), help="layers of a prompt that the host may be ahead")
    parser.add_argument("--tokens", default="65536", help="of the part drift")
    parser.add_argument("--limit", type=float, default=60, help="seconds of a part")
    parser.add_argument("--backend", choices=("nccl", "ring"), default="nccl")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    parts, wrong = options.parts.split(","), False
    report: dict[str, Any] = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "chip": None}
    report |= {"versions": {"mlx": MLX}, "command": " ".join(["python", *sys.argv]), "cells": [], "parts": {}}

    def go(name: str, command: list[str], ranks: int) -> Any:
        result = run(command, ranks, options.backend, options.limit)
        show(name, result)
        report["parts"][name] = result
        if options.json:
            options.json.write_text(json.dumps(report, indent=1))
        return result["found"]

    me = str(Path(__file__))
    if "sums" in parts:
        go("sums", [me, "--rank", "sums"], 2)
    if "equal" in parts:
        for name in ("built-in", *FIXTURES):
            row = (go(f"equal: {name}", [me, "--rank", "equal", name], 2) or {}).get(name)
            wrong |= row is None or any(row[what]["equal"] < row[what]["of"] for what in ("short", "long"))
    if "led" in parts:
        asked = [
            "-m",
            "mlx_gemma4",
            "generate",
            "--prompt",
            "Tell me a tale of a fox.",
            "--temperature",
            "0",
            "-n",
            "96",
        ]
        texts = []
        for ranks in (1, 2):
            result = run(asked, ranks, options.backend, options.limit)
            show(f"generate on {ranks}", result | {"found": result["out"]})
            texts.append(result["out"])
        report["led"] = texts
        wrong |= texts[0] != texts[1] or not texts[0]
        print("generate gives the same text" if texts[0] == texts[1] else "generate gives ANOTHER text", flush=True)
    for file in options.files:
        given = [me, "--rank", "speed", str(file), options.prompts, options.depth, options.ahead]
        one = go(f"{file.name} on one", given, 1) if "one" in parts else None
        two = go(f"{file.name} on two", given, 2) if "two" in parts else None
        report["cells"] += cells_of(size_label(file.stem), one, two)
        for ranks in (1, 2) if "profile" in parts else ():
            go(f"{file.name}: profile on {ranks}", [me, "--rank", "profile", str(file), options.depth], ranks)
        if "drift" in parts:
            go(f"{file.name}: drift", [me, "--rank", "drift", str(file), options.tokens], 2)
    report["chip"] = f"2 x {device_name()}" if not on_cpu() else "2 x CPU"
    for cell in report["cells"]:
        ratio = f"{cell['ratio']:.2f} times one's {cell['one']:.1f}" if cell["ratio"] else ""
        print(f"{cell['model']} {cell['what']} {cell['context']}: {cell['ours']:.1f} tokens/s {ratio}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    return int(wrong)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank_main(*sys.argv[2:])
    else:
        sys.exit(main())
