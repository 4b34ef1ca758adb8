"""Gemma 4 on Apple Silicon, straight from GGUF files.

    import mlx_gemma4

    lm = mlx_gemma4.load("gemma-4-E2B-it-Q4_K_M.gguf")
    print(mlx_gemma4.generate(lm, "Why is the sky blue?"))

`load` opens a file, `generate` answers a prompt, `stream` does so piece by piece: `conversation.completion`. `chat`
replies to messages, with thinking, tools and schemas, `stream_reply` and `astream` do so piece by piece:
`conversation.reply`. A `Session` is a conversation that goes on: `conversation.session`. Below them stand `loading`
(file to model), `model` (tokens to logits) and `generation` (logits to tokens); docs/architecture.md has the whole
tree.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from .chat_format.messages import tool_result
    from .chat_format.replies import Event, Text, Thinking, ToolCall
    from .conversation.completion import Chunk, generate, stream
    from .conversation.language_model import LanguageModel, load
    from .conversation.mlx_lm import for_mlx_lm
    from .conversation.reply import Reply, ReplyChunk, ReplyOptions, achat, astream, chat, prompt_ids, stream_reply
    from .conversation.session import Session
    from .generation.loop import Statistics
    from .generation.prefix import PrefixCache
    from .generation.sampling import Sampling, Token

try:
    __version__ = version("mlx-gemma4")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+source"

# The module of each public name. No folder bears such a name: importing the folder would shadow it.
_MODULES = {
    "chat_format.messages": ("tool_result",),
    "chat_format.replies": ("Event", "Text", "Thinking", "ToolCall"),
    "conversation.completion": ("Chunk", "generate", "stream"),
    "conversation.language_model": ("LanguageModel", "load"),
    "conversation.mlx_lm": ("for_mlx_lm",),
    "conversation.reply": (
        "Reply",
        "ReplyChunk",
        "ReplyOptions",
        "achat",
        "astream",
        "chat",
        "prompt_ids",
        "stream_reply",
    ),
    "conversation.session": ("Session",),
    "generation.loop": ("Statistics",),
    "generation.prefix": ("PrefixCache",),
    "generation.sampling": ("Sampling", "Token"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Chunk",
    "Event",
    "InputError",
    "LanguageModel",
    "PrefixCache",
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
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
