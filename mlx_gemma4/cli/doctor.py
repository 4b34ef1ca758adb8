"""`mlx-gemma4 doctor`: checks that this machine runs the kernels right."""

from __future__ import annotations

import sys

import click

from .options import output_options, set_up_logging


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@output_options
def doctor(as_json: bool, verbose: bool, debug: bool) -> None:
    """Check this machine's kernels, and switch off those that fail.

    Each runs beside stock operations at the sizes of real models. The exit code is 1 if one failed.
    """
    from ..doctor.table import examine

    set_up_logging(verbose or debug)
    sys.exit(0 if examine(click.echo, as_json) else 1)
