"""What ranks exchange by kernels over memory that their GPUs share: sums, and within recorded steps logits.

In: a rank's `Part`, a `Player`. Out: the part whose sums are launches; the model as a recording runs it, all of whose
collectives are, and the flags that each start of the recording uploads. All else is MLX's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..execution import execution
from ..gpu.recording import Player, recorder
from ..gpu.render import Launcher
from ..ops.dispatch import Kernels
from ..ops.exchange import Boxes, exchange_rows, exchange_sum
from ..ops.exchange_many import ROOM, box_bytes, exchange_many
from ..ops.norms import ADD_NORM, NormOptions
from ..shard import Part, counted
from .weights import Loaded

log = logging.getLogger("mlx_gemma4")


def boxes_of(part: Part, player: Player, nbytes: int, room: int) -> Boxes:
    """Make a box of so many bytes on each rank, on all together. Raises RuntimeError on all, if one can't."""
    size, rank = part.shard.size, part.shard.rank
    trouble, mine, handle, addresses = "", 0, [0] * 16, list[int]()
    try:
        mine, handle = player.box(nbytes)
    except RuntimeError as error:
        trouble = str(error)
    handles = part.everyones(handle)
    try:
        addresses = [mine if i == rank else player.opened(handle) for i, handle in enumerate(handles)]
    except RuntimeError as error:
        trouble = trouble or str(error)
    if not part.agreed(not trouble):
        raise RuntimeError(trouble or "another rank's GPU shares no memory with this one's")
    rows_of = np.zeros((max(4, size), 2), np.uint32)  # MLX keeps less in the host's memory (CUDA)
    rows_of[:size] = np.array(addresses, np.uint64).view(np.uint32).reshape(size, 2)
    return Boxes(mx.array(rows_of), rank, size, room)


@dataclass(frozen=True)
class SharedPart(Part):
    """A part whose sums are launches over memory that the ranks' GPUs share, wherever they are not recorded."""

    launcher: Launcher = field(kw_only=True)
    boxes: Boxes = field(kw_only=True)

    def sums(self, *arrays: mx.array) -> list[mx.array]:
        counted[0] += 1
        return exchange_many(self.launcher, arrays, self.boxes)


def sharing(part: Part | None, kernels: Kernels | None) -> Part | None:
    """Return a `SharedPart` of a part, on all ranks, or on all what is given: where GPUs share no memory, MLX sums.

    Its first sum is held to MLX's. The boxes take 64 MB of each of two GPUs, 32 more for each further one.
    """
    if part is None or not part.records or kernels is None or kernels.player is None:
        return part
    with execution():
        ours, trouble = part, ""
        x = mx.arange(1024, dtype=mx.float32).reshape(8, 128) * (1 + part.shard.rank)
        made = x
        try:
            boxes = boxes_of(part, kernels.player(), box_bytes(part.shard.size), ROOM)
        except RuntimeError as error:
            log.debug("Ranks sum by MLX: %s", error)
            return part
        try:
            ours = SharedPart(**vars(part), launcher=kernels.launcher, boxes=boxes)
            (made,) = ours.sums(x)  # compiled, and not yet launched
        except Exception as error:  # whatever a backend's compiler raises
            trouble = str(error)
        if not part.agreed(not trouble):
            log.debug("Ranks sum by MLX: %s", trouble or "another rank can't")
            return part
        mx.eval(made)  # before the next collective
        if part.agreed(bool(mx.array_equal(made, part.sums(x)[0]).item())):
            return ours
        log.warning("Sums over memory that GPUs share give wrong numbers here: ranks sum by MLX, which is slower")
        return part


@dataclass
class Exchange:
    """The exchanges of one player's steps, which all ranks start in the same order."""

    part: Part
    boxes: Boxes
    flags: int  # that a start uploads: at least as many as a step has exchanges
    used: int = 0  # by a step, once it is recorded
    _next: int = 1
    _tried: bool = False
    _flags: Any = None  # of the recording that is being made
    _before: Any = None  # the latest result in it

    @classmethod
    def of(cls, part: Part, player: Player, room: int, flags: int) -> Exchange:
        """Make boxes for so many numbers at once, on all ranks together. Raises RuntimeError on all, if one can't."""
        nbytes = 2 * part.shard.size * room * 8
        return cls(part, boxes_of(part, player, nbytes, room), flags)

    def recorded(self, model: Loaded, flags: Any) -> Loaded:
        """Return the model as a recording runs it, given the buffer that has a start's flags, int32 [self.flags]."""
        self.used, self._flags, self._before = 0, flags, None
        given = {f.name: getattr(self.part, f.name) for f in fields(Part)}
        return replace(model, part=RecordedPart(**given, exchange=self))

    def made(self, kernel: Callable[..., Any], x: Any, *rest: Any) -> Any:
        """Record the next exchange, behind the one before."""
        self._before = kernel(recorder, x, *self.next(), *rest)
        return self._before

    def next(self) -> tuple[Any, Boxes, Any]:
        """Return the next exchange's flag, the boxes, and what it is to follow."""
        self.used += 1
        return self._flags[self.used - 1 : self.used], self.boxes, self._before

    def normed(self, run: Kernels, x: Any, h: Any, post: Any, options: NormOptions) -> tuple[Any, Any]:
        """Record `add_norm` of the sum of h over ranks, which is the next exchange."""
        made = run(ADD_NORM, x, h, post, options._replace(exchange=self.next()))
        self._before = made[0]
        return made

    def next_flags(self) -> np.ndarray:
        """Return the flags of the next start, int32 [self.flags]."""
        flags = (np.arange(self._next, self._next + self.flags) & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
        self._next += self.used
        return flags

    def agreed(self, error: Exception | None) -> Exception | None:
        """Return what keeps steps from being recorded, on whichever rank it is: they ask each other the first time.

        Raises what happens later: the others go on with recorded steps, so this rank has to end.
        """
        if self._tried and error is not None:
            raise error
        if not self._tried and not self.part.agreed(error is None):
            error = error or RuntimeError("another rank can't record steps")
        self._tried = True
        return error


def exchange_for(model: Loaded, player: Player, rows: int) -> Exchange | None:
    """Return what a model's steps of so many rows exchange with, as `Exchange.of` does; None: the model is whole."""
    c, table = model.config, model.weights.per_layer_token_embd
    if model.part is None:
        return None
    widest = max(-(-c.vocab // model.part.shard.size), 2 * c.hidden, 0 if table is None else table.shape[-1])
    return Exchange.of(model.part, player, rows * widest, 3 * len(c.layers) + 4)


@dataclass(frozen=True)
class RecordedPart(Part):
    """A part whose collectives are launches of the recording that is being made."""

    exchange: Exchange = field(kw_only=True)

    def sums(self, *arrays: Any) -> list[Any]:
        return [self.exchange.made(exchange_sum, a) for a in arrays]

    def sums_with_experts(self, x: Any, outputs: Any, share: Any) -> list[Any]:
        both = self.exchange.made(exchange_sum, x, (outputs, share))
        return [both[0], both[1]]

    def gathered(self, logits: Any) -> Any:
        return self.exchange.made(exchange_rows, logits, self.vocab)
