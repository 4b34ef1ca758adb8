"""OpenAI's chat completions and text completions.

In: requests as OpenAI's API reference has them, with `top_k, min_p, repetition_penalty, chat_template_kwargs` beside.
Out: replies in the same form, whole or as a stream of chunks.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.json_schema import SkipJsonSchema
from starlette.responses import Response
from starlette.types import ASGIApp

from ..chat_format.messages import tool_result
from ..chat_format.replies import CallPart, Thinking, ToolCall
from ..conversation.language_model import LanguageModel
from ..conversation.reply import ReplyOptions
from ..generation.sampling import Token
from ..generation.scoring import score
from ..tokens.tokenizer import Tokenizer
from . import fields, media
from . import options as read
from .endpoint import Endpoint, Sent, answer, chat_logprobs, reading, usage
from .engine import Engine, GenerationRequest, Job
from .fields import Body, wrong
from .forms import Form, read_form
from .wire import json_response, sse

_UNSUPPORTED = ("audio", "functions", "function_call", "web_search_options")
_DONE = b"data: [DONE]\n\n"


# Requests


class CalledFunction(Body):
    name: fields.Name
    arguments: fields.Arguments = None


class Call(Body):
    ignored = ("index",)
    id: str | None = None
    type: Literal["function"] | None = "function"
    function: CalledFunction


def _as_function(call: Any) -> Any:
    """A call of a custom tool as a function's, whose one argument is the text."""
    custom = call.get("custom") if isinstance(call, dict) and call.get("type") == "custom" else None
    if not isinstance(custom, dict):
        return call
    function = {"name": custom.get("name"), "arguments": {"input": custom.get("input")}}
    return {"id": call.get("id"), "type": "function", "function": function}


class OtherMessage(Body):
    ignored = ("name", "cache_control", "prefix", "partial")
    role: Literal["system", "developer", "user"]
    content: fields.Content


class AssistantMessage(Body):
    ignored = ("name", "refusal", "annotations", "audio", "reasoning_details")
    role: Literal["assistant"]
    content: fields.Content | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: fields.Items[Annotated[Call, BeforeValidator(_as_function)]] | None = None
    function_call: CalledFunction | None = None  # the older form of one call


class ToolMessage(Body):
    role: Literal["tool", "function"]
    content: fields.Content
    tool_call_id: str | None = None
    name: str | None = None


Message = Annotated[OtherMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class StreamOptions(Body):
    ignored = ("include_obfuscation",)
    include_usage: bool | None = None


class CompletionOptions(fields.OpenAIRequest):
    """What chat and text completions both take."""

    ignored = (*fields.IGNORED, "metadata", "verbosity")
    n: fields.Choices | None = None
    max_tokens: fields.Length | None = None
    stream_options: SkipJsonSchema[StreamOptions | None] = None  # needs stream=true, which no schema can say
    response_format: fields.Format | None = None


class FunctionTool(Body):
    type: Literal["function"]
    function: fields.Function


class ChatRequest(CompletionOptions, fields.ConversationRequest):
    """The body of /v1/chat/completions."""

    unsupported = _UNSUPPORTED
    messages: Annotated[fields.Items[Message], Field(min_length=1)]
    max_completion_tokens: fields.Length | None = None
    logprobs: bool | None = None
    top_logprobs: SkipJsonSchema[fields.TopLogprobs | None] = None  # needs logprobs=true
    max_output_tokens: fields.Length | None = None  # as responses have it
    tools: Annotated[fields.Tools[FunctionTool], fields.usable("function")] | None = None
    tool_choice: fields.ToolChoice | fields.Object | None = None
    modalities: SkipJsonSchema[fields.Items[str] | None] = None
    continue_final_message: SkipJsonSchema[bool | None] = None  # needs a last message of the assistant's
    add_generation_prompt: SkipJsonSchema[bool | None] = None


class CompletionRequest(CompletionOptions):
    """The body of /v1/completions."""

    unsupported = (*_UNSUPPORTED, "suffix")
    max_tokens: fields.LengthOrNone | None = None  # 0: the echo alone
    prompt: Any  # its schema depends on the vocabulary: see openapi
    logprobs: fields.TopLogprobs | None = None
    best_of: SkipJsonSchema[fields.Choices | None] = None
    echo: SkipJsonSchema[bool | None] = None


# Samples of replies


_REPLIED = {"reasoning_tokens": int, "accepted_prediction_tokens": int, "rejected_prediction_tokens": int}
_DETAILS = {"prompt_tokens_details": {"cached_tokens": int}, "completion_tokens_details": _REPLIED}
_USAGE = {"prompt_tokens": int, "completion_tokens": int, "total_tokens": int, **_DETAILS}
_HEAD = {"id": str, "created": int, "model": str, "usage": _USAGE}
_CHOICE = {"index": int, "finish_reason": ("stop", "length", "tool_calls"), "logprobs": (dict, None)}
_MESSAGE = {"role": "assistant", "content": (str, None)}
_CHAT_REPLY = {**_HEAD, "object": "chat.completion", "choices": [{**_CHOICE, "message": _MESSAGE}]}
_TEXT_REPLY = {**_HEAD, "object": "text_completion", "choices": [{**_CHOICE, "text": str}]}


# Endpoints


async def read_chat(body: ChatRequest, engine: Engine) -> tuple[list[dict[str, Any]], ReplyOptions, Form]:
    """The conversation, and how to reply to it. Raises ApiError."""
    if body.top_logprobs and not body.logprobs:
        raise wrong("top_logprobs", "needs logprobs=true")
    if any(kind != "text" for kind in body.modalities or ()):
        raise wrong("modalities", "other than text aren't supported", "unsupported_value")
    tools = read_functions(body.tools, engine.lm)
    choice, tools = read.read_tool_choice(body.tool_choice, tools)
    form = read_form(body, "response_format", body.response_format).beside(choice)
    options = ReplyOptions(
        tools=tools,
        tool_choice=choice,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        go_on=bool(body.continue_final_message),
        **read.read_thinking(body, engine),
        **_options(body, engine, form, body.max_completion_tokens or body.max_output_tokens),
    )
    messages = await media.received(_messages(body), engine)
    if options.go_on and (body.add_generation_prompt or messages[-1]["role"] != "assistant"):
        raise wrong("continue_final_message", "needs a last message of the assistant's, and no add_generation_prompt")
    return messages, options, form


async def chat_completions(body: ChatRequest, engine: Engine) -> ASGIApp:
    """Reply to a conversation."""
    messages, options, form = await read_chat(body, engine)
    with_usage = _with_usage(body)
    requests = list(_choices(messages, options, body.n or 1, body.parallel_tool_calls is False))
    job = engine.submit(requests, "messages", form.path)
    head = _head(body, engine, "chatcmpl", "chat.completion")
    tokenizer = engine.lm.tokenizer if body.logprobs else None
    chunks = _chat_chunks(job, head, tokenizer, with_usage)
    return answer(job, body.stream, chunks, partial(_chat_body, job, head, tokenizer))


async def completions(body: CompletionRequest, engine: Engine) -> ASGIApp:
    """Go on with a text, without a chat template."""
    choices = body.n or 1
    prompts = fields.prompts(body.prompt, engine.lm.config.vocab)
    if (body.best_of or choices) != choices:
        raise wrong("best_of", "other than n isn't supported", "unsupported_value")
    if body.max_tokens == 0 and not body.echo:
        raise wrong("max_tokens", "must be 1 or more, or -1 for no limit; 0 goes with echo alone")
    form = read_form(body, "response_format", body.response_format)
    options = ReplyOptions(logprobs=body.logprobs, **_options(body, engine, form))
    with_usage = _with_usage(body)
    requests = [one for prompt in prompts for one in _choices(prompt, options, choices)]
    texts = (one if isinstance(one, str) else engine.lm.tokenizer.decode(one) for one in prompts)
    tokenizer = None if body.logprobs is None else engine.lm.tokenizer
    scored = await _scored(engine, prompts, body.logprobs) if body.echo and body.logprobs is not None else None
    begun = [
        _Begun(text if body.echo else "", scored[i] if scored else [])
        for i, text in enumerate(texts)
        for _ in range(choices)
    ]
    head = _head(body, engine, "cmpl", "text_completion")
    if body.max_tokens == 0:
        return _only_echo(engine.lm.tokenizer, head, begun, tokenizer is not None, bool(body.stream))
    job = engine.submit(requests, "prompt", form.path)
    chunks = _text_chunks(job, head, tokenizer, begun, choices, with_usage)
    return answer(job, body.stream, chunks, partial(_text_body, job, head, tokenizer, begun, choices))


async def _scored(engine: Engine, prompts: Sequence[str | list[int]], top: int) -> list[list[Token]]:
    """The prompts' tokens with their log-probabilities; that of a first token, unless BOS is before it, is None."""
    made = await engine.read(prompts, lambda ids, state, check: list(score(engine.lm.model, ids, state, top, 1, check)))
    firsts = ([] if isinstance(prompt, str) else [Token(prompt[0])] for prompt in prompts)
    return [[*first, *tokens] for first, (_, tokens) in zip(firsts, made, strict=True)]


def _only_echo(
    tokenizer: Tokenizer, head: dict[str, Any], begun: list["_Begun"], logprobs: bool, stream: bool
) -> ASGIApp:
    """The response of a request for its prompts alone."""
    counts = [len(one.tokens) or len(tokenizer.encode(one.text)) for one in begun]
    choices = [
        _text_choice(i, one.text, "length", _text_logprobs(tokenizer if logprobs else None, one.tokens))
        for i, one in enumerate(begun)
    ]
    figures = {"prompt_tokens": sum(counts), "completion_tokens": 0, "total_tokens": sum(counts)}
    whole = {**head, "choices": choices, "usage": figures}
    return Response(sse(whole) + _DONE, media_type="text/event-stream") if stream else json_response(whole)


CHAT = Endpoint("/v1/chat/completions", "Reply to a conversation", ChatRequest, _CHAT_REPLY, chat_completions)
TEXT = Endpoint("/v1/completions", "Go on with a text", CompletionRequest, _TEXT_REPLY, completions)


# From a request to options


def _options(body: CompletionOptions, engine: Engine, form: Form, max_tokens: int | None = None) -> dict[str, Any]:
    """The options that chat and text completions share. `max_tokens`: what goes before the body's."""
    return {
        "max_tokens": max_tokens or body.max_tokens or engine.settings.max_tokens,
        "sampling": read.read_sampling(body, engine.lm),
        "stop": body.stop or (),
        **form.options,
    }


def read_functions(tools: Sequence[FunctionTool | None] | None, lm: LanguageModel) -> tuple[dict[str, Any], ...]:
    """The functions among the field `tools`, as chat templates want them. Raises ApiError."""
    return read.read_tools(
        {f"tools[{i}].function": tool.function if tool else None for i, tool in enumerate(tools or ())}, lm
    )


def _head(body: fields.OpenAIRequest, engine: Engine, prefix: str, kind: str) -> dict[str, Any]:
    """The fields that every chunk of a reply begins with."""
    model = engine.settings.model_name if body.model is None else body.model
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _messages(body: ChatRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    names: dict[str | None, str] = {}  # of called functions, by the call's id
    for i, message in enumerate(body.messages):
        text = media.content_of(message.content, f"messages[{i}].content")
        if isinstance(message, AssistantMessage):
            calls = list(message.tool_calls or ())
            names |= {call.id: call.function.name for call in calls}
            calls += [Call(id=None, function=message.function_call)] if message.function_call else []
            made = [read.tool_call(call.id, call.function.name, call.function.arguments) for call in calls]
            messages.append(read.assistant_message(text, message.reasoning_content or message.reasoning, made))
        elif isinstance(message, ToolMessage):
            id = message.tool_call_id
            messages.append(tool_result(id or "", message.name or names.get(id, "unknown"), "") | {"content": text})
        else:
            role = "system" if message.role == "developer" else message.role
            messages.append({"role": role, "content": text})
    return messages


def _choices(prompt: Any, options: ReplyOptions, choices: int, one_call: bool = False) -> Iterator[GenerationRequest]:
    """`choices` replies to one prompt. With a seed, choice i has seed + i."""
    for i in range(choices):
        sampling = options.sampling
        if i and sampling and sampling.seed is not None:
            sampling = replace(sampling, seed=(sampling.seed + i) % 2**63)
        yield GenerationRequest(prompt, replace(options, sampling=sampling), one_call)


def _with_usage(body: CompletionOptions) -> bool:
    """Returns True if a stream ends with usage."""
    if body.stream_options and not body.stream:
        raise wrong("stream_options", "is for stream=true only")
    return bool(body.stream_options and body.stream_options.include_usage)


# What is sent


def _chat_body(job: Job, head: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    choices = []
    for i, reply in enumerate(job.replies):
        message: dict[str, Any] = {"role": "assistant", "content": reply.text or (None if reply.tool_calls else "")}
        if reply.thinking:
            message["reasoning_content"] = reply.thinking
        if reply.tool_calls:
            message["tool_calls"] = [_call(call) for call in reply.tool_calls]
        logprobs = chat_logprobs(tokenizer, job.answers[i]) if tokenizer else None
        choices.append({"index": i, "message": message, "logprobs": logprobs, "finish_reason": reply.finish_reason})
    return {**head, "choices": choices, "usage": usage(job, len(choices))}


async def _chat_chunks(
    job: Job, head: dict[str, Any], tokenizer: Tokenizer | None, with_usage: bool
) -> AsyncIterator[Sent]:
    calls, choice, call = -1, -1, ""
    head = {**head, "object": "chat.completion.chunk"}

    def chunk(delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> Sent:
        one = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**head, "choices": [one]}

    async for update in job.updates():
        if update.choice > choice:
            choice, calls, call = update.choice, -1, ""
            yield chunk({"role": "assistant", "content": ""})
        if update.reading:
            yield reading(update.reading)
        logprobs = chat_logprobs(tokenizer, update.answer) if tokenizer and update.answer else None
        for event in update.events:
            if isinstance(event, CallPart):
                part: dict[str, Any] = {"index": calls, "function": {"arguments": event.json}}
                if event.id != call:
                    call, calls = event.id, calls + 1
                    function = {"name": event.name, "arguments": event.json}
                    part = {"index": calls, "id": call, "type": "function", "function": function}
                if event.json or "id" in part:
                    yield chunk({"tool_calls": [part]})
            elif isinstance(event, ToolCall):
                pass  # its parts have told it
            elif isinstance(event, Thinking):
                yield chunk({"reasoning_content": event.text})
            else:
                yield chunk({"content": event.text}, logprobs=logprobs)
                logprobs = None
        if logprobs:  # of a token whose text is held back
            yield chunk({"content": ""}, logprobs=logprobs)
        if update.reply:
            yield chunk({}, update.reply.finish_reason)
    if with_usage:
        yield {**head, "choices": [], "usage": usage(job, len(job.replies))}
    yield _DONE


@dataclass
class _Begun:
    """A choice's text and tokens with what is echoed: all of it, or nothing."""

    text: str
    tokens: list[Token]


def _text_body(
    job: Job, head: dict[str, Any], tokenizer: Tokenizer | None, begun: list[_Begun], choices: int
) -> dict[str, Any]:
    replies = [
        _text_choice(i, begun[i].text, reply.finish_reason, _text_logprobs(tokenizer, begun[i].tokens + job.answers[i]))
        for i, reply in enumerate(job.replies)
    ]
    return {**head, "choices": replies, "usage": usage(job, choices)}


async def _text_chunks(
    job: Job, head: dict[str, Any], tokenizer: Tokenizer | None, begun: list[_Begun], choices: int, with_usage: bool
) -> AsyncIterator[Sent]:
    """The chunks of a stream. The texts of `begun` grow; thinking is part of them."""
    choice = -1
    async for update in job.updates():
        if update.reading:
            yield reading(update.reading)
        told = [event for event in update.events if not isinstance(event, CallPart)]
        text = "".join(event.raw if isinstance(event, ToolCall) else event.text for event in told)
        one, tokens = begun[update.choice], update.answer
        one.text += text
        if update.choice > choice and not update.reading:
            choice, text, tokens = update.choice, one.text, one.tokens + tokens
        finish = update.reply.finish_reason if update.reply else None
        logprobs = _text_logprobs(tokenizer, tokens) if tokens else None
        if text or finish or logprobs:
            yield {**head, "choices": [_text_choice(update.choice, text, finish, logprobs)]}
    if with_usage:
        yield {**head, "choices": [], "usage": usage(job, choices)}
    yield _DONE


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _text_choice(index: int, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
    finish = "stop" if finish == "tool_calls" else finish
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _text_logprobs(tokenizer: Tokenizer | None, tokens: Sequence[Token]) -> dict[str, Any] | None:
    """OpenAI's older form. Offsets count from the reply's beginning, in characters."""
    if tokenizer is None:
        return None
    content = chat_logprobs(tokenizer, tokens)["content"]
    texts = [entry["token"] for entry in content]
    known = [(entry, token.logprob is not None) for entry, token in zip(content, tokens, strict=True)]
    return {
        "tokens": texts,
        "token_logprobs": [entry["logprob"] if behind else None for entry, behind in known],
        "top_logprobs": [
            {top["token"]: top["logprob"] for top in entry["top_logprobs"]} if behind else None
            for entry, behind in known
        ],
        "text_offset": list(accumulate((len(text) for text in texts[:-1]), initial=0)) if texts else [],
    }
