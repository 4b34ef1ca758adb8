"""`mlx-gemma4 pull`: download a model from Hugging Face."""

from __future__ import annotations

import sys

import click

from ..errors import InputError
from .options import EXIT_INTERRUPTED, echo, output_options, progress


@click.command()
@click.argument("model", metavar="REPO[:QUANT]")
@output_options
def pull(model: str) -> None:
    """Download a model from Hugging Face, or its newest version, and print its path.

    QUANT is a quantization like Q8_0 or a file's name; without it, Q4_K_M is taken where there is one. A download that
    broke off goes on where it stopped. `--model` takes the same names.
    """
    from ..files import hub

    try:
        with progress("Downloading", 1e9, " GB") as update:
            path = hub.resolve(model, update=True, progress=update)
    except KeyboardInterrupt:
        echo("Interrupted; the next pull goes on from here")
        sys.exit(EXIT_INTERRUPTED)
    if not path.exists():
        raise InputError(f"{model}: no name of a repository; pull OWNER/NAME or OWNER/NAME:QUANT")
    click.echo(path)
