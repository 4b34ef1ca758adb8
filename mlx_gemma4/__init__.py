"""Gemma 4 on Apple Silicon, straight from GGUF files.

    import mlx_gemma4

    lm = mlx_gemma4.load("gemma-4-E2B-it-Q4_K_M.gguf")
    print(mlx_gemma4.generate(lm, "Why is the sky blue?"))

`load` opens a file, `generate` answers a prompt, `stream` does so piece by piece. Below them:
`loader` (file to model), `model` (tokens to logits), `generate_tokens` in `generation` (logits to tokens).
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from .errors import InputError
from .text import Chunk, LanguageModel, generate, load, stream

try:
    __version__ = version("mlx-gemma4")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["Chunk", "InputError", "LanguageModel", "__version__", "generate", "load", "stream"]
