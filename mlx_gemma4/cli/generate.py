"""`mlx-gemma4 generate`: one prompt, one reply."""

from __future__ import annotations

import json
import logging
import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..conversation import completion
from ..errors import InputError
from .options import (
    EXIT_INTERRUPTED,
    echo,
    kv_option,
    load_with_progress,
    model_option,
    output_options,
    progress,
    sampling_from,
    sampling_options,
    set_up_logging,
)

if TYPE_CHECKING:
    from ..conversation.completion import Chunk
    from ..conversation.language_model import LanguageModel
    from ..generation.loop import Statistics
    from ..kv.state import KVState


@click.command()
@model_option
@click.option("-p", "--prompt", required=True, metavar="TEXT", help="What to answer; - reads standard input.")
@click.option("--system", metavar="TEXT", help="What the model is told first: who it is, how to answer.")
@click.option("--think/--no-think", default=None, help="Let the model think first.  [default: the chat template's]")
@click.option("-n", "--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Length of the reply.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the reply before this text. May be repeated.")
@click.option("--json-schema", "schema_file", metavar="FILE", help="Make the reply JSON that obeys this JSON schema.")
@sampling_options
@click.option("--raw", is_flag=True, help="Send the text as it is, without the chat template.")
@click.option("--state", "state_file", metavar="FILE", help="Go on with the conversation saved there, and save it.")
@kv_option
@click.option("--logprobs", type=click.IntRange(0, 100), metavar="N", help="With --json: how likely each token was.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with reply and statistics.")
@output_options
def generate(
    model: str | None,
    prompt: str,
    system: str | None,
    think: bool | None,
    max_tokens: int,
    stop: tuple[str, ...],
    schema_file: str | None,
    raw: bool,
    state_file: str | None,
    kv: str,
    logprobs: int | None,
    as_json: bool,
    verbose: bool,
    debug: bool,
    **flags: Any,
) -> None:
    """Answer a prompt.

    The reply goes to standard output; thinking and everything else go to standard error.
    """

    set_up_logging(verbose or debug)
    if raw and (system is not None or think is not None):
        raise InputError(
            "--raw sends the text as it is: put into it what --system or --think would, or leave out --raw"
        )
    if logprobs is not None and not as_json:
        raise InputError("--logprobs is shown in the object that --json prints: give --json too")
    schema = None if schema_file is None else _read_schema(schema_file)
    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt:
        raise InputError("--prompt is empty; give it some text")
    lm, load_time = load_with_progress(model)
    sampling = sampling_from(lm, flags)
    state = _open_state(lm, state_file, kv)
    if schema is not None:
        _check_schema(lm, schema, f"--json-schema {schema_file}")
    ids = lm.encode_prompt(prompt, raw=raw, after=state.tokens, system=system, think=think)
    logging.info("Loaded in %.2f s; prompt of %d tokens; %s", load_time, len(ids), sampling)
    chunks: list[Chunk] = []
    made, interrupted = None, False
    try:
        with progress("Reading", 1, " tokens") as update:
            made = completion.stream(
                lm,
                ids,
                think=think,
                max_tokens=max_tokens,
                sampling=sampling,
                stop=stop,
                schema=schema,
                logprobs=logprobs,
                on_prompt=update,
                state=state,
            )
            first = next(made)
        for chunk in chain([first], made):
            if not as_json:
                _show(chunk, after_thinking=bool(chunks and chunks[-1].thinking))
            chunks.append(chunk)
    except KeyboardInterrupt:
        interrupted = True
        if made:
            made.close()  # what is on its way leaves the state
    if as_json:
        click.echo(json.dumps(_report(lm, chunks, load_time, interrupted), ensure_ascii=False))
    elif not "".join(chunk.text for chunk in chunks).endswith("\n"):
        click.echo()
    if chunks:
        echo(_summary(chunks[-1].statistics) + (" (interrupted)" if interrupted else ""))
    if state_file and chunks:  # an interrupted reply is kept as far as it went, a half-read prompt is not
        lm.model.save_state(state, state_file)
    if interrupted:
        sys.exit(EXIT_INTERRUPTED)


def _read_schema(path: str) -> dict[str, Any]:
    """What should be a JSON schema."""
    try:
        schema = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--json-schema {path}: can't be read as JSON ({error})") from error
    if not isinstance(schema, dict):
        raise InputError(f"--json-schema {path}: must hold a JSON object, a schema")
    return schema


def _check_schema(lm: LanguageModel, schema: dict[str, Any], flag: str) -> None:
    from ..grammar.grammar import json_schema

    try:
        json_schema(lm.tokenizer, schema)
    except InputError as error:
        raise InputError(f"{flag}: {error}") from error


def _show(chunk: Chunk, after_thinking: bool) -> None:
    """A piece of the reply on stdout, or of thinking, dimmed, on stderr."""
    if chunk.thinking:
        click.echo(click.style(chunk.thinking, dim=True), nl=False, err=True)
    elif after_thinking:
        click.echo(err=True)
    click.echo(chunk.text, nl=False)


def _open_state(lm: LanguageModel, path: str | None, kv: str) -> KVState:
    """The saved conversation, where there is one; else a new state with keys and values as `kv` says."""
    if not path or not Path(path).exists():
        return lm.model.new_state(kv=kv)
    state = lm.model.load_state(path)
    if kv not in ("full", state.kv):
        raise InputError(f"{path}: was saved with --kv {state.kv}; leave out --kv {kv}, or give another --state")
    return state


def _report(lm: LanguageModel, chunks: list[Chunk], load_time: float, interrupted: bool) -> dict[str, Any]:
    """What `--json` prints. Times in seconds, rates in tokens a second, memory in bytes."""
    report: dict[str, Any] = {
        "model": str(lm.path),
        "text": "".join(chunk.text for chunk in chunks),
        "interrupted": interrupted,
        "load_time": load_time,
    }
    if thinking := "".join(chunk.thinking for chunk in chunks):
        report["thinking"] = thinking
    if chunks:
        statistics = chunks[-1].statistics
        report |= {
            "stop_reason": statistics.stop_reason,
            "prompt_tokens": statistics.prompt_tokens,
            "prompt_time": statistics.prompt_time,
            "prompt_rate": statistics.prompt_rate,
            "reply_tokens": statistics.reply_tokens,
            "reply_time": statistics.reply_time,
            "reply_rate": statistics.reply_rate,
            "peak_memory": statistics.peak_memory,
        }
    tokens = [chunk.token for chunk in chunks if chunk.token and chunk.token.logprob is not None]
    if tokens:
        report["tokens"] = [
            {**_likely(lm, token.id, token.logprob), "top": [_likely(lm, *pair) for pair in token.top]}
            for token in tokens
        ]
    return report


def _likely(lm: LanguageModel, token: int, logprob: float | None) -> dict[str, Any]:
    """A token with its log-probability; a part of a character shows as U+FFFD."""
    text = lm.tokenizer.piece(token, skip_special=False).decode("utf-8", "replace")
    return {"id": token, "text": text, "logprob": logprob}


def _summary(s: Statistics) -> str:
    return (
        f"Prompt: {s.prompt_tokens} tokens, {s.prompt_rate:.1f} tokens/s. "
        f"Reply: {s.reply_tokens} tokens, {s.reply_rate:.1f} tokens/s. "
        f"Peak memory: {s.peak_memory / 1e9:.2f} GB."
    )
