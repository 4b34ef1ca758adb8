"""Render a conversation with the chat template that a model's file carries, as text or as token ids.

In: messages ({"role", "content"}, as OpenAI and transformers have them) and a Jinja template.
Out: the prompt as text (`render_chat`) or as ids (`encode_chat`). Replies are read elsewhere (replies.py).

Templates are untrusted code: they run in Jinja's immutable sandbox, within a budget of steps, and their errors become
InputErrors. Messages are untrusted text: a control token spelled in a message stays text, whatever the template does
to it. `encode_chat` renders with a stand-in, a rare character, for each character of a message that a control token
may begin with ("<"). So the control tokens found in the result are the template's own; the text between them gets its
characters back. A template may search a message for a control token, as Gemma 4's does to drop old thinking: the
strings that it compares with or passes to a message's methods are written with stand-ins too, and are found. No
operation turns a stand-in back.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
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

_MAX_STEPS = 3_000_000  # loop iterations that one rendering may take: a second
_CALL_STEPS = 30  # steps that a call counts as
_MAX_TEXT = 1 << 24  # characters in one string; four times what the longest context holds


@dataclass
class _Run:
    """The state of one rendering."""

    steps: int  # that are left
    there: Mapping[int, str]  # ordinal of a character -> its stand-in


_run: ContextVar[_Run] = ContextVar("run")

# For files without a template: turns alone, as in Gemma 3's own template, where the system's message is part of the
# first user's turn, and as in Gemma 4's, where it has its own.
_PLAIN_3 = """\
{% macro text(content) -%}
{% if content is string %}{{ content | trim }}{% else %}
{%- for part in content or [] %}{{ part['text'] | trim }}{% endfor %}
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
    token = _run.set(_Run(_MAX_STEPS, there))
    try:
        copies = {name: _copied(value, there) for name, value in given.items()}
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
    """Return the prompt's ids, BOS included. Control tokens spelled in messages or tools are encoded as text.

    Arguments and errors are those of `render_chat`; the template is the tokenizer's.
    """
    template = tokenizer.chat_template
    bos = tokenizer.decode([tokenizer.bos_id], skip_special=False)
    names = {"bos_token": bos, "eos_token": "<eos>", "add_generation_prompt": add_generation_prompt}
    if template is None and tokenizer.token_id("<|turn>") is None:
        template = _PLAIN_3
    given = _given(messages, tools, variables)
    there, back = _stand_ins(tokenizer, given, template or _PLAIN)
    text = _render(template, names, enable_thinking, given, there)
    ids: list[int] = []
    for part in tokenizer.split_special(text):
        ids += [part] if isinstance(part, int) else tokenizer.encode(part.translate(back), add_bos=False)
    return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


def _copied(value: Any, there: Mapping[int, str]) -> Any:
    """Copy `value` with stand-ins in all its strings, keys included, and of JSON's types only.

    Other objects could have methods that a template must not reach: the name of their type replaces them.
    """
    if isinstance(value, str):
        return str.translate(value, there)
    if isinstance(value, Mapping):
        return {_copied(key, there): _copied(x, there) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(_copied(x, there) for x in value)
    if value is None or isinstance(value, bool | int | float):
        return value
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


class _Generation(jinja2.ext.Extension):
    """The block {% generation %}, which marks a reply for training: it is rendered as its contents."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, with bounds on steps and on the length of strings."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation], finalize=_bounded
        )
        marked = jinja2.pass_context(lambda _context, value: _marked(value))  # so that no result is compiled in
        self.filters.update(tojson=_tojson, _counted=_counted, _bounded=_bounded, _marked=marked)
        self.globals.update(raise_exception=_raise_exception, strftime_now=lambda form: datetime.now().strftime(form))

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        """Parse, and have all loops counted, all operands of + and ~ bounded, and strings compared with stand-ins."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = self._filtered(loop.iter, "_counted")
        for add in tree.find_all(jinja2.nodes.Add):
            add.left, add.right = (self._filtered(node, "_bounded") for node in (add.left, add.right))
        for concat in tree.find_all(jinja2.nodes.Concat):
            concat.nodes = [self._filtered(node, "_bounded") for node in concat.nodes]
        for compare in tree.find_all(jinja2.nodes.Compare):
            compare.expr = self._filtered(compare.expr, "_marked")
            for operand in compare.ops:
                operand.expr = self._filtered(operand.expr, "_marked")
        return tree

    def _filtered(self, node: jinja2.nodes.Node, name: str) -> jinja2.nodes.Expr:
        made = jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
        made.set_environment(self)
        return made

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # Jinja's names of them
        _spend(_CALL_STEPS)
        # A macro may be given any number, as the bounds in a tool's schema are.
        if not isinstance(__obj, Macro) and any(isinstance(x, int) and abs(x) > _MAX_TEXT for x in args):
            raise InputError("the model's chat template asks for too much: its code may be broken")
        text = getattr(__obj, "__self__", None)  # of which this is a method
        if isinstance(text, str) and any(stand_in in text for stand_in in _run.get().there.values()):
            args, kwargs = tuple(map(_marked, args)), {name: _marked(x) for name, x in kwargs.items()}
        return _bounded(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [x if isinstance(x, int) else len(x) if hasattr(x, "__len__") else 1 for x in (left, right)]
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        repeats = operator == "*" and not numbers and sizes[0] * sizes[1] > _MAX_TEXT
        if repeats or (operator == "%" and isinstance(left, str) and re.search(r"\d{6}|\*", left)):
            raise InputError("the model's chat template makes too long a string: its code may be broken")
        if operator == "**" and abs(sizes[1]) > 64:
            raise InputError("the model's chat template makes too large a number: its code may be broken")
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


def _marked(value: Any) -> Any:
    """Write a string with stand-ins, so that it compares with text of messages; leave any other value alone."""
    return value.translate(_run.get().there) if isinstance(value, str) else value


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Write JSON as transformers does, without HTML escapes. Stand-ins stay as they are."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if ensure_ascii:
        text = re.sub(f"[^\\x00-\\x7f{''.join(_run.get().there.values())}]", lambda c: json.dumps(c[0])[1:-1], text)
    return text


def _raise_exception(message: str) -> None:
    raise InputError(f"the model's chat template refuses these messages: {message}")


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    return _Sandbox().from_string(source)
