"""`mlx-gemma4 pull`, `list` and `rm`: models of Hugging Face, what is here of them, and their deletion."""

from __future__ import annotations

import logging
import sys
from datetime import datetime

import click

from ..errors import InputError
from .options import EXIT_INTERRUPTED, Lenient, echo, one_of, output_options, progress, say


@click.command(cls=Lenient)
@click.argument("repo", metavar="REPO[:QUANT]", required=False)
@click.option("-m", "--model", hidden=True)
@output_options
def pull(repo: str | None, model: str | None) -> None:
    """Download a model from Hugging Face, or a newer version of it.

    Prints its path. QUANT is a quantization like Q8_0 or a file's name; without it, Q4_K_M is taken where there is one.
    A download that broke off goes on where it stopped. `--model` takes the same names.
    """
    from ..files import hub
    from ..files.folder import repository

    name = repository(one_of(repo, model) or "")
    try:
        with progress("Downloading", 1e9, " GB") as update:
            path = hub.pull(*name, progress=update)
    except KeyboardInterrupt:
        echo("Interrupted; the next pull goes on from here")
        sys.exit(EXIT_INTERRUPTED)
    say(str(path))


@click.command("list", cls=Lenient)
@output_options
def list_models() -> None:
    """List the models that are here: name, size, quantization, date.

    They are in the cache that programs for Hugging Face share, where HF_HOME says; Gemma models alone are listed.
    """
    from ..files.cached import broken_off, cached_models
    from ..files.hub import cache_root
    from ..server.cards import cards

    logging.getLogger("mlx_gemma4.server.cards").setLevel(logging.ERROR)  # it warns of models of other kinds
    found, parts = cards(cached_models()), broken_off()
    width = max(map(len, [*(one.name for one in found), *parts]), default=0)
    for one in found:
        when = datetime.fromtimestamp(one.changed).strftime("%Y-%m-%d %H:%M")
        say(f"{one.name:<{width}}  {one.n_bytes / 1e9:6.2f} GB  {one.quant:<10}  {when}")
    for repo, size in parts.items():
        say(f"{repo:<{width}}  {size / 1e9:6.2f} GB  broken off; pull goes on with it, rm deletes it")
    if not found and not parts:
        echo(f"No models in {cache_root()}. To get one: mlx-gemma4 pull ggml-org/gemma-4-E2B-it-GGUF:Q4_K_M")


@click.command(cls=Lenient)
@click.argument("name", metavar="REPO[:QUANT]")
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
@output_options
def rm(name: str, yes: bool) -> None:
    """Delete a model, or what is left of a download.

    REPO may leave out the owner, and QUANT where there is one only; `list` shows the names.
    """
    from ..files.cached import broken_off, cached_models, delete_cached, in_cache

    models = cached_models()
    found = in_cache(name, list(models)) or in_cache(name, list(broken_off()))
    if not found:
        raise InputError(f"{name}: names no model that is here, or several; `mlx-gemma4 list` shows them")
    if not yes and not click.confirm(f"Delete {found}?", err=True):
        sys.exit(1)
    delete_cached(found.partition(":")[0], models.get(found))
    echo(f"Deleted {found}")
