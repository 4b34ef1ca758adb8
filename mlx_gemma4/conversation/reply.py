"""A prompt in, a reply out: text, thinking and tool calls, whole or as they are made, in a thread or awaited.

In: a `LanguageModel`; what a user says, messages as OpenAI's clients have them, or token ids; `ReplyOptions`. Out:
`stream` yields a `Chunk` for each token; `generate` joins their text, `chat` returns the complete `Reply`, `astream`
and `achat` are awaited. Tokens that a state or a prefix cache holds are not read again. A conversation that continues
is a `session.Session`; this module keeps nothing between calls.
"""

from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import groupby
from numbers import Integral
from typing import Any, Literal, cast

import numpy as np

from ..chat_format.replies import Event, ReplyParser, Text, Thinking, ToolCall, ends_in_thinking
from ..chat_format.template import Message
from ..errors import InputError
from ..generation.decoding import Statistics
from ..generation.loop import generate_tokens
from ..generation.prefix import PrefixCache, common_length
from ..generation.sampling import Constraint, Sampling, Token
from ..generation.scheduler import Scheduler
from ..generation.stops import StopStrings
from ..kv.state import KVState
from ..tokens.tokenizer import Tokenizer
from .background import OnPrompt, in_thread
from .budget import ThinkBudget
from .language_model import LanguageModel
from .parts import PromptIds, content_of, parts_of

Prompt = str | Sequence[int] | Sequence[Message]  # what a user says, a whole prompt's token ids, or a conversation


@dataclass(frozen=True)
class ReplyOptions:
    """Settings of a reply. `stream` and the others also take them by name: `chat(lm, "Hi", think=True, max_tokens=9)`.

    Raises:
        InputError: options that exclude each other, or a tool_choice that names no tool.

    >>> ReplyOptions(max_tokens=100, stop=["###"], think=False).stop
    ('###',)
    """

    max_tokens: int | None = None  # length of thinking and answer; None: as much as the context holds
    sampling: Sampling | None = None  # None: as the model's file recommends
    stop: Sequence[str] = ()  # the answer (not thinking) ends before any of these; may be a single string
    think: bool | None = None  # None: the chat template's default, which for Gemma 4 is no
    tools: Sequence[Mapping[str, Any]] = ()  # functions: {"type": "function", "function": {"name", ...}}
    tool_choice: str = "auto"  # "auto", "none", "required", or the name of the function to call
    schema: Mapping[str, Any] | None = None  # the answer is JSON that fits this JSON Schema
    regex: str | None = None  # the answer matches this regular expression, in Rust's syntax
    grammar: str | None = None  # the answer is of this language, in Lark's notation
    logprobs: int | None = None  # each token carries its log-probability, and those of so many likeliest ones
    go_on: bool = False  # with the last message, the assistant's: the reply is what follows its text
    think_budget: int | None = None  # tokens of thinking, after which it is ended; None: no bound

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "tools", tuple(self.tools))
        forms = sum(form is not None for form in (self.schema, self.regex, self.grammar))
        for name in ("max_tokens", "think_budget"):
            if getattr(self, name) == -1:  # as llama.cpp and others spell "no limit"
                object.__setattr__(self, name, None)
        if self.think_budget is not None and self.think_budget < 0:
            raise InputError(f"think_budget {self.think_budget}: must be 0 or more", field="think_budget")
        if self.max_tokens is not None and not (isinstance(self.max_tokens, Integral) and self.max_tokens >= 1):
            raise InputError(f"max_tokens {self.max_tokens!r}: must be a whole number, 1 or more")
        if self.logprobs is not None and not isinstance(self.logprobs, Integral):
            raise InputError(f"logprobs {self.logprobs!r}: must be a whole number")
        if not all(isinstance(text, str) for text in self.stop):
            raise InputError(f"stop {self.stop!r}: must be a text or several")
        if forms > 1:
            raise InputError("schema, regex and grammar: give one of them")
        if self.tool_choice not in ("auto", "none", *(["required", *self.tool_names] if self.tools else [])):
            have = ", ".join(self.tool_names) or "none given"
            message = f"tool_choice {self.tool_choice}: must be auto, none, required or a tool's name ({have})"
            raise InputError(message, field="tool_choice")
        if self.calls_forced and forms:
            message = f"tool_choice {self.tool_choice} leaves no room for schema, regex or grammar"
            raise InputError(message, field="tool_choice")

    @property
    def tool_names(self) -> list[str]:
        return [str((tool.get("function") or tool).get("name")) for tool in self.tools]

    @property
    def calls_kept(self) -> bool:
        """True if calls that the model makes by itself must keep to their schemas: a tool has `"strict": true`."""
        functions = (tool.get("function", tool) for tool in self.tools)
        return self.tool_choice == "auto" and any(function.get("strict") is True for function in functions)

    @property
    def calls_forced(self) -> bool:
        """True if the reply must be a tool call."""
        return self.tool_choice not in ("auto", "none")


@dataclass
class Reply:
    """A reply, as far as it has been made.

    `finish_reason`: "stop" if the model or a stop string ended it, "tool_calls" if it also calls tools, "length" if
    `max_tokens` or the context cut it; "cancelled" until then, and for good if it was not read to its end.
    """

    text: str = ""
    thinking: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "tool_calls", "cancelled"] = "cancelled"
    stop_string: str | None = None  # the member of `ReplyOptions.stop` that ended it
    statistics: Statistics = field(default_factory=Statistics)
    tokens: list[Token] = field(default_factory=list)  # control tokens included, except the one that ended it
    error: str | None = None  # why `batch` has no (whole) reply

    def add(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Text):
                self.text += event.text
            elif isinstance(event, Thinking):
                self.thinking += event.text
            elif isinstance(event, ToolCall):
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
class Chunk:
    """The part of a reply that one token adds: often one event, none while a character, call or stop string is open."""

    events: list[Event]
    token: Token | None  # None: the last chunk, with the text held back so far
    reply: Reply  # all so far; the same object in each chunk

    @property
    def text(self) -> str:
        """Its piece of the answer; a tool call as the model wrote it."""
        added = (event for event in self.events if isinstance(event, Text | ToolCall))
        return "".join(event.text if isinstance(event, Text) else event.raw for event in added)

    @property
    def thinking(self) -> str:
        """Its piece of the model's thinking before the answer."""
        return "".join(event.text for event in self.events if isinstance(event, Thinking))

    @property
    def statistics(self) -> Statistics:
        """Figures of the reply so far; the same object in each chunk."""
        return self.reply.statistics


def prompt_ids(
    lm: LanguageModel, messages: Sequence[Message], options: ReplyOptions | None = None, *, reply: bool = True
) -> PromptIds:
    """Return the token ids that the model reads for these messages, tools and thinking included.

    Pictures and sounds stand in them as soft tokens, whose ids are below zero, and are known while the list is held.

    Args:
        reply: end where the model's reply begins, not after the last message.

    Raises:
        InputError: there are no messages, or the chat template refuses them.
    """
    options = options or ReplyOptions()
    begun = messages[-1] if messages and options.go_on and reply else None
    if begun is not None:
        if begun.get("role") != "assistant" or begun.get("tool_calls"):
            raise InputError("to go on with the last message, it must be the assistant's, and text")
        messages = messages[:-1]
    if not messages:
        raise InputError("there are no messages to reply to")
    tools = options.tools if options.tool_choice != "none" else ()
    ids = lm.encode_messages(messages, tools, add_generation_prompt=reply, enable_thinking=options.think)
    if begun is not None:
        ids += _beginning(lm.tokenizer, begun)
    return ids


def _beginning(tokenizer: Tokenizer, message: Message) -> list[int]:
    """Return the ids of a reply that is begun. With thinking and no text, it is the thinking that goes on."""
    opening, closing = tokenizer.token_id("<|channel>"), tokenizer.token_id("<channel|>")
    thinking, text = message.get("reasoning_content"), message.get("content") or ""
    ids = tokenizer.encode(str(text), add_bos=False) if text else []
    if not thinking or opening is None or closing is None:
        return ids
    return [opening, *tokenizer.encode(f"thought\n{thinking}", add_bos=False), *([closing, *ids] if ids else [])]


def stream(
    lm: LanguageModel,
    prompt: Prompt,
    options: ReplyOptions | None = None,
    *,
    store: PrefixCache | None = None,
    state: KVState | None = None,
    marks: bool = True,
    on_prompt: OnPrompt | None = None,
    scheduler: Scheduler | None = None,
    call_parts: bool = False,
    images: Sequence[Any] = (),
    audio: Sequence[Any] = (),
    **named: Any,
) -> Generator[Chunk, None, None]:
    """Reply to a prompt, a chunk for each token and a last one. Closing the iterator stops within a token.

    Args:
        lm: a loaded model.
        prompt: what a user says, or the messages of a whole conversation, or token ids of a whole prompt.
        options: settings of the reply.
        store: take the longest known beginning of the prompt from this cache, and keep prompt and reply there.
        state: use this state of `lm.model` instead: it is rewound to what it shares with the prompt, and then holds
            prompt and reply.
        marks: leave marks in `state` to rewind to later. Each may hold a window of every sliding layer.
        on_prompt: called with (tokens read, tokens in all) while the prompt is read; an exception ends the reply.
        scheduler: of `lm.model`: make the reply together with others of its own.
        call_parts: events also tell of calls while they are written (`CallPart`).
        images: pictures beside a prompt that is a string: paths, bytes of files, or PIL images. They stand where the
            text has {image}, or else before it.
        audio: sounds beside it: paths or bytes of files, for {audio}.
        named: instead of `options`, fields of ReplyOptions by name, and of Sampling to change what the model's file
            recommends: `stream(lm, "Hi", max_tokens=20, temperature=0)`.

    Raises:
        InputError: the messages are refused, the prompt is too long, or an option is out of range.

    >>> import mlx_gemma4
    >>> lm = mlx_gemma4.load()
    >>> chunks = list(stream(lm, "Tell me a tale.", max_tokens=8))
    >>> len(chunks), chunks[-1].statistics.reply_tokens, chunks[-1].reply.finish_reason
    (9, 8, 'length')
    >>> "".join(chunk.text for chunk in chunks) == chunks[-1].reply.text
    True
    """
    options = options_of(lm, options, named)
    if images or audio:
        if not isinstance(prompt, str):
            raise InputError("images and audio go with a prompt that is a string; put them into the messages")
        prompt = [{"role": "user", "content": content_of(prompt, parts_of(images, audio))}]
    ids = whole = whole_prompt(lm, prompt, options)  # `whole` holds its pictures while it is read
    reply, stops, stop_ids = Reply(), StopStrings(options.stop), lm.tokenizer.stop_ids
    thinking = ends_in_thinking(lm.tokenizer, whole)
    parser = ReplyParser(lm.tokenizer, thinking_open=thinking, parts=call_parts)
    room = max(1, lm.config.context - len(ids))
    if state is not None and state.max_tokens is not None:
        room = max(1, min(room, state.max_tokens - len(ids)))
    max_tokens = min(options.max_tokens or room, room)
    constraint = _constraint(lm, options, thinking)
    if options.think_budget is not None and options.think_budget < max_tokens:
        constraint = ThinkBudget(lm.tokenizer, options.think_budget, constraint, thinking)
    marks = store is not None or (marks and state is not None)
    with ExitStack() as stack:
        if store is not None:
            state, held = stack.enter_context(store.lease(ids, max_tokens))
        else:
            state = lm.model.new_state() if state is None else state
            ids = as_held(lm.tokenizer, ids, state.tokens)
            held = go_back(state, ids[:-1])
        reply.statistics.reused_tokens = held
        make = scheduler.generate_tokens if scheduler else partial(generate_tokens, lm.model, drafts=lm.drafts)
        tokens = make(
            state,
            ids[held:],
            options.sampling or lm.sampling,
            max_tokens,
            stop_ids,
            reply.statistics,
            on_prompt,
            stop_ids if marks else None,
            constraint=constraint,
            logprobs=options.logprobs,
        )
        for token in stack.enter_context(closing(tokens)):
            reply.tokens.append(token)
            events = _cut(stops, parser.push(token.id))
            reply.add(events)
            yield Chunk(events, token, reply)
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
    yield Chunk(events, None, reply)


def generate(lm: LanguageModel, prompt: Prompt, options: ReplyOptions | None = None, **rest: Any) -> str:
    """Return the answer as text, without thinking. Arguments and errors are those of `stream`.

    >>> import mlx_gemma4
    >>> generate(mlx_gemma4.load(), "Is the sky blue?", schema={"enum": ["yes", "no"]}) in ('"yes"', '"no"')
    True
    """
    return "".join(chunk.text for chunk in stream(lm, prompt, options, **rest))


def chat(lm: LanguageModel, prompt: Prompt, options: ReplyOptions | None = None, **rest: Any) -> Reply:
    """Return the whole reply. Arguments and errors are those of `stream`.

    >>> import mlx_gemma4
    >>> lm = mlx_gemma4.load()
    >>> reply = chat(lm, [{"role": "user", "content": "Tell me a tale."}], max_tokens=8)
    >>> reply.statistics.reply_tokens
    8
    """
    *_, last = stream(lm, prompt, options, **rest)
    return last.reply


def astream(
    lm: LanguageModel,
    prompt: Prompt,
    options: ReplyOptions | None = None,
    *,
    on_prompt: OnPrompt | None = None,
    **rest: Any,
) -> AsyncGenerator[Chunk, None]:
    """As `stream`, for `async for`: the work is done in a thread. Leaving or cancelling stops it within a token.

    >>> import asyncio, mlx_gemma4
    >>> async def main():
    ...     lm = mlx_gemma4.load()
    ...     return [chunk.events async for chunk in astream(lm, "Once upon a time", max_tokens=8)]
    >>> len(asyncio.run(main()))
    9
    """
    return in_thread(lambda check: stream(lm, prompt, options, on_prompt=check, **rest), on_prompt)


async def achat(lm: LanguageModel, prompt: Prompt, options: ReplyOptions | None = None, **rest: Any) -> Reply:
    """As `chat`, awaited; cancelling the task stops the reply."""
    async for chunk in astream(lm, prompt, options, **rest):
        reply = chunk.reply
    return reply


def options_of(lm: LanguageModel, options: ReplyOptions | None, named: dict[str, Any]) -> ReplyOptions:
    """Return the options, given as such or by name."""
    if options is not None and named:
        raise TypeError(f"give options either by name or as ReplyOptions, not both: {', '.join(named)}")
    sampling = {f.name: named.pop(f.name) for f in fields(Sampling) if f.name in named}
    if sampling:
        named["sampling"] = replace(named.get("sampling") or lm.sampling, **sampling)
    return options or ReplyOptions(**named)


def whole_prompt(lm: LanguageModel, prompt: Prompt, options: ReplyOptions) -> list[int]:
    """Return a prompt's token ids. Raises InputError, also for ids that the model does not have."""
    if not isinstance(prompt, str) and len(prompt) and all(isinstance(i, Integral) for i in prompt):
        ids = [int(i) for i in cast(Sequence[int], prompt)]
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = prompt_ids(lm, cast(Sequence[Message], messages), options)
    lm.config.check_ids(ids, soft=True)
    return ids


def as_held(tokenizer: Tokenizer, ids: list[int], held: list[int]) -> list[int]:
    """Return the prompt `ids` with its beginning in the tokens that a state holds, as far as both spell the same text.

    A model may write a text in other tokens than the tokenizer would; that is no reason to read it again. Text is
    compared in stretches between control tokens, which must be the same.
    """
    if ids[: len(held)] == held:
        return ids
    kept: list[int] = []
    done = 0  # of ids
    for mine, its in zip(_runs(tokenizer, ids), _runs(tokenizer, held), strict=False):
        if mine != its and (min(*mine, *its) < 0 or _spelled(tokenizer, mine) != _spelled(tokenizer, its)):
            break
        kept += its
        done += len(mine)
    return kept + ids[done:]


def _runs(tokenizer: Tokenizer, ids: list[int]) -> Iterator[list[int]]:
    """Split into control and soft tokens, one by one, and the stretches of text between them."""
    for control, run in groupby(ids, lambda id: id < 0 or id in tokenizer.control_ids):
        tokens = list(run)
        yield from ([token] for token in tokens) if control else [tokens]


def _spelled(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    return b"".join(tokenizer.piece(token, skip_special=False) for token in ids)


def go_back(state: KVState, ids: list[int]) -> int:
    """Rewind a state to the last reachable place where it holds only a beginning of `ids`; return its new length."""
    common = common_length(np.array(ids, np.int32), np.array(state.tokens, np.int32))
    common = state.config.uncut(ids, common)
    reach = state.reach(common)
    state.wanted_marks = {common} if reach < common else set()  # reading passes there: a later prompt may rewind to it
    state.rewind(reach)
    return reach


def _cut(stops: StopStrings, events: list[Event], *, last: bool = False) -> list[Event]:
    """Return the events up to a stop string. Only the answer is searched; thinking and calls interrupt the search.

    Text that may begin a stop string is held back until a later call, at most until the `last` one.
    """
    found: list[Event] = []
    for event in events:
        if isinstance(event, Text):
            text, stopped = stops.push(event.text)
            found.append(Text(text))
            if stopped:
                break
        else:
            found += [Text(stops.finish()), event]
    if last:
        found.append(Text(stops.finish()))
    return [event for event in found if event != Text("")]


def _constraint(lm: LanguageModel, options: ReplyOptions, thinking: bool) -> Constraint | None:
    """Return the form that the options ask of the reply, if any. `thinking`: the prompt ends inside a thought."""
    about_calls = options.calls_forced or options.calls_kept
    if not about_calls and options.schema is None and options.regex is None and options.grammar is None:
        return None
    from ..grammar import grammar  # llguidance takes 0.3 s to import

    think = bool(options.think)
    if options.schema is not None:
        made = grammar.json_schema(lm.tokenizer, options.schema, think=think)
    elif options.regex is not None:
        made = grammar.regex(lm.tokenizer, options.regex, think=think)
    elif options.grammar is not None:
        made = grammar.lark(lm.tokenizer, options.grammar, think=think)
    else:
        made = grammar.tool_calls(lm.tokenizer, options.tools, options.tool_choice, think=think)
    if thinking:
        made.begin_thinking()
    return made
