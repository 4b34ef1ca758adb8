"""Resolves the conditionals of a rendered text and drops its comments: MLX hashes a kernel's whole text at each launch.

In: Metal text with `#define`s. Out: the lines that a compiler sees, without comments, indents and unused `#define`s.
One text is also CUDA's: what only that compiler sees stands between `#ifdef CUDA` and `#endif`, what only Metal's sees
after `#ifndef CUDA`. Knows integers, as `#if` does, and macros without arguments; no other file is included.
"""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

Macros = Mapping[str, str | None]  # None: a macro with arguments

_DIRECTIVE = re.compile(r"#(ifdef|ifndef|if|elif|else|endif|define)\b ?(.*)")
_DEFINE = re.compile(r"#define (\w+)(\(.*?\))?(.*)")
_OPERATORS: list[dict[str, Callable[[int, int], int]]] = [  # the loosest first
    {"||": lambda a, b: int(bool(a or b))},
    {"&&": lambda a, b: int(bool(a and b))},
    {"==": operator.eq, "!=": operator.ne},
    {"<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge},
    {"+": operator.add, "-": operator.sub},
    {"*": operator.mul, "/": operator.floordiv, "%": operator.mod},
]


def lean(header: str, source: str, *others: Macros) -> tuple[str, str]:
    """Return header and source as Metal's compiler sees them, and CUDA's if its macros are given in `others`.

    A text with a condition that can't be evaluated here keeps its conditionals.
    """
    head = _lines(header)
    lines = head + _lines(source)
    try:
        seen = list(zip(*(_seen(lines, macros) for macros in ({}, *others)), strict=True))
    except (ValueError, ZeroDivisionError):
        seen = [(True,)] * len(lines)
    kept = [any(views) for views in seen]
    while unused := _unused(lines, kept):
        kept = [k and i not in unused for i, k in enumerate(kept)]
    parts = []
    for first, stop in ((0, len(head)), (len(head), len(lines))):
        text = ""
        for views, run in groupby((i for i in range(first, stop) if kept[i]), key=seen.__getitem__):
            some = "".join(f"{lines[i]}\n" for i in run)
            text += some if all(views) else f"#{'ifndef' if views[0] else 'ifdef'} CUDA\n{some}#endif\n"
        parts.append(text)
    return parts[0], parts[1]


def macros_of(text: str) -> Macros:
    """Return the macros that a text defines, whatever its conditionals say."""
    return {name: None if arguments else body.strip() for name, arguments, body in _DEFINE.findall(text)}


def _lines(text: str) -> list[str]:
    """A text's lines without comments and needless spaces; continued ones become one."""
    lines = re.sub(r" *\\\n *", " ", re.sub(r" *//.*", "", text)).split("\n")
    return [words for line in lines if (words := " ".join(line.split()))]


def _seen(lines: Sequence[str], given: Macros) -> list[bool]:
    """For each line, whether a compiler with these macros sees it; it sees no conditionals."""
    macros, seen = dict(given), []
    open_ifs: list[tuple[bool, bool]] = []  # of each: a branch has been taken; the present one is
    for line in lines:
        directive = _DIRECTIVE.match(line)
        word, rest = directive.groups() if directive else ("", "")
        if word in ("if", "ifdef", "ifndef", "elif", "else"):
            taken = word in ("elif", "else") and open_ifs.pop()[0]
            now = not taken and all(branch for _, branch in open_ifs)
            if now and word in ("ifdef", "ifndef"):
                now = (rest in macros) == (word == "ifdef")
            elif now and word != "else":
                now = value(rest, macros) != 0
            open_ifs.append((taken or now, now))
        elif word == "endif":
            open_ifs.pop()
        here = all(branch for _, branch in open_ifs)
        if here and word == "define":
            macros |= macros_of(line)
        seen.append(here and word in ("", "define"))
    return seen


def value(condition: str, macros: Macros) -> int:
    """The value of a condition. Raises ValueError if it needs more than integers and macros without arguments."""
    known = re.compile(r"\bdefined *(?:\( *(\w+) *\)|(\w+))")
    condition = known.sub(lambda m: str(int((m[1] or m[2]) in macros)), condition)
    tokens = [*_expanded(condition, macros, frozenset()), "end"]
    found = _parse(tokens, 0)
    _take(tokens, "end")
    return found


def _expanded(text: str, macros: Macros, inside: frozenset[str]) -> list[str]:
    tokens: list[str] = []
    for token in re.findall(r"[\w.]+|&&|\|\||[=!<>]=|\S", text):
        if token not in macros or token in inside:
            tokens.append("0" if token.isidentifier() else token)  # as C has it
        elif (body := macros[token]) is None:
            raise ValueError(f"{token} takes arguments")
        else:
            tokens += _expanded(body, macros, inside | {token})
    return tokens


def _parse(tokens: list[str], level: int) -> int:
    """Take an expression off the front of tokens: 0: a choice (a ? b : c); else operators from that level on."""
    if level == 0:
        condition = _parse(tokens, 1)
        if tokens[0] != "?":
            return condition
        _take(tokens, "?")
        yes = _parse(tokens, 0)
        _take(tokens, ":")
        no = _parse(tokens, 0)
        return yes if condition else no
    if level <= len(_OPERATORS):
        left, here = _parse(tokens, level + 1), _OPERATORS[level - 1]
        while tokens[0] in here:
            left = int(here[tokens.pop(0)](left, _parse(tokens, level + 1)))
        return left
    token = tokens.pop(0)
    if token == "(":
        inner = _parse(tokens, 0)
        _take(tokens, ")")
        return inner
    if token in ("!", "-"):
        operand = _parse(tokens, level)
        return int(not operand) if token == "!" else -operand
    return int(token.rstrip("uU"), 0)


def _take(tokens: list[str], wanted: str) -> None:
    if tokens.pop(0) != wanted:
        raise ValueError(f"no {wanted} where one should be")


def _unused(lines: Sequence[str], kept: Sequence[bool]) -> set[int]:
    """Which of the kept lines define a macro that no other one uses; LAUNCH_BOUNDS is for gpu/cuda_compiler.py."""
    defines = {i: m for i, line in enumerate(lines) if kept[i] and (m := _DEFINE.match(line))}
    rest = ("".join(m.groups("")[1:]) if (m := defines.get(i)) else line for i, line in enumerate(lines) if kept[i])
    used = set(re.findall(r"\w+", " ".join(rest))) | {"LAUNCH_BOUNDS"}
    return {i for i, m in defines.items() if m[1] not in used}
