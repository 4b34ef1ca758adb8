"""What all tests share: MLX on the CPU, and the built-in demo model, loaded once a process."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before numpy is imported: OpenBLAS's threads spin, and processes that test beside each other took thrice the time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import mlx.core as mx
import pytest

from mlx_gemma4 import LanguageModel, load
from mlx_gemma4.conversation import language_model

# The same examples each time: what a change breaks shows in its own run, not in a later one by chance.
hypothesis.settings.register_profile("steady", derandomize=True)
hypothesis.settings.load_profile("steady")

SIMULATOR = {"metal_sim", "kernel_cases", "kernel_models", "host_player", "sim_cases"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `sim` all tests of a module that imports something that launches kernels on the Metal simulator."""
    for item in items:
        imported = vars(item.module).values() if isinstance(item, pytest.Function) else ()
        if any((getattr(v, "__module__", None) or getattr(v, "__name__", None)) in SIMULATOR for v in imported):
            item.add_marker("sim")


@pytest.fixture(scope="session", autouse=True)
def on_the_cpu() -> Iterator[None]:
    """The CPU in fp32 is the reference, on a Mac too. Tests of kernels take the GPU themselves where there is one."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


@pytest.fixture(scope="session", autouse=True)
def nothing_learned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What drafts cost is measured anew: nothing is read from the user's files, or written there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model, "cache_folder", lambda: tmp_path_factory.getbasetemp() / "cache")
        yield


@pytest.fixture(scope="session")
def lm(on_the_cpu: None) -> LanguageModel:
    """The demo. Tests may not change it: other files' tests get the same object."""
    return load()
