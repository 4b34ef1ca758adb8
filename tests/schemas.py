"""JSON schemas to hold replies to: our own, in the shapes that public suites (JSON-Schema-Test-Suite, JSONSchemaBench)
have. Compact tables; `SCHEMAS` is all of them by name."""

from __future__ import annotations

from typing import Any

Schema = Any

S, I, N, B, NULL = ({"type": t} for t in ("string", "integer", "number", "boolean", "null"))  # noqa: E741


def obj(required: str = "", /, *, more: Any = None, **properties: Schema) -> Schema:
    """An object: names that must be there, properties, and `more` for additionalProperties."""
    made: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        made["required"] = required.split()
    return made if more is None else {**made, "additionalProperties": more}


def arr(items: Schema, low: int | None = None, high: int | None = None) -> Schema:
    bounds = {"minItems": low, "maxItems": high}
    return {"type": "array", "items": items, **{k: v for k, v in bounds.items() if v is not None}}


def ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def text(low: int | None = None, high: int | None = None, **more: Any) -> Schema:
    bounds = {"minLength": low, "maxLength": high}
    return {"type": "string", **{k: v for k, v in bounds.items() if v is not None}, **more}


def whole(low: int | None = None, high: int | None = None, **more: Any) -> Schema:
    return {"type": "integer", **_range(low, high), **more}


def real(low: float | None = None, high: float | None = None, **more: Any) -> Schema:
    return {"type": "number", **_range(low, high), **more}


def _range(low: float | None, high: float | None) -> dict[str, float]:
    return {k: v for k, v in (("minimum", low), ("maximum", high)) if v is not None}


TYPES = [S, I, N, B, NULL, {"type": "array"}, {"type": "object"}, True, {}]
TYPE_UNIONS = [
    {"type": ["string", "null"]},
    {"type": ["integer", "string"]},
    {"type": ["boolean", "integer", "null"]},
    {"type": ["number", "array"], "items": B, "maxItems": 2},
    {"type": ["object", "null"], "properties": {"a": I}, "required": ["a"], "additionalProperties": False},
    {"type": ["string", "integer"], "maxLength": 3, "minimum": 5, "maximum": 9},
]
ENUMS = [
    ["red", "green", "blue"],
    [1, 2, 3, 5, 8],
    ["yes", "no", None],
    [True, False, "maybe"],
    [1.5, -2, 1e3],
    ["", " ", "\n", '"', "\\", "/"],
    ["naïve", "日本", "😀", "e\u0301"],
    [[1, 2], {"a": None}, "x", 7, False],
    ["prefix", "prefixed", "pre"],
    [{"k": "v"}, {"k": "w"}, {}],
    [0, -1, "0", "-1"],
    [f"item-{i:03}" for i in range(100)],
]
CONSTS: list[Any] = [
    "fixed",
    0,
    -12.75,
    None,
    True,
    [],
    {},
    [1, "two", None],
    {"a": {"b": [False]}},
    "tab\there",
    "é\u2028ü",
    'say "hi"',
]
LENGTHS = [text(3), text(0, 0), text(0, 4), text(5, 5), text(1, 12), text(20, 40), text(2, 3, pattern="^[a-c]+$")]
PATTERNS = [
    "^[a-z]+$",
    "^[A-Z][a-z]{2,8}$",
    "^\\d{3}-\\d{4}$",
    "^(cat|dog|bird)s?$",
    "^[0-9a-f]{8}$",
    "^#([0-9a-fA-F]{3}|[0-9a-fA-F]{6})$",
    "^v\\d+\\.\\d+\\.\\d+$",
    "^[^aeiou\\s]{4}$",
    "^\\+?[1-9][0-9]{6,14}$",
    "^[A-Z]{2}[0-9]{2}( [0-9]{4}){3}$",
    "^a.c$",
    "^(ab){2,3}$",
    "^\\w+@\\w+\\.(com|org)$",
    "^\\S+ \\S+$",
    "^x?y*z+$",
    "^[\\[\\]{}()]{2}$",
    "^/([a-z]+/)*[a-z]+$",
    "^\\$[0-9]+\\.[0-9]{2}$",
    "^(2[0-3]|[01]?[0-9]):[0-5][0-9]$",
    "^[а-я]{3}$",
    "b",
    "^p",
    "q$",
]
FORMATS = ["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"]
INTEGERS = [
    whole(0),
    whole(None, 0),
    whole(1, 6),
    whole(-5, 5),
    whole(10, 99),
    whole(0, 1000000),
    whole(2020, 2030),
    whole(-273, -1),
    whole(7, 7),
    whole(exclusiveMinimum=0, exclusiveMaximum=10),
    whole(exclusiveMinimum=99),
    whole(exclusiveMaximum=-99),
    whole(1, 65535),
    whole(0, 255),
    whole(999, 1001),
]
NUMBERS = [
    real(0),
    real(0, 1),
    real(-1, 1),
    real(0.5, 0.75),
    real(None, -0.25),
    real(exclusiveMinimum=0, exclusiveMaximum=1),
    real(-90, 90),
    real(1.1, 9.9),
    real(99.5, 100.5),
    real(exclusiveMinimum=-0.5, maximum=2),
]
MULTIPLES = [
    whole(multipleOf=5),
    whole(0, 100, multipleOf=25),
    whole(multipleOf=7, minimum=1),
    real(multipleOf=0.25),
    real(0, 2, multipleOf=0.5),
]
ARRAYS = [
    arr(I),
    arr(S, 1),
    arr(B, None, 3),
    arr(NULL, 2, 2),
    arr(whole(0, 9), 3, 5),
    arr(arr(I, 1, 2), 1, 2),
    arr(arr(arr(B, 1, 1), 1, 1), 1, 1),
    arr({"enum": ["a", "b"]}, 0, 4),
    arr(obj("x y", more=False, x=N, y=N), 1, 3),
    arr({"anyOf": [I, NULL]}, 2, 4),
    arr(text(1, 5), 0, 0),
    arr({"const": 1}, 10, 12),
    {"type": "array", "minItems": 1, "maxItems": 2},
    {"type": "array", "items": True, "maxItems": 2},
    arr(text(format="date"), 1, 2),
    {"type": "array", "items": False},
]
TUPLES = [
    {"type": "array", "prefixItems": [S, I], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [S, I], "items": False},
    {"type": "array", "prefixItems": [B], "items": I, "maxItems": 4},
    {"type": "array", "prefixItems": [{"const": "point"}, N, N], "minItems": 3, "maxItems": 3},
    {"type": "array", "prefixItems": [I, S, NULL], "items": B, "minItems": 4, "maxItems": 5},
    {"type": "array", "prefixItems": [{"enum": ["GET", "PUT"]}, text(1, 9)], "items": obj("k", k=I), "maxItems": 3},
    {"type": "array", "prefixItems": [arr(I, 1, 1), obj(more=False)], "items": False, "minItems": 1},
]
OBJECTS = [
    obj(more=False),
    obj(a=I),
    obj("a", a=I),
    obj("a", a=I, more=False),
    obj("a b", a=I, b=S, more=False),
    obj("b", a=I, b=S, more=False),
    obj("c", a=I, b=S, c=B, d=N, more=False),
    obj("a", a=obj("b", b=obj("c", c=NULL, more=False), more=False), more=False),
    obj("z y x", x=I, y=I, z=I, more=False),
    obj("name", name=text(1, 10), age=whole(0, 150), email=text(format="email"), more=False),
    obj("extra", a=I, more=False) | {"properties": {"a": I, "extra": True}},
    {"type": "object", "required": ["undeclared"]},
    {
        "type": "object",
        "properties": {"a b": I, "c.d": S, "e-f": B},
        "required": ["a b"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {"é": I, "日": I, '"': I},
        "required": ["é", "日", '"'],
        "additionalProperties": False,
    },
    {"type": "object", "properties": {"": I, "\n": S}, "required": [""], "additionalProperties": False},
    {"properties": {"a": I}, "required": ["a"], "type": "object", "title": "T", "description": "d", "default": {}},
    obj("on", on=B, more=False) | {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "urn:x"},
    obj(**{f"k{i}": I for i in range(12)}, more=False),
    obj(" ".join(f"k{i}" for i in range(20)), **{f"k{i}": B for i in range(20)}, more=False),
    obj("list", list=arr(S, 1, 2), map=obj(more=I), more=False),
]
MAPS = [
    {"type": "object", "additionalProperties": I},
    {"type": "object", "additionalProperties": text(1, 3)},
    {"type": "object", "additionalProperties": arr(B, 1, 1)},
    {"type": "object", "additionalProperties": {"anyOf": [I, NULL]}, "properties": {"id": S}, "required": ["id"]},
    {"type": "object", "additionalProperties": I, "minProperties": 1},
    {"type": "object", "additionalProperties": I, "maxProperties": 1},
    {"type": "object", "patternProperties": {"^x-": S}, "additionalProperties": False},
    {"type": "object", "patternProperties": {"^[a-z]{2}$": N}, "additionalProperties": False},
    {"type": "object", "patternProperties": {"^s_": S, "^i_": I}, "additionalProperties": False},
    {"type": "object", "properties": {"v": I}, "patternProperties": {"^x_[a-z]$": B}, "additionalProperties": False},
    {"type": "object", "patternProperties": {"^\\d+$": obj("n", n=S)}, "additionalProperties": False},
]
ANY_OF = [
    [S, I],
    [whole(0, 9), text(2, 2)],
    [{"const": "a"}, {"const": 1}, NULL],
    [obj("a", a=I, more=False), obj("b", b=S, more=False)],
    [arr(I, 1, 2), I],
    [text(format="date"), text(format="ipv4")],
    [
        obj("kind r", kind={"const": "circle"}, r=N, more=False),
        obj("kind w h", kind={"const": "box"}, w=N, h=N, more=False),
    ],
    [{"type": ["integer", "null"]}, arr(NULL, 1, 1)],
    [{"enum": ["x"]}, {"enum": ["xy"]}, {"enum": ["xyz"]}],
    [whole(0, 10), whole(90, 100)],
    [{"allOf": [text(2), text(None, 4)]}, B],
]
ONE_OF = [
    [S, NULL],
    [I, B],
    [{"const": "left"}, {"const": "right"}],
    [obj("t a", t={"const": 1}, a=S, more=False), obj("t b", t={"const": 2}, b=S, more=False)],
    [arr(I, 1, 2), obj("n", n=I, more=False)],
    [{"type": "string", "enum": ["on", "off"]}, {"type": "integer", "enum": [0, 1]}],
    [{"type": "number"}, {"type": "array", "items": N, "maxItems": 2}],
]
ALL_OF = [
    [text(2), text(None, 5)],
    [whole(0), whole(None, 9)],
    [obj("a", a=I), obj("b", b=S)],
    [obj("a", a=whole(0)), obj("a", a=whole(None, 5))],
    [{"type": ["string", "integer"]}, {"type": ["integer", "null"]}],
    [{"enum": [1, 2, 3]}, {"enum": [2, 3, 4]}],
    [ref("base"), obj("c", c=B)],
    [arr(I), {"minItems": 1}, {"maxItems": 2}],
    [{"anyOf": [whole(0, 5), NULL]}],
    [text(pattern="^[ab]+$"), text(3, 6)],
]
REFS = [
    ref("id"),
    obj("a b", a=ref("id"), b=ref("id"), more=False),
    arr(ref("id"), 1, 3),
    {"anyOf": [ref("id"), ref("name")]},
    obj("p", p=ref("point"), more=False),
    ref("alias"),
    arr(ref("shape"), 1, 2),
    {"allOf": [ref("name"), {"maxLength": 3}]},
    {"$ref": "#/$defs/nested/properties/deep"},
    {"$ref": "#/$defs/a~1b"},
    {"$ref": "#/$defs/sp%20ace"},
    obj("x", x={"$ref": "#/$defs/name", "description": "beside a $ref"}, more=False),
    {"type": "object", "additionalProperties": ref("id"), "maxProperties": 1},
]
DEFS = {
    "id": whole(1, 999),
    "name": text(1, 8),
    "base": obj("a", a=I),
    "point": obj("x y", x=N, y=N, more=False),
    "alias": ref("name"),
    "shape": {"anyOf": [ref("point"), {"const": "none"}]},
    "nested": obj(deep=arr(B, 1, 1)),
    "a/b": {"const": "slash"},
    "sp ace": {"const": "space"},
}
RECURSIVE = [
    obj("v", v=I, next={"$ref": "#"}, more=False),
    obj("name", name=text(1, 4), children=arr({"$ref": "#"}, None, 2), more=False),
    {"anyOf": [I, arr({"$ref": "#"}, 1, 2)]},
    {"$ref": "#/$defs/tree", "$defs": {"tree": obj("l", l={"anyOf": [NULL, ref("tree")]}, more=False)}},
    {"$ref": "#/$defs/a", "$defs": {"a": obj(b=ref("b"), more=False), "b": obj(a=ref("a"), more=False)}},
    {
        "$ref": "#/$defs/expr",
        "$defs": {
            "expr": {"anyOf": [N, ref("binary")]},
            "binary": obj("op l r", op={"enum": ["+", "*"]}, l=ref("expr"), r=ref("expr"), more=False),
        },
    },
    {
        "$ref": "#/$defs/json",
        "$defs": {"json": {"anyOf": [NULL, B, I, arr(ref("json"), None, 2), obj(more=ref("json"))]}},
    },
    obj("tag", tag={"enum": ["ul", "li"]}, body={"anyOf": [text(0, 5), arr({"$ref": "#"}, 1, 2)]}, more=False),
]
DOCUMENTS = {
    "person": obj("name age", name=text(1, 20), age=whole(0, 120), nickname={"type": ["string", "null"]}, more=False),
    "weather": obj("city unit", city=text(1), unit={"enum": ["C", "F"]}, temp=real(-90, 60), more=False),
    "order": obj(
        "id lines",
        id=text(pattern="^ORD-[0-9]{6}$"),
        lines=arr(obj("sku n", sku=text(4, 4), n=whole(1, 99), more=False), 1, 3),
        paid=B,
        more=False,
    ),
    "sentiment": obj("label score", label={"enum": ["pos", "neg", "neutral"]}, score=real(0, 1), more=False),
    "geo": obj(
        "type coordinates",
        type={"const": "Point"},
        coordinates={"type": "array", "prefixItems": [real(-180, 180), real(-90, 90)], "items": False, "minItems": 2},
        more=False,
    ),
    "event": obj(
        "at kind", at=text(format="date-time"), kind={"enum": ["start", "stop"]}, by=text(format="uuid"), more=False
    ),
    "server": obj(
        "host port", host=text(format="hostname"), port=whole(1, 65535), tls=B, tags=arr(text(1, 6), 0, 3), more=False
    ),
    "quiz": obj(
        "question options answer",
        question=text(5, 60),
        options=arr(text(1, 10), 4, 4),
        answer=whole(0, 3),
        more=False,
    ),
    "steps": obj(
        "steps final", steps=arr(obj("why out", why=text(1, 30), out=S, more=False), 1, 3), final=S, more=False
    ),
    "config": obj(
        "version", version={"const": 2}, on={"type": ["boolean", "null"]}, env=obj(more=text(0, 5)), more=False
    ),
    "extraction": obj(
        "people",
        people=arr(obj("name", name=text(1, 9), role={"type": ["string", "null"]}, more=False), 0, 3),
        more=False,
    ),
    "menu": obj(
        "items", items=arr(obj("dish price", dish=text(3, 15), price=real(0, 99, multipleOf=0.5), more=False), 1, 2)
    ),
    "patch": arr(
        {
            "anyOf": [
                obj(
                    "op path value",
                    op={"enum": ["add", "replace"]},
                    path=text(pattern="^(/[a-z]+)+$"),
                    value=True,
                    more=False,
                ),
                obj("op path", op={"const": "remove"}, path=text(pattern="^(/[a-z]+)+$"), more=False),
            ]
        },
        1,
        2,
    ),
    "calendar": obj("day", day=text(format="date"), slots=arr(text(pattern="^\\d\\d:\\d\\d$"), 0, 4), more=False),
    "matrix": arr(arr(whole(-9, 9), 3, 3), 3, 3),
    "card": obj(
        "number cvc", number=text(pattern="^\\d{4}( \\d{4}){3}$"), cvc=text(3, 4, pattern="^\\d+$"), more=False
    ),
    "translation": obj(
        "from to text", **{"from": {"enum": ["de", "fr"]}, "to": {"enum": ["en"]}, "text": text(1, 40)}, more=False
    ),
    "route": {
        "type": "object",
        "properties": {"stops": arr(ref("stop"), 2, 3), "total": real(0)},
        "required": ["stops", "total"],
        "additionalProperties": False,
        "$defs": {"stop": obj("name at", name=text(1, 8), at=ref("time"), more=False), "time": text(format="time")},
    },
    "grades": {"type": "object", "patternProperties": {"^[a-z]{3,6}$": whole(1, 6)}, "additionalProperties": False},
    "feature": obj(
        "name flags", name=text(1, 9), flags=obj("a", a=B, b=B, c={"enum": [None, 1]}, more=False), more=False
    ),
}


def _named() -> dict[str, Schema]:
    tables: dict[str, list[Schema]] = {
        "type": TYPES,
        "types": TYPE_UNIONS,
        "enum": [{"enum": values} for values in ENUMS],
        "const": [{"const": value} for value in CONSTS],
        "length": LENGTHS,
        "pattern": [text(pattern=pattern) for pattern in PATTERNS],
        "format": [text(format=name) for name in FORMATS],
        "integer": INTEGERS,
        "number": NUMBERS,
        "multiple": MULTIPLES,
        "array": ARRAYS,
        "tuple": TUPLES,
        "object": OBJECTS,
        "map": MAPS,
        "anyOf": [{"anyOf": parts} for parts in ANY_OF],
        "oneOf": [{"oneOf": parts} for parts in ONE_OF],
        "allOf": [{"allOf": parts, "$defs": DEFS} for parts in ALL_OF],
        "ref": [{**schema, "$defs": DEFS} for schema in REFS],
        "recursive": RECURSIVE,
    }
    numbered = {f"{name}-{i}": schema for name, table in tables.items() for i, schema in enumerate(table)}
    return numbered | DOCUMENTS


SCHEMAS = _named()
