"""Bytes sent to the GPU by NVIDIA's driver, which a fake plays in host memory: what is sent arrives at `wait` alone."""

from __future__ import annotations

import ctypes
import gc
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import make_synthetic
import mlx.core as mx
import numpy as np
import pytest
from kernel_cases import metal
from recorded import HERE

from mlx_gemma4.config import config_from_gguf
from mlx_gemma4.doctor.published import PUBLISHED
from mlx_gemma4.files.gguf import open_gguf
from mlx_gemma4.gpu import cuda_driver
from mlx_gemma4.gpu.cuda_driver import Upload
from mlx_gemma4.loading import from_gguf
from mlx_gemma4.loading.from_gguf import GGUFSource
from mlx_gemma4.loading.loader import load_model
from mlx_gemma4.loading.tensors import Spec
from mlx_gemma4.ops import pack
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.quant import repack
from mlx_gemma4.quant.formats import FORMATS, Packed, pack_on_cpu


class Driver:
    """libcuda.so.1, as far as an `Upload` calls it. Addresses of the GPU are the host's."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.refused: dict[str, int] = {}  # name -> number of the call that is refused
        self.memory: dict[int, Any] = {}  # pinned
        self.sent: list[tuple[int, int, int]] = []  # not yet arrived: to, from, bytes
        self.nbytes = self.shift = 0
        self.contexts: set[int] = set()  # threads that have one
        self.lock = threading.Lock()

    def __getitem__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            with self.lock:
                self.calls[name] += 1
                if self.calls[name] == self.refused.get(name):
                    self.sent *= name != "cuStreamSynchronize"  # what was under way is lost
                    return 2
                assert name in ("cuInit", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent") or (
                    threading.get_ident() in self.contexts
                ), f"{name} without a context"
                getattr(self, f"_{name}", lambda *_: None)(*arguments)
                return 0

        return call

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return self[name]

    def _cuCtxSetCurrent(self, _: Any) -> None:
        self.contexts.add(threading.get_ident())

    def _cuStreamCreate(self, made: Any, flags: int) -> None:
        made._obj.value = 7
        assert flags == 1

    def _cuMemHostAlloc(self, made: Any, size: Any, _: int) -> None:
        room = ctypes.create_string_buffer(size.value)
        made._obj.value = ctypes.addressof(room)
        self.memory[made._obj.value] = room

    def _cuMemFreeHost(self, memory: Any) -> None:
        assert not self.sent, "pinned memory is freed while it is sent"
        self.memory.pop(memory.value, None)  # a half-made one has none

    def _cuMemcpyHtoDAsync_v2(self, to: Any, source: Any, size: Any, stream: Any) -> None:
        start, room = next((a, r) for a, r in self.memory.items() if a <= source.value < a + len(r))
        assert source.value + size.value <= start + len(room) and stream.value == 7
        self.sent.append((to.value + self.shift, source.value, size.value))
        self.nbytes += size.value

    def _cuStreamSynchronize(self, _: Any) -> None:
        for to, source, size in self.sent:
            ctypes.memmove(to, source, size)
        self.sent.clear()


def address(a: mx.array) -> int:
    mx.eval(a)
    return int(np.asarray(a.view(mx.uint8)).ctypes.data)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """The driver of a machine whose GPU is the Metal simulator."""
    fake = Driver()
    monkeypatch.setattr(cuda_driver, "driver", lambda: fake)
    monkeypatch.setattr(cuda_driver, "addresses", lambda arrays: [address(a) for a in arrays])
    monkeypatch.setattr(pack, "cuda_launcher", metal)
    cuda_driver._context.cache_clear()
    pack.done()
    yield fake
    pack.done()
    gc.collect()  # an error that a thread raised, and who waited for it, know of each other
    assert not fake.memory, "pinned memory is left"
    cuda_driver._context.cache_clear()


def blocks(type: str, *shape: int) -> np.ndarray:
    layout = FORMATS[type].layout
    sizes = (*shape[:-1], shape[-1] // layout.size * layout.n_bytes)
    return np.random.default_rng(len(type)).integers(0, 256, sizes, np.uint8)


def same(got: Packed, want: Packed) -> None:
    for plane in ("codes", "group_scales", "block_scales"):
        a, b = getattr(got, plane), getattr(want, plane)
        assert (a is None) == (b is None)
        assert a is None or (a.shape == b.shape and np.array(a).tobytes() == np.array(b).tobytes()), plane


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("piece", [pack.PIECE, 3000], ids=["whole", "pieces"])
@pytest.mark.parametrize("type", ["Q4_K", "Q6_K", "Q8_0", "IQ2_XS", "NVFP4"])
def test_blocks_arrive(
    type: str, piece: int, driver: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole tensors and pieces with tails, single ones and joined experts, one after the other in the same places."""
    monkeypatch.setattr(pack, "PIECE", piece)
    monkeypatch.setattr(pack, "COPY", 333)
    run, size, total = Kernels(metal), FORMATS[type].layout.size, 0
    for shape in ((size,), (91, 3 * size), (7, 2 * size), (5, 7, 2 * size)):
        raw = blocks(type, *shape)
        read: list[tuple[int, int]] = []
        got = pack.pack_on_gpu([raw], type, shape, run, lambda a, b: read.append((a, b)))  # noqa: B023
        same(got, pack_on_cpu(raw, type, shape))
        assert read[0][0] == 0 and read[-1][1] == raw.nbytes
        total += raw.nbytes
    parts = [blocks(type, 5, n, 2 * size) for n in (4, 3)]
    same(
        pack.pack_on_gpu(parts, type, (5, 7, 2 * size), run),
        pack_on_cpu(np.concatenate(parts, axis=-2), type, (5, 7, 2 * size)),
    )
    total += sum(part.nbytes for part in parts)
    assert driver.nbytes == total + min(piece, cuda_driver.TRIED), "each byte is sent once, and those of the trial"
    assert driver.calls["cuMemHostAlloc"] == 1
    assert not run.off and not warnings(caplog)


@pytest.mark.parametrize(
    ("refused", "at"), [("cuInit", 1), ("cuMemHostAlloc", 1), ("cuStreamCreate", 1), ("cuMemcpyHtoDAsync_v2", 1)]
)
def test_a_driver_that_refuses(refused: str, at: int, driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    driver.refused[refused] = at
    run, raw = Kernels(metal), blocks("Q4_K", 40, 512)
    for _ in range(2):
        same(pack.pack_on_gpu([raw], "Q4_K", (40, 512), run), pack_on_cpu(raw, "Q4_K", (40, 512)))
    (line,) = warnings(caplog)
    assert line == f"Weights go to the GPU by a slower way: CUDA's driver refuses {refused} (status 2)"
    assert not run.off


@pytest.mark.parametrize("refused", ["cuMemcpyHtoDAsync_v2", "cuStreamSynchronize"])
def test_a_driver_that_refuses_in_the_middle(
    refused: str, driver: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pack, "PIECE", 3000)
    monkeypatch.setattr(pack, "COPY", 333)
    driver.refused[refused] = 5
    run, raw = Kernels(metal), blocks("Q4_K", 40, 512)
    same(pack.pack_on_gpu([raw], "Q4_K", (40, 512), run), pack_on_cpu(raw, "Q4_K", (40, 512)))
    assert len(warnings(caplog)) == 1
    assert not run.off


def test_bytes_that_arrive_elsewhere(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    driver.shift = 1
    run, raw = Kernels(metal), blocks("Q4_K", 4, 512)
    same(pack.pack_on_gpu([raw], "Q4_K", (4, 512), run), pack_on_cpu(raw, "Q4_K", (4, 512)))
    (line,) = warnings(caplog)
    assert line.endswith("what CUDA's driver is sent does not arrive in MLX's arrays")


@pytest.mark.parametrize(("refused", "made"), [(0, 3), (4, 0), (8, 1)])
def test_tensors_that_are_not_packed(
    refused: int, made: int, driver: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Alone and joined, in pieces with tails; MLX's own way for small ones, and for all once the driver has refused."""
    monkeypatch.setattr(pack, "PIECE", 3000)
    monkeypatch.setattr(pack, "COPY", 1000)
    driver.refused["cuMemcpyHtoDAsync_v2"] = refused
    rng, done = np.random.default_rng(0), []
    for shapes in ([(33, 64)], [(20, 64), (7, 64)], [(5, 20, 64), (5, 7, 64)], [(2, 8)]):
        parts = [rng.normal(size=shape).astype(np.float16).view(np.uint8) for shape in shapes]
        want = np.concatenate(parts, axis=-2).view(np.float16)
        got = pack.floats_on_gpu(parts, "F16", want.shape, Kernels(metal))
        done.append(got is not None and got.shape == want.shape and np.array_equal(np.array(got), want))
    assert done == [i < made for i in range(4)]
    assert len(warnings(caplog)) == (refused > 0)
    assert pack.floats_on_gpu(parts, "F16", want.shape, None) is None


@pytest.mark.parametrize("type", ["F16", "BF16"])
def test_a_file_of_floats(type: str, driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As without the driver; norms go MLX's way."""
    monkeypatch.setattr(from_gguf, "on_cpu", lambda: False)  # 16 bits are kept
    monkeypatch.setattr(pack, "COPY", 100)
    small = replace(PUBLISHED["26B-A4B"], layers=2, hidden=64, ffn=64, every=2, vocab=500, experts=4, expert_ffn=32)
    monkeypatch.setitem(PUBLISHED, "26B-A4B", replace(small, experts_used=2))
    make_synthetic.write("26B-A4B", tmp_path / "x.gguf", type=type)
    found = []
    for kernels in (Kernels(metal), None):
        with open_gguf(tmp_path / "x.gguf") as gguf:
            source = GGUFSource(gguf)
            some = [name for name, entry in source.entries.items() if entry.type == type]
            matrix = {name: Spec(source.entries[name].shape, "matrix") for name in some}
            found.append({name: source.read([name], spec, "packed", kernels) for name, spec in matrix.items()})
    assert len(some) > 10 and driver.nbytes > 50_000
    for name in some:
        a, b = (cast("mx.array", each[name]) for each in found)
        assert (a.dtype, a.shape) == (b.dtype, b.shape) and mx.array_equal(a, b).item(), name


def test_an_upload_frees_what_it_has(driver: Driver) -> None:
    upload = Upload(5000)
    array, address = upload.array((5000,))
    upload.stage[:] = 1
    upload.send(address + 4000, 3000, 1000)
    upload.wait()
    assert np.array(array).tolist() == [0] * 4000 + [1] * 1000
    del upload
    assert not driver.memory
    driver.refused["cuMemHostAlloc"] = 2
    with pytest.raises(RuntimeError, match="cuMemHostAlloc"):
        Upload(5000)
    assert driver.calls["cuStreamDestroy_v2"] == 2


def test_ctrl_c_frees_the_pinned_memory(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent from there any more; the fixture sees that nothing is left."""
    monkeypatch.setattr(pack, "PIECE", 3000)
    with open_gguf(next(HERE.glob("12b-q4_k_m*.gguf"))) as gguf:
        source, config = GGUFSource(gguf), config_from_gguf(gguf.metadata, "12b")

        def stop(done: int, total: int) -> None:
            if done > total // 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            load_model(config, source, "packed", kernels=Kernels(metal), progress=stop)
        assert driver.nbytes > 10_000 and not driver.memory


def test_no_thread_is_left_at_work() -> None:
    """Ctrl-C comes to the thread that waits; here a worker raises it."""
    ended = []

    def work(i: int) -> None:
        if i == 0:
            raise KeyboardInterrupt
        time.sleep(0.1)
        ended.append(i)

    with pytest.raises(KeyboardInterrupt):
        repack.in_threads(work, range(50))
    then = len(ended)
    time.sleep(0.25)
    assert len(ended) == then < 49


@pytest.mark.parametrize("file", ["12b-q4_k_m", "26b-a4b-split-mix"])
def test_a_model_is_the_same(file: str, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "PIECE", 30_000)
    path: Path = next(HERE.glob(f"{file}*.gguf"))
    told: list[tuple[int, int]] = []

    def load(kernels: Kernels | None) -> dict[str, Any]:
        with open_gguf(path) as gguf:
            config = config_from_gguf(gguf.metadata, file)
            made = load_model(config, GGUFSource(gguf), "packed", kernels=kernels, progress=lambda *p: told.append(p))
        flat = {f"{i}.{k}": w for i, layer in enumerate(made[0].weights.layers) for k, w in vars(layer).items()}
        return flat | {k: w for k, w in vars(made[0].weights).items() if k != "layers"}

    run = Kernels(metal)
    got, want = load(run), load(None)
    assert told == sorted(told[: len(told) // 2]) * 2 and told[-1][0] == told[-1][1]
    assert not run.off and driver.nbytes > 100_000
    for name, w in want.items():
        if isinstance(w, Packed):
            same(got[name], w)
        elif isinstance(w, mx.array):
            assert mx.array_equal(got[name], w).item(), name
