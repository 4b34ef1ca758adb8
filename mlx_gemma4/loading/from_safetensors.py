"""The tensors of a folder of safetensors, as Hugging Face and mlx-lm write them, under their GGUF names.

In: a folder. Out: a source for the loader. Weights are bf16, fp16 or fp32, or quantized by mlx-lm.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from ..config import Config
from ..errors import InputError
from ..memory import Holding, on_cpu
from ..ops.dispatch import Kernels
from ..ops.stock import Affine, Weight
from .tensors import Cut, Entry, Spec

_TOP = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "embed_tokens_per_layer": "per_layer_token_embd",
    "per_layer_model_projection": "per_layer_model_proj",
    "per_layer_projection_norm": "per_layer_proj_norm",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
    "layer_scalar": "layer_output_scale",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
    "router.proj": "ffn_gate_inp",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps",
    "experts.down_proj": "ffn_down_exps",
    "experts.switch_glu.gate_proj": "ffn_gate_exps",
    "experts.switch_glu.up_proj": "ffn_up_exps",
    "experts.switch_glu.down_proj": "ffn_down_exps",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
    "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "post_feedforward_layernorm_2": "post_ffw_norm_2",
}


class FolderSource:
    """The tensors of a folder of safetensors, mapped when it is made and read on demand.

    Args:
        path: the folder.
        config: its model's configuration.
        quantization: the `quantization` part of its config.json, as mlx-lm writes it; empty if there is none.
        names: the GGUF's name of a tensor; None: it is left out.
        layout: brings a tensor, given by that name, into the GGUF's layout.

    Raises:
        InputError: there are none, or one can't be read.
    """

    def __init__(
        self,
        path: Path,
        config: Config | None,
        quantization: Mapping[str, Any],
        names: Callable[[str], str | None] | None = None,
        layout: Callable[[str, mx.array], mx.array] | None = None,
    ) -> None:
        self.name = str(path)
        self.entries: dict[str, Entry] = {}
        self._gemma3 = config is not None and config.architecture == "gemma3"
        self._arrays: dict[str, tuple[mx.array, ...]] = {}  # the array alone, or codes, scales and biases
        arrays = _mapped(path)
        for name, array in arrays.items():
            if name.endswith((".scales", ".biases")):
                continue
            key, stem = (names or gguf_name)(name), name.removesuffix(".weight")
            if key is None:
                continue
            if f"{stem}.scales" not in arrays:
                array = layout(key, array) if layout else array
                self._arrays[key] = (array,)
                integers = array.ndim == 1 and array.dtype in (mx.int32, mx.int64)
                readable = integers or array.dtype in (mx.float32, mx.float16, mx.bfloat16)
                self.entries[key] = Entry(tuple(array.shape), str(array.dtype), array.nbytes, readable=readable)
                continue
            if f"{stem}.biases" not in arrays:
                raise InputError(f"{path}: {stem} is quantized without biases; only mlx-lm's affine kind can be read")
            parts = self._arrays[key] = (array, arrays[f"{stem}.scales"], arrays[f"{stem}.biases"])
            own = quantization.get(stem)  # the module's own entry in config.json, or the entry for all modules
            group = (own if isinstance(own, Mapping) else quantization).get("group_size", 64)
            if group not in (32, 64, 128) or array.ndim < 2 or parts[1].ndim != array.ndim:
                raise InputError(f"{path}: {stem} is quantized by groups of {group}, which can't be; convert it again")
            k = parts[1].shape[-1] * group
            bits = array.shape[-1] * 32 / k
            kind, size = f"affine {bits:g} bits by {group}", sum(a.nbytes for a in parts)
            readable = array.dtype == mx.uint32 and bits in (2, 3, 4, 5, 6, 8)
            self.entries[key] = Entry((*array.shape[:-1], k), kind, size, True, readable, group)

    def read(
        self, names: Sequence[str], spec: Spec, holding: Holding, kernels: Kernels | None, cuts: Sequence[Cut] = ()
    ) -> Weight:
        parts = [self._arrays.pop(name) for name in names]  # so that what is joined or expanded can go
        widths = {name: self.entries[name].shape[-1] for name in names if cuts}
        some = zip(parts, names, cuts or [Cut()] * len(names), strict=True)
        parts = [tuple(_taken(a, cut, widths.get(name, 0)) for a in arrays) for arrays, name, cut in some]
        arrays = [mx.concatenate(list(a), axis=-2) if len(a) > 1 else a[0] for a in zip(*parts, strict=True)]
        if len(arrays) == 3:
            codes, scales, biases = arrays
            k = cuts[0].shape(self.entries[names[0]].shape)[-1] if cuts else self.entries[names[0]].shape[-1]
            weight = Affine(codes, scales, biases, k // scales.shape[-1], codes.shape[-1] * 32 // k)
            if holding == "packed" or spec.role == "table":
                mx.eval(codes, scales, biases)
                return weight
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            dense = mx.dequantize(codes, scales, biases, group_size=weight.group, bits=weight.bits)
        else:
            dense = arrays[0]
            if spec.role == "vector" or (spec.role == "matrix" and (holding == "dense" or on_cpu())):
                dense = dense.astype(mx.float32)
            if self._gemma3 and names[0].endswith("norm.weight"):
                dense = 1 + dense  # Hugging Face stores Gemma 3's norm weights less 1
        mx.eval(dense)
        return dense


def _taken(a: mx.array, cut: Cut, width: int) -> mx.array:
    """Return a copy of some of an array [.., N, ..] whose rows hold `width` numbers, in codes, or scales of groups."""
    if cut.rows:
        a = mx.take(a, mx.concatenate([mx.arange(rows.start, rows.stop) for rows in cut.rows]), axis=-2)
    if cut.columns is not None:
        start, stop = (n * a.shape[-1] // width for n in (cut.columns.start, cut.columns.stop))
        a = mx.take(a, mx.arange(start, stop), axis=-1)
    return a


def _mapped(path: Path) -> dict[str, mx.array]:
    """Every array of a folder's safetensors, by the file's name for it, not read yet."""
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        raise InputError(f"{path}: this folder has no .safetensors files; download the model again")
    arrays: dict[str, mx.array] = {}
    for shard in shards:
        try:
            arrays |= cast("dict[str, mx.array]", mx.load(str(shard)))
        except Exception as error:  # of MLX's reader of JSON, say
            raise InputError(f"{shard}: can't be read ({error}); download it again") from error
    return arrays


def gguf_name(name: str) -> str:
    """Return `blk.3.ffn_up.weight` for `model.language_model.layers.3.mlp.up_proj.weight`; unknown names stay."""
    core = re.sub(r"^(model\.|language_model\.)+", "", name)
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", core)
    table, prefix, core = (_LAYER, f"blk.{layer[1]}.", layer[2]) if layer else (_TOP, "", core)
    stem = table.get(core.removesuffix(".weight"))
    if stem is None:
        return name
    return prefix + (stem if stem.endswith(".scale") else f"{stem}.weight")
