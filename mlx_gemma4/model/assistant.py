"""An assistant: a small decoder that drafts tokens for a target model, whose keys and values it attends to.

In: the tokens so far, the target's KV state, its hidden state at the last token. Out: the tokens that the assistant
expects next. It has no keys and values of its own and reads no prompt. Knows no files (loading/assistant.py) and
nothing of what becomes of its drafts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import cast

import mlx.core as mx

from ..config import Config
from ..execution import execution
from ..kv.state import KVState
from ..ops.choose import SPREAD, TOP_K
from ..ops.dispatch import ALL, Kernels, references
from ..ops.embed import EMBED
from ..ops.epilogue import FP32, Folded
from ..ops.qkv import QKV_POST, ROTATIONS, QKVArrays, QKVOptions
from ..ops.sample import LIKELIEST, SAMPLE, Draw, draws_of
from ..ops.stock import Weight
from ..shard import Part
from .batch_replay import HiddenRow, QueuedTokens
from .decode import TRACES, Attend, Constants, Inputs, attend_parts, can_step, inputs_of, through_layers
from .draft_replay import ReplayedDrafts
from .forward import rope_wavelengths, rows_by_rank
from .model import Model
from .spans import numbers_at, placed
from .weights import Loaded, Weights


@dataclass(frozen=True)
class AssistantConfig:
    """The shape of an assistant. Widths in elements."""

    decoder: Config  # its `kv_layer`s are layers of the target once it is `matched`
    target_hidden: int
    centroids: int = 0  # of the head; 0: it scores the whole vocabulary
    centroids_used: int = 0  # whose tokens it scores


@dataclass(frozen=True)
class AssistantWeights:
    """The weights of an assistant. h: its hidden size, H: the target's."""

    decoder: Weights  # its `output` is the head: [vocab, h], or [centroids, vocab / centroids, h] with centroids
    pre_projection: Weight  # [h, 2 H]
    post_projection: Weight  # [H, h]
    centroids: Weight | None = None  # [centroids, h]
    ordering: mx.array | None = None  # int32 [vocab], the tokens of the first centroid, then of the second ..


def mismatch(config: AssistantConfig, target: Config) -> str | None:
    """Return what keeps an assistant from drafting for a model, as in "it is ..."; None: nothing."""
    if target.architecture != "gemma4":
        return f"for Gemma 4, and the model is {target.architecture}"
    if config.target_hidden != target.hidden:
        return f"for a model of hidden size {config.target_hidden}, and the model's is {target.hidden}"
    if config.decoder.vocab != target.vocab:
        return f"for a vocabulary of {config.decoder.vocab} tokens, and the model's has {target.vocab}"
    read = kv_layers(target)
    for layer in config.decoder.layers:
        kind = "sliding" if layer.sliding else "global"
        if layer.sliding not in read:
            return f"for a model with {kind} layers, and this one has none with keys of its own"
        theirs = target.layers[read[layer.sliding]]
        if layer.head_dim != theirs.head_dim:
            return f"for {kind} heads of {layer.head_dim}, and the model's are of {theirs.head_dim}"
        if layer.heads % theirs.kv_heads:
            return f"of {layer.heads} heads, which the model's {theirs.kv_heads} KV heads of {kind} layers don't divide"
    return None


def kv_layers(target: Config) -> dict[bool, int]:
    """Return the layers whose keys and values assistants read, by kind: the last of each with some of its own."""
    return {layer.sliding: i for i, layer in enumerate(target.layers) if layer.kv_layer == i}


def matched(config: AssistantConfig, target: Config) -> Config:
    """Return an assistant's layers as they read a target's keys and values, where nothing is a `mismatch`."""
    read, own = kv_layers(target), config.decoder
    layers = (
        replace(s, kv_layer=read[s.sliding], kv_heads=target.layers[read[s.sliding]].kv_heads) for s in own.layers
    )
    return replace(own, layers=tuple(layers), window=target.window)


class Assistant:
    """Drafts tokens for a target; a `generation.drafting.Drafter`."""

    needs_hidden = True

    def __init__(
        self, config: AssistantConfig, weights: AssistantWeights, target: Model, whole: Config | None = None
    ) -> None:
        """`whole`: the configuration of all of the target, where `target` is a rank's part of it. Then all ranks draft
        together, each for the heads whose keys and values it has."""
        self.config, self.weights, self.target = config, weights, target
        own, part = matched(config, whole or target.config), None
        self.heads = {layer.sliding: range(layer.heads) for layer in own.layers}  # that attend here, by kind of layer
        if target.loaded.part and whole:
            own, self.heads, part = _in_part(own, target.loaded.part)
        kinds = {layer.sliding: layer for layer in own.layers}
        waves = {k: rope_wavelengths(own, layer, weights.decoder.rope_freqs) for k, layer in kinds.items()}
        mx.eval(list(waves.values()))
        self.loaded = Loaded(own, weights.decoder, target.kv_dtype, waves, target.kernels, part)
        in_kernels = can_step(own, 1) and can_step(target.config, 1)
        self.run = target.kernels if target.kernels and in_kernels else references()
        self.constants = Constants.of(self.loaded)
        self._replayer: ReplayedDrafts | None = None
        if target.batcher and target.replayer and target.part is None:  # of a part they are traced
            self._replayer = ReplayedDrafts(self.loaded, self.run, config.target_hidden, self.tokens, target.batcher)
        self._traced = lru_cache(TRACES)(lambda _, count: mx.compile(partial(self.drafted, count)))

    def draft(
        self,
        tokens: Sequence[int],
        state: KVState,
        hidden: mx.array | HiddenRow | None,
        count: int,
        draws: Sequence[Draw] = (),
    ) -> list[int]:
        """Return the `count` tokens that it expects after `tokens`.

        Args:
            tokens: all so far, of which the last is not in `state` yet.
            state: the target's, of all tokens but the last. It stays as it is.
            hidden: the target's after its last norm, which the head made the last token from; an array: fp32 [H].
            draws: how to draw each token from the assistant's logits, the likeliest after those.
        """
        if hidden is None or not count or not state.length:
            return []
        if self._replayer is not None and self._replayer.takes(state):
            queued = self.queue(tokens, state, hidden, count, draws)
            return [] if queued is None else queued.tokens()
        if isinstance(hidden, HiddenRow):
            return []
        return cast("list[int]", self.start(tokens[-1], state, hidden, count, _in_kernel(draws, count)).tolist())

    def queue(
        self,
        tokens: Sequence[int],
        state: KVState,
        hidden: mx.array | HiddenRow | None,
        count: int,
        draws: Sequence[Draw] = (),
    ) -> QueuedTokens | None:
        """Start what `draft` makes, and return at once; None: `draft` is the way."""
        replayer = self._replayer
        if hidden is None or not count or not state.length or replayer is None or not replayer.takes(state):
            return None
        return replayer.start(tokens[-1], state, hidden, _in_kernel(draws, count) or count)

    def start(self, last: int, state: KVState, hidden: mx.array, count: int, draws: Sequence[Draw] = ()) -> mx.array:
        """Start `draft` after a token, launch by launch; return what it will draft, int32 [count].

        Args:
            draws: `count` of them, each `in_kernel`, or none.
        """
        run = self.run
        with execution():
            inputs, drawn = self.inputs(state), [draws_of(draws)] if draws else []
            shapes = (tuple(k.shape for k, _ in segments) for segments in inputs["segments"].values())
            lazy = not draws or run.off.isdisjoint((SAMPLE.key, ALL))
            traced = run.traced and not run.eager and lazy
            made = self._traced((run.off, len(draws), *shapes), count) if traced else partial(self.drafted, count)
            drafted = made(mx.array([last], mx.int32), hidden[None], inputs, *drawn)
            mx.async_eval(drafted)
        return drafted

    def inputs(self, state: KVState) -> Inputs:
        """Return what drafts read of a state: that of a query at the position of the token that comes next."""
        layers, own = state.layers, self.loaded.config.layers
        read = sorted({layer.kv_layer for layer in own if self.heads[layer.sliding]}) or [*layers][:1]
        return inputs_of(self.target.loaded, {i: layers[i] for i in read}, 0)[0]

    def drafted(
        self, count: int, ids: mx.array, hidden: mx.array, inputs: Inputs, draws: mx.array | None = None
    ) -> mx.array:
        """Return the next `count` tokens, int32 [count]: a function of arrays, each step fed with the one before.

        All steps turn their queries to the position of the first one's token, and see the same keys: so assistants
        are trained.

        Args:
            ids: int32 [1], the last token.
            hidden: fp32 [1, H].
            draws: int32 [count, ..], of `draws_of`; None: the likeliest.
        """
        return self.tokens(self.run, count, ids, hidden, self.attention(inputs), draws)

    def tokens(
        self, run: Kernels, count: int, ids: mx.array, hidden: mx.array, attend: Attend, draws: mx.array | None
    ) -> mx.array:
        """`drafted`, of any keys and values; recorded if it has draws."""
        found: mx.array | None = None
        for i in range(count):
            h = self.step(run, ids, hidden, attend)
            logits = self.scores(run, h)
            if draws is None:
                ids = mx.argmax(logits, axis=-1).astype(mx.int32)
                found = ids if found is None else mx.concatenate([found, ids])
            else:
                found = run(SAMPLE, logits, draws[i : i + 1], before=found)
                ids = found[i : i + 1]
            if i + 1 < count:
                hidden = run.product(h, self.weights.post_projection, FP32)
        assert found is not None
        return found

    def step(self, run: Kernels, ids: mx.array, hidden: mx.array, attend: Attend) -> mx.array:
        """Return the assistant's hidden state after its last norm, [1, h], of a token [1] and a hidden state [1, H]."""
        target, part = self.target, self.target.loaded.part
        table, factor = target.weights.token_embd, math.sqrt(target.config.hidden)
        if part is None:
            joined = run(EMBED, ids, table, factor, behind=hidden)
        else:

            def look(ids: mx.array, table: Weight, rows: range | None) -> mx.array:
                return run(EMBED, ids, table, factor, rows=rows)

            (embedded,) = rows_by_rank(part, ids, [table], look)
            if part.shard.kind == "layers":  # the first rank has the whole table
                (embedded,) = part.sums(mx.zeros_like(embedded) if part.receives else embedded)
            joined = mx.concatenate([embedded, hidden], axis=1)
        x = run.product(joined, self.weights.pre_projection, FP32)
        return through_layers(self.loaded, run, self.constants, x, attend)

    def scores(self, run: Kernels, h: mx.array) -> mx.array:
        """Return the logits of a hidden state [1, h], fp32 [1, vocab]."""
        w = self.weights
        if w.centroids is None or w.ordering is None:
            return run.product(h, w.decoder.output, FP32)
        near, _ = run(TOP_K, run.product(h, w.centroids, FP32), self.config.centroids_used)  # [1, used]
        near = near.reshape(-1)
        return run(SPREAD, run.product(h, w.decoder.output, FP32, Folded(ids=near)), near, w.ordering)

    def attention(self, inputs: Inputs) -> Attend:
        """Return the attention of a draft's layers to what `inputs` gives."""
        run, c = self.run, self.loaded.config
        places = placed(numbers_at(inputs["position"], *inputs["spans"]), inputs["lengths"])
        rope = {k: run(ROTATIONS, places.position, waves, tokens=1) for k, waves in self.loaded.wavelengths.items()}

        def attend(i: int, q: mx.array, k: mx.array | None, v: mx.array | None, options: QKVOptions) -> mx.array:
            shape, norm = c.layers[i], self.weights.decoder.layers[i].attn_q_norm
            q, _, _ = run(QKV_POST, QKVArrays(q, None, None, norm, None, rope[shape.sliding]), options)
            heads, dim = self.heads[shape.sliding], shape.head_dim
            if not heads:
                return mx.zeros((1, shape.heads * dim), q.dtype)
            some = q if len(heads) == shape.heads else q[:, heads.start : heads.stop]
            seen = attend_parts(run, c, shape, some, inputs, inputs["tails"][shape.kv_layer], places)
            return seen if some is q else mx.pad(seen, [(0, 0), (heads.start * dim, (shape.heads - heads.stop) * dim)])

        return attend


def _in_kernel(draws: Sequence[Draw], count: int) -> list[Draw]:
    """Return `count` draws by the same numbers, without filters that no kernel makes; of none, none."""
    made = [draw if draw.in_kernel else draw._replace(top_k=0, top_p=1.0, min_p=0.0) for draw in draws[:count]]
    return made + [LIKELIEST] * (count - len(made) if made else 0)


def _in_part(own: Config, part: Part) -> tuple[Config, dict[bool, range], Part]:
    """Return an assistant's configuration with a rank's numbers of layers, the query heads that attend there by kind of
    layer, and what says which layers' attention is summed over ranks."""
    heads, summed, by_layers = dict[bool, range](), set[int](), part.shard.kind == "layers"
    for i, shape in enumerate(own.layers):
        kv, group = part.kv_heads.get(shape.kv_layer, range(0)), shape.heads // shape.kv_heads
        heads[shape.sliding] = range(kv.start * group, kv.stop * group)
        if by_layers or shape.kv_layer in part.split["attention"]:
            summed.add(i)
    layers = tuple(replace(shape, kv_layer=shape.kv_layer - part.layers.start) for shape in own.layers)
    split = {"attention": frozenset(summed), "mlp": frozenset[int](), "experts": frozenset[int]()}
    return replace(own, layers=layers), heads, replace(part, shard=replace(part.shard, kind="tensor"), split=split)
