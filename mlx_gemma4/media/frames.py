"""gemma4ua, how Gemma 4 12B hears: 640 samples, normed and projected, are a soft token.

In: samples at 16 kHz. Out: rows fp32 [n, hidden], one for 40 ms, each from its own samples alone. Formulas:
transformers' Gemma4UnifiedAudioFeatureExtractor and Gemma4UnifiedMultimodalEmbedder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import Reader
from ..loading.tensors import Entry, Spec
from . import sounds
from .content import Content
from .layers import Weights, exact_linear, project

FRAME = 640  # samples


def specs(read: Reader, hidden: int, entries: Mapping[str, Entry]) -> dict[str, Spec]:
    """Return the tower's tensors, by GGUF name; `hidden` is the text model's width."""
    return {"mm.a.input_projection.weight": Spec((hidden, FRAME), "matrix")}


def inputs(content: Content, part: Mapping[str, Any]) -> list[np.ndarray]:
    """Return the frames of each piece of a sound, fp32 [n, FRAME]."""
    return [frames(piece) for piece in sounds.pieces(content)]


def frames(samples: np.ndarray) -> np.ndarray:
    """Return samples [n] as frames, fp32 [ceil(n / FRAME), FRAME], the last one filled up with zeros."""
    return np.pad(samples, (0, -len(samples) % FRAME)).reshape(-1, FRAME)


def rows(read: Reader, weights: Weights, frames: np.ndarray) -> Iterator[mx.array]:
    """Yield the soft tokens of frames [n, FRAME], fp32 [n, hidden]. The product is fp32 whatever the weight is."""
    yield project(mx.array(frames), weights["mm.a.input_projection.weight"], exact_linear)
