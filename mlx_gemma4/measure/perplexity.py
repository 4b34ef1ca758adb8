"""The perplexity of a text, as llama.cpp's llama-perplexity defines it.

In: a `LanguageModel` and a text. Out: a `Perplexity`. The text's tokens, BOS before them, are cut into windows of
`context` tokens; what is left over is dropped. The first token of each window is replaced by BOS, the window is read by
itself, and the tokens of its second half are predicted, each from all before it in the window (numbers context/2 + 1 to
context - 1, from 0). Perplexity is exp of the mean negative log-probability of all that were predicted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..conversation.language_model import LanguageModel
from ..errors import InputError
from ..generation.scoring import score

CONTEXT = 512  # llama-perplexity's default


@dataclass(frozen=True)
class Perplexity:
    """The result. `error` is llama-perplexity's: the standard error of the mean, times the perplexity."""

    perplexity: float
    error: float
    context: int  # tokens of a window
    windows: int
    predicted: int  # tokens


def perplexity(
    lm: LanguageModel, text: str, context: int = CONTEXT, progress: Callable[[int, int], None] | None = None
) -> Perplexity:
    """Measure it. `progress` is called with (windows done, windows in all).

    Raises:
        InputError: the text is shorter than a window, or the window longer than the model's context.
    """
    if not 4 <= context <= lm.config.context:
        raise InputError(f"--context {context}: must be from 4 to the model's own, {lm.config.context}")
    ids = lm.tokenizer.encode(text)
    windows = len(ids) // context
    if not windows:
        raise InputError(
            f"the text has {len(ids)} tokens, and a window takes {context}; give more, or a smaller --context"
        )
    losses: list[float] = []
    for i in range(windows):
        window = [lm.tokenizer.bos_id, *ids[i * context + 1 : (i + 1) * context]]
        for token in score(lm.model, window, lm.model.new_state(context), start=context // 2 + 1):
            losses.append(-(token.logprob or 0.0))
        if progress:
            progress(i + 1, windows)
    mean = math.fsum(losses) / len(losses)
    spread = math.fsum(loss * loss for loss in losses) / len(losses) - mean * mean
    value = math.exp(mean)
    error = value * math.sqrt(max(spread, 0.0) / max(len(losses) - 1, 1))
    return Perplexity(value, error, context, windows, len(losses))
