"""The command line: flags in, text out on stdout, everything else on stderr. Longer commands have a module here.

Heavy modules are imported when a command runs, so that `--help` answers at once.
"""

import errno
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

from .. import __version__
from ..errors import InputError, one_line, reason
from ..paths import check_target
from .bench import bench
from .chat import chat
from .generate import generate
from .hosts import follow, hosts, probe
from .models import list_models, pull, rm
from .options import (
    EXIT_INTERRUPTED,
    Lenient,
    complete_file,
    echo,
    find_model,
    json_option,
    model_option,
    one_of,
    output_options,
    say,
)
from .perplexity import perplexity
from .serve import serve
from .tune import tune


@click.command(cls=Lenient)
@click.argument("file", metavar="[MODEL]", required=False, shell_complete=complete_file)
@model_option
@click.option(
    "-c", "--context", type=click.IntRange(1), help="Tokens to plan memory for.  [default: 8192, or all it takes]"
)
@json_option
@output_options
def inspect(file: str | None, model: str | None, context: int | None, as_json: bool) -> None:
    """Show a model's shape, its tensors, and the memory it takes.

    Reads the header only. MODEL is what --model takes, which may be left out.
    """
    from ..doctor.verdict import device_name
    from ..measure.inspection import inspect, lines

    report = inspect(find_model(one_of(file, model)), context)
    if as_json:
        say(json.dumps(asdict(report)))
    else:
        for line in lines(report, device_name()):
            say(line)


@click.command(cls=Lenient)
@json_option
@click.option("--report", metavar="FILE", help="Write it there with the machine and the demo's speed, for an issue.")
@output_options
def doctor(as_json: bool, report: str | None) -> None:
    """Check this machine's kernels, and switch off those that fail.

    Each runs beside stock operations at the sizes of real models. The exit code is 1 if one failed.
    """
    from ..doctor.table import examine
    from ..measure.report import examine_and_report

    if report:
        check_target(Path(report))
    passed = examine_and_report(Path(report), say, as_json) if report else examine(say, as_json)
    if report:
        echo(f"{report} tells about this machine and its kernels, nothing about you: please attach it to an issue.")
    sys.exit(0 if passed else 1)


@click.command(cls=Lenient)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that completes commands and flags.

    \b
    bash: echo 'eval "$(mlx-gemma4 completion bash)"' >> ~/.bashrc
    zsh:  echo 'eval "$(mlx-gemma4 completion zsh)"' >> ~/.zshrc
    fish: mlx-gemma4 completion fish > ~/.config/fish/completions/mlx-gemma4.fish
    """
    made = get_completion_class(shell)
    assert made is not None
    say(made(ctx.find_root().command, {}, "mlx-gemma4", "_MLX_GEMMA4_COMPLETE").source())


class _Commands(click.Group):
    """Prints an InputError as one line, and an unexpected error as one line with a hint."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def main(self, *args: Any, **given: Any) -> Any:
        try:
            return super().main(*args, **given)
        except OSError as error:  # --help into a full disk
            sys.exit(f"mlx-gemma4: standard output can't be written: {reason(error)}")

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
        except KeyboardInterrupt:
            echo("Interrupted")
            ctx.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:  # the reader of our output closed it, as `| head` does
            sys.stderr.close()
            ctx.exit(0)
        except Exception as error:
            if debug:
                raise
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                echo(f"mlx-gemma4: {reason(error)}: make room, or write to another disk")
                ctx.exit(3)
            what = one_line(str(error)) or "no details"
            echo(f"mlx-gemma4: unexpected {type(error).__name__}: {what} (run again with --debug for the traceback)")
            ctx.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="mlx-gemma4")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Gemma 4 on Apple Silicon, straight from GGUF files."""
    if os.environ.get("MLX_RANK", "0") != "0" and ctx.invoked_subcommand in ("generate", "chat", "serve"):
        from ..conversation import language_model
        from ..distributed.place import placed

        if place := placed():  # rank 0 alone takes the command; this one does what it says
            language_model.follow(place)


for command in (
    generate,
    chat,
    serve,
    pull,
    list_models,
    rm,
    inspect,
    bench,
    perplexity,
    tune,
    doctor,
    hosts,
    completion,
    follow,
    probe,
):  # in the order of --help
    main.add_command(command)
