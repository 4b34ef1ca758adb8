"""`mlx-gemma4 doctor`: prove the kernels on this machine."""

from __future__ import annotations

import sys

import click

from .options import json_option, output_options


@click.command()
@json_option
@output_options
def doctor(as_json: bool) -> None:
    """Check this machine's kernels, and switch off those that fail.

    Each runs beside stock operations at the sizes of real models. The exit code is 1 if one failed.
    """
    from ..doctor.table import examine

    sys.exit(0 if examine(click.echo, as_json) else 1)
