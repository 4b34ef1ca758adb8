"""Write a GGUF of a published Gemma 4's shape with random weights, to time things without a download.

    python examples/make_synthetic.py 31b /tmp/31b.gguf [--type IQ2_XXS] [--tokenizer OTHER.gguf]
    python examples/make_synthetic.py 31b /tmp/mtp-31b.gguf --assistant [--spelling gemma4_assistant]
    python examples/make_synthetic.py 31b /tmp/mmproj-31b.gguf --mmproj [--type F16]

The tensor types are those of llama.cpp's Q4_K_M mix; with --type, one for all that it can hold, or UD-Q4_K_XL: a mix of
the kind that unsloth's files of that name are, where types differ within q, k and v and in some layers between gate and
up (which layer has which differs from file to file; these are ours). An assistant, which drafts for a model of the
shape, is in Q8_0; a projector, which it sees and hears with, in BF16 or F16, with the types that llama.cpp's converter
keeps in F32.
Random weights are repeated, so that 18 GB take seconds. `demo` is the shape of the built-in model.
"""

from __future__ import annotations

import argparse
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from mlx_gemma4.config import Config, Reader, config_from_gguf
from mlx_gemma4.doctor.published import PUBLISHED, Shape
from mlx_gemma4.files.gguf import TENSOR_TYPES, open_gguf
from mlx_gemma4.loading.tensors import Entry, tensor_specs
from mlx_gemma4.media.projector import TOWERS
from mlx_gemma4.quant.formats import FORMATS, FP4, UE4M3, dense

TYPES = {t.name: (number, t.block_size, t.block_bytes) for number, t in TENSOR_TYPES.items()}
Tensors = dict[str, tuple[tuple[int, ...], str]]
# (offset in a block, value) of each fp16 scale, such that weights have about unit variance.
SCALES = {
    "Q4_K": ((0, 1 / 200), (2, 7.5 / 200)),
    "Q6_K": ((208, 1 / 1370),),
    "Q5_0": ((0, 1 / 9),),
    "Q5_1": ((0, 1 / 9.2), (2, -15.5 / 9.2)),
    "Q5_K": ((0, 1 / 400), (2, 15.5 / 400)),
    "Q8_0": ((0, 1 / 74),),
}
UD = "UD-Q4_K_XL"
# Types of that mix: in most layers, in those that have more bits, and in every third one. Rows that are no multiple of
# 256 have Q5_1 or Q8_0.
UD_TYPES = {
    "attn_q": ("IQ4_XS", "Q5_K", "IQ4_XS"),
    "attn_k": ("Q5_K", "Q6_K", "Q5_K"),
    "attn_v": ("Q6_K", "Q8_0", "Q6_K"),
    "attn_output": ("Q5_K", "Q6_K", "Q5_K"),
    "ffn_gate": ("Q4_K", "Q4_K", "Q4_K"),
    "ffn_up": ("Q4_K", "Q4_K", "IQ4_XS"),
    "ffn_down": ("Q5_K", "Q6_K", "Q5_K"),
    "ffn_gate_up_exps": ("Q4_K", "Q5_K", "Q4_K"),
    "ffn_down_exps": ("Q5_1", "Q8_0", "Q5_1"),
}


def metadata(model: Shape, name: str) -> dict[str, Any]:
    """Return the GGUF metadata of a model of this shape, arrays as numpy's."""
    sliding = [(i + 1) % model.every != 0 for i in range(model.layers)]
    experts = {
        "expert_count": model.experts,
        "expert_used_count": model.experts_used,
        "expert_feed_forward_length": model.expert_ffn,
    }
    keys = {
        "block_count": model.layers,
        "context_length": model.context,
        "embedding_length": model.hidden,
        "feed_forward_length": np.array(model.ffns, np.int32),
        "attention.head_count": model.heads,
        **attention_keys(model, sliding),
        "attention.shared_kv_layers": model.shared,
        "embedding_length_per_layer_input": model.ple,
        "final_logit_softcapping": 30.0,
        "vocab_size": model.vocab,
        **(experts if model.experts else {}),
    }
    general = {
        "general.architecture": "gemma4",
        "general.name": f"synthetic {name}",
        "general.quantization_version": 2,
        "general.file_type": 15,
    }
    return general | {f"gemma4.{key}": value for key, value in keys.items()}


def attention_keys(model: Shape, sliding: list[bool]) -> dict[str, Any]:
    """Return the keys about attention that a model's file and its assistant's have in common."""
    return {
        "attention.head_count_kv": np.array([model.kv_heads[not s] for s in sliding], np.int32),
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": model.head_dims[1],
        "attention.value_length": model.head_dims[1],
        "attention.key_length_swa": model.head_dims[0],
        "attention.value_length_swa": model.head_dims[0],
        "attention.sliding_window": model.window,
        "attention.sliding_window_pattern": np.array(sliding),
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "rope.dimension_count": model.head_dims[1],
        "rope.dimension_count_swa": model.head_dims[0],
    }


@dataclass(frozen=True)
class AssistantShape:
    """The shape of an assistant: three sliding layers and a global one, with the target's head sizes."""

    hidden: int
    heads: int
    ffn: int
    centroids: int = 0  # in the spelling that keeps them


DEMO = Shape(10, 256, 4, (1, 1), 256, 256, 5, 5, True, 128, head_dims=(64, 128), vocab=4096, context=2048)
ASSISTANTS = {
    "E2B": AssistantShape(256, 4, 2048, 2048),
    "E4B": AssistantShape(256, 4, 2048, 2048),
    "12B": AssistantShape(1024, 16, 8192),
    "26B-A4B": AssistantShape(1024, 16, 8192),
    "31B": AssistantShape(1024, 32, 8192),
    "DEMO": AssistantShape(128, 4, 192, 128),
}
# Of a GGUF's spelling: the key of the target's hidden size, and names of the tensors that only assistants have.
SPELLINGS = {
    "gemma4-assistant": ("embedding_length_out", "nextn.pre_projection", "nextn.post_projection"),
    "gemma4_assistant": ("n_embd_backbone", "mtp.pre_projection", "mtp.post_projection"),
    "gemma4_mtp": ("backbone_embedding_length", "mtp_pre_proj", "mtp_post_proj"),
}


@dataclass(frozen=True)
class TowerShape:
    """The shape of a tower that sees or hears; without an encoder it has no layers."""

    type: str  # of TOWERS
    width: int
    ffn: int = 0
    heads: int = 0
    layers: int = 0
    positions: int = 0
    clipped: bool = False  # products have bounds
    standardized: bool = False

    @property
    def kind(self) -> str:
        return "audio" if TOWERS[self.type].kind == "audio" else "vision"


SMALL = TowerShape("gemma4v", 768, 3072, 12, 16, 10240, clipped=True)
LARGE = TowerShape("gemma4v", 1152, 4304, 16, 27, 10240, standardized=True)
CONFORMER = TowerShape("gemma4a", 1024, 4096, 8, 12, clipped=True)
PROJECTORS = {
    "E2B": (SMALL, CONFORMER),
    "E4B": (SMALL, CONFORMER),
    "12B": (TowerShape("gemma4uv", 3840, positions=1120), TowerShape("gemma4ua", 640)),
    "26B-A4B": (LARGE,),
    "31B": (LARGE,),
    "DEMO": (
        TowerShape("gemma4v", 32, 48, 2, 2, 128, clipped=True),
        TowerShape("gemma4a", 32, 128, 4, 2, clipped=True),
    ),
}


def projector(hidden: int, towers: tuple[TowerShape, ...], type: str) -> tuple[dict[str, Any], Tensors]:
    """Return the metadata of an mmproj file as llama.cpp's converter writes it, and name -> (shape, type) of tensors.

    Args:
        hidden: of the text model.
        type: of matrices: BF16 or F16.
    """
    file_type = {"F16": 1, "BF16": 32}[type]
    keys: dict[str, Any] = {"general.architecture": "clip", "general.type": "mmproj", "general.file_type": file_type}
    chosen: Tensors = {}
    for tower in towers:
        sizes: dict[str, Any] = {
            "projector_type": tower.type,
            "projection_dim": hidden,
            "embedding_length": tower.width,
            "feed_forward_length": tower.ffn,
            "block_count": tower.layers,
            "attention.head_count": tower.heads,
            "attention.layer_norm_epsilon": 1e-6,
        }
        if tower.kind == "vision":
            sizes |= {"image_size": 224, "patch_size": 16, "image_mean": np.zeros(3), "image_std": np.ones(3)}
        else:
            sizes |= {"num_mel_bins": 128}
        keys |= {f"clip.has_{tower.kind}_encoder": True} | {f"clip.{tower.kind}.{k}": v for k, v in sizes.items()}
        entries = {"v.position_embd.weight": Entry((2, tower.positions, tower.width), "F32", 0)}
        if tower.standardized:
            entries |= {f"v.std_{name}": Entry((tower.width,), "F32", 0) for name in ("bias", "scale")}
        for name, spec in TOWERS[tower.type].specs(Reader(sizes, "", tower.type), hidden, entries).items():
            if spec.optional and not (tower.clipped and name.endswith(("_min", "_max"))):
                continue
            wide = spec.role == "vector" or "position" in name or (type == "BF16" and "patch_embd" in name)
            chosen[name] = (spec.shape, "F32" if wide else type)
    return keys, chosen


def assistant(model: Shape, own: AssistantShape, spelling: str) -> tuple[dict[str, Any], Tensors]:
    """Return the metadata of an assistant for a model, and name -> (shape, type) of its tensors."""
    backbone, pre, post = SPELLINGS[spelling]
    sliding, ordered = [True, True, True, False], own.centroids > 0 and spelling == "gemma4_assistant"
    keys = {
        "block_count": len(sliding),
        "context_length": model.context,
        "embedding_length": own.hidden,
        backbone: model.hidden,
        "feed_forward_length": own.ffn,
        "attention.head_count": own.heads,
        **attention_keys(model, sliding),
        "attention.shared_kv_layers": len(sliding),
        "nextn_predict_layers": len(sliding),
    }
    if ordered:
        keys |= {"use_ordered_embeddings": True, "n_centroids": own.centroids, "centroid_top_k": 32}
    h, norms = own.hidden, ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    made: Tensors = {"token_embd.weight": ((model.vocab, h), "Q8_0"), "output_norm.weight": ((h,), "F32")}
    made |= {f"{pre}.weight": ((h, 2 * model.hidden), "Q8_0"), f"{post}.weight": ((model.hidden, h), "Q8_0")}
    if spelling != "gemma4_mtp":
        made["rope_freqs.weight"] = ((model.head_dims[1] // 2,), "F32")
    if ordered:
        made["mtp.centroids.weight"] = ((own.centroids, h), "Q8_0")
        made["mtp.token_ordering"] = ((model.vocab,), "I32")
    for i, s in enumerate(sliding):
        dim = model.head_dims[not s]
        q = own.heads * dim
        made |= {f"blk.{i}.{name}.weight": ((h,), "F32") for name in norms}
        made |= {f"blk.{i}.attn_q_norm.weight": ((dim,), "F32"), f"blk.{i}.layer_output_scale.weight": ((1,), "F32")}
        matrices = {"attn_q": (q, h), "attn_output": (h, q), "ffn_gate": (own.ffn, h), "ffn_up": (own.ffn, h)}
        matrices["ffn_down"] = (h, own.ffn)
        made |= {f"blk.{i}.{name}.weight": (shape, "Q8_0") for name, shape in matrices.items()}
    general = {"general.architecture": spelling, "general.name": "synthetic assistant", "general.file_type": 7}
    return general | {f"{spelling}.{key}": value for key, value in keys.items()}, made


def config_of(model: Shape) -> Config:
    """Return the configuration that a file of a shape gives."""
    return config_from_gguf(metadata(model, "model"), "published")


def tensors(model: Shape, wanted: str | None = None) -> Tensors:
    """Return name -> (shape, type), in the order of a forward pass. wanted: a type for all quantized tensors that are
    as wide as its blocks, or UD."""
    config, chosen = config_of(model), cast(Tensors, {})
    n = len(config.layers)
    for name, spec in tensor_specs(config).items():
        layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
        no_v = name.endswith("attn_v.weight") and not model.ple and not config.layers[layer].sliding
        if name == "output.weight" or "ffn_gate_exps" in name or "ffn_up_exps" in name or no_v:
            continue
        more_bits = layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2
        type = "F32"
        if name == "per_layer_model_proj.weight":
            type = "BF16"
        elif spec.role != "vector" and "ffn_gate_inp" not in name and "scale" not in name:
            six = "token_embd" in name or (more_bits and ("ffn_down" in name or "attn_v" in name))
            by_256 = spec.shape[-1] % 256 == 0
            type = ("Q6_K" if six else "Q4_K") if by_256 else ("Q8_0" if six else "Q5_0")
            if wanted == UD:
                part = name.removesuffix(".weight").split(".")[-1]
                ud = UD_TYPES.get(part, ("Q6_K" if six else "Q5_K",) * 3)[1 if more_bits else 2 * (layer % 3 == 1)]
                type = ud if by_256 else "Q8_0" if more_bits else "Q5_1"
            elif wanted and spec.shape[-1] % TYPES[wanted][1] == 0:
                type = wanted
        chosen[name] = (spec.shape, type)
    return chosen


def stretch(name: str, shape: tuple[int, ...], type: str, rng: np.random.Generator) -> np.ndarray:
    """Return the bytes of some rows of a tensor, to be repeated."""
    _, size, block_bytes = TYPES[type]
    if name == "rope_freqs.weight":  # only the first frequencies turn
        return np.where(np.arange(shape[0]) < shape[0] // 4, 1, 1e30).astype("<f4").view(np.uint8)
    if type == "I32":
        return rng.permutation(shape[0]).astype("<i4").view(np.uint8)
    if name.endswith(("_min", "_max")):  # bounds that nothing reaches
        return np.array([-1e3 if name.endswith("_min") else 1e3], "<f4").view(np.uint8)
    if type == "F32":
        gain = 0.05 if "ffn_gate_inp.weight" in name else 0.1
        values = rng.normal(0 if len(shape) > 1 else 1, gain, shape).astype("<f4")
        return (values * 0.05 if "_q_norm" in name or "_k_norm" in name else values).reshape(-1).view(np.uint8)
    if type in ("BF16", "F16"):
        rows = rng.normal(0, shape[-1] ** -0.5, (min(prod(shape[:-1]), 3001), shape[-1]))
        halves = rows.astype("<f2") if type == "F16" else (rows.astype("<f4").view("<u4") >> 16).astype("<u2")
        return halves.reshape(-1).view(np.uint8)
    blocks = rng.integers(0, 256, (min(prod(shape) // size, 30011), block_bytes), np.uint8)
    if type not in SCALES:
        scale_blocks(type, blocks, rng.uniform(0.5, 1.5, len(blocks)) * shape[-1] ** -0.5)
        return blocks.reshape(-1)
    for at, unit in SCALES[type]:
        scale = rng.uniform(0.5, 1.5, (len(blocks), 1)) * unit * shape[-1] ** -0.5
        blocks[:, at : at + 2] = scale.astype("<f2").view(np.uint8)
    return blocks.reshape(-1)


def scale_blocks(type: str, blocks: np.ndarray, deviations: np.ndarray) -> None:
    """Give random blocks of a type without mins scales such that their weights have about these standard deviations."""
    if type == "MXFP4":
        blocks[:, 0] = 128 + np.round(np.log2(deviations / np.std(FP4)))
    elif type == "NVFP4":
        blocks[:, :4] = np.searchsorted(UE4M3[:127], deviations / np.std(FP4))[:, None]
    else:
        put(type, blocks, np.ones(len(blocks)))
        numbers = np.array(dense(blocks[:500], type, (len(blocks[:500]), TYPES[type][1])))
        put(type, blocks, deviations / numbers.std())


def put(type: str, blocks: np.ndarray, scales: np.ndarray) -> None:
    """Write the fp16 scale of each block."""
    half = scales.astype("<f2").view("<u2")
    for at in FORMATS[type].layout.block_scales:
        if isinstance(at, tuple):  # four bits in the upper half of each byte
            for i, byte in enumerate(at):
                blocks[:, byte] = (blocks[:, byte] & 15) | (half >> (4 * i) & 15).astype(np.uint8) << 4
        else:
            blocks[:, at : at + 2] = half[:, None].view(np.uint8)


def write_value(out: BinaryIO, value: Any) -> None:
    """Write a metadata value after its type (llama.cpp, ggml/include/gguf.h)."""
    kinds = {"u": 4, "i": 5, "f": 6, "b": 7}

    def string(s: str) -> bytes:
        raw = s.encode()
        return struct.pack("<Q", len(raw)) + raw

    if isinstance(value, str):
        out.write(struct.pack("<I", 8) + string(value))
    elif isinstance(value, list):
        out.write(struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(string, value)))
    elif isinstance(value, np.ndarray):
        value = value.astype({"b": "?", "f": "<f4", "u": "<u4", "i": "<i4"}[value.dtype.kind])
        out.write(struct.pack("<IIQ", 9, kinds[value.dtype.kind], value.size) + value.tobytes())
    elif isinstance(value, bool | np.bool_):
        out.write(struct.pack("<I?", 7, value))
    elif isinstance(value, float | np.floating):
        out.write(struct.pack("<If", 6, value))
    else:
        out.write(struct.pack("<II", 4, value))


def write(
    model: str,
    path: Path,
    tokenizer: Path | None = None,
    spelling: str | None = None,
    type: str | None = None,
    mmproj: bool = False,
) -> None:
    """Write a file of the shape of a model in PUBLISHED or of DEMO, of its assistant (a spelling), or its projector."""
    like = DEMO if model == "DEMO" else PUBLISHED[model]
    keys, chosen = metadata(like, model.lower()), tensors(like, type)
    if spelling:
        keys, chosen = assistant(like, ASSISTANTS[model], spelling)
    if mmproj:
        keys, chosen = projector(like.hidden, PROJECTORS[model], type or "BF16")
    if tokenizer:
        with open_gguf(tokenizer) as other:
            keys |= {key: value for key, value in other.metadata.items() if key.startswith("tokenizer.")}
    rng, at, places = np.random.default_rng(0), 0, {}
    for name, (shape, type) in chosen.items():
        _, size, block_bytes = TYPES[type]
        places[name] = (at, prod(shape) // size * block_bytes)
        at += -(-places[name][1] // 32) * 32
    with path.open("wb") as out:
        out.write(struct.pack("<4sIQQ", b"GGUF", 3, len(chosen), len(keys)))
        for key, value in keys.items():
            out.write(struct.pack("<Q", len(key)) + key.encode())
            write_value(out, value)
        for name, (shape, type) in chosen.items():
            out.write(struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape)))
            out.write(
                struct.pack(f"<{len(shape)}Q", *shape[::-1]) + struct.pack("<IQ", TYPES[type][0], places[name][0])
            )
        start = -(-out.tell() // 32) * 32
        for name, (shape, type) in chosen.items():
            offset, n_bytes = places[name]
            out.seek(start + offset)
            some = stretch(name, shape, type, rng).data
            while n_bytes:
                n_bytes -= out.write(some[:n_bytes])
        out.truncate(start + at)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", type=str.upper, choices=[*PUBLISHED, "DEMO"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="a GGUF to copy the tokenizer from")
    parser.add_argument("--assistant", action="store_true", help="write the shape's assistant")
    parser.add_argument("--spelling", choices=SPELLINGS, default="gemma4-assistant", help="of an assistant")
    parser.add_argument("--mmproj", action="store_true", help="write the shape's projector")
    simple = [name for name, form in FORMATS.items() if name in SCALES or not form.has_min]
    parser.add_argument(
        "--type", choices=[*simple, "F16", "BF16", UD], help="of all tensors as wide as its blocks; or this mix"
    )
    options = parser.parse_args()
    if options.mmproj and options.type not in (None, "BF16", "F16"):
        parser.error(f"--type {options.type} is no projector's; take BF16 or F16")
    spelling = options.spelling if options.assistant else None
    write(options.shape, options.path, options.tokenizer, spelling, options.type, options.mmproj)
    print(f"{options.path}: {options.path.stat().st_size / 1e9:.2f} GB")
