"""Whether this machine's kernels compute what their twins do, asked of the machine itself.

In: the kernels, a backend, perhaps a model. Out: a table, and a verdict that is remembered for this device, version of
MLX and text of the kernels. A kernel that fails runs as its twin from then on. `load` asks `usable_kernels` and
`check_model`; the command `mlx-gemma4 doctor` is `examine`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import (
    attention,
    coded_attention,
    cuda,
    cuda_graph,
    fused,
    kernels,
    kv_codes,
    long_attention,
    packing,
    recording,
    replay,
    tiles,
)
from .decode import SHRINK, Kernels
from .execution import execution
from .kernel_checks import Check, checks
from .kernel_sizes import Heads, Product, Sizes, sizes_of
from .kernels import Maker
from .model import Model
from .places import cache_folder, whole_file
from .quant import FORMATS

log = logging.getLogger("mlx_gemma4")
MLX = str(getattr(mx, "__version__", "?"))  # its type hints know no version

# Of a difference, relative to the value plus the root mean square of all. Rounding stays far below, even where stock
# operations on NVIDIA multiply in TF32 (5e-4); a wrong index is about 1.
LIMIT = 5e-3
AGREE = 0.05  # of logits after some layers, likewise but a root mean square: rounding adds up to a tenth of that
QUICK_ROWS = 256  # of a weight, when a model is loaded
QUICK_LENGTHS = (attention.TAIL, attention.SHORT + 64)  # attention in one launch, and in pieces
LENGTHS = (*QUICK_LENGTHS, 8192)
PATIENCE = 4.0  # seconds of a quick check after which it says what takes so long
REMEMBERED = 16  # verdicts kept, one a device, version of MLX and text of the kernels

# What no kernel takes, and stock operations do everywhere.
STOCK = (
    ("matvec, expand", "weights that MLX quantized itself (folders of safetensors)"),
    ("matvec", "rows that are no multiple of 32 long"),
    ("dense", "experts in F32, F16 or BF16"),
    ("embed, ple_inputs", "tables that MLX quantized itself"),
)


# ---------------------------------------------------------------- what is known of this machine


@dataclass
class Verdict:
    """What checks found on this machine."""

    checked: set[str] = field(default_factory=set)  # keys of checks
    failed: dict[str, str] = field(default_factory=dict)  # operation, as `Kernels.off` names it -> what was wrong


def usable_kernels() -> Kernels | None:
    """The kernels to run a model with; None where stock operations run everything: on a CPU, or if switched off."""
    maker = None if os.environ.get("MLX_GEMMA4_KERNELS", "").lower() == "off" else kernels.default_maker()
    return None if maker is None else kernels_of(maker, frozenset(recall().failed))


def kernels_of(maker: Maker, off: frozenset[str] = frozenset()) -> Kernels:
    """A backend's kernels in the fastest way it has: steps traced where they can be, and replayed on NVIDIA."""
    player = cuda_graph.Player if maker is kernels.cuda_maker else None
    return Kernels(maker, off, kernels.is_lazy(maker), player)


def verdict_file() -> Path:
    return cache_folder() / "kernels.json"


def machine() -> str:
    """What a verdict holds for."""
    return f"{device_name()}, MLX {MLX}, kernels {kernel_text()}"


def device_name() -> str:
    return str(mx.device_info().get("device_name") or platform.processor() or platform.machine())


@cache
def kernel_text() -> str:
    """A digest of all that kernels are made of."""
    folder = next(f for f in kernels._FOLDERS if f.is_dir())
    modules = [kernels, cuda, attention, long_attention, coded_attention, kv_codes, fused, tiles, packing]
    replaying = [recording, replay, cuda_graph]
    files = [*sorted(folder.iterdir()), *(Path(m.__file__ or "") for m in modules + replaying)]
    return sha256(b"\0".join(file.read_bytes() for file in files if file.is_file())).hexdigest()[:16]


def recall() -> Verdict:
    """This machine's verdict; an empty one if there is none, or none that can be read."""
    known: Any = _all_verdicts().get(machine())
    try:
        return Verdict({str(key) for key in known["checked"]}, {str(k): str(v) for k, v in known["failed"].items()})
    except (TypeError, KeyError, AttributeError):
        return Verdict()


def remember(verdict: Verdict) -> None:
    """Keep a verdict for this machine. Where nothing can be written, it is found anew the next time."""
    verdicts = _all_verdicts()
    verdicts.pop(machine(), None)
    kept = dict(list(verdicts.items())[1 - REMEMBERED :])
    kept[machine()] = {"checked": sorted(verdict.checked), "failed": verdict.failed}
    file = verdict_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as out:
            out.write(json.dumps(kept, indent=1).encode())
    except OSError as error:
        log.info("The verdict on this machine's kernels can't be kept: %s", error)


def _all_verdicts() -> dict[str, Any]:
    try:
        verdicts = json.loads(verdict_file().read_text())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home
        return {}
    return verdicts if isinstance(verdicts, dict) else {}


# ---------------------------------------------------------------- checking


@dataclass(frozen=True)
class Result:
    """What one check found."""

    op: str
    shape: str
    verdict: str  # "ok", or what is wrong in a few words
    failed: bool = False  # the kernel is to be switched off
    error: float | None = None  # see LIMIT
    seconds: float | None = None  # a launch, among many
    rate: float | None = None  # GB/s of the bytes that must move


def run_check(check: Check, maker: Maker | None, timed: bool = False) -> Result:
    """Run a kernel beside its twin; without a maker, the twin alone."""
    with execution():
        return _run_check(check, maker, timed)


def _run_check(check: Check, maker: Maker | None, timed: bool) -> Result:
    op, shape = check.op, check.shape
    try:
        case = check.make()
        want = case.defined(_arrays(case.twin()))
        mx.eval(want)
        if not all(mx.isfinite(a).all().item() for a in want):
            return Result(op, shape, "stock operations give NaN")
    except Exception as error:  # too little memory, say: nothing is known of the kernel
        return Result(op, shape, f"not checked: {_reason(error)}")
    if maker is None:
        return Result(op, shape, "runs as stock operations")
    try:
        got = case.defined(_arrays(case.kernel(maker)))
        mx.eval(got)
        worst = max(_error(a, b) for a, b in zip(got, want, strict=True))
        if not worst <= LIMIT:
            return Result(op, shape, "gives NaN" if math.isnan(worst) else "gives wrong numbers", True, worst)
        seconds = _seconds(lambda: _arrays(case.kernel(maker))) if timed else None
    except Exception as error:  # whatever a backend's compiler or launch raises
        return Result(op, shape, f"fails: {_reason(error)}", True)
    return Result(op, shape, "ok", False, worst, seconds, case.n_bytes / seconds / 1e9 if seconds else None)


def check_model(model: Model) -> None:
    """Check the kernels that a model needs and that this machine has no verdict on yet; switch off those that fail.

    Each is compiled as the model will run it, on few rows of random numbers.
    """
    if model.kernels is None:
        return
    known = recall()
    wanted = {c.key: c for c in checks(sizes_of(model), QUICK_LENGTHS, QUICK_ROWS)}
    new = [c for c in wanted.values() if c.key not in known.checked and c.op not in known.failed]
    steps = f"replay: {len(model.config.layers)} layers of {model.config.hidden}"
    replays = model.replays and steps not in known.checked
    if not new and not replays:
        return
    failed: dict[str, str] = {}
    start: float | None = time.monotonic()
    try:
        for check in new:
            if check.op in failed:
                continue
            result = run_check(check, model.kernels.maker)
            known.checked.add(check.key)
            if result.failed:
                failed[check.op] = known.failed[check.op] = result.verdict
            if start and time.monotonic() - start > PATIENCE:
                log.warning("Checking this machine's kernels (first run), which this GPU's compiler takes long for ...")
                start = None
        model.kernels.off |= frozenset(failed)
        if replays:
            if wrong := _replay_trouble(model):
                failed["replay"] = known.failed["replay"] = wrong
                model.kernels.off |= {"replay"}
            known.checked.add(steps)
    finally:
        remember(known)  # whoever interrupts this keeps what is done
    log.warning("Checking this machine's kernels (first run) ... %s", _off(failed) if failed else "ok")


def _replay_trouble(model: Model) -> str:
    """What is wrong with steps that are replayed, beside the same launched one by one; nothing: "".

    Two steps, the second with the token of the first, which the host has not seen.
    """
    assert model.kernels is not None
    apart = Model(model.config, model.weights, replace(model.kernels, player=None))
    ids = [model.config.vocab // n for n in range(2, 6)]
    try:
        state = apart.new_state()
        for i in ids[1:]:  # one at a time: for several, other kernels would have to be compiled
            apart.forward(mx.array([i]), state)
        fork = state.fork()
        first = model.begin(ids[0], state)
        second = model.begin(first, state)
        token, got = first.best(), second.logits()
        apart.forward(mx.array(ids[:1]), fork)
        want = apart.forward(mx.array([token]), fork)
        with execution():
            worst: Any = (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item()
    except Exception as error:  # whatever a driver refuses
        return f"fails: {_reason(error)}"
    return "" if worst <= AGREE else "gives wrong numbers"


def _off(failed: dict[str, str]) -> str:
    """One line on what is switched off."""
    listed = "; ".join(f"{op} {why}" for op, why in failed.items())
    return f"switched off, stock operations run instead: {listed}"


def _arrays(made: Any) -> Sequence[mx.array]:
    return [a for a in (made if isinstance(made, tuple) else (made,)) if a is not None]


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _error(got: mx.array, want: mx.array) -> float:
    """The largest difference, as LIMIT measures it. Whole numbers must be equal."""
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
    """Time of a launch among as many as 20 ms hold, the best of three rounds."""

    def of(n: int) -> float:
        start = time.perf_counter()
        mx.eval([launch() for _ in range(n)])
        return (time.perf_counter() - start) / n

    many = max(3, min(200, int(0.02 / of(3))))
    return min(of(many) for _ in range(3))


# ---------------------------------------------------------------- the whole table


def real_sizes() -> dict[str, Sizes]:
    """The models that people run, in the types of a Q4_K_M file."""
    return {
        "E2B": _sizes(1536, (8, 1, 256, 512), (8, 1, 512), (6144, 12288), layers=35, ple=256),
        "12B": _sizes(3840, (16, 8, 256, 1024), (16, 1, 512), (15360,)),
        "31B": _sizes(5376, (32, 16, 256, 1024), (32, 4, 512), (21504,)),
        "26B-A4B": _sizes(2816, (16, 8, 256, 1024), (16, 2, 512), (2112,), experts=(128, 8, 704)),
        "any": Sizes(0, 0, (), _every_format(), ""),
    }


def _sizes(
    hidden: int,
    sliding: tuple[int, int, int, int],
    full: tuple[int, int, int],
    ffns: tuple[int, ...],
    vocab: int = 262144,
    layers: int = 0,
    ple: int = 0,
    experts: tuple[int, int, int] = (0, 0, 0),
    types: tuple[str, str, str] = ("Q4_K", "Q6_K", "Q5_0"),
) -> Sizes:
    """Models without per-layer embeddings have no v on global layers.

    Args:
        sliding, full: query heads, KV heads, head size (and window).
        experts: how many, how many chosen, their width.
        types: of most weights, of the head, and of weights whose rows are no multiple of 256.
    """
    most, top, odd = types
    ends = Heads(*full, 0, "kv" if ple else "k", v_is_k=not ple)
    heads = [Heads(*sliding, "kv"), ends]
    products = [Product(top, (vocab, hidden), narrow=True)]
    for h in heads:
        rows = h.heads + h.kv_heads * (2 if h.joined == "kv" else 1)
        products += [Product(most, (n, k), narrow=True) for n, k in ((rows * h.dim, hidden), (hidden, h.heads * h.dim))]
    for ffn in ffns:
        products.append(Product(most, (2 * ffn, hidden), glu=True, factor=SHRINK, narrow=True, narrow_out=True))
        products.append(Product(odd if ffn % 256 else top, (hidden, ffn), narrow=True))
    if ple:
        heads += [Heads(h.heads, h.kv_heads, h.dim, h.window, "", has_kv=False) for h in heads]
        products += [Product(most, (ple, hidden), times=True), Product(most, (hidden, ple))]
        products.append(Product("BF16", (layers * ple, hidden)))
    n, used, width = experts
    if n:
        products.append(Product("F32", (n, hidden), norm=True, factor=hidden**-0.5))
        products.append(
            Product(most, (n, 2 * width, hidden), norm=True, glu=True, factor=SHRINK, used=used, narrow_out=True)
        )
        products.append(Product(odd, (n, hidden, width), used=used, own_x=True, narrow=True))
    return Sizes(hidden, vocab, tuple(heads), tuple(products), top, "Q5_K" if ple else "", layers, ple, n, used)


def _every_format() -> tuple[Product, ...]:
    """Each format at one shape; F16; several tokens at once."""
    some = [Product(name, (5376, 8192), narrow=name in FORMATS) for name in (*FORMATS, "F16")]
    return (*some, Product("Q4_K", (5376, 8192), tokens=kernels.MAX_TOKENS, narrow=True))


def small_sizes() -> dict[str, Sizes]:
    """Where there is no GPU: enough to see each twin run."""
    return {
        "small": _sizes(256, (4, 2, 64, 128), (4, 1, 128), (512,), 512, layers=2, ple=256, experts=(8, 2, 96)),
        "any": Sizes(0, 0, (), tuple(Product(name, (32, 256)) for name in FORMATS), ""),
    }


def all_checks(models: dict[str, Sizes], lengths: Sequence[int]) -> Iterator[tuple[str, Check]]:
    """Each check once, with the first model that needs it."""
    seen: set[str] = set()
    for name, sizes in models.items():
        for check in checks(sizes, lengths):
            if check.key not in seen:
                seen.add(check.key)
                yield name, check


def examine(
    say: Callable[[str], None], as_json: bool = False, models: dict[str, Sizes] | None = None, timed: bool = True
) -> bool:
    """Check everything, print a table line by line, and remember the verdict. Gives whether no kernel failed.

    Args:
        say: takes lines of the report.
        as_json: report one JSON object instead.
        models: at whose sizes; None: those of the real models, or small ones without a GPU.
    """
    maker = kernels.default_maker()
    models = models or (real_sizes() if maker else small_sizes())
    note = f"{device_name()}, MLX {MLX}: "
    if maker is None:
        note += "no GPU, so stock operations run everything; here they are, at small shapes"
    elif usable_kernels() is None:
        note += "MLX_GEMMA4_KERNELS=off, so stock operations run everything; here are the kernels all the same"
    else:
        note += "each kernel beside stock operations, on random numbers (NVIDIA's compiler takes minutes for them)"
    if not as_json:
        say(note)
        say(_line("kernel", "model", "shape", "error", "time", "GB/s", "verdict"))
    results = []
    for name, check in all_checks(models, LENGTHS if maker else QUICK_LENGTHS):
        result = run_check(check, maker, timed)
        results.append((name, result))
        mx.clear_cache()  # the next arrays have other sizes
        if not as_json:
            say(_row(name, result))
    failed = {r.op: r.verdict for _, r in reversed(results) if r.failed}
    if maker:
        remember(Verdict({f"{r.op}: {r.shape}" for _, r in results}, failed))
    if as_json:
        table = [{"model": name, **asdict(result)} for name, result in results]
        say(json.dumps({"machine": machine(), "gpu": maker is not None, "off": failed, "checks": table}))
    else:
        _say_end(say, failed, maker is not None)
    return not failed and not (maker is None and any(r.verdict != "runs as stock operations" for _, r in results))


def _say_end(say: Callable[[str], None], failed: dict[str, str], gpu: bool) -> None:
    for op, shape in STOCK if gpu else ():
        say(_line(op, "", shape, "", "", "", "no kernel: stock operations"))
    if failed:
        say(_off(failed)[0].upper() + _off(failed)[1:])
    elif gpu:
        say("All kernels are right. This is remembered until MLX, the kernels or the device change.")


def _row(model: str, r: Result) -> str:
    error = "" if r.error is None else f"{r.error:.1e}"
    took = "" if r.seconds is None else f"{r.seconds * 1e6:.1f} us"
    return _line(r.op, model, r.shape, error, took, "" if r.rate is None else f"{r.rate:.0f}", r.verdict)


def _line(op: str, model: str, shape: str, error: str, took: str, rate: str, verdict: str) -> str:
    return f"{op:<14} {model:<8} {shape:<44} {error:>8} {took:>11} {rate:>6}  {verdict}".rstrip()
