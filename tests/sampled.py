"""What tests of grammars share: replies sampled under one, whether it lets a text through, and a judge of JSON."""

from __future__ import annotations

import datetime
import ipaddress
import json
import re
import uuid
from collections import Counter
from typing import Any
from urllib.parse import urlparse

import jsonschema
import numpy as np
from hypothesis import strategies as st

from mlx_gemma4.grammar.grammar import Grammar
from mlx_gemma4.tokens.tokenizer import Tokenizer

PRINTABLE = [chr(c) for c in range(33, 127)]


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


def accepts(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether the grammar lets a reply be just this text, control tokens in it included."""
    for token in tokenizer.encode(text, add_bos=False, parse_special=True):
        if token not in allowed(grammar, tokenizer):
            return False
        grammar.accept(token)
    return grammar.complete


KEYWORDS = [
    *("type", "properties", "required", "items", "prefixItems", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"),
    *("$defs", "pattern", "format", "minLength", "maxLength", "minItems", "maxItems", "minimum", "multipleOf", "a"),
    *("additionalProperties", "patternProperties", "nullable", "not", "x-guidance", "$id"),
]
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 2000)
    | st.floats()
    | st.sampled_from(["", "string", "#", "^a", "(", "é\n"]),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.sampled_from(KEYWORDS), part, max_size=3),
    max_leaves=10,
)
JUNK_SCHEMAS = st.dictionaries(st.sampled_from(KEYWORDS), JUNK, max_size=4)
