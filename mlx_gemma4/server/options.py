"""Fields that several endpoints share become `ReplyOptions` and messages.

In: checked fields of a request. Out: options, and messages with their text as one string each, as chat templates have
them. What only the model or other fields show to be wrong is an ApiError that names its field.
"""

import asyncio
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..conversation.language_model import LanguageModel
from ..conversation.reply import ReplyOptions, prompt_ids
from ..generation.sampling import Sampling
from . import fields
from .engine import Engine
from .fields import wrong

_LEAST = {"top_p": 1e-9, "top_k": 0, "repetition_penalty": 1e-6}  # a top_p of 0 keeps one token


def read_sampling(body: fields.SamplingRequest, lm: LanguageModel) -> Sampling:
    """The file's recommendation with what the request says."""
    base, vocab = lm.sampling, lm.config.vocab
    names = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
    given = body.model_dump(include=names, exclude_none=True)
    bias: dict[int, float] = {}
    for key, value in (body.logit_bias or {}).items():
        if not re.fullmatch(r"0|[1-9]\d{0,8}", key, re.ASCII) or int(key) >= vocab:
            raise wrong("logit_bias", f"has the key {key!r:.40}: keys are ids of tokens, 0 to {vocab - 1}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
            raise wrong(f"logit_bias.{key}", "must be a number from -100 to 100")
        bias[int(key)] = float(value)
    return replace(
        base,
        **{name: max(value, _LEAST.get(name, value)) for name, value in given.items()},
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias=bias,
        seed=None if body.seed is None else body.seed % 2**63,
    )


def read_thinking(body: fields.ConversationRequest, effort: fields.Effort | None) -> bool | None:
    """Whether to think first; None leaves it to the chat template."""
    variables = body.chat_template_kwargs
    if variables and variables.enable_thinking is not None:
        return variables.enable_thinking
    return None if effort is None else effort not in ("none", "minimal")


def read_tools(tools: Mapping[str, fields.Function]) -> tuple[dict[str, Any], ...]:
    """Functions that the model may call, as chat templates want them. `tools`: by their paths in the request."""
    made: dict[str, dict[str, Any]] = {}
    for path, tool in tools.items():
        if tool.name in made:
            raise wrong(f"{path}.name", f"{tool.name!r} is the name of another tool too")
        parameters = {"type": "object", "properties": {}} if tool.parameters is None else tool.parameters
        function = {"name": tool.name, "description": tool.description or "", "parameters": parameters}
        made[tool.name] = {"type": "function", "function": function}
    return tuple(made.values())


def read_tool_choice(
    choice: fields.ToolChoice | dict[str, Any] | None, tools: tuple[dict[str, Any], ...], within: str = ""
) -> str:
    """ "auto", "none", "required" or the name of a function. `within`: the field of `choice` that has the name."""
    if isinstance(choice, dict):
        holder = choice.get(within) if within else choice
        name = holder.get("name") if isinstance(holder, dict) else None
        if name not in [tool["function"]["name"] for tool in tools]:
            raise wrong(".".join(filter(None, ("tool_choice", within, "name"))), f"{name!r:.60} is none of the tools")
        return str(name)
    if choice == "required" and not tools:
        raise wrong("tool_choice", "is required, but there are no tools")
    return choice or "auto"


def read_format(wanted: fields.Format | None, path: str = "response_format") -> dict[str, Any]:
    """The form of the reply: {}, or one of `schema`, `regex` and `grammar` of ReplyOptions."""
    if wanted is None or wanted.type == "text":
        return {}
    if wanted.type == "json_object":
        return {"schema": {"type": "object"}}
    holder = wanted.json_schema or wanted
    name, path, value = {
        "json_schema": ("schema", path + ".json_schema" * (holder is not wanted), holder.schema_),
        "regex": ("regex", path, wanted.regex or None),
        "lark": ("grammar", path, wanted.grammar or None),
    }[wanted.type]
    if value is None:
        raise wrong(f"{path}.{name}", "is missing", "missing_required_parameter")
    return {name: value}


# Messages


async def fitted(engine: Engine, messages: list[dict[str, Any]], options: ReplyOptions) -> list[int]:
    """Return a conversation's prompt without its oldest turns, so that it and a reply fit into the context.

    System messages and the last turn stay; a turn begins with a user's message. A quarter of the context is kept for
    the reply, or less if it is to be shorter.
    """
    context = engine.lm.config.context
    most = context - min(options.max_tokens or context, context // 4)
    told = [message for message in messages if message["role"] == "system"]
    said = [message for message in messages if message["role"] != "system"]

    def from_turn(start: int) -> list[int]:
        return prompt_ids(engine.lm, told + said[start:], options)

    def find() -> list[int]:
        whole = prompt_ids(engine.lm, messages, options)
        turns = [i for i, message in enumerate(said) if message["role"] == "user" and i]
        if len(whole) <= most or not turns:
            return whole
        return from_turn(turns[bisect_left(turns[:-1], True, key=lambda i: len(from_turn(i)) <= most)])

    return await asyncio.to_thread(find)


def read_text(content: str | Sequence[fields.TextPart | fields.RefusalPart] | None) -> str:
    """A message's text, from a string or a list of text parts."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.refusal if isinstance(part, fields.RefusalPart) else part.text for part in content)


def assistant_message(text: str, thinking: str | None = None, calls: list[dict[str, Any]] | None = None) -> Any:
    """A message that the model wrote."""
    made: dict[str, Any] = {"role": "assistant", "content": text}
    return made | ({"reasoning_content": thinking} if thinking else {}) | ({"tool_calls": calls} if calls else {})


def tool_call(id: str | None, name: str, arguments: fields.Arguments) -> dict[str, Any]:
    """A call that the model made. `for_template` reads JSON in a string."""
    function = {"name": name, "arguments": {} if arguments is None else arguments}
    return {"id": id or "", "type": "function", "function": function}
