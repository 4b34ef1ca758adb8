"""`mlx-gemma4 chat`: a conversation at a prompt, or line by line in a pipe."""

import sys
from typing import Any

import click

from ..errors import InputError
from .options import (
    Lenient,
    conversation_options,
    draft_options,
    image_tokens_option,
    mmproj_options,
    output_options,
    reply_length,
    sampling_options,
)


@click.command(cls=Lenient)
@conversation_options
@click.option(
    "-n", "--max-tokens", type=reply_length, metavar="N", help="Tokens of a reply, at most.  [default: -1, no limit]"
)
@image_tokens_option
@sampling_options
@draft_options
@mmproj_options
@output_options
def chat(**options: Any) -> None:
    """Talk with a model. /help lists the commands at the prompt.

    Where input or output is no terminal, each line of standard input is a message, and replies go to standard output.
    """
    from .chat_loop import chat_loop

    failed = chat_loop(**options)
    sys.exit(InputError("").exit_code if failed and not sys.stdin.isatty() else 0)
