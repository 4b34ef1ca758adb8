"""The text that MLX hashes at each launch: what a compiler sees of a kernel, and nothing else."""

from __future__ import annotations

import functools
import re
import subprocess
from typing import Any

import metal_sim
import mlx.core as mx
import numpy as np
import pytest
from metal_sim.compile import compiler
from metal_sim.frontend import check as check_text

from mlx_gemma4.doctor import sizes, table, verdict
from mlx_gemma4.gpu import render
from mlx_gemma4.gpu.preprocess import lean, macros_of, value
from mlx_gemma4.ops import cases

CUDA = macros_of(render._text("cuda.h"))
# Bytes of the longest text of a kernel; before, with comments and all branches: matvec 25,134, attention 23,722.
MOST = {
    "matvec": 12_500,
    "attention": 13_500,
    "few_rows": 17_500,
    "grouped": 11_500,
    "long_attention": 13_000,
    "qkv_post": 7_000,
}
MOST |= {"sample_pieces": 10_000, "sample_merge": 10_500}
MOST |= {"add_norm": 6_000, "quantized_attention": 16_000, "merge_quantized": 9_000, "prompt_attention": 16_000}

Text = tuple[str, str]  # header and source


@functools.cache
def rendered() -> dict[Text, Text]:
    """Every text that the checks of published models' kernels launch: as rendered -> with all that was rendered of."""
    made: dict[Text, Text] = {}

    def noting(header: str, source: str, *others: Any) -> Text:
        made[got] = (header, source) if (got := lean(header, source, *others)) else ("", "")
        return got

    def idle(**_: Any) -> Any:
        return lambda output_shapes, output_dtypes, **_: list(map(mx.zeros, output_shapes, output_dtypes))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(render, "lean", noting)
        patched.setattr(render, "_render", render._render.__wrapped__)
        patched.setattr(cases, "on_cpu", lambda: False)
        for s in [*table.real_sizes().values(), table.small_sizes()["small"]]:
            for check in sizes.checks(s, verdict.QUICK_LENGTHS, 64):
                check.make().kernel(idle)
    return made


def preprocessed(text: str, *defined: str) -> list[str]:
    """The words of a text behind a C compiler's preprocessor."""
    command = [*compiler(), "-E", "-P", "-x", "c++", *(f"-D{d}" for d in defined), "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return re.findall(r"\w+|\S", done.stdout)


@pytest.mark.slow
def test_no_comments_no_indents_no_branches() -> None:
    longest: dict[str, int] = {}
    for (header, source), (_, before) in rendered().items():
        text = header + source
        assert not re.search(r"(?m)//|^\s|\s$|\\$", text.replace("\n#", "#").rstrip("\n"))
        conditions = set(re.findall(r"(?m)^#(?:if|el|endif).*$", text))
        assert conditions <= {"#ifdef CUDA", "#ifndef CUDA", "#endif"}
        metal = "".join(lean(header, source))
        assert "CUDA" not in metal and metal.count("#if") == 0
        entry = before.split("(")[0].removeprefix("// kernel: ")
        longest[entry] = max(longest.get(entry, 0), len(metal))
    assert MOST.keys() <= longest.keys()
    assert not {entry: n for entry, n in longest.items() if n > MOST.get(entry, 7_000)}


@pytest.mark.slow
def test_a_compiler_sees_the_same() -> None:
    """The shortest and the longest text of each kernel, as Metal's compiler has it and as CUDA's."""
    by_entry: dict[str, list[tuple[Text, Text]]] = {}
    for got, before in rendered().items():
        by_entry.setdefault(before[1].split("(")[0], []).append((got, before))
    for texts in by_entry.values():
        for got, before in {min(texts, key=lambda t: len("".join(t[0]))), max(texts, key=lambda t: len("".join(t[0])))}:
            for macros in ([], ["CUDA=1", "INPUTS_READY()="]):
                assert preprocessed("".join(got), *macros) == preprocessed("".join(before), *macros)
            assert preprocessed("".join(lean(*got))) == preprocessed("".join(before))


@pytest.mark.slow
def test_the_checker_takes_what_metal_gets() -> None:
    """The longest text of each kernel of a small model in all formats, as MLX would have Apple compile it."""
    longest: dict[str, tuple[int, str, str]] = {}

    def launcher(name: str, input_names: Any, output_names: Any, source: str, header: str) -> Any:
        header, source = lean(header, source)

        def call(inputs: Any, output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
            made = list(map(mx.zeros, output_shapes, output_dtypes))
            arrays = [np.empty(a.shape, str(a.dtype).removeprefix("mlx.core.")) for a in (*inputs, *made)]
            reads = list(zip(input_names, arrays, strict=False))
            writes = [(n, a.dtype) for n, a in zip(output_names, arrays[len(inputs) :], strict=True)]
            text = header + metal_sim.signature(name, reads, writes, source) + source + "}\n"
            entry = name.rsplit("_", 1)[0]
            longest[entry] = max(longest.get(entry, (0, "", "")), (len(text), name, text))
            return made

        return call

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cases, "on_cpu", lambda: False)
        for check in sizes.checks(table.small_sizes()["small"], verdict.QUICK_LENGTHS, 64):
            check.make().kernel(launcher)
    assert len(longest) >= 18
    for _, name, text in longest.values():
        check_text(text, name, preamble=True)


@pytest.mark.parametrize(
    ("condition", "want"),
    [
        ("1", 1),
        ("A == 3 && !B", 1),
        ("A > 3 || (B && C)", 0),
        ("defined(A) && !defined B", 0),
        ("(!defined( X ) && (defined A))", 1),
        ("D * 2 + 1 == 13", 1),
        ("A < 2 ? 5 : A < 4 ? 7 : 9", 7),
        ("(A - 1) / 2 % 2 != 1", 0),
        ("NOWHERE", 0),
        ("0x10u >= 16", 1),
        ("-1 < 0", 1),
        ("A <= 3 == 1", 1),
    ],
)
def test_conditions(condition: str, want: int) -> None:
    assert int(value(condition, {"A": "3", "B": "0", "C": "1", "D": "(A + A)", "F": None})) == want


@pytest.mark.parametrize("condition", ["F(1)", "1 +", "(1", "1.5f > 1", "A ? 1", "1 2", "", "1 & 3"])
def test_a_text_with_another_condition_keeps_its_conditionals(condition: str) -> None:
    macros = {"A": "3", "F": None}
    with pytest.raises(ValueError, match=r"\w"):
        value(condition, macros)
    header = f"#define F(x) x\n#if {condition}  // why\n  int a = F(1);\n#endif\n"
    kept = header.replace("  // why", "").replace("  int", "int")
    assert lean(header, "x", CUDA) == (re.sub(r" +\n", "\n", kept), "x\n")


def test_branches_of_both_compilers() -> None:
    header = "#ifdef CUDA\n#define N 2\n#define M 1\n#else\n#define N 1\n#endif\n#define USED(i) \\\n  N + (i)\n"
    source = "  a = USED(1);  // one\n\n#if N == 2\n  b();\n#elif N\n  c();\n#else\n  d();\n#endif\n"
    both = (
        "#ifdef CUDA\n#define N 2\n#endif\n#ifndef CUDA\n#define N 1\n#endif\n#define USED(i) N + (i)\n",
        "a = USED(1);\n#ifdef CUDA\nb();\n#endif\n#ifndef CUDA\nc();\n#endif\n",
    )
    assert lean(header, source, CUDA) == both
    assert lean(header, source) == lean(*both) == ("#define N 1\n#define USED(i) N + (i)\n", "a = USED(1);\nc();\n")
