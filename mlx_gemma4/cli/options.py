"""What several commands share: flags that mean the same everywhere, loading with progress, lines for people."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..conversation.language_model import LanguageModel
    from ..generation.loop import Sampling


Command = TypeVar("Command", bound=Callable[..., Any])

EXIT_INTERRUPTED = 130  # as shells report Ctrl-C


def _together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def complete_file(_ctx: click.Context, _option: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Lets the shell complete a path where more than paths may stand."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


# Each may decorate a command, which then takes arguments of these names.
model_option = click.option(
    "-m",
    "--model",
    metavar="MODEL",
    shell_complete=complete_file,
    help="A .gguf file, a folder of safetensors, or REPO[:QUANT] on Hugging Face. Without it: a small demo.",
)
sampling_options = _together(
    click.option("--temperature", type=float, help="0 always takes the likeliest token.  [default: the file's]"),
    click.option("--top-k", type=int, help="Choose among the k likeliest; 0: all.  [default: the file's]"),
    click.option("--top-p", type=float, help="Choose among the likeliest that make up p.  [default: the file's]"),
    click.option("--min-p", type=float, help="Leave out what is less than p times as likely as the likeliest."),
    click.option("--repetition-penalty", type=float, help="Over 1 makes recent tokens less likely."),
    click.option("--frequency-penalty", type=float, help="Makes a token less likely for each time the reply has it."),
    click.option("--presence-penalty", type=float, help="Makes tokens that the reply has less likely."),
    click.option("--seed", type=click.IntRange(0), help="Makes sampling repeatable."),
)
kv_option = click.option(
    "--kv",
    type=click.Choice(["full", "q8", "tq4"]),  # kv.quantization.KINDS, which takes MLX
    default="full",
    show_default=True,
    help="Keys and values of global layers: as they are, or in 8 or 4 bits.",
)
output_options = _together(
    click.option("-v", "--verbose", is_flag=True, help="Say more: how the model is held, what is being done."),
    click.option("--debug", is_flag=True, help="Show tracebacks."),
)


def set_up_logging(detailed: bool) -> None:
    """Messages of the package as bare lines on stderr; `detailed`: also what is only good to know."""
    logging.basicConfig(format="%(message)s", level=logging.INFO if detailed else logging.WARNING)


def load_with_progress(model: str | None) -> tuple[LanguageModel, float]:
    """The model, or the demo and a line that says so, and how many seconds loading took."""
    from ..conversation import language_model

    if model is None:
        context = click.get_current_context(silent=True)
        command = context.info_name if context else "generate"
        echo(
            "No --model given: running the small built-in demo. For a real one: "
            f"mlx-gemma4 {command} --model gemma-4-E2B-it-Q4_K_M.gguf" + ' --prompt "..."' * (command == "generate")
        )
    path = find_model(model)
    start = time.perf_counter()
    with progress("Loading", 1e9, " GB") as update:
        lm = language_model.load(path, progress=update)
    return lm, time.perf_counter() - start


def find_model(model: str | None) -> Path:
    """The path that --model means, downloaded if need be; None: the demo's."""
    if model is None:
        from ..conversation.language_model import demo_path

        return demo_path()
    from ..files.hub import resolve

    with progress("Downloading", 1e9, " GB") as update:
        return resolve(model, progress=update)


def sampling_from(lm: LanguageModel, flags: dict[str, Any]) -> Sampling:
    """The file's sampling with what `sampling_options` were given."""
    return replace(lm.sampling, **{name: value for name, value in flags.items() if value is not None})


def echo(line: str) -> None:
    """A line for people, on stderr."""
    click.echo(line, err=True)


@contextmanager
def progress(what: str, unit: float, suffix: str) -> Iterator[Callable[[int, int], None]]:
    """A line on a terminal's stderr that counts up, shown once it has taken a second, gone at the end."""
    start, shown = time.monotonic(), False

    def update(done: int, total: int) -> None:
        nonlocal shown
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and time.monotonic() - start > 1:
            digits = 1 if unit > 1 else 0
            line = f"{what} {done / unit:.{digits}f} of {total / unit:.{digits}f}{suffix}"
            click.echo(f"\r{line}\x1b[K", nl=False, err=True)
            shown = True

    try:
        yield update
    finally:
        if shown:
            click.echo("\r\x1b[K", nl=False, err=True)
