"""Packing on a GPU: a tensor's blocks go over as the file has them, and pack.metal rearranges them there.

In: raw blocks in host memory, mapped files mostly. Out: `Packed`, to the bit as `formats.pack_on_cpu`, the reference.
The host copies each byte once, on all cores, and computes nothing: from the file's pages into an array of MLX's on a
Mac, on NVIDIA into pinned memory, from where it is sent into such an array. A large tensor goes in pieces, so that
little is held beside the result: a few times PIECE.

A wrong kernel here would spoil a model without a trace. So in every process each type's kernel first packs a few random
blocks; a type whose kernel fails or differs from the reference is packed by the reference.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from math import prod
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..gpu.cuda_driver import Upload
from ..gpu.render import Kernel, Launcher, cuda_launcher, prepare, render
from ..memory import on_cpu
from ..quant import formats
from ..quant.formats import FORMATS, Packed, Shape
from ..quant.repack import BlockLayout, Bytes, Words, in_threads
from .cases import Case, Check, Sizes, cases, random_bytes
from .dispatch import Kernels
from .op import OpKey
from .packed import PLANES

log = logging.getLogger("mlx_gemma4")

PIECE = 1 << 25  # bytes of blocks that go over at once
COPY = 1 << 21  # bytes that a thread of the host copies at once
CACHED = 16 * PIECE  # most bytes of results of pieces that MLX keeps on NVIDIA: to free memory there takes long
TRIAL = 333  # blocks

Planes = dict[str, mx.array]  # by the names that `Packed` has for them

_local = threading.local()


def pack_on_gpu(
    parts: Sequence[np.ndarray],
    type: str,
    shape: Shape,
    run: Kernels | None = None,
    on_read: Callable[[int, int], object] | None = None,
) -> Packed:
    """One packed weight from the blocks of one tensor, or of several whose rows are joined.

    Args:
        parts: uint8 [.., N, row_bytes] each; N may differ. Of experts [E, N, row_bytes], rows are joined one expert
            after the other.
        type: a name in FORMATS.
        shape: of the result: [N, K] or [E, N, K], or [K].
        run: kernels to use; one that fails is added to its `off`. None: the reference.
        on_read: as for `pack_on_cpu`, where there is one part.
    """

    def reference() -> Packed:
        raw = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-2)
        return formats.pack_on_cpu(raw, type, shape, on_read)

    if run is None:
        return reference()
    kernel = partial(_by_kernel, parts, type, shape, run.launcher, on_read)
    return run.attempt(kernel, reference, OpKey("pack", type), instead="the CPU does its work instead")


def done() -> None:
    """Free the buffers kept for packing."""
    _local.__dict__.clear()
    mx.clear_cache()


class Place(NamedTuple):
    """Where PIECE bytes of blocks go: written by threads of the host, then read by a kernel."""

    bytes: Bytes
    array: mx.array | None = None  # has what is written there; None: MLX copies it
    address: int = 0  # of the array on the GPU
    upload: Upload | None = None  # sends it there


def places(launcher: Launcher) -> list[Place]:
    """Return places that take turns: while the kernel is at one, the host is at the other."""
    if launcher is cuda_launcher:
        try:
            upload = Upload(PIECE)
            return [Place(upload.stage, *upload.array((PIECE,)), upload) for _ in range(2)]
        except RuntimeError as error:
            _tell(error)
    elif formats.writes_show():
        arrays = [mx.zeros(PIECE, mx.uint8) for _ in range(2)]
        return [Place(np.asarray(a), a) for a in arrays]
    return [Place(np.empty(PIECE, np.uint8))]


def _tell(error: Exception) -> None:
    log.warning("Weights go to the GPU by a slower way: %s", str(error))


@cache
def pack_kernel(type: str) -> Kernel:
    """pack.metal for a type."""
    layout = FORMATS[type].layout
    form, scales = FORMATS[type], layout.block_scales
    defines: dict[str, Any] = {
        "SIZE": layout.size,
        "N_BYTES": layout.n_bytes,
        "BITS": layout.bits,
        **_code_defines(layout),
        "BLOCK_SCALES": len(scales),
        "GROUP_SCALE_BYTES": layout.group_scale_bytes,
    }
    for i, at in enumerate(scales):
        defines |= (
            {f"BLOCK_SCALE_{i}": at} if isinstance(at, int) else {"BLOCK_SCALE_NIBBLES": 1, "BLOCK_SCALE_0": at[0]}
        )
    if len(scales) == 1:
        defines["BLOCK_SCALE_1"] = 0
    if layout.group_scales:
        kind, first, _ = layout.group_scales
        number = form.group_scale_bits // (2 if form.group_scale_kind == "scale-min" else 1)
        defines |= {f"GROUP_SCALE_{kind.__name__.upper()}": 1, "GROUP_SCALE_AT": first}
        defines["NUMBER_BITS"] = 8 if number == 32 else number
    assert len(scales) <= layout.size * layout.bits // 32, "a thread for each"
    made = _planes(type)
    return render("pack", "pack.metal", mx.float32, defines, [plane for plane in PLANES if plane not in made])


def _code_defines(layout: BlockLayout) -> dict[str, str | int]:
    """How pack.metal finds codes."""
    if callable(layout.codes):
        return {f"CODE_{layout.codes.__name__.upper().removesuffix('_CODES')}": 1}
    bits, parts, words = 0, [], ""
    for i, place in enumerate(layout.codes):
        if isinstance(place, Words):
            at = f"{place.at} + (c) * {place.step}"
            words += at if i == len(layout.codes) - 1 else f"(w) == {i} ? {at} : "
        else:
            parts.append(f"take(block, c, {place.at}, {place.bits}, {place.run}) << {bits}")
            bits += place.bits
    code = f"({' | '.join(parts)})"
    return {"WORD_AT(c, w)": f"({words})"} if words else {"CODE(block, c)": f"({code} ^ 128)" if bits == 8 else code}


def pack_blocks(launcher: Launcher, raw: mx.array, type: str) -> Planes:
    """The planes of some blocks, uint8 [bytes], each flat."""
    kernel, planes, blocks = pack_kernel(type), _planes(type), raw.size // FORMATS[type].layout.n_bytes
    results = [((blocks * n,), dtype) for n, dtype in planes.values()]
    made = prepare(launcher, kernel, (-(-blocks * planes["codes"][0] // 256), 1, 1), 256, *results)(raw)
    return dict(zip(kernel.outputs, made, strict=True))


@cache
def _planes(type: str) -> dict[str, tuple[int, mx.Dtype]]:
    """The planes of a type: elements that a block makes, and their dtype."""
    layout = FORMATS[type].layout
    made: dict[str, tuple[int, mx.Dtype]] = {"codes": (layout.size * layout.bits // 32, mx.uint32)}
    made["group_scales"] = layout.group_scale_bytes, mx.uint8
    made["block_scales"] = len(layout.block_scales), mx.float16
    return {name: plane for name, plane in made.items() if plane[0]}


@cache
def _wrong(type: str, launcher: Launcher) -> str:
    """The fault of a type's kernel on some random blocks; "" if it equals the reference to the bit."""
    layout = FORMATS[type].layout
    raw = np.random.default_rng(len(type)).integers(0, 256, (TRIAL, layout.n_bytes), np.uint8)
    want = formats.pack_on_cpu(raw, type, (TRIAL, layout.size))
    try:
        made = pack_blocks(launcher, mx.array(raw.reshape(-1)), type)
        same = all(np.array_equal(_bits(made[name]), _bits(getattr(want, name))) for name in made)
    except Exception as error:  # whatever a backend's compiler or launch raises
        return str(error) or error.__class__.__name__
    return "" if same else "gives wrong bits"


def _bits(a: mx.array) -> np.ndarray:
    """Its bytes, flat."""
    return np.array(a).reshape(-1).view(np.uint8)


def _by_kernel(
    parts: Sequence[np.ndarray],
    type: str,
    shape: Shape,
    launcher: Launcher,
    on_read: Callable[[int, int], object] | None,
) -> Packed:
    if reason := _wrong(type, launcher):
        raise RuntimeError(reason)
    form, layout, slabs = FORMATS[type], FORMATS[type].layout, _slabs(parts)
    total = sum(slab.size for slab in slabs)
    if shape[-1] % layout.size or total != prod(shape) // layout.size * layout.n_bytes:
        raise ValueError(f"{total} bytes of {type} are no tensor of shape {shape}")
    step = PIECE // layout.n_bytes * layout.n_bytes
    whole: Planes = {}
    made: Planes = {}
    if total > step:  # there before any blocks are, for the reason at the end
        planes = _planes(type).items()
        whole = {name: mx.zeros((total // layout.n_bytes * n,), dtype) for name, (n, dtype) in planes}
        mx.eval(whole)
    for start in range(0, total, step):
        stop = min(start + step, total)
        piece = copied(slabs, start, stop, launcher)  # while the GPU is at the one before
        if on_read is not None and len(parts) == 1:
            on_read(start, stop)
        if made:
            _place(made, whole, start - step, type)
        made = pack_blocks(launcher, piece, type)
        mx.async_eval(made)
        del piece
    if whole:
        _place(made, whole, start, type)
    else:
        whole = made
    rows, per_row = shape[:-1], shape[-1] // layout.size
    shapes = {"block_scales": (*rows, per_row, len(layout.block_scales))}
    shaped = {name: a.reshape(shapes.get(name, (*rows, -1))) for name, a in whole.items()}
    mx.eval(shaped)
    del made, whole
    # On NVIDIA, what MLX copied of numpy's is the host's memory too, and a later result must not lie in it.
    if _local.places[0].upload is None or mx.get_cache_memory() > CACHED:
        mx.clear_cache()
    block_scales = formats.row_factors(mx.ones(rows)) if form.per_row else shaped.get("block_scales")
    return Packed(form, shape, shaped["codes"], shaped.get("group_scales"), block_scales)


def _place(made: Planes, whole: Planes, start: int, type: str) -> None:
    """Put the planes of a piece where they belong; its first byte in the file is `start`.

    The update of a slice takes over its array's memory, if the array has been evaluated and nothing else holds it.
    """
    for name, a in made.items():
        at = start // FORMATS[type].layout.n_bytes * _planes(type)[name][0]
        whole[name][at : at + a.size] = a
    mx.eval(whole)


def _slabs(parts: Sequence[np.ndarray]) -> list[Bytes]:
    """The parts' bytes in the order of the result's rows, as flat stretches."""
    if len(parts) > 1 and parts[0].ndim > 2:
        return [part[i].reshape(-1) for i in range(len(parts[0])) for part in parts]
    return [np.ascontiguousarray(part).reshape(-1) for part in parts]


def copied(slabs: list[Bytes], start: int, stop: int, launcher: Launcher) -> mx.array:
    """Bytes [start, stop) of all slabs one after the other, where a kernel reads them: until the call after next."""
    place = _next_place(launcher)
    if not _fill(place, slabs, start, stop, place.address):
        return copied(slabs, start, stop, launcher)
    return mx.array(place.bytes[: stop - start]) if place.array is None else place.array[: stop - start]


def floats_on_gpu(parts: Sequence[np.ndarray], type: str, shape: Shape, run: Kernels | None) -> mx.array | None:
    """Tensors of a type in FLOATS, joined as `pack_on_gpu` joins them. None: MLX's own way is the only one."""
    slabs = _slabs(parts)
    total, place = sum(slab.size for slab in slabs), _next_place(run.launcher) if run else Place(slabs[0])
    if place.upload is None or total < COPY:
        return None
    whole, address = place.upload.array(shape, formats.FLOATS[type])
    pieces = range(0, total, PIECE)
    sent = all(_fill(place, slabs, at, min(at + PIECE, total), address + at) for at in pieces)
    return whole if sent else None


def _next_place(launcher: Launcher) -> Place:
    if "places" not in _local.__dict__:
        _local.places = places(launcher)
    _local.places.reverse()
    place: Place = _local.places[0]
    return place


def _fill(place: Place, slabs: list[Bytes], start: int, stop: int, address: int) -> bool:
    """Copy bytes [start, stop) of all slabs to a place, and from there to an address. False: CUDA refuses, for good."""
    copies = list(_stretches(slabs, start, stop))

    def copy(i: int) -> None:
        stretch, at = copies[i]
        np.copyto(place.bytes[at : at + stretch.size], stretch)
        if place.upload:
            place.upload.send(address + at, at, stretch.size)

    try:
        try:
            in_threads(copy, range(len(copies)))
        finally:
            if place.upload:
                place.upload.wait()  # after Ctrl-C too: the array may be freed
    except RuntimeError as error:
        if not place.upload:
            raise
        _tell(error)
        _local.places = [Place(np.empty(PIECE, np.uint8))]
        return False
    return True


def _stretches(slabs: list[Bytes], start: int, stop: int) -> Iterator[tuple[Bytes, int]]:
    """The parts of slabs in [start, stop), in stretches of at most COPY, each with its place from `start` on."""
    first = 0  # byte of the slab
    for slab in slabs:
        end = min(stop, first + slab.size)
        for a in range(max(start, first), end, COPY):
            yield slab[a - first : min(a + COPY, end) - first], a - start
        first += slab.size


@cases
def pack_cases(s: Sizes) -> Iterator[Check]:
    """Packing of whole blocks, compared to the bit."""

    def make(type: str, blocks: int) -> Case:
        raw = random_bytes(blocks * FORMATS[type].layout.n_bytes)

        def reference() -> tuple[mx.array, ...]:
            w = formats.pack_on_cpu(np.array(raw), type, (blocks, FORMATS[type].layout.size))
            return tuple(a.reshape(-1) for a in (w.codes, w.group_scales, w.block_scales) if a is not None)

        def bits(made: Sequence[mx.array]) -> Sequence[mx.array]:
            return [a.view(mx.uint16) if a.dtype == mx.float16 else a for a in made]

        return Case(lambda launcher: tuple(pack_blocks(launcher, raw, type).values()), reference, 2 * raw.nbytes, bits)

    # Loading a model, which quick checks are for, packs first and tries its kernels by itself.
    for type in dict.fromkeys([*(p.type for p in s.products), s.table, s.ple_table]) if s.rows is None else ():
        if type in FORMATS:
            blocks = (1 << (14 if on_cpu() else 24)) // FORMATS[type].layout.size
            yield Check(OpKey("pack", type), f"{blocks} blocks", partial(make, type, blocks))
