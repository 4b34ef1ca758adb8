"""`mlx-gemma4 generate`: one prompt, one reply."""

from __future__ import annotations

import json
import logging
import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InputError
from .options import (
    load_with_progress,
    model_option,
    output_options,
    progress,
    sampling_from,
    sampling_options,
    say,
    set_up_logging,
)

if TYPE_CHECKING:
    from ..generation import Statistics
    from ..state import KVState
    from ..text import LanguageModel

EXIT_INTERRUPTED = 130  # as shells report Ctrl-C


@click.command()
@model_option
@click.option("-p", "--prompt", required=True, metavar="TEXT", help="What to answer; - reads standard input.")
@click.option("-n", "--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Length of the reply.")
@sampling_options
@click.option("--raw", is_flag=True, help="Send the text as it is, without the chat template.")
@click.option("--state", "state_file", metavar="FILE", help="Go on with the conversation saved there, and save it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with reply and statistics.")
@output_options
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
    from .. import text

    set_up_logging(verbose or debug)
    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt:
        raise InputError("--prompt is empty; give it some text")
    lm, load_time = load_with_progress(model)
    sampling = sampling_from(lm, flags)
    state = _open_state(lm, state_file)
    ids = lm.encode_prompt(prompt, raw=raw, after=state.tokens)
    logging.info("Loaded in %.2f s; prompt of %d tokens; %s", load_time, len(ids), sampling)
    pieces: list[str] = []
    statistics, interrupted = None, False
    try:
        with progress("Reading", 1, " tokens") as update:
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
        say(_summary(statistics) + (" (interrupted)" if interrupted else ""))
    if state_file and statistics:  # an interrupted reply is kept as far as it went, a half-read prompt is not
        state.save(state_file)
    if interrupted:
        sys.exit(EXIT_INTERRUPTED)


def _open_state(lm: LanguageModel, path: str | None) -> KVState:
    """The saved conversation, where there is one."""
    from ..state_file import load_state

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
