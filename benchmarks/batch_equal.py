"""Counts the tokens of greedy replies in batches that equal those of the same replies alone.

    python benchmarks/batch_equal.py [FILE.gguf] [--prompts 200] [--tokens 64] [--parallel 8]

Without a file: the built-in model. Prompts are the beginnings of tales, of different lengths. Out: how many tokens are
equal up to each reply's first difference, and how near a tie that was: the gap of both tokens' log-probabilities,
alone. The exit code is 1 if fewer than 99.5% are equal, or a gap is over 0.01.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mlx_gemma4

WHO = (
    "a king",
    "two geese",
    "an old woman",
    "a miller's son",
    "the north wind",
    "a fox",
    "a girl",
    "a bear",
    "three brothers",
    "a cat",
)
WHERE = ("in a castle", "by the sea", "behind the mill", "far away", "in the snow")
BEGINS = (
    "Once upon a time {} lived {}.",
    "Tell me of {} {}.",
    "{} {} were poor.",
    "Why did {} sit {} all day, and what came of it?",
)
LEAST, NEAR = 0.995, 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--parallel", type=int, default=8)
    options = parser.parse_args()
    lm = mlx_gemma4.load(options.file)
    every = [b.format(who, where) for b in BEGINS for who in WHO for where in WHERE][: options.prompts]
    wanted = {"max_tokens": options.tokens, "temperature": 0.0}
    together = dict(mlx_gemma4.batch(lm, every, parallel=options.parallel, **wanted))
    equal = in_all = 0
    gaps = []
    for i, prompt in enumerate(every):
        alone = mlx_gemma4.chat(lm, prompt, logprobs=8, **wanted).tokens
        ids, others = [t.id for t in alone], [t.id for t in together[i].tokens]
        same = next(
            (n for n, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others))
        )
        equal, in_all = equal + same, in_all + len(ids)
        if same < len(ids):
            at = alone[same]
            gaps.append((at.logprob or 0.0) - dict(at.top).get(others[same], -1e9))
    share, worst = equal / in_all, max(gaps, default=0.0)
    print(f"{len(every)} replies, {options.parallel} at once: {equal} of {in_all} tokens equal ({share:.2%}); ", end="")
    print(f"{len(gaps)} replies differ, the largest gap there is {worst:.1e}")
    return int(share < LEAST or worst > NEAR)


if __name__ == "__main__":
    sys.exit(main())
