"""A reply under way: chunks of its prompt are read, then it takes turns, a token each, until it is over.

In: a model, a KV state, token ids, how tokens are chosen. Out: a token a turn, and `Statistics`. Each turn starts the
step after it: one that reads a token which the host need not know yet, or one that checks drafts (drafting.py). Knows
nothing of who waits for the tokens: loop.py, scheduler.py.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import mlx.core as mx
import numpy as np

from ..execution import execution
from ..kv.state import KVState
from ..model.model import Model
from ..model.step import Step, ids_of, known
from ..ops.dispatch import REPLAY
from ..ops.sample import LIKELIEST
from .drafting import Check, Drafting, Hidden, Proposal, lead, row_behind
from .prompt import give_back, read_chunk
from .sampling import Constraint, Sample, Sampler, Token, choose_in_turn, draws_in_turn, masks_of

log = logging.getLogger("mlx_gemma4")

FAILURES = (RuntimeError, ValueError)  # that an evaluation may raise: a kernel that this GPU's compiler refuses, ..


@dataclass
class Statistics:
    """Figures of one generation. Times in seconds."""

    prompt_tokens: int = 0  # those that were read
    reused_tokens: int = 0  # the prompt's others, which the state held before
    prompt_time: float = 0.0
    reply_tokens: int = 0
    reply_time: float = 0.0
    drafted_tokens: int = 0  # that were checked
    accepted_tokens: int = 0  # of the reply's tokens, those that drafts had right
    peak_memory: int = 0  # bytes, MLX's arrays
    stop_reason: Literal["stop", "length"] = "length"  # "stop": the reply was complete, "length": cut or left

    @property
    def prompt_rate(self) -> float:
        return self.prompt_tokens / self.prompt_time if self.prompt_time else 0.0

    @property
    def reply_rate(self) -> float:
        """Tokens a second after the first, which the prompt's time already holds."""
        return (self.reply_tokens - 1) / self.reply_time if self.reply_tokens > 1 and self.reply_time else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens of the reply for each step of the model; 1 without drafts."""
        return self.reply_tokens / max(1, self.reply_tokens - self.accepted_tokens)


@dataclass
class Decoding:
    """A reply under way: chunks of its prompt are read, then it takes turns, a token each, until it is over."""

    model: Model
    state: KVState
    new_sampler: Callable[[], Sampler]
    constraint: Constraint | None
    max_tokens: int
    stop_ids: frozenset[int]
    statistics: Statistics
    start: float  # when the prompt began to be read
    ids: list[int]  # of the state, with the tokens that the host has received
    marks: list[int]  # positions to mark
    chunk: int  # tokens of a prompt to read at a time, at most
    drafting: Drafting | None = None
    produced: int = 0  # tokens received
    first: float = 0.0  # when the first was there
    chosen: Sample | Step | int | None = None  # the next token, before it is received
    step: Step | None = None  # or what it is to be chosen from
    check: Check | None = None  # or the step that checks drafts of it
    # Not yet received: those that the latest check has found to be right, and if there is another under way, the one
    # after them, which that has begun with.
    accepted: deque[Token] = field(default_factory=deque)
    known: bool = False  # the token chosen next is on the host
    sure: bool = True  # False: it is to be read by a step of its own
    since: float = 0.0  # when the latest step of one token could start; 0: unknown
    recordings: int = 0  # `Model.recordings` then
    stopped: bool = False  # it is complete

    def __post_init__(self) -> None:
        self.sampler = self.new_sampler()

    @property
    def unread(self) -> int:
        """Tokens of the prompt to be read before the first turn."""
        return 0 if self.produced or self.max_tokens < 1 else max(0, len(self.ids) - self.state.length)

    @property
    def in_step(self) -> bool:
        """True if the step that reads a token also chooses the next: recorded steps, and parts of models, which need
        not gather all logits for it."""
        return (self.model.replays or self.model.part is not None) and self.constraint is None and self.sampler.in_step

    @property
    def over(self) -> bool:
        """True after the last token."""
        return self.chosen is None and self.step is None and self.check is None and not self.accepted

    def read_chunk(self, most: int) -> None:
        """Read `most` more tokens of the prompt, or fewer: `read_chunk`."""
        try:
            self.step = read_chunk(self.model, self.state, self.ids, self.marks, most)
        except FAILURES as error:
            self.step = self.again(error)

    def turn(self) -> Token | None:
        """Receive the next token, the one after it started; None: that was a stop token."""
        if self.drafting and not self.drafting.begun:
            self.begin_drafting(self.drafting)
        if self.check is not None and not self.accepted:
            following = self.settle_check(self.check)
            if following is not None and self.accepted:
                self.check_ahead(following)
        if self.accepted:
            token = self.receive_accepted()
        elif self.drafting and self.produced and self.sure and (self.known or self.drafting.ready(self.ids)):
            token = self._drafted(self.drafting)
        else:
            token = self._undrafted()
        return None if token.id in self.stop_ids else token

    def _undrafted(self) -> Token:
        # A step starts before its token is known to the host, where that can be.
        self.known, self.sure = False, True
        if self.drafting:
            self.drafting.hidden = None
        pipelined = self.constraint is None and (self.in_step or not self.model.replays)
        token = self._pipelined() if pipelined else self._one_by_one()
        self.timed(time.perf_counter())
        return token

    def _pipelined(self) -> Token:
        """Start the step that reads the next token before the host knows it."""
        chosen = self.next_token() if self.chosen is None else self.chosen
        while True:
            try:
                in_step = self.in_step  # before the step, which may be the first to find that none are replayed here
                step = self.read(chosen, last=self.produced + 1 == self.max_tokens)
                self.chosen = step if step is None or in_step else self.sample(step)
                token = self.receive(chosen)
                break
            except FAILURES as error:
                chosen = self.sample(self.again(error))
        self.step = None
        if self.is_last(token):
            self.chosen = None
        return token

    def _one_by_one(self) -> Token:
        """Start the step when its token is known: a constraint is to see it, or a replayed step's logits are sampled.

        The caller has the token while the device runs the step; then, under a constraint, the mask is made.
        """
        chosen, token = self.received()
        last = self.is_last(token)
        try:
            self.step = self.read(chosen, last=last)
            if self.step is not None and not self.model.replays:
                with execution():
                    mx.async_eval(self.step.logits())
        except FAILURES as error:
            again = self.again(error)
            self.step = None if last else again
        self.chosen = None
        return token

    def next_token(self) -> Sample:
        """Return the next token, perhaps still being computed."""
        if isinstance(self.chosen, Sample):
            return self.chosen
        try:
            if self.chosen is not None:
                return Sample(mx.array(known(self.chosen)))
            assert self.step is not None
            return self.sample(self.step)
        except FAILURES as error:
            return self.sample(self.again(error))

    def is_last(self, token: Token) -> bool:
        """Take note of a token that was received; return True if the reply ends with it."""
        stop = token.id in self.stop_ids
        if self.constraint is not None and not stop:
            self.constraint.accept(token.id)
        self.stopped = stop or (self.constraint is not None and self.constraint.finished)
        return self.stopped or self.produced == self.max_tokens

    def mask(self) -> np.ndarray | None:
        """Return the tokens that the constraint lets come next; None: any."""
        return None if self.constraint is None else self.constraint.mask()

    def read(self, chosen: Sample | Step | int, *, last: bool) -> Step | None:
        """Start the step that reads a chosen token; None after the last, whose logits nobody wants."""
        token = chosen.token if isinstance(chosen, Sample) else chosen
        with execution():
            if last and not self.model.replays:  # a lazy graph: it costs nothing unless the state is used again
                self.model.prefill(ids_of(token), self.state)
                return None
            # Replayed, a step costs less than a prefill.
            draw = self.sampler.draw() if self.in_step and not last else LIKELIEST
            step = self.model.step(token, self.state, draw)
            return None if last else step

    def sample(self, step: Step) -> Sample:
        """Choose the token after a step, scheduled. The device may still be at the step while the mask is made."""
        allowed = self.mask()
        with execution():
            sample = self.sampler(step.logits(), allowed)
            mx.async_eval(sample)
        return sample

    def receive(self, chosen: Sample | Step | int) -> Token:
        """Wait for a chosen token."""
        token = chosen.on_host() if isinstance(chosen, Sample) else Token(known(chosen))
        self.count(token)
        return token

    def received(self) -> tuple[Sample | int, Token]:
        """Receive the next token; return it, and what was chosen: anew where its evaluation has failed."""
        chosen = self.next_token() if self.chosen is None else self.chosen
        try:
            token = self.receive(chosen)
        except FAILURES as error:
            chosen = self.sample(self.again(error))
            token = self.receive(chosen)
        return chosen if isinstance(chosen, Sample) else token.id, token

    def count(self, token: Token) -> None:
        """Count a token that the host has received."""
        self.ids.append(token.id)
        self.produced, now = self.produced + 1, time.perf_counter()
        s = self.statistics
        if len(self.ids) % self.state.layout.tail == 2:  # a full tail was sealed: segments were joined
            give_back()
        if self.produced == 1:
            s.prompt_time, self.first = now - self.start, now
        s.reply_tokens, s.reply_time, s.peak_memory = self.produced, now - self.first, mx.get_peak_memory()

    def _drafted(self, drafting: Drafting) -> Token:
        """Receive the next token, and start the step that reads it with drafts of those after it, if any are made."""
        drafting.hidden = row_behind(self.chosen or self.step) or drafting.hidden
        chosen, token = self.received()
        self.chosen = self.step = None  # nobody has that step any more: its logits need not be kept
        self.known, last = False, self.is_last(token)
        try:
            if not last and self.start_check(drafting):
                return token
        except FAILURES as error:
            self.step = self.without_drafts(error)
            return token
        try:
            in_step = self.in_step
            # A stop token is read as where nobody drafts: there its step starts before it is known.
            step = self.read(chosen, last=last if self.constraint else self.produced == self.max_tokens)
            if last or step is None:
                return token
            if in_step:
                self.chosen = step
            elif self.constraint is None:
                self.chosen = self.sample(step)
            else:
                self.step = step
        except FAILURES as error:
            again = self.again(error)
            self.step = None if last else again
        self.since = time.perf_counter()
        return token

    def begin_drafting(self, drafting: Drafting) -> None:
        """Have the reply's steps replayed from the first on in the way in which those that check drafts are, if any."""
        drafting.begun, replayed = True, self.model.checks_replayed(self.state)
        drafting.dear = self.model.replays and not replayed
        drafting.modelled = not drafting.dear
        if replayed and (self.model.recordings or drafting.drafts.drafter):
            drafting.recorded()
            self.model.seat(self.state)

    def start_check(self, drafting: Drafting, ahead: int = 0) -> bool:
        """Start the step that reads the latest token with drafts, and chooses after each; False: none are worth it.

        `ahead`: of `ids`, the last ones that the host has not received yet.
        """
        start, before, recordings = time.perf_counter(), self.state.length, self.model.recordings
        most = min(self.max_tokens - self.produced - ahead, self.model.most_checked(self.state)) - 1
        drafts = drafting.propose(self.ids, self.state, most, self.sampler, queued=self.in_step)
        if drafts is None:
            return False
        any_drafts, queued = bool(drafts.tokens), drafts.queued
        drafts, masks = self.checkable(drafts)
        if not masks or (any_drafts and not drafts.tokens):
            return False
        ids, count = [self.ids[-1], *drafts.tokens], queued.count if queued else len(drafts.tokens)
        with execution():
            draws, after = draws_in_turn(self.sampler, count + 1) if self.in_step else ([], [])
            replayed = self.model.replayed_check([ids], [self.state], draws, queued)
            if replayed is not None:
                drafting.recorded()
        self.statistics.drafted_tokens += count
        if replayed is not None and draws:
            self.check = Check(drafts, replayed, after, None, replayed.hidden, before, start, recordings)
            drafting.drafts.write()
            return True
        if replayed is None and queued is not None:
            ids, masks = [*ids, *queued.tokens()], [None] * (count + 1)
        hidden: Callable[[int], Hidden]
        with execution():
            if replayed is not None:
                logits, hidden = replayed.logits(), replayed.hidden
            else:
                logits, rows_after = self.model.check(ids, self.state)
                mx.async_eval(rows_after)
                hidden = rows_after.__getitem__
            samples, samplers, leads = self.choose_rows(logits, masks)
        self.check = Check(drafts, samples, samplers, leads, hidden, before, start, recordings)
        drafting.drafts.write()  # while the device works
        return True

    def check_ahead(self, following: Token) -> None:
        """Start the next check, or its drafts, before the tokens are handed out that the latest one has found."""
        assert self.drafting is not None
        ids = [token.id for token in (*self.accepted, following)]
        tail = self.state.layout.tail
        sealed = self.state.length // tail > len(self.ids) // tail  # else who leaves early takes a count back
        if sealed or following.id in self.stop_ids or self.produced + len(ids) >= self.max_tokens:
            return
        self.ids += ids
        wrong: Exception | None = None
        try:
            if self.start_check(self.drafting, len(ids)):
                self.accepted.append(following)
                self.chosen = None
        except FAILURES as error:
            wrong = error
        finally:
            del self.ids[-len(ids) :]
        if wrong is not None:  # these tokens are chosen once more
            self.accepted.clear()
            self.chosen, self.step = None, self.without_drafts(wrong)

    def checkable(self, drafts: Proposal) -> tuple[Proposal, list[np.ndarray | None]]:
        """Return drafts up to a stop token and to what the constraint forbids, and the masks of all rows of a step that
        checks them; [] where the first can't be made."""
        stops = (n for n, draft in enumerate(drafts.tokens) if draft in self.stop_ids)
        tokens = drafts.tokens[: next(stops, len(drafts.tokens))]
        masks: list[np.ndarray | None] = [None] * (len(tokens) + 1)
        if self.constraint is not None:
            masks = masks_of(self.constraint, tokens)
            tokens = tokens[: max(0, len(masks) - 1)]
        return drafts._replace(tokens=tokens), masks

    def choose_rows(
        self, logits: mx.array, masks: list[np.ndarray | None]
    ) -> tuple[list[Sample], list[Sampler], mx.array | None]:
        """Choose a token from each row of a check, logits fp32 [T, vocab]: `Check`'s samples, samplers, leads.

        To be called under the execution lock.
        """
        samples, samplers = choose_in_turn(self.sampler, logits, masks)
        leads = None
        if self.model.kernels is not None and self.sampler.sampling.temperature == 0:
            rows = zip([self.sampler, *samplers], logits, masks, samples, strict=False)
            leads = mx.stack([lead(sampler.altered(row, mask), each.token) for sampler, row, mask, each in rows])
        mx.async_eval(samples, *([] if leads is None else [leads]))
        return samples, samplers, leads

    def settle_check(self, check: Check) -> Token | None:
        """Take what a step that checked drafts has found: the drafts that were right, and the token after them.

        Returns that token, unless its step is to begin when it is received.
        """
        assert self.drafting is not None
        self.check = None
        try:
            tokens = check.tokens()
            right, unsure = check.taken([token.id for token in tokens])
        except FAILURES as error:
            self.step = self.without_drafts(error)
            return None
        rows, drafts = len(tokens), self.drafting.drafts
        if self.model.recordings == check.recordings and not self.drafting.dear:
            drafts.took(rows, time.perf_counter() - check.start)
        last = min(right, unsure - 1)  # the row whose token comes next
        if rows > 1:  # a draft that was right and too close to call has gained nothing
            drafts.found(check.drafts.kind, max(last, 0), rows - 1)
        stop = next((n for n, token in enumerate(tokens[: max(last, 0)]) if token.id in self.stop_ids), None)
        last = last if stop is None else stop + 1
        self.state.rewind(check.before + last + 1)
        self.since = 0.0
        if last < 0:  # not even the first is sure: its own token is read once more
            self.step = self.model.step(self.ids[-1], self.state)
            return None
        self.accepted.extend(tokens[:last])
        if stop is not None:
            return None
        self.chosen = check.samples[last] if isinstance(check.samples, list) else tokens[last].id
        self.sampler = check.samplers[last]
        self.known = self.sure = unsure > right
        self.drafting.hidden = check.hidden(last) if self.sure else None
        at_once = self.constraint is None and (self.in_step or not self.model.replays)  # else starting one waits for it
        return tokens[last] if self.sure and at_once else None

    def checked(self) -> list[Token]:
        """Receive the tokens that checks of drafts have found."""
        tokens = [self.receive_accepted() for _ in range(len(self.accepted))]
        if self.check is not None:
            self.settle_check(self.check)
            tokens += [self.receive_accepted() for _ in range(len(self.accepted))]
        return tokens

    def settled(self) -> list[Token]:
        """Receive the tokens that checks of drafts have found; unless over, the reply may then step beside others."""
        tokens = self.checked()
        self.known, self.sure, self.since = False, True, 0.0
        if self.drafting:
            self.drafting.hidden = None
        return tokens

    def receive_accepted(self) -> Token:
        """Receive a token that is known: one that a draft had right, or the one after these."""
        token = self.accepted.popleft()
        self.count(token)
        self.statistics.accepted_tokens += bool(self.accepted) or self.check is None
        self.is_last(token)
        return token

    def without_drafts(self, error: Exception) -> Step:
        """Read everything once more after an error in a step that checks drafts; return the last token's step."""
        assert self.drafting is not None
        log.warning("Drafts fail here and are off: %s", error)
        self.drafting.drafts.most, self.drafting = 0, None
        marks = self.reread()
        step = self.model.step(self.ids[-1], self.state)
        self.resume(marks)
        return step

    def timed(self, now: float) -> None:
        """Learn what a step of one token takes, from one to the next."""
        before, self.recordings = self.recordings, self.model.recordings
        if self.drafting and self.since and before == self.recordings:
            self.drafting.drafts.took(1, now - self.since)
        self.since = now

    def again(self, error: Exception) -> Step:
        """Read everything once more, launch by launch, after an error in an evaluation; return the last token's step.

        So the kernel is found that fails only when it is evaluated, as all do on Metal, and is off from then on. An
        error that is no kernel's is raised.
        """
        model, kernels = self.model, self.model.kernels
        model.failed(error)
        if kernels is None:
            raise error
        off, replayed = kernels.off, model.replays
        with kernels.one_by_one():
            marks = self.reread()
            step = model.step(self.ids[-1], self.state)
            with execution():
                mx.eval(step.logits(), self.state.arrays, self.new_sampler()(step.logits()))
        if kernels.off == off:
            if not replayed:
                raise error
            kernels.off |= {REPLAY}
            log.warning("Replayed steps fail here and are off, steps run launch by launch instead: %s", error)
        self.resume(marks)
        return step

    def reread(self) -> list[int]:
        """Start over, and read all tokens but the last; return the positions to mark."""
        marks = sorted({*self.marks, *(mark.position for mark in self.state.marks)})
        self.state.start_over()
        while self.state.length < len(self.ids) - 1:
            read_chunk(self.model, self.state, self.ids[:-1], marks, self.chunk)
        return marks

    def resume(self, marks: list[int]) -> None:
        """Go on after `reread` and a step of the last token, whose next one is to be chosen anew."""
        if self.state.length in marks:
            self.state.mark()
        with execution():
            self.sampler = self.new_sampler()
            for token in self.ids[len(self.ids) - self.produced :]:
                self.sampler.skip(token)
