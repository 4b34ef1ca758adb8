"""Anthropic's Messages: /v1/messages and /v1/messages/count_tokens.

In: a request's fields. Out: messages and options for a job; and of what the job makes, a message or its events.
Requests and answers are described at https://docs.anthropic.com/en/api/messages.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema
from starlette.responses import Response
from starlette.types import ASGIApp

from ..chat_format.messages import tool_result
from ..chat_format.replies import CallPart, Event, Text, Thinking, ToolCall
from ..conversation.language_model import LanguageModel
from ..conversation.reply import Reply, ReplyOptions, prompt_ids
from . import fields, media
from . import options as read
from .endpoint import Endpoint, Sent, answer
from .engine import Engine, GenerationRequest, Job
from .fields import Body, wrong
from .forms import Form, read_form
from .wire import json_response


class TextBlock(fields.TextPart):
    type: Literal["text"]


class ImageBlock(fields.MediaPart):
    type: Literal["image"]
    source: fields.Object


class ThinkingBlock(Body):
    ignored = ("signature", "data", "cache_control")
    type: Literal["thinking", "redacted_thinking"]
    thinking: str | None = None


class ToolUseBlock(Body):
    ignored = ("cache_control", "caller")
    type: Literal["tool_use"]
    id: str
    name: str
    input: fields.Object | None = None


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    ignored = ("cache_control",)
    content: str | Annotated[fields.Items[TextBlock | ImageBlock], fields.readable("text", "image")] | None = None
    is_error: bool | None = None


UserBlock = Annotated[TextBlock | ImageBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]


_USER = "text", "image", "tool_result"
_ASSISTANT = "text", "thinking", "redacted_thinking", "tool_use"


class UserTurn(Body):
    role: Literal["user", "system"]
    content: str | Annotated[fields.Items[UserBlock], Field(min_length=1), fields.readable(*_USER)]


class AssistantTurn(Body):
    role: Literal["assistant"]
    content: str | Annotated[fields.Items[AssistantBlock], fields.readable(*_ASSISTANT)]


class CustomTool(fields.Function):
    """A function. Anthropic's server tools, which have other types, are left out."""

    type: Literal["custom", "function"] | None = "custom"
    parameters: fields.Object = Field(alias="input_schema")


class Choice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: fields.Object = Field(alias="schema")


class OutputConfig(Body):
    ignored = ("effort",)
    format: OutputFormat | None = None


class CountRequest(Body):
    """The body of /v1/messages/count_tokens. Any `model` will do."""

    ignored = ("metadata", "service_tier", "cache_control", "user_profile_id", "inference_geo", "context_management")
    unsupported = ("thread",)  # a conversation that the server keeps
    model: str
    system: str | Annotated[fields.Items[TextBlock], fields.readable("text")] | None = None
    messages: Annotated[
        fields.Items[Annotated[UserTurn | AssistantTurn, Field(discriminator="role")]], Field(min_length=1)
    ]
    thinking: fields.ThinkingOptions | None = None
    tools: Annotated[fields.Tools[CustomTool], fields.usable("custom", "function")] | None = None
    tool_choice: Choice | None = None
    output_config: SkipJsonSchema[OutputConfig | None] = None  # its schema may be one that grammars refuse
    output_format: SkipJsonSchema[OutputFormat | None] = None  # its older place


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


async def messages(body: MessagesRequest, engine: Engine) -> ASGIApp:
    """Reply to a conversation, whole or as events."""
    request = read_request(body, engine.lm, engine.settings.think_budget)
    request = replace(request, prompt=await media.received(request.prompt, engine))
    job = engine.submit([request], format_field=_form(body).path)
    made = _Message(job, body.model)
    return answer(job, body.stream, made.events(), lambda: made.message, ping={"type": "ping"})


async def count_tokens(body: CountRequest, engine: Engine) -> Response:
    """Count a prompt's tokens."""
    said = await media.received(read_messages(body), engine)
    options = ReplyOptions(tools=_tools(body, engine.lm), think=_think(body), go_on=_begun(said))
    ids = await asyncio.to_thread(prompt_ids, engine.lm, said, options)
    return json_response({"input_tokens": len(ids)})


MESSAGES = Endpoint("/v1/messages", "Anthropic's messages", MessagesRequest, _REPLY, messages)
COUNT = Endpoint(
    "/v1/messages/count_tokens", "Tokens of a conversation", CountRequest, _COUNT, count_tokens, streams=""
)


# From a request to options


def read_request(body: MessagesRequest, lm: LanguageModel, think_budget: int | None = None) -> GenerationRequest:
    """The prompt and options. Raises ApiError (400), naming the field that is wrong.

    think_budget: of a request that doesn't say.
    """
    tools = _tools(body, lm)
    choice, one_call = _tool_choice(body.tool_choice, [tool["function"]["name"] for tool in tools])
    budget = body.thinking.budget_tokens if body.thinking else None
    options = ReplyOptions(
        max_tokens=body.max_tokens,
        sampling=read.read_sampling(body, lm),
        stop=body.stop_sequences or (),
        think=_think(body),
        think_budget=think_budget if budget is None else budget,
        tools=tools,
        tool_choice=choice,
        **_form(body).beside(choice).options,
    )
    messages = read_messages(body)
    return GenerationRequest(messages, replace(options, go_on=_begun(messages)), one_call)


def _begun(messages: list[dict[str, Any]]) -> bool:
    """True if the last message is the assistant's: the reply goes on with it."""
    return bool(messages[-1]["role"] == "assistant")


def _form(body: MessagesRequest) -> Form:
    config = body.output_config
    path, wanted = "output_format", body.output_format
    if config and config.format:
        path, wanted = "output_config.format", config.format
    return read_form(body, path, fields.Format(type="json_schema", schema=wanted.schema_) if wanted else None)


def read_messages(body: CountRequest) -> list[dict[str, Any]]:
    """The conversation as chat templates have it: a tool's result becomes a message of its own."""
    messages: list[dict[str, Any]] = []
    if body.system is not None:
        messages.append({"role": "system", "content": read.read_text(body.system)})
    called: dict[str, str] = {}  # names of called functions, by the call's id
    for i, message in enumerate(body.messages):
        blocks = [TextBlock(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        if isinstance(message, AssistantTurn):
            text = "".join(block.text for block in blocks if isinstance(block, TextBlock))
            uses = [block for block in blocks if isinstance(block, ToolUseBlock)]
            called |= {use.id: use.name for use in uses}
            thinking = "".join(block.thinking or "" for block in blocks if isinstance(block, ThinkingBlock))
            calls = [read.tool_call(use.id, use.name, use.input) for use in uses]
            messages.append(read.assistant_message(text, thinking, calls))
            continue
        for j, block in enumerate(blocks):
            path = f"messages[{i}].content[{j}]"
            if isinstance(block, ToolResultBlock):
                id = block.tool_use_id
                if id not in called:
                    raise wrong(f"{path}.tool_use_id", f"{id!r:.60} is the id of no call before it")
                content = media.content_of(block.content, f"{path}.content")
                if block.is_error:  # Gemma has no mark for it: it is said in words
                    words = {"type": "text", "text": "Error:"}
                    content = f"Error: {content}" if isinstance(content, str) else [words, *content]
                messages.append(tool_result(id, called[id], "") | {"content": content})
        said = [None if isinstance(block, ToolResultBlock) else block for block in blocks]
        if any(said):
            messages.append({"role": message.role, "content": media.content_of(said, f"messages[{i}].content")})
    if messages[-1]["role"] == "system":
        raise wrong("messages", "must hold at least one message of the user")
    if messages[-1].get("tool_calls"):
        raise wrong("messages", "must end with the user's: calls wait for their results")
    return messages


def _think(body: CountRequest) -> bool:
    return body.thinking is not None and body.thinking.type in ("enabled", "adaptive")


def _tools(body: CountRequest, lm: LanguageModel) -> tuple[dict[str, Any], ...]:
    return read.read_tools({f"tools[{i}]": tool for i, tool in enumerate(body.tools or ())}, lm)


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


class _Message:
    """A message that grows, and the events that tell how. Each is to be sent before the next one is asked for."""

    def __init__(self, job: Job, model: str) -> None:
        self.job = job
        self.message: dict[str, Any] = {"id": f"msg_{uuid.uuid4().hex[:24]}", "type": "message", "role": "assistant"}
        self.message |= {"model": model, "content": [], "stop_reason": None, "stop_sequence": None}
        self._blocks: list[dict[str, Any]] = self.message["content"]
        self._open = False  # the last block may grow

    async def events(self) -> AsyncIterator[Sent]:
        """While the prompt is read, a ping for every chunk of it."""
        begun = False
        async for update in self.job.updates():
            if not begun:
                begun = True
                usage = {"input_tokens": update.reading[1] if update.reading else 0, "output_tokens": 0}
                yield {"type": "message_start", "message": self.message | {"usage": usage}}
                yield {"type": "ping"}
            elif update.reading:
                yield {"type": "ping"}
            for event in update.events:
                for sent in self._push(event):
                    yield sent
            if update.reply:
                for sent in self._close():
                    yield sent
                delta, statistics = _ending(update.reply, self.job.requests[0]), update.reply.statistics
                usage = {
                    "input_tokens": statistics.prompt_tokens,
                    "cache_creation_input_tokens": 0,
                    "cache_read_input_tokens": statistics.reused_tokens,
                    "output_tokens": statistics.reply_tokens,
                }
                self.message |= {**delta, "usage": usage}
                yield {"type": "message_delta", "delta": delta, "usage": usage}
                yield {"type": "message_stop"}

    def _push(self, event: Event) -> Iterator[Sent]:
        """What an event of the reply brings."""
        if isinstance(event, ToolCall):
            self._blocks[-1]["input"] = event.arguments
            yield from self._close()
            return
        id = event.id.replace("call_", "toolu_", 1) if isinstance(event, CallPart) else None
        kind = {Text: "text", Thinking: "thinking", CallPart: "tool_use"}[type(event)]
        if not self._open or kind != self._blocks[-1]["type"] or id != self._blocks[-1].get("id"):
            yield from self._close()
            self._blocks.append({"type": kind})
            self._open = True
            if isinstance(event, CallPart):
                self._blocks[-1] |= {"id": id, "name": event.name, "input": {}}
            else:
                self._blocks[-1] |= {kind: ""} | ({"signature": ""} if kind == "thinking" else {})
            yield self._about("content_block_start", content_block=self._blocks[-1])
        if isinstance(event, CallPart):
            if event.json:
                yield self._delta("input_json_delta", partial_json=event.json)
        else:
            self._blocks[-1][kind] += event.text
            yield self._delta(f"{kind}_delta", **{kind: event.text})

    def _close(self) -> Iterator[Sent]:
        if not self._open:
            return
        if self._blocks[-1]["type"] == "thinking":
            yield self._delta("signature_delta", signature="")
        yield self._about("content_block_stop")
        self._open = False

    def _delta(self, type: str, **more: str) -> Sent:
        return self._about("content_block_delta", delta={"type": type, **more})

    def _about(self, type: str, **more: Any) -> Sent:
        return {"type": type, "index": len(self._blocks) - 1, **more}


def _ending(reply: Reply, request: GenerationRequest) -> dict[str, Any]:
    reason = {"tool_calls": "tool_use"}.get(reply.finish_reason, "end_turn")
    if reply.stop_string is not None:
        reason = "stop_sequence"
    elif reply.finish_reason == "length":
        cut_by_context = reply.statistics.reply_tokens < (request.options.max_tokens or 0)
        reason = "model_context_window_exceeded" if cut_by_context else "max_tokens"
    return {"stop_reason": reason, "stop_sequence": reply.stop_string}
