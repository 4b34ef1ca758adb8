"""Measures the cost of constrained replies: the mask of allowed tokens, for each token, on the host.

    python benchmarks/grammar.py VOCABULARY.gguf

Any GGUF with a tokenizer will do. "as written": the tokens of a plausible reply. "random": tokens drawn from those
allowed, over the schemas of tests/schemas.py. Times are the time of a core, so that a busy machine does little harm.
Prints one table, machine, versions and date above it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mlx_gemma4.files.gguf import open_gguf
from mlx_gemma4.grammar.grammar import Grammar, json_schema, lark, regex, tool_calls, vocabulary
from mlx_gemma4.tokens.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from schemas import DOCUMENTS, SCHEMAS

ORDER = {
    "id": "ORD-004711",
    "lines": [{"sku": "A-17", "n": 2}, {"sku": "Ä-18", "n": 40}],
    "paid": True,
}
STEPS = {
    "steps": [
        {"why": "Both sides minus seven", "out": "8x = -30, and so x is -30 / 8, which can be made shorter by two."},
        {"why": 'Divide by "eight"', "out": "x = -15/4\nIt is a fraction; 数 -3.75 as a decimal number."},
    ],
    "final": "x = -3.75",
}
TOOLS = [
    {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
                "unit": {"enum": ["C", "F"]},
                "more": {},
            },
            "required": ["city"],
        },
    },
    {"name": "search", "parameters": {"properties": {"query": {"type": "string"}}, "required": ["query"]}},
]
CALLS = (
    '<|tool_call>call:get_weather{city:<|"|>New York, the one on the "coast"<|"|>,days:5,unit:<|"|>C<|"|>,'
    'more:{hourly:[1,2,true],why:<|"|>A trip is planned for the end of the week.<|"|>}}<tool_call|>'
    '<|tool_call>call:search{query:<|"|>What is the capital of France?<|"|>}<tool_call|>'
)
SUM = 'start: sum\nsum: term (("+"|"-") term)*\nterm: NUMBER | "(" sum ")"\nNUMBER: /[0-9]+/'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    path = parser.parse_args().model
    with open_gguf(path) as file:
        tokenizer = Tokenizer.from_gguf(file.metadata, str(path))
    start = time.process_time()
    vocabulary(tokenizer)
    made = time.process_time() - start
    print(f"{datetime.date.today()}, {platform.machine()}, Python {platform.python_version()}, ", end="")
    print(f"llguidance {version('llguidance')}; {tokenizer.vocab_size} tokens, made ready in {made:.2f} s\n")
    print("| | to compile | tokens | median of a token | mean | slowest |")
    print("|---|---|---|---|---|---|")
    for name, grammar, text in forms(tokenizer):
        start = time.process_time()
        made_grammar = grammar()
        compiled = time.process_time() - start
        row(name, [compiled], written(made_grammar, tokenizer, text))
    compiled_times: list[float] = []
    times: list[float] = []
    rng = np.random.default_rng(0)
    for schema in SCHEMAS.values():
        start = time.process_time()
        made_grammar = json_schema(tokenizer, schema)
        compiled_times.append(time.process_time() - start)
        times += random_tokens(made_grammar, tokenizer, rng)
    row(f"{len(SCHEMAS)} schemas, random", compiled_times, times)


def forms(tokenizer: Tokenizer) -> Iterator[tuple[str, Callable[[], Grammar], str]]:
    """Yield a name, a function that makes the grammar, and a reply that it allows."""

    def compact(value: object) -> str:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    yield "schema, compact", lambda: json_schema(tokenizer, DOCUMENTS["order"]), compact(ORDER)
    indented = json.dumps(STEPS, ensure_ascii=False, indent=2)
    yield "schema, indented, free text", lambda: json_schema(tokenizer, DOCUMENTS["steps"]), indented
    yield "any JSON", lambda: json_schema(tokenizer, {}), compact([ORDER, STEPS])
    yield "tool calls, required", lambda: tool_calls(tokenizer, TOOLS, "required"), CALLS
    yield "tool calls, auto", lambda: tool_calls(tokenizer, TOOLS, "auto"), "Let me look that up. " + CALLS
    yield "regular expression", lambda: regex(tokenizer, "(yes|no), because .{1,200}"), "no, because it was never so"
    yield "Lark", lambda: lark(tokenizer, SUM), "(12+3)-(4+(5-6))+77777"


def written(grammar: Grammar, tokenizer: Tokenizer, text: str) -> list[float]:
    """Seconds of mask and step for each token of a reply."""
    times = []
    for token in tokenizer.encode(text, add_bos=False, parse_special=True):
        start = time.process_time()
        mask = grammar.mask()
        taken = time.process_time() - start
        assert mask[token // 32] >> token % 32 & 1, text
        start = time.process_time()
        grammar.accept(token)
        times.append(taken + time.process_time() - start)
    return times


def random_tokens(grammar: Grammar, tokenizer: Tokenizer, rng: np.random.Generator, most: int = 40) -> list[float]:
    """The same for tokens drawn evenly from those allowed."""
    times: list[float] = []
    while len(times) < most and not grammar.finished:
        start = time.process_time()
        mask = grammar.mask()
        taken = time.process_time() - start
        may = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        may = may[~np.isin(may, list(tokenizer.stop_ids))]
        if not may.size:
            break
        start = time.process_time()
        grammar.accept(int(rng.choice(may)))
        times.append(taken + time.process_time() - start)
    return times


def row(name: str, compiled: list[float], times: list[float]) -> None:
    median, mean, most = (1e3 * x for x in (statistics.median(times), statistics.mean(times), max(times)))
    compile_ms = 1e3 * statistics.median(compiled)
    print(f"| {name} | {compile_ms:.1f} ms | {len(times)} | {median:.3f} ms | {mean:.3f} ms | {most:.1f} ms |")


if __name__ == "__main__":
    main()
