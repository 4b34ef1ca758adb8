"""What all tests share: MLX on the CPU, and the built-in demo model, loaded once a process."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest

from mlx_gemma4 import LanguageModel, load


@pytest.fixture(scope="session", autouse=True)
def on_the_cpu() -> Iterator[None]:
    """The CPU in fp32 is the reference, on a Mac too. Tests of kernels take the GPU themselves where there is one."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


@pytest.fixture(scope="session")
def lm(on_the_cpu: None) -> LanguageModel:
    """The demo. Tests may not change it: other files' tests get the same object."""
    return load()
