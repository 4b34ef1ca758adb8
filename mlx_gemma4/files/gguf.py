"""Open a GGUF file: metadata and tensor directory out, tensor bytes as views of the memory map.

In: the path of a GGUF (version 2 or 3, little-endian), or of any part of a split one. Out: a `GGUFFile`. It knows the
container only: `quant` knows what a tensor's bytes mean, `config` what a key means. Nothing in the file is trusted:
each length is checked against the bytes that are there before anything is read or allocated, and every failure is an
`InputError` that names the file. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import re
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError, reason
from ..paths import check_source
from .cached import where_to_get

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4  # ggml's own limit
# What names of files cut in pieces end with: x.gguf.part1of2, x.gguf.part-00001-of-00003, x.gguf.001, x.gguf.aa, ..
PIECE = re.compile(r"(?<=\.gguf)([._-]?(part|split|chunk|piece)[\w.-]*|[._-]\d+(of\d+)?|\.[a-z]{2})$", re.IGNORECASE)
MAX_KEY_BYTES = 65535  # the specification's limit on a key; used for tensor names too


class TensorType(NamedTuple):
    """The storage of one ggml type: `block_size` values in `block_bytes` bytes."""

    name: str
    block_size: int
    block_bytes: int


# Every type that ggml has in use (numbers of ggml.h, sizes of ggml-common.h): number, name, block size, block bytes.
# fmt: off
TENSOR_TYPES = {number: TensorType(name, size, n_bytes) for number, name, size, n_bytes in (
    (0, "F32", 1, 4), (1, "F16", 1, 2), (30, "BF16", 1, 2), (28, "F64", 1, 8),
    (24, "I8", 1, 1), (25, "I16", 1, 2), (26, "I32", 1, 4), (27, "I64", 1, 8),
    (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22), (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34), (9, "Q8_1", 32, 40), (41, "Q1_0", 128, 18), (42, "Q2_0", 64, 18),
    (10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110), (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176), (14, "Q6_K", 256, 210), (15, "Q8_K", 256, 292),
    (19, "IQ1_S", 256, 50), (29, "IQ1_M", 256, 56), (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74), (22, "IQ2_S", 256, 82), (18, "IQ3_XXS", 256, 98),
    (21, "IQ3_S", 256, 110), (20, "IQ4_NL", 32, 18), (23, "IQ4_XS", 256, 136),
    (34, "TQ1_0", 256, 54), (35, "TQ2_0", 256, 66), (39, "MXFP4", 32, 17), (40, "NVFP4", 64, 36),
)}
# fmt: on

# Metadata value types: number -> struct letter (the same letter is the numpy dtype). 8 is string, 9 is array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY, BOOL = 8, 9, 7


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the tensor directory.

    `shape` is in numpy order: [N, K] rows first, experts [E, N, K]. `offset` is in bytes from the start of file number
    `part` (0 unless the file is split). `row_bytes` is the size of a row of K values.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    row_bytes: int
    n_bytes: int
    part: int
    offset: int


@dataclass(frozen=True, eq=False)
class GGUFFile(AbstractContextManager["GGUFFile"]):
    """An open GGUF: `metadata`, `tensors` in file order, and their bytes.

    metadata: numbers and bools as Python's, strings as str, arrays of numbers or bools as numpy arrays, arrays of
    strings as list[str]. Of a split file it is the first part's.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    maps: list[mmap.mmap]  # of its parts

    @property
    def n_bytes(self) -> int:
        """The size of all parts together."""
        return sum(map(len, self.maps))

    def raw(self, name: str) -> np.ndarray:
        """Return the tensor's bytes as they are in the file: uint8 [rows, row_bytes], read-only, not copied."""
        t = self.tensors[name]
        flat = np.frombuffer(self.maps[t.part], np.uint8, t.n_bytes, t.offset)
        return flat.reshape(-1, t.row_bytes)

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Drop bytes [start, stop) of the tensor (default: all) from this process's resident set.

        Whole pages are dropped, with neighbours' bytes; a later read fetches them from the file again.
        """
        t = self.tensors[name]
        buf = self.maps[t.part]
        first = (t.offset + start) // mmap.PAGESIZE * mmap.PAGESIZE
        last = min(t.offset + (t.n_bytes if stop is None else stop), len(buf))
        if last > first:
            buf.madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        """Unmap the file. Arrays from `raw` keep their part mapped as long as they live."""
        for buf in self.maps:
            with suppress(BufferError):  # an array still views it; the map is freed with the last of them
                buf.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def open_gguf(path: str | Path) -> GGUFFile:
    """Open a GGUF file, or all parts of a split one when given any of them. Raises InputError only."""
    path = Path(path)
    with ExitStack() as maps:
        first = read_file(path, maps)
        names = split_paths(path, first.metadata)
        splits = [first if p == path else read_file(p, maps) for p in names]
        tensors = join_tensors(names, splits)
        maps.pop_all()  # they stay open
    return GGUFFile(path, splits[0].metadata, tensors, [split.map for split in splits])


# ---- split files: name-00001-of-00003.gguf, each part a GGUF with keys split.no, split.count, split.tensors.count ----


class SplitFile(NamedTuple):
    """One parsed file of a split GGUF (or the only one): its open map, metadata and directory."""

    map: mmap.mmap
    metadata: dict[str, Any]
    tensors: list[TensorInfo]


def split_paths(path: Path, metadata: dict[str, Any]) -> list[Path]:
    """Return the paths of all parts in order ([path] for a file that isn't split). InputError if one is missing."""
    count = metadata.get("split.count", 1)
    if not isinstance(count, int) or not 0 <= count <= 99999:
        raise InputError(f"{path}: split.count is {count!r}, not a number of parts; download the file again")
    if count <= 1:
        return [path]
    name = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if not name or int(name[3]) != count or not 1 <= int(name[2]) <= count:
        raise InputError(
            f"{path}: is one of {count} parts of a split GGUF, but its name does not say which;"
            f" name the parts NAME-00001-of-{count:05d}.gguf and so on"
        )
    names = [path.with_name(f"{name[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [p.name for p in names if p != path and not p.exists()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{path}: part {missing[0]}{more} of this split GGUF is missing; put all parts in one folder")
    return names


def join_tensors(names: list[Path], splits: list[SplitFile]) -> dict[str, TensorInfo]:
    """Return one directory of all parts' tensors; a name may occur once.

    Each part's number must agree with its name, and together they must have all tensors.
    """
    tensors: dict[str, TensorInfo] = {}
    for i, (path, split) in enumerate(zip(names, splits, strict=True)):
        found = split.metadata.get("split.no"), split.metadata.get("split.count")
        if len(names) > 1 and found != (i, len(names)):
            raise InputError(
                f"{path}: should be part {i + 1} of {len(names)} but says split.no={found[0]}, split.count={found[1]};"
                " the parts are mixed up, download them again"
            )
        for t in split.tensors:
            if t.name in tensors:
                raise InputError(f"{path}: two tensors are named {t.name!r}; the file is damaged")
            tensors[t.name] = replace(t, part=i)
    total = splits[0].metadata.get("split.tensors.count", len(tensors))
    if len(names) > 1 and total != len(tensors):
        raise InputError(f"{names[0]}: the parts hold {len(tensors)} tensors, not {total}; download them again")
    return tensors


# ---- one file ----


def read_file(path: Path, maps: ExitStack) -> SplitFile:
    """Map one file, which `maps` closes, and parse its header."""
    try:
        buf = maps.enter_context(open_map(path))
        return SplitFile(buf, *read_header(Reader(path, buf)))
    except InputError:
        if path.is_file() and PIECE.search(path.name):
            whole = PIECE.sub("", path.name)
            ending = path.name[len(whole) :]
            start = re.split(r"\d", ending)[0] if re.search(r"\d", ending) else ending[0]
            raise InputError(
                f"{path}: is a piece of a file by its name; join all pieces in order first: "
                f"cat {whole}{start}* > {whole}"
            ) from None
        raise


def open_map(path: Path) -> mmap.mmap:
    """Map the whole file, read-only."""
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder; give the .gguf file in it")
        if path.exists():
            check_source(path, "a .gguf file")
        with open(path, "rb") as f:
            f.seek(0, 2)
            if f.tell() == 0:
                raise InputError(f"{path}: the file is empty; download it again")
            return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {where_to_get(path)}") from None
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: can't be read: {reason(e)}") from None


class Reader:
    """A cursor over the bytes of a file that never reads past its end."""

    def __init__(self, path: Path, buf: mmap.mmap) -> None:
        self.path = path
        self.buf = buf
        self.size = len(buf)
        self.at = 0

    def error(self, what: str) -> InputError:
        return InputError(f"{self.path}: {what}")

    def truncated(self, what: str) -> InputError:
        return self.error(f"ends inside {what}, after {self.size} bytes; it is cut short or damaged, download it again")

    def need(self, n: int, what: str) -> int:
        """Move past the next n bytes and return where they start."""
        start = self.at
        if n > self.size - start:
            raise self.truncated(what)
        self.at = start + n
        return start

    def number(self, letter: str, what: str) -> Any:
        layout = struct.Struct("<" + letter)
        return layout.unpack_from(self.buf, self.need(layout.size, what))[0]

    def name(self, what: str) -> str:
        """Read a key or tensor name: short, and UTF-8."""
        n = self.number("Q", what)
        if not 0 < n <= MAX_KEY_BYTES:
            raise self.error(f"{what} is {n} bytes long, which none is; the file is damaged, download it again")
        start = self.need(n, what)
        try:
            return self.buf[start : start + n].decode()
        except UnicodeDecodeError:
            raise self.error(f"{what} is not UTF-8; the file is damaged, download it again") from None

    def string(self, what: str) -> str:
        n = self.number("Q", what)
        start = self.need(n, what)
        return self.buf[start : start + n].decode("utf-8", "replace")

    def strings(self, count: int, what: str) -> list[str]:
        """Read an array of strings. The loop runs 777,000 times for Gemma's vocabulary, so it only reads."""
        if count > (self.size - self.at) // 8:
            raise self.truncated(what)
        out: list[str] = []
        add, unpack, buf, end = out.append, struct.Struct("<Q").unpack_from, self.buf, self.at
        try:
            for _ in range(count):
                start = end + 8
                end = start + unpack(buf, end)[0]
                add(buf[start:end].decode("utf-8", "replace"))
        except (struct.error, OverflowError, IndexError):  # after a length that points past the end
            raise self.truncated(what) from None
        self.need(end - self.at, what)
        return out

    def array(self, what: str) -> np.ndarray | list[str]:
        kind, count = self.number("I", what), self.number("Q", what)
        if kind == STRING:
            return self.strings(count, what)
        if kind not in SCALARS:
            problem = "is an array of arrays" if kind == ARRAY else f"has unknown type {kind}"
            raise self.error(f"{what} {problem}, which is not supported; the file is damaged or too new")
        dtype = np.dtype("u1" if kind == BOOL else "<" + SCALARS[kind])
        start = self.need(count * dtype.itemsize, what)
        values: np.ndarray = np.frombuffer(self.buf, dtype, count, start).copy()  # a view would keep the file mapped
        return values.astype(bool) if kind == BOOL else values

    def value(self, what: str) -> Any:
        kind = self.number("I", what)
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what)
        if kind not in SCALARS:
            raise self.error(f"{what} has unknown type {kind}; the file is damaged or too new")
        return self.number(SCALARS[kind], what)


def read_header(r: Reader) -> tuple[dict[str, Any], list[TensorInfo]]:
    """Parse everything before the tensor data, and check that the data is there."""
    check_magic_and_version(r)
    n_tensors, n_keys = r.number("Q", "the header"), r.number("Q", "the header")
    # The smallest entry of each kind: a key of 1 byte with a value of 1 byte; a name of 1 byte without dimensions.
    for n, smallest, what in ((n_keys, 14, "keys"), (n_tensors, 25, "tensors")):
        if n > (r.size - r.at) // smallest:
            raise r.error(f"declares {n} {what}, more than {r.size} bytes can hold; it is cut short or damaged")

    metadata: dict[str, Any] = {}
    for i in range(n_keys):
        key = r.name(f"metadata key {i}")
        if key in metadata:
            raise r.error(f"metadata key {key!r} occurs twice; the file is damaged")
        metadata[key] = r.value(f"metadata value {key!r}")

    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise r.error(f"general.alignment is {alignment!r}, not a power of two; the file is damaged")

    tensors = [read_tensor_info(r, i) for i in range(n_tensors)]
    data_start = -(-r.at // alignment) * alignment
    return metadata, list(locate_tensors(r, tensors, data_start, alignment))


def check_magic_and_version(r: Reader) -> None:
    magic = r.buf[:4]
    if magic == MAGIC[::-1]:
        raise r.error("is a big-endian GGUF, which is not supported; get the little-endian file")
    if magic != MAGIC:
        if r.buf[:23] == b"version https://git-lfs":
            raise r.error("is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
        raise r.error(f"is not a GGUF file (it starts with {magic!r}); give a .gguf file or a model folder")
    r.at = 4
    version = r.number("I", "the header")
    if version & 0xFFFF == 0 and version:
        raise r.error("is a big-endian GGUF, which is not supported; get the little-endian file")
    if version not in VERSIONS:
        remedy = "convert the model again with today's llama.cpp" if version < 2 else "update mlx-gemma4"
        raise r.error(f"is GGUF version {version}, and versions 2 and 3 are supported; {remedy}")


def read_tensor_info(r: Reader, index: int) -> TensorInfo:
    """One directory entry; `offset` is still relative to the start of the data."""
    name = r.name(f"the name of tensor {index}")
    what = f"tensor {name!r}"
    n_dims = r.number("I", what)
    if n_dims > MAX_DIMS:
        raise r.error(f"{what} has {n_dims} dimensions, and at most {MAX_DIMS} are possible; the file is damaged")
    dims = [r.number("Q", what) for _ in range(n_dims)] or [1]  # the fastest first, K before N
    number, offset = r.number("I", what), r.number("Q", what)
    kind = TENSOR_TYPES.get(number)
    if kind is None:
        raise r.error(f"{what} has type number {number}, which is unknown; the file is damaged or too new")
    if 0 in dims:
        raise r.error(f"{what} has shape {dims[::-1]}, which is empty; the file is damaged")
    if dims[0] % kind.block_size:
        raise r.error(
            f"{what} has rows of {dims[0]} values, no multiple of {kind.name}'s block of {kind.block_size};"
            " the file is damaged"
        )
    row_bytes = dims[0] // kind.block_size * kind.block_bytes
    n_bytes = row_bytes * prod(dims[1:])  # Python's integers don't overflow
    if n_bytes > r.size:
        raise r.error(f"{what} takes {n_bytes} bytes, and the file has {r.size}; it is cut short or damaged")
    return TensorInfo(name, tuple(dims[::-1]), kind.name, row_bytes, n_bytes, 0, offset)


def locate_tensors(r: Reader, tensors: list[TensorInfo], data_start: int, alignment: int) -> Iterator[TensorInfo]:
    """Turn offsets into file positions, in file order; refuse tensors misaligned, past the end or overlapping."""
    for t in tensors:
        if t.offset % alignment:
            raise r.error(f"tensor {t.name!r} is at offset {t.offset}, no multiple of {alignment}; the file is damaged")
        if data_start + t.offset + t.n_bytes > r.size:
            missing = data_start + t.offset + t.n_bytes - r.size
            raise r.error(
                f"is cut short: tensor {t.name!r} ends {missing} bytes after the file does; download it again"
            )
    by_offset = sorted(tensors, key=lambda t: t.offset)
    for a, b in pairwise(by_offset):
        if a.offset + a.n_bytes > b.offset:
            raise r.error(f"tensors {a.name!r} and {b.name!r} overlap; the file is damaged")
    for t in tensors:
        yield replace(t, offset=data_start + t.offset)
