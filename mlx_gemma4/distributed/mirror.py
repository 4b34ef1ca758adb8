"""A model on several ranks: each call of rank 0's `Model` and of its KV states is made on all ranks, in one order.

In: calls. Out: on rank 0 their results; the others are told of them (following.py). Mirrored are the calls
that change a state or pass the weights, nothing above them: sessions, batches and the server know nothing of it. Tokens
go over MLX's link inside the graph, so that a step may start before rank 0's host knows its token.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..execution import execution, host_stream
from ..kv.quantization import allowed_kinds, check_kind
from ..kv.segments import SegmentLayout
from ..kv.state import KVState, Mark
from ..model.assistant import Assistant
from ..model.batch import check_batch
from ..model.batch_replay import ReplayedBatch
from ..model.forward import run_layers
from ..model.model import Model
from ..model.replay import ReplayedStep
from ..model.soft import SoftRows
from ..model.step import (
    BatchStep,
    LazyBatchStep,
    LazyStep,
    NextToken,
    Step,
    Tokens,
    ids_of,
    known,
    known_tokens,
    tokens_as_array,
)
from ..ops.sample import LIKELIEST, Draw
from ..shard import collective_stream
from .link import Leader, Message, of_link

CHECKED = 256  # tokens of a state after which ranks compare what they have made of it
SUMS = 16  # numbers that they compare
AGREE = 0.02  # of their norm, by which they may differ
PASSES = ("forward", "prefill", "hidden", "check", "step", "batch")  # calls that read tokens into states
Checked = Callable[[int, mx.array], None]  # (position, the sums, fp32 [SUMS], under way)


def call(model: Model, op: str, shared: mx.array, states: Sequence[KVState], on_checked: Checked, **given: Any) -> Any:
    """Make one call that passes the weights, on any rank: the same collectives are scheduled in the same order.

    Args:
        shared: the tokens, int32 [T], as rank 0 gave them.
        given: "all_logits" of `Model.forward`, "tokens" that `Model.check` reads, "soft" of prompts; on rank 0 "draw"
            or "draws" of steps.
    """
    made: Any = None
    before = [state.length for state in states]
    if op == "forward":
        made = model.forward(shared, states[0], **given)
    elif op == "prefill":
        if model.part and model.part.shard.kind == "layers":  # a rank reads a chunk ahead of the next rank, not more
            mx.synchronize(host_stream())
        model.prefill(shared, states[0], **given)
    elif op == "hidden":
        made = model.hidden(shared, states[0])
    elif op == "check":
        made = model.check(given["tokens"], states[0])
        mx.async_eval(made, states[0].arrays)
    elif op == "step":
        made = model.step(shared[0], states[0], **given, replay=False)
    else:
        made = model.batch(shared, states, **given, replay=False)
    for state, was in zip(states, before, strict=True):
        if op != "prefill" and state.length // CHECKED > was // CHECKED:  # a prompt is compared by its last chunk
            # What all layers make of one more token depends on all that the state holds.
            last = mx.maximum(shared[-1:], 0)  # no soft token
            hidden = run_layers(model.loaded, last, [KVState.fork(state)], 1).astype(mx.float32)
            sums = mx.pad(hidden.reshape(-1), (0, -hidden.size % SUMS)).reshape(SUMS, -1).sum(axis=1)
            mx.async_eval(sums)
            on_checked(state.length, sums)
    return made


def replay_step(model: Model, token: NextToken, state: KVState, draw: Draw) -> Step:
    """Start a replayed step on any rank: one whose replay rank 0 has decided on."""
    assert model.replayer is not None
    return model.replayer.start(token, state, draw) or model.step(token, state, draw, replay=False)


def shared_ids(ids: mx.array, group: mx.distributed.Group) -> mx.array:
    """Return rank 0's ids on all ranks, under way; the others give zeros."""
    mx.async_eval(ids)  # before: so that what follows is the same graph on all ranks
    shared = mx.distributed.all_sum(ids, group=group, stream=collective_stream())
    mx.async_eval(shared)
    return shared


def shared_soft(rows: mx.array, told: Message, group: mx.distributed.Group) -> SoftRows:
    """Return rank 0's soft tokens on all ranks."""
    last = told["last"]
    return SoftRows(mx.array(told["places"]), shared_ids(rows, group), None if last is None else mx.array(last))


class LedModel(Model):
    """Rank 0's model: followers hear of each call before it is made here."""

    def __init__(self, model: Model, leader: Leader) -> None:
        self.__dict__.update(vars(model))
        self.inner, self.leader, self.keys = model, leader, count()
        self.sums: dict[int, tuple[int, mx.array]] = {}  # of the latest checks, by number
        self.checks = count()
        self.started: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # replayed steps' numbers
        leader.on_checked = self._compare

    def new_state(
        self,
        max_tokens: int | None = None,
        kv: str = "full",
        *,
        layout: SegmentLayout | None = None,
        dtype: mx.Dtype | None = None,
    ) -> KVState:
        check_kind(kv, {layer.head_dim for layer in self.config.layers if not layer.sliding})
        with execution():
            shape = None if layout is None else [layout.tail, layout.fan, layout.tops]
            key = next(self.keys)
            self.leader.tell(
                "new", key, kv=kv, layout=shape, dtype=None if dtype is None else str(dtype).split(".")[-1]
            )
            return LedState(self.inner.new_state(max_tokens, kv, layout=layout, dtype=dtype), self, key)

    def save_state(self, state: KVState, path: str | Path) -> None:
        """Write a state as `Model.save_state`: this rank's part to `path`, the others' beside it on their machines."""
        self.leader.tell("save", key_of(state), path=str(Path(path).absolute()))
        self.inner.save_state(state, path)
        self.leader.answers()

    def load_state(self, path: str | Path) -> KVState:
        with execution():
            if "tq4" in allowed_kinds({layer.head_dim for layer in self.config.layers if not layer.sliding}):
                self.leader.tell("quantizers")  # made together, and not while a file is read
                self.inner.quantizers("tq4")
        key = next(self.keys)
        self.leader.tell("load", key, path=str(Path(path).absolute()))
        wrong: InputError | None = None
        try:
            state = LedState(self.inner.load_state(path), self, key)
        except InputError as error:
            wrong = error
        held = self.leader.answers()
        if wrong:
            self.leader.dropped.append(key)
            raise wrong
        if set(held) != {state.length}:
            raise InputError(f"{path}: the parts of it on other ranks are of another conversation; save it again")
        return state

    def forward(
        self, ids: mx.array, state: KVState, *, all_logits: bool = False, soft: SoftRows | None = None
    ) -> mx.array:
        with execution():
            state.check_room(ids.size)
            logits: mx.array = self._call("forward", ids, [state], soft, all_logits=all_logits)
            return logits

    def prefill(self, ids: mx.array, state: KVState, *, soft: SoftRows | None = None) -> None:
        with execution():
            state.check_room(ids.size)
            self._call("prefill", ids, [state], soft)

    def hidden(self, ids: mx.array, state: KVState) -> mx.array:
        with execution():
            state.check_room(ids.size)
            hidden: mx.array = self._call("hidden", ids, [state])
            return hidden

    def logits(self, hidden: mx.array) -> mx.array:
        with execution():
            self.leader.tell("head", shape=hidden.shape)
            return self.inner.logits(shared_ids(hidden.astype(mx.float32), self.leader.group))

    def check(self, ids: Sequence[int], state: KVState) -> tuple[mx.array, mx.array]:
        with execution():
            state.check_room(len(ids))
            made: tuple[mx.array, mx.array] = self._call("check", mx.array([*ids]), [state], tokens=[*ids])
            return made

    def step(self, token: NextToken, state: KVState, draw: Draw = LIKELIEST, replay: bool = True) -> Step:
        with execution():
            state.check_room(1)
            key = next(self.keys)
            if replay and self.replays and draw.in_kernel and self.replayer and self.replayer.takes(state):
                token = self._told_replay("replay", token, key, [state], [draw])
                step = replay_step(self.inner, token, state, draw)
            else:
                step = self._call("step", ids_of(token), [state], mine={"draw": draw}, key=key)
            return cast("Step", self._led(step, key, [draw]))

    def batch(
        self, tokens: Tokens, states: Sequence[KVState], draws: Sequence[Draw] | None = None, replay: bool = True
    ) -> BatchStep:
        with execution():
            check_batch(tokens, states)
            draws = draws or [LIKELIEST] * len(states)
            key = next(self.keys)
            if replay and self.batcher and self.batcher.steps_replayed(len(states), draws):
                tokens = self._told_replay("replay_batch", tokens, key, states, draws)
                step = self.inner.batch(tokens, states, draws)
            else:
                step = self._call("batch", tokens_as_array(tokens), states, mine={"draws": draws}, key=key)
            return cast(BatchStep, self._led(step, key, draws))

    def _told_replay(self, op: str, token: Any, key: int, states: Sequence[KVState], draws: Sequence[Draw]) -> Any:
        """Tell of a replayed step; return its token or tokens: another such step, or what is known of them."""
        before, number = self.started.get(token) if isinstance(token, ReplayedStep | ReplayedBatch) else None, None
        if before is None:
            token = number = known(token) if op == "replay" else known_tokens(token)
        rows = [[*draw] for draw in draws]
        self.leader.tell(op, *map(key_of, states), key=key, token=number, before=before, draws=rows)
        return token

    def _led(self, step: Any, key: int, draws: Sequence[Draw]) -> Any:
        """Return a step that the others have under its key. Where it was not replayed, they gather what it is asked."""
        if isinstance(step, LazyStep):
            step.batch = LedStep(step.batch, self.leader, key, draws)
        elif isinstance(step, LazyBatchStep):
            step = LedStep(step, self.leader, key, draws)
        else:
            self.started[step] = key
            weakref.finalize(step, self.leader.dropped.append, key).atexit = False
        return step

    def _call(
        self,
        op: str,
        ids: mx.array,
        states: Sequence[KVState],
        soft: SoftRows | None = None,
        mine: dict[str, Any] | None = None,
        key: int | None = None,
        **given: Any,
    ) -> Any:
        """Make a call on all ranks. `mine`: what only rank 0 needs; `key`: of the step that it makes.

        A prompt's tokens are known, and told: so no rank waits for another one to read a chunk.
        """
        group, told = self.leader.group, ids.tolist() if op == "prefill" and ids.size > 1 else None
        seen = soft and {"places": soft.places.tolist(), "last": None if soft.last is None else soft.last.tolist()}
        self.leader.tell(op, *map(key_of, states), n=ids.size, ids=told, soft=seen, key=key, given=given)
        shared = shared_ids(ids.astype(mx.int32), group) if told is None else ids
        if soft and seen:
            given["soft"] = shared_soft(soft.rows, seen, group)
        return call(self.inner, op, shared, states, self._checked, **(mine or {}), **given)

    def failed(self, error: Exception) -> None:
        if of_link(error):
            time.sleep(2)  # who has died is told meanwhile
            self.leader.fail(f"the link between the ranks is lost: {error}")

    def _checked(self, position: int, sums: mx.array) -> None:
        n = next(self.checks)
        self.sums[n] = position, sums
        self.sums.pop(n - 64, None)

    def _compare(self, rank: int, theirs: Message) -> None:
        """Compare a follower's sums with this rank's, which were scheduled before."""
        while theirs["n"] not in self.sums:
            time.sleep(0.01)  # this rank is a moment behind
        position, sums = self.sums[theirs["n"]]
        mine, other = np.array(sums), np.array(theirs["sums"])
        apart = np.linalg.norm(mine - other) / np.linalg.norm(mine)
        if not apart <= AGREE:  # NaN too
            self.leader.fail(
                f"{self.leader.name(rank)} has drifted from rank 0 by token {position}; run mlx-gemma4 doctor on both "
                f"(their sums are {apart:.2g} apart)"
            )


class LedStep(LazyBatchStep):
    """A step on rank 0: the others gather what it is asked for."""

    def __init__(self, step: LazyBatchStep, leader: Leader, key: int, draws: Sequence[Draw]) -> None:
        self.__dict__.update(vars(step))
        self.leader, self.key, self.greedy = leader, key, all(draw.temperature == 0 for draw in draws)
        self.asked: set[str] = set()
        weakref.finalize(self, leader.dropped.append, key).atexit = False

    def logits(self) -> mx.array:
        self._ask("logits")
        return super().logits()

    def drawn(self) -> mx.array:
        if self.greedy:
            self._ask("drawn")
        return super().drawn()

    def _ask(self, what: str) -> None:
        if what not in self.asked:
            self.asked.add(what)
            self.leader.tell(what, self.key)


class LedState(KVState):
    """A state on rank 0, which the followers have under its key."""

    def __init__(self, state: KVState, model: LedModel, key: int) -> None:
        self.__dict__.update(vars(state))
        self.model = model
        self._named(key)

    def _named(self, key: int) -> None:
        self.key = key
        weakref.finalize(self, self.model.leader.dropped.append, key).atexit = False

    def _tell(self, op: str, *others: int, **given: Any) -> None:
        self.model.leader.tell(op, self.key, *others, **given)

    def fork(self) -> KVState:
        other = super().fork()
        assert isinstance(other, LedState)
        other._named(next(self.model.keys))
        self._tell("fork", other.key)
        return other

    def mark(self, position: int | None = None) -> Mark:
        mark = super().mark(position)
        self._tell("mark", at=mark.position)
        return mark

    def unmark(self, mark: Mark) -> None:
        super().unmark(mark)
        self._tell("unmark", at=mark.position)

    def adopt(self, other: KVState) -> None:
        super().adopt(other)
        self._tell("adopt", key_of(other))

    def take_over(self, other: KVState, position: int) -> None:
        super().take_over(other, position)
        self._tell("take_over", key_of(other), at=position)

    def rewind(self, to: Mark | int) -> None:
        super().rewind(to)
        self._tell("rewind", at=self.length)

    def start_over(self) -> None:
        super().start_over()
        self._tell("start_over")

    def close(self) -> None:
        super().close()
        self._tell("close")


class LedAssistant(Assistant):
    """An assistant on rank 0: the others draft with it, as each has some of the keys and values that it reads."""

    def __init__(self, assistant: Assistant, leader: Leader) -> None:
        self.__dict__.update(vars(assistant))
        self.leader = leader

    def start(self, last: int, state: KVState, hidden: mx.array, count: int, draws: Sequence[Draw] = ()) -> mx.array:
        with execution():
            self.leader.tell("draft", key_of(state), n=hidden.size, last=last, count=count, draws=draws)
            return super().start(last, state, shared_ids(hidden, self.leader.group), count, draws)


def key_of(state: KVState) -> int:
    assert isinstance(state, LedState), "a state that another model made"
    return state.key
