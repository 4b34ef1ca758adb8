"""Anthropic's Messages: /v1/messages and /v1/messages/count_tokens.

In: a request's fields. Out: messages and options for a job; and of what the job makes, a message or its events.
Requests and answers are described at https://docs.anthropic.com/en/api/messages.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..chat_format.replies import Event, Text, Thinking, ToolCall
from ..conversation.language_model import LanguageModel
from ..conversation.reply import Reply, ReplyOptions, prompt_ids
from ..generation.loop import Statistics
from .engine import GenerationRequest, Job
from .fields import Fields
from .options import read_sampling, read_stops
from .wire import ApiError, EventStream, answer_whole, as_api_error, error_response, json_response, read_json, sse

Handler = Callable[[Request], Awaitable[Response]]

_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_BLOCKS = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")
# The `type` of an error by its status; every other 4xx is an "invalid_request_error", every other 5xx an "api_error".
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}


def error_body(error: ApiError) -> dict[str, Any]:
    """An error as Anthropic's clients read it."""
    kind = _KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def _with_errors(handler: Handler) -> Handler:
    """The handler, its errors in Anthropic's words."""

    @functools.wraps(handler)
    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except Exception as error:
            made = as_api_error(error)
            if made.status == 503:  # shutting down; 529 is what these clients know
                made = ApiError(529, made.message, retry_after=made.retry_after)
            return error_response(made, error_body)

    return handle


@_with_errors
async def messages(request: Request) -> Response:
    """POST /v1/messages: the reply, whole or as events."""
    engine, settings = request.app.state.engine, request.app.state.settings
    fields = Fields(await read_json(request, settings.max_body_bytes))
    name, stream = _needed_text(fields, "model"), fields.flag("stream")  # any name will do
    wanted = read_wanted(fields, engine.lm)
    fields.log_unknown()
    id, job = f"msg_{uuid.uuid4().hex[:24]}", engine.submit([wanted], format_field="output_config.format")
    if stream:
        return EventStream(job, _events(id, name, job), error_body, "error")

    return await answer_whole(request, job, _whole(id, name, job))


@_with_errors
async def count_tokens(request: Request) -> Response:
    """POST /v1/messages/count_tokens: how many tokens a request's prompt has."""
    engine, settings = request.app.state.engine, request.app.state.settings
    fields = Fields(await read_json(request, settings.max_body_bytes))
    _needed_text(fields, "model")
    messages, options = read_messages(fields), ReplyOptions(tools=tuple(_tools(fields)), think=_think(fields))
    ids = await asyncio.to_thread(prompt_ids, engine.lm, messages, options)
    return json_response({"input_tokens": len(ids)})


# What is asked for


def read_wanted(fields: Fields, lm: LanguageModel) -> GenerationRequest:
    """A request's prompt and options.

    Raises:
        ApiError: 400, naming the field.
    """
    fields.needed("max_tokens")
    fields.items("stop_sequences")  # a list, whereas OpenAI's `stop` may be a string
    for ignored in ("metadata", "service_tier", "cache_control", "user_profile_id", "inference_geo"):
        fields.get(ignored)
    tools = tuple(_tools(fields))
    choice, one_call = _tool_choice(fields, [tool["function"]["name"] for tool in tools])
    options = ReplyOptions(
        max_tokens=fields.integer("max_tokens", 1, 2**31),
        sampling=read_sampling(fields, lm),
        stop=read_stops(fields, "stop_sequences"),
        think=_think(fields),
        tools=tools,
        tool_choice=choice,
        schema=_schema(fields),
    )
    return GenerationRequest(read_messages(fields), options, one_call)


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """The conversation, as chat templates have it: what tools answered becomes messages of their own."""
    fields.needed("messages")
    messages: list[dict[str, Any]] = []
    if (system := fields.get("system")) is not None:
        words = system if isinstance(system, str) else "\n".join(_text(block) for block in fields.objects("system"))
        messages.append({"role": "system", "content": words})
    called: dict[str, str] = {}  # the names of calls by their ids
    for message in fields.objects("messages"):
        if message.one_of("role", ["user", "assistant", "system"]) == "assistant":
            messages.append(_assistant(message, called))
        else:
            messages += _user(message, called)
    if not messages or messages[-1]["role"] == "system":
        raise fields.wrong("messages", "must hold at least one message of the user")
    if messages[-1]["role"] == "assistant":
        raise fields.wrong("messages", "must end with the user's: a reply that is begun can't be continued here")
    return messages


def _blocks(message: Fields) -> Iterator[tuple[str, Fields]]:
    """A message's content, block by block, with their types; a string is one of text."""
    content = message.needed("content")
    if isinstance(content, str):
        yield "text", Fields({"type": "text", "text": content}, message.path)
        return
    for block in message.objects("content"):
        yield block.one_of("type", _BLOCKS), block


def _text(block: Fields) -> str:
    block.one_of("type", ["text"])
    return _needed_text(block, "text")


def _needed_text(fields: Fields, name: str) -> str:
    fields.needed(name)
    return fields.text(name, "")


def _assistant(message: Fields, called: dict[str, str]) -> dict[str, Any]:
    text, thinking, calls = "", "", []
    for kind, block in _blocks(message):
        if kind == "text":
            text += _text(block)
        elif kind == "thinking":
            thinking += block.text("thinking", "")
        elif kind == "tool_use":
            name, id = _needed_text(block, "name"), _needed_text(block, "id")
            called[id] = name
            input = block.within("input")
            function = {"name": name, "arguments": dict(input.values) if input else {}}
            calls.append({"id": id, "type": "function", "function": function})
        elif kind == "tool_result":
            raise block.wrong("type", "'tool_result' belongs in a message of the user")
    made: dict[str, Any] = {"role": "assistant", "content": text}
    return made | ({"reasoning_content": thinking} if thinking else {}) | ({"tool_calls": calls} if calls else {})


def _user(message: Fields, called: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    text: list[str] = []
    if message.get("content") == []:
        raise message.wrong("content", "must hold at least one block")
    for kind, block in _blocks(message):
        if kind == "text":
            text.append(_text(block))
        elif kind == "tool_result":
            id = _needed_text(block, "tool_use_id")
            if id not in called:
                raise block.wrong("tool_use_id", f"{id!r:.60} is the id of no call before it")
            yield {"role": "tool", "tool_call_id": id, "name": called[id], "content": _result(block)}
        else:
            raise block.wrong("type", f"{kind!r} belongs in a message of the assistant")
    if text:
        yield {"role": message.text("role", "user"), "content": "\n".join(text)}


def _result(block: Fields) -> str:
    """What a tool answered. Gemma has no mark for an error: it is said in words."""
    content = block.get("content")
    if not isinstance(content, str):
        content = "\n".join(_text(part) for part in block.objects("content"))
    return f"Error: {content}" if block.flag("is_error") else content


def _think(fields: Fields) -> bool:
    thinking = fields.within("thinking")
    if thinking is None:
        return False
    kind = thinking.one_of("type", ["enabled", "disabled", "adaptive", "between_tools"])
    thinking.integer("budget_tokens", 0, 1 << 31)  # the model thinks as long as it likes, within max_tokens
    return kind in ("enabled", "adaptive")


def _schema(fields: Fields) -> dict[str, Any] | None:
    config = fields.within("output_config")
    if config is None:
        return None
    form = config.within("format")
    if form is None:
        return None
    form.one_of("type", ["json_schema"])
    form.needed("schema")
    schema = form.within("schema")
    return dict(schema.values) if schema else None


def _tools(fields: Fields) -> Iterator[dict[str, Any]]:
    names = set()
    for tool in fields.objects("tools"):
        if tool.text("type", "custom") != "custom":
            raise tool.wrong("type", "must be custom: this server runs no tools of its own", "unsupported_value")
        name = _needed_text(tool, "name")
        if not _NAME.fullmatch(name):
            raise tool.wrong("name", "must be 1 to 128 letters, digits, dashes and the like")
        if name in names:
            raise tool.wrong("name", f"{name!r} is the name of another tool too")
        names.add(name)
        tool.needed("input_schema")
        schema = tool.within("input_schema")
        function = {"name": name, "description": tool.text("description", ""), "parameters": schema and schema.values}
        yield {"type": "function", "function": function}


def _tool_choice(fields: Fields, names: list[str]) -> tuple[str, bool]:
    """In OpenAI's words, as ReplyOptions has it; and whether one call is the most."""
    choice = fields.within("tool_choice")
    if choice is None:
        return "auto", False
    kind = choice.one_of("type", ["auto", "any", "tool", "none"])
    one_call = choice.flag("disable_parallel_tool_use")
    if kind == "any" and not names:
        raise choice.wrong("type", "is 'any', but there are no tools")
    if kind != "tool":
        return {"any": "required"}.get(kind, kind), one_call
    if (name := _needed_text(choice, "name")) not in names:
        raise choice.wrong("name", f"{name!r:.60} is none of the tools")
    return name, one_call


# What is answered


async def _whole(id: str, model: str, job: Job) -> dict[str, Any]:
    """A whole reply, its blocks in the order in which they were made."""
    content: list[dict[str, Any]] = []
    reply = Reply()
    async for piece in job.pieces():
        reply = piece.reply or reply
        for event in piece.events:
            kind = _kind(event)
            if isinstance(event, ToolCall):
                content.append(_block(event) | {"input": event.arguments})
            elif content and content[-1]["type"] == kind:
                content[-1][kind] += event.text
            else:
                content.append(_block(event) | {kind: event.text})
    return _message(id, model, _usage(reply.statistics)) | {"content": content, **_ending(reply, job.wanted[0])}


def _ending(reply: Reply, wanted: GenerationRequest) -> dict[str, Any]:
    """Why the reply ended."""
    reason = {"tool_calls": "tool_use"}.get(reply.finish_reason, "end_turn")
    if reply.stop_string is not None:
        reason = "stop_sequence"
    elif reply.finish_reason == "length":
        cut_by_context = reply.statistics.reply_tokens < (wanted.options.max_tokens or 0)
        reason = "model_context_window_exceeded" if cut_by_context else "max_tokens"
    return {"stop_reason": reason, "stop_sequence": reply.stop_string}


def _message(id: str, model: str, usage: dict[str, int]) -> dict[str, Any]:
    return {
        "id": id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }


def _kind(event: Event) -> str:
    return {Text: "text", Thinking: "thinking", ToolCall: "tool_use"}[type(event)]


def _block(event: Event) -> dict[str, Any]:
    """An empty block of the kind that an event is part of."""
    kind = _kind(event)
    if isinstance(event, ToolCall):
        return {"type": kind, "id": event.id.replace("call_", "toolu_", 1), "name": event.name, "input": {}}
    return {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})


def _usage(statistics: Statistics) -> dict[str, int]:
    return {
        "input_tokens": statistics.prompt_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": statistics.reused_tokens,
        "output_tokens": statistics.reply_tokens,
    }


async def _events(id: str, model: str, job: Job) -> AsyncIterator[bytes]:
    """A reply's events, as it is made. While the prompt is read, a ping for every chunk of it."""
    begun = False
    blocks = _Blocks()
    async for piece in job.pieces():
        if not begun:
            begun = True
            tokens = piece.reading[1] if piece.reading else 0
            start = {"input_tokens": tokens, "output_tokens": 0}
            yield _event("message_start", message=_message(id, model, start))
            yield _event("ping")
        elif piece.reading:
            yield _event("ping")
        for event in piece.events:
            for made in blocks.push(event):
                yield made
        if piece.reply:
            for made in blocks.close():
                yield made
            yield _event(
                "message_delta", delta=_ending(piece.reply, job.wanted[0]), usage=_usage(piece.reply.statistics)
            )
            yield _event("message_stop")


class _Blocks:
    """Numbers the blocks that a reply's events make, and opens and closes them."""

    def __init__(self) -> None:
        self.index = 0
        self.kind: str | None = None  # of the block that is open

    def push(self, event: Event) -> Iterator[bytes]:
        kind = _kind(event)
        if kind != self.kind or kind == "tool_use":
            yield from self.close()
            self.kind = kind
            yield _event("content_block_start", index=self.index, content_block=_block(event))
        if isinstance(event, ToolCall):
            yield self._delta("input_json_delta", partial_json=json.dumps(event.arguments, ensure_ascii=False))
        else:
            yield self._delta(f"{kind}_delta", **{kind: event.text})

    def close(self) -> Iterator[bytes]:
        if self.kind is None:
            return
        if self.kind == "thinking":
            yield self._delta("signature_delta", signature="")
        yield _event("content_block_stop", index=self.index)
        self.kind, self.index = None, self.index + 1

    def _delta(self, type: str, **more: str) -> bytes:
        return _event("content_block_delta", index=self.index, delta={"type": type, **more})


def _event(type: str, **more: Any) -> bytes:
    return sse({"type": type, **more}, type)
