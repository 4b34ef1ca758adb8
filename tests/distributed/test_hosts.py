"""Ranks as people start them: under mlx.launch, by --hosts, and hosts read, checked and sent what they lack."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click.testing
import pytest
from once import once
from ranked import LAUNCHED
from recorded import HERE

from mlx_gemma4.cli.main import main
from mlx_gemma4.distributed.hosts import free_port, read_hosts
from mlx_gemma4.distributed.place import Place, placed
from mlx_gemma4.distributed.team import digest
from mlx_gemma4.errors import InputError

LAUNCH = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--backend", "ring", "--python", sys.executable]
ASKED = ["generate", "-p", "Once upon a time", "-n", "12", "--temperature", "0"]
SPLIT = ["--split", "tensor"]
LOCAL = "127.0.0.1,localhost"


def run(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, env={**os.environ, **env}
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    said: str = once(tmp_path_factory, "asked", lambda folder: run([*LAUNCHED, *ASKED]).stdout)
    return said


@pytest.mark.slow
def test_under_mlx_launch_rank_0_alone_prints(alone: str) -> None:
    done = run([*LAUNCH, "-p", str(free_port(read_hosts(LOCAL))), "--", *LAUNCHED[1:], *ASKED, *SPLIT])
    assert done.stdout == alone != ""
    assert done.stderr.count("Reply: 12 tokens") == 1


@pytest.mark.slow
def test_hosts_start_the_others_and_leave_none(alone: str, tmp_path: Path) -> None:
    state = ["--state", str(tmp_path / "talk.kv")]
    done = run([*LAUNCHED, *ASKED, *SPLIT, *state, "--hosts", LOCAL], MARK=str(tmp_path))
    assert done.stdout == alone
    assert (tmp_path / "talk.kv.rank1").is_file()
    more = run([*LAUNCHED, *ASKED, *SPLIT, *state, "--hosts", LOCAL], MARK=str(tmp_path))
    assert more.returncode == 0
    assert more.stdout not in ("", alone)  # it went on
    end = time.monotonic() + 60  # the others end by themselves once rank 0 has gone
    while (left := marked(f"MARK={tmp_path}")) and time.monotonic() < end:
        time.sleep(0.2)
    assert not left


def marked(text: str) -> list[Path]:
    """Processes with a text in their environment, where /proc tells."""
    return [path for path in Path("/proc").glob("[0-9]*/environ") if text.encode() in read(path)]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
def test_chat_in_a_pipe() -> None:
    command = [*LAUNCHED, "chat", "-n", "8", "--temperature", "0"]
    said = "Tell me of a fox.\nAnd then?\n"
    one, two = (
        subprocess.run([*command, *more], input=said, capture_output=True, text=True, timeout=300)
        for more in ([], ["--hosts", LOCAL, *SPLIT])
    )
    assert one.stdout == two.stdout != ""


@pytest.mark.slow
def test_a_rank_that_does_not_start() -> None:
    done = run([*LAUNCHED, *ASKED, "--hosts", "127.0.0.1,nobody.invalid"])
    assert (done.returncode, done.stdout) == (2, "")
    assert "nobody.invalid: no such host" in done.stderr
    fails = run([*LAUNCHED, *ASKED, "--hosts", "127.0.0.1,127.0.0.2"], PATH=str(HERE))  # no ssh there
    assert fails.returncode == 1
    assert "127.0.0.2: its rank did not start" in fails.stderr


SSH = """#!/bin/sh
# ssh to a machine whose home is another folder of this one
for last; do :; done
HOME={home} exec bash -c "$last"
"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> dict[str, str]:
    """An environment in which ssh gets to this machine, with another home."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text(SSH.format(home=tmp_path / "there"))
    ssh.chmod(ssh.stat().st_mode | stat.S_IXUSR)
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path / "here")}


@pytest.mark.slow
def test_check_sends_the_model_and_tries_the_link(tmp_path: Path, elsewhere: dict[str, str]) -> None:
    model = tmp_path / "here" / "models" / "small model.gguf"
    model.parent.mkdir()
    shutil.copy(HERE / "31b-q4_0.gguf", model)
    (tmp_path / "hosts.json").write_text(
        json.dumps({"hosts": [{"ssh": "a.local", "ips": ["127.0.0.1"]}, {"ssh": "b.local", "ips": ["127.0.0.1"]}]})
    )
    check = [*LAUNCHED, "hosts", "check", str(tmp_path / "hosts.json"), "-m", str(model)]
    done = run(check, **elsewhere)
    assert done.returncode == 0, done.stderr
    b, a, link = done.stdout.splitlines()
    assert a.startswith("a.local: ok: Python ")
    assert b == a.replace("a.local", "b.local")
    assert "the same model" in a
    assert link.startswith("link of 2 over ring: ")
    sent = tmp_path / "there" / "models" / "small model.gguf"
    assert sent.read_bytes() == model.read_bytes()

    sent.write_bytes((HERE / "31b-q8_0.gguf").read_bytes())
    done = run(check, **elsewhere)
    assert done.returncode == 2
    assert "b.local: ~/models/small model.gguf is another file there" in done.stdout
    assert sent.read_bytes() == (HERE / "31b-q8_0.gguf").read_bytes()  # nothing is overwritten


@pytest.mark.parametrize(
    ("script", "wrong"),
    [
        ("#!/bin/sh\necho 'Permission denied (publickey).' >&2\nexit 255\n", "ssh fails (Permission denied"),
        ("#!/bin/sh\necho 'No module named mlx_gemma4' >&2\nexit 1\n", "has no mlx-gemma4 that runs (No module"),
        (
            """#!/bin/sh\necho '{"mlx-gemma4": "0.1.0", "mlx": "0.1", "python": "3", "backends": []}'\n""",
            "mlx-gemma4 is 0.1.0 there and",
        ),
    ],
)
def test_check_says_what_is_wrong(
    script: str, wrong: str, tmp_path: Path, elsewhere: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin" / "ssh").write_text(script)
    monkeypatch.setenv("PATH", elsewhere["PATH"])
    done = click.testing.CliRunner().invoke(main, ["hosts", "check", "127.0.0.1,127.0.0.2"])
    assert done.exit_code == 2
    lines = done.output.splitlines()
    assert lines[0].startswith("127.0.0.2: ")
    assert wrong in lines[0]
    assert lines[1].startswith("127.0.0.1: ok: ")
    assert "mlx-gemma4: 127.0.0.2: not ready" in lines[2]


def test_digests_tell_files_apart(tmp_path: Path) -> None:
    """A digest tells files apart by size, beginning, or any piece of 64 KB."""
    model = tmp_path / "a.gguf"
    model.write_bytes((HERE / "31b-q4_0.gguf").read_bytes())
    before = digest(model)
    with model.open("r+b") as file:
        file.seek(-9, 2)
        file.write(b"x")
    assert digest(model) != before == digest(HERE / "31b-q4_0.gguf")


def test_hosts_from_names_and_files(tmp_path: Path) -> None:
    hosts = read_hosts(LOCAL)
    assert (hosts.names, hosts.ips, hosts.backend) == (["127.0.0.1"] * 2, [["127.0.0.1"]] * 2, "ring")
    file = tmp_path / "hosts.json"
    rows = [{"ssh": "a", "ips": ["10.0.0.1"], "rdma": [None, "rdma_en2"]}, {"ssh": "b", "ips": ["10.0.0.2"]}]
    file.write_text(json.dumps({"backend": "jaccl", "envs": ["A=1"], "hosts": rows}))
    hosts = read_hosts(str(file))
    assert (hosts.names, hosts.backend, hosts.envs) == (["a", "b"], "jaccl", ["A=1"])
    assert hosts.rdma == [[None, "rdma_en2"], []]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("127.0.0.1", "two hosts or more"),
        ("127.0.0.1,-oProxyCommand=x", "two hosts|no such host"),
        ("{}", "hostfile of MLX's"),
        ('{"backend": "mpi", "hosts": [{"ssh": "127.0.0.1"}, {"ssh": "127.0.0.1"}]}', "backend mpi"),
        ('{"hosts": [{"ssh": "127.0.0.1"}, {"ssh": "a; rm -rf /", "ips": ["127.0.0.1"]}]}', "two hosts"),
    ],
)
def test_hosts_that_cannot_be(text: str, wrong: str, tmp_path: Path) -> None:
    if text.startswith("{"):
        (tmp_path / "hosts.json").write_text(text)
        text = str(tmp_path / "hosts.json")
    with pytest.raises(InputError, match=wrong):
        read_hosts(text)


@pytest.mark.parametrize(
    ("env", "nodes", "place"),
    [
        ({}, None, None),
        ({"MLX_RANK": "0"}, None, None),
        ({"MLX_RANK": "0", "MLX_HOSTFILE": "{file}"}, "", None),
        (
            {"MLX_RANK": "1", "MLX_HOSTFILE": "{file}"},
            [["10.0.0.1:32"], ["10.0.0.2:33"]],
            (1, 2, "ring", "10.0.0.1", 34),
        ),
        (
            {"MLX_RANK": "1", "MLX_IBV_DEVICES": "{file}", "MLX_JACCL_COORDINATOR": "10.0.0.1:5"},
            [[None, "a"], ["b", None]],
            (1, 2, "jaccl", "10.0.0.1", 6),
        ),
        (
            {"MLX_RANK": "2", "MLX_WORLD_SIZE": "4", "NCCL_HOST_IP": "10.0.0.1", "NCCL_PORT": "7"},
            None,
            (2, 4, "nccl", "10.0.0.1", 8),
        ),
    ],
)
def test_place(env: dict[str, str], nodes: Any, place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "nodes.json"
    file.write_text(nodes if isinstance(nodes, str) else json.dumps(nodes))
    for name, value in env.items():
        monkeypatch.setenv(name, value.format(file=file))
    assert placed() == (place and Place(*place))


@pytest.mark.parametrize("command", ["bench", "tune"])
def test_what_measures_one_machine(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ring.json").write_text('[["10.0.0.1:5"], ["10.0.0.2:5"]]')
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "ring.json"))
    done = click.testing.CliRunner().invoke(main, [command])
    assert done.exit_code == 2
    assert done.stderr == f"mlx-gemma4: {command} measures one machine; start it there without mlx.launch\n"


def test_place_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", "/nowhere")
    with pytest.raises(InputError, match=r"mlx\.launch"):
        placed()
