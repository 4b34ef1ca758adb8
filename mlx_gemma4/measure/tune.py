"""Measures launch configurations for a model on this machine's GPU, and finds those that are faster than the table's.

In: a loaded model, the `Tuning` to begin with. Out: a better one, and what each product took before and after. Each
launch waits for the one before, as in a decode step, and all layers' weights take turns, so that no cache holds them.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from ..doctor.sizes import layer_products, outer_products, sizes_of
from ..doctor.verdict import QUICK_ROWS, run_check
from ..execution import execution
from ..gpu.recording import Arena, Player, Recording, recorded, recorder
from ..gpu.render import Launcher
from ..loading.loader import Progress
from ..model.model import Model
from ..ops import tuning
from ..ops.attention import attention, launch_config
from ..ops.cases import COUNT, Heads, Product, attention_inputs, product_arguments, state_dtype
from ..ops.dispatch import Kernels
from ..ops.epilogue import Epilogue, Folded
from ..ops.long_attention import long_attention, long_launch_config
from ..ops.matvec import matvec, matvec_cases, tiling, tiling_key
from ..ops.packed import is_readable
from ..ops.parts import TAIL
from ..ops.tuning import Tiling, TilingKey, Tuning
from ..quant.formats import FORMATS, Packed

SECONDS = 45.0  # for all measurements; a minute with the checks that follow
SEARCHED = 0.85  # of them; then what was found best is held to the rule once more
BETTER = 0.975  # of the rule's time: what takes more is not taken
RUNS = 5  # of each in that comparison
LIMIT = 1e-3  # of the difference of two configurations' results, as norms
UNCACHED = 200e6  # bytes that no GPU's cache holds
BYTES = 1e9  # that the launches of one measurement read, about
CORES = (8, 10, 16, 20, 32, 40, 64, 80, 132)  # of GPUs whose rules are tried first
THREADGROUPS = (24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
DEPTH, LONG_DEPTH = 4096, 16384  # tokens behind which attention is measured: the plain one, the one on matrix units

Run = Callable[[], float]  # makes a job's launches and returns seconds of one


@dataclass(frozen=True)
class Job:
    """Launches to be timed: many in a row, each on other weights."""

    config: Any  # what is tried: a `Tiling`, or for attention a `Tuning`
    x: mx.array
    call: Callable[[Launcher, Any, int], Any]  # (launcher, x, number of the launch) -> its result
    n_bytes: int  # that one launch reads

    @property
    def launches(self) -> int:
        return max(5, min(500, int(BYTES / self.n_bytes)))


Timer = Callable[[Job], Run]


def timer_of(kernels: Kernels) -> Timer:
    """Return what times jobs on this GPU: as launches of a recorded step on NVIDIA, else as a chain of MLX's."""
    if kernels.player is None:
        return partial(_chained, kernels)
    return partial(_recorded, itertools.cycle([kernels.player(), kernels.player()]))


def _recorded(players: Iterator[Player], job: Job) -> Run:
    """Each launch writes where the one before did, and so waits for it. Runs until two more have been recorded."""
    player, recording = next(players), Recording(Arena())
    number = recording.buffer((1,), mx.int32)
    with recorded(recording):
        for i in range(job.launches):
            job.call(recorder, job.x, i)
    player.load(recording.launches, recording.arena.nbytes, 1, number.region)

    def run() -> float:
        start = time.perf_counter()
        player.start(np.zeros(1, np.int32), False)
        player.wait()
        return (time.perf_counter() - start) / job.launches

    run()
    return run


@mx.compile
def _after(x: mx.array, result: mx.array) -> mx.array:
    """x, once there is a result: one small launch, as a norm is in a step."""
    return x + (result.reshape(-1)[:1] * 0).astype(x.dtype)


def _chained(kernels: Kernels, job: Job) -> Run:
    def run() -> float:
        x = job.x
        for i in range(job.launches):
            x = _after(job.x, job.call(kernels.launcher, x, i))
        start = time.perf_counter()
        mx.eval(x)
        return (time.perf_counter() - start) / job.launches

    run()
    return run


# ---------------------------------------------------------------- what is measured


@dataclass
class Kind:
    """Launches of one kind, so many a decode step; what one takes, in seconds, and what was found."""

    name: str
    count: int
    job: Callable[[Any], Job]  # with a configuration
    before: float = math.nan
    after: float = math.nan
    found: str = ""


def products_of(model: Model) -> dict[TilingKey, list[Kind]]:
    """Return the packed products of a decode step by what `matvec.tiling` knows them by, the largest first."""
    c, w = model.config, model.weights
    pairs: list[tuple[Product, Any]] = list(zip(outer_products(w), (w.output, w.per_layer_model_proj), strict=False))
    for layer in w.layers:
        pairs += [(p, getattr(layer, name)) for name, p in layer_products(layer, c.experts_used, c.hidden).items()]
    found: dict[Product, list[Packed]] = {}
    for p, weight in pairs:
        if isinstance(weight, Packed) and is_readable(weight):
            found.setdefault(p, []).append(weight)
    kinds: dict[TilingKey, list[Kind]] = {}
    for p, same in sorted(found.items(), key=lambda each: -len(each[1]) * math.prod(tiling_key(each[0])[1:])):
        job = partial(_product_job, p, same, product_arguments(p, same[0].shape))
        kinds.setdefault(tiling_key(p), []).append(Kind(f"{p.type} {p}", len(same), job))
    return kinds


def _product_job(p: Product, same: list[Packed], inputs: tuple[mx.array, Epilogue, Folded], config: Tiling) -> Job:
    """All layers' weights by turns; where these are few, some are copies."""
    weights, (x, epilogue, folded) = list(same), inputs
    for i in range(_copies(same[0].nbytes) - len(same)):
        w = same[i % len(same)]
        scales = (None if a is None else a * 1 for a in (w.group_scales, w.block_scales))
        weights.append(Packed(w.format, w.shape, w.codes * 1, *scales))
    mx.eval(x, [a for w in weights for a in (w.codes, w.group_scales, w.block_scales) if a is not None])

    def call(launcher: Launcher, x: Any, i: int) -> Any:
        return matvec(launcher, x, weights[i % len(weights)], epilogue, folded, config=config)

    return Job(config, x, call, same[0].nbytes * p.used // p.shape[0] if p.used else same[0].nbytes)


def attention_of(model: Model, long: bool) -> list[Kind]:
    """Return the kinds of a step's attention: on matrix units over many tokens, or the plain one."""
    dtype, kinds = state_dtype(), []
    for shape, count in Counter((h.heads, h.kv_heads, h.dim, h.window) for h in sizes_of(model).heads).items():
        h = Heads(*shape, joined="")
        length = LONG_DEPTH if long else h.window or DEPTH
        if not long or (not h.window and dtype == mx.float16 and h.dim % 64 == 0):
            job = partial(_attention_job, h, length, dtype, long)
            kinds.append(Kind(f"attention, {h}, {length} tokens", count, job))
    return kinds


def _attention_job(h: Heads, length: int, dtype: mx.Dtype, long: bool, gpu: Tuning) -> Job:
    mx.random.seed(0)  # the same numbers for each configuration
    n_bytes, lengths, group = 2 * h.kv_heads * h.dim * dtype.size * length, (length, TAIL), h.heads // h.kv_heads
    made = [attention_inputs(h, [(length, 0, length), (TAIL, 0, COUNT)], dtype) for _ in range(_copies(n_bytes))]
    mx.eval(made)
    if long:
        config: Any = long_launch_config(lengths, group, 1, h.kv_heads, h.dim, gpu)
        kernel: Callable[..., Any] = long_attention
    else:
        config = replace(launch_config(lengths, group, h.kv_heads, gpu), threadgroups=gpu.attention_threadgroups)
        kernel = partial(attention, window=h.window)

    def call(launcher: Launcher, q: Any, i: int) -> Any:
        return kernel(launcher, q, *made[i % len(made)][1:], scale=1.0, config=config)

    return Job(gpu, made[0][0], call, n_bytes)


def _copies(n_bytes: int) -> int:
    return max(1, min(500, int(UNCACHED / n_bytes)))


# ---------------------------------------------------------------- the search


@dataclass
class Search:
    """Looks for a better configuration of some kinds of launches, which share it."""

    kinds: list[Kind]
    queue: list[Any]  # to be tried; the first is what there is before
    more: Callable[[Any], list[Any]] = lambda _: []  # to be tried beside the best
    tried: list[Any] = field(default_factory=list)
    best: Any = None
    seconds: float = math.inf  # of a step's launches with it
    wanted: list[mx.array] = field(default_factory=list)  # results with the first

    def advance(self, launcher: Launcher, timer: Timer) -> bool:
        """Try one more. What fails, or gives other results than the first, is never the best. False: none is left."""
        fresh = partial(filter, lambda config: config not in self.tried)
        self.queue = list(fresh(self.queue)) or (list(fresh(self.more(self.best))) if self.best else [])
        if not self.queue or (self.tried and not self.wanted):
            return False
        config, seconds, results = self.queue[0], 0.0, []
        self.tried.append(config)
        try:
            for kind in self.kinds:
                job = kind.job(config)
                results.append(job.call(launcher, job.x, 0).astype(mx.float32))
                mx.eval(results[-1])
                run = timer(job)
                seconds += kind.count * median(run() for _ in range(3))
        except Exception:  # whatever a backend's compiler or launch raises
            return True
        self.wanted = self.wanted or results
        if seconds < self.seconds and all(map(_agree, results, self.wanted)):
            self.best, self.seconds = config, seconds
        return True

    def decide(self, timer: Timer) -> Any:
        """Return the best if it is clearly better than the first; they run by turns, for clocks change."""
        old, new = 0.0, 0.0
        for kind in self.kinds:
            before, after = (timer(kind.job(config)) for config in (self.tried[0], self.best))
            runs = [(before(), after()) for _ in range(RUNS)]
            kind.before, kind.after = (median(run[i] for run in runs) for i in range(2))
            old, new = old + kind.count * kind.before, new + kind.count * kind.after
        if new <= BETTER * old:
            return self.best
        for kind in self.kinds:
            kind.after = kind.before
        return self.tried[0]


def neighbours(t: Tiling, k: int) -> list[Tiling]:
    """Return tilings that differ from one in one respect, and have work for all lanes of a row of k weights."""
    some = [replace(t, split=n, simdgroups=n * max(1, t.simdgroups // t.split)) for n in (1, 2, 3, 4, 6, 8)]
    some += [replace(t, lanes=n) for n in (8, 16, 32)] + [replace(t, rows=n) for n in (2, 4, 8)]
    some += [replace(t, simdgroups=t.split * n) for n in (1, 2, 4)]
    return [s for s in some if s.simdgroups <= 12 and s.lanes * s.split * 32 <= max(k, 256)]


def _agree(got: mx.array, want: mx.array) -> bool:
    difference: Any = (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item()
    return bool(difference <= LIMIT)


@execution()
def tune(
    model: Model, start: Tuning, timer: Timer | None = None, progress: Progress | None = None
) -> tuple[Tuning, list[Kind]]:
    """Look for faster launch configurations of a model's decode step than those that follow from `start`.

    Attention comes first: with the cores that suit the long one goes all that is to fill the GPU, and the rules.

    Args:
        model: with kernels.
        timer: in place of this GPU's.
        progress: called with the seconds that have passed, and those there are.
    """
    assert model.kernels
    launcher, timer, begin = model.kernels.launcher, timer or timer_of(model.kernels), time.monotonic()

    def spent() -> float:
        seconds = time.monotonic() - begin
        if progress:
            progress(int(seconds), int(SECONDS))
        return seconds / SECONDS

    found, measured = start, []
    for long in (True, False):
        more = [found.scaled(n) for n in CORES] if long else [_with(found, n) for n in THREADGROUPS]
        search = Search(attention_of(model, long), [found, *more])
        while search.kinds and spent() < SEARCHED / 3 and search.advance(launcher, timer):
            pass
        if search.best and (best := search.decide(timer)) != found:
            found, text = best, f"{best.cores} cores" if long else f"{best.attention_threadgroups} threadgroups"
            search.kinds = [replace(kind, found=text) for kind in search.kinds]
        measured += search.kinds
    rules = replace(found, tilings={})
    searches = {}
    for key, kinds in products_of(model).items():
        queue = [_tiling(key, gpu) for gpu in (start, rules, *map(rules.scaled, CORES))]
        searches[key] = Search(kinds, queue, partial(neighbours, k=key[2]))
    waiting = list(searches.values())
    while waiting and spent() < SEARCHED:
        search = waiting.pop(0)
        waiting += [search] if search.advance(launcher, timer) else []
    tilings = dict(start.tilings)
    for key, search in searches.items():
        before = best = _tiling(key, start)
        if search.best and spent() < 1 and (best := search.decide(timer)) != before:
            text = f"{best.lanes} lanes x {best.rows} rows x {best.split} of {best.simdgroups}"
            search.kinds = [replace(kind, found=text) for kind in search.kinds]
        tilings[key] = best
        measured += search.kinds
    tilings = {key: t for key, t in tilings.items() if t != _tiling(key, rules)}
    return _proven(model, replace(found, tilings=tilings)), measured


def _with(gpu: Tuning, threadgroups: int) -> Tuning:
    return replace(gpu, attention_threadgroups=threadgroups)


def _tiling(key: TilingKey, gpu: Tuning) -> Tiling:
    return tiling(FORMATS[key[0]], *key[1:], gpu=gpu)


def _proven(model: Model, found: Tuning) -> Tuning:
    """`found` without the tilings whose kernels fail the doctor's checks: prompts launch more variants of them."""
    assert model.kernels
    sizes, before, tilings = sizes_of(model), tuning.this_gpu(), dict(found.tilings)
    tuning.use(found)
    for p in sizes.packed:
        if p.tokens == 1 and tiling_key(p) in tilings:
            checks = matvec_cases(replace(sizes, products=(p,), rows=QUICK_ROWS))
            if any(run_check(check, model.kernels.launcher).failed for check in checks):
                del tilings[tiling_key(p)]
    tuning.use(before)
    return replace(found, tilings=tilings)


def lines(kinds: list[Kind], title: str) -> Iterator[str]:
    """Yield what was found, for people: times in microseconds. Which attention a step has depends on its context."""
    yield f"{title:<50}{'a step':>8}{'before us':>11}{'after us':>11}"
    kinds = [kind for kind in kinds if not math.isnan(kind.after)]  # others' turn never came
    for kind in kinds:
        times = f"{kind.before * 1e6:>11.1f}{kind.after * 1e6:>11.1f}"
        yield f"{kind.name:<50}{kind.count:>8}{times}  {kind.found}".rstrip()
    products = [kind for kind in kinds if not kind.name.startswith("attention")]
    before, after = (sum(kind.count * getattr(kind, when) for kind in products) for when in ("before", "after"))
    yield f"{'all products of a step':<58}{before * 1e6:>11.1f}{after * 1e6:>11.1f}"
