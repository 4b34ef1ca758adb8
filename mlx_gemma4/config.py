"""The shape of a model, from its metadata alone.

In: the metadata of a GGUF (`gemma4` or `gemma3`), or the `config.json` of a safetensors folder.
Out: a `Config`, one `LayerConfig` a layer. No model size is hard-coded: the metadata gives every number.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InputError

ARCHITECTURES = ("gemma4", "gemma3")
MAX_LAYERS = 1024  # far above any real model; a file that claims more is damaged


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

    @property
    def own_kv_layers(self) -> int:
        """The number of layers, from the first, with keys and values of their own."""
        return sum(layer.kv_layer == i for i, layer in enumerate(self.layers))

    @property
    def value_norm(self) -> bool:
        """Gemma 4 normalises values (without a weight); Gemma 3 does not."""
        return self.architecture == "gemma4"


class _Reader:
    """Typed look-ups in metadata whose errors name the key."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str, source: str) -> None:
        self.metadata, self.prefix, self.source = metadata, prefix, source

    def error(self, key: str, what: str) -> InputError:
        return InputError(f"{self.source}: {self.prefix}{key} {what}; the file is damaged or not a Gemma text model")

    def number(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(self.prefix + key, default)
        if value is None:
            raise self.error(key, "is missing")
        if isinstance(value, (str, bytes)) or hasattr(value, "__len__"):
            raise self.error(key, "is not a number")
        value = float(value)
        if not abs(value) < 1e30:
            raise self.error(key, f"is {value}")
        return value

    def count(self, key: str, default: int | None = None, *, least: int = 1, most: int = 1 << 31) -> int:
        value = self.number(key, default)
        if value != int(value) or not least <= value <= most:
            raise self.error(key, f"is {value:g}")
        return int(value)

    def counts(self, key: str, n: int) -> list[int]:
        """One count a layer, from a scalar or an array of n."""
        value: Any = self.metadata.get(self.prefix + key)
        if not hasattr(value, "__len__") or isinstance(value, (str, bytes)):
            return [self.count(key)] * n
        if len(value) != n:
            raise self.error(key, f"has {len(value)} entries for {n} layers")
        counts = [int(v) for v in value]
        if min(counts) < 1 or max(counts) > 1 << 31:
            raise self.error(key, "holds a count that cannot be")
        return counts


def config_from_gguf(metadata: Mapping[str, Any], source: str) -> Config:
    """Read the configuration from GGUF metadata.

    Args:
        metadata: key -> value, arrays as sequences.
        source: the file's name, for errors.

    Raises:
        InputError: another architecture, a key that is missing or cannot be true.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{source}: this is a model of architecture {str(architecture)[:40]!r}; mlx-gemma4 runs gemma4 and gemma3"
        )
    read = _Reader(metadata, f"{architecture}.", source)
    n = read.count("block_count", most=MAX_LAYERS)
    sliding, heads = _sliding_layers(read, architecture, n), read.counts("attention.head_count", n)
    hidden, head_dim = read.count("embedding_length"), read.count("attention.key_length")
    head_dim_sliding = read.count("attention.key_length_swa", head_dim)
    for key in ("", "_swa"):
        key_length = read.count(f"attention.key_length{key}", head_dim)
        if read.count(f"attention.value_length{key}", key_length) != key_length:
            raise read.error(f"attention.value_length{key}", "differs from the key length")
    tokens = metadata.get("tokenizer.ggml.tokens")
    attention_scale = 1.0
    if architecture == "gemma3":
        # The 27B alone scales by hidden/heads instead of head_dim, and no key says so; llama.cpp
        # (src/models/gemma3.cpp) tells it by its 62 layers too.
        dim = hidden // heads[0] if n == 62 else head_dim
        attention_scale = read.number("attention.scale", dim**-0.5)
    experts = read.count("expert_count", 0, least=0)
    layers = _layers(
        read,
        sliding,
        heads,
        kv_heads=read.counts("attention.head_count_kv", n),
        head_dims=[head_dim_sliding if s else head_dim for s in sliding],
        ffn=read.counts("feed_forward_length", n),
        shared=read.count("attention.shared_kv_layers", 0, least=0),
    )
    config = Config(
        architecture=architecture,
        vocab=read.count("vocab_size", len(tokens) if tokens is not None else None),
        hidden=hidden,
        context=read.count("context_length"),
        window=read.count("attention.sliding_window") if any(sliding) else 0,
        eps=read.number("attention.layer_norm_rms_epsilon"),
        softcap=read.number("final_logit_softcapping", 0.0),
        attention_scale=attention_scale,
        rope_theta=read.number("rope.freq_base", 1e6),
        rope_theta_sliding=read.number("rope.freq_base_swa", 1e4),
        rope_scale=read.number("rope.scaling.factor", 1.0),
        rope_rotated=1.0 if architecture == "gemma3" else None,
        ple=read.count("embedding_length_per_layer_input", 0, least=0),
        experts=experts,
        experts_used=read.count("expert_used_count") if experts else 0,
        expert_ffn=read.counts("expert_feed_forward_length", n)[0] if experts else 0,
        layers=layers,
    )
    return _checked(source, config)


def config_from_json(config: Mapping[str, Any], source: str) -> Config:
    """Read the configuration from a Hugging Face `config.json` (text part, if it has several).

    Args:
        config: the parsed file.
        source: its name, for errors.

    Raises:
        InputError: another architecture, a key that is missing or cannot be true.
    """
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        raise InputError(f"{source}: text_config is not an object; is this a model's config.json?")
    kind = str(text.get("model_type", config.get("model_type"))).removesuffix("_text")
    if kind not in ARCHITECTURES:
        raise InputError(f"{source}: model_type is {kind[:40]!r}; mlx-gemma4 runs gemma4 and gemma3")
    read = _Reader({k: v for k, v in text.items() if v is not None}, "", source)
    layers = _layers_from_json(text, read, kind)
    ropes = text.get("rope_parameters") or {}
    full: Mapping[str, Any] = ropes.get("full_attention") or text.get("rope_scaling") or {}
    local: Mapping[str, Any] = ropes.get("sliding_attention", {})
    moe = bool(text.get("enable_moe_block"))
    head_dim = float(read.count("head_dim", 256))
    result = Config(
        architecture=kind,
        vocab=read.count("vocab_size"),
        hidden=read.count("hidden_size"),
        context=read.count("max_position_embeddings"),
        window=read.count("sliding_window") if any(layer.sliding for layer in layers) else 0,
        eps=read.number("rms_norm_eps", 1e-6),
        softcap=read.number("final_logit_softcapping", 0.0),
        attention_scale=read.number("query_pre_attn_scalar", head_dim) ** -0.5 if kind == "gemma3" else 1.0,
        rope_theta=float(full.get("rope_theta", text.get("rope_theta", 1e6))),
        rope_theta_sliding=float(local.get("rope_theta", text.get("rope_local_base_freq", 1e4))),
        rope_scale=float(full.get("factor", 1.0)),
        rope_rotated=float(full.get("partial_rotary_factor", 0.25 if kind == "gemma4" else 1.0)),
        ple=read.count("hidden_size_per_layer_input", 0, least=0) if kind == "gemma4" else 0,
        experts=read.count("num_experts") if moe else 0,
        experts_used=read.count("top_k_experts") if moe else 0,
        expert_ffn=read.count("moe_intermediate_size") if moe else 0,
        layers=layers,
    )
    return _checked(source, result)


def _layers_from_json(text: Mapping[str, Any], read: _Reader, kind: str) -> tuple[LayerConfig, ...]:
    """The layers of a Hugging Face configuration of architecture `kind`."""
    n = read.count("num_hidden_layers", most=MAX_LAYERS)
    types = text.get("layer_types")
    if types is None:
        period = read.count("sliding_window_pattern", 6 if kind == "gemma3" else 5)
        types = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(n)]
    if not isinstance(types, list) or len(types) != n:
        raise read.error("layer_types", f"is not a list of {n}")
    sliding = [t == "sliding_attention" for t in types]
    head_dim, kv_heads = read.count("head_dim", 256), read.count("num_key_value_heads")
    global_dim, global_kv = head_dim, kv_heads
    if kind == "gemma4":
        global_dim = read.count("global_head_dim", head_dim if "per_layer_config" in text else 512)
        if text.get("attention_k_eq_v"):
            global_kv = read.count("num_global_key_value_heads", kv_heads)
    head_dims = [head_dim if s else global_dim for s in sliding]
    kv_counts = [kv_heads if s else global_kv for s in sliding]
    # transformers 5.23 and later write the differences between layers by layer number instead.
    for i, own in (text.get("per_layer_config") or {}).items():
        if not (i.isdigit() and int(i) < n and isinstance(own, Mapping)):
            raise read.error("per_layer_config", f"has an entry {i[:20]!r} that is none of the {n} layers")
        layer = _Reader(own, "", read.source)
        head_dims[int(i)] = layer.count("head_dim", head_dims[int(i)])
        kv_counts[int(i)] = layer.count("num_key_value_heads", kv_counts[int(i)])
    ffn, shared = read.count("intermediate_size"), read.count("num_kv_shared_layers", 0, least=0)
    wide = n - shared if shared and text.get("use_double_wide_mlp") else n  # first layer with an MLP of twice the width
    widths = [2 * ffn if i >= wide else ffn for i in range(n)]
    return _layers(read, sliding, [read.count("num_attention_heads")] * n, kv_counts, head_dims, widths, shared)


def _sliding_layers(read: _Reader, architecture: str, n: int) -> list[bool]:
    """True for each sliding layer: from an array of flags, or from a period whose last layer is global."""
    pattern = read.metadata.get(read.prefix + "attention.sliding_window_pattern")
    if pattern is None and architecture == "gemma3":
        pattern = 6 if read.prefix + "attention.sliding_window" in read.metadata else 1
    if pattern is None:
        raise read.error("attention.sliding_window_pattern", "is missing")
    if hasattr(pattern, "__len__"):
        if len(pattern) != n:
            raise read.error("attention.sliding_window_pattern", f"has {len(pattern)} entries for {n} layers")
        return [bool(p) for p in pattern]
    if int(pattern) < 1:
        raise read.error("attention.sliding_window_pattern", "is not positive")
    return [(i + 1) % int(pattern) != 0 for i in range(n)]


def _layers(
    read: _Reader,
    sliding: list[bool],
    heads: list[int],
    kv_heads: list[int],
    head_dims: list[int],
    ffn: list[int],
    shared: int,
) -> tuple[LayerConfig, ...]:
    """One LayerConfig a layer; the last `shared` layers read an earlier layer's keys and values."""
    n = len(sliding)
    if shared >= n:
        raise InputError(f"{read.source}: all {n} layers share keys and values, none makes them; the file is damaged")
    layers = []
    for i in range(n):
        own = i < n - shared
        # A sharing layer reads the last layer of its own kind (sliding or global) that has keys and values.
        sources = [i] if own else [j for j in range(n - shared) if sliding[j] == sliding[i]]
        if not sources:
            raise InputError(
                f"{read.source}: layer {i} shares keys and values, but no earlier layer of its kind has any"
            )
        layers.append(LayerConfig(sliding[i], heads[i], kv_heads[i], head_dims[i], ffn[i], sources[-1]))
    return tuple(layers)


def _checked(source: str, config: Config) -> Config:
    """Return the configuration, or raise InputError if its numbers contradict each other."""
    for i, layer in enumerate(config.layers):
        if layer.heads % layer.kv_heads:
            raise InputError(f"{source}: layer {i} has {layer.heads} query heads for {layer.kv_heads} KV heads")
        if layer.head_dim % 2:
            raise InputError(f"{source}: layer {i} has an odd head size, {layer.head_dim}")
        giver = config.layers[layer.kv_layer]
        if (giver.kv_heads, giver.head_dim) != (layer.kv_heads, layer.head_dim):
            raise InputError(f"{source}: layer {i} shares the keys of layer {layer.kv_layer}, but their shapes differ")
    if config.experts and not 0 < config.experts_used <= config.experts:
        raise InputError(f"{source}: {config.experts_used} experts used of {config.experts}")
    return config
