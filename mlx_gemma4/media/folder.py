"""Towers in a folder of safetensors, beside the text model: their tensors and metadata as an mmproj GGUF has them.

In: a folder whose config.json has a vision_config or an audio_config. Out: projector types, metadata by the GGUF's
keys, and a source of tensors under the GGUF's names, in its layouts. The GGUF's are those of llama.cpp's converter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import InputError
from ..loading.from_safetensors import FolderSource
from ..paths import read_object
from .picture import SIDE


@dataclass(frozen=True)
class Form:
    """How one kind of tower is written in a folder: a row of FORMS."""

    type: str  # of the projector
    part: str  # of config.json
    keys: Mapping[str, str]  # the GGUF's key, without its prefix: the configuration's
    names: Sequence[tuple[str, str]]  # a pattern of a whole name, and the GGUF's
    layouts: Mapping[str, Callable[[mx.array], mx.array]] = field(default_factory=dict)  # by a pattern of that name
    fixed: Mapping[str, Any] = field(default_factory=dict)  # what the configuration may say, and must then


def _channels_first(w: mx.array, side: int) -> mx.array:
    """Reorder the last axis: from row, column, channel of a patch to channel, row, column."""
    return w.reshape(-1, side, side, 3).transpose(0, 3, 1, 2).reshape(w.shape)


_LAYER = {
    r"self_attn\.([qkv])_proj": r"attn_\2", r"self_attn\.o_proj": "attn_out",
    r"self_attn\.([qk])_norm": r"attn_\2_norm", "input_layernorm": "ln1", "post_attention_layernorm": "attn_post_norm",
    r"mlp\.(gate|up|down)_proj": r"ffn_\2", "pre_feedforward_layernorm": "ln2",
    "post_feedforward_layernorm": "ffn_post_norm",
}  # fmt: skip
_HEARING = {
    r"self_attn\.([qkv])_proj": r"attn_\2", r"self_attn\.post": "attn_out",
    r"self_attn\.relative_k_proj": "attn_k_rel", "norm_(pre|post)_attn": r"attn_\2_norm", "norm_out": "ln2",
    r"lconv1d\.pre_layer_norm": "conv_norm", r"lconv1d\.linear_start": "conv_pw1",
    r"lconv1d\.depthwise_conv1d": "conv_dw", r"lconv1d\.conv_norm": "norm_conv", r"lconv1d\.linear_end": "conv_pw2",
} | {
    rf"feed_forward{number}\.{theirs}": ours + end
    for number, end in ((1, ""), (2, "_1"))
    for theirs, ours in (
        ("pre_layer_norm", "ffn_norm"), ("ffw_layer_1", "ffn_up"),
        ("ffw_layer_2", "ffn_down"), ("post_layer_norm", "ffn_post_norm"),
    )
}  # fmt: skip
_END = r"(?:\.linear)?\.(?P<end>weight|(?:in|out)put_(?:min|max))"
_PROJECTION = (r"embed_vision\.(?:multimodal_embedder\.)?embedding_projection\.weight", "mm.input_projection.weight")
_HEARD = (r"embed_audio\.embedding_projection\.weight", "mm.a.input_projection.weight")
_EMBEDDER = r"(?:vision_embedder|embed_vision)\."
FORMS = {
    "gemma4_vision": Form(
        "gemma4v",
        "vision_config",
        {
            "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
            "block_count": "num_hidden_layers", "attention.head_count": "num_attention_heads",
            "patch_size": "patch_size", "projector.scale_factor": "pooling_kernel_size",
        },
        [
            (r"vision_tower\.patch_embedder\.input_proj\.weight", "v.patch_embd.weight"),
            (r"vision_tower\.patch_embedder\.position_embedding_table", "v.position_embd.weight"),
            (r"vision_tower\.(std_bias|std_scale)", r"v.\1"),
            *(
                (rf"vision_tower\.encoder\.layers\.(\d+)\.{theirs}{_END}", rf"v.blk.\1.{ours}.\g<end>")
                for theirs, ours in _LAYER.items()
            ),
            _PROJECTION,
        ],
        {r"v\.patch_embd\.weight": lambda w: _channels_first(w, 16).reshape(-1, 3, 16, 16)},
        {"hidden_activation": "gelu_pytorch_tanh"},
    ),
    "gemma4_unified_vision": Form(
        "gemma4uv",
        "vision_config",
        {"embedding_length": "mm_embed_dim", "patch_size": "patch_size"},
        [
            (rf"{_EMBEDDER}patch_dense\.(weight|bias)", r"v.patch_embd.\1"),
            (rf"{_EMBEDDER}patch_ln([12])\.(weight|bias)", r"v.patch_norm.\1.\2"),
            (rf"{_EMBEDDER}pos_norm\.(weight|bias)", r"v.patch_norm.3.\1"),
            (rf"{_EMBEDDER}pos_embedding", "v.position_embd.weight"),
            _PROJECTION,
        ],
        {
            r"v\.position_embd\.weight": lambda w: w.transpose(1, 0, 2),
            r"v\.(patch_embd\.weight|patch_norm\.1\..*)": lambda w: _channels_first(w, SIDE),
        },
    ),
    "gemma4_audio": Form(
        "gemma4a",
        "audio_config",
        {
            "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
            "attention.head_count": "num_attention_heads",
        },
        [
            (r"audio_tower\.subsample_conv_projection\.layer(\d)\.conv\.weight", r"a.conv1d.\1.weight"),
            (r"audio_tower\.subsample_conv_projection\.layer(\d)\.norm\.weight", r"a.conv1d.\1.norm.weight"),
            (r"audio_tower\.subsample_conv_projection\.input_proj_linear\.weight", "a.input_projection.weight"),
            (r"audio_tower\.layers\.(\d+)\.self_attn\.per_dim_scale", r"a.blk.\1.per_dim_scale.weight"),
            *(
                (rf"audio_tower\.layers\.(\d+)\.{theirs}{_END}", rf"a.blk.\1.{ours}.\g<end>")
                for theirs, ours in _HEARING.items()
            ),
            (r"audio_tower\.output_proj\.(weight|bias)", r"a.pre_encode.out.\1"),
            _HEARD,
        ],
        {
            # The channels that are read come last where mlx-vlm has written them.
            r"a\.conv1d\.\d\.weight": lambda w: w if w.shape[2:] == (3, 3) else w.transpose(0, 3, 1, 2),
            r"a\.blk\.\d+\.conv_dw\.weight": lambda w: w.reshape(w.shape[0], -1),
            r"a\.blk\.\d+\.per_dim_scale\.weight": lambda w: mx.logaddexp(w.astype(mx.float32), 0),
        },
        {
            "hidden_act": "silu", "attention_context_left": 13, "attention_context_right": 0,
            "attention_logit_cap": 50, "residual_weight": 0.5,
        },
    ),
    "gemma4_unified_audio": Form("gemma4ua", "audio_config", {}, [_HEARD]),
}  # fmt: skip
TOWER = {"vision_config": r"vision_tower|vision_embedder|embed_vision", "audio_config": r"audio_tower|embed_audio"}


def read_folder(path: Path) -> tuple[list[tuple[Form, dict[str, Any]]], FolderSource]:
    """Return the towers of a folder, with their metadata, and their tensors. Raises InputError."""
    file = path / "config.json"
    config = read_object(file) if file.is_file() else {}
    found: list[tuple[Form, dict[str, Any]]] = []
    for part in TOWER:
        own = config.get(part)
        if not isinstance(own, Mapping):
            continue
        form = FORMS.get(str(own.get("model_type")))
        if form is None or form.part != part:
            raise InputError(
                f"{file}: {part} is of model_type {str(own.get('model_type'))[:40]!r}, which can't be read"
            )
        for key, value in form.fixed.items():
            if (said := own.get(key, value)) not in (value, None):
                raise InputError(f"{file}: {part}.{key} is {str(said)[:40]!r}, which is not supported")
        found.append((form, {key: own[theirs] for key, theirs in form.keys.items() if own.get(theirs) is not None}))
    forms = [form for form, _ in found]

    def named(name: str) -> str | None:
        core = re.sub(r"^model\.", "", name)
        form = next((form for form in forms if re.match(rf"({TOWER[form.part]})\.", core)), None)
        if form is None:
            return None
        return next((re.sub(a, b, core) for a, b in form.names if re.fullmatch(a, core)), name)

    def laid_out(name: str, array: mx.array) -> mx.array:
        layouts = (layout for form in forms for pattern, layout in form.layouts.items() if re.fullmatch(pattern, name))
        layout = next(layouts, lambda w: w)
        return layout(array if array.ndim else array.reshape(1))

    quantization = config.get("quantization")
    source = FolderSource(path, None, quantization if isinstance(quantization, Mapping) else {}, named, laid_out)
    if not source.entries:
        raise InputError(f"{path}: this folder has no towers for images or sound; give --mmproj a file that has")
    return found, source
