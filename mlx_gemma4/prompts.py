"""A conversation becomes the ids that a model reads, by the chat template that its file carries.

In: messages ({"role", "content"}, as OpenAI and transformers have them) and a Jinja template.
Out: the prompt as text (`render_chat`) or as ids (`encode_chat`).

Templates are strangers' code: they run in Jinja's immutable sandbox, within a budget of steps, and an error of
theirs is an InputError. Messages are strangers' text: a control token spelled in a message stays text, whatever
the template does to it. To this end `encode_chat` renders with stand-ins for the characters that control tokens
begin with ("<"), so that the control tokens found in the result are the template's own; then each stretch of
text between them gets its characters back. Reading a reply (thinking, tool calls) is not done here.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import InputError
from .tokenizer import Tokenizer

Message = Mapping[str, Any]

_MAX_STEPS = 1_000_000  # loop turns and calls that one rendering may take: about a second
_MAX_TEXT = 1 << 24  # characters in one string; four times what the longest context holds
_steps: ContextVar[list[int]] = ContextVar("steps")  # what is left of them, one entry

# For files without a template. Turns as in Gemma 4's own, without tools and thinking.
_PLAIN = """\
{{ bos_token }}
{%- for message in messages %}
{{- start }}{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{% if message['content'] is string %}
{{- message['content'] | trim }}
{%- else %}
{%- for part in message['content'] %}{{ part['text'] | trim }}{% endfor %}
{%- endif %}
{{- end }}
{% endfor %}
{% if add_generation_prompt %}
{{- start }}model
{% endif %}"""


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
    """The prompt as transformers' `apply_chat_template(tokenize=False)` renders it.

    template: Jinja source; None gives plain Gemma 4 turns. tools: functions as JSON schemas. enable_thinking: None
    leaves it to the template. variables: more names for the template. Raises InputError.
    """
    values = {
        "messages": messages,
        "tools": tools,
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_generation_prompt": add_generation_prompt,
        "start": "<|turn>",
        "end": "<turn|>",
        **variables,
    }
    if enable_thinking is not None:
        values["enable_thinking"] = enable_thinking
    token = _steps.set([_MAX_STEPS])
    try:
        return _compile(_PLAIN if template is None else template).render(values)
    except InputError:
        raise
    except Exception as error:  # a template is a program: it may raise anything
        raise InputError(f"the model's chat template failed: {error or type(error).__name__}") from error
    finally:
        _steps.reset(token)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool | None = None,
    **variables: Any,
) -> list[int]:
    """Ids of the prompt, with BOS. What looks like a control token in messages or tools is encoded as text."""
    given = [list(messages), tools, *variables.values()]
    try:
        there, back = _stand_ins(tokenizer, given, tokenizer.chat_template or "")
        messages, tools, *values = (_typed(value, there) for value in given)
    except RecursionError as error:
        raise InputError("the messages are nested too deeply") from error
    variables = dict(zip(variables, values, strict=True))
    if tokenizer.chat_template is None and tokenizer.token_id("<start_of_turn>") is not None:
        variables = {"start": "<start_of_turn>", "end": "<end_of_turn>", **variables}  # Gemma 3 and older
    text = render_chat(
        tokenizer.chat_template,
        messages,
        bos_token=tokenizer.decode([tokenizer.bos_id], skip_special=False),
        add_generation_prompt=add_generation_prompt,
        tools=tools,
        enable_thinking=enable_thinking,
        **variables,
    )
    ids: list[int] = []
    for part in tokenizer.split_special(text):
        ids += [part] if isinstance(part, int) else tokenizer.encode(part.translate(back), add_bos=False)
    return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


class _Typed(str):
    """Text from a message, written with stand-ins (`there`: ordinal -> stand-in).

    A template may look in it for a control token, as Gemma 4's does to drop old thinking. So the strings that
    its methods are given are written with stand-ins too, and are found. All results are written with stand-ins:
    where this class gets lost on the way (as in "" + text) nothing becomes unsafe.
    """

    there: dict[int, str]

    def __new__(cls, text: str, there: dict[int, str]) -> _Typed:
        made = super().__new__(cls, text.translate(there))
        made.there = there
        return made

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key.translate(self.there)) if isinstance(key, str) else False

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other.translate(self.there) if isinstance(other, str) else other)

    __hash__ = str.__hash__


def _method(name: str) -> Callable[..., Any]:
    plain = getattr(str, name)

    @functools.wraps(plain)
    def method(self: _Typed, *args: Any, **kwargs: Any) -> Any:
        there = self.there
        given = [_typed(x, there) for x in args]
        return _typed(plain(self, *given, **{name: _typed(x, there) for name, x in kwargs.items()}), there)

    return method


_SEARCHES = ["count", "find", "index", "rfind", "rindex", "startswith", "endswith", "removeprefix", "removesuffix"]
_PARTS = ["lstrip", "partition", "replace", "rpartition", "rsplit", "rstrip", "split", "splitlines", "strip"]
for _name in _SEARCHES + _PARTS:
    setattr(_Typed, _name, _method(_name))


def _typed(value: Any, there: dict[int, str]) -> Any:
    """`value` with all strings in it, keys too, written with stand-ins."""
    if isinstance(value, str):
        return _Typed(value, there)
    if isinstance(value, Mapping):
        return {_typed(key, there): _typed(x, there) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_typed(x, there) for x in value)
    return value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(list(value.items()))
    elif isinstance(value, list | tuple):
        for x in value:
            yield from _strings(x)


def _stand_ins(tokenizer: Tokenizer, given: Any, template: str) -> tuple[dict[int, str], dict[int, str]]:
    """A private-use character, met nowhere in what is rendered, for each first character of a control token.

    Returns tables for str.translate, there and back.
    """
    used = set(template).union(*_strings(given))
    private = (c for block in (range(0xE000, 0xF900), range(0xF0000, 0x10FFFE)) for c in block)
    free = (c for c in private if chr(c) not in used)
    there: dict[int, str] = {}
    for first in sorted(tokenizer.control_starts):
        stand_in = next(free, None)
        if stand_in is None:
            raise InputError("the messages use every private-use character there is: leave some out")
        there[ord(first)] = chr(stand_in)
    return there, {ord(stand_in): chr(c) for c, stand_in in there.items()}


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, and with bounds on steps and on the length of strings."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols], finalize=_bounded)
        self.filters.update(tojson=_tojson, _counted=_counted, _bounded=_bounded)
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        """The syntax tree, with all loops counted and all operands of + and ~ bounded."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = self._filtered(loop.iter, "_counted")
        for add in tree.find_all(jinja2.nodes.Add):
            add.left, add.right = (self._filtered(node, "_bounded") for node in (add.left, add.right))
        for concat in tree.find_all(jinja2.nodes.Concat):
            concat.nodes = [self._filtered(node, "_bounded") for node in concat.nodes]
        return tree

    def _filtered(self, node: jinja2.nodes.Node, name: str) -> jinja2.nodes.Expr:
        made = jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
        made.set_environment(self)
        return made

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # Jinja's names
        _spend()
        if any(isinstance(x, int) and abs(x) > _MAX_TEXT for x in args):
            raise InputError("the model's chat template asks for too much: its code may be broken")
        return _bounded(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [x if isinstance(x, int) else len(x) if hasattr(x, "__len__") else 1 for x in (left, right)]
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "*" and not numbers and sizes[0] * sizes[1] > _MAX_TEXT:
            raise InputError("the model's chat template makes too long a string: its code may be broken")
        if operator == "**" and abs(sizes[1]) > 64:
            raise InputError("the model's chat template makes too large a number: its code may be broken")
        if operator == "%" and isinstance(left, str) and re.search(r"\d{6}|\*", left):
            raise InputError("the model's chat template makes too long a string: its code may be broken")
        return super().call_binop(context, operator, left, right)


def _spend() -> None:
    left = _steps.get()
    left[0] -= 1
    if left[0] < 0:
        raise InputError(f"the model's chat template took over {_MAX_STEPS} steps: its code may be broken")


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _spend()
        yield item


def _bounded(value: Any) -> Any:
    if isinstance(value, str) and len(value) > _MAX_TEXT:
        raise InputError(f"the prompt has a text of over {_MAX_TEXT} characters: leave some out")
    return value


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: no HTML escapes. Private-use characters stay, since they may be stand-ins."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if ensure_ascii:
        text = re.sub("[^\\x00-\\x7f\ue000-\uf8ff\U000f0000-\U0010ffff]", lambda c: json.dumps(c[0])[1:-1], text)
    return text


def _raise_exception(message: str) -> None:
    raise InputError(f"the model's chat template refuses these messages: {message}")


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    return _Sandbox().from_string(source)
