"""Gemma 4 on Apple Silicon, straight from GGUF files.

    import mlx_gemma4

    lm = mlx_gemma4.load("gemma-4-E2B-it-Q4_K_M.gguf")
    print(mlx_gemma4.generate(lm, "Why is the sky blue?"))

`load` opens a file (`conversation.language_model`). `stream` replies to a prompt, messages or token ids, a `Chunk` for
each token; `generate` returns the text, `chat` a `Reply` with thinking and tool calls; `astream` and `achat` are
awaited (`conversation.reply`), and `batch` replies to many prompts at once (`conversation.batch`). A `Session` is a
conversation that continues (`conversation.session`). Below them are `loading` (file to model), `model` (tokens to
logits) and `generation` (logits to tokens); docs/architecture.md has the whole tree.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from .chat_format.messages import tool_result
    from .chat_format.replies import Event, Text, Thinking, ToolCall
    from .conversation.batch import batch
    from .conversation.language_model import LanguageModel, load
    from .conversation.mlx_lm import for_mlx_lm
    from .conversation.reply import Chunk, Reply, ReplyOptions, achat, astream, chat, generate, prompt_ids, stream
    from .conversation.session import Session
    from .generation.decoding import Statistics
    from .generation.prefix import PrefixCache
    from .generation.sampling import Sampling, Token

try:
    __version__ = version("mlx-gemma4")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+source"

# The module of each public name. No folder bears such a name: importing the folder would shadow it.
_MODULES = {
    "chat_format.messages": "tool_result",
    "chat_format.replies": "Event Text Thinking ToolCall",
    "conversation.batch": "batch",
    "conversation.language_model": "LanguageModel load",
    "conversation.mlx_lm": "for_mlx_lm",
    "conversation.reply": "Chunk Reply ReplyOptions achat astream chat generate prompt_ids stream",
    "conversation.session": "Session",
    "generation.decoding": "Statistics",
    "generation.prefix": "PrefixCache",
    "generation.sampling": "Sampling Token",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}

# fmt: off
__all__ = [
    "Chunk", "Event", "InputError", "LanguageModel", "PrefixCache", "Reply", "ReplyOptions", "Sampling", "Session",
    "Statistics", "Text", "Thinking", "Token", "ToolCall", "achat", "astream", "batch", "chat", "for_mlx_lm",
    "generate", "load", "prompt_ids", "stream", "tool_result",
]
# fmt: on


def __getattr__(name: str) -> Any:
    """Import MLX and the rest when a public name is first used, so that `mlx-gemma4 --help` need not."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
