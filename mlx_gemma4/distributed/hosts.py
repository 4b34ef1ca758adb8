"""The machines that run a model together: read from names or a hostfile of MLX's, and their ranks started.

In: `a.local,b.local`, or a file. Out: this process as rank 0, in its own terminal, and the others started by
`mlx.launch` (ssh), which ends when they have joined; from then on the link (link.py) is what keeps them.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from .link import end_with

HERE = "127.0.0.1"  # mlx.launch starts ranks there without ssh


class Hosts(NamedTuple):
    """What a hostfile of MLX's says; the first host is this machine."""

    names: list[str]  # for ssh
    ips: list[list[str]]  # of each, those of the interfaces that MLX's link goes over
    rdma: list[list[Any]]  # of each, its device towards each other: JACCL's
    backend: str
    envs: list[str]


def read_hosts(text: str) -> Hosts:
    """Return hosts from names with commas between, or from a hostfile. Raises InputError."""
    path = Path(text).expanduser()
    if "," in text or not (path.suffix == ".json" or path.is_file()):
        names = [HERE if name == "localhost" else name for name in text.split(",")]
        return _checked(Hosts(names, [[_ip(name)] for name in names], [[] for _ in names], "ring", []), "--hosts")
    try:
        held = json.loads(path.read_text())
        held = held if isinstance(held, dict) else {"hosts": held}
        rows = held["hosts"]
        names, ips = [str(row["ssh"]) for row in rows], [[*row.get("ips", [])] for row in rows]
        ips = [given or [_ip(name)] for name, given in zip(names, ips, strict=True)]
        rdma = [[*row.get("rdma", [])] for row in rows]
        hosts = Hosts(names, ips, rdma, held.get("backend") or "ring", [*held.get("envs", [])])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: can't be read as a hostfile of MLX's ({error}); mlx.distributed_config makes one"
        ) from error
    return _checked(hosts, str(path))


def _checked(hosts: Hosts, what: str) -> Hosts:
    if len(hosts.names) < 2 or not all(re.fullmatch(r"[\w.@:%][\w.@:%-]*", name) for name in hosts.names):
        raise InputError(f"{what}: takes two hosts or more, this one first, as in a.local,b.local")
    if hosts.backend not in ("ring", "jaccl"):
        raise InputError(f"{what}: backend {hosts.backend} isn't one for Macs; take ring or jaccl")
    return hosts


def _ip(name: str) -> str:
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0])
    except OSError as error:
        raise InputError(f"{name}: no such host ({error}); name it as ssh does, or by its address") from error


def free_port(hosts: Hosts) -> int:
    """Return a port of this machine's address, free with the ones behind it that MLX gives the others here."""
    address = hosts.ips[0][0]
    try:
        while True:
            with socket.create_server((address, 0)) as first:
                port: int = first.getsockname()[1]
                for i in range(1, sum(map(len, hosts.ips)) + 1):
                    with socket.create_server((address, port + i)):
                        pass
            return port
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno not in (None, 98, 48, 13):  # else taken: try others
            raise InputError(f"{hosts.names[0]} ({address}) is not this machine; name this one first") from error
        return free_port(hosts)


def start(hosts: Hosts) -> None:
    """Make this process rank 0, and start the others. `place.placed` says so from now on."""
    port, folder = free_port(hosts), Path(tempfile.mkdtemp(prefix="mlx-gemma4-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ |= {"MLX_RANK": "0"} | dict(env.split("=", 1) for env in hosts.envs if "=" in env)
    if hosts.backend == "jaccl":
        os.environ["MLX_JACCL_COORDINATOR"] = f"{hosts.ips[0][0]}:{port}"
        os.environ["MLX_IBV_DEVICES"] = _written(folder / "devices.json", hosts.rdma)
    else:
        ports = iter(range(port, port + 1000))  # as mlx.launch counts them
        ring = [[f"{ip}:{next(ports)}" for ip in ips] for ips in hosts.ips]
        os.environ["MLX_HOSTFILE"] = _written(folder / "ring.json", ring)
    # mlx.launch starts a rank 0 too, here, which ends at once: this process is rank 0.
    rows = [
        {"ssh": n, "ips": i, "rdma": r} for n, i, r in zip([HERE, *hosts.names[1:]], hosts.ips, hosts.rdma, strict=True)
    ]
    given = {"backend": hosts.backend, "envs": hosts.envs, "hosts": rows}
    command = [
        str(Path(sys.executable).with_name("mlx.launch")),
        *("--hostfile", _written(folder / "hosts.json", given), "--starting-port", str(port)),
        *("--python", sys.executable, "--", "-m", "mlx_gemma4", "follow"),
    ]
    try:
        launcher = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    except OSError as error:
        raise InputError(f"{command[0]}: can't be run ({error}); pip install mlx brings it") from error
    threading.Thread(target=_watch, args=(launcher, hosts), daemon=True).start()


def _written(path: Path, value: Any) -> str:
    path.write_text(json.dumps(value))
    return str(path)


def _watch(launcher: subprocess.Popen[str], hosts: Hosts) -> None:
    """End this process if a rank could not be started."""
    said = launcher.communicate()[1]
    if failed := re.search(r"rank (\d+) (?:exited|was killed)", said):
        lines = [line for line in said.splitlines() if line.strip() and "[WARN]" not in line]
        why = lines[-1].removeprefix("mlx-gemma4: ") if lines else "it said nothing"
        name = hosts.names[int(failed[1])]
        end_with(f"{name}: its rank did not start: {why} (mlx-gemma4 hosts check tells more)")


def detached(command: list[str]) -> int:
    """Start a follower that outlives mlx.launch; return 0 when it has joined, and its exit code if it ends before."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdout is not None
    child.stdout.read()  # until it lets go of it
    try:
        return child.wait(1)
    except subprocess.TimeoutExpired:
        return 0


def let_go() -> None:
    """Let go of what this process was started with: its output, and with it mlx.launch."""
    with open(os.devnull, "r+b") as nothing:
        for fd in (1, 2):
            os.dup2(nothing.fileno(), fd)
