"""Measures what drafts bring llama.cpp (draft-mtp), beside its plain decode, with an imposed share of right drafts.

    python benchmarks/llama_drafting.py MODEL.gguf ASSISTANT.gguf --server PATH/llama-server [--accept 0.7]
        [--drafts 3,7] [--context 512] [--json OUT]

In: the files that `benchmarks/drafting.py` takes, with a tokenizer (make_synthetic.py --tokenizer). Out: tokens
a second without drafts and with 3 and 7 a step, of which the n-th is right with probability accept^n
(`--spec-synth-rates`); its own time for a reply of 128 tokens, the median of three.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from mlx_gemma4.distributed.hosts import free_port, read_hosts

REPLY, ROUNDS, LOADING = 128, 3, 120  # tokens; replies that count; seconds


@contextmanager
def serving(command: list[str]) -> Iterator[str]:
    """Start llama-server, and give its address once it answers."""
    port = free_port(read_hosts("127.0.0.1"))
    base = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        start = time.monotonic()
        while True:
            try:
                with urlopen(f"{base}/health", timeout=5):
                    break
            except (URLError, TimeoutError, ConnectionError):
                if process.poll() is not None or time.monotonic() - start > LOADING:
                    raise SystemExit(f"llama-server does not answer: {' '.join(command)}") from None
                time.sleep(0.2)
        yield base
    finally:
        process.kill()
        process.wait()


def rates(base: str, prompt: list[int]) -> list[dict[str, Any]]:
    """Return what the server says of the times of some replies, the first of which warms up."""
    asked = {"prompt": prompt, "n_predict": REPLY, "temperature": 0, "ignore_eos": True, "cache_prompt": True}
    times = []
    for _ in range(ROUNDS + 1):
        request = Request(f"{base}/completion", json.dumps(asked).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=120) as answer:
            times.append(json.load(answer)["timings"])
    return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("assistant", type=Path)
    parser.add_argument("--server", type=Path, required=True)
    parser.add_argument("--accept", type=float, default=0.7)
    parser.add_argument("--drafts", default="3,7")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prompt = [2, *(1000 + 37 * i % 100_000 for i in range(args.context - 1))]
    plain = [str(args.server), "-m", str(args.model), "-ngl", "99", "-fa", "on", "-c", str(args.context + 2 * REPLY)]
    plain += ["-np", "1", "--no-webui"]
    found: dict[str, Any] = {"model": args.model.name, "accept": args.accept, "context": args.context, "cells": []}
    for drafts in (0, *map(int, args.drafts.split(","))):
        command = plain
        if drafts:
            shares = ",".join(f"{args.accept ** (n + 1):.6f}" for n in range(drafts))
            command = [*plain, "-md", str(args.assistant), "-ngld", "99", "--spec-type", "draft-mtp"]
            command += ["--spec-draft-n-max", str(drafts), "--spec-synth-rates", shares]
        with serving(command) as base:
            times = rates(base, prompt)
        cell = {"drafts": drafts, "tokens/s": median(t["predicted_per_second"] for t in times)}
        cell |= {"drafted": sum(t.get("draft_n", 0) for t in times)}
        cell |= {"accepted": sum(t.get("draft_n_accepted", 0) for t in times)}
        found["cells"].append(cell)
        print(
            f"{drafts} drafts: {cell['tokens/s']:.1f} tokens/s, {cell['accepted']} of {cell['drafted']} accepted",
            flush=True,
        )
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
