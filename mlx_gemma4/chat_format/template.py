"""Render a conversation with the chat template that a model's file carries, as text or as token ids.

In: messages ({"role", "content"}, as OpenAI and transformers have them) and a Jinja template.
Out: the prompt as text (`render_chat`) or as ids (`encode_chat`). Replies are read elsewhere (replies.py).

Templates are untrusted code: they run in a process of their own (renderer.py), bounded in time and memory, and their
errors become InputErrors. Messages are untrusted text: a control token spelled in a message stays text, whatever the
template does to it. `encode_chat` renders with a stand-in, a rare character, for each character of a message that a
control token may begin with ("<"). So the control tokens found in the result are the template's own; the text between
them gets its characters back. A template may search a message for a control token, as Gemma 4's does to drop old
thinking: the strings that it compares with or passes to a message's methods are written with stand-ins too, and are
found. No operation turns a stand-in back.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from ..errors import InputError
from ..tokens.tokenizer import Tokenizer
from .renderer import render

log = logging.getLogger("mlx_gemma4")

Message = Mapping[str, Any]

# For files without a template: turns alone, as in Gemma 3's own template, where the system's message is part of the
# first user's turn, and as in Gemma 4's, where it has its own.
_PLAIN_3 = """\
{% macro text(content) -%}
{% if content is string %}{{ content | trim }}{% else %}
{%- for part in content or [] %}
{%- if part['type'] in ['image', 'audio', 'video'] %}{{ '<|' ~ part['type'] ~ '|>' }}
{%- else %}{{ part['text'] | trim }}{% endif %}
{%- endfor %}
{%- endif %}
{%- endmacro %}
{{ bos_token }}
{%- set ns = namespace(system='') %}
{%- for message in messages %}
{%- if message['role'] == 'system' and not own_turn %}{% set ns.system = text(message['content']) ~ '\\n\\n' %}
{%- else %}
{{- '<start_of_turn>' }}{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{{ ns.system }}{{ text(message['content']) }}{{ '<end_of_turn>\\n' }}
{%- set ns.system = '' %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
_PLAIN = "{% set own_turn = true %}" + _PLAIN_3.replace("<start_of_turn>", "<|turn>").replace(
    "<end_of_turn>", "<turn|>"
)


def render_chat(
    template: str | None,
    messages: Sequence[Message],
    *,
    bos_token: str = "<bos>",
    eos_token: str = "<eos>",
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool | None = None,
    **variables: Any,
) -> str:
    """Return the prompt as transformers' `apply_chat_template(tokenize=False)` renders it.

    Args:
        template: Jinja source; None: plain Gemma 4 turns.
        tools: functions as JSON schemas.
        enable_thinking: None: the template's default.
        variables: more names for the template.

    Raises:
        InputError: the template fails, or refuses the messages.
    """
    names = {"bos_token": bos_token, "eos_token": eos_token, "add_generation_prompt": add_generation_prompt}
    return _render(template, names, enable_thinking, _given(messages, tools, variables), {})


def _given(messages: Sequence[Message], tools: Any, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return what comes from users, by the names that templates use."""
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"message {i + 1} isn't an object with a role and content: {message!r:.60}")
    return {"messages": [_with_reasoning(message) for message in messages], "tools": tools, **variables}


def _with_reasoning(message: Message) -> Message:
    """Give a message its reasoning under all names that templates use, as transformers does."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _render(
    template: str | None, names: dict[str, Any], think: bool | None, given: Mapping[str, Any], there: Mapping[int, str]
) -> str:
    """Render with `names` as they are, and with copies of `given` in which stand-ins are written as `there` says."""
    if think is not None:
        names["enable_thinking"] = think
    try:
        copies = {name: _copied(value, there) for name, value in given.items()}
    except RecursionError as error:
        raise InputError("the messages are nested too deeply") from error
    return render(_PLAIN if template is None else template, {**names, **copies}, there)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool | None = None,
    **variables: Any,
) -> list[int]:
    """Return the prompt's ids, BOS included. Control tokens spelled in messages or tools are encoded as text.

    Arguments and errors are those of `render_chat`; the template is the tokenizer's.
    """
    template = tokenizer.chat_template
    bos = tokenizer.decode([tokenizer.bos_id], skip_special=False)
    names = {"bos_token": bos, "eos_token": "<eos>", "add_generation_prompt": add_generation_prompt}
    if template is None:
        _tell_of_no_template()
        template = _PLAIN_3 if tokenizer.token_id("<|turn>") is None else _PLAIN
    given = _given(messages, tools, variables)
    there, back = _stand_ins(tokenizer, given, template)
    text = _render(template, names, enable_thinking, given, there)
    ids: list[int] = []
    for part in tokenizer.split_special(text):
        ids += [part] if isinstance(part, int) else tokenizer.encode(part.translate(back), add_bos=False)
    return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


@cache
def _tell_of_no_template() -> None:
    log.warning(
        "This model's file has no chat template, as a base model's: it is asked in Gemma's turns; to have it continue "
        "a text as it stands, use --raw (from Python, lm.encode_prompt(text, raw=True))"
    )


def _copied(value: Any, there: Mapping[int, str]) -> Any:
    """Copy `value` with stand-ins in all its strings, keys included, and of JSON's types only.

    Other objects could have methods that a template must not reach: the name of their type replaces them.
    """
    if isinstance(value, str):
        return str(str.translate(value, there))
    if isinstance(value, Mapping):
        return {_copied(key, there): _copied(x, there) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(_copied(x, there) for x in value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    return f"({type(value).__name__})"


def _stand_ins(tokenizer: Tokenizer, given: Any, template: str) -> tuple[dict[int, str], dict[int, str]]:
    """Choose a character that occurs nowhere in what is rendered for each first character of a control token.

    They are CJK ideographs: printable, so that repr() leaves them alone, and without upper case. Returns tables for
    str.translate, there and back.
    """
    used, left = set(template), [given]
    while left:
        item = left.pop()
        if isinstance(item, str):
            used.update(item)
        elif isinstance(item, Mapping):
            left += [*item, *item.values()]
        elif isinstance(item, list | tuple):
            left += item
    free = (c for c in map(chr, range(0x2A6D6, 0x20000, -1)) if c not in used)
    starts = sorted(tokenizer.control_starts)
    stand_ins = list(itertools.islice(free, len(starts)))
    if len(stand_ins) < len(starts):
        raise InputError("the messages use 42,000 ideographs, which leaves none to mark control tokens: send less")
    pairs = list(zip(starts, stand_ins, strict=True))
    return {ord(start): c for start, c in pairs}, {ord(c): start for start, c in pairs}
