"""`mlx-gemma4 bench`: measure how fast this machine reads prompts and decodes, alone or beside llama.cpp."""

import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from ..paths import check_target, write_object
from .options import (
    Lenient,
    alone,
    echo,
    find_model,
    kv_option,
    model_option,
    output_options,
    progress,
    say,
    threads_option,
)


def _numbers(least: int) -> Callable[[str], tuple[int, ...]]:
    """Return the type of an option that takes whole numbers from `least` up, with commas between them."""

    def numbers(value: str) -> tuple[int, ...]:
        words = [word.strip() for word in value.split(",") if word.strip()]
        if not all(word.isdecimal() and int(word) >= least for word in words):
            raise click.BadParameter(f"{value!r} is no list of whole numbers from {least} up, as in 512,2048")
        return tuple(map(int, words))

    return numbers


def _shares(value: str) -> tuple[float, ...]:
    """Return numbers from 0 to 1 that have commas between them."""
    try:
        shares = tuple(float(word) for word in value.split(",") if word.strip())
    except ValueError:
        shares = (-1.0,)
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise click.BadParameter(f"{value!r} is no list of numbers from 0 to 1, as in 0,0.5,0.9")
    return shares


@click.command(cls=Lenient)
@model_option
@click.option("--prompt-sizes", type=_numbers(1), metavar="N,N,..", default="512", help='Prompts to read; "": none.')
@click.option(
    "--depths",
    type=_numbers(0),
    metavar="N,N,..",
    help="Decode behind so many tokens.  [default: 0,512,2048,8192, as the context allows]",
)
@click.option("--reply", type=click.IntRange(2), default=64, help="Tokens decoded a repetition.")
@click.option("--repetitions", type=click.IntRange(1), default=5, help="The median counts.")
@kv_option
@threads_option
@click.option("--parallel", type=_numbers(1), metavar="N,N,..", default="", help="So many replies at once, behind 512.")
@click.option(
    "--draft-accept", type=_shares, metavar="X,X,..", help="Drafts, so many of them right: 0,0.3,0.5,0.7,0.9."
)
@click.option("--vs", metavar="LLAMA-BENCH", help="Run llama.cpp's llama-bench on the same file in turns with ours.")
@click.option("--vs-batched", metavar="LLAMA-BATCHED-BENCH", help="Run that of llama.cpp beside --parallel.")
@click.option("--json", "json_file", metavar="FILE", help="Write all figures there.")
@click.option("--report", metavar="FILE", help="Write them with a description of this machine, for others to read.")
@output_options
def bench(
    model: str | None,
    prompt_sizes: tuple[int, ...],
    depths: tuple[int, ...] | None,
    reply: int,
    repetitions: int,
    kv: str,
    parallel: tuple[int, ...],
    draft_accept: tuple[float, ...] | None,
    vs: str | None,
    vs_batched: str | None,
    json_file: str | None,
    report: str | None,
) -> None:
    """Measure tokens a second, and what bounds them.

    Prompts are read as `generate` reads them. Decoding is measured behind random keys and values, put there without
    running the model: its speed depends on their number alone. Times are warm and medians; greedy sampling is in
    them. With --parallel, tokens of all replies together. With --draft-accept, the assistant beside the model drafts,
    if there is one. With --vs or --vs-batched, half of our repetitions come before the other program and half after it;
    both hold the model in memory.
    """
    from ..loading.assistant import assistant_beside, load_assistant
    from ..measure import bench as b
    from ..measure import draft_bench, llama_bench
    from ..memory import Room

    alone("bench")
    files = {flag: Path(name) for flag, name in (("--json", json_file), ("--report", report)) if name}
    for file in files.values():
        check_target(file)
    others = {"--vs": (vs, "llama-bench"), "--vs-batched": (vs_batched, "llama-batched-bench")}
    for flag, (program, name) in others.items():
        if program and not os.access(program, os.X_OK):
            raise InputError(f"{flag} {program}: no such program; give the path of llama.cpp's {name}")
    if vs_batched and not parallel:
        raise InputError("--vs-batched: nothing to compare; give --parallel 1,2,4,8,16,32 too")
    path = find_model(model)
    for flag, (program, _) in others.items():
        if program and path.is_dir():
            raise InputError(
                f"{flag} {program}: llama.cpp reads GGUF files, and {path} is a folder; give --model FILE.gguf"
            )
    plan = b.BenchPlan(prompt_sizes, b.DEPTHS if depths is None else depths, reply, repetitions, kv, parallel)
    with progress("Loading", 1e9, " GB") as update, progress("Preparing kernels:", 1, "") as prepared:
        subject = b.load_subject(path, update, Room(plan.tokens, kv), prepared)
    context = subject.model.config.context
    if depths is None:
        plan = replace(plan, depths=tuple(d for d in b.DEPTHS if d + reply + 2 <= context))
    plan.check(context)
    echo(f"{path.name} loaded in {subject.load_time:.1f} s")
    copy, cells, llama = b.copy_bandwidth(), b.cells_of(plan), None
    drafts: dict[str, Any] = {}

    def keep() -> dict[str, Any]:
        """Write the figures so far: they remain if this is interrupted."""
        figures = b.result(subject, plan, cells, copy, llama, _command(path, plan, vs, vs_batched, draft_accept))
        figures |= {"drafts": drafts} if drafts else {}
        for flag, file in files.items():
            write_object(file, figures | ({"machine": b.machine()} if flag == "--report" else {}))
        return figures

    first = -(-repetitions // 2) if vs or vs_batched else repetitions
    for cell in b.measure(subject.model, plan, cells, first):
        echo(f"{cell.title}: {cell.rate:.1f} tokens/s")
        keep()
    rows = llama_bench.run(Path(vs), path, plan) if vs else iter(())
    for row in chain(rows, llama_bench.run_batched(Path(vs_batched), path, plan) if vs_batched else ()):
        llama = row.version or llama
        for cell in cells:
            if (cell.kind, cell.context, cell.parallel) == (row.kind, row.context, row.parallel):
                cell.llama_samples, cell.llama_kv_memory = row.samples, row.kv_memory
                cell.llama_prompt_times = [] if row.prompt_time is None else [row.prompt_time]
                echo(f"llama.cpp, {cell.title}: {cell.llama_rate:.1f} tokens/s")
        keep()
    for cell in b.measure(subject.model, plan, cells, repetitions - first) if repetitions > first else ():
        echo(f"{cell.title}, again: {cell.rate:.1f} tokens/s")
    if draft_accept:
        found = assistant_beside(path, subject.model.config)
        assistant = load_assistant(found, subject.model) if found else None
        drafts |= draft_bench.measure_drafts(subject.model, assistant, draft_accept, reply, repetitions, kv)
    for line in chain(b.table(keep()), draft_bench.lines(drafts) if drafts else ()):
        say(line)


def _command(
    path: Path, plan: Any, vs: str | None, vs_batched: str | None, draft_accept: tuple[float, ...] | None
) -> str:
    """Return the command line, paths without their folders: those may tell whose machine this is."""
    words = ["mlx-gemma4", "bench", "--model", path.name]
    words += ["--prompt-sizes", ",".join(map(str, plan.prompts)), "--depths", ",".join(map(str, plan.depths))]
    words += ["--reply", str(plan.reply), "--repetitions", str(plan.repetitions), "--kv", plan.kv]
    words += ["--parallel", ",".join(map(str, plan.parallel))] if plan.parallel else []
    words += ["--draft-accept", ",".join(map(str, draft_accept))] if draft_accept else []
    words += ["--vs", Path(vs).name] if vs else []
    words += ["--vs-batched", Path(vs_batched).name] if vs_batched else []
    return shlex.join(words)
