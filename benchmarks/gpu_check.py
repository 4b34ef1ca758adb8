"""Compares whole models on this machine's GPU, run by kernels, with the same models run by stock operations.

    python benchmarks/gpu_check.py [--model GEMMA3.gguf ...] [--json OUT.json]

In: the built-in model, the tests' fixtures of all six kinds, and any file named. Out: a table of KL divergences (of
logits, over a prompt and a decode with given tokens) and of greedy tokens that agree, the exit code 1 if a KL is over
1e-4, a kernel fails, or the first 200 tokens of the built-in model (or a file named) differ. Where two experts' scores
are all but equal, rounding alone decides, and another expert changes all that follows: so kernels take the experts that
stock operations chose for a prompt, and where they would have chosen others, it must have been a near thing ("flips",
and the largest "gap"). On NVIDIA a kernel takes 2 s to compile the first time, so a first run takes minutes; MLX keeps
what it compiled.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections import deque
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np

from mlx_gemma4.conversation.language_model import demo_path, load
from mlx_gemma4.doctor.published import PUBLISHED
from mlx_gemma4.doctor.verdict import MLX, kernels_of
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.generation.sampling import Sampling
from mlx_gemma4.gpu.render import default_launcher
from mlx_gemma4.kv.state import KVState
from mlx_gemma4.memory import device_info
from mlx_gemma4.model import forward
from mlx_gemma4.model.model import Model

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
LIMIT = 1e-4
NEAR = 0.01  # a gap between scores of experts that rounding may decide, in standard deviations of all scores
KINDS = (*(name.lower() for name in PUBLISHED), "gemma3")
TAGS = ("q4_k_m", "q4_0", "q6_k", "q8_0", "ud")
EXTRA = ("31b-rare", "26b-a4b-split-mix", "12b-untied-q4_k_m")
STEPS = 12
PROMPT = "Tell me a story about a fox and a bear who share a boat."


def kl(reference: mx.array, other: mx.array) -> float:
    """Mean over rows of KL(reference || other), in nats and double precision."""

    def log_softmax(x: mx.array) -> np.ndarray:
        a: np.ndarray = np.array(x).astype(np.float64)
        a -= a.max(-1, keepdims=True)
        a -= np.log(np.exp(a).sum(-1, keepdims=True))
        return a

    p, q = log_softmax(reference), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


class Routes:
    """The experts that one model chooses, for another model to take after it."""

    def __init__(self) -> None:
        self.chosen: deque[mx.array] = deque()  # not taken yet
        self.gaps: list[float] = []  # by how much each other choice was preferred: see NEAR

    def recorded(self) -> AbstractContextManager[object]:
        """Within this, the choices of the model that runs are written down."""
        choose = forward.choose_experts

        def keep(scores: mx.array, used: int) -> mx.array:
            self.chosen.append(choose(scores, used))
            return self.chosen[-1]

        return patch.object(forward, "choose_experts", keep)

    def taken(self) -> AbstractContextManager[object]:
        """Within this, the model that runs takes them, in the same order."""
        choose = forward.choose_experts

        def take(scores: mx.array, used: int) -> mx.array:
            all_scores, wanted = np.array(scores), self.chosen.popleft()
            for row, own, other in zip(all_scores, np.array(choose(scores, used)), np.array(wanted), strict=True):
                if set(own) != set(other):
                    gap = row[np.setdiff1d(own, other)].max() - row[np.setdiff1d(other, own)].min()
                    self.gaps.append(float(gap / all_scores.std()))
            return wanted

        return patch.object(forward, "choose_experts", take)


def logits(plain: Model, kernels: Model, ids: list[int], states: list[KVState], routes: Routes) -> list[mx.array]:
    """Logits of a prompt's tokens by both models, each with its state; the second takes the first's experts."""
    found = []
    under = (routes.recorded(), routes.taken())
    for model, state, experts in zip((plain, kernels), states, under, strict=True):
        with experts:
            found.append(model.forward(mx.array(ids), state, all_logits=True))
            mx.eval(found)
    return found


def greedy(model: Model, ids: list[int], tokens: int) -> list[int]:
    return [token.id for token in generate_tokens(model, model.new_state(), ids, Sampling(temperature=0), tokens)]


def check(path: Path, tokens: int, must_agree: bool) -> dict[str, Any]:
    """Return one line of the table."""
    start = time.perf_counter()
    lm = load(path, weights="packed")
    launcher = default_launcher()
    assert launcher is not None
    fast = kernels_of(launcher)
    plain, kernels = (Model(lm.config, lm.model.weights, run) for run in (None, fast))
    rng = np.random.default_rng(0)
    words = [int(i) for i in rng.integers(4, lm.config.vocab, 300)]
    ids = words if tokens < 100 else lm.encode_prompt(PROMPT)
    want = greedy(plain, ids[:40] if tokens < 100 else ids, tokens)
    got = greedy(kernels, ids[:40] if tokens < 100 else ids, tokens)
    agree = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), min(len(want), len(got)))
    text = words[:288] if tokens < 100 else ids + want[:-STEPS]
    routes, states = Routes(), [m.new_state() for m in (plain, kernels)]
    row: dict[str, Any] = {"file": path.stem, "agree": agree, "of": tokens}
    row["prompt"] = kl(*logits(plain, kernels, text, states, routes))
    steps = [
        mx.stack([m.forward(mx.array([i]), state) for i in words[-STEPS:]])
        for m, state in zip((plain, kernels), states, strict=True)
    ]
    row["decode"] = kl(*steps)
    row["few"] = kl(*logits(plain, kernels, words[:9], [m.new_state() for m in (plain, kernels)], routes))
    row |= {"flips": len(routes.gaps), "gap": max(routes.gaps, default=0.0)} if lm.config.experts else {}
    row |= {"replayed": kernels.replays, "off": sorted(map(str, fast.off)), "seconds": time.perf_counter() - start}
    small = all(row[name] <= LIMIT for name in ("prompt", "decode", "few"))
    small &= row.get("gap", 0) <= NEAR
    row["ok"] = bool(small and not row["off"] and (agree == tokens or not must_agree))
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, nargs="*", default=[], help="more files")
    parser.add_argument("--quick", action="store_true", help="one file of each kind")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if default_launcher() is None:
        print("no GPU here: nothing to check", file=sys.stderr)
        return 2
    names = [f"{kind}-{tag}" for tag in TAGS[: 1 if options.quick else None] for kind in KINDS]
    names += EXTRA[: 2 if options.quick else None]
    files = [(demo_path(), 200), *((p, 200) for p in options.model)]
    files += [(FIXTURES / f"{name}.gguf", 24) for name in names]
    rows: list[dict[str, Any]] = []
    for path, tokens in files:
        try:
            rows.append(check(path, tokens, tokens == 200))
        except Exception as error:  # the next file is worth a try
            traceback.print_exc()
            rows.append({"file": path.stem, "ok": False, "error": f"{type(error).__name__}: {error}"})
        print(
            "  ".join(f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()), flush=True
        )
        if options.json:
            options.json.write_text(json.dumps({"mlx": MLX, "device": str(device_info()), "rows": rows}))
    failed = [row["file"] for row in rows if not row["ok"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} files agree" + (f"; not {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
