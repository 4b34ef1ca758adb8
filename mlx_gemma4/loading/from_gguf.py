"""The tensors of a GGUF file, as a source for the loader.

In: an open GGUF. Out: weights, packed in the file's bits or dense. It knows nothing of a model's layers.
"""

from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import numpy as np

from ..files.gguf import GGUFFile
from ..memory import Holding, on_cpu
from ..ops import pack
from ..ops.dispatch import Kernels
from ..ops.stock import Weight
from ..quant import formats
from .tensors import Entry, Spec

INTEGERS = {"I32": "<i4", "I64": "<i8"}  # types of numbers that are no weights


class GGUFSource:
    """The tensors of an open GGUF: rows of raw blocks are joined, then packed or expanded, then released."""

    def __init__(self, file: GGUFFile) -> None:
        self.name = str(file.path)
        self.entries = {
            name: Entry(t.shape, t.type, t.n_bytes, t.type in formats.FORMATS) for name, t in file.tensors.items()
        }
        self._file = file

    def read(self, names: Sequence[str], spec: Spec, holding: Holding, kernels: Kernels | None) -> Weight:
        infos = [self._file.tensors[name] for name in names]
        integers = spec.role == "vector" and infos[0].type in INTEGERS
        for info in infos if not integers else ():
            formats.check_supported(info, self._file.path)
        first, shape, parts = infos[0], infos[0].shape, [self._file.raw(name) for name in names]
        if len(infos) > 1:
            # Experts are joined one by one: [E, N, bytes], not all gates before all ups.
            parts = [raw.reshape(*t.shape[:-1], t.row_bytes) for raw, t in zip(parts, infos, strict=True)]
            shape = (*shape[:-2], sum(info.shape[-2] for info in infos), shape[-1])
        weight: Weight
        if integers:
            weight = mx.array(parts[0].reshape(-1).view(INTEGERS[first.type]).astype(np.int32))
        elif first.type in formats.FORMATS and (holding == "packed" or spec.role == "table"):
            # A tensor may be half the file: a single one's pages are released as they are read.
            on_read = partial(self._file.release, first.name) if len(infos) == 1 else None
            weight = pack.pack_on_gpu(parts, first.type, shape, kernels, on_read)
        else:
            raw = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-2).reshape(-1, first.row_bytes)
            wide = spec.role == "vector" or holding == "dense" or (spec.role == "matrix" and on_cpu())
            weight = formats.dense(raw, first.type, shape, mx.float32 if wide else None)
            mx.eval(weight)
        for name in names:
            self._file.release(name)
        return weight
