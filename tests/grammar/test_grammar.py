"""Replies held to a form: 232 schemas, regular expressions, Lark; what is refused; what a mask costs."""

from __future__ import annotations

import gc
import json
import random
import re
import statistics
import time
import weakref
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from sampled import JUNK_SCHEMAS, accepts, allowed, judge, write
from schemas import SCHEMAS

from mlx_gemma4 import InputError, Sampling, generate, load, stream
from mlx_gemma4.grammar.grammar import MAX_REGEX, json_schema, lark, regex, tool_calls, vocabulary
from mlx_gemma4.tokens.tokenizer import CONTROL, NORMAL, Tokenizer

PERSON = SCHEMAS["person"]
BRIEF = {
    **PERSON,
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 9}},
}


@pytest.fixture(scope="module")
def tokenizer(lm) -> Tokenizer:
    return lm.tokenizer


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name: str, tokenizer: Tokenizer) -> None:
    """Whatever the logits, the reply parses and validates."""
    schema = SCHEMAS[name]
    for seed in range(3):
        judge(tokenizer.decode(write(json_schema(tokenizer, schema), tokenizer, seed)), schema)


def test_schemas_are_many_and_different() -> None:
    assert len({json.dumps(schema, sort_keys=True) for schema in SCHEMAS.values()}) == len(SCHEMAS) >= 200


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
    calls = tool_calls(tokenizer, [{"name": "now"}], "required", think=True)
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


def test_thinking_once(tokenizer: Tokenizer) -> None:
    """A model that could think again would do so until the reply is cut."""
    thought, good = "<|channel>thought\nHm.<channel|>", '{"name":"A","age":3}'
    assert not accepts(json_schema(tokenizer, PERSON, think=True), tokenizer, thought + thought + good)
    begun = json_schema(tokenizer, PERSON, think=True)
    begun.begin_thinking()  # the prompt has opened the channel
    assert accepts(begun, tokenizer, "Hm.<channel|>" + good)
    begun = regex(tokenizer, "a+", think=True)
    begun.begin_thinking()
    assert not accepts(begun, tokenizer, "Hm.<channel|>" + thought + "a")


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


@given(JUNK_SCHEMAS)
@settings(max_examples=150, deadline=None)
def test_junk_is_refused_or_works(tokenizer: Tokenizer, schema: dict[str, Any]) -> None:
    with suppress(InputError):
        json_schema(tokenizer, schema).mask()


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
    ids = [*state.tokens, *lm.encode_prompt(prompt, after=state.tokens)]
    return "".join(chunk.text for chunk in stream(lm, ids, sampling=sampling, max_tokens=5, state=state))


def test_think_then_answer_in_json(lm) -> None:
    events = list(stream(lm, "Once", think=True, schema={"enum": [1, 2]}, sampling=Sampling(temperature=1, seed=1)))
    assert "".join(chunk.text for chunk in events) in ("1", "2")
