"""Packing by a kernel, run by the Metal simulator, against `quant.pack`: equal to the bit."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import metal, racing
from recorded import HERE

from mlx_gemma4.config import config_from_gguf
from mlx_gemma4.files.gguf import open_gguf
from mlx_gemma4.loading.from_gguf import GGUFSource
from mlx_gemma4.loading.loader import load_model
from mlx_gemma4.ops import pack
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.op import OpKey
from mlx_gemma4.quant import formats
from mlx_gemma4.quant.formats import FORMATS, Packed

ROOM = 1 << 16


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    """No type has been tried yet, no buffer is kept."""
    pack._wrong.cache_clear()
    yield
    pack._wrong.cache_clear()
    pack.done()


def random_rows(name: str, *shape: int) -> np.ndarray:
    """uint8 [.., row_bytes]: any bytes at all, so fp16 scales that are NaN too."""
    layout = FORMATS[name].layout
    *rows, k = shape
    return np.random.default_rng([*name.encode(), *shape]).integers(
        0, 256, (*rows, k // layout.size * layout.n_bytes), np.uint8
    )


def raw_bits(a: mx.array | None) -> tuple[tuple[int, ...], bytes] | None:
    return None if a is None else (a.shape, np.array(a).tobytes())


def same(got: Packed, want: Packed) -> None:
    assert (got.format, got.shape) == (want.format, want.shape)
    for plane in ("codes", "group_scales", "block_scales"):
        a, b = getattr(got, plane), getattr(want, plane)
        assert raw_bits(a) == raw_bits(b), plane
        assert a is None or a.dtype == b.dtype


@pytest.mark.parametrize("name", FORMATS)
def test_every_type_to_the_bit(name: str) -> None:
    run, size = Kernels(metal), FORMATS[name].layout.size
    for shape in ((size,), (1, size), (7, 3 * size), (33, 5 * size), (3, 5, 2 * size)):
        raw = random_rows(name, *shape)
        same(pack.pack_on_gpu([raw], name, shape, run), formats.pack_on_cpu(raw, name, shape))
    assert not run.off


@pytest.mark.parametrize("name", FORMATS)
def test_every_type_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces end within rows, and copies within blocks."""
    monkeypatch.setattr(pack, "PIECE", 1000)
    monkeypatch.setattr(pack, "COPY", 333)
    run, size = Kernels(metal), FORMATS[name].layout.size
    for shape in ((91, 3 * size), (5, 7, 2 * size)):
        read: list[tuple[int, int]] = []
        raw = random_rows(name, *shape)
        w = pack.pack_on_gpu([raw], name, shape, run, lambda a, b: read.append((a, b)))  # noqa: B023
        same(w, formats.pack_on_cpu(raw, name, shape))
        assert read[0][0] == 0 and read[-1][1] == raw.nbytes
        assert len(read) > 1 and all(a[1] == b[0] for a, b in itertools.pairwise(read)), "each byte let go once"
    assert not run.off


@pytest.mark.parametrize("piece", [pack.PIECE, 3000])
@pytest.mark.parametrize("experts", [(), (5,)], ids=["matrices", "experts"])
def test_joined_rows(experts: tuple[int, ...], piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v have different numbers of rows; experts are joined one by one."""
    monkeypatch.setattr(pack, "PIECE", piece)
    parts = [random_rows("Q4_K", *experts, n, 512) for n in (9, 3, 4)]
    raw = np.concatenate(parts, axis=-2)
    want = formats.pack_on_cpu(raw, "Q4_K", (*experts, 16, 512))
    run = Kernels(metal)
    same(pack.pack_on_gpu(parts, "Q4_K", want.shape, run), want)
    assert not run.off
    same(pack.pack_on_gpu(parts, "Q4_K", want.shape), want)


@pytest.mark.sanitize
@pytest.mark.parametrize("name", FORMATS)
def test_races_and_bounds(name: str) -> None:
    size = FORMATS[name].layout.size
    raw = random_rows(name, 5, 3 * size)
    made = pack.pack_blocks(racing, mx.array(raw.reshape(-1)), name)
    want = formats.pack_on_cpu(raw, name, (5, 3 * size))
    for plane, a in made.items():
        assert np.array(a).tobytes() == np.array(getattr(want, plane)).tobytes()


def test_little_is_held_beside_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice is put into the array's own memory: beside the result there are a few pieces, whatever its size."""
    monkeypatch.setattr(pack, "PIECE", ROOM)
    shape = (400, 4096)
    raw = random_rows("Q8_0", *shape)
    run = Kernels(metal)
    pack.pack_on_gpu([raw[:1]], "Q8_0", (1, 4096), run)  # the trial is over
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    w = pack.pack_on_gpu([raw], "Q8_0", shape, run)
    assert raw.nbytes > 20 * ROOM
    assert mx.get_peak_memory() - before < w.nbytes + 6 * ROOM
    same(w, formats.pack_on_cpu(raw, "Q8_0", shape))


def test_the_host_copies_each_byte_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Mac, where numpy's views of MLX's arrays show: from the file to where the kernel reads."""
    monkeypatch.setattr(pack, "PIECE", ROOM)
    run, parts = Kernels(metal), [random_rows("Q4_K", n, 1024) for n in (300, 100)]
    pack.pack_on_gpu([parts[0][:1]], "Q4_K", (1, 1024), run)  # the trial is over
    copied: list[int] = []
    copyto = np.copyto
    monkeypatch.setattr(np, "copyto", lambda to, source: (copied.append(source.nbytes), copyto(to, source)))
    monkeypatch.setattr(pack, "mx", SimpleNamespace(**{**vars(mx), "array": None}))  # which would copy again
    pack.pack_on_gpu(parts, "Q4_K", (400, 1024), run)
    monkeypatch.undo()
    assert sum(copied) == sum(part.nbytes for part in parts) > 3 * ROOM
    assert not run.off


def ill(how: str) -> Any:
    """A launcher whose pack kernel is wrong for some blocks, or can't be compiled, or fails when it runs."""

    def launcher(**declared: Any) -> Any:
        kernel = metal(**declared)
        if how == "does not compile":
            raise RuntimeError("error: use of undeclared identifier\n  in line 3")

        def call(**arguments: Any) -> Any:
            if how == "raises":
                raise RuntimeError("no such function")
            made = kernel(**arguments)
            plane = ["codes", "group_scales", "block_scales"].index(how)
            bits = made[plane].view(mx.uint8)
            bits[-1] = bits[-1] ^ 1
            made[plane] = bits.view(made[plane].dtype)
            return made

        return call

    return launcher


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("codes", "gives wrong bits"),
        ("group_scales", "gives wrong bits"),
        ("block_scales", "gives wrong bits"),
        ("raises", "no such function"),
        ("does not compile", "error: use of undeclared identifier in line 3"),
    ],
)
def test_a_wrong_kernel_is_found_before_it_is_used(how: str, why: str, caplog: pytest.LogCaptureFixture) -> None:
    run, raw = Kernels(ill(how)), random_rows("Q4_K", 4, 512)
    for _ in range(2):
        same(pack.pack_on_gpu([raw], "Q4_K", (4, 512), run), formats.pack_on_cpu(raw, "Q4_K", (4, 512)))
    assert run.off == {OpKey("pack", "Q4_K")}
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert lines == [f"Kernel pack Q4_K fails here and is off, the CPU does its work instead: {why}"]


def test_what_is_off_stays_off() -> None:
    def never(**_: Any) -> Any:
        raise AssertionError

    raw = random_rows("Q6_K", 2, 256)
    for off in (OpKey("pack"), OpKey("pack", "Q6_K")):
        run = Kernels(never, frozenset([off]))
        same(pack.pack_on_gpu([raw], "Q6_K", (2, 256), run), formats.pack_on_cpu(raw, "Q6_K", (2, 256)))
        assert run.off == {off}


def test_bytes_that_do_not_fit_the_shape() -> None:
    raw = random_rows("Q4_K", 2, 256)
    for shape in ((3, 256), (2, 512), (2, 128)):
        with pytest.raises(ValueError, match="no tensor of shape"):
            pack.pack_on_gpu([raw], "Q4_K", shape, Kernels(metal))


@pytest.mark.parametrize("file", ["12b-q4_k_m", "26b-a4b-split-mix"])
def test_a_model_is_the_same(file: str, tmp_path: Path) -> None:
    def weights(kernels: Kernels | None) -> dict[str, Any]:
        with open_gguf(next(HERE.glob(f"{file}*.gguf"))) as gguf:
            config = config_from_gguf(gguf.metadata, file)
            made = load_model(config, GGUFSource(gguf), "packed", kernels=kernels)[0].weights
        flat = {f"{i}.{k}": w for i, layer in enumerate(made.layers) for k, w in vars(layer).items()}
        return flat | {k: w for k, w in vars(made).items() if k != "layers"}

    run = Kernels(metal)
    got, want = weights(run), weights(None)
    assert not run.off
    packed = [name for name, w in want.items() if isinstance(w, Packed)]
    assert len(packed) > 5
    for name in packed:
        same(got[name], want[name])


@pytest.mark.parametrize("name", ["Q4_K", "MXFP4"])
def test_the_twin_where_the_host_must_not_write_to_arrays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_rows(name, 3, 5, 256)
    want = formats.pack_on_cpu(raw, name, (3, 5, 256))
    monkeypatch.setattr(formats, "writes_show", lambda: False)
    same(formats.pack_on_cpu(raw, name, (3, 5, 256)), want)
