"""Runs an operation as a kernel on one backend, or as its reference in stock MLX.

In: the name of an operation and its arguments. Out: its result. An operation whose kernel `doctor` has switched
off, that raises, or that no kernel supports runs as its reference.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..gpu import render
from ..gpu.recording import Player
from ..quant.formats import Packed
from . import attention, choose, dense, embed, many_rows, matvec, norms, qkv, quantized_attention, stock
from .routing import Routing
from .stock import Weight

_MODULES = {
    "rotations": qkv,
    "qkv_post": qkv,
    "add_norm": norms,
    "top_k": choose,
    "argmax": choose,
    "embed": embed,
    "ple_inputs": embed,
    "attention": attention,
    "quantized_attention": quantized_attention,
    "quantize_kv": quantized_attention,
}

log = logging.getLogger("mlx_gemma4")


@dataclass
class Kernels:
    """Runs operations as kernels on one backend, or as references.

    A kernel that raises costs a warning: from then on, its operation runs as its reference.
    """

    launcher: render.Launcher
    # Names of operations that run as their references; "matvec" means all formats, "matvec Q4_K" that one. "replay":
    # steps are not replayed.
    off: frozenset[str] = frozenset()
    traced: bool = False  # steps are traced and replayed; takes a launcher whose launches are lazy
    player: Callable[[], Player] | None = None  # plays steps of one token that were recorded; None: none are
    strict: bool = False  # a kernel that raises is the caller's to deal with

    def __call__(self, name: str, *args: Any, **options: Any) -> Any:
        """The operation `name` of its module."""
        module: Any = _MODULES.get(name, norms)
        reference: Callable[..., Any] = getattr(module, f"{name}_reference")
        if any(isinstance(a, stock.Affine) for a in args):  # a table that no kernel reads
            return reference(*args, **options)
        kernel: Callable[..., Any] = getattr(module, name)
        return self._run((name,), lambda: kernel(*args, self.launcher, **options), lambda: reference(*args, **options))

    def product(self, x: mx.array, w: Weight, **options: Any) -> mx.array:
        """A mat-vec with whatever is folded into it: options are those of `kernels.matvec`."""

        def reference() -> mx.array:
            return product_reference(x, w, **options)

        done: mx.array
        if isinstance(w, mx.array) and _dense_takes(w, options):
            done = self._run(("dense",), lambda: dense.dense(x, w, self.launcher, **options), reference)
        elif isinstance(w, Packed) and matvec.supports(w, 1 if "ids" in options else x.shape[0]):
            names = ("matvec", f"matvec {w.format.name}")
            done = self._run(names, lambda: matvec.matvec(x, w, self.launcher, **options), reference)
        else:
            done = reference()
        return done

    def linear(self, x: mx.array, w: Weight) -> mx.array:
        """`ops.linear` for x [T, K] of any T: a few rows by mat-vecs, many by tiles."""

        def reference() -> mx.array:
            return stock.linear(x, w)

        if not many_rows.supports(w):
            return reference()
        assert not isinstance(w, stock.Affine)
        if isinstance(w, Packed) and x.shape[0] < many_rows.TILED_ROWS_FROM and matvec.supports(w, 1):
            names = ("halve", "matvec", f"matvec {w.format.name}")
            done: mx.array = self._run(names, lambda: many_rows.few_rows(x, w, self.launcher), reference)
        else:
            done = self._run(_expand_names(w), lambda: many_rows.linear(x, w, self.launcher), reference)
        return done

    def expert_linear(self, x: mx.array, w: Weight, routing: Routing, glu: bool = False) -> mx.array:
        """`ops.expert_linear`, likewise; with glu, of gate and up. Products of the same experts share a `routing`."""
        chosen = routing.chosen

        def reference() -> mx.array:
            return _glu(stock.expert_linear(x, w, chosen), glu)

        if not many_rows.supports(w):
            return reference()
        assert not isinstance(w, stock.Affine)
        few = chosen.size < many_rows.GROUPED_ROWS_FROM * w.shape[0]
        if isinstance(w, Packed) and few and matvec.supports(w, 1):
            names: tuple[str, ...] = ("halve", "matvec", f"matvec {w.format.name}")
            done: mx.array = self._run(
                names, lambda: _glu(many_rows.few_expert_rows(x, w, chosen, self.launcher), glu), reference
            )
        else:
            names = ("halve", "grouped", *([f"grouped {w.format.name}"] if isinstance(w, Packed) else []))
            done = self._run(names, lambda: many_rows.expert_linear(x, w, routing, self.launcher, glu), reference)
        return done

    def _run(self, names: Sequence[str], kernel: Callable[[], Any], reference: Callable[[], Any]) -> Any:
        if self.off.isdisjoint(names):
            try:
                return kernel()
            except Exception as error:  # whatever a backend's compiler or launch raises
                if self.strict:
                    raise
                self.off |= {names[-1]}
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                log.warning("Kernel %s fails here and is off, stock operations run instead: %s", names[-1], reason)
        return reference()


def _glu(y: mx.array, glu: bool) -> mx.array:
    """gelu(gate) * up of what holds both, if asked for."""
    return many_rows.geglu(*mx.split(y, 2, axis=-1)) if glu else y


def _expand_names(w: Packed | mx.array) -> tuple[str, ...]:
    return ("halve", "expand", f"expand {w.format.name}") if isinstance(w, Packed) else ("halve", "expand")


def _dense_takes(w: mx.array, options: dict[str, Any]) -> bool:
    return w.ndim == 2 and w.shape[-1] % 8 == 0 and not options.get("glu")


def product_reference(
    x: mx.array,
    w: Weight,
    *,
    norm: mx.array | None = None,
    eps: float = 1e-6,
    glu: bool = False,
    factor: float = 1.0,
    times: mx.array | None = None,
    ids: mx.array | None = None,
    out: mx.Dtype | None = None,
) -> mx.array:
    """`kernels.matvec` in stock MLX, for any weight; the options mean what they mean there."""
    h = x.astype(mx.float32)
    h = h if norm is None else stock.rms_norm(h, norm, eps)
    if ids is None:
        y = stock.linear(h, w)
    else:
        shared = h.shape[0] == 1
        chosen = ids[None] if shared else ids[:, None]
        y = stock.expert_linear(h[:, None], w, chosen)[0 if shared else slice(None), slice(None) if shared else 0]
    if glu:
        gate, up = mx.split(y, 2, axis=-1)
        y = stock.geglu(gate, up)
    if times is not None:
        y = stock.gelu(y) * times.astype(mx.float32)
    return stock.within(y * factor, out or x.dtype)


# GEGLU's results are stored so many times what they are, for fp16's sake; the norm after the down projection undoes it.
SHRINK = 1 / 16
