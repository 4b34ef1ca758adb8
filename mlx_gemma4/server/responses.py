"""OpenAI's responses. The latest ones are kept in memory, to go on from by `previous_response_id` (stored.py).

In: requests as OpenAI's API reference has them. Out: a response's items, whole or as events.
"""

import copy
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ..chat_format.messages import tool_result
from ..chat_format.replies import CallPart, Event, Text, ToolCall
from ..conversation.reply import Reply, ReplyOptions
from ..generation.sampling import Token
from ..tokens.tokenizer import Tokenizer
from . import fields, media
from . import options as read
from .endpoint import Endpoint, Sent, answer, chat_logprobs, reading, usage
from .engine import Engine, GenerationRequest, Job
from .fields import Body
from .forms import read_form
from .models import Models
from .wire import ApiError, json_response

_ITEM = ("id", "status", "phase")  # of any item, without effect here


class InputMessage(Body):
    ignored = _ITEM
    type: Annotated[Literal["message"], WithJsonSchema({"enum": ["message", None]})] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: fields.Content


class FunctionCall(Body):
    ignored = _ITEM
    type: Literal["function_call"]
    name: str
    call_id: str | None = None
    arguments: fields.Arguments = None


class FunctionOutput(Body):
    ignored = _ITEM
    type: Literal["function_call_output"]
    call_id: str | None = None
    output: fields.Content


class ReasoningPart(Body):
    ignored = ("type",)
    text: str | None = None


class ReasoningItem(Body):
    ignored = (*_ITEM, "summary", "encrypted_content")
    type: Literal["reasoning"]
    content: fields.Items[ReasoningPart] | None = None


def _typed(item: Any) -> Any:
    """An item without a type is a message."""
    return {**item, "type": "message"} if isinstance(item, dict) and item.get("type") is None else item


def _other(kind: str, item: dict[str, Any]) -> dict[str, Any]:
    """A custom tool's item as a function's, whose one argument is the text; others tell of what ran at a provider."""
    if kind in ("custom_tool_call", "local_shell_call"):
        given = {"input": item.get("input")} if kind == "custom_tool_call" else item.get("action")
        call = {"type": "function_call", "call_id": item.get("call_id"), "arguments": given}
        return {**call, "name": item.get("name") or "local_shell"}
    if kind in ("custom_tool_call_output", "local_shell_call_output"):
        output = item.get("output")
        text = output if isinstance(output, str | list) else json.dumps(output)
        return {"type": "function_call_output", "call_id": item.get("call_id"), "output": text}
    fields.leave_out(kind)
    return {"type": "message", "role": "assistant", "content": f"[{kind:.40}: left out]"}


_KNOWN = ("message", "function_call", "function_call_output", "reasoning")
Item = Annotated[
    InputMessage | FunctionCall | FunctionOutput | ReasoningItem, Field(discriminator="type"), BeforeValidator(_typed)
]


class FlatTool(fields.Function):
    type: Literal["function"]


class TextOptions(Body):
    ignored = ("verbosity",)
    format: fields.Format | None = None


class ResponsesRequest(fields.ConversationRequest):
    """The body of /v1/responses."""

    ignored = (*fields.IGNORED, "max_tool_calls", "stream_options", "client_metadata")
    unsupported = ("conversation", "background", "prompt")
    input: str | Annotated[fields.Items[Item], Field(min_length=1), fields.Others(_KNOWN, _other)]
    instructions: str | None = None
    max_output_tokens: fields.Length | None = None
    max_tokens: fields.Length | None = None  # as chats have it
    max_completion_tokens: fields.Length | None = None
    top_logprobs: fields.TopLogprobs | None = None
    include: fields.Items[Any] | None = None
    text: TextOptions | None = None
    tools: Annotated[fields.Tools[FlatTool], fields.usable("function")] | None = None
    tool_choice: fields.ToolChoice | fields.Object | None = None
    metadata: fields.Object | None = None
    truncation: Literal["auto", "disabled"] | None = None
    previous_response_id: SkipJsonSchema[str | None] = None  # of a response that there is
    store: bool | None = None


_REPLY = {
    "id": str,
    "object": "response",
    "created_at": int,
    "model": str,
    "status": ("completed", "incomplete"),
    "output": [{"id": str, "type": ("message", "reasoning", "function_call")}],
    "usage": {"input_tokens": int, "output_tokens": int, "total_tokens": int},
}


async def responses(body: ResponsesRequest, engine: Engine) -> ASGIApp:
    """Respond to a conversation."""
    tools = read.read_tools({f"tools[{i}]": tool for i, tool in enumerate(body.tools or ())}, engine.lm)
    choice, tools = read.read_tool_choice(body.tool_choice, tools)
    form = read_form(body, "text.format", body.text.format if body.text else None).beside(choice)
    max_tokens = body.max_output_tokens or body.max_completion_tokens or body.max_tokens
    options = ReplyOptions(
        max_tokens=max_tokens or engine.settings.max_tokens,
        sampling=read.read_sampling(body, engine.lm),
        stop=body.stop or (),
        tools=tools,
        tool_choice=choice,
        logprobs=(body.top_logprobs or 0) if "message.output_text.logprobs" in (body.include or ()) else None,
        **read.read_thinking(body, engine),
        **form.options,
    )
    said = await media.received(_messages(body, _earlier(body, engine)), engine)
    messages = [{"role": "system", "content": body.instructions}, *said] if body.instructions else said
    prompt = await read.fitted(engine, messages, options) if body.truncation == "auto" else messages
    request = GenerationRequest(prompt, options, body.parallel_tool_calls is False)
    job = engine.submit([request], "input", form.path)
    tokenizer = None if options.logprobs is None else engine.lm.tokenizer

    def keep(response: dict[str, Any], reply: Reply) -> None:
        if body.store is not False:
            engine.stored.put(response, [*said, reply.message])

    made = _Response(job, _head(body, options, engine.settings.model_name), tokenizer, keep)
    return answer(job, body.stream, made.events(), lambda: made.response, made.failed)


async def _stored(request: Request) -> Response:
    """GET and DELETE of a response that is kept."""
    models: Models = request.app.state.models
    id = request.path_params["id"]
    found = models.stored.get(id)
    if found is None:
        raise ApiError(404, f"response {id!r:.80} not found: the latest are kept, while the server runs", "id")
    if request.method == "DELETE":
        models.stored.delete(id)
        return json_response({"id": id, "object": "response", "deleted": True})
    return json_response(found.response)


STORED = Route("/v1/responses/{id}", _stored, methods=["GET", "DELETE"])
RESPONSES = Endpoint("/v1/responses", "Respond to a conversation", ResponsesRequest, _REPLY, responses)


def _head(body: ResponsesRequest, options: ReplyOptions, name: str) -> dict[str, Any]:
    """A response as it begins: what was asked for, as far as it took effect."""
    given = body.model_dump(include={"reasoning", "text", "tools"}, by_alias=True, exclude_unset=True)
    sampling = options.sampling
    assert sampling
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": options.max_tokens,
        "metadata": body.metadata or {},
        "model": name if body.model is None else body.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": given.get("reasoning") or {"effort": None, "summary": None},
        "store": body.store is not False,
        "temperature": sampling.temperature,
        "text": given.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": given.get("tools") or [],
        "top_p": sampling.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
    }


def _earlier(body: ResponsesRequest, engine: Engine) -> list[dict[str, Any]]:
    """A copy of the conversation that the request goes on from."""
    if not body.previous_response_id:
        return []
    found = engine.stored.get(body.previous_response_id)
    if found is None:
        message = f"previous_response_id {body.previous_response_id!r:.80} not found: send the conversation as input"
        raise ApiError(400, message, "previous_response_id", "previous_response_not_found")
    return copy.deepcopy(found.messages)


def _messages(body: ResponsesRequest, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Input after earlier messages, as a conversation in the form of chat completions."""
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    # Names of called functions, by the call's id.
    names = {call["id"]: call["function"]["name"] for message in messages for call in message.get("tool_calls", ())}
    for i, item in enumerate(body.input):
        if isinstance(item, FunctionCall):
            names[item.call_id] = item.name
            _own(messages).setdefault("tool_calls", []).append(read.tool_call(item.call_id, item.name, item.arguments))
        elif isinstance(item, FunctionOutput):
            id = item.call_id
            output = media.content_of(item.output, f"input[{i}].output")
            messages.append(tool_result(id or "", names.get(id, "unknown"), "") | {"content": output})
        elif isinstance(item, ReasoningItem):
            _own(messages)["reasoning_content"] = "".join(part.text or "" for part in item.content or ())
        elif item.role == "assistant":
            _own(messages)["content"].append(read.read_text(item.content))
        else:
            role = "system" if item.role == "developer" else item.role
            messages.append({"role": role, "content": media.content_of(item.content, f"input[{i}].content")})
    for message in messages:
        if message["role"] == "assistant":
            message["content"] = "".join(message["content"])
    return messages


def _own(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The last message if it is the model's, else a new one."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": []})  # texts: joined in the end
    return messages[-1]


class _Response:
    """A response that grows, and the events that tell how. Each is to be sent before the next one is asked for."""

    def __init__(
        self,
        job: Job,
        response: dict[str, Any],
        tokenizer: Tokenizer | None,
        keep: Callable[[dict[str, Any], Reply], None],
    ) -> None:
        """response: as it begins; tokenizer: for log-probabilities, or None; keep: gets the whole response."""
        self.job, self.response, self._keep = job, response, keep
        self._tokenizer = tokenizer
        self._items: list[dict[str, Any]] = response["output"]
        self._part: dict[str, Any] | None = None  # of the item that is growing
        self._numbers = count()

    async def events(self) -> AsyncIterator[Sent]:
        begun = False
        async for update in self.job.updates():
            if not begun:
                begun = True
                yield self._event("created", response=self.response)
                yield self._event("in_progress", response=self.response)
            if update.reading:
                yield reading(update.reading)
            for event in update.events:
                for sent in self._push(event, update.token):
                    yield sent
        for sent in self._close():
            yield sent
        self._finish()
        self._keep(self.response, self.job.replies[0])
        yield self._event(self.response["status"], response=self.response)

    def failed(self, error: ApiError) -> dict[str, Any]:
        self.response |= {"status": "failed", "error": {"code": "server_error", "message": error.message}}
        return self._event("failed", response=self.response)

    def _finish(self) -> None:
        tokens = usage(self.job, 1)
        cut = self.job.replies[0].finish_reason == "length"
        if cut and self._items:
            self._items[-1]["status"] = "incomplete"
        self.response |= {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": tokens["prompt_tokens"],
                "input_tokens_details": tokens["prompt_tokens_details"],
                "output_tokens": tokens["completion_tokens"],
                "output_tokens_details": tokens["completion_tokens_details"],
                "total_tokens": tokens["total_tokens"],
            },
        }

    def _push(self, event: Event, token: Token | None) -> Iterator[Sent]:
        """What an event of the reply brings."""
        if isinstance(event, CallPart):
            if not self._items or self._items[-1].get("call_id") != event.id:
                yield from self._close()
                yield self._open("fc", type="function_call", call_id=event.id, name=event.name, arguments="")
            if event.json:
                self._items[-1]["arguments"] += event.json
                yield self._about("function_call_arguments.delta", delta=event.json)
            return
        if isinstance(event, ToolCall):
            arguments = self._items[-1]["arguments"]
            yield self._about("function_call_arguments.done", name=event.name, arguments=arguments)
            yield self._done()
            return
        kind = "output_text" if isinstance(event, Text) else "reasoning_text"
        if self._part is None or self._part["type"] != kind:
            yield from self._close()
            self._part = {"type": kind, "text": ""}
            if kind == "output_text":
                self._part |= {"annotations": [], "logprobs": []}
                yield self._open("msg", type="message", role="assistant", content=[])
            else:
                yield self._open("rs", type="reasoning", summary=[], content=[])
            self._items[-1]["content"].append(self._part)
            yield self._about("content_part.added", content_index=0, part=self._part)
        more = {}
        if kind == "output_text":
            more["logprobs"] = chat_logprobs(self._tokenizer, [token])["content"] if self._tokenizer and token else []
            self._part["logprobs"] += more["logprobs"]
        self._part["text"] += event.text
        yield self._about(f"{kind}.delta", content_index=0, delta=event.text, **more)

    def _close(self) -> Iterator[Sent]:
        """End the text that is growing, if there is one."""
        part, self._part = self._part, None
        if part is None:
            return
        more = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
        yield self._about(f"{part['type']}.done", content_index=0, text=part["text"], **more)
        yield self._about("content_part.done", content_index=0, part=part)
        yield self._done()

    def _open(self, prefix: str, **item: Any) -> Sent:
        self._items.append({"id": f"{prefix}_{uuid.uuid4().hex}", **item, "status": "in_progress"})
        return self._event("output_item.added", output_index=len(self._items) - 1, item=self._items[-1])

    def _done(self) -> Sent:
        self._items[-1]["status"] = "completed"
        return self._event("output_item.done", output_index=len(self._items) - 1, item=self._items[-1])

    def _about(self, name: str, /, **content: Any) -> Sent:
        return self._event(name, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **content)

    def _event(self, event: str, /, **content: Any) -> dict[str, Any]:
        return {"type": f"response.{event}", "sequence_number": next(self._numbers), **content}
