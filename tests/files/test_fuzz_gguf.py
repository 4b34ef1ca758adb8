"""5,000 damaged headers: each is refused with an InputError or read; none hangs, crashes or takes much memory."""

from __future__ import annotations

import random
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

from gguf_builder import ARRAY, GOOD_DATA, GOOD_KEYS, GOOD_TENSORS, STRING, array, build, key, text

from mlx_gemma4.errors import InputError
from mlx_gemma4.files.gguf import open_gguf

CASES = 5000
NASTY = [0, 1, 2, 31, 32, 255, 1 << 16, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, 1 << 60, 1 << 63, (1 << 64) - 1]


def seed_files() -> list[bytes]:
    tokens = b"".join(text(f"token {i}") for i in range(50))
    keys = [*GOOD_KEYS, key("tokens", ARRAY, array(STRING, 50, tokens)), key("general.alignment", 4, b"\x20\0\0\0")]
    split = [key("split.no", 2, b"\0\0"), key("split.count", 2, b"\1\0"), key("split.tensors.count", 5, b"\2\0\0\0")]
    return [
        build(GOOD_KEYS, GOOD_TENSORS, GOOD_DATA, version=2),
        build(keys, GOOD_TENSORS, GOOD_DATA),
        build(keys + split, GOOD_TENSORS, GOOD_DATA),
    ]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to four of: a bit flipped, a byte or number overwritten, bytes removed, doubled or inserted, the end cut."""
    b = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(b))
        n = rng.randint(1, 40)
        match rng.randrange(8):
            case 0:
                b[at] ^= 1 << rng.randrange(8)
            case 1:
                b[at] = rng.randrange(256)
            case 2 | 3:  # a length or count that lies
                b[at : at + 8] = struct.pack("<Q", rng.choice(NASTY))
            case 4:
                b[at : at + 4] = struct.pack("<I", rng.choice(NASTY) & 0xFFFFFFFF)
            case 5:
                del b[at : at + n]
            case 6:
                b[at:at] = b[at : at + n] if rng.random() < 0.5 else rng.randbytes(n)
            case _:
                del b[max(at, 1) :]
        if not b:
            break
    return bytes(b)


def run(folder: Path) -> tuple[int, int, float]:
    """Open CASES damaged files; returns how many were read, how many refused, and the seconds of the slowest."""
    rng = random.Random(4)
    seeds = seed_files()
    path = folder / "m.gguf"
    read = refused = 0
    slowest = 0.0
    for i in range(CASES):
        path.write_bytes(mutate(seeds[i % len(seeds)], rng))
        start = time.process_time()
        try:
            with open_gguf(path) as g:
                for name in g.tensors:  # what is accepted must be readable to its last byte
                    g.raw(name).sum()
                    g.release(name)
            read += 1
        except InputError as e:
            refused += "\n" not in str(e) and str(e).startswith(f"{folder}")  # or the sum below is wrong
        slowest = max(slowest, time.process_time() - start)
    return read, refused, slowest


def test_damaged_headers(tmp_path: Path) -> None:
    """In a child, so that its peak memory is its own; anything but an InputError ends it."""
    for content in seed_files():
        (tmp_path / "m.gguf").write_bytes(content)
        with open_gguf(tmp_path / "m.gguf") as g:
            assert len(g.tensors) == 2
    script = [
        sys.executable,
        "-c",
        f"import sys; sys.path[:] = {sys.path}; import test_fuzz_gguf; test_fuzz_gguf.main()",
    ]
    out = subprocess.run([*script, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False)
    assert out.returncode == 0, out.stderr[-2000:]
    read, refused, slowest, grown = out.stdout.split()
    assert int(read) + int(refused) == CASES
    assert int(read) > 100 and int(refused) > 1000, "the mutations reach both sides"
    assert float(slowest) < 2
    assert int(grown) < 200_000, "KB of resident memory at the peak, beyond what was there before"


def peak_kb() -> int:
    """Peak resident set of this process in KB (macOS counts bytes)."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    # ru_maxrss begins with the parent's.
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))


def main() -> None:
    before = peak_kb()
    print(*run(Path(sys.argv[1])), peak_kb() - before)
