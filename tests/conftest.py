"""Makes the fixtures' helper modules (tests/fixtures/*.py) importable, and keeps tests on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

sys.path.insert(0, str(Path(__file__).parent / "fixtures"))


@pytest.fixture(scope="session", autouse=True)
def on_the_cpu() -> Iterator[None]:
    """The CPU in fp32 is the reference, on a Mac too. Tests of kernels take the GPU themselves where there is one."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)
