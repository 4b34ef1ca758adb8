"""Options that several commands share, loading with progress, and lines for people on stderr.

Each decorator here adds an option, or a group of them; its comment or docstring names the arguments that the command
then takes. Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from ..errors import InputError, printable, reason
from ..media.kind import BUDGETS

if TYPE_CHECKING:
    from ..conversation.language_model import LanguageModel
    from ..generation.sampling import Sampling

Command = Callable[..., Any]
SamplingOf = Callable[["LanguageModel"], "Sampling"]  # what a model's file recommends, with the flags' changes

DRAFT = f"{__package__}.draft"  # in a command's context: the value of --draft
MMPROJ = f"{__package__}.mmproj"  # and that of --mmproj
EXIT_INTERRUPTED = 130  # as shells report Ctrl-C

# Other names of flags, as llama.cpp, mlx-lm and llama-bench have them. They are taken and not shown in --help.
ALIASES = {
    "--model": "-hf --hf-repo",
    "--max-tokens": "--n-predict --predict",
    "--context": "--ctx-size --max-kv-size",
    "--temperature": "--temp",
    "--repetition-penalty": "--repeat-penalty",
    "--seed": "-s",
    "--system": "-sys --system-prompt",
    "--stop": "-r --reverse-prompt",
    "--json-schema": "-j -jf --json-schema-file",
    "--raw": "--ignore-chat-template",
    "--think-budget": "--reasoning-budget",
    "--draft": "-md --model-draft --draft-model",
    "--draft-max": "--draft-n --num-draft-tokens",
    "--parallel": "-np",
    "--prompt-sizes": "-p --n-prompt",
    "--reply": "-n --n-gen",
    "--depths": "-d --n-depth",
    "--repetitions": "-r",
}
# Flags of llama.cpp that nothing here needs: all layers are on the GPU, and so on.
NEEDLESS = ("-ngl", "--n-gpu-layers", "--gpu-layers", "-fa", "--flash-attn", "--jinja", "--mlock", "--no-mmap")


class Lenient(click.Command):
    """A command that knows its flags by their other names too, and says what to do about some that it has not."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        for param in self.params:
            if isinstance(param, click.Option) and not param.is_flag:
                short = {"integer": "N", "integer range": "N", "float": "X"}
                param.metavar = param.metavar or short.get(param.type.name)

    def make_parser(self, ctx: click.Context) -> Any:
        parser = super().make_parser(ctx)
        params = self.get_params(ctx)
        own = {flag for param in params for flag in param.opts}
        for param in params:
            other = copy.copy(param)
            other.opts = [name for flag in param.opts for name in ALIASES.get(flag, "").split() if name not in own]
            if other.opts:
                other.secondary_opts = []
                other.add_to_parser(parser, ctx)
        return parser

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        takes_model = any("--model" in param.opts for param in self.params)
        for flag in NEEDLESS:
            if takes_model and flag in args:
                raise click.UsageError(f"{flag}: needs no telling here; leave it out", ctx)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            if takes_model and "unexpected extra argument" in error.message:
                raise click.UsageError(f"{error.message}: a model goes with -m, a text in quotes", ctx) from None
            raise


def _together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Return one decorator that applies these, the first listed first in --help."""
    return lambda command: functools.reduce(lambda inner, option: option(inner), reversed(options), command)


def complete_file(_ctx: click.Context, _option: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete a path where more than paths may be given."""
    return [CompletionItem(incomplete, type="file")]


model_option = click.option(  # model: str | None
    "-m",
    "--model",
    metavar="MODEL",
    shell_complete=complete_file,
    help="A .gguf file, a folder of safetensors, or REPO[:QUANT] on Hugging Face. Without it: a small demo.",
)
kv_option = click.option(  # kv: str
    "--kv",
    type=click.Choice(["full", "q8", "tq4"]),  # kv.quantization.KINDS, which takes MLX
    default="full",
    help="Keys and values of global layers: as they are, or in 8 or 4 bits.",
)
image_tokens_option = click.option(  # image_tokens: int | None
    "--image-tokens",
    type=click.Choice([str(tokens) for tokens in BUDGETS]),
    callback=lambda _, __, value: value and int(value),
    help="Tokens that a picture may take: more show finer detail.  [default: 280]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
LOADING = "mlx_gemma4.loading"  # where a context keeps what `loading_options` were given


def loading() -> dict[str, Any]:
    """Return --hosts, --split and --context of the command that runs."""
    running = click.get_current_context(silent=True)
    return running.meta.get(LOADING, {}) if running else {}


def _keep(ctx: click.Context, option: click.Parameter, value: str | int | None) -> None:
    ctx.meta.setdefault(LOADING, {})[option.name] = value


def _use_threads(_ctx: click.Context, _option: click.Parameter, n: int | None) -> None:
    if n:
        os.environ["MLX_GEMMA4_THREADS"] = str(n)  # execution.py reads it; so do other ranks


def reply_length(value: str) -> int | None:
    """Tokens of a reply, as -n has them; None, written -1: no limit."""
    if not re.fullmatch(r"[1-9]\d{0,8}|-1", str(value), re.ASCII):
        raise click.BadParameter(f"{value!r} is no number of tokens: 1 or more, or -1 for no limit")
    return None if int(value) == -1 else int(value)


threads_option = click.option(  # no argument
    "-t",
    "--threads",
    type=click.IntRange(1),
    expose_value=False,
    callback=_use_threads,
    help="Cores to use, where the CPU computes.  [default: all]",
)
loading_options = _together(  # no arguments: `loading` has them
    click.option(
        "-c",
        "--context",
        type=click.IntRange(1),
        expose_value=False,
        callback=_keep,
        help="Tokens of a conversation, at most.  [default: the model's]",
    ),
    threads_option,
    click.option(
        "--hosts",
        metavar="A,B|FILE",
        expose_value=False,
        callback=_keep,
        help="Run on these Macs together, this one first: names for ssh, or a hostfile of MLX's.",
    ),
    click.option(
        "--split",
        type=click.Choice(["auto", "tensor", "layers"]),
        default="auto",
        expose_value=False,
        callback=_keep,
        help="There: a part of each layer for each, or so many layers.",
    ),
)
# model, kv, system: str | None, think: bool | None, think_budget: int | None, state_file: str | None
conversation_options = _together(
    model_option,
    click.option("--system", metavar="TEXT", help="What the model is told first: who it is, how to answer."),
    click.option("--think/--no-think", default=None, help="Let the model think first.  [default: the chat template's]"),
    click.option("--think-budget", type=click.IntRange(0), metavar="N", help="End thinking after N tokens."),
    click.option("--state", "state_file", metavar="FILE", help="Go on with the conversation saved there, and save it."),
    kv_option,
    loading_options,
)
_SAMPLING = (
    ("--temperature", float, "0 always takes the likeliest token.  [default: the file's]"),
    ("--top-k", int, "Choose among the k likeliest; 0: all.  [default: the file's]"),
    ("--top-p", float, "Choose among the likeliest that make up p.  [default: the file's]"),
    ("--min-p", float, "Leave out what is less than p times as likely as the likeliest."),
    ("--repetition-penalty", float, "Over 1 makes recent tokens less likely."),
    ("--frequency-penalty", float, "Makes a token less likely for each time the reply has it."),
    ("--presence-penalty", float, "Makes tokens that the reply has less likely."),
    ("--seed", click.IntRange(0), "Makes sampling repeatable."),
)


def sampling_options(command: Command) -> Command:
    """Add the options of sampling; the command takes them as one argument, `sampling: SamplingOf`."""
    names = [flag.strip("-").replace("-", "_") for flag, _, _ in _SAMPLING]

    @functools.wraps(command)
    def collect(**given: Any) -> Any:
        flags = {name: value for name in names if (value := given.pop(name)) is not None}
        return command(**given, sampling=lambda lm: replace(lm.sampling, **flags))

    return _together(*(click.option(flag, type=kind, help=text) for flag, kind, text in _SAMPLING))(collect)


def draft_options(command: Command) -> Command:
    """Add the options of drafts; the command takes `draft_max: int`, 0: none are made, and its context --draft."""

    @functools.wraps(command)
    def collect(draft_max: int, no_draft: bool, **given: Any) -> Any:
        return command(**given, draft_max=0 if no_draft else draft_max)

    by = click.option(
        "--draft",
        metavar="FILE",
        default="auto",
        show_default=False,
        expose_value=False,
        callback=lambda context, _, value: context.meta.update({DRAFT: value}),
        shell_complete=complete_file,
        help="An assistant that guesses: a file, a folder, REPO[:QUANT].  [default: one beside the model]",
    )
    most = click.option("--draft-max", type=click.IntRange(1, 7), default=7, help="Tokens guessed a step, at most.")
    none = click.option("--no-draft", is_flag=True, help="Guess no tokens: one a step.")
    return _together(by, most, none)(collect)


def _keep_mmproj(ctx: click.Context, _option: click.Parameter, value: str | bool | None) -> None:
    if value:
        ctx.meta[MMPROJ] = None if value is True else value


mmproj_options = _together(  # no arguments: `load_with_progress` reads them
    click.option(
        "--mmproj",
        metavar="FILE",
        expose_value=False,
        callback=_keep_mmproj,
        shell_complete=complete_file,
        help="What it sees and hears with: a file or a folder.  [default: one beside the model]",
    ),
    click.option("--no-mmproj", is_flag=True, expose_value=False, callback=_keep_mmproj, help="Take text alone."),
)


class _Harmless(logging.Formatter):
    """Messages with their tracebacks: text of files and clients is in both."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    echo("".join(traceback.format_exception(kind, error, trace)).rstrip())


def _show_thread_traceback(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None:
        _show_traceback(args.exc_type, args.exc_value, args.exc_traceback)


def _set_up_logging(_ctx: click.Context, _option: click.Parameter, detailed: bool) -> None:
    """Write the package's messages as bare lines on stderr; `detailed`: including those of level INFO."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Harmless("%(message)s"))
    logging.basicConfig(handlers=[handler])
    sys.excepthook = _show_traceback
    threading.excepthook = _show_thread_traceback
    if detailed:
        logging.getLogger().setLevel(logging.INFO)


_logging_flag = functools.partial(click.option, is_flag=True, expose_value=False, callback=_set_up_logging)
output_options = _together(  # no arguments
    _logging_flag("-v", "--verbose", help="Say more: how the model is held, what is being done."),
    _logging_flag("--debug", help="Show tracebacks."),
)


def load_with_progress(
    model: str | None, kv: str, context: int | None = None, kv_bytes: int | None = None, *, draft_max: int
) -> tuple[LanguageModel, float]:
    """Load the model, or the demo with a line that says so; return it and the seconds that loading took.

    There must be memory for `context` tokens, and for `kv_bytes`, of keys and values held as `kv` says.
    """
    from ..conversation.language_model import load
    from ..memory import Room

    running, given = click.get_current_context(silent=True), loading()
    if model is None:
        command = running.info_name if running else "generate"
        real = f"mlx-gemma4 {command} --model ggml-org/gemma-4-E2B-it-GGUF:Q4_K_M"
        prompt = ' --prompt "..."' * (command == "generate")
        echo(f"No --model given: running the small built-in demo. For a real one: {real}{prompt}")
    path = find_model(model)
    if given.get("hosts") and "MLX_RANK" not in os.environ:
        from ..distributed import hosts

        hosts.start(hosts.read_hosts(given["hosts"]))
    start, most = time.perf_counter(), given.get("context")
    with progress("Loading", 1e9, " GB") as update, progress("Preparing kernels:", 1, "") as prepared:
        draft = running.meta.pop(DRAFT, "auto") if running else "auto"  # the next model's is another
        room, split = Room(context or most, kv, kv_bytes or 0), given.get("split", "auto")
        mmproj = running.meta.pop(MMPROJ, "auto") if running else "auto"
        how: dict[str, Any] = {
            "split": split,
            "context": most,
            "draft": draft,
            "draft_max": draft_max,
            "mmproj": mmproj,
        }
        lm = load(path, progress=update, preparing=prepared, room=room, **how)
    return lm, time.perf_counter() - start


def one_of(argument: str | None, model: str | None) -> str | None:
    """Return the model that a command is given, in either way. Raises InputError."""
    if argument is not None and model is not None:
        raise InputError(f"{argument} and --model {model}: name one model")
    return model if argument is None else argument


def find_model(model: str | None) -> Path:
    """Return the path that --model means, downloaded if need be; None: the demo's."""
    from ..conversation.language_model import demo_path
    from ..files.hub import resolve

    if model is None:
        return demo_path()
    with progress("Downloading", 1e9, " GB") as update:
        return resolve(model, progress=update)


def alone(command: str) -> None:
    """Refuse a command that measures this machine where `mlx.launch` has started it among others. Raises InputError."""
    from ..distributed.place import placed

    if placed():
        raise InputError(f"{command} measures one machine; start it there without mlx.launch")


def read_text(path: str, flag: str = "") -> str:
    """Return a text file's contents. Raises InputError, which says what names the file."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{flag}{path}: can't be read as text ({reason(error)}); name a text file") from None


def say(text: str = "", *, end: str = "\n", err: bool = False, dim: bool = False) -> None:
    """Print text of any origin: on a terminal, and always on stderr, without what could control it.

    Everything that a command prints passes here, or is drawn by reply_screen.py.
    """
    if err or sys.stdout.isatty():
        text = printable(text)
    click.echo(click.style(text, dim=True) if dim else text, nl=False, err=err)
    click.echo(end, nl=False, err=err)


def echo(line: str) -> None:
    """Print a line for people, on stderr."""
    say(line, err=True)


@contextmanager
def progress(what: str, unit: float, suffix: str) -> Iterator[Callable[[int, int], None]]:
    """Show a line on a terminal's stderr that counts up, after a second until the end; of bytes, the seconds left."""
    start, shown, first = time.monotonic(), False, (0.0, 0)

    def update(done: int, total: int) -> None:
        nonlocal shown, first
        now = time.monotonic()
        first = first if first[0] else (now, done)
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and now - start > 1:
            digits = 1 if unit > 1 else 0
            line = f"{what} {done / unit:.{digits}f} of {total / unit:.{digits}f}{suffix}"
            if unit > 1 and done > first[1]:
                line += f", {(now - first[0]) / (done - first[1]) * (total - done):.0f} s left"
            click.echo(f"\r{line}\x1b[K", nl=False, err=True)
            shown = True

    try:
        yield update
    finally:
        if shown:
            click.echo("\r\x1b[K", nl=False, err=True)
