"""OpenAI's chat completions and text completions.

In: requests as OpenAI's API reference has them, with `top_k, min_p, repetition_penalty, chat_template_kwargs` beside.
Out: replies in the same form, whole or as a stream of chunks.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..chat_format.replies import Thinking, ToolCall
from ..conversation.reply import Reply, ReplyOptions
from ..generation.sampling import Token
from ..tokens.tokenizer import Tokenizer
from . import options as read
from .engine import Engine, GenerationRequest, Job, Update
from .fields import Fields
from .options import logprob
from .wire import EventStream, answer_whole, read_json, sse

_IGNORED = ("metadata", "user", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "verbosity")


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions."""
    engine: Engine = request.app.state.engine
    settings = request.app.state.settings
    fields = Fields(await read_json(request, settings.max_body_bytes))
    head = _head(fields, settings.model_name, "chatcmpl")
    messages, tools = read.read_messages(fields), read.read_tools(fields)
    choices = fields.integer("n", 1, read.MAX_CHOICES, 1)
    logprobs = _top_logprobs(fields)
    options = ReplyOptions(
        max_tokens=read.read_max_tokens(fields, "max_completion_tokens", "max_tokens", default=settings.max_tokens),
        sampling=read.read_sampling(fields, engine.lm),
        stop=read.read_stops(fields),
        think=read.read_thinking(fields),
        tools=tools,
        tool_choice=read.read_tool_choice(fields, tools),
        logprobs=logprobs,
        **read.read_format(fields),
    )
    one_call = not fields.flag("parallel_tool_calls", True)
    streaming, with_usage = _stream_fields(fields)
    _refuse_others(fields)
    job = engine.submit(_choices(messages, options, choices, one_call))
    made, tokenizer = Collector(job), None if logprobs is None else engine.lm.tokenizer
    if streaming:
        return EventStream(job, _chat_chunks(made, head, tokenizer, with_usage))
    return await answer_whole(request, job, _chat_body(made, head, tokenizer))


async def completions(request: Request) -> Response:
    """POST /v1/completions: text goes on, without a chat template."""
    engine: Engine = request.app.state.engine
    settings = request.app.state.settings
    fields = Fields(await read_json(request, settings.max_body_bytes))
    head = _head(fields, settings.model_name, "cmpl")
    prompts = _prompts(fields, engine.lm.config.vocab)
    choices = fields.integer("n", 1, read.MAX_CHOICES, 1)
    if fields.integer("best_of", 1, read.MAX_CHOICES, choices) != choices:
        raise fields.wrong("best_of", "other than n isn't supported", "unsupported_value")
    if fields.text("suffix"):
        raise fields.wrong("suffix", "isn't supported", "unsupported_value")
    logprobs = fields.integer("logprobs", 0, read.MAX_TOP_LOGPROBS)
    echo = fields.flag("echo")
    if echo and logprobs is not None:
        raise fields.wrong("echo", "with logprobs isn't supported", "unsupported_value")
    options = ReplyOptions(
        max_tokens=read.read_max_tokens(fields, "max_tokens", default=settings.max_tokens),
        sampling=read.read_sampling(fields, engine.lm),
        stop=read.read_stops(fields),
        logprobs=logprobs,
        **read.read_format(fields),
    )
    streaming, with_usage = _stream_fields(fields)
    _refuse_others(fields)
    wanted = [one for prompt in prompts for one in _choices(prompt, options, choices, False)]
    echoes = [_echo(one.prompt, engine.lm.tokenizer) if echo else "" for one in wanted]
    job = engine.submit(wanted, "prompt")
    made, tokenizer = Collector(job), None if logprobs is None else engine.lm.tokenizer
    if streaming:
        return EventStream(job, _text_chunks(made, head, tokenizer, echoes, choices, with_usage))
    return await answer_whole(request, job, _text_body(made, head, tokenizer, echoes, choices))


def _head(fields: Fields, name: str, prefix: str) -> dict[str, Any]:
    """What every chunk of a reply begins with."""
    kind = {"chatcmpl": "chat.completion", "cmpl": "text_completion"}[prefix]
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": fields.text("model", name),
    }


def _choices(prompt: Any, options: ReplyOptions, choices: int, one_call: bool) -> list[GenerationRequest]:
    """So many replies to one prompt; given a seed, each has its own."""
    wanted = []
    for i in range(choices):
        sampling = options.sampling
        if i and sampling and sampling.seed is not None:
            sampling = replace(sampling, seed=(sampling.seed + i) % 2**63)
        wanted.append(GenerationRequest(prompt, replace(options, sampling=sampling), one_call))
    return wanted


def _stream_fields(fields: Fields) -> tuple[bool, bool]:
    """Whether to stream, and with usage at the end."""
    streaming = fields.flag("stream")
    more = fields.within("stream_options")
    if more is None:
        return streaming, False
    if not streaming:
        raise fields.wrong("stream_options", "is for stream=true only")
    with_usage = more.flag("include_usage")
    more.flag("include_obfuscation")
    more.log_unknown()
    return streaming, with_usage


def _refuse_others(fields: Fields) -> None:
    """What OpenAI's API has and this server doesn't; the rest that is unknown goes into the log."""
    for name in _IGNORED:
        fields.get(name)
    fields.one_of("service_tier", ("auto", "default"), "auto")
    if [part for part in fields.items("modalities") if part != "text"]:
        raise fields.wrong("modalities", "other than text aren't supported", "unsupported_value")
    for name in ("audio", "functions", "function_call", "prediction", "web_search_options"):
        if fields.get(name):
            raise fields.wrong(name, "isn't supported", "unsupported_value")
    fields.log_unknown()


def _top_logprobs(fields: Fields) -> int | None:
    """How many of the likeliest tokens to tell; None: no log-probabilities."""
    top = fields.integer("top_logprobs", 0, read.MAX_TOP_LOGPROBS)
    if fields.flag("logprobs"):
        return top or 0
    if top:
        raise fields.wrong("top_logprobs", "needs logprobs=true")
    return None


def _prompts(fields: Fields, vocab: int) -> list[str | list[int]]:
    """A text completion's prompts: a text, texts, ids, or lists of ids."""
    value = fields.needed("prompt")
    several = isinstance(value, list) and not (value and all(type(item) is int for item in value))
    prompts = value if several else [value]
    if not 0 < len(prompts) <= read.MAX_CHOICES:
        raise fields.wrong("prompt", f"must be 1 to {read.MAX_CHOICES} prompts, not {len(prompts)}")
    for i, prompt in enumerate(prompts):
        ids = isinstance(prompt, list) and prompt and all(type(item) is int and 0 <= item < vocab for item in prompt)
        if not ids and not (isinstance(prompt, str) and prompt):
            name = f"prompt[{i}]" if several else "prompt"
            raise fields.wrong(name, f"must be a string or a list of token ids from 0 to {vocab - 1}, and not empty")
    return prompts


def _echo(prompt: Any, tokenizer: Tokenizer) -> str:
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt)


class Collector:
    """What a job has made so far, of which whole replies and usage are told."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.replies: list[Reply] = []
        self.answers: dict[int, list[Token]] = {}  # the tokens of each choice's answer
        self._thought = 0  # tokens of thinking

    async def pieces(self) -> AsyncIterator[Update]:
        async for piece in self.job.pieces():
            if piece.token and piece.place == "answer":
                self.answers.setdefault(piece.choice, []).append(piece.token)
            self._thought += piece.place == "thinking"
            self.replies += [piece.reply] if piece.reply else []
            yield piece

    async def all(self) -> Collector:
        async for _ in self.pieces():
            pass
        return self

    def usage(self, choices: int) -> dict[str, Any]:
        """Tokens. Each prompt counts once, as the first of its choices found it."""
        prompts = [reply.statistics for reply in self.replies[::choices]]
        reused = sum(statistics.reused_tokens for statistics in prompts)
        prompt = reused + sum(statistics.prompt_tokens for statistics in prompts)
        replied = sum(reply.statistics.reply_tokens for reply in self.replies)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": replied,
            "total_tokens": prompt + replied,
            "prompt_tokens_details": {"cached_tokens": reused},
            "completion_tokens_details": {"reasoning_tokens": self._thought},
        }


async def _chat_body(made: Collector, head: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The whole reply. `tokenizer`: to tell log-probabilities, or None."""
    await made.all()
    choices = []
    for i, reply in enumerate(made.replies):
        message: dict[str, Any] = {"role": "assistant", "content": reply.text or (None if reply.tool_calls else "")}
        if reply.thinking:
            message["reasoning_content"] = reply.thinking
        if reply.tool_calls:
            message["tool_calls"] = [_call(call) for call in reply.tool_calls]
        logprobs = chat_logprobs(tokenizer, made.answers.get(i, [])) if tokenizer else None
        choices.append({"index": i, "message": message, "logprobs": logprobs, "finish_reason": reply.finish_reason})
    return {**head, "choices": choices, "usage": made.usage(len(choices))}


async def _chat_chunks(
    made: Collector, head: dict[str, Any], tokenizer: Tokenizer | None, with_usage: bool
) -> AsyncIterator[bytes]:
    """The reply as server-sent events."""
    calls, choice = 0, -1

    def chunk(delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> bytes:
        one = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return sse({**head, "object": "chat.completion.chunk", "choices": [one]})

    async for piece in made.pieces():
        if piece.choice > choice:
            choice, calls = piece.choice, 0
            yield chunk({"role": "assistant", "content": ""})
        if piece.reading:
            yield reading(piece.reading)
        token = [piece.token] if piece.token and piece.place == "answer" else []
        logprobs = chat_logprobs(tokenizer, token) if tokenizer and token else None
        for event in piece.events:
            if isinstance(event, ToolCall):
                yield chunk({"tool_calls": [{"index": calls, **_call(event)}]})
                calls += 1
            elif isinstance(event, Thinking):
                yield chunk({"reasoning_content": event.text})
            else:
                yield chunk({"content": event.text}, logprobs=logprobs)
                logprobs = None
        if logprobs:  # of a token whose text is held back
            yield chunk({"content": ""}, logprobs=logprobs)
        if piece.reply:
            yield chunk({}, piece.reply.finish_reason)
    if with_usage:
        usage = made.usage(len(made.replies))
        yield sse({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
    yield sse(b"[DONE]")


async def _text_body(
    made: Collector, head: dict[str, Any], tokenizer: Tokenizer | None, echoes: list[str], choices: int
) -> dict[str, Any]:
    """The whole text completion."""
    texts = list(echoes)
    async for piece in made.pieces():
        texts[piece.choice] += _plain(piece)
    replies = [
        _text_choice(i, texts[i], reply.finish_reason, _text_logprobs(tokenizer, made.answers.get(i, [])))
        for i, reply in enumerate(made.replies)
    ]
    return {**head, "choices": replies, "usage": made.usage(choices)}


async def _text_chunks(
    made: Collector,
    head: dict[str, Any],
    tokenizer: Tokenizer | None,
    echoes: list[str],
    choices: int,
    with_usage: bool,
) -> AsyncIterator[bytes]:
    """The text completion as server-sent events."""
    choice = -1
    async for piece in made.pieces():
        if piece.reading:
            yield reading(piece.reading)
        text = _plain(piece)
        if piece.choice > choice and not piece.reading:
            choice, text = piece.choice, echoes[piece.choice] + text
        finish = piece.reply.finish_reason if piece.reply else None
        token = [piece.token] if piece.token and piece.place == "answer" else []
        logprobs = _text_logprobs(tokenizer, token) if token else None
        if text or finish or logprobs:
            yield sse({**head, "choices": [_text_choice(piece.choice, text, finish, logprobs)]})
    if with_usage:
        yield sse({**head, "choices": [], "usage": made.usage(choices)})
    yield sse(b"[DONE]")


def reading(progress: tuple[int, int]) -> bytes:
    """A comment of the event stream, which tells that something goes on while a long prompt is read."""
    return b": read %d of %d tokens\n\n" % progress


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _plain(piece: Update) -> str:
    """All text of a piece: a text completion doesn't part thinking and answer."""
    return "".join(event.raw if isinstance(event, ToolCall) else event.text for event in piece.events)


def _text_choice(index: int, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
    finish = "stop" if finish == "tool_calls" else finish
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    def entry(id: int, value: float | None) -> dict[str, Any]:
        piece = tokenizer.piece(id, skip_special=False)
        return {"token": piece.decode("utf-8", "replace"), "logprob": logprob(value), "bytes": list(piece)}

    content = [
        {**entry(token.id, token.logprob), "top_logprobs": [entry(*likely) for likely in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}


def _text_logprobs(tokenizer: Tokenizer | None, tokens: Sequence[Token]) -> dict[str, Any] | None:
    """OpenAI's older form. Offsets count from the reply's beginning, in characters."""
    if tokenizer is None:
        return None
    texts = [tokenizer.piece(token.id, skip_special=False).decode("utf-8", "replace") for token in tokens]
    top = [
        {tokenizer.piece(id, skip_special=False).decode("utf-8", "replace"): logprob(value) for id, value in token.top}
        for token in tokens
    ]
    return {
        "tokens": texts,
        "token_logprobs": [logprob(token.logprob) for token in tokens],
        "top_logprobs": top,
        "text_offset": list(accumulate((len(text) for text in texts[:-1]), initial=0)) if texts else [],
    }
