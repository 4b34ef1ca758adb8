"""Measures the speed of a model on this machine: prompts, decoding at several depths, replies at once, and limits.

In: a loaded model and a `BenchPlan`. Out: `Cell`s, and the object that `mlx-gemma4 bench --json` writes. The keys and
values of a depth are random numbers put straight into the state, since the time of attention depends on shapes alone;
prompts are really read. `llama_bench` runs the other program of a comparison.
"""

import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from .. import __version__
from ..doctor.ready import make_ready
from ..doctor.verdict import MLX, device_name, recall, usable_kernels
from ..errors import InputError
from ..execution import execution
from ..generation.decoding import Statistics
from ..generation.loop import generate_tokens
from ..generation.prompt import prefill_chunk, read_chunk
from ..generation.sampling import Sampling
from ..gpu.render import observed
from ..kv.state import KVState
from ..loading.loader import Progress, load_model, open_model
from ..memory import SOME_ROOM, Room, available_memory, device_info
from ..model.batch import MAX_BATCH
from ..model.costs import PREFILL_CHUNK, kv_per_token, weights_per_token
from ..model.model import Model
from ..ops.dispatch import Kernels

DEPTHS = (0, 512, 2048, 8192)
GREEDY = Sampling(temperature=0)
BATCH_PROMPT = 512  # tokens of the prompt of each of several replies at once
WARM_UP = 8  # tokens decoded before a depth is measured
STEADY, WARM_RUNS = 1.5, 4  # a warm-up goes on while a run is so many times as fast as the one before; runs at most
COPIED = 1 << 29  # most bytes that a copy of `copy_bandwidth` reads
SIZE_LABEL = re.compile(r"(?<![A-Za-z0-9.])(E?\d+(?:\.\d+)?[BM](?:-A\d+(?:\.\d+)?B)?)(?![A-Za-z0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class BenchPlan:
    """The measurements to make. Lengths in tokens."""

    prompts: tuple[int, ...] = (512,)
    depths: tuple[int, ...] = DEPTHS
    reply: int = 64  # decoded per measurement
    repetitions: int = 5
    kv: str = "full"  # how the state holds keys and values
    parallel: tuple[int, ...] = ()  # replies at once

    def check(self, context: int) -> None:
        """Raise InputError if a length does not fit the model's context."""
        for flag, values, room in (("--prompt-sizes", self.prompts, 1), ("--depths", self.depths, self.reply + 2)):
            for n in values:
                if n + room > context:
                    raise InputError(f"{flag} {n}: with {room} tokens more, past the model's context of {context}")
        for n in self.parallel:
            if n > MAX_BATCH:
                raise InputError(f"--parallel {n}: at most {MAX_BATCH} replies are made at once")
            if BATCH_PROMPT + self.reply + 2 > context:
                raise InputError(
                    f"--parallel: prompts of {BATCH_PROMPT} tokens and --reply {self.reply} are past the model's "
                    f"context of {context}"
                )

    @property
    def tokens(self) -> int:
        """The most tokens that states hold at a time."""
        together = max(self.parallel, default=0) * (BATCH_PROMPT + self.reply)
        return max(together, max((*self.prompts, *self.depths), default=0) + self.reply)


@dataclass
class Cell:
    """One measurement: a prompt of `context` tokens, or decoding behind so many. Rates in tokens per second.

    Of several replies at once: of all together.
    """

    kind: str  # "prefill", "decode" or "batch"
    context: int
    parallel: int = 1  # replies at once
    samples: list[float] = field(default_factory=list)
    llama_samples: list[float] = field(default_factory=list)
    n_bytes: int | None = None  # that a decoded token must read
    launches: int | None = None  # kernels per decoded token; None: stock operations run
    host_time: float | None = None  # seconds to build and schedule a step
    peak_memory: int = 0  # bytes of MLX's arrays
    kv_memory: int | None = None  # bytes of keys and values at that depth
    llama_kv_memory: int | None = None  # bytes that llama.cpp allocates for them, including the reply's
    prompt_times: list[float] = field(default_factory=list)  # seconds in which the prompts of a batch were read
    llama_prompt_times: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return median(self.samples)

    @property
    def llama_rate(self) -> float | None:
        return median(self.llama_samples) if self.llama_samples else None

    @property
    def ratio(self) -> float | None:
        return self.rate / self.llama_rate if self.llama_rate else None

    @property
    def title(self) -> str:
        if self.kind == "batch":
            return f"{self.parallel} at {self.context}"
        return f"prompt of {self.context}" if self.kind == "prefill" else f"reply at {self.context}"


@dataclass(frozen=True)
class Subject:
    """The measured model and its description."""

    path: Path
    name: str  # "31B", or the file's name if it tells no size
    model: Model
    holding: str
    load_time: float  # seconds


def load_subject(
    path: Path, progress: Progress | None = None, room: Room = SOME_ROOM, preparing: Progress | None = None
) -> Subject:
    """Load the model alone: speed needs no tokenizer, and a synthetic file has none. Arguments as of `load`."""
    start = time.perf_counter()
    with open_model(path) as (config, source, metadata):
        model, plan = load_model(config, source, "auto", True, progress, usable_kernels(), room)
    took = time.perf_counter() - start
    make_ready(model, preparing)
    label = size_label(str(metadata.get("general.name", "")), path.stem)
    return Subject(path, label, model, plan.holding, took)


def size_label(*names: str) -> str:
    """Return the size in the first of several names that has one, such as "E2B" or "26B-A4B"; else the last name."""
    found = (SIZE_LABEL.search(name.replace("_", "-")) for name in names)
    return next((m[1].upper() for m in found if m), names[-1])


# ---------------------------------------------------------------- measuring


def cells_of(plan: BenchPlan) -> list[Cell]:
    """Return the empty cells of a plan, in order: prompts, depths, replies at once, each from the least."""
    prompts = [Cell("prefill", n) for n in sorted(set(plan.prompts))]
    depths = [Cell("decode", n) for n in sorted(set(plan.depths))]
    return prompts + depths + [Cell("batch", BATCH_PROMPT, n) for n in sorted(set(plan.parallel))]


def measure(model: Model, plan: BenchPlan, cells: list[Cell], repetitions: int) -> Iterator[Cell]:
    """Add `repetitions` samples to each cell, after a warm-up, and yield each cell once it has them.

    The depths share one state that grows; each repetition decodes on a fork of it.
    """
    base = model.new_state(kv=plan.kv)
    for cell in cells:
        if cell.kind == "prefill":
            short = min(cell.context, 2 * prefill_chunk(model))
            warm_until_steady(lambda n=short: _prompt_rate(model, plan, n)[0])  # type: ignore[misc]
            if cell.context > short:  # behind more tokens other kernels may run
                _prompt_rate(model, plan, cell.context)
            for _ in range(repetitions):
                rate, cell.peak_memory = _prompt_rate(model, plan, cell.context)
                cell.samples.append(rate)
        elif cell.kind == "batch":
            held = model.new_state(kv=plan.kv)  # a pool that has none would go with the last reply, and its recordings
            if cell.parallel > 1:
                model.seat(held)
            warm_until_steady(lambda n=cell.parallel: _batch_rate(model, plan, n)[0])  # type: ignore[misc]
            for _ in range(repetitions):
                rate, took, cell.peak_memory = _batch_rate(model, plan, cell.parallel)
                cell.samples.append(rate)
                cell.prompt_times.append(took)
            held.close()
        else:
            fill(base, cell.context)
            _warm_up(model, base, plan.reply)
            cell.kv_memory = base.nbytes
            cell.n_bytes = weight_bytes(model) + kv_per_token(model.config, plan.kv, base.length, base.dtype)
            if model.kernels:  # a CPU computes stock operations while they are being scheduled
                cell.launches, cell.host_time = launches(model, base), host_time(model, base)
            for _ in range(repetitions):
                rate, cell.peak_memory = reply_rate(model, base, plan.reply)
                cell.samples.append(rate)
        mx.clear_cache()
        yield cell
    base.close()


def random_ids(model: Model, n: int, which: int = 0) -> list[int]:
    """Return n token ids, always the same for an n and `which`."""
    return [
        int(i)
        for i in np.random.default_rng([n, which] if which else n).integers(
            model.config.vocab // 10, model.config.vocab, n
        )
    ]


def _prompt_rate(model: Model, plan: BenchPlan, n: int) -> tuple[float, int]:
    """Read a prompt of n tokens and choose a token. Return tokens per second and peak memory in bytes."""
    s = Statistics()
    for _ in generate_tokens(model, model.new_state(kv=plan.kv), random_ids(model, n), GREEDY, 1, statistics=s):
        pass
    return s.prompt_rate, s.peak_memory


def warm_until_steady(run: Callable[[], float]) -> None:
    """Run what gives a rate until it is as fast as before: what is compiled or made at first use is then there."""
    before = run()
    for _ in range(WARM_RUNS - 1):
        rate = run()
        if rate < STEADY * before:
            return
        before = rate


def _batch_rate(model: Model, plan: BenchPlan, n: int) -> tuple[float, float, int]:
    """Read n prompts one after the other, then decode n greedy replies at once: each step starts with the one before.

    On a GPU a state's way into the pool of those that step together counts as part of its prompt. One reply alone is
    decoded as `generate` does.

    Returns:
        Decoded tokens per second of all together, seconds for the prompts, peak memory in bytes.
    """
    mx.reset_peak_memory()
    states = [model.new_state(kv=plan.kv) for _ in range(n)]
    start, first = time.perf_counter(), []
    for i, state in enumerate(states):
        ids, read = random_ids(model, BATCH_PROMPT, i), None
        while read is None:
            read = read_chunk(model, state, ids, [], model.chunk)
        first.append(read.token())
        if n > 1:
            model.seat(state)
    took, start = time.perf_counter() - start, time.perf_counter()
    if n == 1:
        s = Statistics()
        for _ in generate_tokens(model, states[0], first, GREEDY, plan.reply + 1, statistics=s):
            pass
        rate = s.reply_rate
    else:
        step = model.batch(first, states)
        for _ in range(plan.reply - 1):
            step, before = model.batch(step, states), step
            before.tokens()
        step.tokens()
        rate = n * plan.reply / (time.perf_counter() - start)
    peak = mx.get_peak_memory()
    for state in states:
        state.close()
    return rate, took, peak


def _warm_up(model: Model, base: KVState, n: int) -> None:
    """Decode as a reply of n tokens will, and across the end of a tail, so that a GPU has compiled all it needs."""
    state, tail = base.fork(), base.layout.tail
    ahead = (base.length // tail + 1) * tail - WARM_UP // 2
    if n < tail and base.length < ahead < model.config.context - WARM_UP - 2:
        fill(state, ahead)
    reply_rate(model, state, n if n >= tail else WARM_UP)


def reply_rate(model: Model, base: KVState, n: int) -> tuple[float, int]:
    """Decode n steps behind `base`, as `generate` does. Return tokens per second and peak memory in bytes.

    A new `Model` of the same weights has no traces of steps yet: a growing conversation needs new ones as well.
    """
    s, model = Statistics(), Model(model.config, model.weights, model.kernels)
    for _ in generate_tokens(model, base.fork(), random_ids(model, 1), GREEDY, n + 1, statistics=s):
        pass
    return s.reply_rate, s.peak_memory


def fill(state: KVState, length: int) -> None:
    """Grow a state to `length` tokens of random keys and values, in the chunks of a prompt."""
    while state.length < length:
        n = min(PREFILL_CHUNK - state.length % PREFILL_CHUNK, length - state.length)
        with execution():
            for i, shape in enumerate(state.config.layers):
                if shape.kv_layer == i:
                    # Each layer has its own numbers: shared ones would stay in a GPU's cache, where real ones don't.
                    size = (1, shape.kv_heads, n, shape.head_dim)
                    state.append(i, mx.random.normal(size, state.dtype), mx.random.normal(size, state.dtype))
            state.advance(mx.zeros(n, mx.int32))
            mx.eval(state.arrays)
    mx.clear_cache()


def weight_bytes(model: Model) -> int:
    """Bytes of weights that a decoded token reads: all, except one row of embeddings and only the experts used."""
    held = {each.name: getattr(model.weights, each.name) for each in fields(model.weights)}
    del held["layers"], held["rope_freqs"]
    for i, layer in enumerate(model.weights.layers):
        held |= {f"blk.{i}.{each.name}": getattr(layer, each.name) for each in fields(layer)}
    sizes = {f"{name}.weight": weight.nbytes for name, weight in held.items() if weight is not None}
    return weights_per_token(model.config, sizes)


def launches(model: Model, state: KVState) -> int | None:
    """Kernels that a decoded token launches; None if stock operations run."""
    if model.kernels is None:
        return None
    made: list[dict[str, Any]] = []
    kernels = Kernels(observed(model.kernels.launcher, made), model.kernels.off)
    mx.eval(Model(model.config, model.weights, kernels).forward(mx.array([1]), state.fork()))
    return len(made)


def host_time(model: Model, state: KVState, steps: int = 9) -> float:
    """Seconds of host time to build and schedule one step, without waiting for it: the median of several."""
    state, token, times = state.fork(), mx.array([1]), []
    step = model.step(1, state) if model.replays else None
    for _ in range(steps):
        start = time.perf_counter()
        if step:
            step = model.step(step, state)
        else:
            with execution():
                token = mx.argmax(model.forward(token, state))[None]
                mx.async_eval(token)
        times.append(time.perf_counter() - start)
        if step:
            step.token()
        mx.eval(token)
    return median(times)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of copies of a large array on this device."""
    rounds, chain = 6, 8
    a = mx.zeros(min(COPIED, available_memory() // 8) // 4, mx.uint32)
    rates = []
    with execution():
        mx.eval(a)
        for _ in range(rounds):
            start, b = time.perf_counter(), a
            for _ in range(chain):
                b = b + 1
            mx.eval(b)
            rates.append(2 * chain * a.nbytes / (time.perf_counter() - start))
    del a, b
    mx.clear_cache()
    return median(rates[1:])  # the first one warms up


# ---------------------------------------------------------------- results


def made_by(program: str, **versions: str | None) -> dict[str, Any]:
    """Return what a report says of the program that makes it, and when; `versions` of others beside its own."""
    mine = {"mlx-gemma4": __version__, "mlx": MLX, "python": platform.python_version()}
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"program": program, "date": date, "versions": {**mine, **versions}}


def result(
    subject: Subject, plan: BenchPlan, cells: list[Cell], copy: float, llama: str | None, command: str
) -> dict[str, Any]:
    """Return the object that `--json` writes: rates in tokens per second, times in seconds, sizes in bytes."""
    return {
        **made_by("mlx-gemma4 bench", **{"llama.cpp": llama}),
        "command": command,
        "chip": device_name(),
        "file": subject.path.name,
        "holding": subject.holding,
        "load_time": round(subject.load_time, 2),
        "weight_bytes_per_token": weight_bytes(subject.model),
        "copy_bandwidth": round(copy),
        "reply": plan.reply,
        "kernels_off": sorted(map(str, subject.model.kernels.off)) if subject.model.kernels else None,
        "cells": [_cell(subject.name, plan, c, copy) for c in cells if c.samples],
    }


def _cell(name: str, plan: BenchPlan, c: Cell, copy: float) -> dict[str, Any]:
    cell = {
        "model": name,
        "kind": c.kind,
        "context": c.context,
        "kv": plan.kv,
        "ours": round(c.rate, 3),
        "llama_cpp": None if c.llama_rate is None else round(c.llama_rate, 3),
        "ratio": None if c.ratio is None else round(c.ratio, 4),
        "samples": [round(s, 3) for s in c.samples],
        "llama_cpp_samples": [round(s, 3) for s in c.llama_samples],
        "peak_memory": c.peak_memory,
    }
    if c.n_bytes is not None:
        cell |= {"bytes_per_token": c.n_bytes, "share_of_copy": round(c.n_bytes * c.rate / copy, 4)}
        cell |= {"launches": c.launches, "host_time": c.host_time and round(c.host_time, 6)}
        cell |= {"kv_memory": c.kv_memory, "llama_cpp_kv_memory": c.llama_kv_memory}
    if c.kind == "batch":
        times = {"prompt_seconds": c.prompt_times, "llama_cpp_prompt_seconds": c.llama_prompt_times}
        cell |= {"parallel": c.parallel, **{name: round(median(t), 4) if t else None for name, t in times.items()}}
    return cell


def table(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a result for people."""
    v, cells = result["versions"], result["cells"]
    other = f", llama.cpp {v['llama.cpp']}" if v["llama.cpp"] else ""
    yield f"{result['chip']}, MLX {v['mlx']}, mlx-gemma4 {v['mlx-gemma4']}{other}"
    yield (
        f"{result['file']}: {result['weight_bytes_per_token'] / 1e9:.3f} GB of weights a token; "
        f"large copies run at {result['copy_bandwidth'] / 1e9:.0f} GB/s"
    )
    columns = ["", "tokens/s", "lowest", "highest", "MB/token", "of copy", "launches", "host ms", "KV MB", "peak GB"]
    columns += ["llama.cpp", "ratio", "its KV MB"] if v["llama.cpp"] else []
    yield "".join(f"{title:<18}" if i == 0 else f"{title:>10}" for i, title in enumerate(columns))
    for c in cells:
        shown = [f"{c['ours']:.1f}", f"{min(c['samples']):.1f}", f"{max(c['samples']):.1f}"]
        shown.append(_shown(c.get("bytes_per_token"), 1e-6, ".1f"))
        shown.append(_shown(c.get("share_of_copy"), 100, ".1f", "%"))
        shown += [_shown(c.get("launches"), 1, "d"), _shown(c.get("host_time"), 1e3, ".2f")]
        shown += [_shown(c.get("kv_memory"), 1e-6, ".1f"), f"{c['peak_memory'] / 1e9:.2f}"]
        if v["llama.cpp"]:
            shown += [_shown(c["llama_cpp"], 1, ".1f"), _shown(c["ratio"], 1, ".3f")]
            shown.append(_shown(c.get("llama_cpp_kv_memory"), 1e-6, ".1f"))
        yield f"{Cell(c['kind'], c['context'], c.get('parallel', 1)).title:<18}" + "".join(f"{s:>10}" for s in shown)


def _shown(value: float | None, times: int | float, form: str, suffix: str = "") -> str:
    return "" if value is None else f"{value * times:{form}}{suffix}"


def machine() -> dict[str, Any]:
    """Describe this machine as far as figures depend on it, without anything that identifies its owner."""
    found, verdict = {name: value for name, value in device_info().items() if name != "uuid"}, recall()
    found |= {"system": f"{platform.system()} {platform.mac_ver()[0] or platform.release()} {platform.machine()}"}
    found |= {"kernels_checked": len(verdict.checked), "kernels_failed": verdict.failed}
    if sys.platform == "darwin":
        for name in ("hw.model", "machdep.cpu.brand_string", "hw.perflevel0.physicalcpu", "hw.perflevel1.physicalcpu"):
            found[name] = _output("sysctl", "-n", name)
        cores = re.search(r'"gpu-core-count" = (\d+)', _output("ioreg", "-rc", "AGXAccelerator", "-d", "1"))
        found["gpu_cores"] = int(cores[1]) if cores else None
    return found


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
