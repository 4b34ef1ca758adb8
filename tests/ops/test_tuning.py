"""The numbers that launch configurations are fitted to: an H100's everywhere, which the log calls a guess elsewhere."""

from __future__ import annotations

import logging
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_gemma4.ops.tuning import Tuning, this_gpu


@pytest.mark.parametrize(("name", "measured"), [("NVIDIA H100 80GB HBM3", True), ("Apple M4 Max", False)])
def test_another_gpu_has_the_same_numbers_as_a_guess(
    name: str, measured: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mlx_gemma4")
    monkeypatch.setattr(mx, "device_info", lambda *_: {"device_name": name})
    tuning = this_gpu.__wrapped__()
    ours = {} if measured else {"prompt_attention": True, "launch_operations": 4e11}  # on Macs, in launches of 0.5 s
    assert tuning == replace(Tuning(), measured=measured, **ours)
    assert [name in line for line in caplog.messages] == ([] if measured else [True])
