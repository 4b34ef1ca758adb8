"""The one lock: first come, first served, nested, and let go whatever happens."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest

from mlx_gemma4 import execution as module
from mlx_gemma4.execution import execution


def in_threads(count: int, work: Callable[[int], None]) -> list[threading.Thread]:
    """Threads that start one after the other, each when the one before waits or works."""
    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        before = module._last
        thread.start()
        while module._last is before:
            time.sleep(0.001)
    return threads


def joined(threads: list[threading.Thread]) -> bool:
    for thread in threads:
        thread.join(20)
    return not any(thread.is_alive() for thread in threads)


def test_threads_take_turns() -> None:
    served: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            with execution() as outermost:
                assert outermost
                served.append(i)

    with execution():
        threads = in_threads(4, work)
    assert joined(threads)
    # One that asks again comes after all who wait: nobody is served twice before each other has been once. (A thread
    # that Python hasn't let run for a while may ask a round too late.)
    rounds = [served[i : i + 4] for i in range(0, len(served), 4)]
    assert rounds[0] == [0, 1, 2, 3]
    assert sum(set(turn) == {0, 1, 2, 3} for turn in rounds) >= 10, served


def test_nested_entries_need_no_turn() -> None:
    def once(_: int) -> None:
        with execution():
            pass

    with execution() as first, execution() as second, execution() as third:
        assert (first, second, third) == (True, False, False)
        threads = in_threads(1, once)
        with execution() as fourth:
            assert not fourth
    assert joined(threads)


def test_an_error_lets_the_next_in() -> None:
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), execution():
            raise error
        with execution() as outermost:
            assert outermost


def test_a_turn_is_over_although_the_next_has_its_lock() -> None:
    """As when the one that waits gets the lock before the thread that released it goes on: usual on Python 3.14."""
    with execution():
        mine = module._last
    taken = threading.Event()

    def next_in_the_queue() -> None:
        with mine:
            taken.set()
            time.sleep(0.05)

    thread = threading.Thread(target=next_in_the_queue)
    thread.start()
    assert taken.wait(20)
    with execution() as outermost:
        assert outermost
    thread.join(20)


def test_an_interrupt_while_waiting_keeps_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is interrupted while another holds the lock raises when its turn comes, and holds nothing then."""

    class Interrupted:
        """The lock of the one before, whose first waiter gets a Ctrl-C."""

        def __init__(self) -> None:
            self.lock, self.tries = threading.Lock(), 0

        def __enter__(self) -> None:
            self.tries += 1
            if self.tries == 1:
                raise KeyboardInterrupt
            self.lock.acquire()

        def __exit__(self, *error: object) -> None:
            self.lock.release()

    before = Interrupted()
    monkeypatch.setattr(module, "_last", before)
    with pytest.raises(KeyboardInterrupt), execution():
        raise AssertionError("entered")
    assert before.tries == 2
    with execution() as outermost:
        assert outermost


# ---------------------------------------------------------------- MLX's rules


def test_any_thread_continues_what_another_began() -> None:
    """Scheduled or still lazy, in threads that live and in one that is gone, as a server's do."""

    def begin(i: int) -> tuple[mx.array, mx.array]:
        with execution():
            scheduled = mx.full((100,), i) * 2
            mx.async_eval(scheduled)
            return scheduled, scheduled + 1

    def go_on(begun: tuple[mx.array, mx.array]) -> int:
        with execution():
            scheduled, lazy = begun
            total = (scheduled + lazy).sum()
            mx.async_eval(total)
        return int(total.item())  # without the lock

    with ThreadPoolExecutor(3) as first:
        begun = list(first.map(begin, range(20)))
    with ThreadPoolExecutor(3) as second:
        assert list(second.map(go_on, begun)) == [100 * (4 * i + 1) for i in range(20)]
    assert go_on(begin(7)) == 2900


@pytest.mark.parametrize(("given", "then"), [(None, "0"), ("1", "1")])
def test_fp32_stays_fp32_unless_somebody_wants_tf32(given: str | None, then: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "MLX_ENABLE_TF32"}
    env |= {} if given is None else {"MLX_ENABLE_TF32": given}
    code = "import os, mlx_gemma4.execution; print(os.environ['MLX_ENABLE_TF32'])"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [then]
