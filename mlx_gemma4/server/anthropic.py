"""Anthropic's Messages: /v1/messages and /v1/messages/count_tokens.

In: a request's fields. Out: messages and options for a job; and of what the job makes, a message or its events.
Requests and answers are described at https://docs.anthropic.com/en/api/messages.
"""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema
from starlette.responses import Response

from ..chat_format.replies import Event, Text, Thinking, ToolCall
from ..conversation.language_model import LanguageModel
from ..conversation.reply import Reply, ReplyOptions, prompt_ids
from ..generation.loop import Statistics
from . import fields
from . import options as read
from .endpoint import Context, Endpoint
from .engine import GenerationRequest, Job
from .fields import Body, wrong
from .wire import EventStream, WholeReply, json_response, sse


class TextBlock(Body):
    type: Literal["text"]
    text: str


class ThinkingBlock(Body):
    type: Literal["thinking", "redacted_thinking"]
    thinking: str | None = None


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: str
    name: str
    input: fields.Object | None = None


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | fields.Items[TextBlock] | None = None
    is_error: bool | None = None


UserBlock = Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]


class UserTurn(Body):
    role: Literal["user", "system"]
    content: str | Annotated[fields.Items[UserBlock], Field(min_length=1)]


class AssistantTurn(Body):
    role: Literal["assistant"]
    content: str | fields.Items[AssistantBlock]


class CustomTool(fields.Function):
    """A function. Anthropic's server tools, which have other types, are refused."""

    type: Literal["custom"] | None = "custom"
    parameters: fields.Object = Field(alias="input_schema")


class Choice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingOptions(Body):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    # Ignored: the model thinks as long as it likes, within max_tokens.
    budget_tokens: Annotated[int, Field(ge=0, le=2**31), fields.Whole] | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: fields.Object = Field(alias="schema")


class OutputConfig(Body):
    ignored = ("effort",)
    format: OutputFormat | None = None


class CountRequest(Body):
    """The body of /v1/messages/count_tokens. Any `model` will do."""

    ignored = ("metadata", "service_tier", "cache_control", "user_profile_id", "inference_geo")
    model: str
    system: str | fields.Items[TextBlock] | None = None
    messages: Annotated[
        fields.Items[Annotated[UserTurn | AssistantTurn, Field(discriminator="role")]], Field(min_length=1)
    ]
    thinking: ThinkingOptions | None = None
    tools: fields.Items[CustomTool] | None = None
    tool_choice: Choice | None = None
    output_config: SkipJsonSchema[OutputConfig | None] = None  # its schema may be one that grammars refuse


class MessagesRequest(CountRequest, fields.SamplingRequest):
    """The body of /v1/messages."""

    max_tokens: fields.Length
    stop_sequences: fields.Stops | None = None


_COUNT = {"input_tokens": int}
_REPLY = {
    "id": str,
    "type": "message",
    "role": "assistant",
    "model": str,
    "content": [{"type": ("text", "thinking", "tool_use")}],
    "stop_reason": str,
    "usage": {"input_tokens": int, "output_tokens": int},
}


async def messages(body: MessagesRequest, context: Context) -> Response:
    """Reply to a conversation, whole or as events."""
    request = read_request(body, context.engine.lm)
    job = context.engine.submit([request], format_field="output_config.format")
    head: dict[str, Any] = {"id": f"msg_{uuid.uuid4().hex[:24]}", "type": "message", "role": "assistant"}
    head |= {"model": body.model, "content": [], "stop_reason": None, "stop_sequence": None}
    return EventStream(job, _events(head, job)) if body.stream else WholeReply(job, _whole(head, job))


async def count_tokens(body: CountRequest, context: Context) -> Response:
    """Count a prompt's tokens."""
    options = ReplyOptions(tools=_tools(body), think=_think(body))
    ids = await asyncio.to_thread(prompt_ids, context.engine.lm, read_messages(body), options)
    return json_response({"input_tokens": len(ids)})


MESSAGES = Endpoint("/v1/messages", "Anthropic's messages", MessagesRequest, _REPLY, messages)
COUNT = Endpoint(
    "/v1/messages/count_tokens", "Tokens of a conversation", CountRequest, _COUNT, count_tokens, streams=False
)


# From a request to options


def read_request(body: MessagesRequest, lm: LanguageModel) -> GenerationRequest:
    """The prompt and options. Raises ApiError (400), naming the field that is wrong."""
    config, tools = body.output_config, _tools(body)
    choice, one_call = _tool_choice(body.tool_choice, [tool["function"]["name"] for tool in tools])
    options = ReplyOptions(
        max_tokens=body.max_tokens,
        sampling=read.read_sampling(body, lm),
        stop=read.read_stops(body.stop_sequences),
        think=_think(body),
        tools=tools,
        tool_choice=choice,
        schema=config.format.schema_ if config and config.format else None,
    )
    return GenerationRequest(read_messages(body), options, one_call)


def read_messages(body: CountRequest) -> list[dict[str, Any]]:
    """The conversation as chat templates have it: a tool's result becomes a message of its own."""
    messages: list[dict[str, Any]] = []
    if body.system is not None:
        messages.append({"role": "system", "content": _join(body.system)})
    called: dict[str, str] = {}  # names of called functions, by the call's id
    for i, message in enumerate(body.messages):
        blocks = [TextBlock(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        text = [block.text for block in blocks if isinstance(block, TextBlock)]
        if isinstance(message, AssistantTurn):
            uses = [block for block in blocks if isinstance(block, ToolUseBlock)]
            called |= {use.id: use.name for use in uses}
            thinking = "".join(block.thinking or "" for block in blocks if isinstance(block, ThinkingBlock))
            calls = [read.tool_call(use.id, use.name, use.input) for use in uses]
            messages.append(read.assistant_message("".join(text), thinking, calls))
            continue
        for j, block in enumerate(blocks):
            if isinstance(block, ToolResultBlock):
                id = block.tool_use_id
                if id not in called:
                    raise wrong(f"messages[{i}].content[{j}].tool_use_id", f"{id!r:.60} is the id of no call before it")
                # Gemma has no mark for an error: it is said in words.
                content = "Error: " * bool(block.is_error) + _join(block.content or "")
                messages.append(read.tool_message(id, called[id], content))
        if text:
            messages.append({"role": message.role, "content": "\n".join(text)})
    if messages[-1]["role"] == "system":
        raise wrong("messages", "must hold at least one message of the user")
    if messages[-1]["role"] == "assistant":
        raise wrong("messages", "must end with the user's: a reply that is begun can't be continued here")
    return messages


def _join(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _think(body: CountRequest) -> bool:
    return body.thinking is not None and body.thinking.type in ("enabled", "adaptive")


def _tools(body: CountRequest) -> tuple[dict[str, Any], ...]:
    return read.read_tools({f"tools[{i}]": tool for i, tool in enumerate(body.tools or ())})


def _tool_choice(choice: Choice | None, names: list[str]) -> tuple[str, bool]:
    """The choice in OpenAI's words, as ReplyOptions has it, and whether one call is the most."""
    if choice is None:
        return "auto", False
    one_call = bool(choice.disable_parallel_tool_use)
    if choice.type == "any" and not names:
        raise wrong("tool_choice.type", "is 'any', but there are no tools")
    if choice.type != "tool":
        return {"any": "required"}.get(choice.type, choice.type), one_call
    if choice.name not in names:
        raise wrong("tool_choice.name", f"{choice.name!r:.60} is none of the tools")
    return choice.name, one_call


# What is sent


async def _whole(head: dict[str, Any], job: Job) -> dict[str, Any]:
    """The whole reply, its blocks in the order in which they were made."""
    blocks, reply = _Blocks(), Reply()
    async for update in job.updates():
        reply = update.reply or reply
        for event in update.events:
            list(blocks.push(event))
    made = {"content": blocks.content, **_ending(reply, job.requests[0]), "usage": _usage(reply.statistics)}
    return head | made


def _ending(reply: Reply, request: GenerationRequest) -> dict[str, Any]:
    reason = {"tool_calls": "tool_use"}.get(reply.finish_reason, "end_turn")
    if reply.stop_string is not None:
        reason = "stop_sequence"
    elif reply.finish_reason == "length":
        cut_by_context = reply.statistics.reply_tokens < (request.options.max_tokens or 0)
        reason = "model_context_window_exceeded" if cut_by_context else "max_tokens"
    return {"stop_reason": reason, "stop_sequence": reply.stop_string}


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


async def _events(head: dict[str, Any], job: Job) -> AsyncIterator[bytes]:
    """A reply's events, as it is made. While the prompt is read, a ping for every chunk of it."""
    begun = False
    blocks = _Blocks()
    async for update in job.updates():
        if not begun:
            begun = True
            tokens = update.reading[1] if update.reading else 0
            yield _event("message_start", message=head | {"usage": {"input_tokens": tokens, "output_tokens": 0}})
            yield _event("ping")
        elif update.reading:
            yield _event("ping")
        for event in update.events:
            for made in blocks.push(event):
                yield made
        if update.reply:
            for made in blocks.close():
                yield made
            ending, usage = _ending(update.reply, job.requests[0]), _usage(update.reply.statistics)
            yield _event("message_delta", delta=ending, usage=usage)
            yield _event("message_stop")


class _Blocks:
    """The blocks of a reply, and the events that tell how they grow."""

    def __init__(self) -> None:
        self.content: list[dict[str, Any]] = []
        self._open = False  # the last block may grow

    def push(self, event: Event) -> Iterator[bytes]:
        kind = _kind(event)
        if not self._open or kind == "tool_use" or kind != self.content[-1]["type"]:
            yield from self.close()
            self.content.append(_block(event))
            self._open = True
            yield _event("content_block_start", index=len(self.content) - 1, content_block=_block(event))
        if isinstance(event, ToolCall):
            self.content[-1]["input"] = event.arguments
            yield self._delta("input_json_delta", partial_json=json.dumps(event.arguments, ensure_ascii=False))
        else:
            self.content[-1][kind] += event.text
            yield self._delta(f"{kind}_delta", **{kind: event.text})

    def close(self) -> Iterator[bytes]:
        if not self._open:
            return
        if self.content[-1]["type"] == "thinking":
            yield self._delta("signature_delta", signature="")
        yield _event("content_block_stop", index=len(self.content) - 1)
        self._open = False

    def _delta(self, type: str, **more: str) -> bytes:
        return _event("content_block_delta", index=len(self.content) - 1, delta={"type": type, **more})


def _event(type: str, **more: Any) -> bytes:
    return sse({"type": type, **more}, type)
