"""`mlx-gemma4 perplexity`: how well a model predicts a text."""

import json
from dataclasses import asdict

import click

from .options import (
    Lenient,
    complete_file,
    json_option,
    load_with_progress,
    model_option,
    output_options,
    progress,
    read_text,
    say,
    threads_option,
)


@click.command(cls=Lenient)
@click.argument("file", metavar="FILE", shell_complete=complete_file)
@model_option
@threads_option
@click.option("-c", "--context", type=click.IntRange(4), default=512, help="Tokens of a window.")
@json_option
@output_options
def perplexity(file: str, model: str | None, context: int, as_json: bool) -> None:
    """Measure how well a model predicts a text.

    Prints exp of the mean negative log-probability of its tokens, as llama.cpp's llama-perplexity: the text is cut into
    windows of --context tokens that begin with BOS, and the second half of each is predicted.
    """
    from ..measure.perplexity import perplexity as measure

    text = read_text(file)
    lm, _ = load_with_progress(model, "full", context, draft_max=0)
    with progress("Window", 1, "") as update:
        found = measure(lm, text, context, update)
    if as_json:
        say(json.dumps(asdict(found)))
    else:
        say(
            f"perplexity {found.perplexity:.4f} +/- {found.error:.4f} "
            f"({found.windows:,} windows of {found.context:,} tokens, {found.predicted:,} of them predicted)"
        )
