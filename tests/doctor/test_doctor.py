"""The doctor, with the Metal simulator for a GPU: kernels that are right, and kernels made wrong on purpose."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import pytest
from host_player import HostPlayer
from kernel_cases import metal
from recorded import HERE, prompts

from mlx_gemma4 import load
from mlx_gemma4.doctor import table, verdict
from mlx_gemma4.doctor.sizes import checks, sizes_of
from mlx_gemma4.gpu import render
from mlx_gemma4.model.model import Model
from mlx_gemma4.ops.cases import Check, Product, Sizes
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.op import OpKey

MODEL = HERE / "31b-q8_0.gguf"
PROMPT = prompts("31b")[0]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "verdict_file", lambda: tmp_path / "cache" / "kernels.json")
    monkeypatch.delenv("MLX_GEMMA4_KERNELS", raising=False)


class Ailing:
    """The simulator, with one kernel that is ill; counts launches."""

    def __init__(self, ill: str = "", how: str = "") -> None:
        self.ill, self.how = ill, how
        self.launches: list[str] = []

    def __call__(self, **declared: Any) -> Any:
        name = declared["name"].rsplit("_", 1)[0]
        ill = name == self.ill
        if ill and self.how == "does not compile":
            raise RuntimeError("error: use of undeclared identifier\n  in line 3")
        kernel = metal(**declared)

        def call(**arguments: Any) -> Any:
            self.launches.append(name)
            out = kernel(**arguments)
            if ill and self.how == "raises":
                raise RuntimeError("no such function")
            if ill and self.how == "wrong":
                out[0] = mx.roll(out[0], 1)
            if ill and self.how == "NaN":
                out[0] = mx.where(mx.arange(out[0].size).reshape(out[0].shape) == 3, mx.array(float("nan")), out[0])
            return out

        return call


def on(monkeypatch: pytest.MonkeyPatch, launcher: Any) -> None:
    """Make a launcher this machine's."""
    monkeypatch.setattr(render, "default_launcher", lambda: launcher)
    monkeypatch.setattr(verdict, "PATIENCE", 1e9)  # a busy machine is not what is tested


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def reply(model: Model) -> list[int]:
    """Greedy tokens."""
    state = model.new_state()
    model.prefill(mx.array(PROMPT[:-1]), state)
    tokens = [PROMPT[-1]]
    for _ in range(4):
        tokens.append(int(mx.argmax(model.forward(mx.array(tokens[-1:]), state)).item()))
    return tokens[1:]


@pytest.fixture(scope="module")
def plain() -> Model:
    return load(MODEL, weights="packed").model


# ---------------------------------------------------------------- loading a model


def test_a_cpu_runs_stock_operations(plain: Model) -> None:
    assert plain.kernels is None


def test_kernels_that_are_right_run(
    plain: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launcher = Ailing()
    on(monkeypatch, launcher)
    model = load(MODEL, weights="packed").model
    assert warnings(caplog) == ["Checking this machine's kernels (first run) ... ok"]
    assert model.kernels is not None and not model.kernels.off
    assert {"matvec", "rotations", "qkv_post", "attention", "merge", "add_norm", "embed"} <= set(launcher.launches)
    launcher.launches.clear()
    assert reply(model) == reply(plain)
    assert "attention" in launcher.launches


def test_a_later_load_launches_all_kernels_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No reference is computed then; progress counts up to the number of checks, as it does the first time."""
    launcher, counts = Ailing(), []
    on(monkeypatch, launcher)
    load(MODEL, weights="packed", preparing=lambda *seen: counts.append(seen))
    first, launched = counts[:], set(launcher.launches)
    counts.clear()
    caplog.clear()
    launcher.launches.clear()
    monkeypatch.setattr(verdict, "run_check", lambda *_: pytest.fail("checked again"))
    model = load(MODEL, weights="packed", preparing=lambda *seen: counts.append(seen)).model
    made = len(launcher.launches)
    assert not warnings(caplog)
    assert set(launcher.launches) == launched >= {"pack", "matvec", "attention", "merge", "add_norm", "embed"}
    assert counts == first == [(n, len(counts)) for n in range(1, len(counts) + 1)] and 20 < len(counts) <= made
    assert model.kernels is not None and not model.kernels.off


@pytest.mark.parametrize("how", ["raises", "does not compile"])
def test_a_kernel_that_fails_at_a_later_load(
    how: str, plain: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It had passed its check: it is off in this process, with a warning, and the reply is the reference's."""
    on(monkeypatch, metal)
    load(MODEL, weights="packed")
    caplog.clear()
    launcher = Ailing("add_norm", how)
    on(monkeypatch, launcher)
    model = load(MODEL, weights="packed").model
    assert model.kernels is not None and model.kernels.off == {OpKey("add_norm")}
    assert warnings(caplog)[0].startswith("Kernel add_norm fails here and is off") and len(warnings(caplog)) == 1
    assert reply(model) == reply(plain)


ILLNESSES = [
    ("add_norm", "wrong", "add_norm", "gives wrong numbers"),
    ("attention", "NaN", "attention 2 rows, attention 8 rows, paged_attention", "gives NaN"),  # of one text
    ("matvec", "wrong", "matvec Q8_0", "gives wrong numbers"),
    ("qkv_post", "raises", "qkv_post", "fails: no such function"),
    ("embed", "does not compile", "embed", "fails: error: use of undeclared identifier in line 3"),
]


@pytest.mark.parametrize(("kernel", "how", "op", "why"), ILLNESSES)
def test_a_kernel_that_fails_is_switched_off(
    kernel: str,
    how: str,
    op: str,
    why: str,
    plain: Model,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It alone, with one line that says so, now and when a model is loaded again; the reply is the references'."""
    launcher = Ailing(kernel, how)
    on(monkeypatch, launcher)
    model = load(MODEL, weights="packed").model
    off = frozenset(map(OpKey.parse, op.split(", ")))
    assert model.kernels is not None and model.kernels.off == off
    assert len(warnings(caplog)) == 1
    _, listed = warnings(caplog)[0].split("switched off, stock operations run instead: ")
    for each, told in zip(op.split(", "), listed.split("; "), strict=True):
        assert told.startswith(f"{each} {why}")
    launcher.launches.clear()
    assert reply(model) == reply(plain)
    assert kernel not in launcher.launches
    assert verdict.usable_kernels() == Kernels(launcher, off)


class Dazed(HostPlayer):
    """Forgets the keys that the steps before left in the tails, or refuses a step."""

    how: ClassVar[str] = ""

    def start(self, numbers: np.ndarray, chained: bool, after: HostPlayer | None = None) -> int:
        for launch in self.launches:
            for spot, name in zip(launch.outputs, launch.kernel.outputs, strict=True):
                if name == "new_k" and self.how == "wrong":
                    self._at(spot)[...] = 1
        if self.how == "refuses" and chained:
            raise RuntimeError("CUDA's driver refuses cuGraphLaunch (status 1)")
        return super().start(numbers, chained, after)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("", ""),
        ("wrong", "gives wrong numbers"),
        ("refuses", "fails: CUDA's driver refuses cuGraphLaunch (status 1)"),
    ],
)
def test_replayed_steps_are_checked_too(
    how: str, why: str, plain: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that fail are not replayed, now and when a model is loaded again."""
    on(monkeypatch, metal)
    monkeypatch.setattr(Dazed, "how", how)
    monkeypatch.setattr(verdict, "kernels_of", lambda launcher, off: Kernels(launcher, off, player=Dazed))
    model = load(MODEL, weights="packed").model
    assert model.kernels is not None and model.kernels.off == ({OpKey("replay")} if why else set())
    assert len(warnings(caplog)) == 1 and (f"instead: replay {why}" if why else "ok") in warnings(caplog)[0]
    assert reply(model) == reply(plain)
    again = load(MODEL, weights="packed").model
    assert len(warnings(caplog)) == 1
    assert model.replays == again.replays == (not why)


@pytest.mark.parametrize("how", ["raises", "does not compile"])
def test_a_kernel_that_fails_while_a_model_runs(how: str, plain: Model, caplog: pytest.LogCaptureFixture) -> None:
    """One warning, and the reply of the references."""
    model = Model(plain.config, plain.weights, Kernels(Ailing("add_norm", how)))
    assert reply(model) == reply(plain)
    assert model.kernels is not None and model.kernels.off == {OpKey("add_norm")}
    assert len(warnings(caplog)) == 1
    assert warnings(caplog)[0].startswith("Kernel add_norm fails here and is off")


def test_an_interrupted_check_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []

    def interrupted(check: Any, launcher: Any) -> Any:
        if len(checked) == 3:
            raise KeyboardInterrupt
        checked.append(check.key)
        return verdict.Result(check.op, check.shape, "ok")

    on(monkeypatch, metal)
    monkeypatch.setattr(verdict, "run_check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(MODEL, weights="packed")
    first, checked = checked, []
    with pytest.raises(KeyboardInterrupt):
        load(MODEL, weights="packed")
    assert len(checked) == 3 and not set(checked) & set(first)


def test_kernels_switched_off_by_hand(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("MLX_GEMMA4_KERNELS", "off")
    launcher = Ailing()
    on(monkeypatch, launcher)
    assert verdict.usable_kernels() is None
    assert load(MODEL, weights="packed").model.kernels is None
    assert not launcher.launches
    assert not warnings(caplog)


# ---------------------------------------------------------------- what is remembered


def test_a_verdict_is_remembered() -> None:
    made = verdict.Verdict({"embed: Q8_0 256"}, {"top_k": "gives NaN"})
    verdict.remember(made)
    assert verdict.recall() == made
    assert [f.name for f in verdict.verdict_file().parent.iterdir()] == ["kernels.json"]


@pytest.mark.parametrize("change", ["MLX", "device_name", "kernel_text"])
def test_another_machine_is_checked_anew(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = verdict.Verdict({"embed: Q8_0 256"}, {"top_k": "gives NaN"})
    verdict.remember(made)
    with monkeypatch.context() as changed:
        changed.setattr(verdict, change, "9.9" if change == "MLX" else lambda: "another")
        assert verdict.recall() == verdict.Verdict()
        verdict.remember(verdict.Verdict({"sample: 5"}, {}))
    assert verdict.recall() == made


def test_the_text_of_the_kernels_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.metal").write_text("one")
    monkeypatch.setattr(render, "FOLDER", tmp_path)
    first = verdict.kernel_text.__wrapped__()
    (tmp_path / "a.metal").write_text("two")
    assert verdict.kernel_text.__wrapped__() != first


def test_only_so_many_verdicts_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(verdict.REMEMBERED + 5):
        monkeypatch.setattr(verdict, "MLX", str(i))
        verdict.remember(verdict.Verdict({"sample: 5"}, {}))
    assert len(json.loads(verdict.verdict_file().read_text())) == verdict.REMEMBERED
    assert verdict.recall().checked


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"MACHINE": 5}', '{"MACHINE": {"checked": []}}', '{"MACHINE": {"failed": []}}', "\0"],
)
def test_a_damaged_verdict_is_none(text: str) -> None:
    verdict.verdict_file().parent.mkdir()
    verdict.verdict_file().write_text(text.replace("MACHINE", verdict.machine()))
    assert verdict.recall() == verdict.Verdict()
    verdict.remember(verdict.Verdict({"sample: 5"}, {}))
    assert verdict.recall().checked == {"sample: 5"}


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    verdict.remember(verdict.Verdict({"sample: 5"}, {}))
    assert verdict.recall() == verdict.Verdict()


# ---------------------------------------------------------------- the whole table

# Every kind of kernel once.
FEW = {
    "few": Sizes(
        hidden=256,
        vocab=2048,
        heads=table.small_sizes()["small"].heads[1:3],
        products=(
            Product("Q4_K", (64, 256), norm=True, glu=True),
            Product("Q5_0", (8, 64, 96), used=2, own_x=True),
            Product("BF16", (16, 256)),
            Product("Q4_K", (32, 256), times=True, tokens=4),
        ),
        table="Q6_K",
        ple_table="Q5_K",
        layers=2,
        ple=256,
        experts=8,
        used=2,
    )
}


def test_all_kernels_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, metal)
    lines: list[str] = []
    assert table.examine(lines.append, models=FEW, timed=False), "\n".join(lines)
    for op in (
        "matvec Q4_K",
        "matvec Q5_0",
        "expand Q4_K",
        "grouped Q5_0",
        "pack Q4_K",
        "pack Q6_K",
        "dense",
        "rotations",
        "qkv_post",
        "attention",
        "quantized_attention",
        "quantize_kv",
        "add_norm",
        "embed",
        "ple_inputs",
    ):
        assert any(line.startswith(op) and line.endswith(" ok") for line in lines), op
    assert lines[-1].startswith("All kernels are right.")
    recalled = verdict.recall()
    assert "top_k: 2 of 8" in recalled.checked and "sample: 2048" in recalled.checked
    assert not recalled.failed


def test_the_table_says_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, Ailing("top_k", "wrong"))
    lines: list[str] = []
    assert not table.examine(lines.append, models=FEW, timed=True)
    assert lines[-1] == "Switched off, stock operations run instead: top_k gives wrong numbers"
    assert verdict.recall().failed == {"top_k": "gives wrong numbers"}
    right = next(line for line in lines if line.startswith("embed "))
    assert " us " in right and right.endswith(" ok")

    on(monkeypatch, metal)  # healed: the next examination takes it back
    assert table.examine(lines.append, as_json=True, models=FEW, timed=False)
    assert json.loads(lines[-1])["off"] == {}
    assert not verdict.recall().failed


def test_a_gpu_whose_kernels_are_off_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_GEMMA4_KERNELS", "off")
    on(monkeypatch, metal)
    lines: list[str] = []
    only = {"few": Sizes(0, 0, (), FEW["few"].products[2:], "")}
    assert table.examine(lines.append, models=only, timed=False)
    assert "MLX_GEMMA4_KERNELS=off" in lines[0]


def test_a_check_that_cannot_be_made_switches_nothing_off() -> None:
    def too_large() -> Any:
        raise MemoryError("no memory")

    result = verdict.run_check(Check(OpKey("embed"), "x", too_large), metal)
    assert not result.failed
    assert result.verdict == "not checked: no memory"


def test_real_sizes_are_those_of_the_models() -> None:
    """Spot checks against the shapes of published files."""
    made = {(name, check.key) for name, check in table.all_checks(table.real_sizes(), verdict.LENGTHS)}
    for name, key in (
        ("31B", "matvec Q4_K: 43008x5376 glu"),
        ("31B", "matvec Q6_K: 262144x5376"),
        ("31B", "matvec Q4_K: 16384x5376"),
        ("26B-A4B", "matvec Q4_K: 128x1408x2816 8 used norm glu"),
        ("26B-A4B", "matvec Q5_0: 2816x2112"),
        ("12B", "attention 8 rows: 16/1 heads of 512, 8192 tokens"),
        ("31B UD", "matvec IQ2_XXS: 43008x5376 glu"),
        ("31B UD", "few_rows IQ3_XXS: 5376x21504 T=8"),
        ("26B-A4B UD", "grouped IQ2_S: 1408x2816, 104 rows glu"),
        ("26B-A4B UD", "matvec IQ4_NL: 128x2816x704 8 used"),
        ("E2B", "ple_inputs: Q5_K 35x256, T=1"),
        ("E2B", "attention 2 rows: 8/1 heads of 256, window 512"),
    ):
        assert (name, key) in made, key


@pytest.mark.parametrize("file", ["26b-a4b-ud", "e2b-ud", "gemma3-q4_0", "12b-f32"])
def test_checks_of_a_model_run_as_references(file: str) -> None:
    """Each kind of model yields checks that can be made."""
    model = load(HERE / f"{file}.gguf", weights="packed").model
    made = list(checks(sizes_of(model), verdict.QUICK_LENGTHS, verdict.QUICK_ROWS))
    assert len(made) > 8
    verdicts = {verdict.run_check(check, None).verdict for check in made}
    assert verdicts == {"runs as stock operations"}


def test_the_command_on_this_machine(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlx_gemma4", "doctor", "--json"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["off"] == {}
    assert len(report["checks"]) > 20
    if not report["gpu"]:
        assert {c["verdict"] for c in report["checks"]} == {"runs as stock operations"}


def test_numbers_near_enough() -> None:
    """A difference in one place counts, however many there are; rounding doesn't."""
    want = mx.array(np.random.default_rng(0).standard_normal(100_000).astype(np.float32))
    one = mx.array(want)
    one[77] += 0.1
    assert verdict._error(one, want) > verdict.LIMIT
    assert verdict._error(want.astype(mx.float16).astype(mx.float32), want) < verdict.LIMIT
