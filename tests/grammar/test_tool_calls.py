"""Tool calls held to their schemas: whatever the logits, our parser reads the call and its arguments validate."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from sampled import CHECKER, JUNK_SCHEMAS, accepts, allowed, write
from schemas import SCHEMAS

from mlx_gemma4 import InputError, ReplyOptions, Sampling, chat
from mlx_gemma4.chat_format.replies import ReplyParser, ToolCall
from mlx_gemma4.grammar.grammar import regex, tool_calls
from mlx_gemma4.tokens.tokenizer import CONTROL, NORMAL, Tokenizer

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


@pytest.fixture(scope="module")
def tokenizer(lm) -> Tokenizer:
    return lm.tokenizer


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


def test_calls_in_the_format_of_the_template(tokenizer: Tokenizer) -> None:
    """The grammar accepts a call as the chat template writes it."""
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
    grammar = tool_calls(tokenizer, [WEATHER, NOW], "now")
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


def test_a_vocabulary_without_calls(tokenizer: Tokenizer) -> None:
    plain = Tokenizer(
        ["<bos>", "<eos>", "a"], [CONTROL, CONTROL, NORMAL], lambda text: [2] * len(text), [0, 1], bos_id=0
    )
    with pytest.raises(
        InputError, match="this model can't call any: its vocabulary has no <|tool_call>".replace("|", r"\|")
    ):
        tool_calls(plain, [NOW], "required")
    assert accepts(regex(plain, "aaa", think=True), plain, "aaa")


@given(JUNK_SCHEMAS)
@settings(max_examples=150, deadline=None)
def test_junk_is_refused_or_works(tokenizer: Tokenizer, schema: dict[str, Any]) -> None:
    with suppress(InputError):
        tool_calls(tokenizer, [{"name": "f", "parameters": {"properties": {"v": schema}}}], "f").mask()


def test_tools_required_of_the_demo(lm) -> None:
    """It has never seen a tool: the grammar alone makes its calls."""
    sampling = Sampling(temperature=1.0, seed=2)
    weather = {"type": "function", "function": {**WEATHER, "parameters": json.loads(json.dumps(WEATHER["parameters"]))}}
    weather["function"]["parameters"]["properties"]["city"]["maxLength"] = 20
    options = ReplyOptions(tools=[weather], tool_choice="get-weather", sampling=sampling, max_tokens=300)
    reply = chat(lm, [{"role": "user", "content": "How is the weather in Rome?"}], options)
    assert reply.finish_reason == "tool_calls" and reply.text == ""
    jsonschema.validate(reply.tool_calls[0].arguments, weather["function"]["parameters"])
