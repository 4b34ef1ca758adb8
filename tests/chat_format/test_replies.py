"""Replies as events: cut anywhere, a transcript gives what it gives uncut; no control token and no cut call shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import vocabs
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_gemma4.chat_format.calls import MAX_DEPTH
from mlx_gemma4.chat_format.replies import CallPart, Event, ReplyParser, Text, Thinking, ToolCall, ends_in_thinking

TOKENIZER = vocabs.tokenizer("gemma4")

# A transcript is made of texts, which are only text however they are spelled, and of control tokens: Control("<x|>").


class Control(str):
    """The name of a control token."""


THINK, ANSWER, CALL, CALLED, QUOTE = map(Control, ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'))
Part = str | Control


def ids(parts: list[Part], by: str = "token") -> list[int]:
    """The transcript in the tokenizer's own tokens, or character by character, or byte by byte."""
    found: list[int] = []
    for part in parts:
        if isinstance(part, Control):
            token = TOKENIZER.token_id(part)
            assert token is not None
            found.append(token)
        elif by == "token":
            found += TOKENIZER.encode(part, add_bos=False)
        elif by == "character":
            found += [token for c in part for token in TOKENIZER.encode(c, add_bos=False)]
        else:
            found += [TOKENIZER.encode("\x00", add_bos=False)[0] + byte for byte in part.encode()]
    return found


def pushed(tokens: list[int], *, thinking_open: bool = False) -> Iterator[Event]:
    parser = ReplyParser(TOKENIZER, thinking_open=thinking_open)
    for token in tokens:
        yield from parser.push(token)
    yield from parser.finish()


def joined(events: Iterator[Event] | list[Event]) -> list[Event]:
    """Neighbouring pieces of text or of thinking as one."""
    found: list[Event] = []
    for event in events:
        if not isinstance(event, ToolCall) and found and type(found[-1]) is type(event):
            event = type(event)(found.pop().text + event.text)  # type: ignore[union-attr]
        found.append(event)
    return found


def read(*parts: Part, by: str = "token") -> list[Event]:
    return joined(pushed(ids(list(parts), by)))


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall("", name, arguments, "")


def same(events: list[Event], wanted: list[Event]) -> bool:
    """Equal but for the sources of calls."""

    def bare(events: list[Event]) -> list[Event]:
        return [ToolCall("", e.name, e.arguments, "") if isinstance(e, ToolCall) else e for e in events]

    return bare(events) == wanted


def written(value: Any) -> list[Part]:
    """A value as Gemma 4 writes it in a call."""
    if isinstance(value, str):
        return [QUOTE, value, QUOTE]
    if isinstance(value, dict):
        pairs = [[key + ":", *written(x)] for key, x in value.items()]
    elif isinstance(value, list):
        pairs = [written(x) for x in value]
    else:
        return [json.dumps(value)]
    inside = [part for i, pair in enumerate(pairs) for part in ([",", *pair] if i else pair)]
    return ["{", *inside, "}"] if isinstance(value, dict) else ["[", *inside, "]"]


# What is asked for by name


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ('call:get_time{city:<|"|>London<|"|>}', call("get_time", city="London")),
        ("call:empty{}", call("empty")),
        ("call:f{a:42,b:-7,c:3.14,d:1.5e10,e:true,f:false,g:null}",
         call("f", a=42, b=-7, c=3.14, d=1.5e10, e=True, f=False, g=None)),
        ('call:todo{todos:[<|"|>buy milk<|"|>,<|"|>walk dog<|"|>],none:[]}',
         call("todo", todos=["buy milk", "walk dog"], none=[])),
        ('call:set{config:{theme:<|"|>dark<|"|>,inner:{deep:[{x:1}]},e:{}}}',
         call("set", config={"theme": "dark", "inner": {"deep": [{"x": 1}]}, "e": {}})),
        ("call:manim-video{}", call("manim-video")),
        ("call:math.add{}", call("math.add")),
        ("call:google:mcp:create-pdf{}", call("google:mcp:create-pdf")),
        ("call:größe{länge:2}", call("größe", länge=2)),
        ('call:run{code:<|"|>if (x) { return {"a": [1]}; } // }<|"|>}',
         call("run", code='if (x) { return {"a": [1]}; } // }')),
        ('call:say{text:<|"|>She said "hi", \\n it\'s fine, 100%<|"|>}',
         call("say", text='She said "hi", \\n it\'s fine, 100%')),
        # Where models stray
        ('call:terminal(command:<|"|>ls -a<|"|>)', call("terminal", command="ls -a")),
        ('call:terminal(command="ls (a)", n=2)', call("terminal", command="ls (a)", n=2)),
        ("call:f({\"a\": {\"b\": [1, \"x\"]}})", call("f", a={"b": [1, "x"]})),
        ("call:f()", call("f")),
        ('call:f{"city": "São \\u0050aulo \\"x\\" \\ud83d\\ude00"}', call("f", city='São Paulo "x" 😀')),
        ("call:f{path: 'it\\'s, {a}.pdf'}", call("f", path="it's, {a}.pdf")),
        ('call:f{<|"|>two words<|"|>:1}', call("f", **{"two words": 1})),
        ("call:f{date: 2024-01-05, zip: 007, big: 1e999, word: New York}",
         call("f", date="2024-01-05", zip="007", big="1e999", word="New York")),
        (f"call:f{{digits: {'1' * 400}, more: {'1' * 5000}}}", call("f", digits="1" * 400, more="1" * 5000)),
        ("call:f(yes=True, no=False, none=None)", call("f", yes=True, no=False, none=None)),
        (" call: f { a : 1 , b : [ 1 , 2 , ] , } ", call("f", a=1, b=[1, 2])),
        ('call:f{\n  a: <|"|>x<|"|>,\n  b: 2\n}\n', call("f", a="x", b=2)),
    ],
)  # fmt: skip
def test_calls_that_can_be_read(source: str, wanted: ToolCall) -> None:
    tokens = TOKENIZER.encode(f"<|tool_call>{source}<tool_call|>", add_bos=False, parse_special=True)
    (event,) = pushed(tokens)
    assert same([event], [wanted])
    assert isinstance(event, ToolCall) and event.raw == source.strip().replace('<|"|>', '"')
    assert event.id.startswith("call_") and event.id != next(pushed(tokens)).id  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "source",
    [
        "",
        "call",
        "call:",
        "call:f",
        "call:{}",
        "call:f{",
        "call:f{a}",
        "call:f{a:}",
        "call:f{a:1",
        "call:f{a:1]",
        "call:f(1, 2)",
        'call:f("London")',
        'call:f{a:"x}',
        "call:f{a:1 b:{}}",
        "call:f{,}",
        "get_time{}",
        "I would call: it {} off",
        "call:f{a:" + "[" * 1000,
        "call:f{a:" + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1) + "}",
    ],
)
def test_what_is_no_call_is_text(source: str) -> None:
    assert read("so: ", CALL, source, CALLED, " ok") == [Text(f"so: {source} ok")]
    begun = re.match(r"call$|call:", source)  # the reply ends inside it: no notation is shown
    assert read("so: ", CALL, source) == [Text("so: " if begun else f"so: {source}")]


def test_thinking_answer_and_calls() -> None:
    parts = [THINK, "thought\nI'm\nthinking", ANSWER, "Hello!", CALL, "call:a{}", CALLED, CALL, "call:b{}", CALLED]
    assert same(read(*parts), [Thinking("I'm\nthinking"), Text("Hello!"), call("a"), call("b")])
    assert same(read(CALL, "call:a{}call:b{x:1}, call:c()\n", CALLED), [call("a"), call("b", x=1), call("c")])
    assert same(read(CALL, "call:a{} and so on", CALLED), [call("a"), Text(" and so on")])
    assert same(read(CALL, "call:a{}", CALL, "call:b{}"), [call("a"), call("b")])  # nobody closed them
    assert same(read(CALL, "call:a{}", THINK, "thought\nhm"), [call("a"), Thinking("hm")])


def test_channels_as_they_come() -> None:
    assert read(THINK, "thought\nno end") == [Thinking("no end")]
    assert read(THINK, "thought\n", ANSWER, "Hi") == [Text("Hi")]
    assert read(THINK, "thought", ANSWER, "Hi", ANSWER) == [Text("Hi")]
    assert read(THINK, THINK, "thought\nx", ANSWER, "Hi", THINK, ANSWER) == [Thinking("x"), Text("Hi")]
    assert read(THINK, "thoughtful", ANSWER, "Hi") == [Thinking("thoughtful"), Text("Hi")]
    assert read(THINK, "analysis\nx", ANSWER, "Hi") == [Thinking("analysis\nx"), Text("Hi")]
    assert read(THINK, "tho", ANSWER, "Hi") == [Thinking("tho"), Text("Hi")]
    assert read(THINK, "thought\na", CALL, "call:f{}", CALLED, "b", ANSWER, "c")[::2] == [Thinking("a"), Thinking("b")]
    assert joined(pushed(ids(["hm", ANSWER, "Hi"]), thinking_open=True)) == [Thinking("hm"), Text("Hi")]


def test_a_prompt_may_end_in_thinking() -> None:
    for parts, wanted in (([], False), ([THINK, "thought\n"], True), ([THINK, "x", ANSWER], False), (["x"], False)):
        assert ends_in_thinking(TOKENIZER, ids(parts)) == wanted
    assert not ends_in_thinking(vocabs.tokenizer("llama"), [5, 6])


def test_control_tokens_never_show() -> None:
    every = sorted(TOKENIZER.control_ids)
    assert joined(pushed([token for token in every for _ in range(2)])) == []
    for token in every:
        for around in (["a", "b"], [THINK, "thought\na", "b"], [CALL, "call:f{x:a", "b}", CALLED]):
            parser, shown = ReplyParser(TOKENIZER), ""
            tokens = [*ids(around[:-2] if len(around) > 2 else around[:1]), token, *ids(around[-2:])]
            for event in [e for t in tokens for e in parser.push(t)] + parser.finish():
                shown += event.raw if isinstance(event, ToolCall) else event.text  # type: ignore[union-attr]
            assert not any(f"{mark}>" in shown for mark in ("|", "eos", "bos"))


def test_a_cut_call_never_shows() -> None:
    for cut in ("", "c", "call", "call:", "call:f", "call:f{a:"):
        assert read("Hm. ", CALL, cut) == [Text("Hm. ")]
    assert read("Hm. ", CALL, "call:f{a:", QUOTE, "Lon") == [Text("Hm. ")]
    assert same(read(CALL, "call:f{}, call:g{x"), [call("f")])
    assert read(CALL, "I can't") == [Text("I can't")]  # no call at all
    assert same(read(CALL, "call:f{}"), [call("f")])  # all there but for the token that ends it


def test_half_a_character_shows_as_such() -> None:
    first = ids(["é"], "byte")[:1]
    assert joined(pushed(first)) == [Text("\ufffd")]
    assert joined(pushed([*ids(["a"]), *first, *ids([THINK, "thought\nb"])])) == [Text("a\ufffd"), Thinking("b")]
    assert joined(pushed([*ids([CALL, "call:f{a:", QUOTE]), *first, *ids([QUOTE, "}"])])) == [call_like("\ufffd")]


def call_like(value: str) -> ToolCall:
    return ToolCall("", "f", {"a": value}, f'call:f{{a:"{value}"}}')


def test_quote_tokens_in_other_quotes() -> None:
    assert same(read(CALL, 'call:f{a:"say ', QUOTE, "x", QUOTE, '"}', CALLED), [call("f", a='say "x"')])


def test_spelled_control_tokens_are_text() -> None:
    for name in ("<|tool_call>call:f{}<tool_call|>", "<|channel>thought\nx<channel|>", "<turn|>", '<|"|>'):
        assert read(name) == [Text(name)]
        wanted = call("f", a=name)
        assert same(read(CALL, "call:f{a:", QUOTE, name, QUOTE, "}", CALLED), [wanted])


def test_a_vocabulary_without_these_tokens() -> None:
    small = vocabs.tokenizer("llama")
    parser = ReplyParser(small)
    tokens = small.encode("call:f{} thought", add_bos=False)
    text = "".join(e.text for t in tokens for e in parser.push(t))  # type: ignore[union-attr]
    assert text + "".join(e.text for e in parser.finish()) == small.decode(tokens)  # type: ignore[union-attr]


# Calls while they are written


def pieces_of(*parts: Part, by: str = "token") -> tuple[list[str], list[ToolCall]]:
    """The arguments that each call's pieces make, and the calls; what is left of calls that no ToolCall followed."""
    parser = ReplyParser(TOKENIZER, parts=True)
    events = [event for token in ids(list(parts), by) for event in parser.push(token)] + parser.finish()
    made: dict[str, str] = {}
    for event in events:
        if isinstance(event, CallPart):
            made[event.id] = made.get(event.id, "") + event.json
    return list(made.values()), [event for event in events if isinstance(event, ToolCall)]


def test_arguments_come_while_they_are_written() -> None:
    source = ["call:f{a:", QUOTE, 'He said "hi"\n', "é🧚", QUOTE, ",b:{c:[1,true,null,-2.5],d:[]},e:{},f:word}"]
    for by in ("token", "character", "byte"):
        pieces, calls = pieces_of(CALL, *source, CALLED, by=by)
        assert pieces == [json.dumps(calls[0].arguments, ensure_ascii=False)]
    assert pieces_of(CALL, *source[:3]) == (['{"a": "He said \\"hi\\"\\n'], [])
    assert pieces_of(CALL, "call:f{a:1,b:[2")[0] == ['{"a": 1, "b": [']  # 2 may become 25


# Every cut

HARD = [
    "thought",
    "\n",
    "call:",
    "{",
    "}",
    "(",
    ")",
    "[",
    "]",
    '"',
    "'",
    ",",
    ":",
    "\\",
    "<|",
    "|>",
    "é",
    "日本",
    "🧚🏽",
    " ",
]
# "▁" is how the tokenizer writes a space: as text, the two can't be told apart.
texts = st.one_of(st.text(max_size=12), st.lists(st.sampled_from(HARD), max_size=6).map("".join)).map(
    lambda text: text.encode("utf-8", "replace").decode().replace("▁", " ")
)
names = st.from_regex(r"[A-Za-z_][\w.:-]{0,8}\w", fullmatch=True)
keys = st.from_regex(r"[A-Za-z_][\w-]{0,6}", fullmatch=True)
numbers = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
values = st.recursive(
    st.one_of(texts, numbers, st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def good(draw: st.DrawFn) -> tuple[list[Part], list[Event]]:
    """A part of a reply as it should be, and the events it stands for."""
    kind = draw(st.sampled_from(["text", "thinking", "call", "python", "json"]))
    text = draw(texts)
    if kind == "text":
        return [text], [Text(text)] if text else []
    if kind == "thinking":
        return [THINK, "thought\n" + text, ANSWER], [Thinking(text)] if text else []
    name, arguments = draw(names), draw(st.dictionaries(keys, values, max_size=3))
    wanted: list[Event] = [ToolCall("", name, arguments, "")]
    if kind == "call":
        return [CALL, f"call:{name}", *written(arguments), CALLED], wanted
    if kind == "json":
        return [CALL, f"call:{name}{json.dumps(arguments, ensure_ascii=draw(st.booleans()))}", CALLED], wanted
    pairs = ", ".join(f"{key}={json.dumps(value)}" for key, value in arguments.items())
    return [CALL, f"call:{name}({pairs})", CALLED], wanted


anything = st.lists(
    st.one_of(
        st.sampled_from([THINK, ANSWER, CALL, CALLED, QUOTE, "thought\n", "call:f{a:", "}", "call:g("]),
        texts,
        good().map(lambda made: made[0]),
    ),
    max_size=6,
).map(lambda parts: [x for part in parts for x in (part if isinstance(part, list) else [part])])


@given(st.lists(good(), max_size=5))
@settings(max_examples=300, deadline=None)
def test_a_good_reply_is_what_it_stands_for(made: list[tuple[list[Part], list[Event]]]) -> None:
    parts = [part for some, _ in made for part in some]
    wanted = joined([event for _, events in made for event in events])
    for by in ("token", "character", "byte"):
        assert same(read(*parts, by=by), wanted)


@given(anything)
@example([CALL, "call:f{a:", QUOTE, "é🧚", QUOTE, ",b:{c:[1,2]}}", CALLED, "x", THINK, "thought\nhm", ANSWER, "."])
@settings(max_examples=200, deadline=None)
def test_every_cut_of_any_reply(parts: list[Part]) -> None:
    """By characters, by bytes, and ended after each token."""
    whole = read(*parts)
    assert read(*parts, by="character") == whole
    assert read(*parts, by="byte") == whole
    tokens = ids(parts)
    for end in range(len(tokens)):
        assert_begins(joined(pushed(tokens[:end])), whole, tokens[:end])


def assert_begins(cut: list[Event], whole: list[Event], tokens: list[int]) -> None:
    """A reply that was cut says what the whole one says, up to the call or the character it was cut in."""
    source = unfinished_call(tokens)
    if source is not None and cut and isinstance(cut[-1], Text):
        assert cut[-1].text.endswith(source)
        rest = cut[-1].text[: len(cut[-1].text) - len(source)]
        cut = [*cut[:-1], Text(rest)] if rest else cut[:-1]
    for i, event in enumerate(cut):
        if i >= len(whole) or event != whole[i]:
            assert i == len(cut) - 1, (cut, whole)
            if i < len(whole) and not isinstance(event, ToolCall):
                assert type(event) is type(whole[i])
                assert whole[i].text.startswith(event.text.rstrip("\ufffd"))  # type: ignore[union-attr]
            else:
                assert source is not None or not event.text.strip("\ufffd")  # type: ignore[union-attr]


def unfinished_call(tokens: list[int]) -> str | None:
    """What the call that the tokens end in can't be read for, as text."""
    starts = [TOKENIZER.token_id(x) for x in (CALL, CALLED, THINK)]
    last = next((i for i in reversed(range(len(tokens))) if tokens[i] in starts), None)
    if last is None or tokens[last] != starts[0]:
        return None
    events = list(pushed(tokens[last:]))
    return events[-1].text if events and isinstance(events[-1], Text) else ""


@given(anything)
@example([CALL, "call:f{a:1,a:2}", CALLED])
@example([CALL, "call:f{a:1,}call:g(x=[1,],y={})", CALLED])
@settings(max_examples=200, deadline=None)
def test_pieces_make_the_arguments(parts: list[Part]) -> None:
    pieces, calls = pieces_of(*parts)
    read = [found for piece in pieces if (found := loaded(piece)) is not None]
    assert all(call.arguments in read for call in calls)


def loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
