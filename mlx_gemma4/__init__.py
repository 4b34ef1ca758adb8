"""Gemma 4 on Apple Silicon, straight from GGUF files.

    import mlx_gemma4

    lm = mlx_gemma4.load("gemma-4-E2B-it-Q4_K_M.gguf")
    print(mlx_gemma4.generate(lm, "Why is the sky blue?"))

`load` opens a file, `generate` answers a prompt, `stream` does so piece by piece: see `text`. `chat` replies to
messages, with thinking, tools and schemas, `stream_reply` and `astream` do so piece by piece: see `conversation`. A
`Session` is a conversation that goes on: see `session`. Below them stand `loader` (file to model), `model` (tokens to
logits) and `generation` (logits to tokens).
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from .conversation import Reply, ReplyChunk, ReplyOptions, achat, astream, chat, prompt_ids, stream_reply
    from .generation import Statistics
    from .messages import tool_result
    from .mlx_lm_adapter import for_mlx_lm
    from .prefix import PrefixStore
    from .replies import Event, Text, Thinking, ToolCall
    from .sampling import Sampling, Token
    from .session import Session
    from .text import Chunk, LanguageModel, generate, load, stream

try:
    __version__ = version("mlx-gemma4")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+source"

# Where each public name is. No name is a module's own: importing that module would put it in the name's place.
_PLACES = {
    "conversation": ("Reply", "ReplyChunk", "ReplyOptions", "achat", "astream", "chat", "prompt_ids", "stream_reply"),
    "generation": ("Statistics",),
    "messages": ("tool_result",),
    "mlx_lm_adapter": ("for_mlx_lm",),
    "prefix": ("PrefixStore",),
    "replies": ("Event", "Text", "Thinking", "ToolCall"),
    "sampling": ("Sampling", "Token"),
    "session": ("Session",),
    "text": ("Chunk", "LanguageModel", "generate", "load", "stream"),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "Chunk",
    "Event",
    "InputError",
    "LanguageModel",
    "PrefixStore",
    "Reply",
    "ReplyChunk",
    "ReplyOptions",
    "Sampling",
    "Session",
    "Statistics",
    "Text",
    "Thinking",
    "Token",
    "ToolCall",
    "achat",
    "astream",
    "chat",
    "for_mlx_lm",
    "generate",
    "load",
    "prompt_ids",
    "stream",
    "stream_reply",
    "tool_result",
]


def __getattr__(name: str) -> Any:
    """Import MLX and the rest when a public name is first used, so that `mlx-gemma4 --help` need not."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
