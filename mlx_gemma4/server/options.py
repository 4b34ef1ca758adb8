"""Fields that several endpoints share become `chat.ReplyOptions` and messages.

In: `Fields` of a request. Out: checked options, messages with their text as one string each. Whatever can't be is an
ApiError that names its field.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..conversation.language_model import LanguageModel
from ..generation.sampling import Sampling
from .fields import Fields

MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
ROLES = ("system", "developer", "user", "assistant", "tool")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def read_sampling(fields: Fields, lm: LanguageModel) -> Sampling:
    """How tokens are chosen: the file's recommendation with what the request says."""
    base = lm.sampling
    seed = fields.integer("seed", -(2**63), 2**64 - 1)
    top_p = fields.number("top_p", 0, 1, base.top_p)
    return replace(
        base,
        temperature=fields.number("temperature", 0, 2, base.temperature),
        top_p=max(top_p, 1e-9),  # 0 keeps one token
        top_k=max(fields.integer("top_k", -1, 2**31, base.top_k), 0),
        min_p=fields.number("min_p", 0, 1, base.min_p),
        repetition_penalty=max(fields.number("repetition_penalty", 0, 100, base.repetition_penalty), 1e-6),
        frequency_penalty=fields.number("frequency_penalty", -2, 2, 0.0),
        presence_penalty=fields.number("presence_penalty", -2, 2, 0.0),
        logit_bias=_logit_bias(fields, lm.config.vocab),
        seed=None if seed is None else seed % 2**63,
    )


def _logit_bias(fields: Fields, vocab: int) -> dict[int, float]:
    given = fields.within("logit_bias")
    bias: dict[int, float] = {}
    for key in given.values if given else ():
        assert given
        if not re.fullmatch(r"0|[1-9]\d{0,8}", key, re.ASCII) or int(key) >= vocab:
            raise fields.wrong("logit_bias", f"has the key {key!r:.40}: keys are ids of tokens, 0 to {vocab - 1}")
        bias[int(key)] = given.number(key, -100, 100, 0.0)
    return bias


def read_stops(fields: Fields, name: str = "stop") -> tuple[str, ...]:
    """Strings that end the reply: a list, or as `stop` also a single one."""
    value = fields.get(name)
    stops = [value] if isinstance(value, str) and name == "stop" else fields.items(name)
    if len(stops) > MAX_STOPS:
        raise fields.wrong(name, f"has {len(stops)} strings; {MAX_STOPS} at most")
    if not all(isinstance(stop, str) and 0 < len(stop) <= 1000 for stop in stops):
        raise fields.wrong(name, "must be a string or a list of strings, of 1 to 1000 characters each")
    return tuple(stops)


def read_max_tokens(fields: Fields, *names: str, default: int | None) -> int | None:
    """The reply's length at most: the first of `names` that is there."""
    values = [fields.integer(name, 1, 2**31) for name in names]
    return next((value for value in values if value is not None), default)


def read_thinking(fields: Fields, effort: Fields | None = None, name: str = "reasoning_effort") -> bool | None:
    """Whether to think first; None leaves it to the chat template."""
    think: bool | None = None
    source = effort or fields
    if source.get(name) is not None:
        think = source.one_of(name, EFFORTS) not in ("none", "minimal")
    if (variables := fields.within("chat_template_kwargs")) is not None:
        if variables.get("enable_thinking") is not None:
            think = variables.flag("enable_thinking")
        variables.log_unknown()
    return think


def read_tools(fields: Fields, *, flat: bool = False) -> tuple[dict[str, Any], ...]:
    """Functions that the model may call, as chat templates want them. `flat`: as /v1/responses writes them."""
    tools: list[dict[str, Any]] = []
    for item in fields.objects("tools"):
        item.one_of("type", ("function",))
        function = item if flat else item.within("function")
        if function is None:
            raise item.wrong("function", "is missing", "missing_required_parameter")
        name = function.text("name", "")
        if not NAME.fullmatch(name):
            raise function.wrong("name", "must be 1 to 128 letters, digits and _ . : -")
        if any(tool["function"]["name"] == name for tool in tools):
            raise function.wrong("name", f"{name!r} is there twice")
        function.flag("strict")
        parameters = function.within("parameters")
        described: dict[str, Any] = {"name": name, "description": function.text("description", "")}
        described["parameters"] = parameters.values if parameters else {"type": "object", "properties": {}}
        tools.append({"type": "function", "function": described})
    return tuple(tools)


def read_tool_choice(fields: Fields, tools: tuple[dict[str, Any], ...], *, flat: bool = False) -> str:
    """ "auto", "none", "required" or the name of a function."""
    value = fields.get("tool_choice")
    if isinstance(value, dict):
        choice = fields.within("tool_choice")
        assert choice
        choice.one_of("type", ("function",))
        function = choice if flat else choice.within("function")
        name = function.text("name", "") if function else ""
        if name not in [tool["function"]["name"] for tool in tools]:
            raise choice.wrong("name" if flat else "function.name", f"{name!r:.60} is none of the tools")
        return name
    chosen = fields.one_of("tool_choice", ("auto", "none", "required"), "auto")
    if chosen == "required" and not tools:
        raise fields.wrong("tool_choice", "is required, but there are no tools")
    return chosen


def read_format(fields: Fields, name: str = "response_format") -> dict[str, Any]:
    """How the reply must look: {}, or one of `schema`, `regex` and `grammar` of ReplyOptions.

    Beside OpenAI's types there are {"type": "regex", "regex": "..."} and {"type": "lark", "grammar": "..."}.
    """
    wanted = fields.within(name)
    if wanted is None:
        return {}
    kind = wanted.one_of("type", ("text", "json_object", "json_schema", "regex", "lark"))
    if kind == "json_object":
        return {"schema": {"type": "object"}}
    if kind == "json_schema":
        # /v1/chat/completions nests name, strict and schema once more; /v1/responses doesn't.
        holder = wanted.within("json_schema") or wanted
        schema = holder.within("schema")
        if schema is None:
            raise holder.wrong("schema", "is missing", "missing_required_parameter")
        return {"schema": schema.values}
    if kind in ("regex", "lark"):
        key = "regex" if kind == "regex" else "grammar"
        source = wanted.text(key)
        if not source:
            raise wanted.wrong(key, "is missing", "missing_required_parameter")
        return {key: source}
    return {}


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """The conversation, each content as one string, as chat templates want it."""
    messages: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # of called functions, by the call's id
    for item in fields.objects("messages"):
        role = item.one_of("role", ROLES)
        message: dict[str, Any] = {"role": "system" if role == "developer" else role}
        if role == "assistant":
            message["content"] = read_content(item, "content", needed=False)
            if thought := item.text("reasoning_content") or item.text("reasoning"):
                message["reasoning_content"] = thought
            if calls := [_read_call(call, names) for call in item.objects("tool_calls")]:
                message["tool_calls"] = calls
        else:
            message["content"] = read_content(item, "content")
        if role == "tool":
            call_id = item.text("tool_call_id", "")
            message["tool_call_id"] = call_id
            message["name"] = item.text("name") or names.get(call_id, "unknown")
        messages.append(message)
    if not messages:
        raise fields.wrong("messages", "must be a list of at least one message", "missing_required_parameter")
    return messages


def read_content(item: Fields, name: str, *, needed: bool = True) -> str:
    """A message's text, from a string or a list of text parts."""
    value = item.needed(name) if needed else item.get(name)
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise item.wrong(name, "must be a string or a list of parts")
    texts: list[str] = []
    for part in item.objects(name):
        kind = part.text("type", "text")
        if kind not in _TEXT_PARTS:
            raise part.wrong("type", f"{kind!r:.40}: this server reads text only", "unsupported_value")
        key = "refusal" if kind == "refusal" else "text"
        part.needed(key)
        texts.append(part.text(key, ""))
    return "\n".join(texts)


def _read_call(item: Fields, names: dict[str, str]) -> dict[str, Any]:
    """A call that the model made before."""
    item.one_of("type", ("function",), "function")
    function = item.within("function")
    if function is None:
        raise item.wrong("function", "is missing", "missing_required_parameter")
    name = function.text("name", "")
    if not NAME.fullmatch(name):
        raise function.wrong("name", "must be 1 to 128 letters, digits and _ . : -")
    call_id = item.text("id", "")
    names[call_id] = name
    arguments = read_arguments(function, "arguments")
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def read_arguments(function: Fields, name: str) -> Mapping[str, Any] | str:
    """A call's arguments: an object, or a string that should hold one as JSON; any other goes on as it is."""
    value = function.get(name)
    if value is None or isinstance(value, dict):
        return value or {}
    if not isinstance(value, str):
        raise function.wrong(name, "must be a JSON object, in a string or as it is")
    try:
        parsed = json.loads(value or "{}")
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, dict) else value


def logprob(value: float | None) -> float:
    """A log-probability as JSON can hold it: what was impossible is -9999, as with OpenAI."""
    return -9999.0 if value is None or not math.isfinite(value) else value
