"""The command line: flags in, text out on stdout, everything else on stderr.

Heavy modules are imported when a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .errors import InputError

if TYPE_CHECKING:
    from .generation import Statistics
    from .state import KVState
    from .text import LanguageModel

EXIT_INTERRUPTED = 130  # as shells report Ctrl-C


class _Commands(click.Group):
    """Turns errors that people cause into one line, and the unexpected into one line and a hint."""

    def invoke(self, ctx: click.Context) -> Any:
        debug = "--debug" in sys.argv
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except InputError as error:
            if debug:
                raise
            _say(f"mlx-gemma4: {error}")
            ctx.exit(error.exit_code)
        except BrokenPipeError:  # the reader of our output went away, as `| head` does
            sys.stderr.close()
            ctx.exit(0)
        except Exception as error:
            if debug:
                raise
            what = " ".join(str(error).split()) or "no details"
            _say(f"mlx-gemma4: unexpected {type(error).__name__}: {what} (run again with --debug for the traceback)")
            ctx.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-gemma4")
def main() -> None:
    """Gemma 4 on Apple Silicon, straight from GGUF files."""


@main.command()
@click.option(
    "-m", "--model", metavar="PATH", help="A .gguf file or a folder of safetensors. Without it: a small demo."
)
@click.option("-p", "--prompt", required=True, metavar="TEXT", help="What to answer; - reads standard input.")
@click.option("-n", "--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Length of the reply.")
@click.option("--temperature", type=float, help="0 always takes the likeliest token.  [default: the file's]")
@click.option("--top-k", type=int, help="Choose among the k likeliest; 0: all.  [default: the file's]")
@click.option("--top-p", type=float, help="Choose among the likeliest that make up p.  [default: the file's]")
@click.option("--min-p", type=float, help="Leave out what is less than p times as likely as the likeliest.")
@click.option("--repetition-penalty", type=float, help="Over 1 makes recent tokens less likely.")
@click.option("--seed", type=click.IntRange(0), help="Makes sampling repeatable.")
@click.option("--raw", is_flag=True, help="Send the text as it is, without the chat template.")
@click.option("--state", "state_file", metavar="FILE", help="Go on with the conversation saved there, and save it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with reply and statistics.")
@click.option("-v", "--verbose", is_flag=True, help="Say how the model was loaded.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def generate(
    model: str | None,
    prompt: str,
    max_tokens: int,
    raw: bool,
    state_file: str | None,
    as_json: bool,
    verbose: bool,
    debug: bool,
    **flags: Any,
) -> None:
    """Answer a prompt."""
    from dataclasses import replace

    from . import text

    logging.basicConfig(format="%(message)s", level=logging.INFO if verbose or debug else logging.WARNING)
    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt:
        raise InputError("--prompt is empty; give it some text")
    if model is None:
        _say(
            "No --model given: running the small built-in demo. For a real one: "
            'mlx-gemma4 generate --model gemma-4-E2B-it-Q4_K_M.gguf --prompt "..."'
        )
    start = time.perf_counter()
    with _progress("Loading", 1e9, " GB") as update:
        lm = text.load(model, progress=update)
    load_time = time.perf_counter() - start
    sampling = replace(lm.sampling, **{name: value for name, value in flags.items() if value is not None})
    state = _open_state(lm, state_file)
    ids = lm.encode_prompt(prompt, raw=raw, after=state.tokens)
    logging.info("Loaded in %.2f s; prompt of %d tokens; %s", load_time, len(ids), sampling)
    pieces: list[str] = []
    statistics, interrupted = None, False
    try:
        with _progress("Reading", 1, " tokens") as update:
            chunks = text.stream(lm, ids, max_tokens=max_tokens, sampling=sampling, on_prompt=update, state=state)
            first = next(chunks)
        for chunk in chain([first], chunks):
            statistics = chunk.statistics
            pieces.append(chunk.text)
            if not as_json:
                click.echo(chunk.text, nl=False)
    except KeyboardInterrupt:
        interrupted = True
    reply = "".join(pieces)
    if as_json:
        click.echo(json.dumps(_report(lm, reply, statistics, load_time, interrupted), ensure_ascii=False))
    elif not reply.endswith("\n"):
        click.echo()
    if statistics:
        _say(_summary(statistics) + (" (interrupted)" if interrupted else ""))
    if state_file and statistics:  # an interrupted reply is kept as far as it went, a half-read prompt is not
        state.save(state_file)
    if interrupted:
        sys.exit(EXIT_INTERRUPTED)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def doctor(as_json: bool, debug: bool) -> None:
    """Check this machine's kernels, and switch off those that fail.

    Each runs beside stock operations at the sizes of real models. The exit code is 1 if one failed.
    """
    from .doctor import examine

    sys.exit(0 if examine(click.echo, as_json) else 1)


def _open_state(lm: LanguageModel, path: str | None) -> KVState:
    """The saved conversation, where there is one."""
    from pathlib import Path

    from .state_file import load_state

    return load_state(lm.model, path) if path and Path(path).exists() else lm.model.new_state()


def _report(
    lm: LanguageModel, reply: str, statistics: Statistics | None, load_time: float, interrupted: bool
) -> dict[str, Any]:
    """What `--json` prints. Times in seconds, rates in tokens a second, memory in bytes."""
    report: dict[str, Any] = {"model": str(lm.path), "text": reply, "interrupted": interrupted, "load_time": load_time}
    if statistics:
        report |= {
            "prompt_tokens": statistics.prompt_tokens,
            "prompt_time": statistics.prompt_time,
            "prompt_rate": statistics.prompt_rate,
            "reply_tokens": statistics.reply_tokens,
            "reply_time": statistics.reply_time,
            "reply_rate": statistics.reply_rate,
            "peak_memory": statistics.peak_memory,
        }
    return report


def _summary(s: Statistics) -> str:
    return (
        f"Prompt: {s.prompt_tokens} tokens, {s.prompt_rate:.1f} tokens/s. "
        f"Reply: {s.reply_tokens} tokens, {s.reply_rate:.1f} tokens/s. "
        f"Peak memory: {s.peak_memory / 1e9:.2f} GB."
    )


def _say(line: str) -> None:
    """A line for people, on stderr."""
    click.echo(line, err=True)


@contextmanager
def _progress(what: str, unit: float, suffix: str) -> Iterator[Callable[[int, int], None]]:
    """A line on a terminal's stderr that counts up, shown once it has taken a second, gone at the end."""
    start, shown = time.monotonic(), False

    def update(done: int, total: int) -> None:
        nonlocal shown
        if sys.stderr.isatty() and time.monotonic() - start > 1:
            digits = 1 if unit > 1 else 0
            line = f"{what} {done / unit:.{digits}f} of {total / unit:.{digits}f}{suffix}"
            click.echo(f"\r{line}\x1b[K", nl=False, err=True)
            shown = True

    try:
        yield update
    finally:
        if shown:
            click.echo("\r\x1b[K", nl=False, err=True)


if __name__ == "__main__":
    main()
