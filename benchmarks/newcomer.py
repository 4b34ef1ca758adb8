"""Measures the time to the first token of a short prompt that comes while other replies are under way.

    python benchmarks/newcomer.py [FILE.gguf] [--parallel 16] [--prompt 32] [--rounds 5] [--json OUT.json]

In: a GGUF (speed alone counts: one of `examples/make_synthetic.py` will do); without one, the built-in model. Out: at
the scheduler, so without HTTP and text, the milliseconds to the newcomer's first token (the median of the rounds), of a
step of the replies under way, and of a chunk of a prompt read alone; the first over the last is what a user waits, in
chunks. Prompts are random ids, replies greedy and never at an end.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

from mlx_gemma4.conversation.language_model import demo_path
from mlx_gemma4.execution import leave
from mlx_gemma4.generation.prompt import read_chunk
from mlx_gemma4.generation.sampling import Sampling
from mlx_gemma4.generation.scheduler import Scheduler
from mlx_gemma4.measure.bench import load_subject, random_ids
from mlx_gemma4.model.model import Model

GREEDY = Sampling(temperature=0)
BEHIND = 512  # tokens of the prompts of the replies under way
CALM = 0.5  # seconds between two newcomers


def chunk_time(model: Model, rounds: int) -> tuple[int, float]:
    """Tokens of a prompt's chunk, and the seconds that one takes in an empty state: the median."""
    n, times = min(model.chunk, model.config.context // 2), []
    for which in range(rounds + 1):  # the first compiles
        with closing(model.new_state()) as state:
            start = time.perf_counter()
            read = read_chunk(model, state, random_ids(model, n, which), [], n)
            assert read is not None
            read.token()
            times.append(time.perf_counter() - start)
    return n, median(times[1:])


def first_token(scheduler: Scheduler, prompt: list[int]) -> float:
    """Seconds from a prompt's arrival to its first token."""
    with closing(scheduler.model.new_state()) as state:
        start = time.perf_counter()
        with closing(scheduler.generate_tokens(state, prompt, GREEDY, 2)) as tokens:
            next(tokens)
            took = time.perf_counter() - start
            for _ in tokens:
                pass
    return took


def step_time(scheduler: Scheduler, seconds: float) -> float:
    """Seconds of a step of the replies under way."""
    steps, start = scheduler.steps, time.perf_counter()
    time.sleep(seconds)
    return (time.perf_counter() - start) / max(1, scheduler.steps - steps)


def measured(model: Model, parallel: int, prompt: int, rounds: int) -> dict[str, Any]:
    """Time newcomers beside so many replies."""
    size, chunk = chunk_time(model, 3)
    behind = min(BEHIND, model.config.context // 4)
    ends = threading.Event()
    with Scheduler(model) as scheduler:

        def reply(which: int) -> None:
            with closing(model.new_state()) as state:
                room = model.config.context - behind - 2
                for _ in scheduler.generate_tokens(state, random_ids(model, behind, which + 1), GREEDY, room):
                    if ends.is_set():
                        break
            leave()

        threads = [threading.Thread(target=reply, args=(which,)) for which in range(parallel)]
        for thread in threads:
            thread.start()
        while scheduler.rows < parallel and any(thread.is_alive() for thread in threads):
            time.sleep(0.01)
        for which in range(2):  # compile, and record steps of one row more
            first_token(scheduler, random_ids(model, prompt, 100 + which))
        times, steps = [], []
        for which in range(rounds):
            steps.append(step_time(scheduler, CALM))
            times.append(first_token(scheduler, random_ids(model, prompt, 200 + which)))
        under_way = scheduler.rows
        ends.set()
        for thread in threads:
            thread.join()
    found = {"first_token_ms": median(times) * 1e3, "step_ms": median(steps) * 1e3, "chunk_ms": chunk * 1e3}
    all_times = [t * 1e3 for t in times]
    return {"parallel": under_way, "prompt": prompt, "chunk": size, **found, "times_ms": all_times}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", default=demo_path())
    parser.add_argument("--parallel", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    subject = load_subject(options.file)
    figures = {"model": subject.name, **measured(subject.model, options.parallel, options.prompt, options.rounds)}
    print(json.dumps(figures))
    print(f"first token {figures['first_token_ms'] / figures['chunk_ms']:.2f} chunks after a prompt's arrival")
    if options.json:
        options.json.write_text(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
