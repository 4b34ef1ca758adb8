"""`mlx-gemma4 completion`: a script with which a shell completes commands, flags and files."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
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
    click.echo(made(ctx.find_root().command, {}, "mlx-gemma4", "_MLX_GEMMA4_COMPLETE").source())
