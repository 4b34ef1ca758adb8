"""The form that a reply must have, under any name that clients of other servers give it.

In: a request's body. Out: `schema`, `regex` or `grammar` of ReplyOptions, and the field's path for errors. A form that
is asked for is kept or refused by name, never ignored: an unknown field that sounds like one is refused, too.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from . import fields
from .fields import FORM_HOLDERS, FORM_KINDS, Body, wrong


class Form(NamedTuple):
    path: str
    options: dict[str, Any]  # at most one, of ReplyOptions

    def beside(self, choice: str) -> "Form":
        """What is left of it beside a choice of tools: it is the text's, and a reply that must call has none."""
        return self if choice in ("auto", "none") else Form(self.path, {})


_ALONE = ("json", "choice", "pattern", "json_object")  # names that say little outside of them
_SOUNDS = re.compile(
    r"schema|grammar|regex|guided|structur|ebnf|gbnf|(response|output)_?format|json_mode|constrain", re.I
)
_HOW = re.compile(r"backend|whitespace|disable_|strict|_options$")  # how a form is kept, not which


def read_form(body: Body, path: str, wanted: fields.Format | None) -> Form:
    """Return the one form that a request asks for. `wanted`: the API's own field, at `path`.

    Raises ApiError (400): there are several, or one that can't be kept.
    """
    found = [Form(path, _of_format(wanted, path))] if wanted else []
    extra = dict(body.model_extra or {})
    for name in FORM_HOLDERS:
        if isinstance(inner := extra.get(name), Mapping):
            found += _among(inner, f"{name}.", (*FORM_KINDS, "schema"))
    found += _among(extra, "", [name for name in FORM_KINDS if name not in _ALONE])
    for name, value in _odd(body):
        if value not in (None, False, True, "", [], {}):  # True: OpenRouter's list of what a model must support
            raise wrong(name, "isn't supported: give the reply's form as response_format", "unsupported_value")
    found = [form for form in found if form.options]
    if len(found) > 1:
        raise wrong(found[1].path, f"can't be together with {found[0].path}")
    return found[0] if found else Form(path, {})


def _among(values: Mapping[str, Any], before: str, names: Any) -> Iterator[Form]:
    for name in names:
        value = values.get(name)
        if value is not None and value is not False and value != "":
            yield Form(before + name, _of(FORM_KINDS.get(name, "json"), value, before + name))


def _of(kind: str, value: Any, path: str) -> dict[str, Any]:
    """The option that a value of a kind stands for."""
    if isinstance(value, dict) and {"type", "value"} <= value.keys() and kind == "grammar":  # TGI's
        kind, value = {"json_schema": "json"}.get(str(value["type"]), str(value["type"])), value["value"]
    if kind == "object" and isinstance(value, bool):
        return {"schema": {"type": "object"}}
    if kind == "json":
        if value == "json":  # Ollama's
            return {"schema": {"type": "object"}}
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise wrong(path, "isn't JSON") from None
        if isinstance(value, dict):
            return {"schema": value}
        raise wrong(path, "must be a JSON schema")
    if kind == "choice":
        if not (isinstance(value, list) and value and all(isinstance(one, str) and one for one in value)):
            raise wrong(path, "must be a list of strings")
        return {"grammar": "start: " + "\n | ".join(json.dumps(one, ensure_ascii=False) for one in value)}
    if kind == "regex" and isinstance(value, str):
        return {"regex": value}
    if kind == "grammar" and isinstance(value, str):
        return {"grammar": _lark(value, path)}
    raise wrong(path, "must be a string" if kind in ("regex", "grammar") else "isn't supported", "unsupported_value")


def _lark(grammar: str, path: str) -> str:
    """The grammar in Lark's notation: GBNF, as llama.cpp has it, is translated."""
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if len(grammar) > 1 << 14:
        raise wrong(path, "is too long")
    try:
        return str(gbnf_to_lark(grammar))
    except Exception as error:  # the library's own, and what its parser raises on other texts
        raise wrong(path, f"can't be read: {str(error)[:100]!r}") from None


def _of_format(wanted: fields.Format, path: str) -> dict[str, Any]:
    """The option that an API's own field stands for."""
    holder = wanted.json_schema
    given = {
        "json_schema.schema" if holder else "schema": holder.schema_ if holder else wanted.schema_,
        "regex": wanted.regex or wanted.pattern or None,
        "grammar": wanted.grammar or None,
        "value": wanted.value,
    }
    if holder and wanted.schema_ is not None:
        raise wrong(f"{path}.schema", "can't be together with json_schema")
    given = {name: value for name, value in given.items() if value is not None}
    kinds = {"json_schema": "json", "json": "json", "json_object": "json", "lark": "grammar", "grammar": "grammar"}
    kind = kinds.get(wanted.type, wanted.type)
    name = {"json": "json_schema.schema" if holder else "schema"}.get(kind, kind)
    for other in given:
        if other not in (name, "value") or wanted.type == "text":
            raise wrong(f"{path}.{other}", f"isn't for the type {wanted.type!r}")
    value = given.get(name, given.get("value"))
    if value is not None:
        return _of(kind, value, f"{path}.{name}")
    if wanted.type in ("json_object", "json"):
        return {"schema": {"type": "object"}}
    if wanted.type == "text":
        return {}
    raise wrong(f"{path}.{name}", "is missing", "missing_required_parameter")


def _odd(body: Body, path: str = "") -> Iterator[tuple[str, Any]]:
    """Unknown fields that sound like a form, but for those that `read_form` knows, in the body and in its objects.

    Messages and tools are left out: what they hold is the conversation's.
    """
    for name, value in (body.model_extra or {}).items():
        if isinstance(value, Mapping) and not path:
            yield from (
                (f"{name}.{key}", inner) for key, inner in value.items() if _is_odd(key, known=name in FORM_HOLDERS)
            )
        if _is_odd(name, known=not path) and not (name in FORM_HOLDERS and isinstance(value, Mapping)):
            yield path + name, value
    for name, value in body:
        if isinstance(value, Body):
            yield from _odd(value, f"{path}{name}.")


def _is_odd(name: str, known: bool) -> bool:
    return bool(_SOUNDS.search(name)) and not _HOW.search(name) and not (known and name in FORM_KINDS)
