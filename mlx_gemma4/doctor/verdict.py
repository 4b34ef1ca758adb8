"""Checks on this machine whether its kernels compute what their references compute, and remembers the verdict.

In: checks, a launcher, perhaps a model. Out: results, and a verdict that holds for this device, version of MLX and
text of the kernels. A kernel that failed runs as its reference from then on. `load` calls `usable_kernels`, and
`check_model` through ready.py; the command `mlx-gemma4 doctor` is `table.examine`. What `mlx-gemma4 tune`
(measure/tune.py) found is remembered in the same way.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..execution import execution
from ..gpu import cuda_graph, render
from ..gpu.render import Launcher
from ..memory import device_info
from ..model.model import Model
from ..ops import tuning
from ..ops.cases import Check
from ..ops.dispatch import REPLAY, Kernels
from ..ops.op import OpKey
from ..ops.tuning import Tiling, Tuning, row_of_this_gpu
from ..paths import cache_folder, keep, kept
from ..quant.formats import FORMATS

log = logging.getLogger("mlx_gemma4")
MLX = str(getattr(mx, "__version__", "?"))  # its type hints know no version

# Largest difference, relative to the value plus the root mean square of all. Rounding stays far below, even with
# TF32 switched on (MLX_ENABLE_TF32=1: 5e-4 on NVIDIA); a wrong index gives about 1.
LIMIT = 5e-3
STOCK = "runs as stock operations"  # the verdict without a GPU
AGREE = 0.05  # largest relative difference of the logits of two steps, as norms: rounding gives a tenth of that
QUICK_ROWS = 256  # rows of a weight in the checks at loading
QUICK_LENGTHS = (128,)  # contexts at which attention is checked, in tokens
LENGTHS = (*QUICK_LENGTHS, 8192)
PATIENCE = 4.0  # seconds after which the checks at loading say why they take so long
REMEMBERED = 16  # verdicts kept, one per device, version of MLX and text of the kernels; tunings likewise
TUNED = ("cores", "busy_simdgroups", "attention_threadgroups", "quantized_threadgroups")  # numbers that `tune` changes


# ---------------------------------------------------------------- the verdict


@dataclass
class Verdict:
    """The results of all checks on this machine."""

    checked: set[str] = field(default_factory=set)  # keys of checks
    failed: dict[str, str] = field(default_factory=dict)  # operation, as an `OpKey` prints -> what was wrong


def usable_kernels() -> Kernels | None:
    """Return the kernels to run a model with; None if stock operations run everything: on a CPU or if switched off."""
    launcher = None if os.environ.get("MLX_GEMMA4_KERNELS", "").lower() == "off" else render.default_launcher()
    if launcher is None:
        return None
    tuning.use(recall_tuning())
    return kernels_of(launcher, frozenset(map(OpKey.parse, recall().failed)))


def kernels_of(launcher: Launcher, off: frozenset[OpKey] = frozenset()) -> Kernels:
    """Return a backend's kernels with the fastest steps it can run: traced where possible, replayed on NVIDIA."""
    lazy = launcher in (render.metal_launcher, render.cuda_launcher)  # launches wait to be evaluated
    return Kernels(launcher, off, lazy, cuda_graph.Player if launcher is render.cuda_launcher else None)


def verdict_file() -> Path:
    return cache_folder() / "kernels.json"


def machine() -> str:
    """Return the machine that a verdict holds for: its device, MLX and the kernels."""
    return f"{device_name()}, MLX {MLX}, kernels {kernel_text()}"


def device_name() -> str:
    return str(device_info().get("device_name") or platform.processor() or platform.machine())


@cache
def kernel_text() -> str:
    """Return a digest of everything that kernels are made of."""
    package = Path(__file__).parents[1]
    sources = sorted(file for folder in ("gpu", "ops", "model") for file in (package / folder).glob("*.py"))
    texts = sorted(file for file in render.FOLDER.iterdir() if file.suffix in (".metal", ".h"))
    files = [*texts, *sources, package / "kv" / "quantization.py"]
    return sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def recall() -> Verdict:
    """Return this machine's verdict; an empty one if there is none or it cannot be read."""
    known = _remembered(verdict_file)
    try:
        return Verdict({str(key) for key in known["checked"]}, {str(k): str(v) for k, v in known["failed"].items()})
    except (TypeError, KeyError, AttributeError):
        return Verdict()


def remember(verdict: Verdict) -> None:
    """Write a verdict for this machine. If the file cannot be written, the checks run again the next time."""
    try:
        keep(verdict_file(), machine(), {"checked": sorted(verdict.checked), "failed": verdict.failed}, REMEMBERED)
    except OSError as error:
        log.info("The verdict on this machine's kernels can't be kept: %s", error)


def tuning_file() -> Path:
    return cache_folder() / "tuning.json"


def recall_tuning() -> Tuning | None:
    """Return this GPU's numbers as `remember_tuning` wrote them; None if it did not, or it cannot be read."""
    try:
        known = _remembered(tuning_file)
        numbers: dict[str, Any] = {name: int(known[name]) for name in TUNED}
        named = [(*key.split(), Tiling(*numbers)) for key, numbers in known["tilings"].items()]
        tilings = {(f, int(n), int(k)): t for f, n, k, t in named if f in FORMATS and t.is_sound()}
        sound = all(n > 0 for n in numbers.values()) and len(tilings) == len(named)
    except (TypeError, KeyError, ValueError, AttributeError):
        return None
    return replace(row_of_this_gpu(), **numbers, tilings=tilings) if sound else None


def remember_tuning(found: Tuning) -> None:
    """Write this GPU's numbers. Raises OSError, or RuntimeError: this user has no home folder."""
    tilings = {" ".join(map(str, key)): [t.lanes, t.rows, t.split, t.simdgroups] for key, t in found.tilings.items()}
    keep(tuning_file(), machine(), {**{name: getattr(found, name) for name in TUNED}, "tilings": tilings}, REMEMBERED)


def _remembered(at: Callable[[], Path]) -> Any:
    """Return what is kept in a file for this machine; None: nothing."""
    try:
        return kept(at()).get(machine())
    except RuntimeError:  # there is no home
        return None


# ---------------------------------------------------------------- checking


@dataclass(frozen=True)
class Result:
    """The result of one check."""

    op: str
    shape: str
    verdict: str  # "ok", or what is wrong in a few words
    failed: bool = False  # the kernel must be switched off
    error: float | None = None  # see LIMIT
    seconds: float | None = None  # per launch, among many
    rate: float | None = None  # GB/s of the bytes that must move
    first: float | None = None  # seconds of the first launches, compiling included
    launches: tuple[dict[str, Any], ...] = ()  # those, if timed: see `render.observed`


@execution()
def run_check(check: Check, launcher: Launcher | None, timed: bool = False) -> Result:
    """Run a kernel and its reference and compare; without a launcher, run the reference alone."""
    op, shape = str(check.op), check.shape
    launches: list[dict[str, Any]] = []
    try:
        case = check.make()
        with _beside(launcher, timed):
            want = case.compared(arrays_of(case.reference()))
            mx.eval(want)
        if not all(mx.isfinite(a).all().item() for a in want):
            return Result(op, shape, "stock operations give NaN")
    except Exception as error:  # too little memory, for example: that tells nothing about the kernel
        return Result(op, shape, f"not checked: {reason_of(error)}")
    if launcher is None:
        return Result(op, shape, STOCK)
    try:
        start = time.perf_counter()
        got = case.compared(arrays_of(case.kernel(render.observed(launcher, launches) if timed else launcher)))
        mx.eval(got)
        first = time.perf_counter() - start
        worst = max(_error(a, b) for a, b in zip(got, want, strict=True))
        if not worst <= LIMIT:
            wrong = "gives NaN" if math.isnan(worst) else "gives wrong numbers"
            return Result(op, shape, wrong, True, worst, first=first, launches=tuple(launches))
        seconds = _seconds(lambda: arrays_of(case.kernel(launcher))) if timed else None
    except Exception as error:  # anything that a backend's compiler or launch raises
        return Result(op, shape, f"fails: {reason_of(error)}", True, launches=tuple(launches))
    rate = case.n_bytes / seconds / 1e9 if seconds else None
    return Result(op, shape, "ok", False, worst, seconds, rate, first, tuple(launches))


def _beside(launcher: Launcher | None, timed: bool) -> AbstractContextManager[Any]:
    """Where a reference is computed: quick checks' on the CPU of a machine with an NVIDIA GPU.

    There MLX compiles products of quantized weights, gathers and more when they first run, 2 s each.
    """
    return mx.stream(mx.cpu) if launcher is render.cuda_launcher and not timed else nullcontext()


def check_model(model: Model, wanted: Sequence[Check], done: Callable[[], None]) -> list[Check]:
    """Run those of a model's checks that have no verdict yet; switch off what fails. Return those that had passed.

    Each kernel is compiled as the model will run it, and runs on a few rows of random numbers. `done` is called after
    each check.
    """
    assert model.kernels is not None
    known, mark = recall(), tuned_mark()
    usable = [c for c in wanted if str(c.op) not in known.failed]
    passed = [c for c in usable if c.key + mark in known.checked]
    new = [c for c in usable if c.key + mark not in known.checked]
    steps = f"replay: {len(model.config.layers)} layers of {model.config.hidden}"
    replays = model.replays and (steps not in known.checked or model.part is not None)  # ranks check together
    if not new and not replays:
        return passed
    failed: dict[str, str] = {}
    start: float | None = time.monotonic()
    try:
        for check in new:
            if str(check.op) not in failed:
                result = run_check(check, model.kernels.launcher)
                known.checked.add(check.key + mark)
                if result.failed:
                    failed[result.op] = known.failed[result.op] = f"{result.verdict} ({check.shape})"
            done()
            if start and time.monotonic() - start > PATIENCE:
                log.warning("Checking this machine's kernels (first run), which this GPU's compiler takes long for ...")
                start = None
        model.kernels.off |= frozenset(map(OpKey.parse, failed))
        if replays:
            if wrong := _replay_trouble(model):
                failed["replay"] = wrong
                model.kernels.off |= {REPLAY}
            if model.part is None:  # else it is the ranks', not this machine's
                known.checked.add(steps)
                known.failed |= {"replay": wrong} if wrong else {}
    finally:
        remember(known)  # also after Ctrl-C
    if new or failed or model.part is None:
        log.warning("Checking this machine's kernels (first run) ... %s", switched_off(failed) if failed else "ok")
    return passed


def tuned_mark() -> str:
    """What the names of checks end in: with other numbers than the table's, launches may take other kernels."""
    gpu = tuning.this_gpu()
    if gpu is row_of_this_gpu():
        return ""
    numbers = [*(getattr(gpu, name) for name in TUNED), *sorted(gpu.tilings.items(), key=str)]
    return f", tuned {sha256(repr(numbers).encode()).hexdigest()[:8]}"


def _replay_trouble(model: Model) -> str:
    """Compare two replayed steps with the same steps launched one by one. Return what is wrong; "" if nothing is.

    The second step takes the token of the first, which the host has not seen yet.
    """
    assert model.kernels is not None
    # Untraced: MLX would compile what stands between the launches, 4 s for each of three functions.
    apart = Model(model.config, model.weights, replace(model.kernels, player=None, traced=False), part=model.part)
    ids, wrong = [model.config.vocab // n for n in range(2, 6)], ""
    try:
        state = apart.new_state()
        for i in ids[1:]:  # one at a time: several at once would compile other kernels
            apart.forward(mx.array([i]), state)
        fork = state.fork()
        first = model.step(ids[0], state)
        second = model.step(first, state)
        token, got = first.token(), second.logits()
        apart.forward(mx.array(ids[:1]), fork)
        want = apart.forward(mx.array([token]), fork)
        with execution():
            worst: Any = (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item()
        wrong = "" if worst <= AGREE else "gives wrong numbers"
    except Exception as error:  # anything that a driver refuses
        wrong = f"fails: {reason_of(error)}"
    everywhere = model.part is None or model.part.agreed(not wrong)
    return wrong if everywhere else wrong or "fails on another rank"


def switched_off(failed: dict[str, str]) -> str:
    """Return one line on the kernels that are switched off."""
    listed = "; ".join(f"{op} {why}" for op, why in failed.items())
    return f"switched off, stock operations run instead: {listed}"


def arrays_of(made: Any) -> Sequence[mx.array]:
    return [a for a in (made if isinstance(made, tuple) else (made,)) if a is not None]


def reason_of(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _error(got: mx.array, want: mx.array) -> float:
    """Return the largest difference, as LIMIT measures it. Integers must be equal."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return math.inf
    if mx.issubdtype(got.dtype, mx.integer):
        return 0.0 if mx.array_equal(got, want) else math.inf
    a, b = got.astype(mx.float32), want.astype(mx.float32)
    if not mx.isfinite(a).all().item():
        return math.nan
    worst: Any = (mx.abs(a - b) / (mx.sqrt(mx.mean(b * b)) + mx.abs(b))).max().item()
    return float(worst)


def _seconds(launch: Callable[[], Sequence[mx.array]]) -> float:
    """Time a launch among as many as 20 ms hold; the best of three rounds."""

    def of(n: int) -> float:
        start = time.perf_counter()
        mx.eval([launch() for _ in range(n)])
        return (time.perf_counter() - start) / n

    many = max(3, min(200, int(0.02 / of(3))))
    return min(of(many) for _ in range(3))
