"""Ollama's native API: chat, generate and embeddings, in lines of JSON.

In: requests as https://docs.ollama.com/api has them. Out: the same form, an object or a line for each piece.
Durations are in nanoseconds. A prompt that is empty loads its model, or lets it go where `keep_alive` is 0.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import AfterValidator, Field
from pydantic.json_schema import SkipJsonSchema
from starlette.responses import Response
from starlette.types import ASGIApp

from ..chat_format.replies import Event, Text, Thinking, ToolCall
from ..conversation.reply import Reply, ReplyOptions, prompt_ids
from . import fields, media
from . import options as read
from .cards import timestamp
from .completions import CalledFunction, FunctionTool, read_functions
from .embeddings import MAX_INPUTS, embedded
from .endpoint import Endpoint, Sent, answer
from .engine import Engine, GenerationRequest, Job
from .fields import Body, wrong
from .ollama_models import JSON_LINES, Named
from .settings import seconds
from .wire import json_response, ndjson


class Options(fields.SamplingRequest):
    """Ollama's options; those about how a model is loaded have no effect."""

    ignored: ClassVar[tuple[str, ...]] = ("num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap")
    ignored += ("use_mlock", "numa", "low_vram", "f16_kv", "vocab_only", "logits_all", "embedding_only", "num_gqa")
    ignored += ("repeat_last_n", "penalize_newline", "tfs_z", "typical_p", "mirostat", "mirostat_tau", "mirostat_eta")
    num_predict: Annotated[int, Field(ge=-2, le=2**31), fields.Whole] | None = None
    num_ctx: fields.Length | None = None
    repeat_penalty: float | None = Field(None, ge=0, le=100)
    stop: fields.Stop | fields.Stops | None = None
    logit_bias: SkipJsonSchema[fields.Object | None] = None
    stream: SkipJsonSchema[bool | None] = None


class Kept(Named):
    """What all take: `keep_alive` becomes the seconds that the model stays loaded after the request."""

    options: Options | None = None
    keep_alive: Annotated[int | float | str, AfterValidator(seconds)] | None = None


class ReplyRequest(Kept):
    """What chat and generate both take."""

    format: Literal["json", ""] | fields.Object | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    stream: bool | None = None
    truncate: bool | None = None
    ignored = ("shift", "logprobs", "top_logprobs")


class Call(Body):
    id: str | None = None
    function: CalledFunction


class Message(Body):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: fields.Items[str] | None = None
    tool_calls: fields.Items[Call] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaChat(ReplyRequest):
    """The body of /api/chat."""

    messages: fields.Items[Message] | None = None
    tools: Annotated[fields.Tools[FunctionTool], fields.usable("function")] | None = None


class OllamaGenerate(ReplyRequest):
    """The body of /api/generate."""

    unsupported = ("suffix", "template")
    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    context: fields.Items[int] | None = None
    images: fields.Items[str] | None = None


class OllamaEmbed(Kept):
    """The body of /api/embed."""

    input: str | Annotated[fields.Items[str], Field(max_length=MAX_INPUTS)]
    truncate: bool | None = None
    dimensions: Annotated[int, Field(ge=0)] | None = None


class OllamaOldEmbed(Kept):
    """The body of /api/embeddings."""

    prompt: str | None = None


async def chat(body: OllamaChat, engine: Engine) -> ASGIApp:
    """Reply to a conversation; the assistant's last message is gone on with."""
    if not body.messages:
        return _without_prompt(body, {"message": {"role": "assistant", "content": ""}})
    said = [_message(message, f"messages[{i}].") for i, message in enumerate(body.messages)]
    messages = await media.received(said, engine)
    begun = messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
    options = _options(body, engine, tools=read_functions(body.tools, engine.lm), go_on=begun)
    if body.truncate is not False:
        return _answer(body, engine, await read.fitted(engine, messages, options), options)
    return _answer(body, engine, await asyncio.to_thread(prompt_ids, engine.lm, messages, options), options)


async def generate(body: OllamaGenerate, engine: Engine) -> ASGIApp:
    """Reply to a prompt."""
    if not body.prompt and not body.images:
        return _without_prompt(body, {"response": ""})
    options, lm, vocab = _options(body, engine), engine.lm, engine.lm.config.vocab
    if not all(0 <= id < vocab for id in body.context or ()):
        raise wrong("context", f"must be token ids from 0 to {vocab - 1}")
    if body.images and (body.raw or body.context):
        raise wrong("images", "can't go with raw or context: use /api/chat", "unsupported_value")
    if body.prompt and (body.raw or body.context):
        after = body.context or ()
        ids = await asyncio.to_thread(
            lm.encode_prompt, body.prompt, raw=bool(body.raw), after=after, think=options.think
        )
        return _answer(body, engine, [*after, *ids], options)
    told = [{"role": "system", "content": body.system}] if body.system else []
    asked = Message(role="user", content=body.prompt, images=body.images)
    messages = await media.received([*told, _message(asked, "")], engine)
    return _answer(body, engine, await asyncio.to_thread(prompt_ids, lm, messages, options), options)


async def embed(body: OllamaEmbed, engine: Engine) -> Response:
    """Embed texts."""
    start, load = time.monotonic(), _load_time(engine)
    texts = [body.input] if isinstance(body.input, str) else body.input
    vectors, tokens = await embedded(engine, texts, body.truncate is not False)
    if body.dimensions and body.dimensions < engine.lm.config.hidden:
        vectors = [vector[: body.dimensions] / np.linalg.norm(vector[: body.dimensions]) for vector in vectors]
    times = {"total_duration": _ns(time.monotonic() - start + load), "load_duration": _ns(load)}
    made = {"model": body.model, "embeddings": [vector.tolist() for vector in vectors], **times}
    return json_response(made | {"prompt_eval_count": tokens})


async def old_embed(body: OllamaOldEmbed, engine: Engine) -> Response:
    """Embed one text."""
    vectors, _ = await embedded(engine, [body.prompt] if body.prompt else [], truncate=True)
    return json_response({"embedding": vectors[0].tolist() if vectors else []})


# From a request to options


def _message(message: Message, path: str) -> dict[str, Any]:
    text: Any = message.content or ""
    if message.images:
        seen = [media.of_base64(data, f"{path}images[{i}]") for i, data in enumerate(message.images)]
        text = [*seen, {"type": "text", "text": text}]
    if message.role == "assistant":
        calls = [
            read.tool_call(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()
        ]
        made: dict[str, Any] = read.assistant_message(text, message.thinking, calls)
        return made
    names = {"name": message.tool_name, "tool_call_id": message.tool_call_id} if message.role == "tool" else {}
    return {"role": message.role, "content": text, **{key: x for key, x in names.items() if x}}


def _options(body: ReplyRequest, engine: Engine, **more: Any) -> ReplyOptions:
    given = body.options or Options.model_validate({})
    seed = None if given.seed == -1 else given.seed  # any
    sampling = given.model_copy(update={"repetition_penalty": given.repeat_penalty, "seed": seed})
    most = engine.settings.max_tokens if given.num_predict is None else given.num_predict
    schema = {"type": "object"} if body.format == "json" else body.format or None
    return ReplyOptions(
        max_tokens=most if most and most > 0 else None,
        sampling=read.read_sampling(sampling, engine.lm),
        stop=given.stop or (),
        think=body.think if isinstance(body.think, bool | None) else True,
        schema=schema if isinstance(schema, Mapping) else None,
        **more,
    )


# What is sent


def _answer(body: ReplyRequest, engine: Engine, ids: list[int], options: ReplyOptions) -> ASGIApp:
    """Return the response; `num_ctx` bounds prompt and reply together."""
    if body.options and body.options.num_ctx:
        room = max(1, body.options.num_ctx - len(ids))
        options = replace(options, max_tokens=min(options.max_tokens or room, room))
    job = engine.submit([GenerationRequest(ids, options)], "messages", "format")
    load = _load_time(engine)
    lines = _lines(job, body, load)
    nothing = {**_head(body), **_piece(body, []), "done": False}
    whole = partial(_whole, job, body, load)
    return answer(job, body.stream is not False, lines, whole, ping=nothing, form=(JSON_LINES, ndjson))


async def _lines(job: Job, body: ReplyRequest, load: float) -> AsyncIterator[Sent]:
    calls = 0
    async for update in job.updates():
        for event in update.events:
            if isinstance(event, Text | Thinking | ToolCall):
                yield {**_head(body), **_piece(body, [event], calls), "done": False}
                calls += isinstance(event, ToolCall)
        if update.reply:
            yield {**_head(body), **_piece(body, []), **_ending(job, body, update.reply, load)}


def _whole(job: Job, body: ReplyRequest, load: float) -> dict[str, Any]:
    reply = job.replies[0]
    events: list[Event] = [Thinking(reply.thinking)] if reply.thinking else []
    return {
        **_head(body),
        **_piece(body, [*events, Text(reply.text), *reply.tool_calls]),
        **_ending(job, body, reply, load),
    }


def _head(body: ReplyRequest) -> dict[str, Any]:
    return {"model": body.model, "created_at": timestamp(time.time())}


def _piece(body: ReplyRequest, events: list[Event], calls: int = 0) -> dict[str, Any]:
    """A part of a reply, in chat's form or generate's. `calls`: those before it."""
    text = "".join(event.text for event in events if isinstance(event, Text))
    thinking = "".join(event.text for event in events if isinstance(event, Thinking))
    thought = {"thinking": thinking} if thinking else {}
    if isinstance(body, OllamaGenerate):
        return {"response": text, **thought}
    called = [
        {"id": call.id, "function": {"index": calls + i, "name": call.name, "arguments": call.arguments}}
        for i, call in enumerate(event for event in events if isinstance(event, ToolCall))
    ]
    return {"message": {"role": "assistant", "content": text, **thought, **({"tool_calls": called} if called else {})}}


def _ending(job: Job, body: ReplyRequest, reply: Reply, load: float) -> dict[str, Any]:
    figures = reply.statistics
    prompt = job.requests[0].prompt
    assert isinstance(prompt, list)
    ids = [*prompt, *(token.id for token in reply.tokens)]
    context = {"context": ids} if min(ids) >= 0 else {}  # pictures are not told in ids
    return {
        "done": True,
        "done_reason": "length" if reply.finish_reason == "length" else "stop",
        **(context if isinstance(body, OllamaGenerate) and not body.raw else {}),
        "total_duration": _ns(time.monotonic() - job.submitted + load),
        "load_duration": _ns(load),
        "prompt_eval_count": figures.prompt_tokens + figures.reused_tokens,
        "prompt_eval_duration": _ns(figures.prompt_time),
        "eval_count": figures.reply_tokens,
        "eval_duration": _ns(figures.reply_time),
    }


def _without_prompt(body: ReplyRequest, empty: dict[str, Any]) -> Response:
    """The model is loaded by now; it goes when this is sent, where `keep_alive` is 0."""
    return json_response(
        {**_head(body), **empty, "done": True, "done_reason": "load" if body.keep_alive != 0 else "unload"}
    )


def _load_time(engine: Engine) -> float:
    """Seconds that the model took to load, told once."""
    load, engine.load_seconds = engine.load_seconds, 0.0
    return load


def _ns(seconds: float) -> int:
    return max(1, round(seconds * 1e9))


_HEAD = {"model": str, "created_at": str, "done": True}
_CHAT = {**_HEAD, "message": {"role": "assistant", "content": str}}
_EMBED = {"model": str, "embeddings": [[float]], "total_duration": int}
ENDPOINTS = (
    Endpoint("/api/chat", "Ollama: reply to a conversation", OllamaChat, _CHAT, chat, JSON_LINES),
    Endpoint(
        "/api/generate", "Ollama: reply to a prompt", OllamaGenerate, {**_HEAD, "response": str}, generate, JSON_LINES
    ),
    Endpoint("/api/embed", "Ollama: embed texts", OllamaEmbed, _EMBED, embed, ""),
    Endpoint("/api/embeddings", "Ollama: embed a text", OllamaOldEmbed, {"embedding": [float]}, old_embed, ""),
)
