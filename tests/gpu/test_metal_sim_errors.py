"""Kernels made wrong on purpose: the Metal simulator stops them, or their result is seen to be wrong.

The sanitizers' part runs with `pytest -m sanitize`.
"""

from __future__ import annotations

from typing import Any

import metal_sim
import numpy as np
import pytest
from metal_sim import MetalError
from sim_cases import error, launch

GROUP = 256
SUM = """
  uint t = thread_position_in_threadgroup.x, g = threadgroup_position_in_grid.x;
  threadgroup float part[8];
  float s = simd_sum(x[thread_position_in_grid.x]);
  if (thread_index_in_simdgroup == 0) part[simdgroup_index_in_threadgroup] = s;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (t == 0) { for (int i = 1; i < 8; i++) s += part[i]; y[g] = s; }
"""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
READ, WRITE = "x[thread_position_in_grid.x]", "y[g] = s;"


def row_sums(source: str, **options: Any) -> float:
    """The error of a kernel that sums 2 rows of 256."""
    x = np.random.default_rng(0).standard_normal((2, GROUP)).astype(np.float32)
    y = launch(source, {"x": x}, {"y": ((2,), np.float32)}, (2 * GROUP, 1, 1), (GROUP, 1, 1), **options)
    return error(y, x.astype(np.float64).sum(1))


def change(old: str, new: str) -> str:
    assert SUM.count(old) == 1
    return SUM.replace(old, new)


STOPPED = {  # in every run: (source, a piece of the message)
    "read past the end": (change(READ, "x[thread_position_in_grid.x + 1]"), "out of bounds at byte 2048 of `x`"),
    "read far away": (change(READ, "x[thread_position_in_grid.x + 100000]"), "out of bounds"),
    "threadgroup memory past the end": (change("i < 8", "i < 9"), "out of bounds at byte 32 of `part`"),
    "write to a const input": (change(WRITE, WRITE + " ((device float*)x)[t] = 0;"), "const buffer `x`"),
    "33 KB of threadgroup memory": (change("part[8]", "part[8448]"), "33792 bytes of threadgroup memory"),
    "barrier that one thread skips": (change(BARRIER, f"if (t != 3) {BARRIER}"), "divergent .* thread 3 "),
    "barrier that a simdgroup skips": (change(BARRIER, f"if (t >= 32) {BARRIER}"), "divergent control flow"),
    "two barriers for one": (
        change(BARRIER, f"if (t < 32) {{ {BARRIER} }}\n else {BARRIER}"),
        "thread 0 waits at line 6, thread 32 waits at line 7",
    ),
    "simd_sum of half a simdgroup": (
        change(f"float s = simd_sum({READ});", f"float s = 0;\n if (t % 32 < 16) s = simd_sum({READ});"),
        "divergent control flow",
    ),
    "return before simd_sum": (change("  float s", "  if (t == 5) return;\n  float s"), "thread 5 has returned"),
}  # fmt: skip
WRONG = {  # seen in the result
    "lost barrier": change(BARRIER, ""),
    "barrier of the simdgroup only": change(BARRIER, "simdgroup_barrier(mem_flags::mem_threadgroup);"),
    "missing lane": change(WRITE, "if (g == 0) y[g] = s;"),
    "read before the start": change(READ, "x[int(thread_position_in_grid.x) - 1]"),
    "uninitialized threadgroup memory": change("thread_index_in_simdgroup == 0", "t == 0"),
}
WIDE = """ }}
  struct Wide {{ float v[8]; }};
  threadgroup Wide room;
  if (t == 64) {{ {} }}
  if (t == 0) {{ for (int i = 0; i < 8; i++) s += 0 * room.v[i]; y[g] = s; """
SANITIZED = {  # only the sanitizers are sure: (source, a piece of the message)
    "lost barrier": (WRONG["lost barrier"], "race on threadgroup memory `part`"),
    "barrier of the simdgroup only": (WRONG["barrier of the simdgroup only"], "race on threadgroup memory `part`"),
    "barrier for other memory": (change(BARRIER, "threadgroup_barrier(mem_flags::mem_device);"), "race on threadgroup"),
    "no barrier before reuse": (
        change(WRITE, WRITE + " } if (thread_index_in_simdgroup == 0) { part[simdgroup_index_in_threadgroup] = 0;"),
        "race on threadgroup memory",
    ),
    "eight floats at once": (
        change(WRITE, WIDE.format("for (int i = 0; i < 8; i++) room.v[i] = s;")),
        "race on threadgroup memory `room`",
    ),
    "a struct at once": (change(WRITE, WIDE.format("room = Wide{{s}};")), "race on threadgroup memory `room`"),
    "two threadgroups write a place": (change("y[g]", "y[0]"), "race on buffer `y`, byte 0"),
    "two threads write a place": (change(WRITE, WRITE + " } if (t < 2) { y[g] = s;"), "race on buffer `y`"),
    "read before the start": (WRONG["read before the start"], "read of 4 bytes out of bounds at byte -4 of `x`"),
    "read in the last 16 bytes": (change("part[8]", "part[7]"), "out of bounds"),
    "misaligned vector": (
        change(WRITE, "float4 q = *(const device float4*)(x + 1 + t); y[g] = s + 0 * q.x + 0 * q.w;"), "misaligned",
    ),
    "thread array past the end": (
        change(WRITE, "float a[4] = {0}; for (uint i = 0; i < 4; i++) a[i] = i; y[g] = s + 0 * a[4 + g];"),
        "array index out of bounds",
    ),
}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_right_kernel_is_right_in_every_order(seed: int) -> None:
    assert row_sums(SUM, seed=seed) < 1e-6
    assert row_sums(change("part[8]", "part[8192]"), seed=seed) < 1e-6, "32 KB are allowed"


@pytest.mark.parametrize("name", STOPPED)
def test_stops(name: str) -> None:
    source, message = STOPPED[name]
    with pytest.raises(MetalError, match=message):
        row_sums(source)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_result(name: str) -> None:
    assert max(row_sums(WRONG[name], seed=seed) for seed in range(3)) > 1e-3


def test_unwritten_elements_are_found() -> None:
    source = "uint i = thread_position_in_grid.x; if (i % 10 != 3) { y[i] = i; h[i] = i; }"
    shapes = {"y": ((50,), np.int32), "h": ((50,), np.float16)}
    for out in launch(source, {}, shapes, (50, 1, 1), (32, 1, 1)):
        np.testing.assert_array_equal(metal_sim.unwritten(out), np.arange(3, 50, 10))


def test_one_threadgroup_has_1024_threads_at_most() -> None:
    with pytest.raises(MetalError, match="more than 1024 threads"):
        launch("y[0] = 1;", {}, {"y": ((1,), np.float32)}, (2048, 1, 1), (1025, 1, 1))


@pytest.mark.sanitize
@pytest.mark.parametrize("name", SANITIZED)
@pytest.mark.parametrize("seed", [0, 1])
def test_sanitizers_stop(name: str, seed: int) -> None:
    source, message = SANITIZED[name]
    with pytest.raises(MetalError, match=message):
        row_sums(source, sanitize="thread", seed=seed)


@pytest.mark.sanitize
@pytest.mark.parametrize("mode", ["address", "thread"])
def test_sanitizers_pass_the_right_kernel(mode: str) -> None:
    for seed in range(3):
        assert row_sums(SUM, sanitize=mode, seed=seed) < 1e-6
