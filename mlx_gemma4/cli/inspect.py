"""`mlx-gemma4 inspect`: a model file's shape, and the memory and speed to expect here."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from .options import complete_file, find_model, json_option, output_options


@click.command()
@click.argument("model", metavar="FILE", shell_complete=complete_file)
@click.option("--context", type=click.IntRange(1), help="Tokens to plan memory for.  [default: 8192, or all it takes]")
@json_option
@output_options
def inspect(model: str, context: int | None, as_json: bool) -> None:
    """Show a model's shape, its tensors by type, and the memory to expect.

    Reads the header only. FILE is a GGUF file, a folder of safetensors, or REPO[:QUANT] on Hugging Face.
    """
    from ..doctor.verdict import device_name
    from ..measure.inspection import inspect, lines

    report = inspect(find_model(model), context)
    if as_json:
        click.echo(json.dumps(asdict(report)))
    else:
        for line in lines(report, device_name()):
            click.echo(line)
