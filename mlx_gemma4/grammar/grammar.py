"""Constrain replies to a JSON Schema, a regular expression, a Lark grammar or tool calls, with the library llguidance.

In: a tokenizer and the constraint. Out: a `Grammar`, which masks the tokens that may come next in one reply. The
model may think first, in its channel for that.

Text and control tokens are kept apart: a constraint on text never matches a control token, nor the reverse. Grammars
from users are compiled within size limits and on a large stack of their own, because the library recurses over them.
"""

from __future__ import annotations

import copy
import json
import math
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any, NamedTuple, TypeVar

import llguidance
import numpy as np

from ..errors import InputError
from ..tokens.tokenizer import Tokenizer
from .tool_calls import CALL, tool_call_lark

MAX_SOURCE = 1 << 16  # characters of a schema
MAX_LARK = 1 << 14  # characters of a Lark grammar: terminals that double each other take quadratic time
MAX_REGEX = 4000  # characters of a regular expression: compiling takes quadratic time
_MAX_MULTIPLE = 100_000  # the least common multiple of all numbers under multipleOf
_STACK = 256 << 20  # bytes of address space while a grammar is compiled
# Between the parts of JSON: a space, or a new line with its indentation. Given more, a model may emit blanks for ever.
_BLANKS = {"whitespace_pattern": r" |\n[ \t]{0,32}"}
_THINK = "<|channel>", "<channel|>"

T = TypeVar("T")


class Grammar:
    """The constraint on one reply, and its progress. Serves that reply only, from one thread at a time."""

    def __init__(
        self, tokenizer: Tokenizer, source: str, *, think: bool = False, lazy: bool = False, say: str = "grammar"
    ) -> None:
        """
        Args:
            source: a grammar in llguidance's own form.
            think: allow a thought channel first; one that stays empty doesn't count.
            lazy: allow any text around matches of the grammar, which begin with the token `<|tool_call>`.
            say: the name of the grammar in errors.
        """
        self._vocabulary = vocabulary(tokenizer)
        self._opens, self._closes = (tokenizer.token_id(text) for text in _THINK)
        self._may_think = (think or lazy) and None not in (self._opens, self._closes)
        self._trigger = tokenizer.token_id(CALL) if lazy else None
        self._source, self._say = source, say
        self._tokenizer = tokenizer
        self._thinking, self._thought = False, b""
        self._matcher = self._start()
        self._inside = not lazy  # the matcher takes the next token
        self._begun = False  # the matcher has taken a token
        self._stop_ids = tokenizer.stop_ids

    def mask(self) -> np.ndarray:
        """Return the tokens that may come next: uint32 words, bit i % 32 of word i // 32 for token i."""
        words = self._vocabulary.text.copy()
        if self._thinking:
            return _allow(words, self._closes)
        if not self._inside:
            return _allow(words, self._trigger, self._opens if self._may_think else None, *self._stop_ids)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check(self._matcher.is_error())
        return _allow(words, self._opens) if self._may_think and not self._begun else words

    def accept(self, token: int) -> None:
        """Advance by the token that was sampled."""
        if self._thinking:
            self._thinking = token != self._closes
            self._thought += self._tokenizer.piece(token)
            if not self._thinking and self._trigger is None:  # else a model could think until the reply is cut
                self._may_think = self._thought.strip() in (b"", b"thought")
                self._thought += b" "
        elif self._may_think and token == self._opens and not (self._begun and self._inside):
            self._thinking = True
        elif self._inside or token == self._trigger:
            if not self._inside:
                self._matcher, self._inside = self._start(), True
            self._begun = True
            self._check(not self._matcher.consume_token(token))
            if self._trigger is not None and self._matcher.is_stopped():
                self._inside = False

    def begin_thinking(self) -> None:
        """Take note that the prompt ends inside a thought channel."""
        self._thinking = True

    def fork(self) -> Grammar:
        """Return one that goes on from here by itself."""
        other = copy.copy(self)
        other._matcher = self._matcher.deep_copy()
        return other

    @property
    def finished(self) -> bool:
        """True if the reply is complete and nothing may follow."""
        return self._trigger is None and not self._thinking and self._begun and bool(self._matcher.is_stopped())

    @property
    def complete(self) -> bool:
        """True if the reply may end here."""
        return not self._thinking and (not self._inside or bool(self._matcher.is_accepting()))

    def _start(self) -> Any:
        engine = self._vocabulary.engine
        matcher = _on_large_stack(lambda: llguidance.LLMatcher(engine, self._source, log_level=0), self._say)
        if matcher.is_error():
            raise _error(self._say, _one_line(matcher.get_error()))
        return matcher

    def _check(self, failed: bool) -> None:
        if failed:
            raise _error(self._say, f"{_one_line(self._matcher.get_error())}; make it simpler")


def json_schema(tokenizer: Tokenizer, schema: Mapping[str, Any] | bool | str, *, think: bool = False) -> Grammar:
    """Return the grammar of JSON that obeys a schema (str: its JSON text), draft 2020-12 as far as llguidance knows it.

    Raises InputError, with the place in the schema.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise _error("schema", f"is not JSON ({error})") from error
    schema = {} if schema is True else schema
    if not isinstance(schema, Mapping):
        raise _error("schema", "must be a JSON object")
    _check_schema(schema, "schema")
    source = _schema_source(schema)
    try:
        return Grammar(tokenizer, source, think=think, say="schema")
    except InputError as error:
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        place = _place(vocabulary(tokenizer).engine, schema, "", shared)
        message = str(error).replace("schema:", f"schema at {place}:", 1) if place else str(error)
        raise InputError(message, field="schema") from error


def regex(tokenizer: Tokenizer, pattern: str, *, think: bool = False) -> Grammar:
    """Return the grammar of texts that a regular expression (Rust's syntax) matches whole. Raises InputError."""
    if len(pattern) > MAX_REGEX:
        raise _error("regex", f"has {len(pattern)} characters; at most {MAX_REGEX} are allowed")
    return Grammar(tokenizer, llguidance.LLMatcher.grammar_from_regex(pattern), think=think, say="regex")


def lark(tokenizer: Tokenizer, grammar: str, *, think: bool = False) -> Grammar:
    """Return a context-free grammar written in llguidance's variant of Lark. Raises InputError."""
    longest = max(map(len, grammar.splitlines()), default=0)
    if len(grammar) > MAX_LARK or longest > MAX_REGEX:
        raise _error("grammar", f"over {MAX_LARK} characters, or over {MAX_REGEX} in a line; make it shorter")
    _check_multiples(re.findall(r'"multipleOf"\s*:\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)', grammar), "grammar")
    return Grammar(tokenizer, llguidance.LLMatcher.grammar_from_lark(grammar), think=think)


def tool_calls(
    tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]], choice: str = "auto", *, think: bool = False
) -> Grammar:
    """Return the grammar of replies whose tool calls name a tool and obey its schema, as far as Gemma 4's format can.

    Args:
        tools: functions with "name" and "parameters" (a JSON schema), bare or under "function" as OpenAI has them.
        choice: "auto": text and any calls; "required": one or more calls and nothing else; a function's name: one
            call of it.

    Raises:
        InputError: a tool or `choice` can't be used, or the model's vocabulary has no tool calls.
    """
    missing = [text for text in (CALL, "<tool_call|>", '<|"|>') if tokenizer.token_id(text) is None]
    if missing:
        raise _error("tools", f"this model can't call any: its vocabulary has no {' and no '.join(missing)}")
    for tool in tools:
        if isinstance(tool, Mapping):
            _check_schema(tool, "tools")
    source = tool_call_lark(tokenizer, tools, choice)
    if len(source) > 4 * MAX_SOURCE:
        raise _error("tools", f"their schemas make a grammar of {len(source)} characters; make them simpler")
    source = llguidance.LLMatcher.grammar_from_lark(source)
    return Grammar(tokenizer, source, think=think, lazy=choice == "auto", say="tools")


class Vocabulary(NamedTuple):
    """A tokenizer in llguidance's form."""

    engine: Any  # llguidance.LLTokenizer
    text: np.ndarray  # mask of the text tokens


_vocabularies: weakref.WeakKeyDictionary[Tokenizer, Vocabulary] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Return the tokenizer's vocabulary for grammars, made once: one second for 262,144 tokens."""
    with _lock:
        made = _vocabularies.get(tokenizer)
        if made is None:
            wrapper: Any = _Wrapper(tokenizer)
            bits = np.zeros(-(-tokenizer.vocab_size // 32) * 32, bool)
            bits[: tokenizer.vocab_size] = True
            bits[wrapper.special_token_ids] = False
            engine = llguidance.LLTokenizer(wrapper, tokenizer.vocab_size, sorted(tokenizer.stop_ids))
            made = Vocabulary(engine, np.packbits(bits, bitorder="little").view(np.uint32))
            _vocabularies[tokenizer] = made
        return made


class _Wrapper:
    """The interface that llguidance asks of a tokenizer. Holds it weakly, so that both can be freed."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = min(tokenizer.stop_ids, default=tokenizer.bos_id)
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.piece(i, skip_special=False) for i in range(tokenizer.vocab_size)]
        unused = (i for i, piece in enumerate(self.tokens) if piece.startswith(b"<unused"))
        self.special_token_ids = sorted({*tokenizer.control_ids, *unused})  # never part of text
        self._encode = weakref.WeakMethod(tokenizer.encode)

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text: where a grammar leaves only one, it is written in the model's usual tokens."""
        encode = self._encode()
        return encode(text, add_bos=False) if encode else []


def _allow(words: np.ndarray, *tokens: int | None) -> np.ndarray:
    for token in tokens:
        if token is not None:
            words[token // 32] |= np.uint32(1 << token % 32)
    return words


def _on_large_stack(work: Callable[[], T], say: str) -> T:
    """Run `work` in a thread with a stack for deep recursion: an overflow would end the process. `say`: for errors."""
    with _lock:
        before = threading.stack_size(_STACK)
        try:
            thread = ThreadPoolExecutor(1)
            result = thread.submit(work)
        finally:
            threading.stack_size(before)
    with thread:
        error = result.exception()  # the library's panics are not Exceptions
    if error:
        raise _error(say, f"can't be used ({error})") from error
    return result.result()


def _error(say: str, what: str) -> InputError:
    return InputError(f"{say}: {what}", field=say)


def _one_line(message: str) -> str:
    """Return the one line of the library's message that tells the error."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    told = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), None)
    return (told or (lines or ["can't be used"])[0])[:300]


def _schema_source(schema: Mapping[str, Any]) -> str:
    try:
        return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_BLANKS)  # type: ignore[arg-type]
    except ValueError as error:  # the library parses it again; it rejects lone surrogates and deep nesting
        raise _error("schema", f"can't be read ({error})") from error


def _check_schema(schema: Mapping[str, Any], say: str) -> None:
    """Raise InputError for schemas that aren't JSON, and for those that would take the library long."""
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _error(say, f"can't be written as JSON ({error})") from error
    if len(text) > MAX_SOURCE:
        raise _error(say, f"has {len(text)} characters as JSON; at most {MAX_SOURCE} are allowed")
    multiples: list[str] = []
    left: list[Any] = [schema]
    while left:
        part = left.pop()
        left += part.values() if isinstance(part, Mapping) else part if isinstance(part, list) else []
        if not isinstance(part, Mapping):
            continue
        patterns = [part.get("pattern"), *(p if isinstance(p := part.get("patternProperties"), Mapping) else [])]
        if any(isinstance(p, str) and len(p) > MAX_REGEX for p in patterns):
            raise _error(say, f"a pattern has over {MAX_REGEX} characters")
        multiples += [str(x) for x in [part.get("multipleOf")] if type(x) in (int, float)]
    _check_multiples(multiples, say)


def _check_multiples(multiples: Sequence[str], say: str) -> None:
    """Refuse numbers under `multipleOf` with a large common multiple, powers of ten aside: each step is a state."""
    digits = ["".join(map(str, Decimal(x).normalize().as_tuple().digits)) for x in multiples]
    if any(len(x) > 6 for x in digits) or math.lcm(*(int(x) or 1 for x in digits)) > _MAX_MULTIPLE:
        raise _error(say, f"multipleOf {', '.join(multiples)[:60]} have too large a common multiple")


def _place(engine: Any, schema: Any, at: str, shared: Mapping[str, Any]) -> str:
    """Return the pointer to the smallest part of a schema that fails by itself. `shared`: definitions it may use."""
    for key, part in _parts(schema):
        source = _schema_source({**shared, **part})
        if _on_large_stack(lambda s=source: llguidance.LLMatcher.validate_grammar(s, engine), "schema"):  # type: ignore[misc]
            return _place(engine, part, f"{at}/{key}", shared)
    return at


def _parts(schema: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the schemas directly in a schema, each with its relative pointer."""
    for key, value in schema.items() if isinstance(schema, Mapping) else ():
        inner: Any = ()
        if key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, Mapping):
            inner = value.items()
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list):
            inner = enumerate(value)
        elif key in ("items", "additionalProperties") and isinstance(value, Mapping):
            yield key, value
        yield from ((f"{key}/{name}", part) for name, part in inner if isinstance(part, Mapping))
