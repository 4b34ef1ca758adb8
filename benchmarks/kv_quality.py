"""What compressed keys and values cost: divergence of the next token's distribution from full precision.

    python benchmarks/kv_quality.py [--model FILE] [--contexts 256,1024,4096,8192]

In: a model, by default the built-in one; its text is this repository's documents, or what the built-in model wrote
itself. Out: a table: for each context, over the tokens that follow it, the mean and the largest KL divergence in nats,
and how often the likeliest token is the same. The context is read in chunks of 512, which see earlier chunks
quantized; then 256 tokens are read in one pass, which sees all of the context quantized but for its last, open block.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_gemma4 import load
from mlx_gemma4.conversation.language_model import LanguageModel
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.generation.sampling import Sampling
from mlx_gemma4.model.model import Model

CHUNK = 512  # tokens read at once
FOLLOWING = 256  # tokens whose distributions are compared
ROOT = Path(__file__).parent.parent


def text_of(lm: LanguageModel, length: int, own: bool) -> list[int]:
    """`length` tokens that make sense to the model."""
    ids: list[int] = []
    if own:  # stories, one after another
        for seed in range(100):
            if len(ids) >= length:
                break
            sampling = Sampling(temperature=1.0, seed=seed)
            start = lm.encode_prompt("Tell me a story.")
            ids += [*start, *(t.id for t in generate_tokens(lm.model, lm.model.new_state(), start, sampling, 300))]
    else:
        files = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
        ids = lm.encode_prompt("\n".join(file.read_text() for file in files), raw=True)
    if len(ids) < length:
        raise SystemExit(f"the text has only {len(ids)} tokens, {length} are needed")
    return ids[:length]


def distributions(model: Model, ids: list[int], context: int, kv: str) -> np.ndarray:
    """Logarithms of the probabilities after each token that follows the context: fp64 [FOLLOWING, vocab]."""
    state = model.new_state(kv=kv)
    for start in range(0, context, CHUNK):
        model.prefill(mx.array(ids[start : min(context, start + CHUNK)]), state)
    logits = model.forward(mx.array(ids[context : context + FOLLOWING]), state, all_logits=True)
    x = np.array(logits).astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a .gguf file or a folder; default: the built-in one")
    parser.add_argument("--contexts", default="256,1024,4096,8192", help="tokens, separated by commas")
    options = parser.parse_args()
    lm = load(options.model)
    contexts = [int(n) for n in options.contexts.split(",") if int(n) + FOLLOWING <= lm.model.config.context]
    ids = text_of(lm, max(contexts) + FOLLOWING, own=options.model is None)
    print("| model | context | kv | mean KL | largest | same first |\n|---|---|---|---|---|---|")
    for context in contexts:
        full = distributions(lm.model, ids, context, "full")
        for kv in ("q8", "tq4"):
            other = distributions(lm.model, ids, context, kv)
            kl = (np.exp(full) * (full - other)).sum(axis=-1)
            same = (full.argmax(-1) == other.argmax(-1)).mean()
            name = lm.path.name if options.model else "built-in"
            print(f"| {name} | {context} | {kv} | {kl.mean():.1e} | {kl.max():.1e} | {same:.0%} |", flush=True)


if __name__ == "__main__":
    main()
