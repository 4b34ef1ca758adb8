"""A model that sees and hears, for tests: towers that make random rows of whatever bytes they are given."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from scripted import REAL

from mlx_gemma4 import LanguageModel
from mlx_gemma4.config import Kind
from mlx_gemma4.conversation.language_model import demo_path
from mlx_gemma4.files.gguf import open_gguf
from mlx_gemma4.media.projector import Media
from mlx_gemma4.model.model import Model
from mlx_gemma4.model.soft import Encoded
from mlx_gemma4.tokens.tokenizer import Tokenizer

MARKERS = ("<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>", "<|video|>")


def encoded(content: bytes, rows: int, hidden: int, kind: Kind = "image", scale: float = 1.0) -> Encoded:
    """Random rows that follow from content."""
    digest = hashlib.sha256(content + bytes([rows % 251])).digest()
    rng = np.random.default_rng(list(digest))
    return Encoded(kind, digest, mx.array(scale * rng.standard_normal((rows, hidden)).astype(np.float32)))


class FakeMedia(Media):
    """Any content is a picture of 12 rows, or of as many as the part asks for, a sound of 9, a video of two frames."""

    def __init__(self, hidden: int, kinds: Sequence[str] = ("image", "audio", "video")) -> None:
        self.path, self.hidden, self.kinds, self.encodings = Path("mmproj.gguf"), hidden, frozenset(kinds), 0
        self.kept: dict[bytes, Encoded] = {}

    def encode(self, part: Mapping[str, Any], picture: Any = None) -> list[Encoded | str]:
        kind = cast(Kind, part["type"])
        content = part[kind]
        data = Path(content).read_bytes() if isinstance(content, str | Path) else bytes(content)
        if kind == "image":
            return ["<|image>", self._encoded(data, int(part.get("tokens", 12)), kind), "<image|>"]
        if kind == "audio":
            return ["<|audio>", self._encoded(data, 9, kind), "<audio|>"]
        frames = [self._encoded(data + bytes([i]), 4, kind) for i in range(2)]
        return ["00:00 ", "<|image>", frames[0], "<image|>", " 00:01 ", "<|image>", frames[1], "<image|>"]

    def _encoded(self, data: bytes, rows: int, kind: Kind) -> Encoded:
        made = encoded(data, rows, self.hidden, kind)
        if made.digest not in self.kept:
            self.kept[made.digest] = made
            self.encodings += 1
        return self.kept[made.digest]


def seeing(
    lm: LanguageModel, kinds: Sequence[str] = ("image", "audio", "video"), model: Model | None = None
) -> LanguageModel:
    """The demo with Google's template, and a vocabulary and towers for pictures and sounds. `model`: else a new one."""
    with open_gguf(demo_path()) as gguf:
        metadata: dict[str, Any] = dict(gguf.metadata)
    tokens, types = (
        list(metadata["tokenizer.ggml.tokens"]),
        [int(kind) for kind in metadata["tokenizer.ggml.token_type"]],
    )
    free = (i for i, text in enumerate(tokens) if text.startswith("<unused"))
    for marker in (each for each in MARKERS if each not in tokens):
        i = next(free)
        tokens[i], types[i] = marker, 3
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types, "tokenizer.chat_template": REAL}
    tokenizer = Tokenizer.from_gguf(metadata)
    model = model or Model(lm.model.config, lm.model.weights)
    return replace(lm, model=model, tokenizer=tokenizer, drafts=None, media=FakeMedia(lm.config.hidden, kinds))
