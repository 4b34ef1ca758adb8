"""OpenAI's responses, without memory: each request holds its whole conversation.

In: requests as OpenAI's API reference has them. Out: a response's items, whole or as events. A request that refers
to an earlier one (`previous_response_id`, `conversation`) is refused, for nothing is kept.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..chat_format.replies import Event, Text, ToolCall
from ..conversation.reply import ReplyOptions
from ..generation.sampling import Token
from ..tokens.tokenizer import Tokenizer
from . import options as read
from .completions import Collector, chat_logprobs, reading
from .engine import Engine, GenerationRequest
from .fields import Fields
from .wire import EventStream, answer_whole, as_api_error, read_json, sse

_LOGPROBS = "message.output_text.logprobs"
_IGNORED = (
    "user",
    "store",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "max_tool_calls",
    "stream_options",
)
_UNSUPPORTED = ("previous_response_id", "conversation", "background", "prompt", "context_management")


async def responses(request: Request) -> Response:
    """POST /v1/responses."""
    engine: Engine = request.app.state.engine
    settings = request.app.state.settings
    fields = Fields(await read_json(request, settings.max_body_bytes))
    top = fields.integer("top_logprobs", 0, read.MAX_TOP_LOGPROBS)
    tools = read.read_tools(fields, flat=True)
    text, reasoning = fields.within("text"), fields.within("reasoning")
    options = ReplyOptions(
        max_tokens=read.read_max_tokens(fields, "max_output_tokens", default=settings.max_tokens),
        sampling=read.read_sampling(fields, engine.lm),
        stop=read.read_stops(fields),
        think=read.read_thinking(fields, reasoning, "effort") if reasoning else read.read_thinking(fields),
        tools=tools,
        tool_choice=read.read_tool_choice(fields, tools, flat=True),
        logprobs=(top or 0) if _LOGPROBS in fields.items("include") else None,
        **(read.read_format(text, "format") if text else {}),
    )
    wanted = GenerationRequest(_messages(fields), options, not fields.flag("parallel_tool_calls", True))
    streaming = fields.flag("stream")
    head = _head(fields, options, settings.model_name)
    _refuse_others(fields)
    job = engine.submit([wanted], "input", "text.format")
    output = _Output(engine.lm.tokenizer if options.logprobs is not None else None)
    if streaming:
        return EventStream(job, _events(Collector(job), head, output))
    return await answer_whole(request, job, _body(Collector(job), head, output))


def _head(fields: Fields, options: ReplyOptions, name: str) -> dict[str, Any]:
    """A response as it begins: what was asked for, as far as it took effect."""
    sampling = options.sampling
    assert sampling
    metadata = fields.within("metadata")
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": fields.text("instructions"),
        "max_output_tokens": options.max_tokens,
        "metadata": metadata.values if metadata else {},
        "model": fields.text("model", name),
        "output": [],
        "parallel_tool_calls": fields.flag("parallel_tool_calls", True),
        "previous_response_id": None,
        "reasoning": fields.get("reasoning") or {"effort": None, "summary": None},
        "store": False,
        "temperature": sampling.temperature,
        "text": fields.get("text") or {"format": {"type": "text"}},
        "tool_choice": fields.get("tool_choice") or "auto",
        "tools": fields.items("tools"),
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _refuse_others(fields: Fields) -> None:
    for name in _IGNORED:
        fields.get(name)
    for name in _UNSUPPORTED:
        if fields.get(name):
            raise fields.wrong(name, "isn't supported: this server keeps no responses", "unsupported_value")
    fields.one_of("service_tier", ("auto", "default"), "auto")
    fields.one_of("truncation", ("disabled",), "disabled")
    fields.log_unknown()


def _messages(fields: Fields) -> list[dict[str, Any]]:
    """Instructions and input as a conversation in the form of chat completions."""
    messages: list[dict[str, Any]] = []
    if instructions := fields.text("instructions"):
        messages.append({"role": "system", "content": instructions})
    if isinstance(given := fields.needed("input"), str):
        return [*messages, {"role": "user", "content": given}]
    if not fields.items("input"):
        raise fields.wrong("input", "must hold at least one message", "missing_required_parameter")
    names: dict[str, str] = {}  # of called functions, by the call's id
    for item in fields.objects("input"):
        kind = item.one_of("type", ("message", "function_call", "function_call_output", "reasoning"), "message")
        if kind == "message":
            role = item.one_of("role", ("system", "developer", "user", "assistant"))
            if role == "assistant":
                _own(messages)["content"] += read.read_content(item, "content")
            else:
                role = "system" if role == "developer" else role
                messages.append({"role": role, "content": read.read_content(item, "content")})
        elif kind == "function_call":
            item.needed("name")
            name, call_id = item.text("name", ""), item.text("call_id", "")
            names[call_id] = name
            function = {"name": name, "arguments": read.read_arguments(item, "arguments")}
            call = {"id": call_id, "type": "function", "function": function}
            _own(messages).setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            call_id = item.text("call_id", "")
            content = read.read_content(item, "output")
            name = names.get(call_id, "unknown")
            messages.append({"role": "tool", "tool_call_id": call_id, "name": name, "content": content})
        else:
            thought = "".join(part.text("text", "") for part in item.objects("content"))
            _own(messages)["reasoning_content"] = thought
    return messages


def _own(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The model's message that is going on, or a new one."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


class _Output:
    """The items of a response, and the events that tell how they grow."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """tokenizer: to tell log-probabilities, or None."""
        self.items: list[dict[str, Any]] = []
        self._tokenizer = tokenizer
        self._part: dict[str, Any] | None = None  # of the item that is growing

    def push(self, event: Event, token: Token | None) -> Iterator[tuple[str, dict[str, Any]]]:
        """What an event brings, as names and contents of server-sent events."""
        if isinstance(event, ToolCall):
            yield from self.close()
            arguments = json.dumps(event.arguments, ensure_ascii=False)
            call = {"type": "function_call", "call_id": event.id, "name": event.name, "arguments": ""}
            yield self._open("fc", call)
            yield self._about("function_call_arguments.delta", delta=arguments)
            self.items[-1]["arguments"] = arguments
            yield self._about("function_call_arguments.done", name=event.name, arguments=arguments)
            yield self._done()
            return
        kind = "output_text" if isinstance(event, Text) else "reasoning_text"
        if self._part is None or self._part["type"] != kind:
            yield from self.close()
            yield from self._begin(kind)
        assert self._part is not None
        more = {}
        if kind == "output_text":
            logprobs = chat_logprobs(self._tokenizer, [token])["content"] if self._tokenizer and token else []
            self._part["logprobs"] += logprobs
            more["logprobs"] = logprobs
        self._part["text"] += event.text
        yield self._about(f"{kind}.delta", content_index=0, delta=event.text, **more)

    def close(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The text that is growing is complete."""
        part, self._part = self._part, None
        if part is None:
            return
        more = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
        yield self._about(f"{part['type']}.done", content_index=0, text=part["text"], **more)
        yield self._about("content_part.done", content_index=0, part=part)
        yield self._done()

    def _begin(self, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if kind == "output_text":
            self._part = {"type": kind, "text": "", "annotations": [], "logprobs": []}
            yield self._open("msg", {"type": "message", "role": "assistant", "content": []})
        else:
            self._part = {"type": kind, "text": ""}
            yield self._open("rs", {"type": "reasoning", "summary": [], "content": []})
        self.items[-1]["content"].append(self._part)
        yield self._about("content_part.added", content_index=0, part=dict(self._part))

    def _open(self, prefix: str, item: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        self.items.append({"id": f"{prefix}_{uuid.uuid4().hex}", **item, "status": "in_progress"})
        return "output_item.added", {
            "output_index": len(self.items) - 1,
            "item": json.loads(json.dumps(self.items[-1])),
        }

    def _done(self) -> tuple[str, dict[str, Any]]:
        self.items[-1]["status"] = "completed"
        return "output_item.done", {"output_index": len(self.items) - 1, "item": self.items[-1]}

    def _about(self, name: str, /, **content: Any) -> tuple[str, dict[str, Any]]:
        return name, {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **content}


def _finished(head: dict[str, Any], made: Collector, output: _Output) -> dict[str, Any]:
    """The response as it is in the end."""
    usage = made.usage(1)
    cut = made.replies[0].finish_reason == "length"
    if cut and output.items:
        output.items[-1]["status"] = "incomplete"
    return {
        **head,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": output.items,
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        },
    }


async def _body(made: Collector, head: dict[str, Any], output: _Output) -> dict[str, Any]:
    async for piece in made.pieces():
        for event in piece.events:
            list(output.push(event, piece.token))
    list(output.close())
    return _finished(head, made, output)


async def _events(made: Collector, head: dict[str, Any], output: _Output) -> AsyncIterator[bytes]:
    """The response as server-sent events."""
    count = 0

    def event(name: str, content: dict[str, Any]) -> bytes:
        nonlocal count
        count += 1
        return sse({"type": f"response.{name}", "sequence_number": count - 1, **content}, f"response.{name}")

    begun = False
    try:
        async for piece in made.pieces():
            if not begun:
                begun = True
                yield event("created", {"response": head})
                yield event("in_progress", {"response": head})
            if piece.reading:
                yield reading(piece.reading)
            for part in piece.events:
                for name, content in output.push(part, piece.token):
                    yield event(name, content)
    except Exception as error:
        if not begun:  # it still gets a status of its own
            raise
        failed = as_api_error(error)
        about = {"code": "server_error", "message": failed.message}
        yield event("failed", {"response": {**head, "status": "failed", "error": about, "output": output.items}})
        return
    for name, content in output.close():
        yield event(name, content)
    response = _finished(head, made, output)
    yield event(response["status"], {"response": response})
