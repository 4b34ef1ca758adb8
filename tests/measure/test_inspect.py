"""`inspect`: its report against loading and running the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from math import prod
from pathlib import Path

import click.testing
import gguf
import make_synthetic
import numpy as np
import pytest
from recorded import HERE, KINDS, path
from rewrite import drop, rewrite

from mlx_gemma4.cli.main import main
from mlx_gemma4.conversation.language_model import demo_path, load
from mlx_gemma4.doctor.published import PUBLISHED
from mlx_gemma4.files.gguf import open_gguf
from mlx_gemma4.kv.quantization import KINDS as KVS
from mlx_gemma4.kv.state import kv_bytes
from mlx_gemma4.loading.tensors import Entry
from mlx_gemma4.measure import bench, inspection
from mlx_gemma4.measure.inspection import Report, inspect, lines
from mlx_gemma4.memory import HEADROOM
from mlx_gemma4.model.costs import PREFILL_CHUNK


def run(*args: str | Path) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, ["inspect", *map(str, args)])


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_by_type(kind: str, tmp_path: Path) -> None:
    file = path(kind, "q4_k_m", tmp_path)
    report = inspect(file)
    with open_gguf(file) as gguf:
        for row in report.types:
            some = [t for t in gguf.tensors.values() if t.type == row.type]
            assert row.tensors == len(some)
            assert row.weights == sum(prod(t.shape) for t in some)
            assert row.n_bytes == sum(t.n_bytes for t in some)
        assert sum(row.tensors for row in report.types) == len(gguf.tensors)
    assert report.unused == []


@pytest.mark.parametrize(
    ("kind", "tag"), [("e2b", "q8_0"), ("31b", "q4_0"), ("26b-a4b", "q4_k_m"), ("12b", "untied-q4_k_m")]
)
def test_bytes_per_token(kind: str, tag: str, tmp_path: Path) -> None:
    """The bytes that a loaded model reads, except for a bf16 tensor (fp32 on a CPU) and one that only rotates."""
    file = path(kind, tag, tmp_path)
    model = load(file, weights="packed").model
    with open_gguf(file) as gguf:
        widened = sum(t.n_bytes for t in gguf.tensors.values() if t.type in ("F16", "BF16") and len(t.shape) > 1)
        turning = gguf.tensors["rope_freqs.weight"].n_bytes if "rope_freqs.weight" in gguf.tensors else 0
    report = inspect(file)
    assert report.weights_per_token - turning + widened == pytest.approx(bench.weight_bytes(model), abs=2)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_bounds_what_a_state_holds(kind: str, tmp_path: Path) -> None:
    """Close above it, at several lengths, with each --kv."""
    file = path(kind, "q4_k_m", tmp_path)
    model = load(file).model
    for context, kv in product((64, 300, 500), KVS):
        state = model.new_state(kv=kv)
        bench.fill(state, context)
        said = next(m for m in inspect(file, context).memory if m.kv == kv)
        slack = kv_bytes(model.config, state.dtype, 1, 0) * 8  # tails and whole segments
        chunk = sum(2 * s.kv_heads * s.head_dim * 4 * PREFILL_CHUNK for s in model.config.layers if s.sliding)
        assert state.nbytes <= said.state <= state.nbytes + slack + chunk


@pytest.fixture
def synthetic(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Report]:
    """Reports on the real models' shapes, of files that nobody wrote."""

    def report(kind: str, context: int | None = None) -> Report:
        shape = PUBLISHED[kind.upper()]
        made = make_synthetic.tensors(shape)
        sizes = {type: (size, n_bytes) for type, (_, size, n_bytes) in make_synthetic.TYPES.items()}
        entries = {
            name: Entry(shape, type, prod(shape) // sizes[type][0] * sizes[type][1])
            for name, (shape, type) in made.items()
        }
        monkeypatch.setattr(inspection, "_header", lambda _: (make_synthetic.config_of(shape), entries, kind, []))
        return inspect(Path(kind), context)

    return report


def test_31b_at_128k(synthetic: Callable[..., Report]) -> None:
    """80 KB a token on global layers and windows of 839 MB, in fp16 (a CPU holds fp32); 258 bytes a vector in tq4."""
    report = synthetic("31b", 131072)
    full, q8, tq4 = report.memory
    assert [m.kv for m in report.memory] == list(KVS)
    assert 17e9 < report.n_bytes < 20e9
    assert full.state / 2 == pytest.approx(81920 * 131072 + 839e6, rel=0.12)  # and a chunk of a prompt
    assert tq4.state < q8.state < full.state
    kv = [m.read_per_token - report.weights_per_token - 839e6 for m in report.memory]
    assert kv == pytest.approx([81920 * 131072, 81920 / 1024 * 514 * 131072, 81920 / 1024 * 258 * 131072], rel=0.01)


def test_26b_reads_its_chosen_experts_only(synthetic: Callable[..., Report]) -> None:
    """4 of 26 billion weights."""
    report = synthetic("26b-a4b")
    share = report.weights_per_token / report.n_bytes
    assert 3.5 / 25.2 < share < 5 / 25.2


def test_whether_it_fits(synthetic: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest context that fits does, one token more doesn't."""
    for available in (4_000_000_000, 18_900_000_000, 22_000_000_000, 60_000_000_000):
        monkeypatch.setattr(inspection, "available_memory", lambda n=available: n)
        for m in synthetic("31b", 8192).memory:
            assert m.fits == (m.with_weights <= available) == (m.longest >= 8192)
            for context, fits in ((m.longest, True), (m.longest + 1, False)):
                if 0 < context <= 131072:
                    again = next(n for n in synthetic("31b", context).memory if n.kv == m.kv)
                    assert again.fits is fits
                    assert again.with_weights - again.state > HEADROOM


def test_speed_is_bounded_by_the_bytes_that_a_token_reads(synthetic: Callable[..., Report]) -> None:
    """Bandwidth over bytes bounds what others have published for an M5 Max, 614 GB/s: 25.3 and 28.3 tokens a second."""
    report = synthetic("31b", 512)
    assert 28.3 < 614e9 / report.memory[0].read_per_token < 40
    assert f"{report.memory[0].read_per_token / 1e9:.2f} GB with --kv full" in "\n".join(lines(report, "Apple M3 Max"))


def test_table_and_json() -> None:
    file = HERE / "26b-a4b-q4_k_m.gguf"
    text = run(file, "--context", "300").stdout
    for said in ("gemma4: 2 layers", "5 experts of 32, 2 used", "Q4_K", "Memory for 300 tokens", "tq4"):
        assert said in text
    assert all(len(line) <= 120 for line in text.splitlines())
    report = json.loads(run(file, "--context", "300", "--json").stdout)
    assert report["context"] == 300
    assert report["config"]["layers"][0]["sliding"] is True
    assert {"full", "q8", "tq4"} == {m["kv"] for m in report["memory"]}
    assert report["path"] == str(file)


def test_demo_and_folders() -> None:
    """The built-in model, and folders in bf16 and as mlx-lm quantizes them."""
    assert inspect(demo_path()).context == 2048
    for folder in (HERE / "folders").iterdir():
        report = inspect(folder)
        assert report.types
        assert 0 < report.weights_per_token < 1.01 * report.n_bytes  # of a tied embedding, a row more
        assert "bits/weight" in run(folder).stdout


def test_only_the_header_is_read(tmp_path: Path) -> None:
    """The report is the same for a file whose data are all zeros."""
    blank = rewrite(
        HERE / "e2b-q4_k_m.gguf", tmp_path / "blank.gguf", lambda entries: [(n, 0 * d, k) for n, d, k in entries]
    )
    whole, zeros = inspect(HERE / "e2b-q4_k_m.gguf"), inspect(blank)
    assert (zeros.types, zeros.config, zeros.weights_per_token) == (whole.types, whole.config, whole.weights_per_token)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nowhere.gguf"], "nowhere.gguf: no such file"),
        ([__file__], "not a GGUF"),
        ([str(HERE)], "this folder has no config.json"),
        ([str(HERE / "e2b-q4_k_m.gguf"), "--context", "513"], "--context 513: the model's own is 512"),
        ([str(HERE / "e2b-q4_k_m.gguf"), "--context", "0"], "'--context': 0 is not in the range"),
    ],
)
def test_wrong_input(args: list[str], says: str) -> None:
    done = run(*args)
    assert done.exit_code == 2
    assert says in done.stderr.splitlines()[-1]


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    """Missing tensors and unknown types are reported beside everything else."""
    half = rewrite(HERE / "e2b-f32.gguf", tmp_path / "half.gguf", drop("ffn_up"))
    assert "CAN'T BE LOADED: tensors blk.0.ffn_up.weight, blk.1.ffn_up.weight" in run(half).stdout
    odd = ("blk.0.ffn_up.weight", np.zeros((1, 40), np.uint8), gguf.GGMLQuantizationType.Q8_1)
    other = rewrite(
        HERE / "e2b-f32.gguf", tmp_path / "other.gguf", lambda es: [odd if e[0] == odd[0] else e for e in es]
    )
    (problem,) = inspect(other).problems
    assert problem.startswith("tensor blk.0.ffn_up.weight is Q8_1, which can't be loaded yet; take a file in one of")
    assert inspect(HERE / "26b-a4b-split-mix.gguf").problems == []


def test_unused_tensors_are_named(tmp_path: Path) -> None:
    extra = ("v.patch_embd.weight", np.ones((2, 3), np.float32), gguf.GGMLQuantizationType.F32)
    file = rewrite(HERE / "e2b-f32.gguf", tmp_path / "more.gguf", lambda entries: [*entries, extra])
    assert "Unused tensors: v.patch_embd.weight" in run(file).stdout
