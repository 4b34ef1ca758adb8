"""Many prompts at once: a reply to each, in the order in which they are done.

In: a `LanguageModel`, prompts, options. Out: indices and `Reply`s. A `Scheduler` makes the tokens of all together; what
all prompts begin with is read once, and shared.
"""

import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from queue import SimpleQueue
from typing import Any

import numpy as np

from ..errors import InputError
from ..generation.prefix import PrefixCache, common_length
from ..generation.sampling import Sampling
from ..generation.scheduler import Scheduler
from ..kv.state import KVState
from ..memory import DEFAULT_CONTEXT, available_memory
from ..model.batch import MAX_BATCH
from .background import OnPrompt
from .language_model import LanguageModel
from .reply import Prompt, Reply, ReplyOptions, options_of, stream, whole_prompt

SPARED = 64  # tokens of prompts that need not be read, from which on it pays to read a common beginning first


class _Left(Exception):
    """Nobody waits for the replies any more."""


def batch(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    options: ReplyOptions | Sequence[ReplyOptions] | None = None,
    *,
    parallel: int | None = None,
    exact: bool = False,
    kv: str = "full",
    on_progress: OnPrompt | None = None,
    **named: Any,
) -> Generator[tuple[int, Reply], None, None]:
    """Reply to many prompts, several at once; yield each one's index and reply when it is done.

    A prompt that can't be answered (too long, say) has a reply with an `error`; the others go on. Closing the iterator
    stops all within a token.

    Args:
        lm, prompts: a loaded model, and what `stream` takes for each reply.
        options, named: of all replies, as `stream` takes them; or a list with the options of each.
        parallel: replies at a time, 1 to 32; None: as many as free memory has room for.
        exact: each is to the bit what it is alone. Otherwise near ties between tokens may be decided otherwise.
        kv: how keys and values are held, as `Model.new_state` takes it.
        on_progress: called with (replies done, replies in all).

    >>> import mlx_gemma4
    >>> done = dict(batch(mlx_gemma4.load(), ["Tell me of a fox.", "Tell me of the sea."], max_tokens=8))
    >>> [len(done[i].tokens) for i in range(2)]
    [8, 8]
    """
    several = isinstance(options, Sequence)
    each = [*options] if several else [options_of(lm, options, named)] * len(prompts)  # type: ignore[misc, arg-type]
    ids: dict[int, list[int]] = {}
    done: SimpleQueue[tuple[int, Reply | Exception]] = SimpleQueue()
    for i, prompt in enumerate(prompts):
        try:
            ids[i] = whole_prompt(lm, prompt, each[i])
        except InputError as error:
            done.put((i, Reply(error=str(error))))
    parallel = min(parallel or _parallel(lm, ids, each, kv), len(ids) or 1)
    left = threading.Event()
    with Scheduler(lm.model, parallel, exact, lm.drafts) as scheduler, ThreadPoolExecutor(parallel, "reply") as pool:
        beginning = _beginning(scheduler, lm.model.new_state(kv=kv), list(ids.values()))

        def check(*_: int) -> None:
            if left.is_set():
                raise _Left

        def answer(i: int) -> None:
            reply, state = Reply(), beginning.fork()
            try:
                made = stream(lm, ids[i], each[i], state=state, marks=False, on_prompt=check, scheduler=scheduler)
                with closing(made) as chunks:
                    for chunk in chunks:
                        reply = chunk.reply
                        check()
                done.put((i, reply))
            except InputError as error:
                reply.error = str(error)
                done.put((i, reply))
            except Exception as error:
                done.put((i, error))
            finally:
                state.close()

        try:
            for i in ids:
                pool.submit(answer, i)
            for n in range(1, len(prompts) + 1):
                i, reply = done.get()
                if isinstance(reply, Exception):
                    raise reply
                if on_progress:
                    on_progress(n, len(prompts))
                yield i, reply
        finally:
            left.set()
            pool.shutdown(cancel_futures=True)


def _parallel(lm: LanguageModel, ids: dict[int, list[int]], options: Sequence[ReplyOptions], kv: str) -> int:
    """Return how many replies half of the free memory has room for, at their longest."""
    longest = max((len(ids[i]) + (options[i].max_tokens or DEFAULT_CONTEXT) for i in ids), default=1)
    one = PrefixCache(lm.model, kv=kv).most_bytes(min(longest, lm.config.context))
    return min(max(1, (available_memory() - lm.plan.reading) // 2 // one), MAX_BATCH)


def _beginning(scheduler: Scheduler, state: KVState, prompts: list[list[int]]) -> KVState:
    """Read what all prompts begin with into an empty state, if that pays, and return it."""
    if len(prompts) > 1:
        first, last = np.array(min(prompts)), np.array(max(prompts))
        shared = min(prompts)[: min(common_length(first, last), state.config.context - 2)]
        while shared and shared[-1] < 0:  # no prompt ends with a picture
            shared.pop()
        if (len(prompts) - 1) * len(shared) >= SPARED:
            for _ in scheduler.generate_tokens(state, shared, Sampling(temperature=0), 1):
                pass
            state.rewind(len(shared))
    return state
