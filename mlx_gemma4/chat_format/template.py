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
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import InputError
from ..tokens.tokenizer import Tokenizer

Message = Mapping[str, Any]

_MAX_STEPS = 3_000_000  # loop turns that one rendering may take: a second
_CALL_STEPS = 30  # what a call counts for
_MAX_TEXT = 1 << 24  # characters in one string; four times what the longest context holds


@dataclass
class _Run:
    """One rendering: what is left of its steps, and the stand-ins it uses."""

    steps: int
    stand_ins: str


_run: ContextVar[_Run] = ContextVar("run")

# For files without a template: turns alone, as in Gemma 4's own template and in Gemma 3's, where what the system
# says stands in the first user's turn.
_TEXT = """\
{% macro text(content) -%}
{% if content is string %}{{ content | trim }}{% else %}
{%- for part in content or [] %}{{ part['text'] | trim }}{% endfor %}
{%- endif %}
{%- endmacro %}
{{ bos_token }}"""
_PLAIN = (
    _TEXT
    + """{%- for message in messages %}
{{- '<|turn>' }}{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{{ text(message['content']) }}{{ '<turn|>' }}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}"""
)
_PLAIN_3 = (
    _TEXT
    + """{%- set ns = namespace(system='') %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{% set ns.system = text(message['content']) ~ '\\n\\n' %}
{%- else %}
{{- '<start_of_turn>' }}{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{{ ns.system }}{{ text(message['content']) }}{{ '<end_of_turn>\\n' }}
{%- set ns.system = '' %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
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
    """The prompt as transformers' `apply_chat_template(tokenize=False)` renders it.

    template: Jinja source; None gives plain Gemma 4 turns. tools: functions as JSON schemas. enable_thinking: None
    leaves it to the template. variables: more names for the template. Raises InputError.
    """
    names = {"bos_token": bos_token, "eos_token": eos_token, "add_generation_prompt": add_generation_prompt}
    if enable_thinking is not None:
        names["enable_thinking"] = enable_thinking
    return _render(template, names, _given(messages, tools, variables), {})


def _given(messages: Sequence[Message], tools: Any, variables: Mapping[str, Any]) -> dict[str, Any]:
    """What comes from users, by the names that templates have for it."""
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"message {i + 1} isn't an object with a role and content: {message!r:.60}")
    return {"messages": [_with_reasoning(message) for message in messages], "tools": tools, **variables}


def _with_reasoning(message: Message) -> Message:
    """The message with its reasoning under all names that templates know, as transformers gives it."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _render(template: str | None, names: Mapping[str, Any], given: Mapping[str, Any], there: Mapping[int, str]) -> str:
    """The template with `names` as they are and plain copies of `given`, written with stand-ins (see _Typed)."""
    token = _run.set(_Run(_MAX_STEPS, "".join(there.values())))
    try:
        copies = {name: _typed(value, there) for name, value in given.items()}
        return _compile(_PLAIN if template is None else template).render({**names, **copies})
    except RecursionError as error:
        raise InputError("the messages are nested too deeply, or the model's chat template is") from error
    except InputError:
        raise
    except Exception as error:  # a template is a program: it may raise anything
        raise InputError(f"the model's chat template failed: {error or type(error).__name__}") from error
    finally:
        _run.reset(token)


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
    template = tokenizer.chat_template
    bos = tokenizer.decode([tokenizer.bos_id], skip_special=False)
    names = {"bos_token": bos, "eos_token": "<eos>", "add_generation_prompt": add_generation_prompt}
    if template is None and tokenizer.token_id("<|turn>") is None:
        template = _PLAIN_3
    if enable_thinking is not None:
        names["enable_thinking"] = enable_thinking
    given = _given(messages, tools, variables)
    there, back = _stand_ins(tokenizer, given, template or _PLAIN)
    text = _render(template, names, given, there)
    ids: list[int] = []
    for part in tokenizer.split_special(text):
        ids += [part] if isinstance(part, int) else tokenizer.encode(part.translate(back), add_bos=False)
    return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


class _Typed(str):
    """Text from a message, written with stand-ins (`_there`: ordinal -> stand-in).

    A template may look in it for a control token, as Gemma 4's does to drop old thinking. So the strings that
    its methods are given are written with stand-ins too, and are found. All results are written with stand-ins:
    where this class gets lost on the way (as in "" + text) nothing becomes unsafe.
    """

    _there: Mapping[int, str]  # templates can't reach a name with an underscore

    def __new__(cls, text: str, there: Mapping[int, str] = MappingProxyType({})) -> _Typed:
        made = super().__new__(cls, text.translate(there))
        made._there = there
        return made

    def __iter__(self) -> Iterator[str]:
        return (_Typed(c, self._there) for c in super().__iter__())

    def __getitem__(self, key: Any) -> str:
        return _Typed(super().__getitem__(key), self._there)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key.translate(self._there)) if isinstance(key, str) else False

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other.translate(self._there) if isinstance(other, str) else other)

    __hash__ = str.__hash__


def _method(name: str) -> Callable[..., Any]:
    plain = getattr(str, name)

    @functools.wraps(plain)
    def method(self: _Typed, *args: Any, **kwargs: Any) -> Any:
        there = self._there
        given = [_typed(x, there) for x in args]
        return _typed(plain(self, *given, **{name: _typed(x, there) for name, x in kwargs.items()}), there)

    return method


_SEARCHES = ["count", "find", "index", "rfind", "rindex", "startswith", "endswith", "removeprefix", "removesuffix"]
_PARTS = ["lstrip", "partition", "replace", "rpartition", "rsplit", "rstrip", "split", "splitlines", "strip"]
for _name in _SEARCHES + _PARTS:
    setattr(_Typed, _name, _method(_name))


def _typed(value: Any, there: Mapping[int, str]) -> Any:
    """A copy of `value` with all strings in it, keys too, written with stand-ins, and of JSON's types only.

    Other objects could have methods that a template must not reach: the name of their type goes in their place.
    """
    if isinstance(value, str):
        return _Typed(value, there)
    if isinstance(value, Mapping):
        return {_typed(key, there): _typed(x, there) for key, x in value.items()}
    if isinstance(value, list):
        return [_typed(x, there) for x in value]
    if isinstance(value, tuple):
        return tuple(_typed(x, there) for x in value)
    if value is None or isinstance(value, bool | int | float):
        return value
    return f"({type(value).__name__})"


def _strings(value: Any) -> Iterator[str]:
    """All strings in nested lists and objects."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            left += [*item, *item.values()]
        elif isinstance(item, list | tuple):
            left += item


def _stand_ins(tokenizer: Tokenizer, given: Any, template: str) -> tuple[dict[int, str], dict[int, str]]:
    """A rare character, met nowhere in what is rendered, for each first character of a control token.

    They come from a block of CJK ideographs: printable, so that repr() leaves them alone, and without upper case.
    Returns tables for str.translate, there and back.
    """
    used = set(template).union(*_strings(given))
    free = (c for c in range(0x2A6D6, 0x20000, -1) if chr(c) not in used)
    there: dict[int, str] = {}
    for first in sorted(tokenizer.control_starts):
        stand_in = next(free, None)
        if stand_in is None:
            raise InputError("the messages use 42,000 ideographs, which leaves none to mark control tokens: send less")
        there[ord(first)] = chr(stand_in)
    return there, {ord(stand_in): chr(c) for c, stand_in in there.items()}


class _Generation(jinja2.ext.Extension):
    """The block {% generation %}, which marks a reply for training: what is in it."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, and with bounds on steps and on the length of strings."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation], finalize=_bounded
        )
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
        _spend(_CALL_STEPS)
        # A macro may be given any number, as the bounds in a tool's schema are.
        if not isinstance(__obj, Macro) and any(isinstance(x, int) and abs(x) > _MAX_TEXT for x in args):
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


def _spend(steps: int = 1) -> None:
    run = _run.get()
    run.steps -= steps
    if run.steps < 0:
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
    """As transformers has it: no HTML escapes. Stand-ins stay as they are."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if ensure_ascii:
        text = re.sub(f"[^\\x00-\\x7f{_run.get().stand_ins}]", lambda c: json.dumps(c[0])[1:-1], text)
    return text


def _raise_exception(message: str) -> None:
    raise InputError(f"the model's chat template refuses these messages: {message}")


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    return _Sandbox().from_string(source)
