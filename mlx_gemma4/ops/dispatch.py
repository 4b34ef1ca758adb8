"""Runs operations as kernels on one backend, or as their references in stock MLX.

In: an operation and its arguments. Out: its result. An operation whose kernel the doctor has switched off, that raises,
or that no kernel supports runs as its reference.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from ..gpu import render
from ..gpu.recording import Player
from ..kv.segments import KVView
from ..quant.formats import Packed
from . import long_attention, many_rows, prompt_attention, stock
from .attention import FEW_ROWS as FEW_QUERIES
from .attention import LONG_ATTENTION, attention_pieces, attention_reference, config_key, launch_config
from .dense import DENSE, dense
from .epilogue import ALONE, PLAIN, Epilogue, Folded, product_reference
from .expand import EXPAND
from .few_rows import FEW_ROWS, MAX_ROWS, few_rows
from .grouped import GROUPED, grouped, grouped_reference
from .halve import HALVE
from .long_attention import long_attention_pieces
from .matvec import MATVEC, matvec, takes
from .op import Op, OpKey, P, R
from .packed import is_readable
from .parts import MERGE, KVPart, shapes_of
from .routing import ROUTE, Routing
from .stock import Weight
from .tuning import this_gpu

log = logging.getLogger("mlx_gemma4")

REPLAY = OpKey("replay")  # recorded decode steps, as a whole
ALL = OpKey("")  # all operations
STOCK = "stock operations run instead"


@dataclass
class Kernels:
    """Runs operations as kernels on one backend, or as references.

    A kernel that raises costs a warning: from then on, its operation runs as its reference.
    """

    launcher: render.Launcher
    off: frozenset[OpKey] = frozenset()  # run as references; REPLAY: steps are not replayed
    traced: bool = False  # decode steps are traced by mx.compile; needs a launcher whose launches are lazy
    player: Callable[[], Player] | None = None  # replays recorded steps of one token; None: none are recorded
    strict: bool = False  # a kernel that raises is the caller's to deal with
    routed: tuple[mx.array, tuple[mx.array, mx.array]] | None = None  # experts and `routing.route` of them, the latest
    eager: bool = False  # each result is evaluated at once, so that a kernel that only fails then is found

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """Be eager inside of this. On Metal a kernel is compiled, and refused, when its result is evaluated."""
        self.eager = True
        try:
            yield
        finally:
            self.eager = False

    def __call__(self, op: Op[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The result of an operation."""
        kernel = partial(op.kernel, self.launcher, *args, **kwargs)
        return self.attempt(kernel, partial(op.reference, *args, **kwargs), op.key)

    def attempt(
        self,
        kernel: Callable[[], Any],
        reference: Callable[[], R],
        *keys: OpKey,
        instead: str = STOCK,
    ) -> R:
        """Run a kernel, or the reference where one of `keys` is off or the kernel raises.

        Where the reference fails too, that raises: it is not the kernel's fault.

        Args:
            keys: what the kernel consists of. The last is switched off when it raises.
            instead: what the warning says is done from then on.
        """
        if not self.off or self.off.isdisjoint([ALL, *keys, *(OpKey(key.op) for key in keys)]):
            try:
                done: R = kernel()
                if self.eager:
                    mx.eval(done)
                return done
            except Exception as error:  # whatever a backend's compiler or launch raises
                if self.strict:
                    raise
                if self.eager:
                    mx.eval(reference())
                self.off |= {keys[-1]}
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                log.warning("Kernel %s fails here and is off, %s: %s", keys[-1], instead, reason)
        return reference()

    def attention(self, q: mx.array, parts: list[KVPart], spans: mx.array, *, scale: float, window: int) -> mx.array:
        """`attention.attention`: by matrix units where there are many tokens; by the next best where a kernel fails."""
        (tokens, heads, _), (kv_heads, lengths) = q.shape, shapes_of(parts)
        kernels: list[tuple[OpKey, Callable[[], Any]]] = []
        if long_attention.supports(q, parts, window):
            long = partial(long_attention_pieces, self.launcher, q, parts, spans, scale=scale)
            kernels.append((LONG_ATTENTION.key, long))
        for config in dict.fromkeys((launch_config(lengths, heads // kv_heads * tokens, kv_heads), FEW_QUERIES)):
            plain = partial(attention_pieces, self.launcher, q, parts, spans, scale=scale, window=window, config=config)
            kernels.append((config_key(config), plain))
        for i, (key, kernel) in enumerate(kernels):
            instead = f"{kernels[i + 1][0]} runs instead" if i + 1 < len(kernels) else STOCK
            pieces = self.attempt(kernel, lambda: None, key, instead=instead)
            if pieces is not None:
                sums, stats = pieces
                return self(MERGE, sums, stats, q.shape, q.dtype)
        return attention_reference(q, parts, spans, scale=scale, window=window)

    def prompt_attention(
        self,
        q: mx.array,
        parts: list[KVView],
        *,
        scale: float,
        position: int,
        window: int | None,
        last: mx.array | None = None,
    ) -> mx.array:
        """`prompt_attention.prompt_attention`, where it is the faster one and takes these heads."""
        options: dict[str, Any] = {"scale": scale, "position": position, "window": window, "last": last}
        reference = partial(prompt_attention.prompt_attention_reference, q, parts, **options)
        if not this_gpu().prompt_attention or not prompt_attention.supports(q, parts):
            return reference()
        kernel = partial(prompt_attention.prompt_attention, self.launcher, q, parts, **options)
        return self.attempt(kernel, reference, *prompt_attention.keys_of(parts, q.shape[-1]))

    def product(self, x: mx.array, w: Weight, epilogue: Epilogue = PLAIN, folded: Folded = ALONE) -> mx.array:
        """`matvec.matvec`, or `few_rows.few_rows` of up to MAX_ROWS rows, for any weight."""
        reference = partial(product_reference, x, w, epilogue, folded)
        rows, ids = x.shape[0], folded.ids
        if isinstance(w, Packed) and is_readable(w) and rows <= MAX_ROWS:
            if (ids is not None and ids.ndim == 2) or (ids is None and not takes(w.shape, rows)):
                return self._few_rows(x, w, epilogue, folded, reference)
            kernel = partial(matvec, self.launcher, x, w, epilogue, folded)
            return self.attempt(kernel, reference, _key(MATVEC, w))
        if isinstance(w, mx.array) and w.ndim == 2 and w.shape[-1] % 8 == 0 and not epilogue.glu:
            kernel = partial(dense, self.launcher, x, w, epilogue, folded)
            return self.attempt(kernel, reference, DENSE.key)
        return reference()

    def _few_rows(
        self, x: mx.array, w: Packed, epilogue: Epilogue, folded: Folded, reference: Callable[[], mx.array]
    ) -> mx.array:
        keys = [HALVE.key] * (folded.norm is not None or x.dtype != mx.float16)
        if self.eager and keys:
            self(HALVE, x.reshape(-1, x.shape[-1]), folded.norm)  # or its failure would be put down to the product
        if (ids := folded.ids) is not None:
            if self.routed is None or self.routed[0] is not ids:  # products of the same experts follow each other
                self.routed = ids, self(ROUTE, ids, w.shape[0])
            folded = folded._replace(routed=self.routed[1])
        kernel = partial(few_rows, self.launcher, x, w, epilogue, folded)
        return self.attempt(kernel, reference, *keys, _key(FEW_ROWS, w))

    def linear(self, x: mx.array, w: Weight) -> mx.array:
        """`stock.linear` for x [T, K] of any T: a few rows by `few_rows`, many by tiles."""
        reference = partial(stock.linear, x, w)
        if isinstance(w, stock.Affine) or not many_rows.supports(w):
            return reference()
        if self.eager:
            self(HALVE, x.reshape(-1, x.shape[-1]))  # or its failure would be put down to what multiplies
        if isinstance(w, Packed) and x.shape[0] <= MAX_ROWS:
            few = partial(many_rows.few_linear, self.launcher, x, w)
            return self.attempt(few, reference, HALVE.key, _key(FEW_ROWS, w))
        kernel = partial(many_rows.linear, self.launcher, x, w)
        return self.attempt(kernel, reference, HALVE.key, _key(EXPAND, w))

    def expert_linear(self, x: mx.array, w: Weight, routing: Routing, glu: bool = False) -> mx.array:
        """`stock.expert_linear`, likewise; with glu, of gate and up. Products of the same experts share a `routing`."""
        reference = partial(grouped_reference, x, w, routing, glu)
        if not many_rows.supports(w):
            return reference()
        if self.eager:
            self(HALVE, x.reshape(-1, x.shape[-1]))  # or its failure would be put down to what multiplies
        if isinstance(w, Packed) and routing.chosen.size < many_rows.GROUPED_ROWS_FROM * w.shape[0]:
            routed = self(ROUTE, routing.chosen.astype(mx.int32), w.shape[0])
            few = partial(many_rows.few_expert_rows, self.launcher, x, w, routing.chosen, routed)
            y = self.attempt(few, partial(stock.expert_linear, x, w, routing.chosen), HALVE.key, _key(FEW_ROWS, w))
            return stock.fused_geglu(*mx.split(y, 2, axis=-1)) if glu else y
        kernel = partial(grouped, self.launcher, x, w, routing, glu)
        return self.attempt(kernel, reference, HALVE.key, _key(GROUPED, w))


def references() -> Kernels:
    """Return what runs every operation as its reference, for where there are no kernels."""

    def no_launcher(**_: Any) -> Any:
        raise RuntimeError("no kernel runs here")

    return Kernels(no_launcher, frozenset([ALL]))


def _key(op: Op[..., Any], w: Weight) -> OpKey:
    """The variant of an operation for a weight's format."""
    return OpKey(op.name, w.format.name) if isinstance(w, Packed) else op.key
