"""Messages in, a reply out: text, thinking and tool calls, whole or as they are made, in a thread or awaited.

In: a `LanguageModel`, messages as OpenAI's clients have them, `ReplyOptions`. Out: a `Reply`, growing in each
`ReplyChunk` of `stream_reply`. What a state or a store of prefixes has read already isn't read again. A conversation
that goes on is a `session.Session`; this module remembers nothing.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..chat_format.messages import for_template
from ..chat_format.replies import Event, ReplyParser, Text, Thinking, ToolCall, ends_in_thinking
from ..chat_format.template import Message, encode_chat
from ..errors import InputError
from ..generation.loop import Constraint, Statistics, generate_tokens
from ..generation.prefix import PrefixCache, common_length
from ..generation.prefix import reply as reply_from_store
from ..generation.sampling import Sampling, Token
from ..generation.stops import StopStrings
from ..kv.state import KVState
from .background import OnPrompt, in_thread

if TYPE_CHECKING:
    from ..tokens.tokenizer import Tokenizer
    from .language_model import LanguageModel


@dataclass(frozen=True)
class ReplyOptions:
    """How to reply. `chat(lm, messages, think=True, max_tokens=100)` takes these by name.

    Raises:
        InputError: options that can't be together, or no such tool.

    >>> ReplyOptions(max_tokens=100, stop=["###"], think=False).stop
    ('###',)
    """

    max_tokens: int | None = None  # None: as much as the context holds
    sampling: Sampling | None = None  # None: as the model's file recommends
    stop: Sequence[str] = ()  # the answer (not thinking) ends before any of these; a single string will do
    think: bool | None = None  # None: as the chat template has it by default, which for Gemma 4 is no
    tools: Sequence[Mapping[str, Any]] = ()  # functions: {"type": "function", "function": {"name", ...}}
    tool_choice: str = "auto"  # "auto", "none", "required", or the name of the function to call
    schema: Mapping[str, Any] | None = None  # the answer is JSON that fits this JSON Schema
    regex: str | None = None  # the answer matches
    grammar: str | None = None  # the answer is of this language, in Lark's notation
    logprobs: int | None = None  # tokens come with their log-probability, and with so many likeliest ones

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "tools", tuple(self.tools))
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"max_tokens {self.max_tokens}: must be 1 or more")
        if sum(x is not None for x in (self.schema, self.regex, self.grammar)) > 1:
            raise InputError("schema, regex and grammar: give one of them")
        if self.tool_choice not in ("auto", "none", *([] if not self.tools else ["required", *self.tool_names])):
            have = ", ".join(self.tool_names) or "none given"
            message = f"tool_choice {self.tool_choice}: must be auto, none, required or a tool's name ({have})"
            raise InputError(message, field="tool_choice")
        if self.calls_forced and any(x is not None for x in (self.schema, self.regex, self.grammar)):
            message = f"tool_choice {self.tool_choice} leaves no room for schema, regex or grammar"
            raise InputError(message, field="tool_choice")

    @property
    def tool_names(self) -> list[str]:
        return [str((tool.get("function") or tool).get("name")) for tool in self.tools]

    @property
    def calls_forced(self) -> bool:
        """Whether the reply has to be a tool call."""
        return self.tool_choice not in ("auto", "none")


@dataclass
class Reply:
    """A reply, as far as it is made.

    `finish_reason` says how it ended: "stop" by itself or at a stop string, "tool_calls" likewise and it calls some,
    "length" cut by `max_tokens` or the context; "cancelled" until then, and for good if nobody waited for the end.
    """

    text: str = ""
    thinking: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "tool_calls", "cancelled"] = "cancelled"
    stop_string: str | None = None  # the one of `ReplyOptions.stop` that ended it
    statistics: Statistics = field(default_factory=Statistics)
    tokens: list[Token] = field(default_factory=list)  # all but the one that ended it, control tokens included

    def add(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Text):
                self.text += event.text
            elif isinstance(event, Thinking):
                self.thinking += event.text
            else:
                self.tool_calls.append(event)

    @property
    def message(self) -> dict[str, Any]:
        """The reply as the conversation's next message, in OpenAI's form."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.thinking.strip():
            message["reasoning_content"] = self.thinking.strip("\n")
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message


@dataclass(frozen=True)
class ReplyChunk:
    """What a token brought: often one event, none while a character, a call or a stop string may be in progress."""

    events: list[Event]
    token: Token | None  # None: the last chunk, with what was held back
    reply: Reply  # all so far; the same object in each chunk


def prompt_ids(
    lm: LanguageModel, messages: Sequence[Message], options: ReplyOptions | None = None, *, reply: bool = True
) -> list[int]:
    """The ids that the model will read for these messages, tools and thinking included.

    Args:
        reply: end where the model's reply begins, not after the last message.

    Raises:
        InputError: the messages are none, or not as the chat template wants them.
    """
    options = options or ReplyOptions()
    if not messages:
        raise InputError("there are no messages to reply to")
    tools = options.tools if options.tool_choice != "none" else ()
    known, declared = for_template(messages, tools, lm.tokenizer.chat_template)
    return encode_chat(
        lm.tokenizer, known, add_generation_prompt=reply, tools=declared or None, enable_thinking=options.think
    )


def stream_reply(
    lm: LanguageModel,
    messages: Sequence[Message] | Sequence[int] | str,
    options: ReplyOptions | None = None,
    *,
    store: PrefixCache | None = None,
    state: KVState | None = None,
    marks: bool = True,
    on_prompt: OnPrompt | None = None,
) -> Generator[ReplyChunk, None, None]:
    """Reply to a conversation, a chunk for each token and a last one.

    Args:
        lm: a loaded model.
        messages: the whole conversation, or what a user says, or token ids of a whole prompt as they are.
        options: how to reply.
        store: where the longest known beginning of the prompt comes from, and prompt and reply are kept.
        state: instead of a store, one state of `lm.model`: what it has in common with the prompt is kept, the rest
            is rewound; it then holds prompt and reply.
        marks: leave places in `state` to come back to. Each may come to hold a window of each sliding layer.
        on_prompt: called with (tokens read, tokens in all) while the prompt is read; what it raises ends the reply.

    Yields:
        chunks. Closing the iterator stops the reply within a token.

    Raises:
        InputError: the messages, the options or the prompt's length can't be.

    >>> import mlx_gemma4
    >>> lm = mlx_gemma4.load()
    >>> chunks = list(stream_reply(lm, "Tell me a tale.", ReplyOptions(max_tokens=8)))
    >>> text = "".join(e.text for chunk in chunks for e in chunk.events if isinstance(e, mlx_gemma4.Text))
    >>> reply = chunks[-1].reply
    >>> text == reply.text, reply.finish_reason
    (True, 'length')
    """
    options = options or ReplyOptions()
    ids = _whole_prompt(lm, messages, options)
    reply = Reply()
    parser = ReplyParser(lm.tokenizer, thinking_open=ends_in_thinking(lm.tokenizer, ids))
    stops = StopStrings(options.stop)
    marks = marks and state is not None
    with closing(_tokens(lm, ids, options, store, state, marks, reply.statistics, on_prompt)) as tokens:
        for token in tokens:
            reply.tokens.append(token)
            events = _cut(stops, parser.push(token.id))
            reply.add(events)
            yield ReplyChunk(events, token, reply)
            if stops.stopped:
                reply.statistics.stop_reason = "stop"
                break
    events = [] if stops.stopped else _cut(stops, parser.finish(), last=True)
    reply.add(events)
    reply.stop_string = stops.found
    if reply.statistics.stop_reason == "length":
        reply.finish_reason = "length"
    else:
        reply.finish_reason = "tool_calls" if reply.tool_calls else "stop"
    yield ReplyChunk(events, None, reply)


def chat(
    lm: LanguageModel,
    messages: Sequence[Message] | Sequence[int] | str,
    options: ReplyOptions | None = None,
    *,
    store: PrefixCache | None = None,
    state: KVState | None = None,
    on_prompt: OnPrompt | None = None,
    **fields: Any,
) -> Reply:
    """The whole reply to a conversation. Arguments and errors are those of `stream_reply`; options by name will do.

    >>> import mlx_gemma4
    >>> lm = mlx_gemma4.load()
    >>> reply = chat(lm, [{"role": "user", "content": "Tell me a tale."}], max_tokens=8)
    >>> reply.statistics.reply_tokens
    8
    """
    *_, last = stream_reply(lm, messages, _options(options, fields), store=store, state=state, on_prompt=on_prompt)
    return last.reply


async def astream(
    lm: LanguageModel,
    messages: Sequence[Message] | Sequence[int] | str,
    options: ReplyOptions | None = None,
    *,
    store: PrefixCache | None = None,
    state: KVState | None = None,
    on_prompt: OnPrompt | None = None,
    **fields: Any,
) -> AsyncGenerator[ReplyChunk, None]:
    """As `stream_reply`, for `async for`: the work is done in a thread. Leaving or cancelling stops it in a token.

    >>> import asyncio, mlx_gemma4
    >>> async def main():
    ...     lm = mlx_gemma4.load()
    ...     return [chunk.events async for chunk in astream(lm, "Once upon a time", max_tokens=8)]
    >>> len(asyncio.run(main()))
    9
    """
    options = _options(options, fields)

    def start(check: OnPrompt) -> Iterator[ReplyChunk]:
        return stream_reply(lm, messages, options, store=store, state=state, on_prompt=check)

    async with aclosing(in_thread(start, on_prompt)) as chunks:
        async for chunk in chunks:
            yield chunk


async def achat(
    lm: LanguageModel,
    messages: Sequence[Message] | Sequence[int] | str,
    options: ReplyOptions | None = None,
    **fields: Any,
) -> Reply:
    """As `chat`, awaited; cancelling the task stops the reply. `fields`: also `store`, `state`, `on_prompt`."""
    reply = Reply()
    async for chunk in astream(lm, messages, options, **fields):
        reply = chunk.reply
    return reply


def _options(options: ReplyOptions | None, fields: dict[str, Any]) -> ReplyOptions:
    if options is not None and fields:
        raise TypeError(f"give options either by name or as ReplyOptions, not both: {', '.join(fields)}")
    return options or ReplyOptions(**fields)


def _whole_prompt(
    lm: LanguageModel, messages: Sequence[Message] | Sequence[int] | str, options: ReplyOptions
) -> list[int]:
    if isinstance(messages, str):
        return prompt_ids(lm, [{"role": "user", "content": messages}], options)
    if messages and all(isinstance(i, int) for i in messages):
        return [int(i) for i in messages]  # type: ignore[arg-type]
    return prompt_ids(lm, messages, options)  # type: ignore[arg-type]


def _tokens(
    lm: LanguageModel,
    ids: list[int],
    options: ReplyOptions,
    store: PrefixCache | None,
    state: KVState | None,
    marks: bool,
    statistics: Statistics,
    on_prompt: OnPrompt | None,
) -> Generator[Token, None, None]:
    """The reply's tokens, from a store, a state, or a new one."""
    sampling, stop_ids = options.sampling or lm.sampling, lm.tokenizer.stop_ids
    room = max(1, lm.config.context - len(ids))
    if state is not None and state.max_tokens is not None:
        room = max(1, min(room, state.max_tokens - len(ids)))
    max_tokens = min(options.max_tokens or room, room)
    constraint = _constraint(lm, options)
    if store is not None:
        yield from reply_from_store(
            store,
            ids,
            sampling,
            max_tokens,
            stop_ids,
            statistics,
            on_prompt,
            constraint=constraint,
            logprobs=options.logprobs,
        )
        return
    state = lm.model.new_state() if state is None else state
    ids = as_held(lm.tokenizer, ids, state.tokens)
    statistics.reused_tokens = go_back(state, ids[:-1])
    yield from generate_tokens(
        lm.model,
        state,
        ids[statistics.reused_tokens :],
        sampling,
        max_tokens,
        stop_ids,
        statistics,
        on_prompt,
        stop_ids if marks else None,
        constraint=constraint,
        logprobs=options.logprobs,
    )


def as_held(tokenizer: Tokenizer, ids: list[int], held: list[int]) -> list[int]:
    """A prompt with its beginning as a state holds it, where both spell the same text between the same control tokens.

    A model may write a text in other tokens than the tokenizer would: what it wrote needn't be read again for that.
    """
    if ids[: len(held)] == held:
        return ids
    kept: list[int] = []
    done = 0  # of ids
    for mine, its in zip(_runs(tokenizer, ids), _runs(tokenizer, held), strict=False):
        if mine != its and _spelled(tokenizer, mine) != _spelled(tokenizer, its):
            break
        kept += its
        done += len(mine)
    return kept + ids[done:]


def _runs(tokenizer: Tokenizer, ids: list[int]) -> Iterator[list[int]]:
    """Control tokens one by one, and the text between them."""
    for control, run in groupby(ids, tokenizer.control_ids.__contains__):
        if control:
            yield from ([token] for token in run)
        else:
            yield list(run)


def _spelled(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    return b"".join(tokenizer.piece(token, skip_special=False) for token in ids)


def go_back(state: KVState, ids: list[int]) -> int:
    """Rewind a state to the last place it can reach that holds nothing but a beginning of `ids`; its new length."""
    common = common_length(np.array(ids, np.int32), np.array(state.tokens, np.int32))
    reach = state.reach(common)
    state.wanted_marks = {common} if reach < common else set()  # reading passes there, and others may come back to it
    state.rewind(reach)
    return reach


def _cut(stops: StopStrings, events: list[Event], *, last: bool = False) -> list[Event]:
    """Events up to a stop string. Only the answer is searched; thinking and calls interrupt it.

    Text that a stop string may begin with is held back until the next call, or the `last`.
    """
    found: list[Event] = []
    for event in events:
        if isinstance(event, Text):
            text, stopped = stops.push(event.text)
            found += [Text(text)] if text else []
            if stopped:
                return found
        else:
            found += [*_held_back(stops), event]
    return found + (_held_back(stops) if last else [])


def _held_back(stops: StopStrings) -> list[Event]:
    text = stops.finish()
    return [Text(text)] if text else []


def _constraint(lm: LanguageModel, options: ReplyOptions) -> Constraint | None:
    """What the reply must look like, where the options say so."""
    if not options.calls_forced and options.schema is None and options.regex is None and options.grammar is None:
        return None
    from ..grammar import grammar

    think = bool(options.think)
    if options.calls_forced:
        return grammar.tool_calls(lm.tokenizer, options.tools, options.tool_choice, think=think)
    if options.schema is not None:
        return grammar.json_schema(lm.tokenizer, options.schema, think=think)
    if options.regex is not None:
        return grammar.regex(lm.tokenizer, options.regex, think=think)
    if options.grammar is not None:
        return grammar.lark(lm.tokenizer, options.grammar, think=think)
    return None
