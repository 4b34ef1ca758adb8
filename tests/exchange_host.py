"""Runs exchange.metal on the CPU in memory that processes share, where the simulator, whose runs have none, can't."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from metal_sim.compile import cache_dir, compiler

from mlx_gemma4.gpu.recording import RecordedLaunch
from mlx_gemma4.gpu.render import Kernel

BEFORE = """
#include <sched.h>
#include <string.h>
typedef unsigned uint;
typedef unsigned long ulong;
#define METAL_FUNC static inline
#define device
#define INPUTS_READY()
template <class To, class From> static To as_type(From from) { To to; memcpy(&to, &from, sizeof(To)); return to; }
struct Position { int x; };
"""
TYPES = {"flag": "const int*", "boxes": "const uint*", "out": "float*"}


def run(launch: RecordedLaunch, inputs: list[np.ndarray], out: np.ndarray) -> None:
    """Make a launch, thread by thread; each waits for the other ranks' same thread."""
    arrays = [*inputs, out]
    assert all(a.flags.c_contiguous for a in arrays)
    groups = launch.grid[0] // launch.threadgroup[0]
    _function(launch.kernel)(*(ctypes.c_void_p(a.ctypes.data) for a in arrays), groups, launch.threadgroup[0])


@cache
def _function(kernel: Kernel) -> ctypes._CFuncPtr:
    constants = "\n".join(
        line for line in kernel.header.splitlines() if line.startswith("#define ") and "(" not in line
    )
    helpers = kernel.header[kernel.header.index("METAL_FUNC volatile device") :].split("[[max_total")[0]
    helpers = helpers.replace("do word", "do sched_yield(), word")  # ranks may be more than this machine's cores
    names = ", ".join(f"{TYPES.get(name, 'const float*')} {name}" for name in (*kernel.inputs, *kernel.outputs))
    loops = "for (int g = 0; g < groups; g++) for (int t = 0; t < threads; t++)"
    here = "const Position threadgroup_position_in_grid = {g}; const int thread_index_in_threadgroup = t;"
    body = f'extern "C" void run({names}, int groups, int threads) {{ {loops} {{ {here}\n{kernel.source}\n}} }}'
    text = "\n".join([BEFORE, constants, helpers, body])
    made = cache_dir() / f"exchange-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "run.cpp"), Path(folder, "run.so")
            source.write_text(text)
            command = [*compiler(), "-x", "c++", "-O1", "-shared", "-fPIC", str(source), "-o", str(library)]
            env = {"ZIG_GLOBAL_CACHE_DIR": str(cache_dir() / "zig"), **os.environ, "ZIG_LOCAL_CACHE_DIR": folder}
            subprocess.run(command, check=True, env=env, capture_output=True, text=True)
            other = made.with_suffix(f".{os.getpid()}")
            other.write_bytes(library.read_bytes())
            other.replace(made)
    return ctypes.CDLL(str(made)).run
