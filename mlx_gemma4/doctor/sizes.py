"""The sizes of a loaded model that decide which kernels it needs, and at which shapes; and the checks of these.

In: a loaded model. Out: `Sizes`, with a `Product` and a `Heads` for each kind that the model has, and from such sizes
the `Check`s that each module of mlx_gemma4/ops declares for its own kernels.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from importlib import import_module
from typing import Any

import mlx.core as mx

from .. import ops
from ..model.assistant import Assistant
from ..model.model import Model
from ..model.weights import Layer, Weights
from ..ops import matvec
from ..ops.cases import ALL_CASES, Check, Heads, Product, Sizes
from ..ops.epilogue import SHRINK
from ..quant.formats import FLOATS, FORMATS, Packed

for _module in pkgutil.iter_modules(ops.__path__):
    import_module(f"{ops.__name__}.{_module.name}")  # registers its cases


def checks(s: Sizes, lengths: Sequence[int], rows: int | None = None) -> Iterator[Check]:
    """Yield a check of each kernel that a model of these sizes needs, by operation.

    Args:
        lengths: contexts in tokens at which to check global attention.
        rows: quick checks: the most rows of a weight to make; its kernel is launched as for all of them.
    """
    s = replace(s, lengths=tuple(lengths), rows=rows)
    for cases in sorted(ALL_CASES, key=lambda cases: cases.__name__):
        yield from cases(s)


def sizes_of(model: Model) -> Sizes:
    """Return the sizes of a loaded model."""
    c, w = model.config, model.weights
    heads = []
    products = outer_products(w)
    for shape, layer in zip(c.layers, w.layers, strict=True):
        own = layer.attn_k_norm is not None
        joined = ""
        if layer.attn_qk is not None:
            joined = "kv" if layer.attn_qk.shape[0] > (shape.heads + shape.kv_heads) * shape.head_dim else "k"
        v_is_k = own and layer.attn_v is None and joined != "kv"
        window = c.window if shape.sliding else 0
        heads.append(Heads(shape.heads, shape.kv_heads, shape.head_dim, window, joined, own, v_is_k, c.value_norm))
        products += layer_products(layer, c.experts_used, c.hidden).values()
    usable = [used for p in products for used in _as_launched(p)]
    packed = [p for p in usable if p.type in FORMATS]
    short = [Product(p.type, p.shape, narrow=True, used=p.used, own_x=p.used > 0) for p in packed]  # short prompts
    for tokens in (2, matvec.MAX_TOKENS):  # drafts and batches
        usable += [replace(p, tokens=tokens) for p in packed if not p.used and matvec.takes(p.shape, tokens)]
    ple_table = "" if w.per_layer_token_embd is None else _type(w.per_layer_token_embd)
    experts = (c.experts, c.experts_used if c.experts else 0)
    tables = (_type(w.token_embd), ple_table)
    prompts = (*short, *(p for p in products if p.used and p.type in ("F16", "BF16")))
    return Sizes(
        c.hidden,
        c.vocab,
        tuple(heads),
        tuple(usable),
        *tables,
        len(c.layers),
        c.ple,
        *experts,
        prompts,
        c.attention_scale,
    )


def assistant_sizes(assistant: Assistant) -> Sizes:
    """Return the sizes of an assistant, beside its target's."""
    c, w = assistant.loaded.config, assistant.weights
    products = [Product(_type(w.pre_projection), w.pre_projection.shape)]
    products += [Product(_type(a), a.shape, narrow=True) for a in (w.post_projection, w.centroids) if a is not None]
    products.append(
        Product(_type(w.decoder.output), w.decoder.output.shape, narrow=True, used=assistant.config.centroids_used)
    )
    heads = []
    for shape, layer in zip(c.layers, w.decoder.layers, strict=True):
        products += layer_products(layer, 0, c.hidden).values()
        window = c.window if shape.sliding else 0
        heads.append(Heads(shape.heads, shape.kv_heads, shape.head_dim, window, "", has_kv=False))
    usable = tuple(used for p in products for used in _as_launched(p))
    experts = (assistant.config.centroids, assistant.config.centroids_used)
    target, tokens = assistant.target, w.decoder.output.shape[1] if w.ordering is not None else 0
    return Sizes(
        c.hidden,
        0,
        tuple(heads),
        usable,
        _type(target.weights.token_embd),
        experts=experts[0],
        used=experts[1],
        centroid_tokens=tokens,
        target_hidden=target.config.hidden,
    )


def outer_products(w: Weights) -> list[Product]:
    """Return the products outside of layers: with the head, and what makes inputs of per-layer embeddings."""
    projection = w.per_layer_model_proj
    head = Product(_type(w.output), w.output.shape, narrow=True)
    return [head] if projection is None else [head, Product(_type(projection), projection.shape, narrow_out=True)]


def layer_products(layer: Layer, used: int, hidden: int) -> dict[str, Product]:
    """Return the products of a layer as the decode step computes them, by the weights' names."""
    folded: dict[str, dict[str, Any]] = {
        **{name: {"narrow": True} for name in ("attn_qk", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_down")},
        "ffn_gate_up": {"glu": True, "factor": SHRINK, "narrow": True, "narrow_out": True},
        "ffn_gate": {"times": True, "factor": SHRINK, "narrow": True, "narrow_out": True},
        "ffn_up": {"narrow": True, "narrow_out": True},
        "inp_gate": {"times": True, "factor": SHRINK, "narrow": True, "narrow_out": True, "given": SHRINK},
        "proj": {"narrow": True},
        "ffn_gate_inp": {"norm": True, "factor": hidden**-0.5},
        "ffn_gate_up_exps": {"norm": True, "glu": True, "factor": SHRINK, "used": used, "narrow_out": True},
        "ffn_gate_exps": {"norm": True, "times": True, "factor": SHRINK, "used": used, "narrow_out": True},
        "ffn_up_exps": {"norm": True, "used": used},
        "ffn_down_exps": {"used": used, "own_x": True, "narrow": True},
    }
    weights = {f.name: getattr(layer, f.name) for f in fields(layer)}
    there = {name: options for name, options in folded.items() if weights[name] is not None}
    return {name: Product(_type(weights[name]), weights[name].shape, **options) for name, options in there.items()}


def _as_launched(p: Product) -> list[Product]:
    """Split a product into those that kernels run: gate and up of an unpacked weight apart, its experts not at all."""
    if p.type not in FORMATS and (p.type not in FLOATS or len(p.shape) > 2):
        return []
    if p.type in FORMATS or not p.glu:
        return [p]
    half = (p.shape[0] // 2, p.shape[1])
    return [replace(p, shape=half, glu=False, factor=1.0), replace(p, shape=half, glu=False, times=True)]


def _type(w: Any) -> str:
    """Return a weight's GGUF type; "" for MLX's own quantization."""
    if isinstance(w, Packed):
        return w.format.name
    return next((str(name) for name, dtype in FLOATS.items() if isinstance(w, mx.array) and w.dtype == dtype), "")
