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
_MOST_BIAS = 20_000


def read_sampling(body: fields.SamplingRequest, lm: LanguageModel) -> Sampling:
    """The file's recommendation with what the request says."""
    base, vocab = lm.sampling, lm.config.vocab
    names = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
    given = body.model_dump(include=names, exclude_none=True)
    bias: dict[int, float] = {}
    if len(body.logit_bias or ()) > _MOST_BIAS:
        raise wrong("logit_bias", f"has over {_MOST_BIAS} tokens")
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
        seed=None if body.seed in (None, -1) else body.seed % 2**63,  # -1: any, as llama.cpp and others have it
    )


def read_thinking(body: fields.ConversationRequest, engine: Engine) -> dict[str, Any]:
    """`think` and `think_budget` of ReplyOptions, each by the first field that says so; None: the template's."""
    variables = body.chat_template_kwargs or fields.TemplateVariables()
    reasoning, thinking = body.reasoning or fields.Reasoning(), body.thinking
    effort = reasoning.effort or body.reasoning_effort
    bound = _first(thinking and thinking.budget_tokens, reasoning.max_tokens)
    switches = (
        variables.enable_thinking,
        variables.thinking,
        body.enable_thinking,
        reasoning.enabled,
        None if effort is None else effort not in ("none", "minimal"),
        thinking and thinking.type in ("enabled", "adaptive"),
        None if bound is None else bound != 0,
    )
    budget = _first(bound, body.thinking_budget, variables.thinking_budget, engine.settings.think_budget)
    return {"think": _first(*switches), "think_budget": budget}


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def read_tools(given: Mapping[str, fields.Function | None], lm: LanguageModel) -> tuple[dict[str, Any], ...]:
    """Functions that the model may call, as chat templates want them. `given`: by their paths in the request."""
    made: dict[str, dict[str, Any]] = {}
    tools = {path: tool for path, tool in given.items() if tool}
    if tools and (lm.tokenizer.token_id("<|tool_call>") is None or "tools" not in (lm.tokenizer.chat_template or "")):
        raise wrong("tools", "can't be used: this model can't call any", "unsupported_value")
    for path, tool in tools.items():
        if tool.name in made:
            raise wrong(f"{path}.name", f"{tool.name!r} is the name of another tool too")
        parameters = {"type": "object", "properties": {}} if tool.parameters is None else tool.parameters
        function = {"name": tool.name, "description": tool.description or "", "parameters": parameters}
        made[tool.name] = {"type": "function", "function": function | ({"strict": True} if tool.strict else {})}
    return tuple(made.values())


def read_tool_choice(
    choice: str | dict[str, Any] | None, tools: tuple[dict[str, Any], ...]
) -> tuple[str, tuple[dict[str, Any], ...]]:
    """ "auto", "none", "required" or the name of a function, and the tools that may be called.

    OpenAI's chats have a function's name or the tools that are allowed in an object of their own, its responses don't;
    both are read everywhere.
    """
    within = ""
    if isinstance(choice, dict):
        kind = choice.get("type")
        within = next(
            (name for name in ("function", "custom", "allowed_tools") if isinstance(choice.get(name), dict)), ""
        )
        inner = choice[within] if within else choice
        if kind == "allowed_tools":
            allowed = inner.get("tools")
            names = [_tool_name(tool) for tool in allowed] if isinstance(allowed, list) else []
            tools = tuple(tool for tool in tools if tool["function"]["name"] in names)
            choice = inner.get("mode") or "auto"
            if choice not in ("auto", "required") or not names:
                raise wrong("tool_choice", "must have a mode, auto or required, and a list of tools")
        elif kind in ("auto", "none", "required", "any"):
            choice = kind
        else:
            name = inner.get("name")
            if name not in [tool["function"]["name"] for tool in tools]:
                path = ".".join(filter(None, ("tool_choice", within or ("function" if kind is None else ""), "name")))
                raise wrong(path, f"{name!r:.60} is none of the tools")
            return str(name), tools
    choice = "required" if choice == "any" else choice or "auto"
    if choice == "required" and not tools:
        raise wrong("tool_choice", "is required, but there are no tools")
    return str(choice), tools


def _tool_name(tool: Any) -> Any:
    function = tool.get("function", tool) if isinstance(tool, dict) else {}
    return function.get("name") if isinstance(function, dict) else None


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


def read_text(content: str | Sequence[fields.TextPart | fields.RefusalPart | fields.MediaPart] | None) -> str:
    """A message's text, from a string or a list of parts."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(filter(None, map(fields.text_of, content)))


def assistant_message(text: str, thinking: str | None = None, calls: list[dict[str, Any]] | None = None) -> Any:
    """A message that the model wrote."""
    made: dict[str, Any] = {"role": "assistant", "content": text}
    return made | ({"reasoning_content": thinking} if thinking else {}) | ({"tool_calls": calls} if calls else {})


def tool_call(id: str | None, name: str, arguments: fields.Arguments) -> dict[str, Any]:
    """A call that the model made. `for_template` reads JSON in a string."""
    function = {"name": name, "arguments": {} if arguments is None else arguments}
    return {"id": id or "", "type": "function", "function": function}
