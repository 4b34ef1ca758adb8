"""Several ranks of this machine over MLX's ring, as `mlx.launch` would start them; and what they are asked to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
from patient import wait_for_peers
from pictured import seeing
from serving import serving

import mlx_gemma4
from mlx_gemma4.conversation import language_model
from mlx_gemma4.conversation.language_model import LanguageModel
from mlx_gemma4.distributed import link, split, team
from mlx_gemma4.distributed.hosts import free_port, read_hosts
from mlx_gemma4.distributed.place import group_of
from mlx_gemma4.generation.scoring import embed
from mlx_gemma4.kv.state import KVState
from mlx_gemma4.measure.perplexity import perplexity
from mlx_gemma4.model.model import Model
from mlx_gemma4.server.settings import Settings

TESTS = Path(__file__).parent
LAUNCHED = [sys.executable, "-m", "mlx_gemma4"]


@contextmanager
def ranks(folder: Path, *commands: list[str], **env: str) -> Iterator[list[subprocess.Popen[str]]]:
    """A process for each command, rank by rank. They are gone afterwards."""
    port = free_port(read_hosts(",".join(["127.0.0.1"] * len(commands))))
    (folder / "ring.json").write_text(json.dumps([[f"127.0.0.1:{port + rank}"] for rank in range(len(commands))]))
    path = f"{TESTS.parent}:{TESTS}:{TESTS / 'fixtures'}:{os.environ.get('PYTHONPATH', '')}"
    env = {
        **os.environ,
        "MLX_HOSTFILE": str(folder / "ring.json"),
        "PYTHONPATH": path,
        "OPENBLAS_NUM_THREADS": "1",
        **env,
    }
    started = [
        subprocess.Popen(
            command,
            env={**env, "MLX_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def end_of(process: subprocess.Popen[str], seconds: float = 300.0) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a process that ends by itself, without the lines that MLX's ring prints."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, "\n".join(line for line in err.splitlines() if not line.startswith("[ring]"))


# What a test asks of a model, alone and on several ranks


def tour(lm: LanguageModel, folder: Path) -> dict[str, Any]:
    """What a person does with a model: replies, a session that goes back, forks and is loaded again, batches, a server.

    Greedy, or of a seed: with the same model the answer is the same.
    """
    greedy = mlx_gemma4.ReplyOptions(8, mlx_gemma4.Sampling(temperature=0))
    seen: dict[str, Any] = {}
    reply = mlx_gemma4.chat(lm, "Tell me a tale of a fox.", replace(greedy, logprobs=2))
    seen["reply"] = [token.id for token in reply.tokens]
    seen["likely"] = [token.logprob for token in reply.tokens]
    seen["drafted"] = mlx_gemma4.generate(lm, "Say it twice: the fox and the goose, the fox and the goose.", greedy)
    seen["sampled"] = mlx_gemma4.generate(lm, "Tell me of the sea.", max_tokens=8, seed=7, temperature=0.9, top_k=20)
    seen["assisted"] = assisted(lm)
    for what in ("cat", "dog"):
        options = replace(greedy, logprobs=2)
        reply = mlx_gemma4.chat(seeing(lm, model=lm.model), "What is {image}?", options, images=[what.encode()])
        seen[what] = [token.id for token in reply.tokens]
        seen[f"{what} likely"] = [token.logprob for token in reply.tokens]
    text = "It was a fine day in spring, and the birds sang in every tree of the wood by the road. " * 3
    seen["perplexity"] = perplexity(lm, text, 32).perplexity
    ids = lm.encode_prompt(text, raw=True)
    seen["embedding"] = embed(lm.model, ids, lm.model.new_state()).tolist()
    seen["schema"] = mlx_gemma4.generate(lm, "Is the sky blue?", schema={"enum": ["yes", "no"]}, temperature=0)
    seen["batch"] = [r.text for _, r in sorted(mlx_gemma4.batch(lm, ["A fox.", "The sea.", "A goose."], greedy))]
    session = mlx_gemma4.Session(lm, options=greedy, kv="tq4" if tq4(lm) else "full")
    seen["said"] = [said(session, "Tell me of a goose."), said(session, "And then?")]
    fork = session.fork()
    session.undo()
    seen["again"] = said(session, "And who was he?")
    seen["fork"] = said(fork, "Was he happy?")
    fork.close()
    session.save(folder / "talk.json")
    session.close()
    loaded = mlx_gemma4.Session.load(lm, folder / "talk.json", options=greedy)
    seen["held"] = loaded.state.length
    seen["loaded"] = said(loaded, "What did she say?")
    loaded.close()
    del session, loaded, fork
    seen["served"] = served(lm)
    return seen


def assisted(lm: LanguageModel) -> list[Any]:
    """Tokens of replies whose every step checks three drafts of the assistant's, and how many of these were right."""
    assert lm.drafts and lm.drafts.drafter and lm.drafts.drafter.needs_hidden
    found: list[Any] = []
    for sampling in (mlx_gemma4.Sampling(temperature=0), mlx_gemma4.Sampling(temperature=0.7, top_k=20, seed=5)):
        lm.drafts.fixed = 3
        reply = mlx_gemma4.chat(lm, "Tell me of a fox and a goose.", mlx_gemma4.ReplyOptions(40, sampling))
        found += [[token.id for token in reply.tokens], reply.statistics.accepted_tokens]
    lm.drafts.fixed = None
    return found


def tq4(lm: LanguageModel) -> bool:
    return all(layer.head_dim % 64 == 0 for layer in lm.config.layers if not layer.sliding)


def said(session: mlx_gemma4.Session, text: str) -> str:
    return "".join(event.text for event in session.send(text) if isinstance(event, mlx_gemma4.Text))


def served(lm: LanguageModel) -> list[str]:
    """Texts of two requests at once, twice: the second time their prompts are cached."""
    texts: dict[int, str] = {}

    def ask(n: int, prompt: str) -> None:
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()
        texts[n] = answer["choices"][0]["message"]["content"]

    with serving(lm, Settings()) as server:
        for turn in range(2):
            asked = [(2 * turn + i, text) for i, text in enumerate(("Tell me of a wolf.", "Tell me of the moon."))]
            threads = [threading.Thread(target=ask, args=pair) for pair in asked]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    return [texts[n] for n in sorted(texts)]


# What a rank is started as, in place of the command line


def patient(backend: str) -> mx.distributed.Group:
    group = group_of(backend)
    wait_for_peers()
    return group


def main() -> None:
    mx.set_default_device(mx.cpu)
    what, *rest = sys.argv[1:]
    if what in ("tour", "auto"):
        link.group_of = patient
    if what == "tour":  # FOLDER SPLIT [MODEL]
        folder, kind, *model = rest
        lm = mlx_gemma4.load(*model, split=kind)  # type: ignore[arg-type]
        print(json.dumps(tour(lm, Path(folder))))
        return
    if what == "auto":  # MODEL: a link so slow that layers are the better choice
        team.measure_link = lambda group: split.Link(1.0, 1e6)
        print(mlx_gemma4.generate(mlx_gemma4.load(rest[0]), "A fox", max_tokens=5, temperature=0))
        return
    if what == "version":
        link.__version__ = "0.0.1"
    if what == "drift":
        append = KVState.append
        KVState.append = lambda self, layer, k, v: append(self, layer, k * 1.5, v * 0.5)  # type: ignore[method-assign]
    if what in ("busy", "waiting"):  # FOLDER: hangs in a step, and says there when
        step, steps = Model.step, count()

        def hanging(self: Model, *args: Any, **given: Any) -> Any:
            if next(steps) == 20:
                (Path(rest[0]) / "hangs").touch()
                while what == "busy":
                    pass
                assert self.part
                mx.async_eval(self.part.receive(1, 1))  # rank 0 sends none
            return step(self, *args, **given)

        Model.step = hanging  # type: ignore[method-assign]
    if what == "other":  # for a file, or those in a folder, others
        named, other = rest
        find = language_model.resolve
        language_model.resolve = lambda name: find(Path(str(name).replace(named, other)))
    mlx_gemma4.load()


if __name__ == "__main__":
    main()
