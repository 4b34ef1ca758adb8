"""The shape of a model, from its metadata alone.

In: the metadata of a GGUF (`gemma4` or `gemma3`), or the `config.json` of a safetensors folder.
Out: a `Config`, one `LayerConfig` a layer. No model size is hard-coded: the metadata gives every number.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal

from .errors import InputError

ARCHITECTURES = ("gemma4", "gemma3")
# Other files than models, by general.type or general.architecture.
OTHERS = {
    "adapter": "a LoRA adapter, which belongs to a model",
    "imatrix": "an importance matrix, which helps to quantize a model",
    "mmproj": "a projector for images or sound (mmproj), which belongs to a model",
    "clip": "a projector for images or sound (mmproj), which belongs to a model",
    "controlvector": "a control vector, which belongs to a model",
    **dict.fromkeys(
        ("gemma4-assistant", "gemma4_assistant", "gemma4_mtp"), "an assistant, which drafts for a model (--draft)"
    ),
}
MAX_LAYERS = 1024  # far above any real model; a file that claims more is damaged
Kind = Literal["image", "audio", "video"]  # what there is beside text
SEEN = -(2**30)  # token ids below: rows of pictures; from there to -1: of sounds (model/soft.py)
# Keys under the architecture's name that are read here, or say what is so in any case.
_KNOWN = re.compile(
    r"attention\.(head_count(_kv)?|(key|value)_length(_swa)?|layer_norm_rms_epsilon|scale|shared_kv_layers|causal"
    r"|sliding_window(_pattern)?)|expert_(count|used_count|feed_forward_length|weights_norm|gating_func)|embedding_length\w*"
    r"|rope\.(freq_base(_swa)?|dimension_count(_swa)?|(global|local)\.freq_base"
    r"|scaling\.(type|factor|finetuned|original_context_length))|final_logit_softcapping|(vision|audio|mm)\..*"
)
# Those that change what is computed, as other models have them.
_MATHS = re.compile(
    r"(attention|rope|experts?|altup|laurel|activation|residual|embedding|logit|ssm|wkv|shortconv|nextn)[._].*"
    r"|.*(softcap\w*|_scale|_multiplier|parallel_residual|pooling_type|dense_block_count|moe_\w*step\w*)"
)


@dataclass(frozen=True)
class LayerConfig:
    """The shape of one layer."""

    sliding: bool  # attends to the last `window` tokens only
    heads: int  # query heads
    kv_heads: int
    head_dim: int
    ffn: int  # width of the dense MLP
    kv_layer: int  # index of the layer whose keys and values it reads: its own, or an earlier one


@dataclass(frozen=True)
class Config:
    """The shape of a model. Lengths are in tokens, widths in elements."""

    architecture: str  # "gemma4" or "gemma3"
    vocab: int
    hidden: int
    context: int  # longest sequence it was trained for
    window: int  # of the sliding layers, the current token included
    eps: float  # of every RMSNorm
    softcap: float  # logits = softcap * tanh(logits / softcap); 0: none
    attention_scale: float
    rope_theta: float  # global layers
    rope_theta_sliding: float
    rope_scale: float  # positions of global layers are divided by this (gemma3 from 4B up)
    rope_rotated: float | None  # share of a global head's frequencies that rotate; None: a tensor gives them
    ple: int  # width of the per-layer embedding; 0: none
    experts: int  # 0: dense
    experts_used: int
    expert_ffn: int
    layers: tuple[LayerConfig, ...]
    own_context: int = field(default=0, repr=False)  # the file's, where `context` is what a user keeps to; 0: the same

    def keep_to(self, context: int | None) -> "Config":
        """Return the same model with a context of so many tokens at most."""
        return self if context is None else replace(self, context=min(context, self.context), own_context=self.context)

    @property
    def own_kv_layers(self) -> int:
        """The number of layers, from the first, with keys and values of their own."""
        return sum(layer.kv_layer == i for i, layer in enumerate(self.layers))

    def check_ids(self, ids: Sequence[int], *, soft: bool = False) -> None:
        """Raise InputError for a token id without a row of the embedding: reading there is reading foreign memory.

        `soft`: those of soft tokens may be there, whose rows are elsewhere.
        """
        least = 2 * SEEN if soft else 0
        if len(ids) and not least <= min(ids) <= max(ids) < self.vocab:
            bad = min(ids) if min(ids) < least else max(ids)
            raise InputError(f"there is no token {bad}; the model has 0 to {self.vocab - 1}")

    @property
    def sees_ahead(self) -> bool:
        """True if tokens of a picture see each other both ways on sliding layers: no metadata says so.

        All Gemma 4 but those with per-layer embeddings; "vision" in use_bidirectional_attention of config.json.
        """
        return self.architecture == "gemma4" and not self.ple

    def uncut(self, ids: Sequence[int], position: int) -> int:
        """Return a position in token ids, or where the picture begins that it lies within and that is read at once."""
        if self.sees_ahead and 0 < position < len(ids) and ids[position] < SEEN:
            while position and ids[position - 1] < SEEN:
                position -= 1
        return position

    def longest_picture(self, ids: Sequence[int]) -> int:
        """Return the tokens of the longest picture among token ids that is read at once; 0: there is none."""
        if not self.sees_ahead or min(ids, default=0) >= SEEN:
            return 0
        return max(len([*run]) for seen, run in groupby(ids, lambda id: id < SEEN) if seen)

    @property
    def value_norm(self) -> bool:
        """Gemma 4 normalises values (without a weight); Gemma 3 does not."""
        return self.architecture == "gemma4"


class Reader:
    """Typed look-ups in metadata whose errors name the key."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str, source: str) -> None:
        self.metadata, self.prefix, self.source = metadata, prefix, source

    def error(self, key: str, what: str) -> InputError:
        return InputError(f"{self.source}: {self.prefix}{key} {what}; the file is damaged or not a Gemma text model")

    def number(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(self.prefix + key, default)
        if value is None:
            raise self.error(key, "is missing")
        if hasattr(value, "__len__"):
            raise self.error(key, "is not a number")
        try:
            value = float(value)
        except (TypeError, ValueError):
            raise self.error(key, "is not a number") from None
        if not abs(value) < 1e30:
            raise self.error(key, f"is {value}")
        return value

    def within(self, key: str, default: float | None, low: float, high: float) -> float:
        """A number from `low` to `high`."""
        value = self.number(key, default)
        if not low <= value <= high:
            raise self.error(key, f"is {value:g}")
        return value

    def rope_base(self, *keys: str, default: float) -> float:
        """The base of the first of these keys that is there."""
        return self.within(next((key for key in keys if self.prefix + key in self.metadata), keys[0]), default, 1, 1e12)

    def rope_scale(self, kind: Any, factor: str) -> float:
        """What positions are divided by, given what the file calls this kind of scaling."""
        if kind not in (None, "none", "default", "linear", "proportional"):
            raise InputError(
                f"{self.source}: its RoPE is scaled by {str(kind)[:40]!r} ({self.prefix}rope), which is not supported: "
                "only linear scaling is; take another file of this model"
            )
        scale = self.within(factor, 1.0, 0, 1e6)
        return scale if scale and kind != "none" else 1.0  # 0: not set, as in llama.cpp

    def count(self, key: str, default: int | None = None, *, least: int = 1, most: int = 1 << 31) -> int:
        value = self.number(key, default)
        if value != int(value) or not least <= value <= most:
            raise self.error(key, f"is {value:g}")
        return int(value)

    def used(self, key: str, experts: int) -> int:
        """The number of experts that a token uses, of so many."""
        used = self.count(key) if experts else 0
        if used > experts:
            raise InputError(f"{self.source}: {used} experts used of {experts}")
        return used

    def counts(self, key: str, n: int) -> list[int]:
        """One count a layer, from a scalar or an array of n."""
        value: Any = self.metadata.get(self.prefix + key)
        if not hasattr(value, "__len__") or isinstance(value, (str, bytes)):
            return [self.count(key)] * n
        if len(value) != n:
            raise self.error(key, f"has {len(value)} entries for {n} layers")
        one = [Reader({self.prefix + key: v}, self.prefix, self.source) for v in value]
        return [each.count(key) for each in one]

    def refuse_unknown(self) -> None:
        """Refuse keys that change what is computed and that nothing here reads."""
        for name, value in self.metadata.items():
            key = name.removeprefix(self.prefix)
            if not name.startswith(self.prefix) or _KNOWN.fullmatch(key):
                continue
            value = value if isinstance(value, int | float | str) else int(any(value))
            # No value, or a factor of 1; a count of 1 is one too many.
            neutral = value in (0, "", "none") or (isinstance(value, float) and value == 1)
            if _MATHS.fullmatch(key) and not neutral:
                raise InputError(
                    f"{self.source}: {name} is {str(value)[:40]}, which changes what the model computes and is not "
                    "supported; update mlx-gemma4, or take another file of this model"
                )


def config_from_gguf(metadata: Mapping[str, Any], source: str) -> Config:
    """Read the configuration from GGUF metadata.

    Args:
        metadata: key -> value, arrays as sequences.
        source: the file's name, for errors.

    Raises:
        InputError: another architecture, a key that is missing or cannot be true.
    """
    architecture, kind = metadata.get("general.architecture"), metadata.get("general.type")
    for name, what in OTHERS.items():
        if name in [x for x in (kind, architecture) if isinstance(x, str)]:
            raise InputError(f"{source}: is {what}, and no model itself; give the model's file")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise InputError(
            f"{source}: this is a model of architecture {str(architecture)[:40]!r}; mlx-gemma4 runs gemma4 and gemma3"
        )
    read = Reader(metadata, f"{architecture}.", source)
    n = read.count("block_count", most=MAX_LAYERS)
    sliding, heads = _sliding_layers(read, architecture, n), read.counts("attention.head_count", n)
    hidden, head_dim = read.count("embedding_length"), read.count("attention.key_length")
    head_dim_sliding = read.count("attention.key_length_swa", head_dim)
    for key in ("", "_swa"):
        key_length = read.count(f"attention.key_length{key}", head_dim)
        if read.count(f"attention.value_length{key}", key_length) != key_length:
            raise read.error(f"attention.value_length{key}", "differs from the key length")
    tokens = metadata.get("tokenizer.ggml.tokens")
    rows = read.count("vocab_size", len(tokens) if isinstance(tokens, list) else None)
    if isinstance(tokens, list) and len(tokens) > rows:
        raise InputError(f"{source}: has {len(tokens)} tokens for an embedding of {rows} rows; convert the model again")
    for key, dim in (("", head_dim), ("_swa", head_dim_sliding)):
        if read.count(f"rope.dimension_count{key}", dim) != dim:
            raise read.error(f"rope.dimension_count{key}", f"differs from the key length, {dim}")
    if not metadata.get(f"{architecture}.attention.causal", True):
        raise read.error("attention.causal", "is false: this model is no language model, and")
    if read.number("expert_gating_func", 1) not in (0, 1):
        raise read.error("expert_gating_func", "is not that of a softmax")
    read.refuse_unknown()
    attention_scale = 1.0
    if architecture == "gemma3":
        # The 27B alone scales by hidden/heads instead of head_dim, and no key says so; llama.cpp
        # (src/models/gemma3.cpp) tells it by its 62 layers too.
        dim = hidden // heads[0] if n == 62 else head_dim
        attention_scale = read.within("attention.scale", dim**-0.5, 1e-6, 1e3)
    elif read.number("attention.scale", 1.0) != 1.0:
        raise read.error("attention.scale", "is not 1")
    experts = read.count("expert_count", 0, least=0)
    kv_heads, ffn = read.counts("attention.head_count_kv", n), read.counts("feed_forward_length", n)
    layers = [
        LayerConfig(s, heads[i], kv_heads[i], head_dim_sliding if s else head_dim, ffn[i], i)
        for i, s in enumerate(sliding)
    ]
    return Config(
        architecture=architecture,
        vocab=rows,
        hidden=hidden,
        context=read.count("context_length"),
        window=read.count("attention.sliding_window") if any(sliding) else 0,
        eps=read.within("attention.layer_norm_rms_epsilon", None, 0, 0.1),
        softcap=read.within("final_logit_softcapping", 0.0, 0, 1e6),
        attention_scale=attention_scale,
        rope_theta=read.rope_base("rope.freq_base", "rope.global.freq_base", default=1e6),
        rope_theta_sliding=read.rope_base("rope.freq_base_swa", "rope.local.freq_base", default=1e4),
        rope_scale=read.rope_scale(metadata.get(f"{architecture}.rope.scaling.type"), "rope.scaling.factor"),
        rope_rotated=1.0 if architecture == "gemma3" else None,
        ple=read.count("embedding_length_per_layer_input", 0, least=0),
        experts=experts,
        experts_used=read.used("expert_used_count", experts),
        expert_ffn=read.counts("expert_feed_forward_length", n)[0] if experts else 0,
        layers=_shared(read, layers, read.count("attention.shared_kv_layers", 0, least=0)),
    )


def config_from_json(config: Mapping[str, Any], source: str) -> Config:
    """Do as `config_from_gguf` with a parsed `config.json` of Hugging Face (its text part, if it has several)."""
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        raise InputError(f"{source}: text_config is not an object; is this a model's config.json?")
    kind = str(text.get("model_type", config.get("model_type"))).removesuffix("_text").removesuffix("_unified")
    if kind not in ARCHITECTURES:
        raise InputError(f"{source}: model_type is {kind[:40]!r}; mlx-gemma4 runs gemma4 and gemma3")
    read = Reader({k: v for k, v in text.items() if v is not None}, "", source)
    layers = _layers_from_json(text, read, kind)
    ropes = _object(text.get("rope_parameters"))
    full = Reader(_object(ropes.get("full_attention") or text.get("rope_scaling")), "", source)
    local = Reader(_object(ropes.get("sliding_attention")), "", source)
    local.rope_scale(_rope_type(local.metadata), "factor")
    if local.number("factor", 1.0) not in (0, 1) or _bidirectional(text) or read.number("attn_logit_softcapping", 0):
        raise InputError(
            f"{source}: sliding layers with scaled RoPE, attention to what follows and softcapped attention are not "
            "supported; take another model"
        )
    experts = read.count("num_experts") if text.get("enable_moe_block") else 0
    head_dim = float(read.count("head_dim", 256))
    if (act := text.get("hidden_activation") or "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise read.error("hidden_activation", f"is {str(act)[:40]!r}")
    return Config(
        architecture=kind,
        vocab=read.count("vocab_size"),
        hidden=read.count("hidden_size"),
        context=read.count("max_position_embeddings"),
        window=read.count("sliding_window") if any(layer.sliding for layer in layers) else 0,
        eps=read.within("rms_norm_eps", 1e-6, 0, 0.1),
        softcap=read.within("final_logit_softcapping", 0.0, 0, 1e6),
        attention_scale=read.within("query_pre_attn_scalar", head_dim, 1e-3, 1e9) ** -0.5 if kind == "gemma3" else 1.0,
        rope_theta=full.rope_base("rope_theta", default=read.rope_base("rope_theta", default=1e6)),
        rope_theta_sliding=local.rope_base("rope_theta", default=read.rope_base("rope_local_base_freq", default=1e4)),
        rope_scale=full.rope_scale(_rope_type(full.metadata), "factor"),
        rope_rotated=full.within("partial_rotary_factor", 0.25 if kind == "gemma4" else 1.0, 1e-6, 1),
        ple=read.count("hidden_size_per_layer_input", 0, least=0) if kind == "gemma4" else 0,
        experts=experts,
        experts_used=read.used("top_k_experts", experts),
        expert_ffn=read.count("moe_intermediate_size") if experts else 0,
        layers=layers,
    )


def _object(value: Any) -> dict[str, Any]:
    """A part of a configuration without its nulls; {} where it is missing."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, Mapping) else {}


def _rope_type(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type"))


def _bidirectional(text: Mapping[str, Any]) -> bool:
    """True if tokens attend to later ones, as in embedding models; "vision" means those of images alone."""
    return text.get("use_bidirectional_attention") not in (None, False, "vision")


def _layers_from_json(text: Mapping[str, Any], read: Reader, kind: str) -> tuple[LayerConfig, ...]:
    """The layers of a Hugging Face configuration of architecture `kind`."""
    n = read.count("num_hidden_layers", most=MAX_LAYERS)
    types = text.get("layer_types")
    if types is None:
        period = read.count("sliding_window_pattern", 6 if kind == "gemma3" else 5)
        types = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(n)]
    if not isinstance(types, list) or len(types) != n:
        raise read.error("layer_types", f"is not a list of {n}")
    if others := [t for t in types if t not in ("sliding_attention", "full_attention")]:
        raise read.error("layer_types", f"has {str(others[0])[:40]!r}")
    sliding = [t == "sliding_attention" for t in types]
    head_dim, kv_heads = read.count("head_dim", 256), read.count("num_key_value_heads")
    global_dim, global_kv = head_dim, kv_heads
    if kind == "gemma4":
        global_dim = read.count("global_head_dim", head_dim if "per_layer_config" in text else 512)
        if text.get("attention_k_eq_v"):
            global_kv = read.count("num_global_key_value_heads", kv_heads)
    heads, ffn = read.count("num_attention_heads"), read.count("intermediate_size")
    shared = read.count("num_kv_shared_layers", 0, least=0)
    wide = n - shared if shared and text.get("use_double_wide_mlp") else n  # first layer with an MLP of twice the width
    layers = []
    for i, s in enumerate(sliding):
        shape = (kv_heads, head_dim) if s else (global_kv, global_dim)
        layers.append(LayerConfig(s, heads, *shape, 2 * ffn if i >= wide else ffn, i))
    # transformers 5.23 and later write the differences between layers by layer number instead.
    for key, own in _object(text.get("per_layer_config")).items():
        if not (key.isdigit() and int(key) < n and isinstance(own, Mapping)):
            raise read.error("per_layer_config", f"has an entry {key[:20]!r} that is none of the {n} layers")
        layer, differs = layers[int(key)], Reader(own, "", read.source)
        layers[int(key)] = replace(
            layer,
            head_dim=differs.count("head_dim", layer.head_dim),
            kv_heads=differs.count("num_key_value_heads", layer.kv_heads),
        )
    return _shared(read, layers, shared)


def _sliding_layers(read: Reader, architecture: str, n: int) -> list[bool]:
    """True for each sliding layer: from an array of flags, or from a period whose last layer is global."""
    key, default = "attention.sliding_window_pattern", None
    flags = read.metadata.get(read.prefix + key)
    if flags is not None and hasattr(flags, "__len__"):
        if len(flags) != n:
            raise read.error(key, f"has {len(flags)} entries for {n} layers")
        return [bool(flag) for flag in flags]
    if architecture == "gemma3":
        default = 6 if read.prefix + "attention.sliding_window" in read.metadata else 1
    period = read.count(key, default)
    return [(i + 1) % period != 0 for i in range(n)]


def _shared(read: Reader, layers: list[LayerConfig], shared: int) -> tuple[LayerConfig, ...]:
    """Return the layers, checked; the last `shared` of them read an earlier layer's keys and values."""
    n, own = len(layers), len(layers) - shared
    if own <= 0:
        raise InputError(f"{read.source}: all {n} layers share keys and values, none makes them; the file is damaged")
    for i, layer in enumerate(layers):
        if layer.heads % layer.kv_heads:
            raise InputError(f"{read.source}: layer {i} has {layer.heads} query heads for {layer.kv_heads} KV heads")
        if layer.head_dim % 2:
            raise InputError(f"{read.source}: layer {i} has an odd head size, {layer.head_dim}")
    for i, layer in enumerate(layers[own:], own):
        # It reads the last layer of its own kind (sliding or global) that has keys and values.
        j = max((j for j in range(own) if layers[j].sliding == layer.sliding), default=None)
        if j is None:
            raise InputError(
                f"{read.source}: layer {i} shares keys and values, but no earlier layer of its kind has any"
            )
        if (layers[j].kv_heads, layers[j].head_dim) != (layer.kv_heads, layer.head_dim):
            raise InputError(f"{read.source}: layer {i} shares the keys of layer {j}, but their shapes differ")
        layers[i] = replace(layer, kv_layer=j)
    return tuple(layers)
