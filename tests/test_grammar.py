"""Replies held to a form: 232 schemas, tool calls, regular expressions, Lark; what is refused; what a mask costs."""

from __future__ import annotations

import datetime
import gc
import ipaddress
import json
import random
import re
import statistics
import time
import uuid
import weakref
from collections import Counter
from contextlib import suppress
from typing import Any
from urllib.parse import urlparse

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schemas import SCHEMAS

from mlx_gemma4 import InputError, ReplyOptions, Sampling, chat, generate, load, stream
from mlx_gemma4.grammar import MAX_REGEX, Grammar, json_schema, lark, regex, tool_calls, vocabulary
from mlx_gemma4.replies import ReplyParser, ToolCall
from mlx_gemma4.tokenizer import CONTROL, NORMAL, Tokenizer

KEYWORDS = [
    *("type", "properties", "required", "items", "prefixItems", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"),
    *("$defs", "pattern", "format", "minLength", "maxLength", "minItems", "maxItems", "minimum", "multipleOf", "a"),
    *("additionalProperties", "patternProperties", "nullable", "not", "x-guidance", "$id"),
]
PRINTABLE = [chr(c) for c in range(33, 127)]


@pytest.fixture(scope="module")
def lm():
    return load()


@pytest.fixture(scope="module")
def tokenizer(lm) -> Tokenizer:
    return lm.tokenizer


def allowed(grammar: Grammar, tokenizer: Tokenizer) -> np.ndarray:
    """The ids that may come next."""
    bits = np.unpackbits(grammar.mask().view(np.uint8), bitorder="little")
    assert not bits[tokenizer.vocab_size :].any()
    return np.flatnonzero(bits)


def write(
    grammar: Grammar, tokenizer: Tokenizer, seed: int, free: int = 30, names: frozenset[str] = frozenset()
) -> list[int]:
    """A reply sampled at temperature 1 from random logits; after `free` tokens, it is led to an end.

    For that, what closes something goes first, then a key out of `names`, then the printable character that the
    reply has least of.
    """
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, tokenizer.vocab_size)
    single = {tokenizer.encode(c, add_bos=False)[-1]: c for c in PRINTABLE}
    quote, *brackets = (tokenizer.encode(c, add_bos=False)[-1] for c in '"}]')
    marker = tokenizer.token_id('<|"|>')
    ends = [tokenizer.token_id("<tool_call|>"), *brackets, marker]
    keys = [[*tokenizer.encode(name, add_bos=False), *tokenizer.encode(":", add_bos=False)] for name in names if name]
    planned: list[int] = []
    tried: Counter[int] = Counter()
    ids: list[int] = []
    while not grammar.finished:
        may = allowed(grammar, tokenizer)
        text = tokenizer.decode(ids)
        assert may.size and len(ids) < 2000, f"no end: {text[:200]}"
        stops = [i for i in may if i in tokenizer.stop_ids]
        if len(stops) == may.size or (stops and (len(ids) >= free or rng.random() < 0.2)):
            return ids
        may = may[~np.isin(may, list(tokenizer.stop_ids))]
        token = int(may[np.argmax(logits[may] + rng.gumbel(size=may.size))])
        if len(ids) >= free:
            in_string = len(re.findall(r'(?<!\\)(?:\\\\)*"', text)) % 2
            known = Counter(text)
            order = [quote] if in_string else [marker] if ids.count(marker) % 2 else [*planned[:1], *ends]
            order = order + sorted((i for i in single if i != quote), key=lambda i: known[single[i]])
            token = next((i for i in order if i in may), token)
            if token in planned[:1]:
                planned = planned[1:]
            elif text.endswith(("{", ",")) and token != brackets[0]:
                keys.sort(key=lambda key: tried[key[0]])
                token, *planned = next((key for key in keys if key[0] in may), [token])
                tried[token] += 1
        grammar.accept(token)
        ids.append(token)
    return ids


TIME = r"\d\d:\d\d:\d\d(\.\d+)?([zZ]|[+-]\d\d:\d\d)"
FORMATS = {
    "date": datetime.date.fromisoformat,
    "time": re.compile(TIME).fullmatch,
    "date-time": re.compile(r"\d{4}-\d\d-\d\d[tT]" + TIME).fullmatch,
    "duration": re.compile(r"P(?=.)(\d+[YMWD])*(T(\d+[HMS])+)?").fullmatch,
    "email": re.compile(r"[^@\s]+@[^@\s]+").fullmatch,
    "hostname": re.compile(r"[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*").fullmatch,
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
    "uuid": uuid.UUID,
    "uri": lambda text: urlparse(text).scheme,
}
CHECKER = jsonschema.FormatChecker(())
for _name, _check in FORMATS.items():
    CHECKER.checks(_name, ValueError)(lambda text, check=_check: not isinstance(text, str) or bool(check(text)))


def judge(text: str, schema: Any) -> None:
    """Raises unless the text is JSON that obeys the schema, by another program's judgement."""
    jsonschema.Draft202012Validator(schema, format_checker=CHECKER).validate(json.loads(text))


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name: str, tokenizer: Tokenizer) -> None:
    """Whatever the logits, the reply parses and validates."""
    schema = SCHEMAS[name]
    for seed in range(3):
        judge(tokenizer.decode(write(json_schema(tokenizer, schema), tokenizer, seed)), schema)


def test_schemas_are_many_and_different() -> None:
    assert len({json.dumps(schema, sort_keys=True) for schema in SCHEMAS.values()}) == len(SCHEMAS) >= 200


# Tool calls


def tool(name: str, schema: Any) -> dict[str, Any]:
    """A function of one argument v, as OpenAI's clients declare it."""
    defs = schema.get("$defs", {}) if isinstance(schema, dict) else {}
    parameters = {"type": "object", "properties": {"v": schema}, "required": ["v"], "$defs": defs}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def required_names(part: Any) -> frozenset[str]:
    """All names in lists of required keys."""
    if isinstance(part, dict):
        mine = part.get("required")
        return frozenset(mine if isinstance(mine, list) else []).union(*map(required_names, part.values()))
    return frozenset().union(*map(required_names, part)) if isinstance(part, list) else frozenset()


def read(tokenizer: Tokenizer, ids: list[int]) -> list[Any]:
    parser = ReplyParser(tokenizer)
    return [event for token in ids for event in parser.push(token)] + parser.finish()


def check_calls(tokenizer: Tokenizer, tools: list[dict[str, Any]], ids: list[int]) -> list[ToolCall]:
    """The calls of a reply that is nothing but calls, their arguments judged by another program."""
    events = read(tokenizer, ids)
    assert events and all(isinstance(event, ToolCall) for event in events), tokenizer.decode(ids, skip_special=False)
    known = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    for call in events:
        jsonschema.Draft202012Validator(known[call.name], format_checker=CHECKER).validate(call.arguments)
    return events


@pytest.mark.parametrize("name", SCHEMAS)
def test_arguments_obey_the_schema(name: str, tokenizer: Tokenizer) -> None:
    """Whatever the logits, the call is one that our parser reads, with arguments that validate."""
    tools = [tool("f", SCHEMAS[name])]
    for seed in range(2):
        reply = write(tool_calls(tokenizer, tools, "f"), tokenizer, seed, names=required_names(tools))
        check_calls(tokenizer, tools, reply)


def accepts(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether the grammar lets a reply be just this text, control tokens in it included."""
    for token in tokenizer.encode(text, add_bos=False, parse_special=True):
        if token not in allowed(grammar, tokenizer):
            return False
        grammar.accept(token)
    return grammar.complete


PERSON = SCHEMAS["person"]
BRIEF = {
    **PERSON,
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 9}},
}
WEATHER = {
    "name": "get-weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "unit": {"enum": ["C", "F", None]},
        },
        "required": ["city"],
    },
}
NOW = {"name": "now"}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer"}, ["0", "-12", "345"], ["1.5", "01", '"1"', "", "1 "]),
        ({"enum": ["a", "b"]}, ['"a"', '"b"'], ['"c"', "a", '"a" ']),
        (
            PERSON,
            ['{"name":"A","age":3}', '{\n  "name": "é",\n  "age": 120\n}'],
            ['{"name":"A"}', '{"age":3,"name":"A"}'],
        ),
        (
            PERSON,
            ['{"name": "A", "age": 3, "nickname": null}'],
            ['{"name":"A","age":121}', '{"name":"A","age":3,"x":1}'],
        ),
        (
            {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
            ["[]", "[true, false]"],
            ["[true,true,true]", "[1]"],
        ),
        ({"type": "string"}, ['"\\n\\"\\\\"', '"日本 😀"'], ['"\n"', '"\\x"', '"<turn|>"']),
        (SCHEMAS["recursive-5"], ["1", '{"op":"+","l":1,"r":{"op":"*","l":2,"r":3}}'], ['{"op":"-","l":1,"r":1}']),
    ],
)
def test_what_a_schema_lets_through(schema: Any, good: list[str], bad: list[str], tokenizer: Tokenizer) -> None:
    for text in good:
        assert accepts(json_schema(tokenizer, schema), tokenizer, text), text
    for text in bad:
        assert not accepts(json_schema(tokenizer, schema), tokenizer, text), text


def test_schema_as_text(tokenizer: Tokenizer) -> None:
    assert accepts(json_schema(tokenizer, '{"const": 7}'), tokenizer, "7")


def test_a_character_may_come_in_bytes(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(c, add_bos=False)[0] for c in '"']
    by_byte = {tokenizer.piece(i): i for i in range(tokenizer.vocab_size) if len(tokenizer.piece(i)) == 1}
    ids += [by_byte[bytes([b])] for b in "😀".encode()]
    grammar = json_schema(tokenizer, {"type": "string", "maxLength": 1})
    for token in ids:
        assert token in allowed(grammar, tokenizer)
        grammar.accept(token)
    assert tokenizer.decode(allowed(grammar, tokenizer)) == '"'


def test_no_blanks_without_end(tokenizer: Tokenizer) -> None:
    assert not accepts(json_schema(tokenizer, PERSON), tokenizer, '{\n\n"name":"A","age":3}')
    assert not accepts(json_schema(tokenizer, PERSON), tokenizer, '{  "name":"A","age":3}')


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        ("(yes|no), because .{3,20}", ["yes, because I say", "no, because 日本 ."], ["maybe", "yes", "yes, because I"]),
        ("[0-9]{3}-[0-9]{4}", ["555-1234"], ["555-123", "555-12345"]),
        ("[a-z\n]{0,30}x", ["x", "a\nx"], ["a"]),
    ],
)
def test_regex(pattern: str, good: list[str], bad: list[str], tokenizer: Tokenizer) -> None:
    assert all(accepts(regex(tokenizer, pattern), tokenizer, text) for text in good)
    assert not any(accepts(regex(tokenizer, pattern), tokenizer, text) for text in bad[:1])
    for seed in range(3):
        assert re.fullmatch(pattern, tokenizer.decode(write(regex(tokenizer, pattern), tokenizer, seed)))


def test_lark(tokenizer: Tokenizer) -> None:
    source = 'start: sum\nsum: term ("+" term)*\nterm: NUMBER | "(" sum ")"\nNUMBER: /[0-9]{1,3}/'
    assert accepts(lark(tokenizer, source), tokenizer, "1+(22+(3))+444")
    assert not accepts(lark(tokenizer, source), tokenizer, "1+(2")
    assert not accepts(lark(tokenizer, source), tokenizer, "1-2")
    for seed in range(5):
        text = tokenizer.decode(write(lark(tokenizer, source), tokenizer, seed))
        assert re.fullmatch(r"[0-9()+]+", text) and text.count("(") == text.count(")")


# Thinking before a form


@pytest.mark.parametrize(
    "before",
    ["", "<|channel>thought\nHm. {<channel|>", "<|channel>thought\n<channel|><|channel>thought\nYes.<channel|>"],
)
def test_thinking_first(before: str, tokenizer: Tokenizer) -> None:
    assert accepts(json_schema(tokenizer, PERSON, think=True), tokenizer, before + '{"name":"A","age":3}')
    calls = tool_calls(tokenizer, [NOW], "required", think=True)
    assert accepts(calls, tokenizer, before + "<|tool_call>call:now{}<tool_call|>")


def test_thinking_where_it_may_not_be(tokenizer: Tokenizer) -> None:
    channel = "<|channel>thought\nHm.<channel|>"
    good = '{"name":"A","age":3}'
    assert not accepts(json_schema(tokenizer, PERSON), tokenizer, channel + good)
    for bad in (
        good + channel,
        '{"name":' + channel + '"A","age":3}',
        "<|channel>thought\nHm",
        "<|channel>a<turn|>",
        channel,
    ):
        assert not accepts(json_schema(tokenizer, PERSON, think=True), tokenizer, bad), bad


# Tool calls


def test_calls_in_the_format_of_the_template(tokenizer: Tokenizer) -> None:
    """What the chat template writes for a call is what the grammar takes."""
    good = [
        '<|tool_call>call:get-weather{city:<|"|>New "York", {x}<|"|>}<tool_call|>',
        '<|tool_call>call:get-weather{days:14,unit:<|"|>C<|"|>,city:<|"|><|"|>}<tool_call|>',
        '<|tool_call>call:get-weather{unit:null,city:<|"|>a<|"|>}<tool_call|><|tool_call>call:now{}<tool_call|>',
    ]
    bad = [
        "",
        "Well, ",
        '<|tool_call>call:get_weather{city:<|"|>a<|"|>}<tool_call|>',
        "<|tool_call>call:get-weather{days:3}<tool_call|>",
        '<|tool_call>call:get-weather{city:<|"|>a<|"|>,days:15}<tool_call|>',
        '<|tool_call>call:get-weather{city:<|"|>a<|"|>,city:<|"|>b<|"|>}<tool_call|>',
        '<|tool_call>call:get-weather{city:"a"}<tool_call|>',
        '<|tool_call>call:get-weather{city:<|"|>a<|"|>,town:1}<tool_call|>',
        '<|tool_call>call:get-weather{city:<|"|>a<|"|>}',
        "<|tool_call>call:now{a:1}<tool_call|>",
    ]
    for text in good:
        assert accepts(tool_calls(tokenizer, [WEATHER, NOW], "required"), tokenizer, text), text
    for text in bad:
        assert not accepts(tool_calls(tokenizer, [WEATHER, NOW], "required"), tokenizer, text), text


def test_one_call_of_the_named_tool(tokenizer: Tokenizer) -> None:
    call = "<|tool_call>call:now{}<tool_call|>"
    for options in ({"choice": "now"}, {"choice": "required", "parallel": False}):
        grammar = tool_calls(tokenizer, [WEATHER, NOW], **options)
        assert accepts(grammar, tokenizer, call) and grammar.finished
        assert set(allowed(grammar, tokenizer)) <= tokenizer.stop_ids
    assert not accepts(
        tool_calls(tokenizer, [WEATHER, NOW], "now"),
        tokenizer,
        '<|tool_call>call:get-weather{city:<|"|>a<|"|>}<tool_call|>',
    )


def test_auto_leaves_text_free_and_holds_calls_to_their_schema(tokenizer: Tokenizer) -> None:
    call = '<|tool_call>call:get-weather{city:<|"|>a<|"|>}<tool_call|>'
    for good in (
        "",
        "Just {text}.",
        call,
        f"Let me see. {call}",
        f"{call}{call} So.",
        f"<|channel>thought\nHm.<channel|>{call}",
    ):
        grammar = tool_calls(tokenizer, [WEATHER, NOW], "auto")
        assert accepts(grammar, tokenizer, good), good
        assert not grammar.finished
        assert tokenizer.stop_ids <= set(allowed(grammar, tokenizer))
    for bad in (
        "<|tool_call>call:other{}<tool_call|>",
        f"Let me <|tool_call>{call}",
        '<|"|>',
        "<|turn>",
        "<|tool_call>call:now{",
    ):
        assert not accepts(tool_calls(tokenizer, [WEATHER, NOW], "auto"), tokenizer, bad), bad


def test_what_a_call_cannot_be_held_to_is_left_out(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    schema = {"type": "string", "pattern": "(?=look)ahead", "format": "no-such", "contentEncoding": "base64"}
    assert accepts(
        tool_calls(tokenizer, [tool("f", schema)], "f"), tokenizer, '<|tool_call>call:f{v:<|"|>x<|"|>}<tool_call|>'
    )
    assert "isn't enforced" in caplog.text


def test_keys_that_cannot_stand_bare(tokenizer: Tokenizer) -> None:
    names = ["a b", "c:d", "", "e{", "日", "f-g", "h.i", "(j)", "k=l"]
    parameters = {"type": "object", "properties": {name: {"const": 1} for name in names}, "required": names}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    (call,) = check_calls(tokenizer, tools, write(tool_calls(tokenizer, tools, "f"), tokenizer, 1, free=400))
    assert call.arguments == dict.fromkeys(names, 1)


@pytest.mark.parametrize("many", [64, 70])
def test_many_keys(many: int, tokenizer: Tokenizer) -> None:
    """Beyond the bits of a rule's parameter, keys may stay out."""
    names = [f"k{i:02}" for i in range(many)]
    parameters = {"type": "object", "properties": {name: {"type": "null"} for name in names}, "required": names[:10]}
    grammar = tool_calls(tokenizer, [{"name": "f", "parameters": parameters}], "f")
    assert accepts(grammar, tokenizer, "<|tool_call>call:f{" + ",".join(f"{n}:null" for n in names) + "}<tool_call|>")
    grammar = tool_calls(tokenizer, [{"name": "f", "parameters": parameters}], "f")
    assert not accepts(
        grammar, tokenizer, "<|tool_call>call:f{" + ",".join(f"{n}:null" for n in names[1:]) + "}<tool_call|>"
    )


# Refusals: in one line, with the place


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"properties": {"a": {"items": {"type": "strin"}}}}, "schema at /properties/a/items: Invalid type: strin"),
        ({"type": "object", "properties": {"a": {"not": {}}}}, "schema at /properties/a: Unimplemented keys"),
        ({"anyOf": [{"type": "null"}, {"$ref": "#/nowhere"}]}, "schema at /anyOf/1: Pointer '/nowhere' does not exist"),
        ({"$ref": "https://example.org/schema"}, "schema: Resource"),
        ({"properties": {"p": {"type": "string", "pattern": "(?=a)"}}}, "schema at /properties/p: look-around"),
        ({"oneOf": [{"type": "string"}, {"minLength": 1}]}, "schema: oneOf"),
        ({"type": "string", "format": "no-such"}, "Unknown format: no-such"),
        ({"type": "integer", "minimum": 5, "maximum": 2}, "minimum (5) is greater than maximum (2)"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "properties": []}, "properties must be an object"),
        ({"type": "integer", "multipleOf": 1234567.1}, "multipleOf 1234567.1 have too large a common multiple"),
        ({"allOf": [{"type": "integer", "multipleOf": p} for p in (97, 89, 83)]}, "common multiple"),
        ({"type": "string", "pattern": "a?" * MAX_REGEX}, f"a pattern has over {MAX_REGEX} characters"),
        ({"enum": [f"value {i}" for i in range(10_000)]}, "at most 65536 are allowed"),
        ({"const": "\ud800"}, "schema"),
        ({"const": object()}, "can't be written as JSON"),
        ("{", "schema: is not JSON"),
        ("[1]", "schema: must be a JSON object"),
        (False, "schema: must be a JSON object"),
        ("[" * 100_000, "schema: is not JSON"),
    ],
)
def test_refused_schema(schema: Any, says: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError) as error:
        json_schema(tokenizer, schema)
    assert says in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("tools", "choice", "says"),
    [
        ([], "required", "there are none to call"),
        ([NOW], "then", "none is called 'then'"),
        (["now"], "required", "number 1 must be a function"),
        ([{"function": {"name": "a b"}}], "required", "number 1 must be a function with a name"),
        (
            [NOW, {"name": "f", "parameters": []}, {"name": "f", "parameters": [1]}],
            "auto",
            "the parameters of f must be",
        ),
        ([tool("f", {"type": "strin"})], "f", "tools: f, parameters/properties/v: there is no type 'strin'"),
        ([tool("f", {"$ref": "#/a"})], "f", "there is nothing at the reference '#/a'"),
        ([tool("f", {"$ref": "https://x"})], "f", "must point into the tool's own schema"),
        ([tool("f", {"type": "array", "minItems": -1})], "f", "minItems must be a count, 0 or more, not -1"),
        ([tool("f", False)], "f", "false is no schema"),
        ([tool("f", {"anyOf": [{"type": "string"}, 7]})], "f", "parameters/properties/v/anyOf/1: 7 is no schema"),
        ([tool("f", {"properties": {"a": 1}, "required": "a"})], "f", "required must be a list of names"),
        ([tool("f", {"allOf": [{"$ref": "#/properties/v"}]})], "f", "nested too deeply"),
        ([tool("f", {"enum": ["x" * 300_000]})], "f", "at most 65536"),
        ([tool(f"f{i}", {"enum": ["x" * 60_000]}) for i in range(6)], "required", "make them simpler"),
        ([tool("f", {"type": "integer", "multipleOf": 1000003})], "f", "too large a common multiple"),
        ([tool("f", {"const": float("nan")})], "f", "tools: can't be written as JSON"),
    ],
)
def test_refused_tools(tools: Any, choice: str, says: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError) as error:
        tool_calls(tokenizer, tools, choice)
    assert says in str(error.value)
    assert len(str(error.value)) < 400


def test_refused_regex_and_lark(tokenizer: Tokenizer) -> None:
    for make, source, says in (
        (regex, "(?=a)b", "regex: look-around"),
        (regex, "[", "regex: unclosed character class"),
        (regex, "a" * (MAX_REGEX + 1), "at most 4000"),
        (lark, "start: missing", "grammar: "),
        (lark, "no start", "grammar: "),
        (lark, 'start: "a"\n' * 10_000, "make it shorter"),
    ):
        with pytest.raises(InputError, match=says):
            make(tokenizer, source)


def test_a_vocabulary_without_calls(tokenizer: Tokenizer) -> None:
    plain = Tokenizer(
        ["<bos>", "<eos>", "a"], [CONTROL, CONTROL, NORMAL], lambda text: [2] * len(text), [0, 1], bos_id=0
    )
    with pytest.raises(
        InputError, match="this model can't call any: its vocabulary has no <|tool_call>".replace("|", r"\|")
    ):
        tool_calls(plain, [NOW], "required")
    assert accepts(regex(plain, "aaa", think=True), plain, "aaa")


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 2000)
    | st.floats()
    | st.sampled_from(["", "string", "#", "^a", "(", "é\n"]),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.sampled_from(KEYWORDS), part, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(KEYWORDS), JUNK, max_size=4))
@settings(max_examples=150, deadline=None)
def test_junk_is_refused_in_a_line_or_works(tokenizer: Tokenizer, schema: dict[str, Any]) -> None:
    for make in (json_schema, lambda t, s: tool_calls(t, [{"name": "f", "parameters": {"properties": {"v": s}}}], "f")):
        try:
            make(tokenizer, schema).mask()
        except InputError as error:
            assert len(str(error)) < 600  # noqa: PT017


HOSTILE = {
    "references in a row": {
        "$ref": "#/$defs/r0",
        "$defs": {**{f"r{i}": {"$ref": f"#/$defs/r{i + 1}"} for i in range(1500)}, "r1500": {"type": "null"}},
    },
    "objects in a row": {
        "$ref": "#/$defs/r0",
        "$defs": {
            **{f"r{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/r{i + 1}"}}} for i in range(600)},
            "r600": {"type": "null"},
        },
    },
    "a reference to itself": {"$ref": "#"},
    "no end": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "a long list": {"type": "array", "minItems": 100_000, "maxItems": 1_000_000_000, "items": {"type": "integer"}},
    "a long text": {"type": "string", "minLength": 10_000_000},
    "many keys": {"properties": {f"k{i}": {"type": "string"} for i in range(1000)}},
    "many repetitions": {"type": "string", "pattern": "^((a{500}){500}){500}$"},
    "deep": json.loads('{"items":' * 300 + "{}" + "}" * 300),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_ends_nothing(name: str, tokenizer: Tokenizer) -> None:
    """It is refused, or makes a grammar that answers; the process lives on, and soon."""
    start = time.perf_counter()
    with suppress(InputError):
        json_schema(tokenizer, HOSTILE[name]).mask()
    assert time.perf_counter() - start < 20


def test_hostile_lark(tokenizer: Tokenizer) -> None:
    for rule in ("r{}: r{}", "R{}: R{} /b/"):
        lines = [rule.format(i, i + 1) for i in range(900)]
        lark(tokenizer, "\n".join([f"start: {rule[0]}0", *lines, f'{rule[0]}900: "a"'])).mask()
    doubled = [f"A{i}: A{i + 1} A{i + 1}" for i in range(100)]
    with pytest.raises(InputError, match="too big"):
        lark(tokenizer, "\n".join(["start: A0", *doubled, 'A100: "a"']))
    with pytest.raises(InputError, match="too large a common multiple"):
        lark(tokenizer, 'start: %json {"type": "integer", "multipleOf" : 10000019}')


# What it costs


def test_a_mask_takes_under_a_millisecond_at_the_real_size() -> None:
    """262,144 tokens with the lengths of words; the median over a reply, in a core's time."""
    letters = "abcdefghijklmnopqrstuvwxyz        ABCDEFGHIJKL0123456789,.:;{}[]\"'\\\n"
    noise = "".join(random.Random(0).choices(letters, k=400_000))
    words = dict.fromkeys([*map(chr, range(32, 127)), *(noise[i : i + 2 + i % 10] for i in range(400_000))])
    tokens = ["<bos>", "<eos>", *list(words)[:262_142]]
    assert len(tokens) == 262_144
    ids = {token: i for i, token in enumerate(tokens)}
    real = Tokenizer(
        tokens,
        [CONTROL, CONTROL] + [NORMAL] * 262_142,
        lambda text: [ids[c] for c in text],
        [0, 1],
        bos_id=0,
        stop_ids=[1],
    )
    grammar, times = json_schema(real, SCHEMAS["quiz"]), []
    text = '{"question": "What is the height of the tower?", "options": ["a", "b, c", "d", "none"], "answer": 2}'
    for token in real.encode(text, add_bos=False):
        start = time.process_time()
        mask = grammar.mask()
        grammar.accept(token)
        times.append(time.process_time() - start)
        assert mask[token // 32] >> token % 32 & 1
    assert grammar.complete
    assert statistics.median(times) < 1e-3


def test_a_vocabulary_is_made_once_and_goes_with_its_tokenizer() -> None:
    lm = load()
    assert vocabulary(lm.tokenizer) is vocabulary(lm.tokenizer)
    json_schema(lm.tokenizer, PERSON).mask()
    gone = weakref.ref(lm.tokenizer)
    del lm
    gc.collect()
    assert gone() is None


# With the demo


@pytest.mark.parametrize("name", ["sentiment", "matrix", "feature", "enum-6", "card", "translation"])
def test_the_demo_under_a_schema(name: str, lm) -> None:
    sampling = Sampling(temperature=1.0, seed=5)
    judge(generate(lm, "Once upon a time", schema=SCHEMAS[name], sampling=sampling, max_tokens=400), SCHEMAS[name])


def test_schema_stop_and_logprobs_together(lm) -> None:
    """A stop string inside JSON cuts it; log-probabilities are the model's own, before the mask."""
    sampling = Sampling(temperature=1.0, seed=5, frequency_penalty=0.3, logit_bias={300: -3.0})
    whole = list(stream(lm, "Once", schema=BRIEF, sampling=sampling, logprobs=3, max_tokens=200))
    text = "".join(chunk.text for chunk in whole)
    judge(text, BRIEF)
    assert whole[-1].statistics.stop_reason == "stop"
    cut = list(stream(lm, "Once", schema=BRIEF, sampling=sampling, logprobs=3, max_tokens=200, stop=['"age"', "zzz"]))
    assert "".join(chunk.text for chunk in cut) == text[: text.index('"age"')]
    assert cut[-1].statistics.stop_reason == "stop"
    tokens = [chunk.token for chunk in whole if chunk.token]
    assert all(len(token.top) == 3 and token.logprob is not None and token.logprob <= 0 for token in tokens)
    assert any(token.id not in dict(token.top) for token in tokens), "the schema never had to bend the model"
    plain = list(stream(lm, "Once", schema=BRIEF, sampling=sampling, max_tokens=200))
    assert "".join(chunk.text for chunk in plain) == text


def test_cut_by_length_is_said(lm) -> None:
    last = list(stream(lm, "Once", schema=PERSON, max_tokens=3))[-1]
    assert (last.statistics.stop_reason, last.statistics.reply_tokens) == ("length", 3)


def test_the_state_after_a_reply_to_a_schema(lm) -> None:
    """It holds the prompt and what was handed out, and goes on as any other."""
    state = lm.model.new_state()
    schema, sampling = {"enum": ["red", "blue"]}, Sampling(temperature=0)
    ids = lm.encode_prompt("Once")
    tokens = [chunk.token.id for chunk in stream(lm, ids, schema=schema, sampling=sampling, state=state) if chunk.token]
    assert state.tokens[: len(ids) + len(tokens)] == ids + tokens
    assert set(state.tokens[len(ids) + len(tokens) :]) <= lm.tokenizer.stop_ids
    fresh = generate(
        lm, [*state.tokens, *lm.encode_prompt("And?", after=state.tokens)], sampling=sampling, max_tokens=5
    )
    assert generate_on(lm, state, "And?", sampling) == fresh


def generate_on(lm, state, prompt: str, sampling: Sampling) -> str:
    return "".join(chunk.text for chunk in stream(lm, prompt, sampling=sampling, max_tokens=5, state=state))


def test_tools_required_of_the_demo(lm) -> None:
    """It has never seen a tool: the grammar alone makes its calls."""
    sampling = Sampling(temperature=1.0, seed=2)
    weather = {"type": "function", "function": {**WEATHER, "parameters": json.loads(json.dumps(WEATHER["parameters"]))}}
    weather["function"]["parameters"]["properties"]["city"]["maxLength"] = 20
    options = ReplyOptions(tools=[weather], tool_choice="get-weather", sampling=sampling, max_tokens=300)
    reply = chat(lm, [{"role": "user", "content": "How is the weather in Rome?"}], options)
    assert reply.finish_reason == "tool_calls" and reply.text == ""
    jsonschema.validate(reply.tool_calls[0].arguments, weather["function"]["parameters"])


def test_think_then_answer_in_json(lm) -> None:
    events = list(stream(lm, "Once", think=True, schema={"enum": [1, 2]}, sampling=Sampling(temperature=1, seed=1)))
    assert "".join(chunk.text for chunk in events) in ("1", "2")
