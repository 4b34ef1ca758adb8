"""Makes rank 0's calls (mirror.py) on another rank's shard.

In: calls as they are told, in order. Out: the same keys and values of this shard; and what waits until each call is
computed, so that rank 0 hears who hangs.
"""

from __future__ import annotations

from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..execution import execution
from ..kv.segments import SegmentLayout
from ..kv.state import KVState
from ..model.assistant import Assistant
from ..model.model import Model
from ..model.step import LazyBatchStep, LazyStep
from ..ops.sample import Draw
from .link import RECORDING, Follower, Message
from .mirror import PASSES, Checked, call, replay_step, shared_ids, shared_soft


def follow(
    model: Model, follower: Follower, states: dict[int, KVState] | None = None, assistant: Assistant | None = None
) -> None:
    """Make rank 0's calls on this rank's shard until it is done.

    Args:
        states: by key, those that rank 0 has.
        assistant: this rank's, where rank 0 has one.
    """
    states = {} if states is None else states
    steps: dict[int, Any] = {}
    recorded: set[tuple[str, int]] = set()  # kinds of replayed steps: the call, and its rows
    checks = count()

    def on_checked(_: int, sums: mx.array) -> None:
        n = next(checks)
        follower.later(lambda: follower.checked(n=n, sums=np.array(sums).tolist()))

    for message in follower.calls():
        op, keys = message["op"], message["states"]
        if op == "drop":
            for key in keys:
                states.pop(key, None)
                steps.pop(key, None)
        elif op in PASSES:
            with follower.at_work(message["n"]):
                made = _passed(model, follower, states, message, on_checked)
                if isinstance(made, LazyStep | LazyBatchStep):
                    steps[message["key"]] = step = _gathering(made)
                    made = step.schedule()
                if op != "prefill":
                    _await(follower, made)
        elif op in ("replay", "replay_batch"):
            kind = op, len(keys)
            with follower.at_work(1, 0.0 if kind in recorded else RECORDING):
                recorded.add(kind)
                steps[message["key"]] = step = _gathering(_replayed(model, states, steps, message))
                if isinstance(step, LazyBatchStep):
                    _await(follower, step.schedule())
                else:
                    follower.later(step.end)
        elif op in ("logits", "drawn"):
            with execution():
                getattr(steps[keys[0]], op)()
        elif op == "head":
            with follower.at_work(message["shape"][0]), execution():
                _await(follower, model.logits(shared_ids(mx.zeros(message["shape"]), follower.group)))
        elif op == "draft" and assistant is not None:
            with follower.at_work(message["count"]), execution():
                hidden, draws = shared_ids(mx.zeros(message["n"]), follower.group), [Draw(*d) for d in message["draws"]]
                _await(follower, assistant.start(message["last"], states[keys[0]], hidden, message["count"], draws))
        else:
            _follow(model, follower, states, message)


def _gathering(step: Any) -> Any:
    """Return what gathers the logits of a step, if it was not replayed."""
    return step.batch if isinstance(step, LazyStep) else step


def _await(follower: Follower, made: mx.array | tuple[mx.array, ...]) -> None:
    """Note later that an array is computed: by another one, as MLX lets no two threads at one at once."""
    with execution():
        last = (made if isinstance(made, mx.array) else made[0]).reshape(-1)[:1] + 0
        mx.async_eval(last)
    follower.later(partial(mx.eval, last))


def _passed(model: Model, follower: Follower, states: dict[int, KVState], message: Message, on_checked: Checked) -> Any:
    """Make a call that passes the weights and changes states; return what it makes."""
    op, given, theirs = message["op"], message["given"], [states[key] for key in message["states"]]
    with execution():
        told = message["ids"]
        shared = mx.zeros(message["n"], mx.int32) if told is None else mx.array(told, mx.int32)
        if told is None:
            shared = shared_ids(shared, follower.group)
        if seen := message["soft"]:
            rows = mx.zeros((len(seen["places"]), model.config.hidden))
            given["soft"] = shared_soft(rows, seen, follower.group)
        made = call(model, op, shared, theirs, on_checked, **given)
    if op == "prefill":  # as rank 0 does
        mx.eval(theirs[0].arrays)
        mx.clear_cache()
    return made


def _replayed(model: Model, states: dict[int, KVState], steps: dict[int, Any], message: Message) -> Any:
    """Start a step that rank 0 replays."""
    before, draws = message["before"], [Draw(*draw) for draw in message["draws"]]
    token: Any = message["token"] if before is None else steps[before]
    some = [states[key] for key in message["states"]]
    with execution():
        if message["op"] == "replay":
            return replay_step(model, token, some[0], draws[0])
        return model.batch(token, some, draws)


def _follow(model: Model, follower: Follower, states: dict[int, KVState], message: Message) -> None:
    """Make a call that passes no weights, but for those that make quantizers."""
    op, keys = message["op"], message["states"]
    if op == "new":
        layout = message["layout"] and SegmentLayout(*message["layout"])
        dtype = message["dtype"] and getattr(mx, message["dtype"])
        states[keys[0]] = model.new_state(None, message["kv"], layout=layout, dtype=dtype)
    elif op == "quantizers":
        model.quantizers("tq4")
    elif op in ("save", "load"):
        path = Path(f"{message['path']}.rank{follower.place.rank}")
        try:
            if op == "save":
                path.parent.mkdir(parents=True, exist_ok=True)
                model.save_state(states[keys[0]], path)
            else:
                states[keys[0]] = model.load_state(path)
            follower.answer(states[keys[0]].length)
        except (InputError, OSError) as error:
            follower.refuse(error)
    else:
        _change(states, op, keys, message.get("at"))


def _change(states: dict[int, KVState], op: str, keys: list[int], at: int | None) -> None:
    """Make a call of a state's own. It has succeeded on rank 0."""
    state = states[keys[0]]
    if op == "fork":
        states[keys[1]] = state.fork()
    elif op == "adopt":
        state.adopt(states[keys[1]])
    elif op == "take_over":
        assert at is not None
        state.take_over(states[keys[1]], at)
    elif op == "mark":
        state.mark(at)
    elif op == "unmark":
        for mark in (mark for mark in state.marks if mark.position == at):
            state.unmark(mark)
    elif op == "rewind":
        assert at is not None
        state.rewind(at)
    elif op == "start_over":
        state.start_over()
    elif op == "close":
        state.close()
    else:
        raise ValueError(f"rank 0 asks for {op}, which this version doesn't know")
