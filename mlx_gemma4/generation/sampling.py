"""One token from logits: penalties, bias, mask, filters, temperature; and its log-probability.

In: logits, fp32 [vocab], and the tokens chosen before. Out: a token with its log-probability. All of it happens on
the device: nothing here waits for a result, except `Sample.on_host`. A token follows from its logits, what it is chosen
by, its seed and its position in the reply, whatever else is chosen beside it (ops/sample.py).
"""

from __future__ import annotations

import copy
import math
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple, Protocol, cast

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..ops.dispatch import Kernels
from ..ops.sample import Draw, drawn

_LARGE = 1e30  # of numbers that fp32 has
REPETITION_WINDOW = 64  # tokens that the repetition penalty looks back, as llama.cpp does


@dataclass(frozen=True)
class Sampling:
    """Settings of how the next token is chosen. They apply in this order; those at their default do nothing."""

    repetition_penalty: float = 1.0  # logits of recent tokens: divided where positive, multiplied where not
    frequency_penalty: float = 0.0  # subtracted from a token's logit for each time that the reply has it
    presence_penalty: float = 0.0  # subtracted from the logit of each token that the reply has
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()  # added to logits; held as pairs
    top_k: int = 0  # keep the k likeliest; 0: all
    top_p: float = 1.0  # then the fewest whose probabilities reach p
    min_p: float = 0.0  # then those at least min_p times as likely as the likeliest
    temperature: float = 1.0  # logits are divided by it; 0: greedy
    seed: int | None = None  # None: a different one each time

    def __post_init__(self) -> None:
        for name, kind, least, most, want in (
            ("temperature", Real, 0, _LARGE, "0 or more"),
            ("top_k", Integral, 0, math.inf, "0 (off) or more, and whole"),
            ("top_p", Real, math.ulp(0), 1, "over 0 and at most 1"),
            ("min_p", Real, 0, 1, "from 0 to 1"),
            ("repetition_penalty", Real, 1 / _LARGE, _LARGE, "over 0"),
            ("frequency_penalty", Real, -_LARGE, _LARGE, "a number"),
            ("presence_penalty", Real, -_LARGE, _LARGE, "a number"),
            ("seed", Integral, -(2**63), 2**64 - 1, "a whole number of 64 bits"),
        ):
            value: Any = getattr(self, name)
            good = (name == "seed" and value is None) or (isinstance(value, kind) and not isinstance(value, bool))
            if not good or (value is not None and not least <= value <= most):
                raise InputError(f"--{name.replace('_', '-')} {value!r}: must be {want}")
        try:
            bias = tuple(sorted((int(i), float(x)) for i, x in dict(self.logit_bias).items()))
        except (TypeError, ValueError, OverflowError):
            raise InputError("logit_bias: must be ids of tokens with a number each") from None
        if not all(abs(x) <= _LARGE for _, x in bias):
            raise InputError("logit_bias: all values must be numbers")
        object.__setattr__(self, "logit_bias", bias)  # pairs, so that a Sampling can be hashed


class Token(NamedTuple):
    """A token of a reply."""

    id: int
    logprob: float | None = None  # of the model's own distribution, natural logarithm; None: not asked for
    top: tuple[tuple[int, float], ...] = ()  # the likeliest ids with theirs, likeliest first


class Sample(NamedTuple):
    """A token still on the device."""

    token: mx.array  # int []
    logprobs: tuple[mx.array, mx.array, mx.array] | None = None  # of the token []; likeliest ids [n], theirs [n]
    total: mx.array | None = None  # sum of its logits, []: no number if one of them is none

    def on_host(self) -> Token:
        """Return the token, once it is computed. Raises InputError if its logits are no numbers."""
        if self.total is not None:
            check_finite(self.total)
        if self.logprobs is None:
            return Token(int(self.token))
        of_token, ids, of_top = self.logprobs
        top = zip(np.array(ids).tolist(), np.array(of_top).tolist(), strict=True)
        return Token(int(self.token), float(of_token), tuple(top))


class Constraint(Protocol):
    """Restricts one reply, token by token. `grammar.Grammar` is one; none serves two replies."""

    def mask(self) -> np.ndarray | None:
        """Return the tokens that may come next: uint32 words, the lowest bit of the first one for token 0."""

    def accept(self, token: int) -> None:
        """Take note of the token that was chosen."""

    @property
    def finished(self) -> bool:
        """True if the reply is complete and nothing may follow."""

    def fork(self) -> Constraint:
        """Return one that goes on from here by itself, for drafts."""


class Sampler:
    """Chooses token after token for one reply."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: list[int],
        vocab: int,
        logprobs: int | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        """
        Args:
            prompt: tokens that the repetition penalty looks back on.
            vocab: number of logits.
            logprobs: give log-probabilities: the chosen token's, and those of so many likeliest ones.
            kernels: None: stock operations choose.
        """
        if logprobs is not None and not 0 <= logprobs <= vocab:
            raise InputError(f"--logprobs {logprobs}: must be from 0 to {vocab}")
        self.sampling, self.logprobs, self.kernels = sampling, logprobs, kernels
        self.recent = mx.array(prompt[-REPETITION_WINDOW:], mx.int32)
        self.counts = mx.zeros(vocab) if sampling.frequency_penalty or sampling.presence_penalty else None
        self.bias = _bias(dict(sampling.logit_bias), vocab)
        self.alters = sampling.repetition_penalty != 1.0 or self.counts is not None or self.bias is not None
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed % 2**64
        self._next = Draw(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, seed)

    @property
    def in_step(self) -> bool:
        """True if a `Draw` is all that a choice takes, so that a recorded step makes it."""
        return self._next.in_kernel and not self.alters and self.logprobs is None

    def __call__(self, logits: mx.array, allowed: np.ndarray | None = None) -> Sample:
        """Choose the next token, from logits [vocab].

        Args:
            allowed: uint32 words, bit i % 32 of word i // 32 set where token i may be chosen; ids beyond may not.
                None: any token.
        """
        return choose([self], logits[None], [allowed])[0]

    def draw(self) -> Draw:
        """Return how the next token is drawn, and count it."""
        draw, self._next = self._next, self._next._replace(position=self._next.position + 1)
        return draw

    def following(self, n: int) -> list[Draw]:
        """Return how the next n tokens are drawn; none where that is not all that they follow from."""
        position = self._next.position
        return [] if self.alters else [self._next._replace(position=position + i) for i in range(n)]

    def skip(self, token: int) -> None:
        """Be as after this choice, which another sampler of the same seed has made."""
        self.draw()
        self.note(mx.array(token))

    def altered(self, logits: mx.array, allowed: np.ndarray | None) -> mx.array:
        """Return logits [vocab] after penalties and bias, -inf where `allowed` forbids a token."""
        s = self.sampling
        if s.repetition_penalty != 1.0:
            logits = penalise(logits, self.recent, s.repetition_penalty)
        if self.counts is not None:
            logits = logits - s.frequency_penalty * self.counts - s.presence_penalty * (self.counts > 0)
        if self.bias is not None:
            logits = logits + self.bias
        if allowed is not None:
            logits = mx.where(unpack_mask(mx.array(allowed), logits.size), logits, -mx.inf)
        return logits

    def note(self, token: mx.array) -> None:
        """Take note of a token, int [], that was chosen."""
        if self.sampling.repetition_penalty != 1.0:
            self.recent = mx.concatenate([self.recent, token[None]])[-REPETITION_WINDOW:]
        if self.counts is not None:
            self.counts = self.counts.at[token].add(1.0)


def choose(samplers: Sequence[Sampler], logits: mx.array, masks: Sequence[np.ndarray | None]) -> list[Sample]:
    """Choose the next token of each row of logits, fp32 [B, vocab], by a sampler each, with its mask (`Sampler`)."""
    altered = logits
    if any(sampler.alters or mask is not None for sampler, mask in zip(samplers, masks, strict=True)):
        rows = zip(samplers, logits, masks, strict=True)
        altered = mx.stack([sampler.altered(row, mask) for sampler, row, mask in rows])
    totals = mx.sum(logits, axis=-1)
    tokens, samples = drawn(samplers[0].kernels, altered, [sampler.draw() for sampler in samplers]), []
    for i, sampler in enumerate(samplers):
        sampler.note(tokens[i])
        n = sampler.logprobs
        likely = None if n is None else log_probabilities(logits[i], tokens[i], n)
        samples.append(Sample(tokens[i], likely, totals[i]))
    return samples


def check_finite(total: mx.array) -> None:
    """Raise InputError if a sum of logits, [], shows that one of them is NaN or infinite."""
    if not math.isfinite(float(total)):
        raise InputError(
            "the model's logits are NaN or infinite, no numbers: its file is damaged, or a kernel fails here, which "
            "`mlx-gemma4 doctor` tells"
        )


def choose_in_turn(
    sampler: Sampler, logits: mx.array, masks: Sequence[np.ndarray | None]
) -> tuple[list[Sample], list[Sampler]]:
    """Choose a token from each row of logits, fp32 [T, vocab], as if they came one after the other.

    Returns:
        The tokens, each as if those of all rows before it had been chosen; and the sampler as it is after each. The
        given one stays as it is.
    """
    samples, after = [], []
    if not sampler.alters:  # then only the draws follow each other, and all rows are drawn at once
        after = [copy.copy(s) for s in (sampler, *draws_in_turn(sampler, len(masks) - 1)[1])]
        return choose(after, logits, masks), after
    for row, mask in zip(logits, masks, strict=True):
        sampler = copy.copy(sampler)
        samples.append(sampler(row, mask))
        after.append(sampler)
    return samples, after


def draws_in_turn(sampler: Sampler, n: int) -> tuple[list[Draw], list[Sampler]]:
    """Return how the next n tokens are drawn, and the sampler as it is after each. The given one stays as it is."""
    draws, after = [], []
    for _ in range(n):
        sampler = copy.copy(sampler)
        draws.append(sampler.draw())
        after.append(sampler)
    return draws, after


def masks_of(constraint: Constraint, drafts: list[int]) -> list[np.ndarray | None]:
    """Return what a constraint lets come next, and after each draft, up to one that it forbids or that ends it."""
    trial, masks = constraint.fork(), cast("list[np.ndarray | None]", [])
    with suppress(InputError):  # a mask that can't be made is for who comes to it to tell
        words = trial.mask()
        masks.append(words)
        for draft in drafts:
            if words is not None and (draft // 32 >= words.size or not words[draft // 32] >> draft % 32 & 1):
                break
            trial.accept(draft)
            if trial.finished:
                break
            words = trial.mask()
            masks.append(words)
    return masks


def penalise(logits: mx.array, recent: mx.array, penalty: float) -> mx.array:
    """Make recent tokens less likely (Keskar et al., arXiv:1909.05858). logits [vocab], recent int [n]."""
    chosen = logits[recent]
    return mx.put_along_axis(logits, recent, mx.where(chosen < 0, chosen * penalty, chosen / penalty), axis=0)


def log_probabilities(logits: mx.array, token: mx.array, n: int) -> tuple[mx.array, mx.array, mx.array]:
    """Return log softmax(logits [vocab]): of `token`, []; and the n likeliest ids [n] with theirs [n], sorted."""
    all_ = logits - mx.logsumexp(logits)
    if n == 0:
        return all_[token], mx.zeros(0, mx.uint32), mx.zeros(0)
    ids = mx.argpartition(-logits, kth=n - 1)[:n]
    ids = ids[mx.argsort(-logits[ids])]
    return all_[token], ids, all_[ids]


def unpack_mask(words: mx.array, vocab: int) -> mx.array:
    """Return bool [vocab] of uint32 words [n], the lowest bit of the first word first; False beyond them."""
    bits = ((words[:, None] >> mx.arange(32, dtype=mx.uint32)) & 1).astype(mx.bool_).reshape(-1)
    return bits[:vocab] if bits.size >= vocab else mx.concatenate([bits, mx.zeros(vocab - bits.size, mx.bool_)])


def _bias(values: dict[int, float], vocab: int) -> mx.array | None:
    """Return what is added to logits, [vocab]; None: nothing."""
    if not values:
        return None
    bias = np.zeros(vocab, np.float32)
    for i, value in values.items():
        if not 0 <= i < vocab:
            raise InputError(f"logit_bias: there is no token {i}; the model has 0 to {vocab - 1}")
        bias[i] = value
    return mx.array(bias)
