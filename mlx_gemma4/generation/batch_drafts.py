"""Drafts of several replies that step together: how many each has, and the one replayed step that checks them all.

In: replies under way, and what is known of drafts (drafting.py). Out: replies that hold what the step has found. One
without drafts has a row of it. Only where checks are replayed. Knows nothing of who waits for tokens: scheduler.py.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..execution import execution
from ..model.batch import MAX_BATCH, rows_for
from ..model.batch_replay import HiddenRow, ReplayedBatch
from ..model.model import Model
from ..model.step import RowStep
from ..ops.sample import LIKELIEST
from .decoding import FAILURES, Decoding
from .drafting import GAIN, MODEL, Check, Drafts, Proposal, learn, row_behind
from .sampling import Sampler, Token, draws_in_turn

log = logging.getLogger("mlx_gemma4")

PROBED = 4  # replies that try a draft which would not pay, at most
FURTHER = 0.37  # of a reply's first draft: what each more takes, until it is measured; on an H200 0.23 of 0.62 ms


class Offer(NamedTuple):
    """Drafts that a reply may have."""

    shares: Sequence[float] = ()  # how often the n-th is right if those before it are; as many as it may have
    seconds: Sequence[float] = ()  # that making the n-th takes, after those before it; (): none
    chance: float = 1.0  # that there are any


def allotted(offers: Sequence[Offer], plain: float, costs: Sequence[float]) -> tuple[list[int], float]:
    """Return how many drafts each reply has if all together make the most tokens a second, and how many those are.

    Args:
        offers: one of each reply.
        plain: seconds of a step without drafts, which are to gain something over it.
        costs: seconds of a step that checks 1, 2, 4 .. 32 rows: each reply's drafts, and one.
    """
    n, counts = len(offers), [0] * len(offers)
    found, best, tokens, seconds = [*counts], GAIN * n / plain, float(n), 0.0
    gains = [offer.chance * offer.shares[0] if offer.shares else 0.0 for offer in offers]
    for rows in range(n + 1, MAX_BATCH + 1):
        if not (gain := max(gains)):
            break
        i = gains.index(gain)
        tokens, seconds = tokens + gain, seconds + (offers[i].seconds[counts[i]] if offers[i].seconds else 0.0)
        counts[i] += 1
        gains[i] *= offers[i].shares[counts[i]] if counts[i] < len(offers[i].shares) else 0.0
        if (rate := tokens / (costs[(rows - 1).bit_length()] + seconds)) > best:
            found, best = [*counts], rate
    return found, best


def receive_all(reply: Decoding) -> tuple[list[Token], bool]:
    """Receive the tokens that a check has found, and the one after them; return them, and whether the reply ends."""
    tokens = reply.checked()
    if reply.over:
        return tokens, True
    if reply.drafting and not reply.known:  # else the check has said it
        reply.drafting.hidden = row_behind(reply.chosen or reply.step)
    _, token = reply.received()
    reply.chosen, reply.step, reply.known, reply.since = None, None, False, 0.0
    return [*tokens, token], reply.is_last(token)


class Share(NamedTuple):
    """The rows of a step that are a reply's."""

    of: ReplayedBatch
    first: int
    rows: int

    def tokens(self) -> list[int]:
        return self.of.tokens()[self.first :][: self.rows]

    def leads(self) -> list[float]:
        """Return by how much each leads. The first counts as sure: it is what a step without drafts is."""
        return [math.inf, *self.of.leads()[self.first :][1 : self.rows]]

    def hidden(self, row: int) -> HiddenRow:
        return self.of.hidden(self.first + row)


class Asked(NamedTuple):
    """What a step is to read of a reply: its latest token, and drafts of those after it."""

    reply: Decoding
    drafts: Proposal
    masks: list[np.ndarray | None]  # of the tokens after each


class Started(NamedTuple):
    """A reply's part of a step that is under way."""

    asked: Asked
    share: Share
    samplers: list[Sampler]  # as they are after each row; []: its tokens are chosen from logits
    before: int  # length of the state

    def check(self) -> Check:
        """Wait for the step; return what it is for the reply alone."""
        (reply, drafts, masks), share = self.asked, self.share
        if self.samplers:
            share.tokens()
            return Check(drafts, share, self.samplers, None, share.hidden, self.before, 0.0, -1)
        with execution():
            logits = share.of.logits()[share.first : share.first + share.rows]
            samples, samplers, leads = reply.choose_rows(logits, masks)
            if leads is not None:
                leads = mx.where(mx.arange(leads.size) == 0, mx.inf, leads)
        return Check(drafts, samples, samplers, leads, share.hidden, self.before, 0.0, -1)


class BatchDrafts:
    """What is known of drafts of replies that step together, and the steps that check them. For one thread."""

    def __init__(self, model: Model, drafts: Drafts) -> None:
        self.model, self.drafts = model, drafts
        self.plain: dict[int, float] = {}  # seconds from a step without drafts to the next, by rows
        self.checks: dict[int, float] = {}  # and from one with drafts, but for making them
        self.making: dict[int, float] = {}  # seconds that a model takes for a reply's drafts, by their number
        self._due: set[str] = set()  # kinds of which a draft is tried in the next step
        self._rows, self._making = 0, 0.0  # of the step with drafts under way: its rows, and making the drafts
        self._last: tuple[list[int], int, bool, float] = [], 0, False, 0.0  # replies, recordings, drafts, end
        self._known = 0.0  # when the latest tokens were known before the step with drafts under way

    def wanted(self, replies: Sequence[Decoding]) -> bool:
        """Return True if it is worth waiting for the latest token of each reply, to draft those after it."""
        kinds = set[str]()
        if len(replies) >= MAX_BATCH:
            return False
        for reply in replies:
            if reply.drafting is None or not self.model.checks_replayed(reply.state, len(replies)):
                return False
            if not reply.drafting.begun:
                reply.begin_drafting(reply.drafting)
            kinds.update(reply.drafting.kinds(reply.ids))
        if not kinds or (self.drafts.fixed is None and rows_for(len(replies)) not in self.plain):
            return False
        if any(count for _, count in self.plan(replies, known=False)):
            return True
        self._due = {kind for kind in sorted(kinds) if self.drafts.probe(kind)}
        return bool(self._due)

    def plan(self, replies: Sequence[Decoding], known: bool = True) -> list[tuple[str, int]]:
        """Return the kind of drafts that each reply has, and their number. `known`: its latest token is received."""
        self._known = time.perf_counter()
        kinds = [self._kinds(reply, known) for reply in replies]
        due, self._due = self._due, set()
        if due:
            tried = [next((kind for kind in some if kind in due), "") for some in kinds]
            some = [i for i, kind in enumerate(tried) if kind][: min(PROBED, MAX_BATCH - len(replies))]
            return [(kind, int(i in some)) for i, kind in enumerate(tried)]
        found, best, plain = [("", 0)] * len(replies), 0.0, self.plain.get(rows_for(len(replies)))
        if plain is None and self.drafts.fixed is None:
            return found
        for modelled in (False, True) if any(MODEL in some for some in kinds) else (False,):
            picked = [
                max((k for k in some if modelled or k != MODEL), key=lambda k: self.drafts.share(k, 0), default="")
                for some in kinds
            ]
            offers = [self._offer(reply, kind, known) for reply, kind in zip(replies, picked, strict=True)]
            if self.drafts.fixed is not None:
                most = min(self.drafts.fixed, MAX_BATCH // len(replies) - 1)
                counts, rate = [min(most, len(offer.shares)) for offer in offers], 1.0 + modelled
            else:
                counts, rate = allotted(offers, plain or math.inf, self.costs())
            if rate > best:
                found, best = [*zip(picked, counts, strict=True)], rate
        return found

    def _kinds(self, reply: Decoding, known: bool) -> list[str]:
        """Return the kinds of drafts that a reply can have in the next step."""
        drafting, drafter = reply.drafting, self.drafts.drafter
        if drafting is None or not reply.sure or reply.stopped or reply.produced >= reply.max_tokens:
            return []
        blind = known and drafter is not None and drafter.needs_hidden and drafting.hidden is None
        return [kind for kind in drafting.kinds(reply.ids) if not (blind and kind == MODEL)]

    def _offer(self, reply: Decoding, kind: str, known: bool) -> Offer:
        most = min(reply.max_tokens - reply.produced, self.model.most_checked(reply.state)) - 1
        shares = [self.drafts.share(kind, n) for n in range(min(most, self.drafts.most))] if kind else []
        if kind == MODEL:
            return Offer(shares, self.making_each(len(shares)))
        return Offer(shares, chance=1.0 if known or not shares else shares[0])  # the token to come is a draft, too

    def making_each(self, most: int) -> list[float]:
        """Return the seconds that a reply's n-th draft adds: as measured, or as further ones are taken to cost."""
        near, made = min(self.making, default=0), [0.0]
        for count in range(1, most + 1):
            near = count if count in self.making else near
            made.append(self.making.get(near, 0.0) * (1 + FURTHER * (count - 1)) / (1 + FURTHER * (near - 1)))
        return [after - before for before, after in pairwise(made)]

    def costs(self) -> list[float]:
        """Return the seconds of steps that check 1, 2, 4 .. 32 rows: as measured, or as rows are taken to cost."""
        known, row, costs = self.plain | self.checks, self.drafts.row, list[float]()
        near = min(known)
        for rows in (1, 2, 4, 8, 16, 32):
            near = rows if rows in known else near
            costs.append(known[near] * (1 + row * (rows - 1)) / (1 + row * (near - 1)))
        return costs

    def asked(self, reply: Decoding, kind: str, count: int, over: bool) -> Asked:
        """Have a reply's drafts made, `count` of a kind. `over`: its last token is only to be read."""
        if over:
            return Asked(reply, Proposal([], kind), [None])
        start, recordings, proposal = time.perf_counter(), self.model.recordings, None
        if count and reply.drafting:
            try:
                proposal = reply.drafting.drafted(kind, count, reply.ids, reply.state, reply.sampler)
            except FAILURES as error:
                log.warning("Drafts fail here and are off: %s", error)
                self.drafts.most = 0
            took = time.perf_counter() - start
            self._making += took
            if kind == MODEL and proposal and proposal.tokens and recordings == self.model.recordings:
                learn(self.making, len(proposal.tokens), took)
        drafts, masks = reply.checkable(proposal or Proposal([], kind))
        return Asked(reply, drafts, masks or [reply.mask()])

    def start(self, asked: Sequence[Asked]) -> list[Started]:
        """Start the step that reads what is asked; []: it can't be replayed, and one without drafts was started."""
        ids, draws, samplers, states = [], [], [], [reply.state for reply, _, _ in asked]
        for reply, drafts, masks in asked:
            in_step = reply.in_step
            some, after = draws_in_turn(reply.sampler, len(masks)) if in_step else ([LIKELIEST] * len(masks), [])
            ids.append([reply.ids[-1], *drafts.tokens])
            draws.append(some)
            samplers.append(after)
        before, self._rows = [state.length for state in states], sum(map(len, ids))
        with execution():
            step = self.model.replayed_check(ids, states, [draw for some in draws for draw in some])
            if step is None:
                plain = self.model.batch([some[0] for some in ids], states, [some[0] for some in draws])
        if step is None:
            self.checks[rows_for(self._rows)] = math.inf
            for row, ((reply, _, _), after) in enumerate(zip(asked, samplers, strict=True)):
                if after:
                    reply.chosen, reply.sampler = RowStep(plain, row), after[0]
                else:
                    reply.step = RowStep(plain, row)
            return []
        started, first = list[Started](), 0
        for each, after, length in zip(asked, samplers, before, strict=True):
            rows = len(each.masks)
            started.append(Started(each, Share(step, first, rows), after, length))
            first += rows
            each.reply.statistics.drafted_tokens += rows - 1
            if each.reply.drafting:
                each.reply.drafting.recorded()
        self.drafts.write()  # while the device works
        return started

    def stepped(self, replies: Sequence[Decoding], drafted: bool) -> None:
        """Learn what a step took, from the end of the one before, if that was of the same replies. []: it was not."""
        now, recordings, who = time.perf_counter(), self.model.recordings, [id(reply) for reply in replies]
        before, recorded, had, since = self._last
        if who and (before, recorded) == (who, recordings) and had <= drafted:
            since = since if had == drafted else self._known  # before that the step without drafts was under way
            rows = rows_for(self._rows if drafted else len(who))
            learn(self.checks if drafted else self.plain, rows, now - since - self._making)
        self._last, self._making = (who, recordings, drafted, now), 0.0
