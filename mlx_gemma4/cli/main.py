"""The command line: flags in, text out on stdout, everything else on stderr. Each command has a module here.

Heavy modules are imported when a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from .. import __version__
from ..errors import InputError
from .bench import bench
from .chat import chat
from .completion import completion
from .doctor import doctor
from .generate import generate
from .inspect import inspect
from .options import echo
from .pull import pull
from .serve import serve


class _Commands(click.Group):
    """Prints an InputError as one line, and an unexpected error as one line with a hint."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        debug = "--debug" in sys.argv
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except InputError as error:
            if debug:
                raise
            echo(f"mlx-gemma4: {error}")
            ctx.exit(error.exit_code)
        except BrokenPipeError:  # the reader of our output closed it, as `| head` does
            sys.stderr.close()
            ctx.exit(0)
        except Exception as error:
            if debug:
                raise
            what = " ".join(str(error).split()) or "no details"
            echo(f"mlx-gemma4: unexpected {type(error).__name__}: {what} (run again with --debug for the traceback)")
            ctx.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="mlx-gemma4")
def main() -> None:
    """Gemma 4 on Apple Silicon, straight from GGUF files."""


for command in (generate, chat, serve, pull, inspect, bench, doctor, completion):  # in the order of --help
    main.add_command(command)
