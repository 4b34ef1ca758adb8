"""The table of GPU families that launch configurations follow from: an H100's row is measured, others are guesses."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from mlx_gemma4.ops import tuning
from mlx_gemma4.ops.attention import FEW_ROWS, launch_config
from mlx_gemma4.ops.long_attention import long_launch_config
from mlx_gemma4.ops.matvec import tiling
from mlx_gemma4.ops.quantized_attention import quantized_launch_config
from mlx_gemma4.ops.tuning import Tiling, Tuning, apple, row_of, row_of_this_gpu, this_gpu
from mlx_gemma4.quant.formats import FORMATS


@pytest.fixture(autouse=True)
def _the_table_again() -> Iterator[None]:
    yield
    tuning.use(None)


@pytest.mark.parametrize(
    ("name", "architecture", "cores"),
    [
        ("Apple M1", "applegpu_g13g", 8),
        ("Apple M1 Pro", "applegpu_g13s", 16),
        ("Apple M1 Max", "applegpu_g13s", 32),
        ("Apple M1 Ultra", "applegpu_g13d", 64),
        ("Apple M4", "applegpu_g16g", 10),
        ("Apple M4 Pro", "applegpu_g16s", 20),
        ("Apple M4 Max", "applegpu_g16s", 40),
        ("Apple M3 Ultra", "applegpu_g15d", 80),
        ("Apple M12 Max", "applegpu_g99s", 40),
        ("Apple Paravirtual device", "applegpu_g13g", 10),
        ("", "applegpu_g15s", 40),
        ("", "applegpu_g14d", 80),
        ("", "applegpu_g17p", 10),
    ],
)
def test_apple_gpus_by_class(name: str, architecture: str, cores: int) -> None:
    row = row_of({"device_name": name, "architecture": architecture})
    assert row == apple(cores) and row.cores == cores and not row.measured and row.prompt_attention
    assert row.launch_operations == 4e11  # 0.15 to 0.4 s on a base M1
    assert row.attention_threadgroups == 5 * cores and row.quantized_threadgroups == 4 * cores
    assert abs(row.busy_simdgroups - 1900 / 132 * cores) <= 0.5


@pytest.mark.parametrize(
    ("info", "measured"),
    [
        ({"device_name": "NVIDIA H100 80GB HBM3", "architecture": "sm_90"}, True),
        ({"device_name": "NVIDIA H200", "architecture": "sm_90"}, True),
        ({"device_name": "NVIDIA GeForce RTX 4090", "architecture": "sm_89"}, False),
        ({"architecture": "sm_90"}, False),
    ],
)
def test_nvidia_has_an_h100s_numbers(info: dict[str, Any], measured: bool) -> None:
    assert row_of(info) == replace(Tuning(), measured=measured)


@pytest.mark.parametrize("info", [{}, {"device_name": "x86_64"}, {"architecture": "", "device_name": ""}])
def test_what_nobody_knows_has_an_h100s_numbers_too(info: dict[str, Any]) -> None:
    unknown = replace(
        Tuning(), measured=False, prompt_attention=True, launch_operations=4e11, rows_ahead=False, rows_parts=1
    )
    assert row_of(info) == unknown


@pytest.mark.parametrize(("name", "measured"), [("NVIDIA H100 80GB HBM3", True), ("Apple M4 Max", False)])
def test_a_guess_is_logged(
    name: str, measured: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mlx_gemma4")
    monkeypatch.setattr(mx, "device_info", lambda *_: {"device_name": name})
    assert row_of_this_gpu.__wrapped__().measured == measured
    assert [name in line for line in caplog.messages] == ([] if measured else [True])


def test_smaller_gpus_get_fewer_threadgroups() -> None:
    """A tenth of the cores: about a tenth of the pieces of a long context, each at least a block."""
    lengths, small = (32768, 64), apple(10)
    for gpu, least, most in ((Tuning(), 250, 400), (small, 12, 52)):
        long = long_launch_config(lengths, 8, 1, 1, 512, gpu)
        assert long.pieces(lengths) <= gpu.cores * long.resident
        assert least <= quantized_launch_config(32768, 8, 1, 64, gpu).pieces <= most
        tuning.use(gpu)
        share = FEW_ROWS.share(lengths, 4)
        assert sum(-(-n // share) for n in lengths) <= gpu.attention_threadgroups // 4
    assert launch_config((4096,), 8, 1, small).rows == 8 and launch_config((4096,), 8, 1, Tuning()).rows == 2


def test_what_was_found_comes_before_the_rules() -> None:
    q4, found = FORMATS["Q4_K"], Tiling(8, 2, 1, 2)
    tuned = replace(apple(10), tilings={("Q4_K", 4096, 2560): found})
    assert hash(tuned) == hash(apple(10)) and tuned != apple(10)
    assert tiling(q4, 4096, 2560, gpu=tuned) == found != tiling(q4, 4096, 2560, gpu=apple(10))
    for n, k, tokens in ((4096, 2560, 4), (4096, 2048, 1), (2048, 2560, 1)):
        assert tiling(q4, n, k, tokens, tuned) == tiling(q4, n, k, tokens, apple(10))
    assert tiling(FORMATS["Q6_K"], 4096, 2560, gpu=tuned) == tiling(FORMATS["Q6_K"], 4096, 2560, gpu=apple(10))


def test_launches_follow_what_is_in_use() -> None:
    before = this_gpu()
    assert before is row_of_this_gpu()
    at_first = launch_config((4096,), 8, 1)
    tuning.use(apple(10))
    assert this_gpu() == apple(10)
    assert launch_config((4096,), 8, 1) != at_first  # nothing that is kept is an earlier GPU's
    tuning.use(None)
    assert this_gpu() is before and launch_config((4096,), 8, 1) == at_first


@pytest.mark.parametrize(
    "ill", [(7, 4, 1, 1), (16, 1, 1, 1), (16, 4, 3, 4), (16, 4, 0, 4), (16, 4, 1, 17), (0, 0, 0, 0), (16, -4, 1, 1)]
)
def test_ill_tilings(ill: tuple[int, ...]) -> None:
    assert not Tiling(*ill).is_sound()
    for n, k in ((256, 256), (4096, 2560), (16384, 2048), (43008, 5376), (262144, 1536)):
        for fmt in FORMATS.values():
            assert all(tiling(fmt, n, k, gpu=gpu).is_sound() for gpu in (Tuning(), *map(apple, (8, 20, 40, 80))))
