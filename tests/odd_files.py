"""Copies of a GGUF with keys of any kind changed and tensors edited: files as they should not be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from rewrite import Edit, Entry

KINDS = gguf.GGUFValueType
F32 = gguf.GGMLQuantizationType.F32


def odd(source: Path, target: Path, keys: dict[str, Any] | None = None, edit: Edit | None = None) -> Path:
    """Write `source` to `target`. A key's value replaces the file's or is added; None takes the key out."""
    reader, keys = gguf.GGUFReader(source), keys or {}
    out = gguf.GGUFWriter(target, "")
    out.kv_data[0].clear()  # the architecture is a key like others
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in keys:
            kind = field.types[0]
            sub = field.types[-1] if kind == KINDS.ARRAY else None
            out.add_key_value(field.name, field.contents(), kind, sub_type=sub)
    for name, value in keys.items():
        if value is None:
            continue
        kind = kind_of(value)
        out.add_key_value(name, value, kind, sub_type=kind_of(value[0]) if kind == KINDS.ARRAY else None)
    entries: list[Entry] = [(t.name, np.asarray(t.data), t.tensor_type) for t in reader.tensors]
    for name, data, type_ in edit(entries) if edit else entries:
        out.add_tensor(name, np.ascontiguousarray(data), raw_dtype=type_)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return target


def kind_of(value: Any) -> gguf.GGUFValueType:
    """The GGUF kind of a Python value: whole numbers take 32 bits."""
    if isinstance(value, list):
        return KINDS.ARRAY
    kinds = {bool: KINDS.BOOL, int: KINDS.INT32, float: KINDS.FLOAT32, str: KINDS.STRING}
    return kinds[type(value)]


def plus(name: str, data: np.ndarray) -> Edit:
    """One more tensor, F32."""
    return lambda entries: [*entries, (name, data.astype(np.float32), F32)]
