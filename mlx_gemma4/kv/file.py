"""A KV state on disk: one safetensors file, written only when asked.

In: a state, or a path, and the fingerprint of a model. Out: a file, or a state that goes on where the saved one
stopped. The file ends with a SHA-256 of all before it: one flipped bit anywhere is found before anything is believed.
`mx.save_safetensors` can't write it: it puts tensors in an order of its own, so that no checksum comes last.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..errors import InputError, reason
from ..execution import execution
from ..paths import check_source, check_target, whole_file
from .quantization import BITS
from .segments import LayerKV, Segment, SegmentLayout
from .state import KVState

FORMAT, VERSION = "mlx-gemma4 KV state", "2"
_NAMES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32"}  # of dtypes
_ARRAYS = (("keys", "values"), ("codes", "scales"))  # of a segment, plain or quantized
_DIGEST = hashlib.sha256().digest_size
_STEP = 1 << 24  # bytes hashed at a time


def save_state(state: KVState, path: str | Path, fingerprint: str) -> None:
    """Write a state, without its marks, for `load_state`: to a temporary name first, then moved.

    Args:
        fingerprint: of the model; `Model.save_state` gives it.

    Raises:
        InputError: the file can't be written; what was at `path` is still there.
    """
    path = Path(path)
    check_target(path, FORMAT, "saved KV state")
    state.check_room(0)
    tokens = state.tokens
    with execution():
        mx.eval(state.arrays)
    try:
        with whole_file(path) as file:
            digest = hashlib.sha256()
            for block in _contents(state, tokens, fingerprint):
                digest.update(block)
                file.write(block)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{path}: the KV state can't be saved ({reason(error)}); choose another place") from error


def _contents(state: KVState, tokens: list[int], fingerprint: str) -> Iterator[Any]:
    """Yield the file's bytes but for the checksum: length of the header, header, tensors."""
    arrays: dict[str, mx.array] = {}
    for i, kv in state.layers.items():
        for s in kv.segments:
            first, second = _ARRAYS[s.quantized]
            arrays[f"layer.{i}.{first}.{s.start}"], arrays[f"layer.{i}.{second}.{s.start}"] = s.keys, s.values
        if kv.quantizer:
            arrays[f"layer.{i}.rotation"] = kv.quantizer.rotation
        arrays[f"layer.{i}.tail.keys"], arrays[f"layer.{i}.tail.values"] = kv.tail_keys, kv.tail_values
    ids = np.array(tokens, np.int32)
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "version": VERSION,
            "model": fingerprint,
            "layout": json.dumps([state.layout.tail, state.layout.fan, state.layout.tops]),
            "kv": state.kv,
            "counts": json.dumps({i: [kv.count, kv.skip] for i, kv in state.layers.items()}),
        }
    }
    at = 0
    sizes = [("tokens", "I32", ids.shape, ids.nbytes)]
    sizes += [(name, _NAMES[a.dtype], a.shape, a.nbytes) for name, a in arrays.items()]
    for name, dtype, shape, nbytes in (*sizes, ("sha256", "U8", (_DIGEST,), _DIGEST)):
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    yield ids.tobytes()
    for a in arrays.values():
        with execution():
            # A copy: on NVIDIA what the host reads moves, and a replayed step may know where it lies (cuda_graph.py).
            raw = mx.contiguous(a).view(mx.uint8) | mx.array(0, mx.uint8)
            mx.eval(raw)
        yield np.asarray(raw).data.cast("B")


def load_state(path: str | Path, fingerprint: str, empty: Callable[[str, mx.Dtype, SegmentLayout], KVState]) -> KVState:
    """Read a state that `save_state` wrote.

    Args:
        fingerprint: of the model; `Model.load_state` gives it.
        empty: makes an empty state of the model: (kind of KV, dtype, layout).

    Raises:
        InputError: no such file, one of another model or format, cut short, or damaged in any bit.
    """
    path = Path(path)
    _check(path)
    with execution():
        try:
            loaded = mx.load(str(path), format="safetensors", return_metadata=True)
            arrays, about = cast("tuple[dict[str, mx.array], dict[str, str]]", loaded)
        except Exception as error:  # of MLX's reader of JSON, say
            raise InputError(f"{path}: is not a saved KV state; give a file that --state or save() wrote") from error
        if about.get("format") != FORMAT or about.get("version") != VERSION:
            raise InputError(
                f"{path}: is a {about.get('format')} of version {about.get('version')}, this program reads version "
                f"{VERSION} of {FORMAT}; delete it and start anew"
            )
        if about.get("model") != fingerprint:
            raise InputError(f"{path}: was saved with another model; load that one, or delete the file and start anew")
        try:
            if sum(a.nbytes for a in arrays.values()) > path.stat().st_size:
                raise ValueError("its arrays are longer than it is")
            state = _restored(arrays, about, empty)
            mx.eval(arrays)
        except Exception as error:  # whatever an edited file leads to
            raise InputError(
                f"{path}: holds what no saved KV state does ({error}); delete it and start anew"
            ) from error
    return state


def _restored(
    arrays: dict[str, mx.array], about: dict[str, str], empty: Callable[[str, mx.Dtype, SegmentLayout], KVState]
) -> KVState:
    """Return the state of a file's arrays. Raises ValueError and others where they are not what a state has."""
    (tail, fan, tops), counts = json.loads(about["layout"]), json.loads(about["counts"])
    layout = SegmentLayout(tail, fan, tops)
    _must(1 <= layout.tail <= 4096 and 2 <= layout.fan <= 64 and 1 <= layout.tops <= 64, "layout")
    dtype = next(a.dtype for name, a in arrays.items() if name.endswith(".tail.keys"))
    _must(dtype in (mx.float32, mx.float16, mx.bfloat16), "dtype")
    state, layers = empty(about["kv"], dtype, layout), {}
    _must(arrays["tokens"].ndim == 1 and arrays["tokens"].dtype == mx.int32, "tokens")
    tokens = cast("list[int]", arrays["tokens"].tolist())
    state.config.check_ids(tokens, soft=True)
    for i, kv in state.layers.items():
        names, quantizer, shape = _ARRAYS[kv.quantizer is not None], kv.quantizer, state.config.layers[i]
        if quantizer:  # another device's may differ in its last bits
            rotation = arrays[f"layer.{i}.rotation"]
            _must((rotation.shape, rotation.dtype) == (quantizer.rotation.shape, quantizer.rotation.dtype), "rotation")
            quantizer = replace(quantizer, rotation=rotation)
        count, skip = counts[str(i)]
        _must(type(count) is int and type(skip) is int and 0 <= skip <= count <= layout.tail, "counts")
        _must((len(tokens) - count) % layout.tail == 0 and (quantizer is not None or not skip), "counts")
        starts = sorted(int(n.rsplit(".", 1)[1]) for n in arrays if n.startswith(f"layer.{i}.{names[0]}."))
        ends = [*starts[1:], len(tokens) - count + skip]
        needed = max(0, len(tokens) - state.config.window + 1) if shape.sliding else 0
        _must(0 <= min([*starts, ends[-1]]) <= needed, "segments")
        segments = []
        for start, end in zip(starts, ends, strict=False):
            keys, values = (arrays[f"layer.{i}.{which}.{start}"] for which in names)
            _must(start < end <= start + keys.shape[2] and keys.shape[:3] == values.shape[:3], "segments")
            for array, wanted in zip((keys, values), _forms(kv, state.kv), strict=True):
                _must((array.shape[:2], array.shape[3:], array.dtype) == wanted, "segments")
            segments.append(Segment(start, end, keys, values))
        tail = arrays[f"layer.{i}.tail.keys"], arrays[f"layer.{i}.tail.values"]
        _must(all((a.shape, a.dtype) == (kv.tail_keys.shape, dtype) for a in tail), "tails")
        layers[i] = LayerKV(tuple(segments), *tail, count, len(tokens), quantizer, skip)
    state.restore(layers, tokens)
    return state


def _forms(kv: LayerKV, kind: str) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], mx.Dtype]]:
    """Yield the shape before and after the tokens, and the dtype, of a segment's two arrays."""
    one, heads, _, dim = kv.tail_keys.shape
    if kv.quantizer is None:
        yield from [((one, heads), (dim,), kv.tail_keys.dtype)] * 2
    else:
        yield (one, heads), (2, dim * BITS[kind] // 32), mx.uint32
        yield (one, heads), (2,), mx.float16


def _must(so: bool, what: str) -> None:
    if not so:
        raise ValueError(f"its {what} can't be")


def _check(path: Path) -> None:
    """Raise InputError unless the checksum at the file's end is right."""
    check_source(path, "a KV state that was saved")
    try:
        data = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:  # an empty file can't be mapped
        raise InputError(f"{path}: can't be read as a KV state ({reason(error)}); give another file") from error
    digest = hashlib.sha256()
    for start in range(0, data.size - _DIGEST, _STEP):
        digest.update(data[start : min(start + _STEP, data.size - _DIGEST)].data)
    if data.size <= _DIGEST or digest.digest() != data[-_DIGEST:].tobytes():
        raise InputError(f"{path}: is not a KV state or is damaged (its checksum is wrong); give another file")
