"""Measure an assistant of the built-in model: how many of its drafts the model accepts in replies that tell tales.

    python training/accepted.py mtp-gemma4-demo.gguf [--replies 12]

In: the assistant, and requests made by rule with a seed that training does not use. Out: a line for each way to choose
tokens and each number of drafts: tokens a second, the share accepted, tokens a step; first without drafts, last with
their number by measurement. Repetition drafts nothing here.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from dialogue import STORY_REQUESTS, TALE_REQUESTS
from tales import tale

from mlx_gemma4 import ReplyOptions, Sampling, chat, load
from mlx_gemma4.generation.drafting import Drafts
from mlx_gemma4.loading.assistant import load_assistant
from mlx_gemma4.model.decode import Inputs


def requests(count: int) -> list[str]:
    rng, made = random.Random(20261129), []
    for _ in range(count):
        text, noun = tale(rng)
        first = " ".join(text.split(" ")[: rng.randint(2, 9)])
        made.append(rng.choice([first, rng.choice(TALE_REQUESTS), rng.choice(STORY_REQUESTS).format(n=noun)]))
    return made


def one_less(inputs: Inputs) -> Inputs:
    """Return what drafts read with their queries one position lower: the other reading (docs/drafting.md)."""
    inputs["position"] = mx.maximum(inputs["position"] - 1, 0)
    return inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("assistant", type=Path)
    parser.add_argument("--replies", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=160, help="of a reply")
    parser.add_argument("--lower", action="store_true", help="queries one position lower")
    args = parser.parse_args()
    lm = load(draft=None)
    assistant = load_assistant(args.assistant, lm.model)
    if args.lower:
        read = assistant.inputs
        assistant.inputs = lambda state: one_less(read(state))  # type: ignore[method-assign]
    ways = {
        "greedy": Sampling(temperature=0),
        "temperature 0.7": Sampling(temperature=0.7, top_k=40, top_p=0.95),
        "defaults": lm.sampling,
    }
    for name, sampling in ways.items():
        plain = 0.0
        for depth in (0, 1, 3, 7, None):
            drafts = Drafts(7, assistant, depth=depth, least_alike=1 << 30)
            drafted = accepted = tokens = rated = 0
            seconds = 0.0
            for seed, request in enumerate(requests(args.replies)):
                options = ReplyOptions(args.tokens, replace(sampling, seed=seed))
                said = [{"role": "user", "content": request}]
                s = chat(replace(lm, drafts=drafts if depth != 0 else None), said, options).statistics
                drafted, accepted = drafted + s.drafted_tokens, accepted + s.accepted_tokens
                tokens += s.reply_tokens
                if seed:  # the first one records steps on a GPU
                    rated, seconds = rated + s.reply_tokens - 1, seconds + s.reply_time
            rate, steps = rated / seconds, tokens - accepted
            plain = plain or rate
            print(
                f"{name}, {'measured' if depth is None else depth} drafts: {rate:.1f} tokens/s ({rate / plain:.2f}), "
                f"{accepted / max(1, drafted):.3f} accepted, {tokens / steps:.2f} tokens a step"
            )


if __name__ == "__main__":
    main()
