"""The memory plan: known figures, Macs of 16 and 36 GB, chunks that shrink, refusals; and docs/memory.md's tables."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_gemma4 import memory
from mlx_gemma4.config import Config
from mlx_gemma4.doctor.published import PUBLISHED
from mlx_gemma4.errors import InputError, NoRoom
from mlx_gemma4.generation import prompt
from mlx_gemma4.kv.state import KVState
from mlx_gemma4.memory import MemoryPlan, Room, make_plan
from mlx_gemma4.model import costs
from mlx_gemma4.model.model import Model
from mlx_gemma4.model.soft import soft_ids
from mlx_gemma4.ops import many_rows
from mlx_gemma4.ops.dispatch import Kernels
from mlx_gemma4.ops.op import OpKey
from mlx_gemma4.ops.prompt_attention import tiling
from mlx_gemma4.ops.tuning import apple

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import make_synthetic

# A base M1's GPU, 8 cores: "2.6 teraflops" of fp32 (Apple, 2020-11-10, "Apple unleashes M1"), and LPDDR4X-4266 on 128
# bits. Matrix products in fp16 might reach twice the first; they are reckoned at it.
M1_OPERATIONS, M1_BYTES = 2.6e12, 68e9  # a second
LONGEST = 0.5  # seconds of a kernel, at most: macOS ends command buffers that keep a GPU from the screen for seconds
MAC = apple(80)
PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
GB = 10**9
VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               12881.
Pages active:                            455071.
Pages inactive:                          438262.
Pages speculative:                        15738.
Pages throttled:                              0.
Pages wired down:                        118497.
Pages purgeable:                           9129.
"Translation faults":                1234567890.
Pages occupied by compressor:             51234.
"""


def kernel_seconds(config: Config, tokens: int, context: int, own: bool = True) -> dict[str, float]:
    """Seconds of the longest kernels on a base M1, reckoned: a prompt's chunk, the last of `context` tokens; decoding.

    The larger of operations and bytes over what an M1 does in a second: no kernel can be faster there. Attention of our
    own is cut into launches of so many operations; its bytes are those that it reads if no cache held any.
    """
    c, size = config, 2
    layers = [(s, costs.keys_seen(c, s, tokens, context)) for s in c.layers]
    attention = {
        "prompt attention": max(
            (
                min(4 * tokens * s.heads * s.head_dim * keys, MAC.launch_operations),
                min(4 * tokens * s.heads * s.head_dim * keys, MAC.launch_operations) / (8 * tiling(s.head_dim, 16)[1]),
            )
            for s, keys in layers
        )
    }
    scores = {
        "scores": (max(2 * tokens * s.heads * s.head_dim * keys for s, keys in layers), 0),
        "softmax": (0, max(2 * costs.score_bytes(s, tokens, keys, size) for s, keys in layers)),
        "keys joined": (0, max(2 * size * s.kv_heads * s.head_dim * keys for s, keys in layers)),
    }
    work = {
        "product of a tile": (2 * tokens * many_rows.TILE, size * many_rows.TILE),
        "expansion of a tile": (0, (size + 4) * many_rows.TILE),  # from fp32 at most
        "experts": (4 * tokens * c.experts_used * c.expert_ffn * c.hidden, 0),
        **(attention if own else scores),
        "decoding: attention": (0, max(2 * size * s.kv_heads * s.head_dim * keys for s, keys in layers)),
        "decoding: head": (0, size * c.vocab * c.hidden),  # in 16 bits at most
    }
    return {name: max(ops / M1_OPERATIONS, n_bytes / M1_BYTES) for name, (ops, n_bytes) in work.items()}


def config(name: str) -> Config:
    return make_synthetic.config_of(PUBLISHED[name])


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make memory.py and its users see a Mac of so many GiB, of which so many GB are recommended to a program."""

    def see(gib: int, recommended: float, pages: dict[str, int] | None = None) -> None:
        info = {"memory_size": gib << 30, "max_recommended_working_set_size": int(recommended * GB)}
        monkeypatch.setattr(memory, "device_info", lambda: info)
        monkeypatch.setattr(memory, "vm_pages", lambda: pages or {})
        for module in (memory, costs):
            monkeypatch.setattr(module, "on_cpu", lambda: False)
        for module in (memory, costs, prompt):
            monkeypatch.setattr(module, "on_metal", lambda: True)
        monkeypatch.setattr(costs, "this_gpu", lambda: MAC)
        monkeypatch.setattr(mx, "get_active_memory", lambda: 0)

    return see


def plan(name: str, weights: float, room: Room = memory.SOME_ROOM) -> MemoryPlan:
    needs = costs.needs_of(config(name), mx.float16, 1024, True)
    return make_plan(int(weights * GB), 1 << 60, "auto", "model.gguf", needs, room)


def test_31b_at_128k(mac: Callable[..., None]) -> None:
    """12 GB of KV as docs/kv-state.md has it. Attention of a chunk takes 0.2 GB, and no more than behind 8K.

    Without kernels, scores of a chunk in fp16 would be 8.6 GB a layer, and are 0.5.
    """
    mac(128, 96)
    made = plan("31B", 18.7, Room(131072))
    assert (made.kv, made.chunk) == (pytest.approx(12.8 * GB, rel=0.02), 1024)  # and a chunk in sliding layers
    sliding, layer = config("31B").layers[4:6]
    for kv in ("full", "q8", "tq4"):
        of_layer = costs.attention_bytes(layer, 1024, 131072, 2, kv, True)
        assert of_layer == costs.attention_bytes(layer, 1024, 8192, 2, kv, True)
        assert 2 * 32 * 1024 * 512 * 4 < of_layer < 0.2 * GB  # sums of two launches, a key and value each of the chunk
    assert of_layer + costs.attention_bytes(sliding, 1024, 2048, 2, kv, True) < 0.3 * GB
    assert costs.chunk_at(config("31B"), 130048, 1024, True) == 1024
    assert made.total == 400_000_000 + 18.7 * GB + made.kv + made.reading == pytest.approx(33.75 * GB, rel=0.001)

    assert costs.score_bytes(layer, 1024, 131072, 2) == pytest.approx(8.59 * GB, rel=0.001)
    scores = costs.attention_bytes(layer, 1024, 131072, 2, "full", False) - 2 * 4 * 512 * 131072 * 2
    assert scores == 3 * costs.SCORE_BYTES
    assert costs.chunk_at(config("31B"), 130048, 1024, False) == 64


def test_who_attends(mac: Callable[..., None]) -> None:
    """Attention of our own on a Mac whose kernels run it, for heads that it takes; its formula bounds that alone."""
    kernels = Kernels(print)
    assert not costs.own_attention(kernels)  # a CPU
    mac(128, 96)
    assert costs.own_attention(kernels) and not costs.own_attention(None)
    kernels.off = frozenset([OpKey("prompt_attention", "q8")])
    assert not costs.own_attention(kernels)
    narrow = replace(config("31B").layers[5], head_dim=32)
    assert [costs.takes(narrow, kv) for kv in ("full", "q8", "tq4")] == [True, True, False]
    assert not costs.takes(replace(narrow, head_dim=96), "full")
    assert costs.attention_bytes(narrow, 1024, 131072, 2, "tq4", True) > 3 * costs.SCORE_BYTES


def test_chunks_shrink_then_context_then_it_is_refused(mac: Callable[..., None]) -> None:
    """31B on Macs of 36 and 32 GB; what is refused says what would fit."""
    mac(36, 28.9)
    assert (plan("31B", 18.7).chunk, plan("31B", 18.7).context) == (1024, 8192)
    mac(32, 22.9)
    smaller = plan("31B", 18.7)
    assert smaller.chunk < 1024
    assert smaller.total <= smaller.available
    assert (
        costs.needs_of(config("31B"), mx.float16, 1024, True).beside(8192, "full", 2 * smaller.chunk) + 18.7 * GB
        > 22.9 * GB
    )
    mac(32, 21.9)
    assert plan("31B", 18.7).context < 8192
    with pytest.raises(InputError, match=r"model.gguf: needs 23.\d GB of memory and 21.9 GB are free") as refused:
        plan("31B", 18.7, Room(16384))
    assert refused.value.exit_code == 3
    for said in (
        "weights 18.7 GB",
        "KV of 16,384 tokens",
        "128 tokens at a time",
        "keep to a context of",
        "--max-tokens",
    ):
        assert said in str(refused.value)
    longest = int(str(refused.value).split("context of ")[1].split()[0].replace(",", ""))
    assert plan("31B", 18.7, Room(longest)).context == longest
    with pytest.raises(InputError):
        plan("31B", 18.7, Room(longest + 1))
    with pytest.raises(InputError, match="take a smaller quantization") as refused:
        plan("31B", 30)
    assert "context of 1,024 tokens" not in str(refused.value).split(";")[1]


def test_quantized_kv_is_a_way_out(mac: Callable[..., None]) -> None:
    mac(36, 24)
    with pytest.raises(InputError, match="take --kv tq4"):
        plan("31B", 18.7, Room(32768))
    assert plan("31B", 18.7, Room(32768, "tq4")).total <= 24 * GB
    with pytest.raises(InputError, match="needs"):
        plan("31B", 18.7, Room(1024, n_bytes=5 * GB))  # --max-kv-bytes


def test_other_programs(mac: Callable[..., None]) -> None:
    """12B on 16 GB: what others have wired can't be had; what they use makes chunks smaller, and is said."""
    mac(16, 11.5)
    assert plan("12B", 7.4).chunk == 1024
    idle = {"free": GB, "speculative": 0, "inactive": 9 * GB, "purgeable": 0, "wired down": 2 * GB}
    mac(16, 11.5, idle)
    busy = plan("12B", 7.4)
    assert busy.chunk < 1024
    assert busy.total <= busy.idle == 10 * GB
    mac(16, 11.5, {**idle, "inactive": GB})
    assert plan("12B", 7.4).total > plan("12B", 7.4).idle
    mac(16, 11.5, {**idle, "wired down": 10 * GB})
    with pytest.raises(InputError, match=r"7\.2 GB are free"):
        plan("12B", 7.4)


def test_vm_stat(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> Any:
        return subprocess.CompletedProcess([], 0, VM_STAT, "")

    monkeypatch.setattr(subprocess, "run", run)
    pages = memory.vm_pages()
    assert (pages["free"], pages["wired down"]) == (12881 * 16384, 118497 * 16384)
    monkeypatch.setattr(memory, "on_metal", lambda: True)
    assert memory.idle_memory() == (12881 + 15738 + 438262 + 9129) * 16384

    def missing(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    assert memory.vm_pages() == {}
    assert memory.idle_memory() == 1 << 63


@pytest.mark.parametrize(
    ("gib", "recommended", "macos", "wired"),
    [(36, 28.9, "15.1", 20.7e9), (16, 11.5, "26.0", 8 << 30), (36, 28.9, "14.7", None), (8, 5.7, "15.1", None)],
)
def test_limits(
    mac: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    gib: int,
    recommended: float,
    macos: str,
    wired: float | None,
) -> None:
    """Weights and KV are wired from macOS 15 on, as far as the system keeps 8 GB; the cache is bounded everywhere."""
    mac(gib, recommended)
    monkeypatch.setattr(mx, "get_active_memory", lambda: int(18.7 * GB))
    monkeypatch.setattr(memory.platform, "mac_ver", lambda: (macos, ("", "", ""), "arm64"))
    calls: dict[str, int] = {}
    for name in ("memory", "cache", "wired"):
        monkeypatch.setattr(mx, f"set_{name}_limit", lambda n, name=name: calls.setdefault(name, n))
    memory.limit_memory(MemoryPlan("packed", int(18.7 * GB), 0, kv=2 * GB, limit=int(recommended * GB)))
    assert calls.get("wired") == (None if wired is None else pytest.approx(wired, rel=1e-6))
    assert calls["cache"] == min(1 << 30, (gib << 30) // 16)
    assert calls["memory"] == int(recommended * GB)


def test_a_prompt_is_read_as_memory_allows(lm: Any, mac: Callable[..., None]) -> None:
    """On a Mac, in smaller chunks when little is left, and refused when nothing is."""
    mac(16, 11.5)
    state = lm.model.new_state()
    needs = costs.needs_of(lm.config, state.dtype, 1024, False)
    grown = needs.kv(500, "full") - state.nbytes
    for chunk in (1024, 128):
        limit = needs.reading(500, "full", chunk) + grown
        model = Model(lm.config, lm.model.weights, None, MemoryPlan("packed", 0, 0, limit=limit))
        assert prompt.fitting_chunk(model, state, [5] * 500) == chunk
    model = Model(lm.config, lm.model.weights, None, MemoryPlan("packed", 0, 0, limit=limit - 1))
    with pytest.raises(NoRoom, match="a conversation of 500 tokens"):
        prompt.fitting_chunk(model, state, [5] * 500)


def test_memory_has_room_for_a_picture_at_once(lm: Any, mac: Callable[..., None]) -> None:
    """Where its tokens see each other; else it is cut as text is."""
    mac(16, 11.5)
    ids = [5] * 100 + soft_ids("image", b"x", 300) + [5] * 100
    for ple, chunks in ((0, [256, None]), (lm.config.ple, [256, 256])):
        config = replace(lm.config, ple=ple)
        state = KVState(config, mx.float16)
        needs = costs.needs_of(config, state.dtype, 1024, False)
        for tokens, chunk in zip((300, 299), chunks, strict=True):
            limit = needs.reading(500, "full", tokens) + needs.kv(500, "full") - state.nbytes
            model = Model(config, lm.model.weights, None, MemoryPlan("packed", 0, 0, limit=limit))
            if chunk:
                assert prompt.fitting_chunk(model, state, ids) == chunk
            else:
                with pytest.raises(NoRoom):
                    prompt.fitting_chunk(model, state, ids)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("own", [True, False])
def test_chunks_at_every_depth(name: str, own: bool, mac: Callable[..., None]) -> None:
    """No kernel over half a second on an M1, and ends that follow from positions; scores, if any, within 512 MB."""
    mac(128, 96)
    c, at, sizes = config(name), 0, []
    while at < c.context:
        chunk = costs.chunk_at(c, at // 1024 * 1024, 1024, own)
        end = at + chunk
        assert at % chunk == 0
        assert max(kernel_seconds(c, chunk, end, own).values()) < LONGEST
        assert own or all(s.sliding or costs.score_bytes(s, chunk, end, 2) <= costs.SCORE_BYTES for s in c.layers)
        sizes.append(chunk)
        at = end
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], at) == (1024, c.context)
    assert sizes[-1] == 1024 if own else sizes[-1] < 1024


def tables() -> tuple[list[str], list[str]]:
    """The lines of docs/memory.md that are computed: GB of prompts, and ms of kernels."""
    depths, gigabytes, kernels = (2048, 8192, 32768, 131072), [], []
    for name in PUBLISHED:
        c = config(name)
        (ours,) = {costs.reading_bytes(c, mx.float16, True, depth, "full", 1024) / GB for depth in depths}
        cells = [f"{ours:.1f}"]
        for depth in depths:
            chunk = costs.chunk_at(c, depth - 1024, 1024, False)
            cells.append(f"{costs.reading_bytes(c, mx.float16, False, depth, 'full', 1024) / GB:.1f} ({chunk})")
        gigabytes.append(f"| {name} | {' | '.join(cells)} |")
    for kernel in kernel_seconds(config("31B"), 1024, 8192):
        cells = []
        for name in PUBLISHED:
            at = {n: kernel_seconds(config(name), 1024, n)[kernel] for n in depths}
            cells.append(f"{max(at.values()) * 1e3:.0f}")
        kernels.append(f"| {kernel} | {' | '.join(cells)} |")
    return gigabytes, kernels


def test_the_page_has_the_computed_tables(mac: Callable[..., None]) -> None:
    mac(128, 96)
    text = PAGE.read_text()
    for lines in tables():
        assert "\n".join(lines) in text, "put these into docs/memory.md:\n" + "\n".join(lines)


def test_a_projector_has_room_beside_the_model(mac: Callable[..., None]) -> None:
    """Its towers are read later, when the first picture comes."""
    mac(32, 24)
    made, alone = (plan("31B", 18.7, Room(8192, later=n)) for n in (int(1.2 * GB), 0))
    assert made.total - alone.total == pytest.approx(1.2 * GB + made.reading - alone.reading)
    assert "its projector 1.20 GB" in made.describe() and "projector" not in alone.describe()
    with pytest.raises(InputError, match=r"its projector 6\.00 GB"):
        plan("31B", 18.7, Room(8192, later=6 * GB))
