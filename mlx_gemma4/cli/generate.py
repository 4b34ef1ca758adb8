"""`mlx-gemma4 generate`: one prompt, one reply; or a file of prompts (prompts.py)."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InputError, reason
from ..media.kind import KINDS
from ..paths import check_target
from .attachments import attachment, most_tokens
from .options import (
    EXIT_INTERRUPTED,
    Lenient,
    SamplingOf,
    complete_file,
    conversation_options,
    draft_options,
    echo,
    image_tokens_option,
    load_with_progress,
    mmproj_options,
    output_options,
    progress,
    read_text,
    reply_length,
    sampling_options,
    say,
)
from .prompts import answer_file

_ORDER = f"{__package__}.order"  # in a command's context: kinds of what was given, in order

if TYPE_CHECKING:
    from ..conversation.language_model import LanguageModel
    from ..conversation.reply import Reply
    from ..generation.decoding import Statistics
    from ..kv.state import KVState


class _InOrder(Lenient):
    """A command that knows the order in which its --image, --audio and --video came, whichever of them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        ctx.meta[_ORDER] = [option.name for option in order if option.name in KINDS]
        return super().parse_args(ctx, args)


def _file_option(kind: str, what: str) -> Callable[[Any], Any]:
    help = f"{what} to speak of, where the prompt has {{{kind}}}, or before it. May be repeated."
    return click.option(f"--{kind}", multiple=True, metavar="FILE", shell_complete=complete_file, help=help)


@click.command(cls=_InOrder)
@click.argument("text", metavar="[PROMPT]", required=False)
@conversation_options
@click.option("-p", "--prompt", metavar="TEXT", help="What to answer, as PROMPT; - reads standard input.")
@click.option("-f", "--file", "prompt_file", metavar="FILE", help="Answer the text in this file.")
@click.option("--prompts", "prompts_file", metavar="FILE", help="Answer many: lines of JSON with prompt or messages.")
@click.option("-o", "--output", metavar="FILE", help="With --prompts: write here, going on where that ends.")
@_file_option("image", "A picture")
@_file_option("audio", "A sound")
@_file_option("video", "A video")
@image_tokens_option
@click.option(
    "-n", "--max-tokens", type=reply_length, metavar="N", default=256, help="Tokens of a reply, at most; -1: no limit."
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End the reply before this text. May be repeated.")
@click.option(
    "--json-schema",
    "schema_file",
    metavar="FILE",
    help="Make the reply JSON that obeys this JSON schema, or {...} itself.",
)
@sampling_options
@draft_options
@mmproj_options
@click.option("--raw", is_flag=True, help="Send the text as it is, without the chat template.")
@click.option("--logprobs", type=click.IntRange(0, 100), metavar="N", help="With --json: how likely each token was.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with reply and statistics.")
@output_options
def generate(
    text: str | None,
    model: str | None,
    system: str | None,
    think: bool | None,
    think_budget: int | None,
    state_file: str | None,
    kv: str,
    prompt: str | None,
    prompt_file: str | None,
    prompts_file: str | None,
    output: str | None,
    image: tuple[str, ...],
    audio: tuple[str, ...],
    video: tuple[str, ...],
    image_tokens: int | None,
    max_tokens: int | None,
    stop: tuple[str, ...],
    schema_file: str | None,
    sampling: SamplingOf,
    raw: bool,
    logprobs: int | None,
    as_json: bool,
    draft_max: int,
) -> None:
    """Answer a prompt, or a file of prompts.

    The reply goes to standard output; thinking and everything else go to standard error. With --prompts, each line of
    the file is {"prompt": "..."} or {"messages": [...]}, with "id", "max_tokens", "seed" and others as you like; each
    line of the output is a reply, in the same order. A reply under --json-schema that is cut gives exit code 1.
    """
    from ..conversation.parts import content_of
    from ..conversation.reply import ReplyOptions, stream
    from ..kv.file import FORMAT as STATE_MARK
    from ..memory import DEFAULT_CONTEXT

    if raw and (system is not None or think is not None):
        raise InputError(
            "--raw sends the text as it is: put into it what --system or --think would, or leave out --raw"
        )
    if logprobs is not None and not as_json:
        raise InputError("--logprobs is shown in the object that --json prints: give --json too")
    schema = None if schema_file is None else _read_schema(schema_file)
    if [text, prompt, prompt_file, prompts_file].count(None) != 3:
        raise InputError('give one prompt: "TEXT", --prompt TEXT or --file FILE; or many: --prompts FILE')
    left = {"image": list(image), "audio": list(audio), "video": list(video)}
    order = click.get_current_context().meta[_ORDER]
    parts = [attachment(kind, left[kind].pop(0), f"--{kind}", image_tokens) for kind in order]
    if parts and raw:
        raise InputError("--raw sends a text as it is, and no pictures or sounds: leave it out")
    if parts and prompts_file is not None:
        raise InputError(f"--{order[0]} goes with --prompt; with --prompts, parts of messages name files")
    if prompts_file is not None:
        if state_file or logprobs is not None:
            raise InputError("--state and --logprobs go with a single --prompt")

        def options_of(lm: LanguageModel) -> ReplyOptions:
            return ReplyOptions(max_tokens, sampling(lm), stop, think, schema=schema, think_budget=think_budget)

        answer_file(
            Path(prompts_file),
            Path(output) if output else None,
            model,
            kv,
            system,
            raw,
            max_tokens,
            options_of,
            draft_max,
        )
        return
    if output is not None:
        raise InputError("--output goes with --prompts; --prompt answers on standard output")
    if state_file:
        check_target(Path(state_file), STATE_MARK, "saved conversation")
    prompt = _prompt(prompt if text is None else text, prompt_file)
    most = len(prompt.encode()) // 3 + (max_tokens or DEFAULT_CONTEXT)  # a token has over 3 bytes
    most += sum(map(most_tokens, parts))
    lm, load_time = load_with_progress(model, kv, most, draft_max=draft_max)
    options = ReplyOptions(
        max_tokens, sampling(lm), stop, think, schema=schema, logprobs=logprobs, think_budget=think_budget
    )
    state = _open_state(lm, state_file, kv)
    ids = lm.encode_prompt(content_of(prompt, parts), raw=raw, after=state.tokens, system=system, think=think)
    logging.info("Loaded in %.2f s; prompt of %d tokens; %s", load_time, len(ids), options.sampling)
    said, thinking, interrupted = "", False, False
    chunks, reply = None, None
    try:
        with progress("Reading", 1, " tokens") as update:
            chunks = stream(lm, [*state.tokens, *ids], options, state=state, marks=False, on_prompt=update)
            first = next(chunks)
        for chunk in chain([first], chunks):
            if not as_json:
                if chunk.thinking:
                    say(chunk.thinking, end="", err=True, dim=True)
                elif thinking:  # it has ended
                    say(err=True)
                say(chunk.text, end="")
            said, thinking, reply = said + chunk.text, bool(chunk.thinking), chunk.reply
    except InputError as error:
        raise InputError(f"--json-schema {schema_file}: {error}") if error.field == "schema" else error from error
    except KeyboardInterrupt:
        interrupted = True
        if chunks:
            chunks.close()  # a token on its way leaves the state
    if as_json:
        say(json.dumps(_report(lm, said, reply, load_time, interrupted), ensure_ascii=False))
    elif not said.endswith("\n"):
        say()
    if reply:
        s = reply.statistics
        echo(
            f"Prompt: {s.prompt_tokens} tokens, {s.prompt_rate:.1f} tokens/s. "
            f"Reply: {s.reply_tokens} tokens, {s.reply_rate:.1f} tokens/s. "
            + _drafted(s)
            + f"Peak memory: {s.peak_memory / 1e9:.2f} GB."
            + " (interrupted)" * interrupted
        )
    cut = reply is not None and not interrupted and reply.finish_reason == "length"
    if reply and cut:
        full = max_tokens is None or len(reply.tokens) < max_tokens
        echo(
            f"Cut off after {len(reply.tokens)} tokens: "
            + (f"the context of {lm.config.context:,} is full" if full else "-n 1000 allows more, -n -1 all it takes")
            + "; it is no whole JSON" * (schema is not None)
        )
    if state_file and reply:  # an interrupted reply is kept as far as it went, a half-read prompt is not
        lm.model.save_state(state, state_file)
    if interrupted:
        sys.exit(EXIT_INTERRUPTED)
    if cut and schema is not None:
        sys.exit(1)


def _prompt(text: str | None, file: str | None) -> str:
    """Return the prompt, read from standard input or a file if it is there. Raises InputError."""
    if file is not None:
        text = read_text(file, "--file ").removesuffix("\n")
    elif text == "-":
        text = sys.stdin.read()
    elif text and text.endswith(".gguf") and Path(text).is_file():
        raise InputError(f"{text}: is a model and no prompt; give it with --model")
    if not text:
        raise InputError("the prompt is empty; give it some text")
    return text


def _drafted(s: Statistics) -> str:
    """What drafts did, as a sentence; none if there were none."""
    if not s.drafted_tokens:
        return ""
    return f"Drafts: {s.accepted_tokens} of {s.drafted_tokens} accepted, {s.tokens_per_step:.2f} tokens a step. "


def _read_schema(path: str) -> dict[str, Any]:
    inline = path.lstrip().startswith("{")
    try:
        schema = json.loads(path if inline else Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--json-schema {path}: can't be read as JSON ({reason(error)})") from error
    if not isinstance(schema, dict):
        raise InputError(f"--json-schema {path}: must hold a JSON object, a schema")
    return schema


def _open_state(lm: LanguageModel, path: str | None, kv: str) -> KVState:
    """Load the saved conversation if there is one; else make a new state with keys and values as `kv` says."""
    if not path or not Path(path).exists():
        return lm.model.new_state(kv=kv)
    state = lm.model.load_state(path)
    if kv not in ("full", state.kv):
        raise InputError(f"{path}: was saved with --kv {state.kv}; leave out --kv {kv}, or give another --state")
    return state


def _report(lm: LanguageModel, text: str, reply: Reply | None, load_time: float, interrupted: bool) -> dict[str, Any]:
    """Return what `--json` prints. Times in seconds, rates in tokens a second, memory in bytes."""
    report: dict[str, Any] = {"model": str(lm.path), "text": text, "interrupted": interrupted, "load_time": load_time}
    if reply is None:
        return report
    if reply.thinking:
        report["thinking"] = reply.thinking
    figures = "stop_reason prompt_tokens prompt_time prompt_rate reply_tokens reply_time reply_rate peak_memory"
    figures += " drafted_tokens accepted_tokens tokens_per_step"
    report |= {name: getattr(reply.statistics, name) for name in figures.split()}
    if reply.tokens and reply.tokens[0].logprob is not None:
        report["tokens"] = [
            {**_likely(lm, token.id, token.logprob), "top": [_likely(lm, *pair) for pair in token.top]}
            for token in reply.tokens
        ]
    return report


def _likely(lm: LanguageModel, token: int, logprob: float | None) -> dict[str, Any]:
    """A token with its log-probability; a part of a character shows as U+FFFD."""
    text = lm.tokenizer.piece(token, skip_special=False).decode("utf-8", "replace")
    return {"id": token, "text": text, "logprob": logprob}
