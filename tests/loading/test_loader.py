"""The loader: every tensor accounted for, joined or apart, and no more memory than the file is large."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from recorded import HERE
from rewrite import Edit, Entry, drop, rewrite

from mlx_gemma4 import InputError, load

F32 = HERE / "e2b-f32.gguf"


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    """One tensor made into another."""
    return lambda entries: [(n, change(data) if n == name else data, kind) for n, data, kind in entries]


def test_unused_tensors_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra: Entry = ("v.patch_embd.weight", np.zeros((4, 4), np.float32), gguf.GGMLQuantizationType.F32)
    file = rewrite(F32, tmp_path / "more.gguf", lambda entries: [*entries, extra])
    with caplog.at_level(logging.INFO, "mlx_gemma4"):
        load(file)
    # ... among those that layers without keys and values of their own carry along
    assert any(m.startswith("Unused tensors (") and "v.patch_embd.weight" in m for m in caplog.messages)


def test_every_missing_tensor_is_an_error(tmp_path: Path) -> None:
    """Each tensor of the file, left out on its own, is missed by name, but for those a model may lack."""
    names = [t.name for t in gguf.GGUFReader(F32).tensors]
    blocks = {f"blk.{i}." for i in range(8)}
    kinds = sorted({n.replace(next((b for b in blocks if n.startswith(b)), ""), "blk.0.", 1) for n in names if n})
    for name in {k for k in kinds if k in names}:
        file = rewrite(F32, tmp_path / "less.gguf", drop(name))
        if name.endswith("layer_output_scale.weight"):
            load(file)
            continue
        with pytest.raises(InputError, match=r"missing; the file is incomplete") as error:
            load(file)
        assert name in str(error.value)


@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "blk.1.ffn_down.weight", "output_norm.weight"])
def test_shape_that_disagrees_with_the_configuration(name: str, tmp_path: Path) -> None:
    file = rewrite(F32, tmp_path / "short.gguf", changed(name, lambda a: a[:-1]))
    with pytest.raises(InputError, match=f"{name} is .* but the configuration calls for"):
        load(file)


def test_unsupported_type_is_named(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_1
    blocks = np.zeros((64, 320), np.uint8)
    edit: Edit = lambda entries: [  # noqa: E731
        (n, blocks, kind) if n == "blk.0.attn_q.weight" else (n, data, k) for n, data, k in entries
    ]
    file = rewrite(HERE / "e2b-q8_0.gguf", tmp_path / "odd.gguf", edit)
    with pytest.raises(InputError, match=r"blk\.0\.attn_q\.weight.*Q8_1"):
        load(file)


def test_progress_reaches_the_end() -> None:
    seen: list[tuple[int, int]] = []
    load(F32, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


@dataclass(frozen=True)
class Wide:
    """A 31B-like model of some 250 MB, one layer of each kind, in Q4_K with a Q6_K embedding."""

    hidden: int = 2560
    ffn: int = 10240
    vocab: int = 32768
    layers: int = 2


def write_wide(target: Path, w: Wide) -> None:
    """Tiled random blocks under the metadata of a fixture, written tensor by tensor."""
    rng = np.random.default_rng(0)
    out = gguf.GGUFWriter(target, "gemma4")
    metadata: dict[str, Any] = {
        "block_count": w.layers,
        "context_length": 4096,
        "embedding_length": w.hidden,
        "feed_forward_length": w.ffn,
        "attention.head_count": 16,
        "attention.head_count_kv": 4,
        "attention.key_length": 256,
        "attention.value_length": 256,
        "attention.key_length_swa": 256,
        "attention.value_length_swa": 256,
        "attention.sliding_window": 512,
        "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0,
    }
    for key, value in metadata.items():
        out.add_uint32(f"gemma4.{key}", value)
    out.add_array("gemma4.attention.sliding_window_pattern", [True, False])
    out.add_float32("gemma4.attention.layer_norm_rms_epsilon", 1e-6)
    tokens = [f"<t{i}>" for i in range(w.vocab)]
    tokens[2], tokens[3:6] = "<bos>", ["<", "t", "<t"]
    tokens[6:262] = [f"<0x{i:02X}>" for i in range(256)]
    out.add_tokenizer_model("gemma4")
    out.add_token_list(tokens)
    out.add_token_types([3 if i == 2 else 6 if 6 <= i < 262 else 1 for i in range(w.vocab)])
    out.add_token_merges(["< t"])
    out.add_bos_token_id(2)
    q4, q6 = gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.Q6_K

    def blocks(kind: gguf.GGMLQuantizationType, rows: int, k: int) -> np.ndarray:
        size, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        some = rng.integers(0, 60, (4099, n_bytes), np.uint8)  # small scales: no infinities
        count = rows * k // size
        return np.tile(some, (-(-count // 4099), 1))[:count].reshape(rows, -1)

    def add(name: str, *shape: int, kind: gguf.GGMLQuantizationType = q4) -> None:
        if len(shape) == 1:
            out.add_tensor(name, np.ones(shape, np.float32))
        else:
            out.add_tensor(name, blocks(kind, *shape), raw_dtype=kind)

    add("token_embd.weight", w.vocab, w.hidden, kind=q6)
    add("output_norm.weight", w.hidden)
    add("rope_freqs.weight", 128)
    for i in range(w.layers):
        blk = f"blk.{i}."
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            add(f"{blk}{name}.weight", w.hidden)
        for name in ("attn_q_norm", "attn_k_norm"):
            add(f"{blk}{name}.weight", 256)
        add(f"{blk}attn_q.weight", 4096, w.hidden)
        add(f"{blk}attn_k.weight", 1024, w.hidden)
        add(f"{blk}attn_v.weight", 1024, w.hidden, kind=q6)
        add(f"{blk}attn_output.weight", w.hidden, 4096)
        add(f"{blk}ffn_up.weight", w.ffn, w.hidden)
        add(f"{blk}ffn_gate.weight", w.ffn, w.hidden)
        add(f"{blk}ffn_down.weight", w.hidden, w.ffn, kind=q6)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


CHILD = r"""
import json, re, resource, sys
import mlx_gemma4
lm = mlx_gemma4.load(sys.argv[1], weights="packed")
if sys.platform == "darwin":
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
else:  # ru_maxrss begins with the parent's
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(json.dumps({"peak": peak, "weights": lm.plan.weights}))
"""


def test_peak_memory_of_a_packed_load(tmp_path: Path) -> None:
    """At most 1.15 times the file and 300 MB, in a process of its own; mapped pages count."""
    file = tmp_path / "wide.gguf"
    write_wide(file, Wide())
    size = file.stat().st_size
    assert size > 150e6
    done = subprocess.run([sys.executable, "-c", CHILD, str(file)], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["weights"] <= size
    assert report["peak"] <= 1.15 * size + 300e6, f"{report['peak'] / 1e6:.0f} MB for a file of {size / 1e6:.0f} MB"
