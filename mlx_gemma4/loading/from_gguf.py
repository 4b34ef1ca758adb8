"""The tensors of a GGUF file, as a source for the loader.

In: an open GGUF. Out: weights, packed in the file's bits or dense. It knows nothing of a model's layers.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np

from ..config import Config
from ..errors import InputError
from ..files.gguf import GGUFFile, TensorInfo
from ..memory import Holding, on_cpu
from ..ops import pack
from ..ops.dispatch import Kernels
from ..ops.stock import Weight
from ..quant import formats
from .tensors import Cut, Entry, Spec

INTEGERS = {"I32": "<i4", "I64": "<i8"}  # types of numbers that are no weights


class GGUFSource:
    """The tensors of an open GGUF: rows of raw blocks are joined, then packed or expanded, then released."""

    def __init__(self, file: GGUFFile, config: Config | None = None) -> None:
        """`config`: tensors that the file has joined are taken apart as it says."""
        self.name = str(file.path)
        self._file = file if config is None else replace(file, tensors=_apart(file, config))
        self.entries = {
            name: Entry(
                t.shape,
                t.type,
                t.n_bytes,
                t.type in formats.FORMATS,
                t.type in formats.SUPPORTED or (t.type in INTEGERS and len(t.shape) == 1),
                formats.BLOCKS[t.type].block_size,
            )
            for name, t in self._file.tensors.items()
        }

    def read(
        self, names: Sequence[str], spec: Spec, holding: Holding, kernels: Kernels | None, cuts: Sequence[Cut] = ()
    ) -> Weight:
        infos, cuts = [self._file.tensors[name] for name in names], cuts or [Cut()] * len(names)
        integers = spec.role == "vector" and infos[0].type in INTEGERS
        parts = [_rows(self._file.raw(t.name), t, cut) for t, cut in zip(infos, cuts, strict=True)]
        first, shape = infos[0], cuts[0].shape(infos[0].shape)
        if len(infos) > 1:  # experts are joined one by one: [E, N, bytes], not all gates before all ups
            shape = (*shape[:-2], sum(part.shape[-2] for part in parts), shape[-1])
        weight: Weight
        if integers:
            weight = mx.array(parts[0].reshape(-1).view(INTEGERS[first.type]).astype(np.int32))
        elif first.type in formats.FORMATS and (holding == "packed" or spec.role == "table"):
            # A tensor may be half the file: a single one's pages are released as they are read.
            on_read = partial(self._file.release, first.name) if len(infos) == 1 and cuts[0] == Cut() else None
            weight = pack.pack_on_gpu(parts, first.type, shape, kernels, on_read)
        else:
            wide = spec.role == "vector" or holding == "dense" or (spec.role == "matrix" and on_cpu())
            kept = not wide and first.type in formats.FLOATS
            sent = pack.floats_on_gpu(parts, first.type, shape, kernels) if kept else None
            raw = parts[0] if len(parts) == 1 or sent is not None else np.concatenate(parts, axis=-2)
            weight = formats.dense(raw, first.type, shape, mx.float32 if wide else None) if sent is None else sent
            mx.eval(weight)
        for name in names:
            self._file.release(name)
        return weight


def _apart(file: GGUFFile, config: Config) -> dict[str, TensorInfo]:
    """The directory with each attn_qkv, whose rows are those of q, k and v, as three tensors."""
    tensors = dict(file.tensors)
    for i, layer in enumerate(config.layers):
        joined = tensors.get(f"blk.{i}.attn_qkv.weight")
        if joined is None or f"blk.{i}.attn_q.weight" in tensors:
            continue
        rows = [layer.heads * layer.head_dim, *[layer.kv_heads * layer.head_dim] * 2]
        if joined.shape[:-1] != (sum(rows),):
            raise InputError(
                f"{file.path}: {joined.name} has {joined.shape[0]} rows, not {sum(rows)}; convert it again"
            )
        del tensors[joined.name]
        at = joined.offset
        for x, n in zip("qkv", rows, strict=True):
            name, n_bytes = f"blk.{i}.attn_{x}.weight", n * joined.row_bytes
            tensors[name] = replace(joined, name=name, shape=(n, joined.shape[-1]), n_bytes=n_bytes, offset=at)
            at += n_bytes
    return tensors


def _rows(raw: np.ndarray, info: TensorInfo, cut: Cut) -> np.ndarray:
    """Return rows of raw blocks, uint8 [.., N, bytes]: those that are wanted, and of each the blocks that are."""
    raw = raw.reshape(*info.shape[:-1], info.row_bytes)
    if cut.rows:
        some = [raw[..., rows.start : rows.stop, :] for rows in cut.rows]
        raw = some[0] if len(some) == 1 else np.concatenate(some, axis=-2)
    if cut.columns is not None:
        size, n_bytes = formats.BLOCKS[info.type].block_size, formats.BLOCKS[info.type].block_bytes
        raw = raw[..., cut.columns.start // size * n_bytes : cut.columns.stop // size * n_bytes]
    return raw
