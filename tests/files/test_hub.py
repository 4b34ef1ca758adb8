"""Models by name, against a server that speaks the hub's protocol: what is chosen, downloaded, gone on with, reused."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, serving
from recorded import HERE

from mlx_gemma4.errors import InputError
from mlx_gemma4.files.hub import resolve
from mlx_gemma4.files.repository import best_projectors, choices, choose

REPO = "ggml-org/gemma-4-E2B-it-GGUF"
BIG = random.Random(0).randbytes(3_000_000)  # what a download that breaks off is about
FILES = {
    "README.md": b"a card",
    "gemma-4-E2B-it-Q4_K_M.gguf": (HERE / "e2b-q4_k_m.gguf").read_bytes(),
    "gemma-4-E2B-it-Q8_0.gguf": BIG,
    "BF16/gemma-4-E2B-it-BF16-00001-of-00002.gguf": BIG[:70_000],
    "BF16/gemma-4-E2B-it-BF16-00002-of-00002.gguf": BIG[70_000:150_000],
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub({REPO: dict(FILES)})) as hub:
        yield hub


class User:
    """Runs commands with a cache of their own, each in a new process."""

    def __init__(self, home: Path, hub: Hub) -> None:
        self.home = home
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        self.env |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "NO_PROXY": "*",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        code = (
            "import mlx_gemma4.files.hub as h; h.WAIT = 0.001; h.TRIES = 3; "
            "from mlx_gemma4.cli.main import main; main()"
        )
        command = [sys.executable, "-c", code, *args]
        return subprocess.run(command, env={**self.env, **env}, capture_output=True, text=True, timeout=300)

    def pull(self, name: str, *flags: str, **env: str) -> Path:
        done = self.run("pull", name, *flags, **env)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert len(lines) == 1
        return Path(lines[0])

    def refused(self, *args: str, **env: str) -> str:
        done = self.run(*args, **env)
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1, done.stderr
        return lines[0]

    def partials(self) -> list[Path]:
        return list(self.home.rglob("*.part"))


@pytest.fixture
def user(tmp_path: Path, hub: Hub) -> User:
    return User(tmp_path / "home", hub)


# What a name means


def test_files_of_a_repository() -> None:
    found = {c.title: c for c in choices([*FILES, "old/x-UD-Q4_K_XL.gguf", "imatrix_unsloth.gguf", "y_q4_0-it.gguf"])}
    assert set(found) == {"Q4_K_M", "Q8_0", "BF16", "UD-Q4_K_XL", "Q4_0"}
    assert [f[-21:] for f in found["BF16"].files] == [
        "BF16-00001-of-00002.gguf"[-21:],
        "BF16-00002-of-00002.gguf"[-21:],
    ]
    assert all(c.complete for c in found.values())
    assert not choices(["m-Q8_0-00002-of-00002.gguf"])[0].complete
    assert choices(["tales.gguf"])[0].title == "tales.gguf"
    assert choices(["m-IQ4_XS.gguf", "m-mxfp4_moe.gguf", "m-Q2_K_L.gguf", "gemma-4-E2B.Q6_K.gguf"])[0].quant == "Q6_K"


@pytest.mark.parametrize(
    ("names", "quant", "file"),
    [
        (["a-Q8_0.gguf", "a-Q4_K_M.gguf", "a-Q4_0.gguf"], "", "a-Q4_K_M.gguf"),
        (["a-Q8_0.gguf", "a-Q2_K.gguf", "a-Q4_0.gguf"], "", "a-Q4_0.gguf"),
        (["a-Q8_0.gguf", "a-Q2_K.gguf"], "", "a-Q8_0.gguf"),
        (["a-IQ3_S.gguf"], "", "a-IQ3_S.gguf"),
        (["a-NVFP4.gguf", "a-TQ1_0.gguf"], "nvfp4", "a-NVFP4.gguf"),
        (["tales.gguf"], "", "tales.gguf"),
        (["a-Q8_0.gguf", "a-q4_k_m.gguf"], "Q4_k_M", "a-q4_k_m.gguf"),
        (["a-Q4_K_M.gguf", "a-UD-Q4_K_XL.gguf"], "q4_k_xl", "a-UD-Q4_K_XL.gguf"),
        (["a-Q4_0.gguf", "a-qat-Q4_0.gguf"], "a-qat-q4_0.gguf", "a-qat-Q4_0.gguf"),
        (["x/a-Q4_0.gguf", "y/a-Q4_0.gguf"], "y/a-Q4_0.gguf", "y/a-Q4_0.gguf"),
    ],
)
def test_choice(names: list[str], quant: str, file: str) -> None:
    assert choose("o/r", names, quant).files == (file,)


@pytest.mark.parametrize(
    ("names", "quant", "says"),
    [
        (["a-Q8_0.gguf", "a-F16.gguf"], "Q5_K_M", "o/r: has no Q5_K_M; take one of F16, Q8_0, as in o/r:F16"),
        (["a-Q5_0.gguf", "a-F16.gguf"], "", "o/r: has several models; take one of F16, Q5_0"),
        (["a-Q4_0.gguf", "a-qat-Q4_0.gguf"], "", "Q4_0 means a-Q4_0.gguf, a-qat-Q4_0.gguf; name one of them"),
        (["a-Q8_0-00001-of-00003.gguf", "a-Q4_0.gguf"], "q8_0", "parts of Q8_0 are missing there; take another: Q4_0"),
        (["README.md", "mmproj-F16.gguf"], "", "o/r: has no GGUF file"),
    ],
)
def test_no_choice(names: list[str], quant: str, says: str) -> None:
    with pytest.raises(InputError) as error:
        choose("o/r", names, quant)
    assert says in str(error.value)


def test_a_path_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of any server."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o" / "r").mkdir(parents=True)
    for name in ("o/r", "o/r/", "model.gguf", "o/model.gguf", "/nowhere/x", "../x/y", "x", "a/b/c"):
        assert resolve(name) == Path(name)
    assert resolve(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/o/model.gguf") == tmp_path / "o" / "model.gguf"


# Downloading


def test_pull_and_run(hub: Hub, user: User) -> None:
    """By default Q4_K_M; then it answers a prompt by the same name, and nothing more is asked of the hub."""
    path = user.pull(REPO)
    assert path.name == "gemma-4-E2B-it-Q4_K_M.gguf"
    assert path.read_bytes() == FILES[path.name]
    asked = len(hub.log)
    for name in (REPO, f"{REPO}:q4_k_m", str(path)):
        done = user.run("generate", "-m", name, "-p", "the", "-n", "1", "--json")
        assert done.returncode == 0, done.stderr
        assert path.name in done.stdout
    assert len(hub.log) == asked
    assert not user.partials()


def test_the_assistant_of_a_repository_comes_along(hub: Hub, user: User) -> None:
    """Once, that of the same name and in Q8_0; a damaged one, or one of another model, is no reason to fail."""
    own = "MTP/mtp-gemma-4-E2B-it-Q8_0.gguf"
    hub.repos[REPO] |= {own: b"GGUF: none", "MTP/mtp-gemma-4-E2B-it-BF16.gguf": b"too", "mtp-other.gguf": b"three"}
    path = user.pull(REPO)
    assert path.name == "gemma-4-E2B-it-Q4_K_M.gguf"
    assert (path.parent / own).read_bytes() == b"GGUF: none"
    assert len(hub.downloads()) == 2
    done = user.run("generate", "-m", REPO, "-p", "the", "-n", "1")
    assert done.returncode == 0, done.stderr
    assert len(hub.downloads()) == 2


def test_the_projector_of_a_repository_comes_along(hub: Hub, user: User) -> None:
    """Once, the smallest of at least 16 bits; a damaged one is no reason to fail, --no-mmproj or not."""
    hub.repos[REPO] |= {f"mmproj-gemma-4-E2B-it-{t}.gguf": t.encode() for t in ("Q8_0", "F32", "F16", "BF16")}
    path = user.pull(REPO)
    assert path.name == "gemma-4-E2B-it-Q4_K_M.gguf"
    assert [p.name for p in path.parent.glob("mmproj*")] == ["mmproj-gemma-4-E2B-it-BF16.gguf"]
    for flags in ((), ("--no-mmproj",)):
        done = user.run("generate", "-m", REPO, "-p", "the", "-n", "1", *flags)
        assert done.returncode == 0, done.stderr
    assert len(hub.downloads()) == 2


@pytest.mark.parametrize(
    ("files", "model", "best"),
    [
        (["mmproj-F16.gguf", "mmproj-BF16.gguf", "mmproj-Q8_0.gguf"], "m-Q4_0.gguf", "mmproj-BF16.gguf"),
        (["mmproj-Q8_0.gguf", "mmproj-F32.gguf"], "m-Q4_0.gguf", "mmproj-F32.gguf"),
        (["mmproj-model-f16.gguf", "x.gguf"], "m-Q4_0.gguf", "mmproj-model-f16.gguf"),
        (["mmproj-a-Q8_0.gguf", "mmproj-a-BF16.gguf", "mmproj-b-BF16.gguf"], "b-Q8_0.gguf", "mmproj-b-BF16.gguf"),
        (["q/a-mmproj.gguf"], "a-Q8_0.gguf", "q/a-mmproj.gguf"),
    ],
)
def test_the_best_projector(files: list[str], model: str, best: str) -> None:
    assert best_projectors(files, model)[0] == best


def test_model_of_a_command_is_downloaded(hub: Hub, user: User) -> None:
    done = user.run("generate", "-m", f"{REPO}:Q4_K_M", "-p", "the", "-n", "1")
    assert done.returncode == 0, done.stderr
    assert len(hub.downloads()) == 1


def test_split(hub: Hub, user: User) -> None:
    """All parts in one folder; the first one's path; offline only once all are there."""
    hub.cuts = [70_000, 0, 0, 0, 0]  # the first part comes through, the second doesn't
    assert "goes on where it stopped" in user.refused("pull", f"{REPO}:bf16")
    assert "can't be downloaded now" in user.refused("pull", f"{REPO}:bf16", HF_HUB_OFFLINE="1")
    hub.cuts = []
    path = user.pull(f"{REPO}:bf16")
    names = sorted(name for name in FILES if "BF16" in name)
    assert [(path.parent / Path(name).name).read_bytes() for name in names] == [FILES[name] for name in names]
    assert path.name == Path(names[0]).name
    assert user.pull(f"{REPO}:bf16", HF_HUB_OFFLINE="1") == path


def test_broken_connections(hub: Hub, user: User) -> None:
    """Goes on from the byte where each broke, in one process."""
    hub.cuts = [1_000_000, 0, 500_000, 1_000_000]
    path = user.pull(f"{REPO}:Q8_0")
    assert path.read_bytes() == BIG
    starts = [int(line.split("bytes=")[1][:-1]) if "bytes=" in line else 0 for line in hub.downloads()]
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert 500_000 < starts[1] == starts[2] < starts[3] < starts[4] <= 2_500_000


def test_goes_on_in_another_process(hub: Hub, user: User) -> None:
    """Bytes that came before the program ended are not sent again, and are checked."""
    hub.cuts = [2_000_000, 0, 0, 0, 0]
    assert "goes on where it stopped" in user.refused("pull", f"{REPO}:Q8_0")
    held = user.partials()[0].stat().st_size
    assert 1_500_000 < held <= 2_000_000
    hub.cuts, hub.log[:] = [], []
    done = user.run("pull", f"{REPO}:Q8_0")
    assert "Going on from 0.00 of 0.00 GB" in done.stderr
    assert [line.split()[-1] for line in hub.downloads()] == [f"bytes={held}-"]
    assert Path(done.stdout.strip()).read_bytes() == BIG
    assert not user.partials()


def test_server_without_ranges(hub: Hub, user: User) -> None:
    hub.cuts, hub.ranges = [1_000_000], False
    assert user.pull(f"{REPO}:Q8_0").read_bytes() == BIG
    assert len(hub.downloads()) == 2


def test_damaged_on_its_way(hub: Hub, user: User) -> None:
    """Refused by its hash, and not gone on from."""
    hub.damage = True
    assert "was damaged on its way" in user.refused("pull", f"{REPO}:Q8_0")
    assert not user.partials()
    assert not [p for p in user.home.rglob("*") if p.is_file() and p.stat().st_size > 100_000]
    hub.damage = False
    assert user.pull(f"{REPO}:Q8_0").read_bytes() == BIG


def test_damaged_while_it_lay_here(hub: Hub, user: User) -> None:
    hub.cuts = [2_000_000, 0, 0, 0, 0]
    user.refused("pull", f"{REPO}:Q8_0")
    partial = user.partials()[0]
    partial.write_bytes(b"x" * 1000 + partial.read_bytes()[1000:])
    hub.cuts = []
    done = user.run("pull", f"{REPO}:Q8_0")
    assert done.returncode == 2
    assert "was damaged" in done.stderr
    assert user.pull(f"{REPO}:Q8_0").read_bytes() == BIG


def test_newer_version(hub: Hub, user: User) -> None:
    """`pull` takes it, `--model` doesn't: no surprise of some gigabytes."""
    old = user.pull(f"{REPO}:Q4_K_M")
    hub.repos[REPO]["gemma-4-E2B-it-Q4_K_M.gguf"] = (HERE / "e2b-q4_0.gguf").read_bytes()
    done = user.run("generate", "-m", f"{REPO}:Q4_K_M", "-p", "the", "-n", "1", "--json")
    assert str(old) in done.stdout
    new = user.pull(f"{REPO}:Q4_K_M")
    assert new != old
    assert new.read_bytes() == hub.repos[REPO]["gemma-4-E2B-it-Q4_K_M.gguf"]


def test_offline(hub: Hub, user: User) -> None:
    """Cached models load without a network, also by the repository's bare name; others give an error of one line."""
    path = user.pull(f"{REPO}:Q8_0")
    assert user.pull(f"{REPO}:q8_0", HF_HUB_OFFLINE="1") == path
    line = user.refused("pull", f"{REPO}:Q4_K_M", HF_HUB_OFFLINE="1")
    assert "isn't here whole and can't be downloaded now; unset HF_HUB_OFFLINE" in line
    gone = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = user.run("pull", REPO, **gone)  # not what the hub would choose, but here
    assert Path(done.stdout.strip()) == path
    assert "can't be reached" in done.stderr
    assert "Taking what is here: gemma-4-E2B-it-Q8_0.gguf" in done.stderr
    assert "http://127.0.0.1:9 can't be reached" in user.refused("pull", f"{REPO}:Q4_K_M", **gone)


def test_gated(hub: Hub, user: User) -> None:
    """The error tells how to log in, a token helps, and it goes to the hub alone."""
    hub.gated.add(REPO)
    line = user.refused("pull", f"{REPO}:Q8_0")
    assert "is gated; accept its terms at" in line
    assert "`hf auth login` or set HF_TOKEN" in line
    assert user.pull(f"{REPO}:Q8_0", HF_TOKEN="hf_good").read_bytes() == BIG


def test_refusals(hub: Hub, user: User) -> None:
    for name in ("nobody/nothing", "nobody/nothing:Q4_0"):
        line = user.refused("generate", "-p", "x", "-m", name)
        assert "nobody/nothing: neither a path here nor a repository that" in line
    assert "take one of BF16, Q4_K_M, Q8_0" in user.refused("pull", f"{REPO}:Q5_K_M")
    assert "no name of a repository" in user.refused("pull", "gemma")
    assert "no name of a repository" in user.refused("pull", "a..b/c")
    assert hub.downloads() == []


@pytest.mark.parametrize("status", [403, 404, 429, 500, 503])
def test_server_out_of_order(hub: Hub, user: User, status: int) -> None:
    hub.status = status
    line = user.refused("pull", f"{REPO}:Q8_0")
    assert line.startswith(f"mlx-gemma4: {REPO}: ")
    assert str(status) in line


def test_no_room(hub: Hub, user: User) -> None:
    code = (
        "import shutil, collections; shutil.disk_usage = lambda p: collections.namedtuple('U', 'free')(1000)\n"
        "from mlx_gemma4.cli.main import main; main()"
    )
    args = [sys.executable, "-c", code, "pull", f"{REPO}:Q8_0"]
    done = subprocess.run(args, env=user.env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert "needs 0.0 GB of disk" in done.stderr
    assert "set HF_HOME" in done.stderr


def test_folder_of_safetensors(hub: Hub, user: User) -> None:
    """A repository without GGUF files gives its folder, which loads; half of one is not taken for it."""
    read = [p for p in (HERE / "folders" / "e2b-mlx4").iterdir() if p.name not in ("logits.npz", "recorded.json")]
    hub.repos["mlx-community/e2b"] = {p.name: p.read_bytes() for p in read} | {"README.md": b"x", "model.bin": b"y"}
    hub.cuts = [100, 0, 0, 0, 0]
    user.refused("pull", "mlx-community/e2b")
    hub.cuts = []
    path = user.pull("mlx-community/e2b")
    assert path.is_dir()
    assert {p.name for p in path.iterdir()} == {p.name for p in read}
    asked = len(hub.log)
    done = user.run("generate", "-m", "mlx-community/e2b", "-p", "the", "-n", "1")
    assert done.returncode == 0, done.stderr
    assert len(hub.log) == asked


def test_large_files_are_named_by_their_hash(hub: Hub, user: User) -> None:
    """The cache stays what huggingface_hub makes of it, so that other programs share it."""
    path = user.pull(f"{REPO}:Q8_0")
    assert path.resolve().name == hashlib.sha256(BIG).hexdigest()
    code = f"import huggingface_hub as h; print(h.hf_hub_download({REPO!r}, 'gemma-4-E2B-it-Q8_0.gguf'))"
    before = len(hub.downloads())
    done = subprocess.run([sys.executable, "-c", code], env=user.env, capture_output=True, text=True, timeout=60)
    assert Path(done.stdout.strip()) == path, done.stderr
    assert len(hub.downloads()) == before


@pytest.mark.slow
def test_list_and_rm(user: User, hub: Hub) -> None:
    """What pull brought, by name; deleted with all versions' files, and with the last model the rest."""
    assert "No models in" in user.run("list").stderr
    user.pull(f"{REPO}:Q4_K_M")
    hub.repos[REPO]["gemma-4-E2B-it-Q4_K_M.gguf"] = (HERE / "e2b-q8_0.gguf").read_bytes()  # a newer version
    newer = user.pull(f"{REPO}:Q4_K_M")
    hub.repos["somebody/llama"] = {"llama-Q8_0.gguf": b"GGUF of something else"}
    user.pull("somebody/llama")
    done = user.run("list")
    (line,) = done.stdout.splitlines()
    assert line.split()[:4] == [f"{REPO}:Q4_K_M", "0.00", "GB", "Q4_K_M"] and done.stderr == ""
    assert len(list(user.home.rglob("gemma-4-E2B-it-Q4_K_M.gguf"))) == 2  # in either version

    assert "names no model" in user.refused("rm", "gemma-4-E4B-it-GGUF")
    kept = user.run("rm", REPO)  # asks, and nobody answers
    assert kept.returncode == 1 and newer.exists()
    assert user.run("rm", REPO, "--yes").stderr.strip() == f"Deleted {REPO}:Q4_K_M"
    assert [home.name for home in user.home.glob("hub/models--*")] == ["models--somebody--llama"]
    assert user.run("rm", "llama", "-y").returncode == 0
    assert not list(user.home.glob("hub/models--*"))


@pytest.mark.slow
def test_rm_of_one_of_several_and_of_what_broke_off(user: User, hub: Hub) -> None:
    user.pull(f"{REPO}:Q4_K_M")
    split = user.pull(f"{REPO}:BF16")
    assert "names no model" in user.refused("rm", REPO, "-y")  # which?
    assert user.run("rm", f"{REPO}:bf16", "-y").returncode == 0
    assert not split.parent.exists() and not split.resolve().exists()
    hub.cuts = [1_000_000] * 9
    hub.ranges = False
    assert user.run("pull", f"{REPO}:Q8_0").returncode != 0
    assert len(user.partials()) == 1 and "broken off" in user.run("list").stdout
    assert user.run("rm", f"{REPO}:q4_k_m", "-y").returncode == 0
    assert user.run("rm", "gemma-4-E2B-it-GGUF", "-y").returncode == 0
    assert not user.partials()
