"""Measures the time to the first token of prompts with a picture or a sound, whole, on any model and its projector.

    python benchmarks/media_ttft.py MODEL.gguf --mmproj MMPROJ.gguf [--tokens 280 1120] [--rounds 3] [--json OUT.json]
        [--llama DIR/llama-mtmd-cli]

In: files, synthetic ones too (examples/make_synthetic.py); no tokenizer is read, for times depend on lengths alone.
Out: a table, then all of it as JSON. For each number of tokens, medians of `rounds`, each of a picture that is new: ms
to decode and resize its PNG, of the tower, of the first token behind it, and of as many tokens of text; "ratio" is the
picture's first token by text's and the encoder's together (decoding, tower). "first" is the tower's first run at that
size, and "thread" the same in a thread that has not encoded yet: libraries prepare themselves for either. "llama.cpp"
is what llama-mtmd-cli says that its encoder takes, for pictures of the same size, and sounds; the model's file needs a
tokenizer then. Then ten questions about one picture over a cache of prefixes: the tower may run for the first alone,
and the others read no token of the picture again, or the exit code is 1. At last 30 s of sound, where the projector
hears.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from hearing import wav_of
from PIL import Image

from mlx_gemma4.doctor.verdict import machine
from mlx_gemma4.generation.loop import generate_tokens
from mlx_gemma4.generation.prefix import PrefixCache
from mlx_gemma4.kv.state import KVState
from mlx_gemma4.measure.bench import GREEDY, load_subject
from mlx_gemma4.media import picture, projector
from mlx_gemma4.media.content import content_of
from mlx_gemma4.media.kind import BUDGETS
from mlx_gemma4.media.layers import by_layers
from mlx_gemma4.memory import Room
from mlx_gemma4.model.model import Model
from mlx_gemma4.model.soft import Encoded

HEIGHT, WIDTH = 672, 960  # fills 280 and 1,120 soft tokens to the last one
BEFORE, QUESTION = 12, 20  # tokens of text before and behind a picture
QUESTIONS = 10
SOUND = 30.0  # seconds
COPIES = 4  # of a picture that llama.cpp encodes in a run; the first counts as warm-up
COLUMNS = ("text", "picture", "encode", "decode", "tower", "first", "thread")


def picture_part(tokens: int, seed: int) -> dict[str, Any]:
    """A PNG of noise that nothing has seen before, as a part of a message."""
    out, rng = io.BytesIO(), np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8))
    small.resize((WIDTH, HEIGHT)).save(out, "PNG")
    return {"type": "image", "image": out.getvalue(), "tokens": tokens}


def text(model: Model, n: int, seed: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(model.config.vocab // 2, model.config.vocab, n)]


def soft(model: Model, media: projector.Media, part: dict[str, Any]) -> list[Encoded]:
    """What the projector makes of a part, known to the model; whoever reads it holds it."""
    return [model.soft.add(piece) for piece in media.encode(part) if isinstance(piece, Encoded)]


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """The ms that a call takes, and what it returns."""
    start = time.perf_counter()
    made = call()
    return 1e3 * (time.perf_counter() - start), made


def first_token(model: Model, state: KVState, ids: list[int]) -> None:
    next(generate_tokens(model, state, ids, GREEDY, 1, turn_ends=frozenset()))


def with_picture(model: Model, held: list[Encoded], seed: int) -> list[int]:
    return [*text(model, BEFORE, seed), *(i for each in held for i in each.ids), *text(model, QUESTION, seed + 1)]


def in_new_thread(call: Callable[[], Any]) -> float:
    """The ms of a call in a thread of its own, whatever starting that takes included."""
    took: list[float] = []
    thread = threading.Thread(target=lambda: took.append(timed(call)[0]))
    thread.start()
    thread.join()
    return took[0]


def pictures(model: Model, media: projector.Media, tokens: int, rounds: int) -> dict[str, Any]:
    """The times of new pictures of so many tokens, beside as many of text, in turns."""
    seeds = iter(range(100 * tokens, 1 << 31))

    def new() -> dict[str, Any]:
        return picture_part(tokens, next(seeds))

    first, held = timed(lambda: soft(model, media, new()))
    for ids in (with_picture(model, held, 0), text(model, len(with_picture(model, held, 0)), 1)):
        first_token(model, model.new_state(), ids)  # warms up
    rows: dict[str, list[float]] = {name: [] for name in ("decode", "encode", "text", "picture")}
    for i in range(rounds):
        part = new()
        rows["decode"].append(timed(lambda: picture.inputs(content_of(part), part))[0])  # noqa: B023
        rows["encode"].append(timed(lambda: soft(model, media, part))[0])  # noqa: B023
        ids = text(model, len(with_picture(model, held, 0)), i)
        rows["text"].append(timed(lambda: first_token(model, model.new_state(), ids))[0])  # noqa: B023
        part = new()

        def whole(part: dict[str, Any] = part, i: int = i) -> None:
            held = soft(model, media, part)
            first_token(model, model.new_state(), with_picture(model, held, i))

        rows["picture"].append(timed(whole)[0])
    other = new()
    thread = in_new_thread(lambda: soft(model, media, other))
    made = {name: median(values) for name, values in rows.items()}
    made |= {"first": first, "thread": thread, "tower": made["encode"] - made["decode"]}
    soft_tokens = sum(len(each.ids) for each in held)
    return {"tokens": soft_tokens, "ratio": made["picture"] / (made["text"] + made["encode"])} | made


def questions(model: Model, media: projector.Media, tokens: int) -> dict[str, Any]:
    """Ten questions about one picture, each a prompt of its own, over a cache of prefixes."""
    store, part, runs = PrefixCache(model), picture_part(tokens, 7), 0
    times, kept = [], []

    def counted(*args: Any) -> mx.array:
        nonlocal runs
        runs += 1
        return by_layers(*args)

    def ask(i: int) -> int:
        held = soft(model, media, part)
        ids = [*with_picture(model, held, 0)[:-QUESTION], *text(model, QUESTION, 50 + i)]
        with store.lease(ids, 1) as (state, n):
            first_token(model, state, ids[n:])
        return len(ids) - n

    with patch("mlx_gemma4.media.projector.by_layers", counted):
        for i in range(QUESTIONS):
            ms, left = timed(lambda: ask(i))  # noqa: B023
            times.append(ms)
            kept.append(left)
    again = max(kept[1:])
    return {"ms": times, "tower ran": runs, "tokens read": kept, "ok": runs == 1 and again <= QUESTION}


def sound(model: Model, media: projector.Media, mmproj: Path, rounds: int) -> dict[str, Any]:
    """The ms of 30 s of sound, decoding included, and of what is not the tower."""
    with projector.open_towers(mmproj) as (towers, _):
        tower = next(each.tower for each in towers if each.tower.kind == "audio")
    front, whole = [], []
    for seed in range(rounds + 1):
        part = {"type": "audio", "audio": wav_of(SOUND, seed)}
        front.append(timed(lambda: tower.inputs(content_of(part), part))[0])  # noqa: B023
        ms, held = timed(lambda: soft(model, media, part))  # noqa: B023
        whole.append(ms)
    rows = sum(len(each.ids) for each in held)
    made = {"rows": rows, "front end": median(front[1:]), "encode": median(whole[1:]), "first": whole[0]}
    return made | {"tower": made["encode"] - made["front end"]}


def llama_ms(cli: Path, given: argparse.Namespace, tokens: int, part: dict[str, Any]) -> float:
    """The ms that llama.cpp's encoder takes for a part: the median of some in one run, without the first."""
    image = part["type"] == "image"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ("part.png" if image else "part.wav")
        file.write_bytes(part[part["type"]])
        size = ["--image-min-tokens", str(tokens), "--image-max-tokens", str(tokens)] if image else []
        command = [cli, "-m", given.model, "--mmproj", given.mmproj, "-ngl", "99", "-c", str(COPIES * tokens + 512)]
        command += ["-b", "2048", "-ub", "2048", "-n", "1", "--jinja", "-p", "What is it?", *size]
        command += ["--image" if image else "--audio", ",".join([str(file)] * COPIES)]
        run = subprocess.run([str(each) for each in command], capture_output=True, text=True, timeout=300, check=False)
    found = [
        float(ms) for ms in re.findall(r"(?:batch encoding done|slice encoded) in (\d+) ms", run.stdout + run.stderr)
    ]
    if run.returncode or len(found) < COPIES:
        print(run.stdout[-1000:], run.stderr[-3000:], file=sys.stderr)
        return float("nan")
    return median(found[1:])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--mmproj", type=Path, required=True)
    parser.add_argument("--tokens", nargs="+", type=int, default=[280, 1120], choices=BUDGETS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--llama", type=Path, help="llama-mtmd-cli")
    given = parser.parse_args(arguments)
    model = load_subject(given.model, room=Room(context=2 * max(given.tokens) + 100)).model
    media = projector.open_media(given.mmproj, model.config)
    loading, _ = timed(media.load)
    figures: dict[str, Any] = {"machine": machine(), "model": given.model.name, "projector read, ms": loading}
    figures["pictures"], ok = [], True
    if "image" in media.kinds:
        columns = (*COLUMNS, "llama.cpp") if given.llama else COLUMNS
        print(f"{'tokens':>7}{'ratio':>7}" + "".join(f"{name:>10}" for name in columns) + "  (ms)")
        for tokens in given.tokens:
            row = pictures(model, media, tokens, given.rounds)
            figures["pictures"].append(row)
            if given.llama:
                row["llama.cpp"] = llama_ms(given.llama, given, tokens, picture_part(tokens, 3))
            cells = "".join(f"{row[name]:>10.1f}" for name in columns)
            print(f"{row['tokens']:>7}{row['ratio']:>7.2f}{cells}", flush=True)
        asked = figures["questions"] = questions(model, media, given.tokens[-1])
        ok = asked["ok"]
        print(
            f"{QUESTIONS} questions about one picture: {asked['ms'][0]:.1f} ms, then {median(asked['ms'][1:]):.1f}; "
            f"the tower ran {asked['tower ran']} times; tokens read {asked['tokens read']}"
        )
    if "audio" in media.kinds:
        heard = figures["sound"] = sound(model, media, given.mmproj, given.rounds)
        print(
            f"{SOUND:g} s of sound, {heard['rows']} rows: {heard['encode']:.1f} ms (front end "
            f"{heard['front end']:.1f}, tower {heard['tower']:.1f}; first time {heard['first']:.1f})"
        )
        if given.llama:
            part = {"type": "audio", "audio": wav_of(SOUND)}
            heard["llama.cpp"] = llama_ms(given.llama, given, heard["rows"], part)
            print(f"llama.cpp: {heard['llama.cpp']:.1f} ms")
    print(json.dumps(figures))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
