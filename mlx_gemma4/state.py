"""The KV state: everything that changes while tokens flow, held apart from the weights.

In: the keys and values of each layer for new tokens. Out: those that attention is to see. A layer
that shares another's keys and values keeps nothing here.
"""

from __future__ import annotations

import mlx.core as mx

from .config import Config

_STEP = 256  # buffers grow, and sliding ones are trimmed, this many tokens at a time


class KVState:
    """Keys and values of one sequence, layer by layer, and how many tokens it holds.

    Sliding layers keep their window and some `_STEP` tokens more; global layers keep everything.
    """

    def __init__(self, config: Config, dtype: mx.Dtype) -> None:
        self.length = 0  # tokens read so far; the position of the next one
        self.dtype = dtype
        self._windows = [config.window if layer.sliding else None for layer in config.layers]
        self._keys: list[mx.array | None] = [None] * len(config.layers)
        self._values: list[mx.array | None] = [None] * len(config.layers)
        self._start = [0] * len(config.layers)  # position of the first token in a layer's buffer
        self._end = [0] * len(config.layers)  # position after its last token

    def append(self, layer: int, k: mx.array, v: mx.array) -> None:
        """Add keys and values of the next tokens, [1, kv_heads, T, D], to a layer."""
        n = k.shape[2]
        used = self._end[layer] - self._start[layer]
        self._make_room(layer, used + n, k)
        used = self._end[layer] - self._start[layer]
        keys, values = self._keys[layer], self._values[layer]
        assert keys is not None and values is not None
        keys[:, :, used : used + n] = k.astype(self.dtype)
        values[:, :, used : used + n] = v.astype(self.dtype)
        self._end[layer] += n

    def view(self, layer: int, queries: int) -> tuple[mx.array, mx.array, int]:
        """What the last `queries` tokens may see of a layer.

        Returns:
            keys and values [1, kv_heads, S, D], and the position of the first of the S tokens.
        """
        keys, values = self._keys[layer], self._values[layer]
        assert keys is not None and values is not None
        start, end, window = self._start[layer], self._end[layer], self._windows[layer]
        first = start if window is None else max(start, end - queries - window + 1)
        return keys[:, :, first - start : end - start], values[:, :, first - start : end - start], first

    def advance(self, tokens: int) -> None:
        """Count tokens whose keys and values every layer now holds."""
        self.length += tokens

    @property
    def arrays(self) -> list[mx.array]:
        """All buffers, to evaluate them."""
        return [a for a in (*self._keys, *self._values) if a is not None]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)

    def _make_room(self, layer: int, needed: int, like: mx.array) -> None:
        """Grow a layer's buffers to `needed` tokens; a sliding layer first lets go of what left its window."""
        keys, values = self._keys[layer], self._values[layer]
        if keys is not None and needed <= keys.shape[2]:
            return
        window, start, end = self._windows[layer], self._start[layer], self._end[layer]
        first = start if window is None else max(start, end - window + 1)
        kept, incoming = end - first, needed - (end - start)
        # Room to spare, so that buffers are copied every _STEP tokens at most, and long ones seldom.
        spare = _STEP if window is not None else max(_STEP, (kept + incoming) // 4)
        capacity = -(-(kept + incoming + spare) // _STEP) * _STEP
        grown = []
        for old in (keys, values):
            new = mx.zeros((1, like.shape[1], capacity, like.shape[3]), self.dtype)
            if old is not None and kept:
                new[:, :, :kept] = old[:, :, first - start : end - start]
            grown.append(new)
        self._keys[layer], self._values[layer] = grown
        self._start[layer] = first
