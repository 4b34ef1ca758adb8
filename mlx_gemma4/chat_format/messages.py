"""Convert what clients send to what chat templates expect: tool calls, their results, declarations, pictures, sounds.

In: messages and tools in OpenAI's form. Out: the same in the form that the given template renders right. No text is
added to messages, and control tokens are no business of this module (see template.py).

Gemma 4's templates expect a call's arguments as an object, not as JSON in a string. Results belong in the message that
made the calls, as `tool_responses` (Google's later templates also find them in messages of the role "tool", but render
those as text only), and so does the answer that follows them: it is the same turn of the model. Text that the model
wrote before its calls is left out once their results are there: templates would render it after the results, as if it
were the answer to them, and then no turn for the answer.

Pictures and sounds are parts of a message's content, each with its own under the name of its type; a template writes a
token for each, in order. It has no place for them in results: there they become a message of the user after these.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..errors import InputError
from .template import Message

MEDIA = {"image": "a picture", "audio": "a sound", "video": "a video"}  # types of parts that are no text


def for_template(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    template: str | None,
    takes: Collection[str] = (),
) -> tuple[list[Message], list[Mapping[str, Any]]]:
    """Return messages and tools in the form for `encode_chat`.

    Args:
        messages: as in OpenAI's chat completions; what is not of that form is left for the template to refuse.
        tools: functions, each in `{"type": "function", "function": {...}}` or by itself.
        template: the model's chat template.
        takes: those of MEDIA that the model takes.

    Raises:
        InputError: a message has parts that are not text and that the model does not take.
    """
    declared = [tool if isinstance(tool.get("function"), Mapping) else {"function": tool} for tool in tools]
    if not all(isinstance(message, Mapping) for message in messages):
        return list(messages), declared  # an error, which encode_chat reports
    for i, message in enumerate(messages):
        _check_parts(message, i + 1, takes)
    known = [_with_objects(message) for message in _after_results(messages)]
    if "tool_responses" in (template or ""):
        return _with_responses(known), declared
    return _with_names(known), declared


def tool_result(call_id: str, name: str, content: Any) -> dict[str, Any]:
    """Return the message that answers a call. Content other than a string is written as JSON.

    >>> tool_result("call_1", "add", {"sum": 3})["content"]
    '{"sum": 3}'
    """
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return {"role": "tool", "tool_call_id": call_id, "name": name, "content": text}


def media_parts(messages: Sequence[Message]) -> list[Mapping[str, Any]]:
    """Return the pictures and sounds of messages from `for_template`, in the order in which templates write them."""
    return [part for message in messages for part in _parts(message) if part.get("type") in MEDIA]


def _parts(message: Message) -> list[Mapping[str, Any]]:
    content = message.get("content") if isinstance(message, Mapping) else None
    return [part for part in content if isinstance(part, Mapping)] if isinstance(content, list | tuple) else []


def _check_parts(message: Message, number: int, takes: Collection[str]) -> None:
    """Refuse what is neither text nor taken: a template would write a token for it that the model has no input for."""
    content = message.get("content")
    for part in content if isinstance(content, list | tuple) else ():
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind in MEDIA and "pieces" in part:  # as a session has saved it
            continue
        if kind in MEDIA and not takes:
            raise InputError(
                f"message {number}: has {MEDIA[kind]}, and the mmproj file that the model sees and hears with is not "
                "loaded; give it with --mmproj FILE"
            )
        if kind in MEDIA and kind not in takes:
            taken = ", ".join(sorted(takes))
            raise InputError(f"message {number}: has {MEDIA[kind]}, and this model takes none, only: text, {taken}")
        if kind != "text" and kind not in MEDIA:
            raise InputError(f"message {number}: has a part of type {kind!r:.40}; only text can be read")


def _after_results(messages: Sequence[Message]) -> list[Message]:
    """Move pictures and sounds of tools' results into a user's message after those."""
    moved: list[Message] = []
    found: list[Mapping[str, Any]] = []
    for message in messages:
        if message.get("role") != "tool" and found:
            moved.append({"role": "user", "content": found})
            found = []
        seen = media_parts([message]) if message.get("role") == "tool" else []
        if seen:
            found = [*found, *seen]
            message = {**message, "content": [part for part in _parts(message) if part.get("type") not in MEDIA]}
        moved.append(message)
    return [*moved, {"role": "user", "content": found}] if found else moved


def _with_objects(message: Message) -> Message:
    """Turn the arguments of a message's calls into objects."""
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
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
        if not isinstance(arguments, dict):
            arguments = {"arguments": arguments}
    return {**call, "function": {**function, "arguments": arguments}}


def _with_responses(messages: list[Message]) -> list[Message]:
    """Move results, and the answer after them, into the message whose calls they answer, without text before these."""
    moved: list[Message] = []
    for message in messages:
        last = moved[-1] if moved else {}
        calls, responses = last.get("tool_calls"), last.get("tool_responses")
        if message.get("role") == "tool" and calls and not (responses and last.get("content")):
            response = {"name": _name(message, calls, len(responses or ())), "response": _plain(message.get("content"))}
            moved[-1] = {**last, "content": "", "tool_responses": [*(responses or ()), response]}
        elif message.get("role") == "assistant" and responses and not message.get("tool_calls"):
            moved[-1] = {**last, "content": message.get("content")}
        else:
            moved.append(message)
    return moved


def _with_names(messages: list[Message]) -> list[Message]:
    """Give each result the name of its function."""
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
    """Return the name of a result's function: its own `name`, or that of the call with its id, or at its position."""
    wanted = result.get("tool_call_id")
    at = place
    if wanted is not None and not (
        at < len(calls) and _id(calls[at]) == wanted
    ):  # results mostly have their calls' order
        at = next((i for i, call in enumerate(calls) if _id(call) == wanted), place)
    call = calls[at] if at < len(calls) and isinstance(calls[at], Mapping) else {}
    function = call.get("function")
    found = result.get("name") or (function.get("name") if isinstance(function, Mapping) else None)
    return str(found or "unknown")


def _id(call: Any) -> Any:
    return call.get("id") if isinstance(call, Mapping) else None


def _plain(content: Any) -> Any:
    """Join a result's parts, and parse JSON objects and lists, for which templates have a form."""
    if isinstance(content, list | tuple):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    if isinstance(content, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(content)
            return value if isinstance(value, dict | list) else content
    return content
