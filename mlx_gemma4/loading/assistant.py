"""From a file or folder to an assistant that drafts for a loaded model; and the assistant that lies beside a model.

In: a GGUF in one of the three spellings that are in use, or a folder of safetensors as Hugging Face publishes them.
Out: an `Assistant`, whose every tensor is accounted for. docs/drafting.md lists the spellings.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import MAX_LAYERS, Config, Reader, config_from_gguf, config_from_json
from ..errors import InputError
from ..files.gguf import open_gguf
from ..files.repository import best_drafters, files_beside
from ..memory import Holding, limit_memory, on_cpu
from ..model.assistant import Assistant, AssistantConfig, AssistantWeights, mismatch
from ..model.model import Model
from ..ops.dispatch import Kernels
from ..ops.stock import Affine, Weight
from ..paths import read_object
from ..quant.formats import Packed
from .from_gguf import GGUFSource
from .from_safetensors import FolderSource
from .loader import account, assemble, fusions, read_weights, sizes
from .tensors import Cut, Source, Spec, tensor_specs

log = logging.getLogger("mlx_gemma4")

# Architectures of GGUFs, and what each calls the target's hidden size.
SPELLINGS = {
    "gemma4-assistant": "embedding_length_out",
    "gemma4_assistant": "n_embd_backbone",
    "gemma4_mtp": "backbone_embedding_length",
}
MODEL_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")  # of config.json
# What no model's configuration has, or what says of the target's keys; nextn_predict_layers is block_count again.
OWN_KEYS = {*SPELLINGS.values(), "nextn_predict_layers", "centroid_top_k", "use_ordered_embeddings"}
OWN_KEYS |= {"attention.k_eq_v", "attention_k_eq_v"}
# The tensors that no model has, by what their names have in common.
OWN_NAMES = {
    re.compile(r"(?<!\w)(?:mtp_)?pre_proj(?:ection)?\.weight"): "pre_projection.weight",
    re.compile(r"(?<!\w)(?:mtp_)?post_proj(?:ection)?\.weight"): "post_projection.weight",
    re.compile(r"(?:^|[._])centroids(?:\.weight)?"): "centroids.weight",
    re.compile(r"(?:^|[._])ordering(?:\.weight)?"): "ordering.weight",
}


class Renamed:
    """A source whose tensors go by an assistant's names."""

    def __init__(self, source: Source) -> None:
        self.name, self._source = source.name, source
        self._names = {_own_name(name): name for name in source.entries}
        self.entries = {own: source.entries[name] for own, name in self._names.items()}

    def read(
        self, names: Sequence[str], spec: Spec, holding: Holding, kernels: Kernels | None, cuts: Sequence[Cut] = ()
    ) -> Weight:
        return self._source.read([self._names[name] for name in names], spec, holding, kernels, cuts)


def _own_name(name: str) -> str:
    return next(
        (own for pattern, own in OWN_NAMES.items() if (m := pattern.search(name)) and m.end() == len(name)), name
    )


@contextmanager
def open_assistant(path: Path) -> Iterator[tuple[AssistantConfig, Source]]:
    """Yield an assistant's configuration and its tensors, unread. Raises InputError."""
    if path.is_dir():
        file = path / "config.json"
        contents = read_object(file) if file.is_file() else {}
        if contents.get("model_type") not in MODEL_TYPES:
            raise _no_assistant(path, f"a folder of model_type {str(contents.get('model_type'))[:40]!r}")
        config = _from_json(contents, str(file))
        source = Renamed(FolderSource(path, config.decoder, contents.get("quantization") or {}))
        yield _with_head(config, Reader(contents, "", str(file)), "centroid_intermediate_top_k", source), source
    else:
        with open_gguf(path) as gguf:
            architecture = str(gguf.metadata.get("general.architecture"))
            if architecture not in SPELLINGS:
                raise _no_assistant(path, f"a model of architecture {architecture[:40]!r}")
            source = Renamed(GGUFSource(gguf))
            yield assistant_from_gguf(gguf.metadata, source), source


def _no_assistant(path: Path, what: str) -> InputError:
    return InputError(
        f"{path}: is {what}, no assistant of Gemma 4; give --draft a gemma4-assistant file, or --no-draft"
    )


def assistant_from_gguf(metadata: Mapping[str, Any], source: Source) -> AssistantConfig:
    """Return the configuration that a GGUF in one of SPELLINGS states; `source` has its tensors."""
    architecture = metadata["general.architecture"]
    own = {k.removeprefix(f"{architecture}."): v for k, v in metadata.items() if k.startswith(f"{architecture}.")}
    read = Reader(own, "", source.name)
    layers, head = read.count("block_count", most=MAX_LAYERS), source.entries.get("token_embd.weight")
    own = {
        "attention.sliding_window_pattern": [i < layers - 1 for i in range(layers)],
        "context_length": 1,
        "vocab_size": head.shape[0] if head else 1,
        **own,
        "attention.head_count_kv": 1,  # all of this is the target's
        "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0,
        "final_logit_softcapping": 0,
    }
    named = {f"gemma4.{key}": value for key, value in own.items() if key not in OWN_KEYS}
    decoder = config_from_gguf({**named, "general.architecture": "gemma4"}, source.name)
    # Files may leave out the frequencies of global heads, of which a quarter turn in all of Gemma 4.
    config = AssistantConfig(replace(decoder, rope_rotated=0.25), read.count(SPELLINGS[architecture]))
    return _with_head(config, read, "centroid_top_k", source)


def _from_json(contents: Mapping[str, Any], file: str) -> AssistantConfig:
    text = contents.get("text_config")
    if not isinstance(text, Mapping):
        raise InputError(f"{file}: has no text_config; download the assistant again")
    targets = {"num_key_value_heads": 1, "num_kv_shared_layers": 0, "attention_k_eq_v": False}
    none = {"hidden_size_per_layer_input": 0, "enable_moe_block": False, "final_logit_softcapping": 0}
    decoder = config_from_json({**text, **targets, **none, "model_type": "gemma4"}, file)
    return AssistantConfig(decoder, Reader(contents, "", file).count("backbone_hidden_size"))


def _with_head(config: AssistantConfig, read: Reader, used: str, source: Source) -> AssistantConfig:
    """Return a configuration with the centroids that its tensors have. Converters drop them: then the head is dense."""
    there = source.entries.keys() >= {"centroids.weight", "ordering.weight"}
    if not there or not read.metadata.get("use_ordered_embeddings", True):
        return config
    centroids, vocab = source.entries["centroids.weight"].shape[0], config.decoder.vocab
    if vocab % centroids:
        raise InputError(
            f"{source.name}: {vocab} tokens can't be shared among {centroids} centroids; download it again"
        )
    return replace(
        config, centroids=centroids, centroids_used=read.count(used, min(32, centroids), most=min(32, centroids))
    )


def assistant_specs(config: AssistantConfig) -> dict[str, Spec]:
    """Return every tensor that an assistant's configuration calls for, by our names."""
    c, hidden = config.decoder, config.target_hidden
    keys = ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight")
    specs = {name: spec for name, spec in tensor_specs(c).items() if not name.endswith(keys)}
    specs["pre_projection.weight"] = Spec((c.hidden, 2 * hidden), "matrix")
    specs["post_projection.weight"] = Spec((hidden, c.hidden), "matrix")
    if config.centroids:
        specs["centroids.weight"] = Spec((config.centroids, c.hidden), "matrix")
        specs["ordering.weight"] = Spec((c.vocab,), "vector")
    return specs


def load_assistant(path: Path, target: Model, whole: Config | None = None) -> Assistant:
    """Load an assistant for a model; `whole`: the configuration of all of it, where `target` is a rank's part.

    Raises:
        InputError: the file is no assistant, or that of another model; a tensor is missing, has another shape or a type
            that can't be read; too little memory.
    """
    with open_assistant(path) as (config, source):
        if wrong := mismatch(config, whole or target.config):
            raise InputError(f"{path}: this assistant is {wrong}; give --draft the model's own, or --no-draft")
        return read_assistant(config, source, target, whole)


def read_assistant(config: AssistantConfig, source: Source, target: Model, whole: Config | None = None) -> Assistant:
    """Read an assistant that matches its target. Raises InputError."""
    present, scales = account(config.decoder, source, assistant_specs(config))
    packed, dense = sizes(source, present)
    holding: Holding = target.plan.holding if target.plan else "dense" if on_cpu() else "packed"
    more = dense if holding == "dense" else packed
    if target.plan and more + target.plan.total > target.plan.available:
        raise InputError(f"{source.name}: {more / 1e9:.1f} GB beside the model's are more than is free; use --no-draft")
    apart = {name: spec for name, spec in present.items() if name not in scales}
    joined = fusions(source, apart, len(config.decoder.layers))
    weights = read_weights(source, present, joined, scales, holding, target.kernels)
    own = {name: weights.pop(f"{name}.weight") for name in ("pre_projection", "post_projection")}
    centroids, ordering = (weights.pop(f"{name}.weight", None) for name in ("centroids", "ordering"))
    decoder = assemble(config.decoder, weights)
    if ordering is not None:
        assert isinstance(ordering, mx.array)
        ordering = ordering.astype(mx.int32)
        if not np.array_equal(np.sort(np.array(ordering)), np.arange(config.decoder.vocab)):
            raise InputError(f"{source.name}: its ordering has not each token once; it is damaged, download it again")
        head = clustered(decoder.output, ordering, config.centroids)
        decoder = replace(decoder, token_embd=head, output=head)
    if target.plan:
        limit_memory(target.plan)
    made = AssistantWeights(decoder, **own, centroids=centroids, ordering=ordering)
    return Assistant(config, made, target, whole)


def clustered(head: Weight, ordering: mx.array, clusters: int) -> Weight:
    """Return a head [vocab, K] as [clusters, vocab / clusters, K], rows in an order: products take it as experts."""

    def arranged(a: mx.array) -> mx.array:
        return a[ordering].reshape(clusters, -1, *a.shape[1:])

    made: Weight
    if isinstance(head, Packed):
        scales = (None if a is None else arranged(a) for a in (head.group_scales, head.block_scales))
        made = Packed(head.format, (clusters, head.shape[0] // clusters, head.shape[1]), arranged(head.codes), *scales)
    elif isinstance(head, Affine):
        made = Affine(arranged(head.codes), arranged(head.scales), arranged(head.biases), head.group, head.bits)
    else:
        made = arranged(head)
    mx.eval([made] if isinstance(made, mx.array) else [a for a in vars(made).values() if isinstance(a, mx.array)])
    return made


def assistant_beside(path: Path, target: Config) -> Path | None:
    """Return the assistant that lies beside a model's file, or in a folder MTP beside it, and fits the model.

    Of several, the one whose name begins most like the model's comes first, and of these Q8_0.
    """
    if path.is_dir():
        return None
    for file in best_drafters(files_beside(path, "MTP"), path.name):
        try:
            with open_assistant(Path(file)) as (config, _):
                if not (wrong := mismatch(config, target)):
                    return Path(file)
            log.info("%s: this assistant is %s", file, wrong)
        except (InputError, OSError) as error:
            log.info("%s", error)
    return None
