"""The model: weights and the three ways a forward pass runs.

In: token ids and a `KVState`. Out: logits. Prompts are read in stock operations (forward.py), a token or a few in fused
kernels where there are any (decode.py), one token by a replayed step where there is one (step.py, replay.py). A `Model`
never changes once it is loaded and may serve any number of states, which it makes, saves and loads.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..config import Config
from ..execution import execution
from ..kv import quantization
from ..kv.file import load_state, save_state
from ..kv.segments import KVQuantizer, SegmentLayout
from ..kv.state import KVState
from ..memory import MemoryPlan, kv_dtype, on_cpu
from ..ops import stock
from ..ops.dispatch import Kernels
from ..ops.quantize_kv import QUANTIZE_KV
from ..ops.sample import LIKELIEST, Draw
from ..shard import Part
from .batch import Batcher, check_batch, stock_step
from .batch_replay import QueuedTokens, ReplayedBatch
from .costs import largest_chunk
from .decode import MAX_CHECKED, can_step, make_step
from .exchange import sharing
from .forward import head, logits_of, rope_wavelengths, run_layers
from .numpy_step import NumpyStep, numpy_steps
from .replay import Replayer
from .soft import SoftRows, SoftTokens
from .step import BatchStep, LazyBatchStep, LazyStep, NextToken, Step, Tokens, ids_of, known_tokens, tokens_as_array
from .weights import Loaded, Weights

log = logging.getLogger("mlx_gemma4")


class Model:
    """Weights, and the forward pass from tokens to logits."""

    def __init__(
        self,
        config: Config,
        weights: Weights,
        kernels: Kernels | None = None,
        plan: MemoryPlan | None = None,
        part: Part | None = None,
    ) -> None:
        """`kernels` run decode steps; None: stock operations run everything. `plan`: of the memory; None: no limits.

        `part`: these are a rank's configuration and weights. Each rank makes the same calls on its own `Model`, its
        states and steps in the same order, asking a step for its token or logits included; results are the same on all.
        """
        self.config = config
        self.part = part
        self.weights = weights
        self.kernels = kernels
        self.plan = plan
        self.soft = SoftTokens(config.sees_ahead)
        self.chunk = plan.chunk if plan else largest_chunk(config, kernels)  # tokens of a prompt, read at a time
        kinds = {layer.sliding: layer for layer in config.layers}
        waves = {k: rope_wavelengths(config, kinds[k], weights.rope_freqs) for k in (True, False) if k in kinds}
        mx.eval(list(waves.values()))
        self.loaded = Loaded(config, weights, self.kv_dtype, waves, kernels, sharing(part, kernels))
        self.rotations: dict[int, mx.array] | None = None  # of quantized keys and values; made for the first such state
        together = kernels and can_step(config, 1)
        self.batcher = (
            Batcher(self.loaded, kernels, lambda ids, state: self._whole(self._read(ids, state, 1)))
            if kernels and together
            else None
        )
        self._step = make_step(self.loaded, kernels) if kernels else None
        plain = not kernels and on_cpu() and part is None  # a part's sums are forward.py's
        self._numpy_step = NumpyStep(self.loaded) if plain else None
        replayable = kernels and kernels.player and can_step(config, 1) and (part is None or part.records)
        self.replayer = Replayer(self.loaded, kernels) if kernels and replayable else None

    def new_state(
        self,
        max_tokens: int | None = None,
        kv: str = "full",
        *,
        layout: SegmentLayout | None = None,
        dtype: mx.Dtype | None = None,
    ) -> KVState:
        """Make an empty KV state for this model.

        Args:
            max_tokens: how many it may hold; None: any number.
            kv: how global layers' keys and values are held: "full", or quantized: "q8" (8 bits), "tq4" (4 bits).
                The first quantized state of a model takes a prefill of 64 tokens (`estimate_key_means`).
            layout: where segments end.
            dtype: of keys and values in full precision; None: fp32 on a CPU, fp16 on a GPU.

        Raises:
            InputError: there is no such `kv`, or not for heads of this model's size.
        """
        return KVState(self.config, dtype or self.kv_dtype, max_tokens, layout, kv, self.quantizers(kv))

    def quantizers(self, kv: str) -> dict[int, KVQuantizer]:
        """Return what quantizes each global layer with keys and values of its own; {} for "full"."""
        if kv not in quantization.BITS:
            return {}
        with execution():
            if self.rotations is None:
                made = {}
                for i, mean in estimate_key_means(self).items():
                    dim, layer = self.config.layers[i].head_dim, self.weights.layers[i]
                    made[i] = quantization.rotations(dim, layer.attn_q_norm, layer.attn_k_norm, mean)
                mx.eval(list(made.values()))
                self.rotations = made
        kernels = self.kernels
        quantize = quantization.quantize if kernels is None else lambda *args: kernels(QUANTIZE_KV, *args)
        return {i: KVQuantizer(kv, rotation, quantize) for i, rotation in (self.rotations or {}).items()}

    def save_state(self, state: KVState, path: str | Path) -> None:
        """Write a state of this model to a file, without its marks. Raises InputError."""
        save_state(state, path, self.fingerprint)

    def load_state(self, path: str | Path) -> KVState:
        """Read a state of this model that `save_state` wrote. Raises InputError."""
        return load_state(
            path, self.fingerprint, lambda kv, dtype, layout: self.new_state(None, kv, layout=layout, dtype=dtype)
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what tells models apart that make different keys and values: shape, norms, some rows of the weights.

        The same however the weights are held. Hex, 64 digits. Each rank's is another, and so are its states' files.
        """
        vocab = self.weights.token_embd.shape[0]
        config = replace(self.config, context=self.config.own_context or self.config.context)
        digest = hashlib.sha256(repr((config, self.part) if self.part else config).encode())
        with execution():
            some = mx.arange(0, vocab, max(1, vocab // 16))
            rows = [stock.embed(some, self.weights.token_embd)]
            for layer in self.weights.layers:
                rows.append(layer.attn_norm)
                for weight in (layer.attn_q, layer.attn_k, layer.attn_output, layer.ffn_down):
                    if weight is not None:
                        rows.append(stock.embed(mx.array([0]), weight))
            # Copies: on NVIDIA what the host reads moves, and a replayed step may know where it lies (cuda_graph.py).
            rows = [row.astype(mx.float32) * 1 for row in rows]
            mx.eval(rows)
        for row in rows:
            digest.update(np.array(row).tobytes())
        return digest.hexdigest()

    @property
    def kv_dtype(self) -> mx.Dtype:
        """Dtype of keys and values in full precision on this device."""
        return kv_dtype()

    def forward(
        self, ids: mx.array, state: KVState, *, all_logits: bool = False, soft: SoftRows | None = None
    ) -> mx.array:
        """Read tokens into the state.

        Args:
            ids: int [T], T at least 1, the tokens that follow those in `state`.
            state: what came before; takes the new keys and values. Scheduled on return, unless the caller
                holds `execution()` and does so itself.
            all_logits: give logits for each token, not for the last alone.
            soft: what stands in place of embeddings where ids are below zero; `self.soft` has it.

        Returns:
            fp32 logits for the next token, [vocab], or [T, vocab] with `all_logits`.
        """
        with execution() as outermost:
            state.check_room(ids.size)
            if ids.size == 1 and self.replays and soft is None and self.part is None:
                logits = self.step(int(ids), state).logits()[None]
            else:
                logits = self._whole(self._read(ids, state, ids.size if all_logits else 1, soft))
            logits = logits if all_logits else logits[-1]
            if outermost or self.part:
                mx.async_eval(logits, [] if state.borrower else state.arrays)
        return logits

    @property
    def replays(self) -> bool:
        """True if a step costs the host next to nothing and may start with the `Step` before it, still under way.

        Then `logits` waits for the device, and is not to be asked of a step whose token another has started with.
        """
        return self.replayer is not None and self.replayer.replays and not (self.kernels and self.kernels.eager)

    def step(self, token: NextToken, state: KVState, draw: Draw = LIKELIEST, replay: bool = True) -> Step:
        """Start `forward` of one token, whose logits, or the token that `draw` takes from them, are asked for later."""
        with execution():
            state.check_room(1)
            return self._start(token, state, draw, replay)

    def batch_step(self, tokens: mx.array | Sequence[int], states: Sequence[KVState]) -> mx.array:
        """Read one token into each of several states of this model, all in one step.

        Args:
            tokens: int [B], perhaps still being computed.
            states: B different ones, B from 1 to MAX_BATCH, of any kind of KV; others than in the step before at will.

        Returns:
            fp32 logits [B, vocab] for the next token of each, lazy; scheduled on return as `forward`'s are.

        Raises:
            InputError: no step takes these, or a state has no room.
        """
        with execution() as outermost:
            logits = self.batch(tokens, states).logits()
            if outermost:
                mx.async_eval(logits, [a for state in states if not state.borrower for a in state.arrays])
        return logits

    def batch(
        self, tokens: Tokens, states: Sequence[KVState], draws: Sequence[Draw] | None = None, replay: bool = True
    ) -> BatchStep:
        """Start `batch_step`, whose logits, or the tokens that `draws` take from them, are asked for later.

        A batch may start each step with the one before, whose tokens the host need not know yet; then the logits of
        that one are not to be asked for any more.

        Args:
            draws: B of them; None: the likeliest tokens.
            replay: False: launch by launch, also where steps are replayed.
        """
        with execution():
            check_batch(tokens, states)
            draws = draws or [LIKELIEST] * len(states)
            if self.batcher:
                step = self.batcher.start(tokens, states, draws, replay)
            elif numpy := self._numpy(states):
                step = LazyBatchStep(numpy.run(known_tokens(tokens), states)[0], draws)
            else:
                logits = stock_step(self.loaded, tokens_as_array(tokens), states)
                step = LazyBatchStep(logits, draws, None, self.part)
            if self.part and isinstance(step, LazyBatchStep):
                step.schedule()
            return step

    def _whole(self, logits: mx.array) -> mx.array:
        """Return logits of the whole vocabulary."""
        return logits if self.part is None else self.part.gathered(logits)

    def _start(self, token: NextToken, state: KVState, draw: Draw = LIKELIEST, replay: bool = True) -> Step:
        replays = replay and draw.in_kernel
        if self.batcher and replays and self.batcher.holds(state) and self.batcher.replays(1, state):
            return self.batcher.start_one(token, state, draw)
        replayer = self.replayer if replays and self.replays else None
        replayed = replayer.start(token, state, draw) if replayer and replayer.takes(state) else None
        return replayed or LazyStep(self._read(ids_of(token), state, 1)[0], draw, self.kernels, self.part)

    def most_checked(self, state: KVState) -> int:
        """Return how many tokens are checked next: up to MAX_CHECKED, and by `check` none beyond the state's tail."""
        if self.checks_replayed(state):
            return MAX_CHECKED
        return min(MAX_CHECKED, state.layout.tail - state.length % state.layout.tail)

    def check(self, ids: Sequence[int], state: KVState) -> tuple[mx.array, mx.array]:
        """Read a token and drafts of those after it, all in one step; `state.rewind` takes back what is refused.

        On a GPU rows share the weights that are read, and last bits differ (docs/drafting.md). On a CPU they are steps
        of one token each, and equal to the bit.

        Args:
            ids: of T tokens, up to `most_checked`.

        Returns:
            Logits, fp32 [T, vocab], of the token after each; and hidden rows after the last norm, which the head
            reads, fp32 [T, hidden]. Scheduled on return as `forward`'s are.
        """
        with execution() as outermost:
            state.check_room(len(ids))
            if not 1 <= len(ids) <= self.most_checked(state):
                raise ValueError(f"{len(ids)} tokens to check, and at most {self.most_checked(state)} are possible")
            if self._step and can_step(self.config, 1):
                logits, hidden = self._step(mx.array([*ids], mx.int32), state)
            else:
                rows = [self._one(token, state) for token in ids]
                logits, hidden = (mx.concatenate([*column]) for column in zip(*rows, strict=True))
            logits, hidden = self._whole(logits), hidden.astype(mx.float32)
            if outermost or self.part:
                mx.async_eval(logits, hidden, state.arrays)
        return logits, hidden

    def checks_replayed(self, state: KVState, rows: int = MAX_CHECKED) -> bool:
        """Return True if steps that check drafts of this state are replayed, and so are its others from then on."""
        return self.batcher is not None and self.replays and self.batcher.replays(rows, state)

    def replayed_check(
        self,
        ids: Sequence[Sequence[int]],
        states: Sequence[KVState],
        draws: Sequence[Draw] = (),
        queued: QueuedTokens | None = None,
    ) -> ReplayedBatch | None:
        """Start a replayed step that does what `check` does for each of several states; None: `check` is the way.

        From then on these states step in the pool until anybody looks at their layers, and `rewind` costs nothing.

        Args:
            ids: of each of the states, MAX_CHECKED at most each, and MAX_BATCH in all.
            draws: of the tokens after each of these, all `in_kernel`; (): the likeliest.
            queued: drafts that follow the one token of one state, and that the host need not know yet.
        """
        if self.batcher is None or not self.replays:
            return None
        with execution():
            for state, some in zip(states, ids, strict=True):
                state.check_room(len(some) + (queued.count if queued else 0))
            return self.batcher.check(ids, states, draws, queued)

    def seat(self, state: KVState) -> None:
        """Have a state join the pool, where steps of several states and those of `replayed_check` are made.

        Nothing happens without a GPU, for a state that the pool doesn't take, and if there is too little memory.
        """
        if self.batcher is not None and self.batcher.pool.takes(state):
            with execution(), suppress(RuntimeError, ValueError):
                self.batcher.pool.seat(state)

    @property
    def recordings(self) -> int:
        """Steps over the pool recorded so far: what includes one takes far longer than it will."""
        return self.batcher.replayer.recordings if self.batcher else 0

    def _one(self, token: int, state: KVState) -> tuple[mx.array, mx.array]:
        """Return logits after a token, [1, vocab] (of a part, those of its rows), and the head's input, [1, hidden]."""
        if numpy := self._numpy([state]):
            return numpy.run([token], [state])
        x = run_layers(self.loaded, mx.array([token]), [state], 1)
        if self.part:
            mx.async_eval(x, state.arrays)
        hidden = stock.rms_norm(x, self.weights.output_norm, self.config.eps)
        return logits_of(self.loaded, hidden), hidden

    def hidden(self, ids: mx.array, state: KVState) -> mx.array:
        """Read tokens, int [T], into the state; return their hidden rows before the last norm, [T, hidden]."""
        with execution() as outermost:
            state.check_room(ids.size)
            x = run_layers(self.loaded, ids, [state], ids.size)
            if outermost or self.part:
                mx.async_eval(x, state.arrays)
        return x

    def logits(self, hidden: mx.array) -> mx.array:
        """Return logits, fp32 [T, vocab], of hidden rows [T, hidden]."""
        with execution() as outermost:
            logits = self._whole(head(self.loaded, hidden))
            if outermost or self.part:
                mx.async_eval(logits)
        return logits

    def failed(self, error: Exception) -> None:
        """Hear of an error in an evaluation of what this model made."""

    def prefill(self, ids: mx.array, state: KVState, *, soft: SoftRows | None = None) -> None:
        """Read tokens, int [T], into the state without their logits: only keys and values are made."""
        with execution() as outermost:
            state.check_room(ids.size)
            logits = None
            if soft is None and ids.size == 1 and (numpy := self._numpy([state])):
                numpy.read([int(ids)], [state], wanted=False)
            elif soft is not None or (logits := self._stepped(ids, state)) is None:
                run_layers(self.loaded, ids, [state], 0, soft)
            if outermost or self.part:  # a step's logits are not computed, but where its residual has to go on
                mx.async_eval([] if logits is None or not self.part else logits, state.arrays)

    def _read(self, ids: mx.array, state: KVState, wanted: int, soft: SoftRows | None = None) -> mx.array:
        """Return logits of the last `wanted` tokens, or of all: from a step, or all layers as in a prompt."""
        logits = self._stepped(ids, state) if soft is None else None  # steps look up ids
        if logits is None:
            logits = head(self.loaded, run_layers(self.loaded, ids, [state], wanted, soft))
        if self.part:  # collectives run in the order of calls, whatever is asked for later
            mx.async_eval(logits, state.arrays)
        return logits

    def _stepped(self, ids: mx.array, state: KVState) -> mx.array | None:
        """Return logits of all tokens, read in one step; None: no step takes them."""
        if self._step and can_step(self.config, ids.size) and state.fits_tail(ids.size):
            return self._step(ids, state)[0]
        if ids.size == 1 and (numpy := self._numpy([state])):
            return numpy.run([int(ids)], [state])[0]
        return None

    def _numpy(self, states: Sequence[KVState]) -> NumpyStep | None:
        """Return what steps these states in numpy; None: another way does."""
        return self._numpy_step if self._numpy_step and numpy_steps(states) else None


def estimate_key_means(model: Model) -> dict[int, mx.array]:
    """Return the mean key of each global layer with keys of its own, fp32 [G, D], by KV head.

    They are estimated by reading a tail of random tokens: what keys have in common is the layer's, not the text's.
    """
    start = time.perf_counter()
    # One by one: a kernel that fails when it is evaluated is found here, as it is within replies.
    with execution(), model.kernels.one_by_one() if model.kernels else nullcontext():
        state = model.new_state()
        ids = np.random.PCG64(0).random_raw(state.layout.tail) % model.config.vocab
        model.prefill(mx.array(ids.astype(np.int32)), state)
        tails = {i: kv.tail_keys[0] for i, kv in state.layers.items() if not model.config.layers[i].sliding}
        means = {i: keys.astype(mx.float32).mean(axis=1) for i, keys in tails.items()}  # of keys [G, tail, D]
        mx.eval(list(means.values()))
    log.debug("Key means of %d layers estimated in %.2f s", len(means), time.perf_counter() - start)
    return means
