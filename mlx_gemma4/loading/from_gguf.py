"""A GGUF file as a source of tensors."""

from __future__ import annotations

from functools import partial
from math import prod

import mlx.core as mx
import numpy as np

from ..files.gguf import GGUFFile, TensorInfo
from ..memory import Holding, on_cpu
from ..ops import pack
from ..ops.dispatch import Kernels
from ..ops.stock import Weight
from ..quant import formats
from .tensors import Entry, Source, Spec

# The tensors of a GGUF


def gguf_source(file: GGUFFile) -> Source:
    """The tensors of an open GGUF: rows of raw blocks are joined, then packed or expanded, then let go."""

    def read(names: list[str], spec: Spec, holding: Holding, kernels: Kernels | None) -> Weight:
        infos = [file.tensors[name] for name in names]
        for info in infos:
            formats.check_supported(info, file.path)
        weight = _read_blocks(file, infos, spec, holding, kernels)
        if isinstance(weight, mx.array):
            mx.eval(weight)
        for name in names:
            file.release(name)
        return weight

    def packed_bytes(name: str, spec: Spec) -> int:
        info = file.tensors[name]
        widened = info.type not in formats.FORMATS and spec.role == "matrix" and on_cpu()
        return 4 * prod(spec.shape) if widened else info.n_bytes

    entries = {name: Entry(t.shape, t.type, t.n_bytes) for name, t in file.tensors.items()}
    return Source(str(file.path), entries, read, packed_bytes)


def _read_blocks(
    file: GGUFFile, infos: list[TensorInfo], spec: Spec, holding: Holding, kernels: Kernels | None
) -> Weight:
    """One weight from the raw rows of one tensor, or of several of the same type and row length."""
    first, shape, raw = infos[0], infos[0].shape, file.raw(infos[0].name)
    parts = [raw]
    if len(infos) > 1:
        # Experts are joined one by one: [E, N, bytes], not all gates before all ups.
        parts = [file.raw(info.name).reshape(*info.shape[:-1], info.row_bytes) for info in infos]
        shape = (*shape[:-2], sum(info.shape[-2] for info in infos), shape[-1])
    if first.type in formats.FORMATS and (holding == "packed" or spec.role == "table"):
        # A tensor may be half the file: its pages go as they are read, where there is one.
        let_go = partial(file.release, first.name) if len(infos) == 1 else None
        return pack.pack_on_gpu(parts, first.type, shape, kernels, let_go)
    if len(parts) > 1:
        raw = np.concatenate(parts, axis=-2).reshape(-1, first.row_bytes)
    if spec.role == "vector" or holding == "dense" or (spec.role == "matrix" and on_cpu()):
        return formats.dense(raw, first.type, shape, np.float32)
    return formats.dense(raw, first.type, shape, None)
