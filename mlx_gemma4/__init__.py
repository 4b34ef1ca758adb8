"""Gemma 4 on Apple Silicon, straight from GGUF files.

    import mlx_gemma4

    lm = mlx_gemma4.load("gemma-4-E2B-it-Q4_K_M.gguf")
    print(mlx_gemma4.generate(lm, "Why is the sky blue?"))

`load` opens a file, `generate` answers a prompt, `stream` does so piece by piece: see `text`. Below it
stand `loader` (file to model), `model` (tokens to logits) and `generation` (logits to tokens).
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from .generation import Sampling, Statistics
    from .text import Chunk, LanguageModel, generate, load, stream

try:
    __version__ = version("mlx-gemma4")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+source"

__all__ = ["Chunk", "InputError", "LanguageModel", "Sampling", "Statistics", "generate", "load", "stream"]


def __getattr__(name: str) -> Any:
    """Import MLX and the rest when a public name is first used, so that `mlx-gemma4 --help` need not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".generation" if name in ("Sampling", "Statistics") else ".text", __name__), name)
