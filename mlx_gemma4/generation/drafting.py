"""Drafts: guesses at the next tokens of a reply, which the model then checks in one step (`Model.check`).

In: the tokens of a sequence. Out: tokens that may follow, as many as pay. `Lookup` guesses that what came before comes
again; a `Drafter` is a model. Knows nothing of text, and nothing of how a token is chosen: loop.py takes the
tokens that it would have chosen, drafted or not, so drafts change how fast a reply comes and not what it says.
docs/drafting.md says what is measured, what that promises, and where it ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias, cast

import mlx.core as mx

from ..kv.state import KVState
from ..model.batch_replay import HiddenRow, QueuedTokens, ReplayedBatch
from ..model.decode import MAX_CHECKED
from ..model.step import RowStep
from ..ops.sample import Draw
from ..paths import keep, kept
from .sampling import Sample, Sampler, Token

log = logging.getLogger("mlx_gemma4")

NGRAM = 3  # tokens that must have come before in this order
LONGEST = 16  # tokens that are compared with those before a place, at most
PLACES = 4  # places that are compared, the latest ones
SURE = 8  # tokens alike from which on a place is asked before a model

MOST = MAX_CHECKED - 1  # drafts that a step checks
MODEL = "model"  # the kind of drafts that a drafter makes
HOPE = {"alike 16": 0.9, "alike 8": 0.8, MODEL: 0.7}  # share of drafts accepted, before any was checked; else 0.5
ROW = 0.1  # of a step of one row: what each more row takes, before it was measured
NEAR = 0.1  # of logits: rows of a step on a GPU whose best are as close are decided by a step of their own
LEARN_COST, LEARN_ACCEPTED = 0.3, 0.1  # weights of a new measurement
JUMP = 0.25  # most by which one measurement of seconds moves what is known of them
GAIN = 1.02  # in tokens a second that drafts must promise
PROBE, RARELY = 32, 512  # chances that pass, at first and at most, before a draft that would not pay is tried again
KEEP_EVERY = 32  # steps with drafts, after which what was learned is written
MODELS_KEPT = 32


Hidden: TypeAlias = "mx.array | HiddenRow"  # an array: fp32 [hidden]


class Drafter(Protocol):
    """A model that guesses the next tokens of one sequence at a time."""

    @property
    def needs_hidden(self) -> bool:
        """True if it drafts from the hidden row of the target."""

    def draft(
        self,
        tokens: Sequence[int],
        state: KVState,
        hidden: Hidden | None,
        count: int,
        draws: Sequence[Draw] = (),
    ) -> list[int]:
        """Return up to `count` tokens that may follow; none where there is nothing to go by.

        Args:
            tokens: all of the sequence; the last one is not read yet.
            state: of the target, which has read all but the last token. Must stay as it is.
            hidden: the target's hidden row after its last norm, which the head made the last token from. None: unknown.
            draws: how the target will draw each of these tokens; empty: in another way. A drafter that draws from
                its own logits by the same numbers agrees with the target more often than one that takes its likeliest.
        """

    def queue(
        self,
        tokens: Sequence[int],
        state: KVState,
        hidden: Hidden | None,
        count: int,
        draws: Sequence[Draw] = (),
    ) -> QueuedTokens | None:
        """Start what `draft` makes, for a step to be queued behind it, and return at once; None: `draft` is the way."""


class Lookup:
    """Finds where the latest tokens of a sequence came before. Serves one sequence, or beginnings of it."""

    def __init__(self) -> None:
        self._latest: dict[tuple[int, ...], int] = {}  # NGRAM tokens -> where they last ended
        self._before = [0]  # by that place -> where they ended before; 0: nowhere
        self.place = self.alike = 0  # of the latest search: where to go on, and the tokens alike before it

    def search(self, tokens: Sequence[int]) -> int:
        """Return how many of the last tokens came before in this order, LONGEST at most; less than NGRAM: 0."""
        end, self.alike = len(tokens), 0
        for at in range(len(self._before), end):  # those that end before the last token
            key = tuple(tokens[at - NGRAM : at]) if at >= NGRAM else ()
            self._before.append(self._latest.get(key, 0))
            self._latest[key] = at
        place = self._latest.get(tuple(tokens[-NGRAM:]), 0) if end > NGRAM else 0
        while place >= end:  # it has seen more, which is yet to be handed out
            place = self._before[place]
        for _ in range(PLACES):
            if not place:
                break
            alike = NGRAM
            while alike < min(LONGEST, place) and tokens[place - 1 - alike] == tokens[end - 1 - alike]:
                alike += 1
            if alike > self.alike:
                self.place, self.alike = place, alike
            place = self._before[place]
        return self.alike

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return what followed the place that is most alike, `count` tokens; what repeats without end, repeated."""
        if not self.search(tokens):
            return []
        period = len(tokens) - self.place
        following = (tokens[self.place + i % period] for i in range(count))
        return list(takewhile(lambda token: token >= 0, following))  # no reply has soft tokens


class Drafts:
    """What is known of drafting with one model on this machine, shared by its replies: seconds, and who is right.

    How many drafts pay follows from it: expected tokens of a step over its seconds (`depth`).
    """

    def __init__(
        self,
        most: int = MOST,
        drafter: Drafter | None = None,
        *,
        depth: int | None = None,
        least_alike: int = NGRAM,
        row: float = ROW,
    ) -> None:
        """
        Args:
            most: drafts of a step, at most; more than MOST count as MOST.
            drafter: a model that drafts where repetition has nothing better to say.
            depth: always so many, whatever is measured.
            least_alike: tokens alike from which on repetition drafts, until a step that checks has been recorded. More
                than NGRAM on NVIDIA, where that takes as long as some ten steps.
            row: what each more row is taken to cost, of a step, until it is measured.
        """
        self.most, self.drafter, self.fixed = min(most, MOST), drafter, depth
        self.least_alike, self.row = least_alike, row
        self.seconds: dict[int, float] = {}  # by rows of a step
        self.accepted: dict[str, list[float]] = {}  # by kind of draft: of its n-th, how often, if those before were
        self._depths: dict[str, int] = {}  # by kind, until something is learned
        self._passed: dict[str, tuple[int, int]] = {}  # by kind: chances that passed, and how many have to
        self._file: Path | None = None
        self._key, self._unwritten = "", 0

    def depth(self, kind: str) -> int:
        """Return how many drafts of a kind are to be checked now; 0: none."""
        if self.fixed is not None:
            return min(self.fixed, self.most)
        if kind not in self._depths:
            rates = self.rates(kind, self.most)
            best = rates.index(max(rates))
            self._depths[kind] = best if rates[best] > GAIN * rates[0] else 0
        return self._depths[kind]

    def probe(self, kind: str) -> bool:
        """Return True if it is time to check one draft that would not pay, to see whether that is still so."""
        passed, until = self._passed.get(kind, (0, PROBE))
        due = passed >= until and self.most > 0 and self.fixed is None
        self._passed[kind] = (0, min(2 * until, RARELY)) if due else (passed + 1, until)
        return due

    def rates(self, kind: str, most: int) -> list[float]:
        """Return the tokens expected of a step with 0 to `most` drafts, over its seconds."""
        tokens, all_right, costs = 1.0, 1.0, self._costs(most + 1)
        rates = [tokens / costs[0]]
        for n in range(most):
            all_right *= self.share(kind, n)
            tokens += all_right
            rates.append(tokens / costs[n + 1])
        return rates

    def share(self, kind: str, n: int) -> float:
        """Return how often the n-th draft of a kind is right, from 0 on, if those before it are."""
        known = self.accepted.get(kind, [])
        return known[n] if n < len(known) else known[-1] if known else HOPE.get(kind, 0.5)

    def _costs(self, most: int) -> list[float]:
        """Return the seconds of a step of 1 to `most` rows: as measured, or between or beyond what was."""
        one = self.seconds.get(1, min(self.seconds.values(), default=1.0))
        costs, row = [one], 1
        for to, then in sorted(self.seconds.items()):
            costs += [costs[-1] + (then - costs[-1]) * (r - row) / (to - row) for r in range(row + 1, to + 1)]
            row = to
        return [*costs, *(costs[-1] + self.row * one * n for n in range(1, most - row + 1))][:most]

    def took(self, rows: int, seconds: float) -> None:
        """Learn how long a step of so many rows took, from its start until the next one could start."""
        learn(self.seconds, rows, seconds)
        self._depths.clear()

    def found(self, kind: str, right: int, checked: int) -> None:
        """Learn that of so many drafts of a kind the first `right` ones were."""
        known = self.accepted.setdefault(kind, [])
        self._depths.clear()
        for n in range(min(right + 1, checked)):
            if n == len(known):
                known.append(known[-1] if known else HOPE.get(kind, 0.5))
            known[n] += LEARN_ACCEPTED * ((n < right) - known[n])
        if right:
            self._passed.pop(kind, None)
        self._unwritten += 1

    def keep(self, file: Path, key: str) -> None:
        """Begin with what is known there of this model and machine, and keep it up to date."""
        self._file, self._key = file, key
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            known = kept(file)[key]
            seconds = {int(rows): float(s) for rows, s in known["seconds"].items()}
            accepted = {str(kind): [float(x) for x in shares] for kind, shares in known["accepted"].items()}
            shares = [x for kind in accepted.values() for x in kind]
            if all(s > 0 for s in seconds.values()) and all(0 <= x <= 1 for x in shares):
                self.seconds, self.accepted = seconds, accepted

    def write(self) -> None:
        """Write what was learned, if it is kept and that much; a file that can't be written is none."""
        if self._file is None or self._unwritten < KEEP_EVERY:
            return
        self._unwritten = 0
        with suppress(OSError):
            keep(self._file, self._key, {"seconds": self.seconds, "accepted": self.accepted}, MODELS_KEPT)


def learn(known: dict[int, float], rows: int, seconds: float) -> None:
    """Learn what a step of so many rows took."""
    before = known.get(rows, seconds)
    known[rows] = before + LEARN_COST * max(-JUMP * before, min(JUMP * before, seconds - before))


def row_behind(of: object) -> HiddenRow | None:
    """Return the row that a chosen token, or the next one of a step, is made from, if a replayed step has left it."""
    return of.of.hidden(of.row) if isinstance(of, RowStep) and isinstance(of.of, ReplayedBatch) else None


class Proposal(NamedTuple):
    """Drafts that are to be checked."""

    tokens: list[int]  # none: the step is for its hidden row
    kind: str
    queued: QueuedTokens | None = None  # in their place: drafts that are being made

    def known(self) -> list[int]:
        """Return the drafts. Waits for the device where they are being made."""
        return self.tokens if self.queued is None else self.queued.tokens()


class Drafting:
    """Drafts of one reply."""

    def __init__(self, drafts: Drafts) -> None:
        self.drafts, self.lookup = drafts, Lookup()
        self.hidden: Hidden | None = None  # which the next token was made from
        self.least_alike, self.begun = drafts.least_alike, False
        self.dear = False  # its steps are replayed, but not those that check: no time is learned
        self.modelled = True  # the model drafts, as long as it can here
        self._probes = False

    def recorded(self) -> None:
        """Take note that steps that check drafts have been recorded: the next ones cost no more than their time."""
        if self.least_alike <= LONGEST:  # else repetition never drafts
            self.least_alike = min(NGRAM, self.least_alike)

    def ready(self, tokens: Sequence[int]) -> bool:
        """Return True if it is worth waiting for the token after these, or for the last one, to draft those after it.

        Else the step that reads it may start at once, before the host knows it.
        """
        kind = self._kind(tokens)
        pays = bool(kind) and self.drafts.depth(kind) > 0
        self._probes = bool(kind) and not pays and self.drafts.probe(kind)
        return pays or self._probes

    def propose(
        self, tokens: Sequence[int], state: KVState, most: int, sampler: Sampler, queued: bool = False
    ) -> Proposal | None:
        """Return drafts, `most` at most, of what follows these tokens, the last of which is not read; None: no step.

        `queued`: they may be drafts that are being made.
        """
        kind = self._kind(tokens)
        count = min(most, self.drafts.depth(kind) or int(self._probes)) if kind else 0
        self._probes = False
        return self.drafted(kind, count, tokens, state, sampler, queued) if count > 0 else None

    def drafted(
        self, kind: str, count: int, tokens: Sequence[int], state: KVState, sampler: Sampler, queued: bool = False
    ) -> Proposal | None:
        """Return `count` drafts of a kind, as `propose` does."""
        drafter = self.drafts.drafter
        if kind == MODEL and drafter is not None:
            hidden, self.hidden = self.hidden, None
            if isinstance(hidden, HiddenRow) and not hidden.there:
                hidden = None
            if hidden is None and drafter.needs_hidden:
                return Proposal([], kind)
            draws = sampler.following(count)
            made = drafter.queue(tokens, state, hidden, count, draws) if queued else None
            if made is not None:
                return Proposal([], kind, made)
            drafted = drafter.draft(tokens, state, hidden, count, draws)
            self.modelled = self.modelled and (bool(drafted) or hidden is None)
            return Proposal(drafted, kind) if drafted else None
        found = self.lookup.draft(tokens, count)
        return Proposal(found, kind) if found else None

    def kinds(self, tokens: Sequence[int]) -> list[str]:
        """Return whose drafts are to be had: those of repetition by how much is alike, and the model's."""
        alike = self.lookup.search(tokens)
        kinds = [f"alike {1 << alike.bit_length() - 1}"] if alike >= self.least_alike else []
        modelled = self.drafts.drafter is not None and self.modelled and not (kinds and alike >= SURE)
        return [*kinds, *[MODEL] * modelled]

    def _kind(self, tokens: Sequence[int]) -> str:
        """Return whose drafts one reply alone has; "": nobody's."""
        kinds = self.kinds(tokens)
        return kinds[-1 if kinds[1:] and self.drafts.depth(MODEL) else 0] if kinds else ""


class Rows(Protocol):
    """A replayed step, or the rows of one that are a reply's."""

    def tokens(self) -> list[int]:
        """Return what is drawn after each row. Waits for the device."""

    def leads(self) -> list[float]:
        """Return by how much each row's likeliest token is above the next; []: rows are sure."""


class Check(NamedTuple):
    """A step that checks drafts, under way."""

    drafts: Proposal
    samples: list[Sample] | Rows  # of each row: what would be chosen there, or the step that draws it
    samplers: list[Sampler]  # as they are after each
    leads: mx.array | None  # of each row's token before the next best, fp32; None: rows are exact, or the step says it
    hidden: Callable[[int], Hidden]  # of a row
    before: int  # length of the state
    start: float  # seconds
    recordings: int  # `Model.recordings` then; -1: its time says nothing of a reply alone

    def tokens(self) -> list[Token]:
        """Return each row's token. Waits for the device."""
        if isinstance(self.samples, list):
            return [sample.on_host() for sample in self.samples]
        return [Token(token) for token in self.samples.tokens()]

    def taken(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Return how many drafts were right, and the first row that is too close to call, at most one past those."""
        right, leads, drafts = 0, cast("list[float]", []), self.drafts.known()
        while right < len(drafts) and tokens[right] == drafts[right]:
            right += 1
        if not isinstance(self.samples, list):
            leads = self.samples.leads()
        elif self.leads is not None:
            leads = cast("list[float]", self.leads.tolist())
        return right, next((i for i, lead in enumerate(leads[: right + 1]) if lead < NEAR), right + 1)


def lead(logits: mx.array, token: mx.array) -> mx.array:
    """Return by how much the logit of a token, int [], is above all others of logits [vocab]."""
    return logits[token] - mx.put_along_axis(logits, token[None], mx.array([-mx.inf]), axis=0).max()
