"""Give a GGUF of the built-in model the tokens around pictures, and the chat template that writes them.

    python training/image_tokens.py mlx_gemma4/demo/gemma4-demo.gguf OUT.gguf

In: a file made before `vocabulary.py` had PICTURE. Out: the same with the texts and types of three unused tokens
changed, and the template of this folder. All else, the weights among it, stays byte for byte.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import gguf
from vocabulary import CONTROL, PICTURE, low_ids

TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def string(text: str) -> bytes:
    """A string as GGUF has it."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


def rewritten(path: Path) -> bytes:
    reader = gguf.GGUFReader(path)
    fields: dict[str, Any] = reader.fields
    data, whole = path.read_bytes()[reader.data_offset :], path.read_bytes()
    # The header without what pads it: it ends with the last tensor's info.
    last = reader.tensors[-1].field
    header = bytearray(whole[: last.offset + sum(part.nbytes for part in last.parts)])
    types = fields["tokenizer.ggml.token_type"]
    first = types.offset + sum(part.nbytes for part in types.parts[: types.data[0]])
    for i in PICTURE:
        header[first + 4 * i : first + 4 * i + 4] = struct.pack("<i", CONTROL)
    tokens = fields["tokenizer.ggml.tokens"].contents()
    changes = {string(tokens[i]): string(text) for i, text in PICTURE.items()}
    changes[string(fields["tokenizer.chat_template"].contents())] = string(TEMPLATE.read_text())
    for old, new in changes.items():
        assert header.count(old) == 1, old[:40]
        header = header.replace(old, new)
    return bytes(header) + bytes(-len(header) % reader.alignment) + data


def main(source: Path, target: Path) -> None:
    made = rewritten(source)
    before = gguf.GGUFReader(source)
    target.write_bytes(made)
    after = gguf.GGUFReader(target)
    assert after.fields["tokenizer.ggml.tokens"].contents()[:494] == low_ids()[0]
    assert after.fields["tokenizer.ggml.token_type"].contents()[:494] == low_ids()[1]
    for a, b in zip(before.tensors, after.tensors, strict=True):
        assert (a.name, a.tensor_type, a.data.tobytes()) == (b.name, b.tensor_type, b.data.tobytes())
    print(f"{target}: {len(made):,} bytes, weights as before")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
