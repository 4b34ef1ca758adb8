"""`tune`: it takes what is faster and right, nothing else, and remembers it for this GPU alone. Timers are fakes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click.testing
import mlx.core as mx
import pytest
from host_player import HostPlayer
from kernel_cases import metal
from kernel_models import both
from recorded import path

from mlx_gemma4 import load
from mlx_gemma4.cli.main import main
from mlx_gemma4.doctor import sizes, verdict
from mlx_gemma4.gpu import render
from mlx_gemma4.measure import bench
from mlx_gemma4.measure import tune as t
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops import tuning
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.matvec import tiling_key
from mlx_gemma4.ops.tuning import Tiling, Tuning, apple

BEST = Tiling(8, 4, 1, 4)  # by the fake timer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(verdict, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(t, "UNCACHED", 1)
    monkeypatch.setattr(t, "BYTES", 1)
    monkeypatch.setattr(t, "DEPTH", 128)
    monkeypatch.delenv("MLX_GEMMA4_KERNELS", raising=False)
    yield
    tuning.use(None)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return both("12b", "q8_0", tmp_path)[1]


class Clock:
    """A timer: seconds of a launch by its configuration. Notes what was tried."""

    def __init__(self, seconds: Callable[[Any], float]) -> None:
        self.seconds, self.tried = seconds, []

    def __call__(self, job: t.Job) -> t.Run:
        self.tried.append(job.config)
        return lambda: self.seconds(job.config)


def distance(config: Any) -> float:
    """The fewer steps from BEST, the better; attention is fastest in 64 threadgroups."""
    if isinstance(config, Tuning):
        return 1e-5 + abs(config.attention_threadgroups - 64) * 1e-7
    names = ("lanes", "rows", "split", "simdgroups")
    return 1e-5 * (1 + sum(getattr(config, name) != getattr(BEST, name) for name in names))


def test_the_fastest_is_found(model: Model) -> None:
    found, kinds = t.tune(model, apple(10), Clock(distance))
    keys = {tiling_key(p) for p in sizes.sizes_of(model).packed if p.tokens == 1}
    assert keys and {key for key in keys if t._tiling(key, found) == BEST} == keys
    assert found.attention_threadgroups == 64 and found.cores == 10
    assert replace(found, tilings={}, attention_threadgroups=50) == apple(10)
    assert tuning.this_gpu() is tuning.row_of_this_gpu()  # nothing is in use yet
    assert sum(kind.count for kind in kinds if "attention" not in kind.name) == 1 + 4 * len(model.weights.layers)
    assert all(kind.after <= kind.before for kind in kinds)
    printed = list(t.lines(kinds, "M4, file"))
    assert len(printed) == 2 + len(kinds) and any("8 lanes x 4 rows x 1 of 4" in line for line in printed)
    assert any("64 threadgroups" in line for line in printed)


def test_what_is_hardly_faster_is_not_taken(model: Model) -> None:
    rules = {t._tiling(key, apple(10)) for key in t.products_of(model)}
    assert BEST not in rules
    clock = Clock(lambda config: 1e-5 if config in (*rules, apple(10)) else 0.98e-5)
    found, kinds = t.tune(model, apple(10), clock)
    assert found == apple(10)
    assert len(clock.tried) > 20 and all(kind.after == kind.before and not kind.found for kind in kinds)


@pytest.mark.parametrize("how", ["wrong", "NaN", "raises"])
def test_what_is_wrong_is_never_taken(how: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast: BEST gives another result here."""
    right = t.matvec

    def ill(*args: Any, config: Tiling, **kwargs: Any) -> mx.array:
        y = right(*args, config=config, **kwargs)
        if config == BEST and how == "raises":
            raise RuntimeError("[metal::Device] Unable to build metal library from source")
        return y * (1.01 if how == "wrong" else float("nan")) if config == BEST else y

    monkeypatch.setattr(t, "matvec", ill)
    found, _ = t.tune(model, apple(10), Clock(distance))
    assert found.tilings and BEST not in found.tilings.values()


def test_where_the_rules_own_kernel_fails_nothing_is_tried(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def ill(*_: Any, **__: Any) -> mx.array:
        raise RuntimeError("no such function")

    monkeypatch.setattr(t, "matvec", ill)
    found, _ = t.tune(model, apple(10), Clock(distance))
    assert found == replace(apple(10), attention_threadgroups=64)


def test_a_tiling_that_fails_the_doctors_check_is_dropped(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = verdict.Result("matvec Q8_0", "", "gives wrong numbers", True)
    monkeypatch.setattr(t, "run_check", lambda *_: failing)
    found, _ = t.tune(model, apple(10), Clock(distance))
    assert found == replace(apple(10), attention_threadgroups=64)
    assert tuning.this_gpu() is tuning.row_of_this_gpu()


def test_it_ends_in_time(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each measurement takes 3 s here; the first and largest products come first."""
    now = [0.0]
    monkeypatch.setattr(t.time, "monotonic", lambda: now[0])

    def slow(config: Any) -> float:
        now[0] += 1
        return distance(config)

    told: list[tuple[int, int]] = []
    t.tune(model, apple(10), Clock(slow), lambda done, total: told.append((done, total)))
    assert told == sorted(told) and {total for _, total in told} == {int(t.SECONDS)}
    assert t.SEARCHED * t.SECONDS < now[0] <= t.SECONDS + 4 * t.RUNS  # what began before the end is finished
    kinds = [kind for some in t.products_of(model).values() for kind in some]
    assert kinds[0].name.startswith("Q8_0 ")


def test_real_timers(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both give seconds of a launch; recorded launches wait for each other, as each writes where the last one did."""
    monkeypatch.setattr(t, "UNCACHED", 500_000)
    kind = max((k for some in t.products_of(model).values() for k in some), key=lambda k: k.count)
    job = kind.job(BEST)
    assert job.launches == 5
    assert 0 < t.timer_of(Kernels(metal))(job)() < 10
    HostPlayer.made.clear()
    assert 0 < t.timer_of(Kernels(metal, player=HostPlayer))(job)() < 10
    player, _ = HostPlayer.made
    assert len(player.launches) == 5 and len({launch.outputs[0].start for launch in player.launches}) == 1
    codes = {id(launch.inputs[launch.kernel.inputs.index("codes")]) for launch in player.launches}
    assert len(codes) == 5


def test_attention_in_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: long attention tells the cores, and all that fills the GPU goes along."""
    monkeypatch.setattr(t, "state_dtype", lambda: mx.float16)
    monkeypatch.setattr(t, "LONG_DEPTH", 1024)
    model = both("12b", "q8_0", tmp_path)[1]
    monkeypatch.setattr(t, "products_of", lambda _: {})

    def seconds(gpu: Tuning) -> float:
        return 1e-5 + abs(gpu.cores - 20) * 1e-6 + abs(gpu.attention_threadgroups - 128) * 1e-8

    found, kinds = t.tune(model, apple(10), Clock(seconds))
    assert found == replace(apple(10).scaled(20), attention_threadgroups=128)
    assert found.busy_simdgroups == 2 * apple(10).busy_simdgroups
    assert next(kind.found for kind in kinds if kind.found) == "20 cores"


# ---------------------------------------------------------------- what is remembered


FOUND = replace(
    tuning.row_of_this_gpu(), cores=12, busy_simdgroups=170, attention_threadgroups=48, quantized_threadgroups=40,
    tilings={("Q4_K", 4096, 2560): BEST, ("Q6_K", 262144, 1536): Tiling(16, 4, 3, 6)},
)  # fmt: skip


def test_it_is_remembered_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict.recall_tuning() is None
    verdict.remember_tuning(FOUND)
    assert verdict.recall_tuning() == FOUND
    for change in ("MLX", "device_name", "kernel_text"):
        with monkeypatch.context() as changed:
            changed.setattr(verdict, change, "9.9" if change == "MLX" else lambda: "another")
            assert verdict.recall_tuning() is None
            verdict.remember_tuning(replace(FOUND, cores=5))
            assert verdict.recall_tuning() == replace(FOUND, cores=5)
    assert verdict.recall_tuning() == FOUND
    assert [f.name for f in verdict.tuning_file().parent.iterdir()] == ["tuning.json"]


def test_only_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(verdict.REMEMBERED + 5):
        monkeypatch.setattr(verdict, "MLX", str(i))
        verdict.remember_tuning(FOUND)
    assert len(json.loads(verdict.tuning_file().read_text())) == verdict.REMEMBERED
    assert verdict.recall_tuning() == FOUND


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cores", None),
        ("cores", "many"),
        ("cores", 0),
        ("attention_threadgroups", -3),
        ("tilings", None),
        ("tilings", []),
        ("tilings", {"Q4_K 4096": [8, 2, 2, 2]}),
        ("tilings", {"Q4_K many 2560": [8, 2, 2, 2]}),
        ("tilings", {"Q9_Z 4096 2560": [8, 2, 2, 2]}),
        ("tilings", {"Q4_K 4096 2560": [8, 2, 2]}),
        ("tilings", {"Q4_K 4096 2560": [8, 2, 2, 3]}),
        ("tilings", {"Q4_K 4096 2560": [7, 2, 2, 2]}),
        ("tilings", {"Q4_K 4096 2560": ["8", 2, 2, 2]}),
        ("tilings", {"Q4_K 4096 2560": [8, 2, 2, 2, 7]}),
        ("tilings", {"Q4_K 4096 2560": None}),
    ],
)
def test_a_damaged_file_is_none(name: str, value: Any) -> None:
    verdict.remember_tuning(FOUND)
    values = json.loads(verdict.tuning_file().read_text())
    values[verdict.machine()][name] = value
    verdict.tuning_file().write_text(json.dumps(values))
    assert verdict.recall_tuning() is None
    for text in ("", "{", "[]", "null", json.dumps({verdict.machine(): 5}), "\0"):
        verdict.tuning_file().write_text(text)
        assert verdict.recall_tuning() is None
    verdict.remember_tuning(FOUND)
    assert verdict.recall_tuning() == FOUND


def test_loads_use_it_and_check_its_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tokens are the same; a verdict on the rules' kernels is none on these."""
    monkeypatch.setattr(render, "default_launcher", lambda: metal)
    file = path("12b", "q8_0", tmp_path)
    checked: list[str] = []
    first = load(file, weights="packed").model
    run_check = verdict.run_check
    monkeypatch.setattr(verdict, "run_check", lambda c, *_: checked.append(c.key) or run_check(c, *_))
    load(file, weights="packed")
    assert not checked and tuning.this_gpu() is tuning.row_of_this_gpu()
    key = next(iter(t.products_of(first)))
    verdict.remember_tuning(replace(tuning.row_of_this_gpu(), tilings={key: BEST}))
    second = load(file, weights="packed").model
    assert tuning.this_gpu().tilings == {key: BEST}
    assert len(checked) == len(set(checked)) > 10 and any(c.startswith("matvec") for c in checked)
    done = len(checked)
    load(file, weights="packed")
    assert len(checked) == done
    states = [model.new_state() for model in (first, second)]
    for token in (3, 5, 7):
        a, b = (m.forward(mx.array([token]), s) for m, s in zip((first, second), states, strict=True))
        assert (mx.abs(a - b).max() / mx.abs(a).max()).item() < 1e-5


# ---------------------------------------------------------------- the command


def run(*args: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, ["tune", *args])


def test_there_is_nothing_to_tune_on_a_cpu() -> None:
    done = run()
    assert done.exit_code == 2
    assert done.stderr.splitlines() == [
        "mlx-gemma4: there is nothing to tune: a CPU, or MLX_GEMMA4_KERNELS=off, runs none of the kernels"
    ]


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(render, "default_launcher", lambda: metal)
    monkeypatch.setattr(t, "timer_of", lambda _: Clock(distance))
    as_on_a_gpu = bench.load_model
    monkeypatch.setattr(bench, "load_model", lambda c, source, _, *more: as_on_a_gpu(c, source, "packed", *more))
    file = path("12b", "q8_0", tmp_path)
    done = run("--model", str(file))
    assert done.exit_code == 0, done.output
    assert "8 lanes x 4 rows x 1 of 4" in done.stdout and "all products of a step" in done.stdout
    assert "Kept for this GPU" in done.stderr
    found = verdict.recall_tuning()
    assert found is not None and set(found.tilings.values()) == {BEST} and tuning.this_gpu() == found
    again = run("--model", str(file))  # begins with what was found, and finds nothing better
    assert again.exit_code == 0 and "lanes" not in again.stdout and verdict.recall_tuning() == found
    monkeypatch.setattr(verdict, "cache_folder", lambda: file / "no folder")
    assert "can't be kept" in run("--model", str(file)).stderr
