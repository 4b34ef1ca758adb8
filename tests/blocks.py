"""Random blocks of every quantized type, and their numbers by gguf-py."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np

from mlx_gemma4.quant.formats import FORMATS


def random_blocks(name: str, rng: np.random.Generator, count: int) -> np.ndarray:
    """uint8 [count, bytes of a block]: any bytes; scales of MXFP4 that fp32 has room for."""
    blocks = rng.integers(0, 256, (count, FORMATS[name].layout.n_bytes), np.uint8)
    if name == "MXFP4":
        blocks[:, 0] = rng.integers(0, 250, count)  # 2**127 and beyond overflow fp32 times 12
    return blocks


def put_scales(name: str, blocks: np.ndarray, scale: Any) -> None:
    """Write the fp16 numbers of blocks [.., bytes]: scale() gives one for each block, fp16 [..], at each call."""
    for at in FORMATS[name].layout.block_scales:
        bits = np.asarray(scale(), np.float16)
        if isinstance(at, tuple):  # four bits in each byte
            nibbles = bits.view(np.uint16)[..., None] >> np.array([0, 4, 8, 12], np.uint16) & 15
            blocks[..., list(at)] = blocks[..., list(at)] & 15 | nibbles.astype(np.uint8) << 4
        else:
            blocks[..., at : at + 2] = bits[..., None].view(np.uint8)


def numbers_of(name: str, raw: np.ndarray) -> np.ndarray:
    """fp32 [rows, K] of raw rows, uint8 [rows, bytes]: by gguf-py, or where it has none as ggml.h's comments say."""
    if name not in ("Q1_0", "Q2_0"):
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    bits = 1 if name == "Q1_0" else 2
    blocks = raw.reshape(-1, FORMATS[name].layout.n_bytes)
    d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    codes = (blocks[:, 2:, None] >> np.arange(0, 8, bits)) & ((1 << bits) - 1)
    values = codes.reshape(len(blocks), -1).astype(np.float32)
    return ((2 * values - 1 if bits == 1 else values - 1) * d).reshape(len(raw), -1)
