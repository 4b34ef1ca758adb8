"""The GGUF reader: what it reads, against gguf-py and by hand; and one line for everything that is wrong."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_builder import ARRAY, GOOD_DATA, GOOD_KEYS, GOOD_TENSORS, STRING, U32, array, build, key, tensor, text

from mlx_gemma4.errors import InputError
from mlx_gemma4.files.gguf import GGUFFile, open_gguf


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    def write(content: bytes, name: str = "m.gguf") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def refused(path: Path) -> str:
    """The message of the InputError that opening raises: one line that names the file."""
    with pytest.raises(InputError) as e:
        open_gguf(path)
    message = str(e.value)
    assert "\n" not in message and message.startswith(f"{path}: ") and e.value.exit_code == 2
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("version", [2, 3])
def test_hand_written(make: Callable[..., Path], version: int) -> None:
    with open_gguf(make(build(GOOD_KEYS, GOOD_TENSORS, GOOD_DATA, version))) as g:
        assert g.metadata["general.architecture"] == "gemma4"
        assert g.metadata["a.uint32"] == 7
        assert g.metadata["a.strings"] == ["one", "", "drei ▁ü"]
        assert g.metadata["a.floats"].dtype == np.float32 and g.metadata["a.floats"].tolist() == [0.5, -1]
        assert list(g.tensors) == ["a", "b.weight"]
        a, b = g.tensors.values()
        assert (a.shape, a.type, a.row_bytes, a.n_bytes, a.part) == ((3, 4), "F32", 16, 48, 0)
        assert (b.shape, b.type, b.row_bytes, b.n_bytes) == ((2, 2, 32), "Q8_0", 34, 136)
        assert g.raw("a").shape == (3, 16) and g.raw("a").tobytes() == GOOD_DATA[:48]
        assert g.raw("b.weight").shape == (4, 34) and g.raw("b.weight").tobytes() == GOOD_DATA[64:]
        assert not g.raw("a").flags.writeable
        assert g.n_bytes == g.path.stat().st_size


SCALAR_VALUES: list[tuple[str, Any]] = [
    ("uint8", 200),
    ("int8", -5),
    ("uint16", 60000),
    ("int16", -300),
    ("uint32", 4_000_000_000),
    ("int32", -70000),
    ("float32", 0.25),
    ("uint64", 1 << 63),
    ("int64", -(1 << 40)),
    ("float64", 0.1),
    ("bool", True),
    ("string", "naïve ▁\n"),
]


def written_by_gguf_py(path: Path, **options: Any) -> gguf.GGUFWriter:
    """A file with every value type, F32, F16, Q8_0 and 3-D tensors."""
    out = gguf.GGUFWriter(path, "gemma4", **options)
    for kind, value in SCALAR_VALUES:
        getattr(out, f"add_{kind}")(f"x.{kind}", value)
    for kind, value in SCALAR_VALUES:
        if kind != "string":
            out.add_key_value(
                f"x.array.{kind}", [value] * 2, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[kind.upper()]
            )
    out.add_array("x.tokens", [f"tok{i}" * (i % 7) for i in range(1000)])
    rng = np.random.default_rng(0)
    for i in range(5):
        out.add_tensor(f"f32.{i}", rng.standard_normal((i + 1, 10)).astype(np.float32))
    out.add_tensor("f16", rng.standard_normal((3, 7)).astype(np.float16))
    for name, shape in (("matrix", (6, 64)), ("experts", (4, 3, 96))):
        q8 = gguf.quants.quantize(rng.standard_normal(shape).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        out.add_tensor(name, q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    return out


def finish(out: gguf.GGUFWriter) -> None:
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def same_tensors(g: GGUFFile, paths: list[Path]) -> None:
    """Names, shapes, types and bytes as gguf-py reads them."""
    theirs = [(part, t) for part, p in enumerate(paths) for t in gguf.GGUFReader(p).tensors]
    assert list(g.tensors) == [t.name for _, t in theirs]
    for part, t in theirs:
        mine = g.tensors[t.name]
        assert (mine.part, mine.type, mine.offset) == (part, t.tensor_type.name, t.data_offset)
        assert mine.shape == tuple(int(n) for n in reversed(t.shape))
        assert g.raw(t.name).tobytes() == t.data.tobytes()


def test_every_value_type_against_gguf_py(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    finish(written_by_gguf_py(path))
    with open_gguf(path) as g:
        for kind, value in SCALAR_VALUES:
            assert g.metadata[f"x.{kind}"] == value or kind == "float32"
            assert type(g.metadata[f"x.{kind}"]) is type(value)
        reader = gguf.GGUFReader(path)
        assert set(g.metadata) == {name for name in reader.fields if not name.startswith("GGUF.")}
        for name, value in g.metadata.items():
            theirs = reader.fields[name].contents()
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == theirs, name
        assert g.metadata["x.array.bool"].dtype == np.bool_
        same_tensors(g, [path])


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_split_file(tmp_path: Path, opened: int) -> None:
    finish(written_by_gguf_py(tmp_path / "m.gguf", split_max_tensors=3))
    parts = sorted(tmp_path.glob("m-*-of-00003.gguf"))
    assert len(parts) == 3
    with open_gguf(parts[opened]) as g:
        same_tensors(g, parts)
        assert g.metadata["x.uint32"] == 4_000_000_000, "the first part's metadata, whichever is opened"
        assert g.n_bytes == sum(p.stat().st_size for p in parts)
        g.release("experts")


def test_split_file_with_something_wrong(tmp_path: Path) -> None:
    finish(written_by_gguf_py(tmp_path / "m.gguf", split_max_tensors=3))
    first, second, third = sorted(tmp_path.glob("m-*-of-00003.gguf"))
    good = second.read_bytes()

    second.write_bytes(third.read_bytes())
    with pytest.raises(InputError, match=r"m-00002-of-00003\.gguf: should be part 2 of 3 but says split\.no=2"):
        open_gguf(first)
    second.write_bytes(good[:-40])
    with pytest.raises(InputError, match=r"m-00002-of-00003\.gguf: is cut short"):
        open_gguf(first)
    second.unlink()
    assert "part m-00002-of-00003.gguf of this split GGUF is missing" in refused(third)
    third.unlink()
    assert "m-00002-of-00003.gguf and 1 more" in refused(first)
    alone = first.rename(tmp_path / "renamed.gguf")
    assert "is one of 3 parts of a split GGUF, but its name does not say which" in refused(alone)


def test_bytes_that_are_no_utf8_in_a_token(make: Callable[..., Path]) -> None:
    """Such vocabularies exist; the token is shown as U+FFFD rather than refusing the file."""
    g = open_gguf(make(build([key("t", ARRAY, array(STRING, 1, text(b"\xff"))), key("s", STRING, text(b"a\xfe"))])))
    assert g.metadata == {"t": ["�"], "s": "a�"}


def test_no_tensors_and_no_padding(make: Callable[..., Path]) -> None:
    assert open_gguf(make(build(GOOD_KEYS, align=1))).tensors == {}


def test_other_alignments(make: Callable[..., Path]) -> None:
    for align in (1, 8, 64, 4096):
        keys = [key("general.alignment", U32, struct.pack("<I", align))]
        g = open_gguf(make(build(keys, [tensor("t", (3,), 0, 0)], b"123456789012", align=align)))
        assert g.raw("t").tobytes() == b"123456789012"


def test_arrays_outlive_the_file(make: Callable[..., Path]) -> None:
    g = open_gguf(make(build(GOOD_KEYS, GOOD_TENSORS, GOOD_DATA)))
    a = g.raw("a")
    g.close()
    g.close()
    assert a.tobytes() == GOOD_DATA[:48]


ONE_BAD = {
    "not a GGUF": (build(magic=b"PK\3\4"), r"is not a GGUF file (it starts with b'PK\x03\x04')"),
    "short": (b"GG", "is not a GGUF file"),
    "only magic": (b"GGUF", "ends inside the header, after 4 bytes"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the file itself"),
    "version 1": (build(version=1), "is GGUF version 1, and versions 2 and 3 are supported; convert"),
    "version 0": (build(version=0), "is GGUF version 0"),
    "version 9": (build(version=9), "is GGUF version 9, and versions 2 and 3 are supported; update"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian GGUF"),
    "big-endian magic": (b"FUGG" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian GGUF"),
    "2**60 tensors": (build(counts=(1 << 60, 0)), f"declares {1 << 60} tensors, more than"),
    "2**64-1 keys": (build(counts=(0, (1 << 64) - 1)), f"declares {(1 << 64) - 1} keys, more than"),
    "one key too many": (build(GOOD_KEYS, counts=(0, 5)), "metadata key 4"),
    "2**60 key": (build([struct.pack("<Q", 1 << 60) + bytes(99)]), f"metadata key 0 is {1 << 60} bytes long"),
    "empty key": (build([key("", U32, bytes(4))]), "metadata key 0 is 0 bytes long"),
    "key no utf-8": (build([key(b"\xff", U32, bytes(4))]), "metadata key 0 is not UTF-8"),
    "key twice": (build([GOOD_KEYS[1]] * 2), "metadata key 'a.uint32' occurs twice"),
    "2**60 string": (build([key("k", STRING, struct.pack("<Q", 1 << 60))]), "ends inside metadata value 'k'"),
    "2**60 strings": (build([key("k", ARRAY, array(STRING, 1 << 60, b""))]), "ends inside metadata value 'k'"),
    "2**61 numbers": (build([key("k", ARRAY, array(10, 1 << 61, b""))]), "ends inside metadata value 'k'"),
    "2**63 in strings": (
        build([key("k", ARRAY, array(STRING, 2, struct.pack("<Q", 1 << 63) + bytes(64)))]),
        "ends inside metadata value 'k'",
    ),
    "long last string": (
        build([key("k", ARRAY, array(STRING, 2, text("a") + struct.pack("<Q", 999)))]),
        "ends inside metadata value 'k'",
    ),
    "array of arrays": (build([key("k", ARRAY, array(ARRAY, 1, bytes(12)))]), "'k' is an array of arrays"),
    "value type 13": (build([key("k", 13, bytes(8))]), "metadata value 'k' has unknown type 13"),
    "array type 99": (build([key("k", ARRAY, array(99, 1, bytes(8)))]), "'k' has unknown type 99"),
    "alignment 0": (build([key("general.alignment", U32, bytes(4))]), "general.alignment is 0, not a power of two"),
    "alignment 48": (build([key("general.alignment", U32, b"0\0\0\0")]), "general.alignment is 48"),
    "alignment text": (build([key("general.alignment", STRING, text("32"))]), "general.alignment is '32'"),
    "tensor type": (build(tensors=[tensor("t", (32,), 77, 0)]), "tensor 't' has type number 77, which is unknown"),
    "withdrawn type": (build(tensors=[tensor("t", (32,), 4, 0)]), "tensor 't' has type number 4, which is unknown"),
    "5 dimensions": (build(tensors=[tensor("t", (1,) * 5, 0, 0)]), "tensor 't' has 5 dimensions"),
    "2**32-1 dims": (build(tensors=[text("t") + b"\xff" * 40]), f"tensor 't' has {(1 << 32) - 1} dimensions"),
    "dims overflow": (build(tensors=[tensor("t", (1 << 32, 1 << 32), 0, 0)]), f"takes {1 << 66} bytes"),
    "dims wrap to 0": (build(tensors=[tensor("t", (1 << 62, 4), 0, 0)]), f"takes {1 << 66} bytes"),
    "empty tensor": (build(tensors=[tensor("t", (32, 0), 0, 0)]), "tensor 't' has shape [0, 32], which is empty"),
    "K": (build(tensors=[tensor("t", (48,), 2, 0)]), "tensor 't' has rows of 48 values, no multiple of Q4_0's block"),
    "misaligned": (build(tensors=[tensor("t", (1,), 0, 4)], data=bytes(64)), "tensor 't' is at offset 4, no multiple"),
    "past the end": (build(tensors=[tensor("t", (9,), 0, 32)], data=bytes(64)), "tensor 't' ends 4 bytes after"),
    "far past": (build(tensors=[tensor("t", (9,), 0, 1 << 63)], data=bytes(64)), "is cut short: tensor 't' ends"),
    "overlap": (
        build(tensors=[tensor("a", (9,), 0, 0), tensor("b", (9,), 0, 32)], data=bytes(128)),
        "tensors 'a' and 'b' overlap",
    ),
    "name twice": (
        build(tensors=[tensor("a", (8,), 0, 0), tensor("a", (8,), 0, 32)], data=bytes(128)),
        "two tensors are named 'a'",
    ),
    "name no utf-8": (build(tensors=[tensor(b"\xff", (8,), 0, 0)]), "the name of tensor 0 is not UTF-8"),
    "split.count": (build([key("split.count", STRING, text("many"))]), "split.count is 'many', not a number of parts"),
    "split.count huge": (build([key("split.count", 10, b"\xff" * 8)]), f"split.count is {(1 << 64) - 1}"),
}


@pytest.mark.parametrize("case", ONE_BAD)
def test_refused_in_one_line(make: Callable[..., Path], case: str) -> None:
    content, message = ONE_BAD[case]
    assert message in refused(make(content))


def test_no_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.gguf").startswith("no such file; download one: mlx-gemma4 pull")
    assert refused(tmp_path) == "is a folder; give the .gguf file in it"
    empty = tmp_path / "empty.gguf"
    empty.touch()
    assert refused(empty) == "the file is empty; download it again"
    with pytest.raises(InputError, match="can't be read"):
        open_gguf("bad\0name.gguf")


def test_cut_anywhere(make: Callable[..., Path]) -> None:
    """Of a small file every prefix is refused, and says so."""
    whole = build(GOOD_KEYS, GOOD_TENSORS, GOOD_DATA)
    for n in range(4, len(whole)):
        message = refused(make(whole[:n]))
        assert any(s in message for s in ("cut short", "ends inside", "hold")), (n, message)
    open_gguf(make(whole))


def test_release_lets_pages_go(tmp_path: Path) -> None:
    """In a child: the resident set grows by what is read, and shrinks again."""
    path = tmp_path / "big.gguf"
    n = 64 << 20
    head = build(tensors=[tensor("a", (n,), 24, 0), tensor("b", (n,), 24, n)])
    with open(path, "wb") as f:
        f.write(head)
        for _ in range(2):
            f.write(np.random.default_rng(0).bytes(n))
    child = """
import sys
from mlx_gemma4.files.gguf import open_gguf
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
g = open_gguf(sys.argv[1])
start = resident()
total = int(g.raw("a").sum()) + int(g.raw("b").sum())
read = resident()
g.release("a")
half = resident()
g.release("b", 0, 32 << 20)
quarter = resident()
assert total == int(g.raw("a").sum()) + int(g.raw("b").sum()), "and it can be read again"
print(read - start, half - start, quarter - start)
"""
    if not Path("/proc/self/statm").exists():  # only Linux tells; elsewhere the calls must still work
        with open_gguf(path) as g:
            g.release("a")
            assert g.raw("a").shape == (1, n)
        return
    out = subprocess.run([sys.executable, "-c", child, str(path)], capture_output=True, text=True, check=True)
    read, half, quarter = (int(x) / n for x in out.stdout.split())
    assert read > 1.5 and half < read - 0.8 and quarter < half - 0.4  # the system may have taken some away before
