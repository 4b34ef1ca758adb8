"""A KV state on disk: one safetensors file, written when asked and never else.

In: a state, or a path and a model. Out: a file, or a state that goes on where the saved one stopped. The file ends
with a SHA-256 of all before it, so that one flipped bit anywhere is found before anything is believed.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from . import ops
from .errors import InputError
from .execution import execution
from .places import whole_file
from .segments import LayerKV, Layout, Segment
from .state import KVState, coder_of

if TYPE_CHECKING:
    from .model import Model

FORMAT, VERSION = "mlx-gemma4 KV state", "2"
_TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32}
_ARRAYS = (("keys", "values"), ("codes", "scales"))  # of a segment, plain or in codes
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_DIGEST = hashlib.sha256().digest_size
_STEP = 1 << 24  # bytes hashed at a time
_fingerprints: WeakKeyDictionary[Model, str] = WeakKeyDictionary()


def fingerprint(model: Model) -> str:
    """Tells models apart that would make different keys and values: shape, norms, and some rows of the weights.

    The same however the weights are held. Hex, 64 digits.
    """
    if model in _fingerprints:
        return _fingerprints[model]
    digest = hashlib.sha256(repr(model.config).encode())
    with execution():
        rows = [ops.embed(mx.arange(0, model.config.vocab, max(1, model.config.vocab // 16)), model.weights.token_embd)]
        for layer in model.weights.layers:
            rows.append(layer.attn_norm)
            for weight in (layer.attn_q, layer.attn_k, layer.attn_output, layer.ffn_down):
                if weight is not None:
                    rows.append(ops.embed(mx.array([0]), weight))
        rows = [row.astype(mx.float32) * 1 for row in rows]  # copies, as below
        mx.eval(rows)
    for row in rows:
        digest.update(np.array(row).tobytes())
    _fingerprints[model] = digest.hexdigest()
    return _fingerprints[model]


def save_state(state: KVState, path: str | Path) -> None:
    """Write a state, without its marks, for `load_state`: to a temporary name first, then moved.

    Raises:
        InputError: the file can't be written; what was at `path` is still there.
    """
    path = Path(path)
    state.check_room(0)
    tokens = state.tokens
    with execution():
        mx.eval(state.arrays)
    try:
        with whole_file(path) as file:
            digest = hashlib.sha256()
            for block in _contents(state, tokens, fingerprint(state.model)):
                digest.update(block)
                file.write(block)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(
            f"{path}: the KV state can't be saved ({error.strerror or error}); choose another place"
        ) from error


def _contents(state: KVState, tokens: list[int], model: str) -> Iterator[Any]:
    """The file's bytes but for the checksum: length of the header, header, tensors."""
    arrays: dict[str, mx.array] = {}
    for i, kv in state.layers.items():
        for s in kv.segments:
            first, second = _ARRAYS[s.coded]
            arrays[f"layer.{i}.{first}.{s.start}"], arrays[f"layer.{i}.{second}.{s.start}"] = s.keys, s.values
        if kv.coder:
            arrays[f"layer.{i}.turn"] = kv.coder.turn
        arrays[f"layer.{i}.tail.keys"], arrays[f"layer.{i}.tail.values"] = kv.tail_keys, kv.tail_values
    ids = np.array(tokens, np.int32)
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "version": VERSION,
            "model": model,
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


def load_state(model: Model, path: str | Path) -> KVState:
    """A state as it was saved.

    Raises:
        InputError: no such file, one of another model or format, cut short, or damaged in any bit.
    """
    path = Path(path)
    data = _checked(path)
    try:
        (size,) = struct.unpack("<Q", data[:8].tobytes())
        header = json.loads(data[8 : 8 + size].tobytes())
        about = header.pop("__metadata__")
    except (ValueError, KeyError, struct.error) as error:
        raise InputError(f"{path}: is not a saved KV state; give a file that --state or save() wrote") from error
    if about.get("format") != FORMAT or about.get("version") != VERSION:
        raise InputError(
            f"{path}: is a {about.get('format')} of version {about.get('version')}, this program reads version "
            f"{VERSION} of {FORMAT}; delete it and start anew"
        )
    if about["model"] != fingerprint(model):
        raise InputError(f"{path}: was saved with another model; load that one, or delete the file and start anew")

    def raw(name: str) -> np.ndarray[Any, Any]:
        begin, end = header[name]["data_offsets"]
        return data[8 + size + begin : 8 + size + end]

    def array(name: str) -> mx.array:
        entry = header[name]
        dtype = _TYPES[entry["dtype"]]
        *rows, last = entry["shape"]
        return mx.array(raw(name).reshape(*rows, last * dtype.size)).view(dtype)

    tokens = np.frombuffer(raw("tokens").tobytes(), np.int32).tolist()
    layout, counts = Layout(*json.loads(about["layout"])), json.loads(about["counts"])
    with execution():
        layers = {}
        for i, shape in enumerate(model.config.layers):
            if shape.kv_layer == i:
                coder = coder_of(model, about["kv"], i)
                names = _ARRAYS[coder is not None]
                if coder:  # another device's may differ in its last bits
                    coder = replace(coder, turn=array(f"layer.{i}.turn"))
                starts = sorted(int(n.rsplit(".", 1)[1]) for n in header if n.startswith(f"layer.{i}.{names[0]}."))
                segments = []
                for start in starts:
                    keys, values = (array(f"layer.{i}.{which}.{start}") for which in names)
                    segments.append(Segment(start, start + keys.shape[2], keys, values))
                tail = array(f"layer.{i}.tail.keys"), array(f"layer.{i}.tail.values")
                count, skip = counts[str(i)]
                layers[i] = LayerKV(tuple(segments), *tail, count, len(tokens), coder, skip)
        dtype = next(iter(layers.values())).tail_keys.dtype
        state = KVState(model, dtype, layout=layout, kv=about["kv"])
        state.restore(layers, tokens)
        mx.eval(state.arrays)
    return state


def _checked(path: Path) -> np.ndarray[Any, Any]:
    """The file's bytes, mapped, once their checksum is found right."""
    try:
        data = np.memmap(path, np.uint8, mode="r")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; a KV state is made by saving one") from error
    except (OSError, ValueError) as error:  # an empty file can't be mapped
        raise InputError(f"{path}: can't be read as a KV state ({error}); give another file") from error
    digest = hashlib.sha256()
    for start in range(0, data.size - _DIGEST, _STEP):
        digest.update(data[start : min(start + _STEP, data.size - _DIGEST)].data)
    if data.size <= _DIGEST or digest.digest() != data[-_DIGEST:].tobytes():
        raise InputError(f"{path}: is not a KV state or is damaged (its checksum is wrong); give another file")
    return data
