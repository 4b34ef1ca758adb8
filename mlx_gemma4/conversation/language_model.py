"""Text in, text out: a file becomes a `LanguageModel`, a prompt becomes a reply.

In: a path and a prompt. Out: text, whole or piece by piece. The Python API and the command line both
stand on this module.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from ..chat_format.template import encode_chat
from ..config import Config, config_from_gguf, config_from_json
from ..doctor.verdict import check_model, usable_kernels
from ..errors import InputError
from ..files.gguf import open_gguf
from ..files.hub import resolve
from ..generation.sampling import Sampling
from ..loading.from_gguf import GGUFSource
from ..loading.from_safetensors import FolderSource
from ..loading.loader import Progress, load_model
from ..memory import MemoryPlan
from ..model.model import Model
from ..tokens.tokenizer import Tokenizer

# The keys under general.sampling, with what holds where a file is silent: Google's choice for Gemma 4.
SAMPLING_KEYS = {"temp": 1.0, "top_k": 64, "top_p": 0.95, "min_p": 0.0, "penalty_repeat": 1.0}


@dataclass(frozen=True)
class LanguageModel:
    """A model with what turns text into its tokens and back."""

    path: Path
    config: Config
    model: Model
    tokenizer: Tokenizer
    sampling: Sampling  # what the file recommends
    plan: MemoryPlan  # how the weights are held

    def encode_prompt(
        self,
        prompt: str,
        *,
        raw: bool = False,
        after: Sequence[int] = (),
        system: str | None = None,
        think: bool | None = None,
    ) -> list[int]:
        """Token ids of a prompt: as a user's turn in the file's chat template, or (`raw`) the text as it is.

        Args:
            after: the conversation so far, up to its last reply: the prompt is its next turn.
            system: what the model is told before the conversation.
            think: whether the model is to think first; None: as the template has it.

        Raises:
            InputError: the template can't do that.
        """
        if raw:
            return self.tokenizer.encode(prompt, add_bos=not after)
        turn = {"role": "user", "content": prompt}
        if not after:
            told = [{"role": "system", "content": system}] if system else []
            return encode_chat(self.tokenizer, [*told, turn], enable_thinking=think)
        if system:
            raise InputError("--system: the saved conversation has begun already; leave it out, or start a new one")
        # What the template writes between a reply and the next one, found with a made-up turn before.
        past = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        before = encode_chat(self.tokenizer, past, add_generation_prompt=False, enable_thinking=think)
        both = encode_chat(self.tokenizer, [*past, turn], enable_thinking=think)
        end = max((i for i, token in enumerate(before) if token in self.tokenizer.stop_ids), default=None)
        if end is None or both[: end + 1] != before[: end + 1]:
            raise InputError(f"{self.path}: its chat template doesn't let a saved conversation go on; use --raw")
        return both[end + (after[-1] in self.tokenizer.stop_ids) :]


def demo_path() -> Path:
    """The built-in model's file."""
    return Path(str(files("mlx_gemma4") / "demo" / "gemma4-demo.gguf"))


def load(
    path: str | Path | None = None,
    *,
    weights: Literal["auto", "packed", "dense"] = "auto",
    fuse: bool = True,
    progress: Progress | None = None,
) -> LanguageModel:
    """Load a GGUF file (or any part of a split one), or a folder of safetensors with its `config.json`.

    Args:
        path: the file or folder, or `REPO[:QUANT]` on Hugging Face; None loads the small built-in model.
        weights: "packed" holds quantized blocks as the file has them, "dense" as fp32; "auto" takes
            packed on a GPU and what memory allows on a CPU.
        fuse: join each MLP's gate and up projections.
        progress: called with (bytes read, bytes in all).

    Raises:
        InputError: the file can't be used, in one line.

    >>> lm = load()  # or load("gemma-4-E2B-it-Q4_K_M.gguf"), or load("ggml-org/gemma-4-E2B-it-GGUF:Q4_K_M")
    >>> lm.config.context
    2048
    """
    path = demo_path() if path is None else resolve(path)
    if path.is_dir():
        return _load_folder(path, weights, fuse, progress)
    with open_gguf(path) as file:
        config = config_from_gguf(file.metadata, str(path))
        tokenizer = Tokenizer.from_gguf(file.metadata, str(path))
        model, plan = load_model(config, GGUFSource(file), weights, fuse, progress, usable_kernels())
        check_model(model)
        sampling = _sampling_defaults(
            {key: file.metadata.get(f"general.sampling.{key}") for key in SAMPLING_KEYS}, path
        )
    return LanguageModel(path, config, model, tokenizer, sampling, plan)


def _load_folder(
    path: Path, weights: Literal["auto", "packed", "dense"], fuse: bool, progress: Progress | None
) -> LanguageModel:
    """A folder as mlx-lm and Hugging Face write it."""
    config_file = path / "config.json"
    if not config_file.is_file():
        raise InputError(f"{path}: this folder has no config.json; give a .gguf file or a model's folder")
    contents = _read_json(config_file)
    config = config_from_json(contents, str(config_file))
    tokenizer = Tokenizer.from_folder(path)
    source = FolderSource(path, config, contents.get("quantization") or {})
    model, plan = load_model(config, source, weights, fuse, progress, usable_kernels())
    check_model(model)
    generation = path / "generation_config.json"
    values = _read_json(generation) if generation.is_file() else {}
    values |= {"temp": values.get("temperature"), "penalty_repeat": values.get("repetition_penalty")}
    return LanguageModel(path, config, model, tokenizer, _sampling_defaults(values, generation), plan)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read as JSON ({error}); download the model again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: is not a JSON object; download the model again")
    return value


def _sampling_defaults(values: Mapping[str, Any], source: Path) -> Sampling:
    """What a file recommends, over the defaults of SAMPLING_KEYS."""
    chosen = SAMPLING_KEYS | {key: value for key in SAMPLING_KEYS if (value := values.get(key)) is not None}
    try:
        return Sampling(
            temperature=float(chosen["temp"]),
            top_k=int(chosen["top_k"]),
            top_p=float(chosen["top_p"]),
            min_p=float(chosen["min_p"]),
            repetition_penalty=float(chosen["penalty_repeat"]),
        )
    except (TypeError, ValueError, InputError):
        raise InputError(
            f"{source}: its sampling defaults {chosen} can't be; give --temperature 0 or mend it"
        ) from None
