"""From a prompt to tokens: prefill in chunks, pipelined decode, sampling, statistics.

In: a model, a KV state, token ids. Out: token ids, one at a time. Knows nothing of text or files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx

from .errors import InputError
from .execution import execution
from .model import Model
from .state import KVState

PREFILL_CHUNK = 512  # tokens read at a time: bounds the memory that a long prompt takes


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Filters apply in this order; those at their default do nothing."""

    repetition_penalty: float = 1.0  # logits of recent tokens: divided where positive, multiplied where not
    top_k: int = 0  # keep the k likeliest; 0: all
    top_p: float = 1.0  # then the fewest whose probabilities reach p
    min_p: float = 0.0  # then those at least min_p times as likely as the likeliest
    temperature: float = 1.0  # logits are divided by it; 0: greedy
    seed: int | None = None  # None: another each time

    def __post_init__(self) -> None:
        for name, value, good, want in (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more"),
            ("top-k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "over 0 and at most 1"),
            ("min-p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition-penalty", self.repetition_penalty, 0 < self.repetition_penalty < float("inf"), "over 0"),
        ):
            if not good:
                raise InputError(f"--{name} {value}: must be {want}")


REPETITION_WINDOW = 64  # tokens that the repetition penalty looks back, as llama.cpp does


@dataclass
class Statistics:
    """What a generation did. Times in seconds."""

    prompt_tokens: int = 0
    prompt_time: float = 0.0
    reply_tokens: int = 0
    reply_time: float = 0.0
    peak_memory: int = 0  # bytes, MLX's arrays

    @property
    def prompt_rate(self) -> float:
        return self.prompt_tokens / self.prompt_time if self.prompt_time else 0.0

    @property
    def reply_rate(self) -> float:
        """Tokens a second after the first, which the prompt's time already holds."""
        return (self.reply_tokens - 1) / self.reply_time if self.reply_tokens > 1 and self.reply_time else 0.0


def check_length(prompt: int, context: int) -> None:
    """Refuse a prompt, in tokens, that leaves no room in the context."""
    if prompt < 1:
        raise InputError("the prompt is empty; give it some text")
    if prompt >= context:
        raise InputError(f"the prompt has {prompt} tokens, but the model's context holds {context}; shorten it")


def generate_tokens(
    model: Model,
    state: KVState,
    prompt: list[int],
    sampling: Sampling,
    max_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    statistics: Statistics | None = None,
    on_prompt: Callable[[int, int], None] | None = None,
    turn_ends: frozenset[int] | None = None,
) -> Iterator[int]:
    """Read a prompt and yield the tokens of the reply.

    While a token is handed out, the next is already being computed. However it ends, `state` then holds the
    prompt, the tokens handed out, and the stop token where one ended the reply: nothing that nobody has seen.

    Args:
        model, state: the model, and what came before; `state` takes prompt and reply.
        prompt: token ids, at least one.
        sampling: how tokens are chosen.
        max_tokens: the reply's length at most; the model's context bounds it too.
        stop_ids: the reply ends before any of these.
        statistics: filled in as it goes, right also when the caller stops early.
        on_prompt: called with (tokens read, tokens in all) as the prompt is read.
        turn_ends: tokens that end a turn. Given (perhaps empty), marks are left in `state` where a next prompt
            may part from this one: after the last turns, and at the prompt's end.

    Raises:
        InputError: the prompt is empty or too long for the model's context, or the state takes no such reply.
    """
    statistics = statistics or Statistics()
    check_length(state.length + len(prompt), model.config.context)
    max_tokens = min(max_tokens, model.config.context - state.length - len(prompt))
    if max_tokens < 1:
        return
    state.check_room(len(prompt) + max_tokens)
    statistics.prompt_tokens = len(prompt)
    mx.reset_peak_memory()
    start = time.perf_counter()
    with execution():
        choose = _Chooser(sampling, prompt)
    logits = _prefill(model, state, prompt, on_prompt, _marks_wanted(state, prompt, turn_ends))
    with execution():
        token = choose(logits)
        mx.async_eval(token)
    mark, known = start, state.length
    try:
        for produced in range(1, max_tokens + 1):
            with execution():
                if produced < max_tokens:
                    following = choose(model.forward(token[None], state))
                    mx.async_eval(following)
                else:  # a lazy graph: on a GPU it costs nothing unless the state is used again
                    model.prefill(token[None], state)
                    following = token
            value = int(token)
            known += 1
            now = time.perf_counter()
            if produced == 1:
                statistics.prompt_time, mark = now - start, now
            statistics.reply_tokens, statistics.reply_time = produced, now - mark
            statistics.peak_memory = mx.get_peak_memory()
            if value in stop_ids:
                return
            yield value
            token = following
    finally:
        if state.length > known:  # interrupted while a token was on its way
            state.rewind(known)


_TURNS_MARKED = 4  # of one prompt, the last ones


def _marks_wanted(state: KVState, prompt: list[int], turn_ends: frozenset[int] | None) -> list[int]:
    """Positions to mark while a prompt is read."""
    if turn_ends is None:
        return []
    ends = [state.length + i + 1 for i, token in enumerate(prompt) if token in turn_ends]
    return sorted({*ends[-_TURNS_MARKED:], *state.wanted_marks, state.length + len(prompt)})


def _prefill(
    model: Model,
    state: KVState,
    prompt: list[int],
    on_prompt: Callable[[int, int], None] | None,
    marks: list[int],
) -> mx.array:
    """Read the prompt chunk by chunk, leaving marks; the logits after its last token, [vocab].

    Chunks end at multiples of `PREFILL_CHUNK` tokens, whatever the state held before: a prompt whose beginning
    was there already is cut as one that is read whole.
    """
    done, logits = 0, mx.array(0.0)
    while done < len(prompt):
        before = state.length
        n = min(PREFILL_CHUNK - before % PREFILL_CHUNK, len(prompt) - done)
        ids = mx.array(prompt[done : done + n])
        done += n
        with execution():
            if done < len(prompt):
                model.prefill(ids, state)
                mx.eval(state.arrays)
                mx.clear_cache()
            else:
                logits = model.forward(ids, state)
                mx.eval(logits)
            for position in marks:
                if before < position <= state.length:
                    state.mark(position)
        if on_prompt:
            on_prompt(done, len(prompt))
    return logits


class _Chooser:
    """Chooses token after token from logits, on the device: nothing waits for the host."""

    def __init__(self, sampling: Sampling, prompt: list[int]) -> None:
        self.sampling = sampling
        self.recent = mx.array(prompt[-REPETITION_WINDOW:])
        self.key = mx.random.key(time.time_ns() & (1 << 63) - 1 if sampling.seed is None else sampling.seed)

    def __call__(self, logits: mx.array) -> mx.array:
        """The next token, int [], from logits [vocab]."""
        s = self.sampling
        if s.repetition_penalty != 1.0:
            logits = penalise(logits, self.recent, s.repetition_penalty)
        if s.temperature == 0:
            token = mx.argmax(logits)
        else:
            self.key, key = mx.random.split(self.key)
            token = sample(logits, s, key)
        if s.repetition_penalty != 1.0:
            self.recent = mx.concatenate([self.recent, token[None]])[-REPETITION_WINDOW:]
        return token


def penalise(logits: mx.array, recent: mx.array, penalty: float) -> mx.array:
    """Make recent tokens less likely (Keskar et al., arXiv:1909.05858). logits [vocab], recent int [n]."""
    chosen = logits[recent]
    return mx.put_along_axis(logits, recent, mx.where(chosen < 0, chosen * penalty, chosen / penalty), axis=0)


def sample(logits: mx.array, s: Sampling, key: mx.array) -> mx.array:
    """One token, int [], drawn from logits [vocab] filtered as `s` says, in llama.cpp's order."""
    vocab = logits.shape[-1]
    candidates = None
    if 0 < s.top_k < vocab:
        candidates = mx.argpartition(-logits, kth=s.top_k - 1)[: s.top_k]
        logits = logits[candidates]
    if s.top_p < 1:
        order = mx.argsort(-logits)
        candidates = order if candidates is None else candidates[order]
        logits = logits[order]
        p = mx.softmax(logits, precise=True)
        before = mx.cumsum(p) - p  # probability of all likelier ones
        logits = mx.where(before < s.top_p, logits, -mx.inf)
    if s.min_p > 0:
        p = mx.softmax(logits, precise=True)
        logits = mx.where(p >= s.min_p * p.max(), logits, -mx.inf)
    drawn = mx.random.categorical(logits / s.temperature, key=key)
    return drawn if candidates is None else candidates[drawn]
