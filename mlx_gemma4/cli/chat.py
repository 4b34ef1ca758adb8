"""`mlx-gemma4 chat`: a conversation at a prompt, or line by line in a pipe."""

import sys
from typing import Any

import click

from ..errors import InputError
from .options import (
    EXIT_INTERRUPTED,
    conversation_options,
    draft_options,
    mmproj_options,
    output_options,
    sampling_options,
)


@click.command()
@conversation_options
@click.option(
    "-n", "--max-tokens", type=click.IntRange(1), help="Length of a reply.  [default: what the context holds]"
)
@sampling_options
@draft_options
@mmproj_options
@output_options
def chat(**options: Any) -> None:
    """Talk with a model. /help lists the commands at the prompt.

    Where input or output is no terminal, each line of standard input is a message, and replies go to standard output.
    """
    from .chat_loop import chat_loop

    try:
        failed = chat_loop(**options)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(InputError("").exit_code if failed and not sys.stdin.isatty() else 0)
