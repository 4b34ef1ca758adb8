"""`mlx-gemma4 hosts check`: are several machines ready to run a model together? And the commands that they run."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InputError
from .options import Lenient, find_model, model_option, output_options, progress, say

if TYPE_CHECKING:
    from ..distributed.hosts import Hosts

COPIED = 1 << 20  # bytes at a time


@click.group()
def hosts() -> None:
    """Check several Macs that are to run one model together."""


@hosts.command(cls=Lenient)
@click.argument("hosts", metavar="FILE|A,B")
@model_option
@output_options
def check(hosts: str, model: str | None) -> None:
    """Try everything that running on several machines takes: ssh, Python, versions, the model's file, the link.

    Prints a line for each machine. With --model, a machine that lacks the file is sent it.
    """
    from ..distributed.hosts import read_hosts

    given = read_hosts(hosts)
    path = None if model is None else find_model(model)
    mine = examined("" if path is None else str(path))
    wrong = [name for rank, name in enumerate(given.names) if rank and not _check(name, given, mine, path)]
    say(f"{given.names[0]}: {_described(mine)}")
    if wrong:
        raise InputError(f"{', '.join(wrong)}: not ready, for the reasons above")
    link = _try_link(given)
    say(f"link of {len(given.names)} over {given.backend}: {link}")


def _check(name: str, given: Hosts, mine: dict[str, Any], path: Path | None) -> bool:
    """Print how a machine is; return True if it is ready."""
    from ..distributed.team import portable

    there = portable(path) if path else ""
    try:
        theirs = _ask(name, there)
        if path and theirs["hash"] is None:
            _send(name, path, there)
            theirs = _ask(name, there)
        for what in ("mlx-gemma4", "mlx"):
            if theirs[what] != mine[what]:
                raise InputError(f"{what} is {theirs[what]} there and {mine[what]} here; install the same")
        if theirs["hash"] != mine["hash"]:
            raise InputError(f"{there} is another file there; move it away, and this command sends this one")
        if given.backend not in theirs["backends"]:
            raise InputError(f"MLX has no {given.backend} there (rdma_ctl enable in Recovery, macOS 26.2); take ring")
    except InputError as error:
        say(f"{name}: {error}")
        return False
    say(f"{name}: {_described(theirs)}")
    return True


def _described(found: dict[str, Any]) -> str:
    same = f", the same model ({found['hash'][:12]})" if found["hash"] else ""
    return f"ok: Python {found['python']}, mlx-gemma4 {found['mlx-gemma4']}, mlx {found['mlx']}{same}"


def _there(name: str, command: str) -> list[str]:
    from ..distributed.hosts import HERE

    shell = ["bash", "-c", command]
    return shell if name == HERE else ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", name, shlex.join(shell)]


def _ask(name: str, model: str) -> dict[str, Any]:
    """Return what `examined` finds on a machine. Raises InputError."""
    command = shlex.join([sys.executable, "-m", "mlx_gemma4", "probe", model])
    done = subprocess.run(_there(name, command), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        said = [*done.stderr.strip().splitlines(), "no answer"][-1 if not done.stderr.strip() else -2]
        if done.returncode == 255:
            raise InputError(f"ssh fails ({said}); let ssh {name} work without a password") from None
        raise InputError(f"{sys.executable} there has no mlx-gemma4 that runs ({said}); install it there") from None
    return found


def _send(name: str, path: Path, there: str) -> None:
    """Copy a model's files to a machine that lacks them, each whole or not at all. Raises InputError."""
    from ..distributed.team import files_of, portable

    files = files_of(path)
    total, done = sum(file.stat().st_size for file in files), 0
    with progress(f"Sending to {name}:", 1e9, " GB") as update:
        for file in files:
            goal = portable(file)
            goal = f'"$HOME"/{shlex.quote(goal[2:])}' if goal.startswith("~/") else shlex.quote(goal)
            command = f"mkdir -p $(dirname {goal}) && cat > {goal}.part && mv {goal}.part {goal}"
            copying = subprocess.Popen(_there(name, command), stdin=subprocess.PIPE, stderr=subprocess.PIPE)
            assert copying.stdin is not None and copying.stderr is not None
            try:
                with file.open("rb") as source, copying.stdin as out:
                    while block := source.read(COPIED):
                        out.write(block)
                        done += len(block)
                        update(done, total)
            except BrokenPipeError:
                pass
            if copying.wait():
                raise InputError(f"{there} can't be sent there ({copying.stderr.read().decode().strip()[-200:]})")


def _try_link(given: Hosts) -> str:
    """Start a rank on each machine, and measure sums over all of them."""
    from ..distributed.hosts import start
    from ..distributed.link import Leader
    from ..distributed.place import placed
    from ..distributed.split import measure_link

    start(given)
    place = placed()
    assert place is not None
    leader = Leader(place)
    leader.tell("measure")
    link = measure_link(leader.group)
    leader.close()
    return str(link)


def examined(model: str) -> dict[str, Any]:
    """Return what must be the same on all machines, and what MLX has here; of a model's files, a hash of all bytes."""
    import mlx.core as mx

    from ..distributed.link import about
    from ..distributed.team import files_of

    hashed, path = None, Path(model).expanduser()
    if model and path.exists():
        digest = sha256()
        for file in files_of(path):
            with file.open("rb") as opened:
                while block := opened.read(COPIED):
                    digest.update(block)
        hashed = digest.hexdigest()
    backends = [name for name in ("ring", "jaccl") if mx.distributed.is_available(name)]
    return {**about(), "python": platform.python_version(), "backends": backends, "hash": hashed}


@click.command(hidden=True)
@click.argument("model", default="")
def probe(model: str) -> None:
    """Print what `hosts check` asks of each machine."""
    say(json.dumps(examined(model)))


@click.command(hidden=True)
@click.option("--stay", is_flag=True)
def follow(stay: bool) -> None:
    """Be one of several ranks, as `--hosts` starts them through mlx.launch."""
    from ..distributed.hosts import detached, let_go
    from ..distributed.place import placed

    if os.environ.get("MLX_RANK") == "0":  # who asked for the others
        return
    if not stay:
        sys.exit(detached([sys.executable, "-m", "mlx_gemma4", "follow", "--stay"]))
    from ..conversation import language_model

    place = placed()
    if place is None:
        raise InputError("follow is what --hosts runs on other machines; give --hosts to generate, chat or serve")
    language_model.follow(place, let_go)
