"""`mlx-gemma4 chat`: a conversation at a prompt, or line by line in a pipe."""

from __future__ import annotations

import sys

import click

from ..errors import InputError
from .options import EXIT_INTERRUPTED, SamplingOf, conversation_options, output_options, sampling_options


@click.command()
@conversation_options
@click.option(
    "-n", "--max-tokens", type=click.IntRange(1), help="Length of a reply.  [default: what the context holds]"
)
@sampling_options
@output_options
def chat(
    model: str | None,
    system: str | None,
    think: bool | None,
    state_file: str | None,
    kv: str,
    max_tokens: int | None,
    sampling: SamplingOf,
) -> None:
    """Talk with a model. /help lists the commands at the prompt.

    Where input or output is no terminal, each line of standard input is a message, and replies go to standard output.
    """
    from .chat_loop import chat_loop

    try:
        failed = chat_loop(model, system, think, max_tokens, sampling, state_file, kv)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(InputError("").exit_code if failed and not sys.stdin.isatty() else 0)
