"""A model in parts, in two and in four processes over MLX's ring on the loopback: the numbers of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from once import once
from recorded import KINDS

from mlx_gemma4.doctor.published import PUBLISHED

pytestmark = [pytest.mark.slow, pytest.mark.sim]

ROOT = Path(__file__).parents[2]
LIMIT = 1800  # seconds: far more than an idle machine needs
TOGETHER = (  # checks that one pair of processes makes
    ("fixtures", "quantized", "folders", "memory", "long", "replayed", "assistants"),
    ("demo",),
    ("kernels", "traced", "shared"),
)
Two = Callable[[str], Any]


def run(size: int, folder: Path, *checks: str) -> Any:
    """What rank 0 of so many processes of part_checks.py found."""
    with ExitStack() as held:
        ports = [held.enter_context(socket.socket()) for _ in range(size)]
        for port in ports:
            port.bind(("127.0.0.1", 0))
        hosts = [[f"127.0.0.1:{port.getsockname()[1]}"] for port in ports]
    (folder / "hosts.json").write_text(json.dumps(hosts))
    script, out = ROOT / "tests" / "part_checks.py", folder / "found.json"
    places = [ROOT, ROOT / "tests", ROOT / "tests" / "fixtures", ROOT / "examples"]
    env = os.environ | {"MLX_HOSTFILE": str(folder / "hosts.json"), "PYTHONPATH": os.pathsep.join(map(str, places))}
    env |= {"OPENBLAS_NUM_THREADS": "1"}  # its threads, of all ranks, would spin for the same cores
    command = [sys.executable, str(script), str(out), *checks]
    ranks = [
        subprocess.Popen(command, env=env | {"MLX_RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    try:
        said = [rank.communicate(timeout=LIMIT)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(said)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    """What a check found on two ranks, by its name; it is made when first asked for."""

    @cache
    def found(check: str) -> Any:
        checks = next(checks for checks in TOGETHER if check in checks)
        return once(tmp_path_factory, f"two-{checks[0]}", lambda folder: run(2, folder, *checks))[check]

    return found


def assert_same(found: Any, rows: int, splits: tuple[str, ...] = ("tensor", "layers")) -> None:
    """Logits within 1e-4 of one process and KL within 1e-8, for so many rows at least."""
    assert tuple(found) == splits
    for split in splits:
        assert found[split]["rows"] >= rows
        assert found[split]["worst"] <= 1e-4
        assert abs(found[split]["kl"]) <= 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_give_the_logits_of_one_process(two: Two, kind: str) -> None:
    """A prompt past the window, steps, a fork, a rewind, a batch."""
    assert_same(two("fixtures")[kind], 45)


@pytest.mark.parametrize("kind", ["e2b", "12b", "26b-a4b", "31b"])
def test_assistants_draft_over_keys_that_ranks_have_apart(two: Two, kind: str) -> None:
    """Logits of two steps, and the tokens of one process, by either split; E2B's layers can't be split by two."""
    splits = ("tensor",) if kind == "e2b" else ("tensor", "layers")
    assert_same(two("assistants")[kind], 2, splits)
    tokens = two("assistants")[f"{kind} tokens"]
    assert len(tokens) == 1 + len(splits)
    assert all(drafted == tokens[0] for drafted in tokens)


@pytest.mark.parametrize("split", ["tensor", "layers"])
def test_drafts_in_kernels_do(two: Two, split: str) -> None:
    """In kernels on the simulator, greedy and drawn, and greedy in traced steps: as references in one process."""
    alone, traced = two("kernels")["drafted"], two("traced")[f"drafted {split}"]
    assert two("kernels")[f"drafted {split}"] == alone
    assert len(alone) == 2
    assert traced[0] == alone[0]


def test_quantized_files_do(two: Two) -> None:
    assert len(two("quantized")) == 10
    for name, found in two("quantized").items():
        assert_same(found, 40, ("tensor",) if name.startswith("e2b") else ("tensor", "layers"))


def test_folders_of_safetensors_do(two: Two) -> None:
    for found in two("folders").values():
        assert_same(found, 40)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_heads_and_types_of_published_models_do(two: Two, name: str) -> None:
    assert_same(two("memory")[f"{name} logits"], 40, ("tensor",))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_rank_holds_its_share_and_what_all_hold(two: Two, name: str) -> None:
    """Counted from arrays, weights and state: half of what is cut, all of what is not, and at most 5% more."""
    alone = two("memory")[name]
    total = sum(alone["weights"].values())
    ranks = two("memory")[f"{name} tensor"]
    same = sum(n for tensor, n in alone["weights"].items() if all(rank["weights"][tensor] == n for rank in ranks))
    assert same < 0.2 * total  # projections of per-layer embeddings, beside small layers
    for rank in ranks:
        assert sum(rank["weights"].values()) <= ((total - same) / 2 + same) * 1.05
    # Of one KV head both ranks hold it all; of more, each holds half.
    shape = PUBLISHED[name]
    whole = 1.0 if shape.kv_heads[0] == 1 else 0.5 if shape.kv_heads[1] > 1 else 0.8
    assert all(rank["state"] <= alone["state"] * whole for rank in ranks)
    ranks = two("memory")[f"{name} layers"]
    table = alone["weights"]["token_embd"] + alone["weights"].get("per_layer_token_embd", 0)
    assert sum(sum(rank["weights"].values()) for rank in ranks) <= (total + 2 * table) * 1.01
    assert sum(rank["state"] for rank in ranks) == alone["state"]


@pytest.mark.parametrize("temperature", ["0", "1.0"])
@pytest.mark.parametrize("split", ["tensor", "layers"])
def test_the_built_in_model_replies_the_same(two: Two, split: str, temperature: str) -> None:
    """500 tokens, greedy, of pairs of numbers that ranks gather, and 60 drawn by one seed from all logits."""
    found, alone = two("demo")[f"{split} {temperature}"], two("demo")[f"None {temperature}"]
    assert len(alone["tokens"]) == (500 if temperature == "0" else 60)
    assert found["tokens"] == alone["tokens"]
    assert found["held"] == alone["held"]


def test_states_in_4_bits_do(two: Two) -> None:
    assert_same(two("demo")["tq4"], 400)


def test_prompts_past_4096_tokens_do(two: Two) -> None:
    assert_same(two("long"), 4)


def test_traced_steps_do(two: Two) -> None:
    for kind, found in two("traced").items():
        if "drafted" in kind:
            continue
        assert_same(found, 20, ("tensor",) if kind == "e2b" else ("tensor", "layers"))


@pytest.mark.parametrize("name", ["26B-A4B", "E2B"])
def test_steps_in_kernels_do(two: Two, name: str) -> None:
    """As exact as kernels are against stock operations without parts: a batch's rows go as halves (test_decode.py)."""
    for found in two("kernels")[f"{name} logits"].values():
        assert found["worst"] <= 1e-2
        assert abs(found["kl"]) <= 2e-6


@pytest.mark.parametrize("kind", ["12b", "26b-a4b", "31b", "e2b", "gemma3"])
def test_recorded_steps_do(two: Two, kind: str) -> None:
    """Six of one state and two of a batch, all recorded, though the last one's state came out of the batch's pages."""
    found = two("replayed")[kind]
    assert found["players"] == [{"steps": [6, 2]}] * 2
    assert found["tensor"]["worst"] <= 1e-2
    assert abs(found["tensor"]["kl"]) <= 2e-6


@pytest.mark.parametrize("kind", ["12b", "26b-a4b", "e2b"])
def test_prompts_and_launched_steps_sum_in_shared_memory(two: Two, kind: str) -> None:
    """Two chunks and two steps: no sum of MLX's, and as many launches as there would be of those; of the first chunk
    only as far as its last keys and values need."""
    found = two("shared")[kind]
    assert_same({"tensor": found["tensor"]}, 23, ("tensor",))
    for rank in found["launches"]:
        assert rank["all_sum"] == 0
        assert 3 * rank["sums"] < rank["exchange_many"] < 4 * rank["sums"]
        assert rank.keys() == {"all_sum", "exchange_many", "sums"}


@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_in_shared_memory_are_those_of_mlx(tmp_path: Path, ranks: int) -> None:
    found = run(ranks, tmp_path, "sums")["sums"]
    assert found["worst"] <= 1e-6
    assert (found["unlike"], found["sums"]) == (0, 8)


@pytest.mark.parametrize("name", ["26B-A4B", "E2B"])
def test_launches_and_collectives_of_a_step(two: Two, name: str) -> None:
    """In parts a layer takes two sums, and the kernels that it takes alone; by layers a step goes from rank to rank."""
    alone = two("kernels")[f"{name} None"][0]
    assert alone["drawn"] == {}
    launches = {name: n for name, n in alone["launches"].items() if not name.startswith("sample_")}
    for rank in two("kernels")[f"{name} tensor"]:
        assert rank["made"] == {"all_sum": 2 * rank["layers"] + 1}  # and one for the embedding
        assert rank["drawn"] == rank["made"] | {"all_gather": 1}
        more = {"embed": 1} if name == "E2B" else {}  # rows of per-layer embeddings, to be summed
        assert Counter(rank["launches"]) == Counter(launches) + Counter(more)
    first, last = two("kernels")[f"{name} layers"]
    assert first["made"] == {"send": 1, "all_sum": 1}
    assert last["made"] == {"recv": 1, "all_sum": 1}
    assert last["drawn"] == last["made"] | {"all_gather": 1}


def test_four_ranks_give_the_logits_of_one_process(tmp_path: Path) -> None:
    found = run(4, tmp_path, "few", "assistants")
    for kind in ("e2b", "31b"):
        assert_same(found["few"][kind], 20)
    for kind in ("e2b", "12b", "26b-a4b", "31b"):  # with 1 and 2 KV heads
        assert_same(found["assistants"][kind], 2, ("tensor",))
