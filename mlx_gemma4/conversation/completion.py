"""One prompt, one reply, as text: whole or piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..chat_format.replies import Text, Thinking
from ..generation.loop import Statistics, check_length
from ..generation.sampling import Sampling, Token
from ..kv.state import KVState
from .language_model import LanguageModel
from .reply import ReplyOptions, stream_reply

DEFAULT_MAX_TOKENS = 256


@dataclass
class Chunk:
    """A piece of a reply as it is made."""

    text: str  # may be empty, while a character's bytes, a control token or thinking pass
    token: Token | None  # None: the last piece, text held back until the end
    statistics: Statistics = field(default_factory=Statistics)
    thinking: str = ""  # a piece of what the model thinks before it replies


def stream(
    lm: LanguageModel,
    prompt: str | list[int],
    *,
    raw: bool = False,
    system: str | None = None,
    think: bool | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    schema: Mapping[str, Any] | None = None,
    logprobs: int | None = None,
    on_prompt: Callable[[int, int], None] | None = None,
    state: KVState | None = None,
) -> Generator[Chunk, None, None]:
    """Answer a prompt piece by piece. For tools, grammars and whole conversations see `stream_reply`.

    Args:
        lm: a loaded model.
        prompt: text, or token ids as they are.
        raw: send the text as it is, without the chat template.
        system: what the model is told before the conversation.
        think: let the model think first; None: as the chat template has it.
        max_tokens: the length at most, of thinking and reply.
        sampling: how tokens are chosen; None: as the file recommends.
        stop: strings that the reply ends before.
        schema: the reply is JSON that obeys this JSON schema.
        logprobs: tokens come with their log-probability, and with so many likeliest ones.
        on_prompt: called with (tokens read, tokens in all) while the prompt is read.
        state: a conversation that this continues, of `lm.model`; takes prompt and reply. None: a new one.

    Yields:
        a Chunk a token. The texts, joined, are the reply; no piece breaks a character. All share one
        `statistics`, which is up to date at every piece.

    Raises:
        InputError: the prompt is empty or too long, or an option can't be.

    >>> chunks = list(stream(load(), "Tell me a tale.", max_tokens=8))
    >>> len(chunks), chunks[0].statistics.reply_tokens
    (9, 8)
    """
    state = lm.model.new_state() if state is None else state
    before = state.tokens
    if isinstance(prompt, str):
        prompt = lm.encode_prompt(prompt, raw=raw, after=before, system=system, think=think)
    check_length(len(prompt), lm.config.context)
    options = ReplyOptions(max_tokens, sampling, tuple(stop), think, schema=schema, logprobs=logprobs)
    for chunk in stream_reply(lm, [*before, *prompt], options, state=state, marks=False, on_prompt=on_prompt):
        text = thinking = ""
        for event in chunk.events:
            if isinstance(event, Thinking):
                thinking += event.text
            else:
                text += event.text if isinstance(event, Text) else event.raw
        yield Chunk(text, chunk.token, chunk.reply.statistics, thinking)


def generate(
    lm: LanguageModel,
    prompt: str | list[int],
    *,
    raw: bool = False,
    system: str | None = None,
    think: bool | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    schema: Mapping[str, Any] | None = None,
) -> str:
    """Answer a prompt; the whole reply, without thinking. Arguments and errors are those of `stream`.

    >>> generate(load(), "Is the sky blue?", schema={"enum": ["yes", "no"]}) in ('"yes"', '"no"')
    True
    """
    chunks = stream(
        lm,
        prompt,
        raw=raw,
        system=system,
        think=think,
        max_tokens=max_tokens,
        sampling=sampling,
        stop=stop,
        schema=schema,
    )
    return "".join(chunk.text for chunk in chunks)
