"""What clients send becomes what chat templates know: tool calls, their results, declarations.

In: messages and tools in OpenAI's form. Out: the same, as the template at hand renders them right. Nothing is added to
what anyone said, and text stays text: control tokens are no business of this module (see prompts.py).

Gemma 4's templates want a call's arguments as an object, not as JSON in a string. Results have their place in the
message that made the calls, as `tool_responses` (Google's later templates find them in messages of the role "tool" too,
but render those as text only), and so has the answer that follows them: it is the same turn of the model. What the
model said before its calls is left out once their results are there: templates render it after the results, as if it
were the answer to them, and then no turn for the answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError
from .template import Message

_DEFAULT_NAME = "unknown"  # of a result whose call nobody can tell


def for_template(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], template: str | None
) -> tuple[list[Message], list[Mapping[str, Any]]]:
    """Messages and tools as `encode_chat` is to be given them.

    Args:
        messages: as in OpenAI's chat completions; what isn't of that form is left for the template to refuse.
        tools: functions, each in `{"type": "function", "function": {...}}` or by itself.
        template: the model's chat template.

    Raises:
        InputError: a message has parts that are no text.
    """
    declared = [tool if isinstance(tool.get("function"), Mapping) else {"function": tool} for tool in tools]
    if not all(isinstance(message, Mapping) for message in messages):
        return list(messages), declared  # which is an error, and encode_chat's to tell
    for i, message in enumerate(messages):
        _check_parts(message, i + 1)
    known = [_with_objects(message) for message in messages]
    if "tool_responses" in (template or ""):
        return _with_responses(_without_words(known)), declared
    return _with_names(known), declared


def tool_result(call_id: str, name: str, content: Any) -> dict[str, Any]:
    """The message that answers a call. What is no string is written as JSON.

    >>> tool_result("call_1", "add", {"sum": 3})["content"]
    '{"sum": 3}'
    """
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return {"role": "tool", "tool_call_id": call_id, "name": name, "content": text}


def _check_parts(message: Message, number: int) -> None:
    """Refuse images and the like: a template would leave a token for them that stands for nothing here."""
    content = message.get("content")
    for part in content if isinstance(content, list | tuple) else ():
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise InputError(f"message {number}: has a part of type {kind!r:.40}; only text can be read")


def _with_objects(message: Message) -> Message:
    """The message with the arguments of its calls as objects."""
    calls = message.get("tool_calls")
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        return message
    return {**message, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: Any) -> Any:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = {"arguments": arguments}
        if not isinstance(arguments, dict):
            arguments = {"arguments": arguments}
    return {**call, "function": {**function, "arguments": arguments}}


def _with_responses(messages: list[Message]) -> list[Message]:
    """Results, and the answer after them, moved into the message whose calls they answer."""
    moved: list[Message] = []
    for message in messages:
        last = moved[-1] if moved else {}
        calls, responses = last.get("tool_calls"), last.get("tool_responses")
        if message.get("role") == "tool" and calls and not last.get("content"):
            response = {"name": _name(message, calls, len(responses or ())), "response": _plain(message.get("content"))}
            moved[-1] = {**last, "tool_responses": [*(responses or ()), response]}
        elif message.get("role") == "assistant" and responses and not message.get("tool_calls"):
            moved[-1] = {**last, "content": message.get("content")}
        else:
            moved.append(message)
    return moved


def _without_words(messages: list[Message]) -> list[Message]:
    """What is said before calls left out where their results follow."""
    following = [*messages[1:], {}]
    return [
        {**message, "content": ""} if message.get("tool_calls") and after.get("role") == "tool" else message
        for message, after in zip(messages, following, strict=True)
    ]


def _with_names(messages: list[Message]) -> list[Message]:
    """Each result with the name of the function that gave it."""
    calls: Sequence[Any] = ()
    place = 0
    named: list[Message] = []
    for message in messages:
        if message.get("role") == "tool":
            message = {**message, "name": _name(message, calls, place)}
            place += 1
        else:
            calls, place = message.get("tool_calls") or (), 0
        named.append(message)
    return named


def _name(result: Message, calls: Sequence[Any], place: int) -> str:
    """The function that gave a result: the result says it, or the call with its id, or the call at its place."""
    ids = [call.get("id") if isinstance(call, Mapping) else None for call in calls]
    wanted = result.get("tool_call_id")
    at = ids.index(wanted) if wanted is not None and wanted in ids else place
    call = calls[at] if at < len(calls) and isinstance(calls[at], Mapping) else {}
    function = call.get("function")
    found = result.get("name") or (function.get("name") if isinstance(function, Mapping) else None)
    return str(found or _DEFAULT_NAME)


def _plain(content: Any) -> Any:
    """A result's text where it is in parts; objects and lists of JSON as such, for templates have a form for them."""
    if isinstance(content, list | tuple):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    if isinstance(content, str):
        try:
            value = json.loads(content)
        except ValueError:
            return content
        return value if isinstance(value, dict | list) else content
    return content
