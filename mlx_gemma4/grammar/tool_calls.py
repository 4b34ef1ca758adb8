"""Turn tools' parameter schemas into a Lark grammar of calls in Gemma 4's format.

In: functions with JSON schemas, and a tokenizer for the ids of control tokens. Out: the grammar's text, for
grammar.py. The format, from the chat template in Google's files:

    <|tool_call>call:NAME{key:value,key:value}<tool_call|>

A string stands between two <|"|>, with no escapes; numbers, true, false and null are as in JSON; arrays are
[a,b], objects {key:value}; keys are bare, or strings if they contain punctuation of the format. No blanks anywhere.

Keys may come in any order, each once, and all required ones must: a rule's parameter keeps a bit for each key.
Constraints that a grammar can't express (`uniqueItems`, `not`, a pattern with look-around) are left out, with a line
in the log, since a call with a doubtful argument is better than no call.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import llguidance

from ..errors import InputError
from ..tokens.tokenizer import Tokenizer

CALL, END_CALL, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_INTEGER = r"/-?(0|[1-9][0-9]{0,17})/"
_NUMBER = r"/-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?([eE][+\-]?[0-9]{1,2})?/"
_KEY = r"/[^\x00-\x1F\s:=,;{}()\[\]<>|\"']{1,64}/"
_APART = re.compile(r"""[\s:=,;{}()\[\]<>|"']|^$""")  # a key or name with any of these can't be bare
_CONSTANTS = {"boolean": '("true" | "false")', "null": '"null"'}
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_TYPES = ("string", "number", "integer", "boolean", "null", "array", "object")
# The values that a keyword may have.
_SHAPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("properties", "patternProperties"), (lambda x: isinstance(x, Mapping), "an object")),
    **dict.fromkeys(("prefixItems", "enum", "anyOf", "oneOf", "allOf"), (lambda x: isinstance(x, list), "a list")),
    **dict.fromkeys(("$ref", "pattern", "format"), (lambda x: isinstance(x, str), "a string")),
    **dict.fromkeys(
        ("minLength", "maxLength", "minItems", "maxItems"), (lambda x: type(x) is int and x >= 0, "a count, 0 or more")
    ),
    **dict.fromkeys(_BOUNDS, (lambda x: type(x) in (int, float) and math.isfinite(x), "a number")),
    "required": (lambda x: isinstance(x, list) and all(isinstance(key, str) for key in x), "a list of names"),
    "type": (lambda x: isinstance(x, str) or (isinstance(x, list) and x != []), "a type's name or a list of them"),
}
_SILENT = ("$ref", "$defs", "definitions", "$id", "$schema", "title", "description", "default", "examples")
_BITS = 64  # in a rule's parameter
_DAYS = r"(0[1-9]|1[0-9]|2[0-8])", r"(0[1-9]|[12][0-9]|30)", r"(0[1-9]|[12][0-9]|3[01])"
_DATE = rf"[1-9][0-9]{{3}}-(02-{_DAYS[0]}|(0[469]|11)-{_DAYS[1]}|(0[13578]|1[02])-{_DAYS[2]})"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]"
_ZONE = r"(Z|[+\-]([01][0-9]|2[0-3]):[0-5][0-9])"
_FORMATS = {
    "date": _DATE,
    "time": _TIME + _ZONE,
    "date-time": f"{_DATE}T{_TIME}{_ZONE}",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "email": r"[A-Za-z0-9._%+\-]+@[A-Za-z0-9\-]+(\.[A-Za-z0-9\-]+)+",
    "hostname": r"[A-Za-z0-9]([A-Za-z0-9\-]{0,30}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9\-]{0,30}[A-Za-z0-9])?)*",
    "duration": r"P([0-9]{1,9}[YMWD])?(T[0-9]{1,9}[HMS])|P[0-9]{1,9}[YMWD]",
    "uri": r"[A-Za-z][A-Za-z0-9+.\-]*:[^\s<>\"{}|\\^`]+",
    "ipv6": r"([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}",
    "ipv4": r"((25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])\.){3}(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])",
}


def tool_call_lark(tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]], choice: str) -> str:
    """Return the grammar of one call (`choice` "auto" or a name), or of one or more ("required")."""
    functions = [_function(tool, i) for i, tool in enumerate(tools)]
    if choice not in ("auto", "required"):
        functions = [(name, parameters) for name, parameters in functions if name == choice]
    if not functions:
        raise InputError(
            f"tools: none is called {choice!r}" if tools else "tools: there are none to call", field="tools"
        )
    ids = {text: f"<[{tokenizer.token_id(text)}]>" for text in (CALL, END_CALL, QUOTE)}
    rules = _Rules(ids[QUOTE])
    calls = []
    for name, parameters in functions:
        rules.tool, rules.root = name, parameters
        rules.refs.clear()
        try:
            calls.append(f"{_text(name)} {rules.value(parameters, 'parameters')}")
        except RecursionError as error:
            raise rules.error("parameters", "the schema is nested too deeply") from error
        except TypeError as error:
            raise rules.error("parameters", f"not a JSON schema ({error})") from error
    head = [
        "start: call+" if choice == "required" else "start: call",
        f'call: {ids[CALL]} "call:" ({" | ".join(calls)}) {ids[END_CALL]}',
    ]
    return "\n".join(head + rules.lines) + "\n"


def _function(tool: Mapping[str, Any], index: int) -> tuple[str, Mapping[str, Any]]:
    """Return a tool's name and the schema of its arguments, which are always an object."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or _APART.search(name):
        raise InputError(
            f"tools: number {index + 1} must be a function with a name of letters, digits, _ and -", field="tools"
        )
    parameters = function.get("parameters") or {"properties": {}}
    if not isinstance(parameters, Mapping):
        raise InputError(f"tools: the parameters of {name} must be a JSON schema, an object", field="tools")
    return name, parameters if "$ref" in parameters else {**parameters, "type": "object"}


class _Rules:
    """Collects the grammar's rules. Most methods return an expression and add the rules that it needs.

    `at` is the place in the schema, for errors.
    """

    def __init__(self, quote: str) -> None:
        self.quote, self.tool = quote, ""
        self.lines: list[str] = []
        self.made = 0  # names given so far
        self.refs: dict[str, str] = {}  # of the current tool: pointer -> rule
        self.root: Mapping[str, Any] = {}
        self.names: dict[str, str] = {}  # body of a rule or terminal -> its name

    def value(self, schema: Any, at: str) -> str:
        """Any value that a schema allows."""
        if schema is True or schema == {}:
            return self.anything()
        if not isinstance(schema, Mapping):
            raise self.error(at, f"{json.dumps(schema, default=str)[:40]} is no schema that a value could obey")
        for keyword, (fits, wanted) in _SHAPES.items():
            if keyword in schema and not fits(schema[keyword]):
                raise self.error(at, f"{keyword} must be {wanted}, not {json.dumps(schema[keyword], default=str)[:40]}")
        if "$ref" in schema:
            beside = {key: value for key, value in schema.items() if key not in _SILENT}
            if beside:
                return self.value({"allOf": [{"$ref": schema["$ref"]}, beside]}, at)
            return self.reference(schema["$ref"], at)
        if "allOf" in schema:
            return self.value(self.merged(schema, at), at)
        if "const" in schema:
            return self.literal(schema["const"])
        if schema.get("enum"):
            return self.either(self.literal(value) for value in schema["enum"])
        for key in ("anyOf", "oneOf"):
            if schema.get(key):
                rest = {k: v for k, v in schema.items() if k != key}
                parts = [{**rest, **part} if isinstance(part, Mapping) else part for part in schema[key]]
                return self.either(self.value(part, f"{at}/{key}/{i}") for i, part in enumerate(parts))
        return self.typed(schema, at)

    def typed(self, schema: Mapping[str, Any], at: str) -> str:
        types = schema.get("type")
        if types is None:
            types = "object" if "properties" in schema else "array" if "items" in schema else list(_TYPES)
            types = "string" if {"pattern", "format", "minLength", "maxLength"} & schema.keys() else types
        kinds = [str(kind).lower() for kind in (types if isinstance(types, list) else [types])]
        if schema.get("nullable") is True and "null" not in kinds:
            kinds.append("null")
        for kind in kinds:
            if kind not in _TYPES:
                raise self.error(at, f"there is no type {kind!r}")
        if set(_TYPES) <= set(kinds):
            return self.anything()
        return self.either(_CONSTANTS.get(kind) or getattr(self, kind)(schema, at) for kind in kinds)

    def string(self, schema: Mapping[str, Any], at: str) -> str:
        parts = [_unanchored(schema["pattern"])] if "pattern" in schema else []
        if schema.get("format") in _FORMATS:
            parts.append(_FORMATS[schema["format"]])
        low, high = schema.get("minLength"), schema.get("maxLength")
        if low or high is not None:
            parts.append(f"(?s:.{{{low or 0},{'' if high is None else high}}})")
        parts = [regex for regex in parts if self.compiles(regex, at)] or ["(?s:.*)"]
        return f"{self.quote} {self.rule(' & '.join(map(_slashed, parts)), 'T')} {self.quote}"

    def integer(self, schema: Mapping[str, Any], at: str) -> str:
        return self.number(schema, at, "integer", _INTEGER)

    def number(self, schema: Mapping[str, Any], at: str, kind: str = "number", plain: str = _NUMBER) -> str:
        bounds = {key: schema[key] for key in _BOUNDS if key in schema}
        # With bounds: the library's own rule for JSON, whose numbers look the same.
        if not bounds:
            return self.rule(plain, "T")
        return self.rule("%json " + json.dumps({"type": kind, **bounds, "x-guidance": {"whitespace_flexible": False}}))

    def array(self, schema: Mapping[str, Any], at: str) -> str:
        """[a,b]: those of `prefixItems`, then any number of `items`, within the bounds on all of them."""
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        first = [self.value(part, f"{at}/prefixItems/{i}") for i, part in enumerate(schema.get("prefixItems", []))]
        first = first[:high]
        rest = ""  # built from the last item to the first
        if schema.get("items") is not False and (high is None or high > len(first)):
            item, before = self.value(schema.get("items", True), f"{at}/items"), max(len(first), 1)
            most = "" if high is None else high - before
            rest = "" if most == 0 else f'("," {item}){{{max(low - before, 0)},{most}}}'
            if not first:
                rest = f"({item} {rest})" + ("" if low else "?")
        for i in reversed(range(len(first))):
            rest = ('"," ' if i else "") + f"{first[i]} {rest}"
            rest = rest if i < low else f"({rest})?"
        return self.rule(f'"[" {rest} "]"')

    def object(self, schema: Mapping[str, Any], at: str) -> str:
        """{key:value}: declared keys in any order, each once; others only if the schema mentions them."""
        properties = schema.get("properties", {})
        declared = "properties" in schema or "patternProperties" in schema
        more = schema.get("additionalProperties", not declared)
        required = list(dict.fromkeys(schema.get("required", [])))
        properties = {**dict.fromkeys(required, more or True), **properties}
        keys = [*required, *(key for key in properties if key not in required)]
        wanted = min(len(required), _BITS)
        other = self.others(schema, keys, more, at)
        if not keys:
            return self.rule(f'"{{" ({other} ("," {other})*)? "}}"' if other else '"{" "}"')
        members = [f'{self.key(key)} ":" {self.value(properties[key], f"{at}/properties/{key}")}' for key in keys]
        name, rest = self.new_name("o"), self.new_name("o")
        self.lines.append(f'{name}: "{{" {name}_::0x0 "}}"')
        for rule, comma in ((f"{name}_", ""), (rest, '"," ')):
            options = [f'"" %if is_ones([0:{wanted}])' if wanted else '""']
            for bit, text in enumerate(members):
                once = f"{rest}::set_bit({bit}) %if bit_clear({bit})"
                options.append(f"{comma}{text} {once if bit < _BITS else rest + '::_'}")
            if other:
                options.append(f"{comma}{other} {rest}::_")
            self.lines.append(f"{rule}::_: " + "\n | ".join(options))
        return name

    def others(self, schema: Mapping[str, Any], keys: Sequence[str], more: Any, at: str) -> str:
        """A pair with an undeclared key, by `patternProperties` or else by `more`; "" if none is allowed."""
        patterns = schema.get("patternProperties", {})
        taken = "".join(f" & ~{_text(key)}" for key in keys)
        pairs = []
        for pattern, part in patterns.items():
            if self.compiles(_unanchored(pattern), at):
                key = self.rule(f"{_KEY} & {_slashed(_unanchored(pattern))}{taken}", "T")
                pairs.append(f'{key} ":" {self.value(part, f"{at}/patternProperties/{pattern}")}')
        if more is not False:
            key = self.rule(_KEY + taken + "".join(f" & ~{_slashed(_unanchored(p))}" for p in patterns), "T")
            pairs.append(f'{key} ":" {self.value(more, f"{at}/additionalProperties")}')
        return self.either(pairs) if pairs else ""

    def key(self, key: str) -> str:
        return self.literal(key) if _APART.search(key) else _text(key)

    def anything(self) -> str:
        if "any" not in self.names:
            self.names["any"] = "any"
            self.lines.append(f"any: {self.typed({'type': [kind for kind in _TYPES if kind != 'integer']}, '')}")
        return "any"

    def literal(self, value: Any) -> str:
        """One value and no other."""
        if isinstance(value, str):
            return f"{self.quote} {_text(value)} {self.quote}" if value else f"{self.quote} {self.quote}"
        if isinstance(value, Mapping):
            inner = ' "," '.join(f'{self.key(key)} ":" {self.literal(x)}' for key, x in value.items())
            return f'"{{" {inner} "}}"'
        if isinstance(value, list):
            inner = ' "," '.join(self.literal(x) for x in value)
            return f'"[" {inner} "]"'
        return _text(json.dumps(value))

    def either(self, options: Iterable[str]) -> str:
        distinct = list(dict.fromkeys(options))
        return distinct[0] if len(distinct) == 1 else self.rule(" | ".join(distinct))

    def reference(self, ref: Any, at: str) -> str:
        """A rule for the schema that `#/...` points to, which may contain itself."""
        if ref not in self.refs:
            target = self.target(ref, at)
            name = self.refs[ref] = self.new_name("r")
            self.lines.append(f"{name}: {self.value(target, ref)}")
        return self.refs[ref]

    def target(self, ref: Any, at: str) -> Any:
        """Return the schema that `#/...` points to (RFC 6901)."""
        if not isinstance(ref, str) or not ref.startswith("#"):
            raise self.error(at, f"the reference {ref!r} must point into the tool's own schema, as #/$defs/...")
        found: Any = self.root
        for step in [s.replace("~1", "/").replace("~0", "~") for s in unquote(ref).split("/")[1:]]:
            try:
                found = found[int(step)] if isinstance(found, list) else found[step]
            except (KeyError, IndexError, ValueError, TypeError):
                raise self.error(at, f"there is nothing at the reference {ref!r}") from None
        return found

    def merged(self, schema: Mapping[str, Any], at: str) -> dict[str, Any]:
        """Return `allOf` and its sibling keywords as one schema."""
        out = {key: value for key, value in schema.items() if key != "allOf"}
        for part in schema["allOf"]:
            if isinstance(part, Mapping) and "$ref" in part:
                rest = {key: value for key, value in part.items() if key != "$ref"}
                part = {"allOf": [self.target(part["$ref"], at), rest]}
            if not isinstance(part, Mapping):
                raise self.error(at, "allOf must be a list of schemas")
            part = self.merged(part, at) if "allOf" in part else part
            out = {**out, **part, **{key: _both(key, out[key], part[key]) for key in out.keys() & part.keys()}}
        return out

    def compiles(self, regex: str, at: str) -> bool:
        if len(regex) > 4000 or llguidance.LLMatcher.validate_grammar(f"start: T\nT: {_slashed(regex)}\n"):
            logging.info("tools: %s, %s: the pattern %.60r isn't enforced", self.tool, at, regex)
            return False
        return True

    def rule(self, body: str, prefix: str = "v") -> str:
        if body not in self.names:
            self.names[body] = self.new_name(prefix)
            self.lines.append(f"{self.names[body]}: {body}")
        return self.names[body]

    def new_name(self, prefix: str) -> str:
        self.made += 1
        return f"{prefix}{self.made}"

    def error(self, at: str, what: str) -> InputError:
        return InputError(f"tools: {self.tool}, {at}: {what}", field="tools")


def _both(key: str, a: Any, b: Any) -> Any:
    """Merge the values of one keyword in two schemas; where they can't be merged, take the second."""
    if key == "properties" and isinstance(a, Mapping) and isinstance(b, Mapping):
        return {**a, **b, **{name: {"allOf": [a[name], b[name]]} for name in a.keys() & b.keys()}}
    if key == "required" and isinstance(a, list) and isinstance(b, list):
        return a + b
    if key in ("type", "enum"):
        a, b = (x if isinstance(x, list) else [x] for x in (a, b))
        return [x for x in b if x in a]
    return b


def _text(text: str) -> str:
    """Return a literal of the grammar."""
    return json.dumps(text, ensure_ascii=False)


def _slashed(regex: str) -> str:
    """Return a terminal's regular expression; digits and word characters are ASCII, as in JSON Schema."""
    return f"/{llguidance.regex_to_lark(regex, use_ascii='dw')}/"


def _unanchored(pattern: str) -> str:
    """Return a schema's pattern, which may match anywhere, as an expression for the whole string."""
    start = "" if pattern.startswith("^") else "(?s:.*)"
    closed = pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern.removeprefix("^")
    return f"{start}({inner[:-1] if closed else inner}){'' if closed else '(?s:.*)'}"
