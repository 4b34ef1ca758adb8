"""The plainest KV state there can be, for tests: whole arrays that only grow, and small models to run it on.

In: what a model's forward pass gives a `KVState`. Out: what it gives back, cut into the same parts.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import mlx.core as mx
import numpy as np
from recorded import HERE

from mlx_gemma4 import load
from mlx_gemma4.execution import execution
from mlx_gemma4.kv import quantization
from mlx_gemma4.kv.segments import KVQuantizer, KVView, SegmentLayout
from mlx_gemma4.kv.state import KVState
from mlx_gemma4.model.model import Model

# Segments merge and double within 100 tokens.
LAYOUTS = (SegmentLayout(4, 2, 2), SegmentLayout(2, 3, 1), SegmentLayout(8, 2, 4))


def some_tokens(n: int, seed: int = 0) -> list[int]:
    """BOS and n - 1 random ids."""
    return [2, *np.random.default_rng(seed).integers(3, 317, n - 1).tolist()]


class SmallModel(Model):
    """A fixture with another window, whose states are cut into small pieces."""

    layout: SegmentLayout

    def new_state(
        self,
        max_tokens: int | None = None,
        kv: str = "full",
        *,
        layout: SegmentLayout | None = None,
        dtype: mx.Dtype | None = None,
    ) -> KVState:
        return super().new_state(max_tokens, kv, layout=layout or self.layout, dtype=dtype)


@functools.cache
def _loaded(kind: str) -> Model:
    return load(HERE / f"{kind}-q4_0.gguf", weights="dense").model  # those of fewest layers


@functools.cache
def small_model(kind: str, window: int, layout: SegmentLayout) -> SmallModel:
    base = _loaded(kind)
    model = SmallModel(replace(base.config, window=window, context=1 << 17), base.weights)
    model.layout = layout
    model._numpy_step = None  # a plain state knows the forward pass in stock operations alone
    return model


class PlainState:
    """All keys and values since the beginning, as one array a layer; nothing is ever dropped, or encoded for good.

    With another kv than "full", the first `quantized` tokens of global layers count as encoded.
    """

    dtype = mx.float32
    borrower = None
    arrays: list[mx.array] = []  # noqa: RUF012 - nothing to schedule: the logits need it all

    def __init__(self, model: SmallModel, kv: str = "full") -> None:
        self.config, self.layout = model.config, model.layout
        own = [i for i, layer in enumerate(self.config.layers) if layer.kv_layer == i]
        self.quantizers = {i: model.quantizers(kv).get(i) for i in own}
        self.quantized = 0
        self.top = 0  # length after the last reading, whatever was taken back since
        self.length = 0
        self.rows: dict[int, tuple[mx.array, mx.array]] = {}
        self.read = 0  # tokens of the forward pass that is under way

    def check_room(self, tokens: int) -> None:
        self.read = tokens

    def append(self, layer: int, k: mx.array, v: mx.array) -> None:
        if layer in self.rows:
            k, v = (mx.concatenate([old, new], axis=2) for old, new in zip(self.rows[layer], (k, v), strict=True))
        self.rows[layer] = (k, v)

    def view(self, layer: int, queries: int) -> list[KVView]:
        window = self.config.window if self.config.layers[layer].sliding else None
        stop = self.length + self.read
        fits = self.length % self.layout.tail + self.read <= self.layout.tail  # in the tail: nothing is sealed
        sealed = self.length if fits else stop
        ends = self.layout.ends(sealed) if window is None else self.layout.sliding_ends(sealed, window)
        first = 0 if window is None else max(0, stop - queries - window + 1)
        if quantizer := self.quantizers[layer]:
            return self._parts_in_codes(layer, quantizer)
        k, v = self.rows[layer]
        bounds = zip([0, *ends], [*ends, stop], strict=True)
        spans = [(max(a, first), b) for a, b in bounds if b > max(a, first)]
        return [KVView(a, k[:, :, a:b], v[:, :, a:b]) for a, b in spans]

    def _parts_in_codes(self, layer: int, quantizer: KVQuantizer) -> list[KVView]:
        """What was sealed before this pass in codes, all else in one part."""
        sealed, ends = self._sealed(), self.layout.ends(self.length)
        if sealed > (ends[-1] if ends else 0):
            ends = [*ends[:-1], sealed]
        k, v = self.rows[layer]
        parts = []
        for a, b in itertools.pairwise([0, *ends]):
            parts.append(
                KVView(
                    a,
                    *quantization.quantize(k[:, :, a:b], v[:, :, a:b], quantizer.rotation, quantizer.kind),
                    quantizer.rotation,
                )
            )
        return [*parts, KVView(sealed, k[:, :, sealed:], v[:, :, sealed:])]

    def _sealed(self) -> int:
        """Tokens in codes once a full tail is sealed, as it is when more come."""
        return self.length if self.length % self.layout.tail == 0 else self.quantized

    def advance(self, ids: mx.array) -> None:
        fits = self.length % self.layout.tail + ids.size <= self.layout.tail
        self.quantized, self.length = self._sealed(), self.length + ids.size
        self.top = self.length
        if not fits:
            self.quantized = max(self.quantized, self.length // self.layout.tail * self.layout.tail)

    def cut(self, length: int) -> PlainState:
        """Another one that holds the first `length` tokens."""
        other = PlainState.__new__(PlainState)
        other.__dict__.update(self.__dict__, length=length, quantized=min(self.quantized, length))
        other.rows = {i: (k[:, :, :length], v[:, :, :length]) for i, (k, v) in self.rows.items()} if length else {}
        return other


def same_contents(state: KVState, plain: PlainState) -> bool:
    """Whether a state holds, to the bit, what attention may ever see of the plain one."""
    if state.length != plain.length:
        return False
    same = []
    for i, kv in state.layers.items() if state.length else ():
        first = max(0, state.length - state.config.window + 1) if state.config.layers[i].sliding else 0
        parts = kv.views(first)
        quantized = [part for part in parts if part.rotation is not None]
        if quantizer := plain.quantizers[i]:
            first = plain.quantized
            if sum(part.keys.shape[2] for part in quantized) != first:
                return False
            if quantized:
                wanted = quantization.quantize(
                    *(a[:, :, :first] for a in plain.rows[i]), quantizer.rotation, quantizer.kind
                )
                for which, theirs in enumerate(wanted):
                    same.append(mx.array_equal(mx.concatenate([part[1 + which] for part in quantized], axis=2), theirs))
        for which, theirs in enumerate(plain.rows[i]):
            ours = [part[1 + which] for part in parts if part.rotation is None]
            joined = mx.concatenate([theirs[:, :, :0], *ours], axis=2)
            same.append(mx.array_equal(joined, theirs[:, :, first : state.length]))
    with execution():
        mx.eval(same)
    return all(s.item() for s in same)


def read(model: Model, state: KVState | PlainState, tokens: list[int]) -> np.ndarray:
    """The logits after reading tokens in one pass."""
    return np.array(model.forward(mx.array(tokens), state, soft=model.soft.rows(tokens)))  # type: ignore[arg-type]
