"""Metal text as C++ that clang can type-check, line for line, and the words that Metal does not have.

In: preprocessed Metal text. Out: C++ for `spec/metal.h`, its tokens (an AST's line:column finds one), and what is wrong
already. Attributes become annotations, `threadgroup` variables static ones, vector constructors calls of `msl::make`,
methods in device, constant or threadgroup memory functions with an explicit object.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass

SPACES = {"thread", "device", "constant", "threadgroup"}
FORBIDDEN = {  # word: what Metal has not
    "double", "goto", "new", "delete", "throw", "try", "catch", "virtual", "dynamic_cast", "typeid", "asm", "__asm__",
    "noexcept", "thread_local", "register", "export", "char16_t", "char32_t", "wchar_t", "co_await", "co_return",
    "co_yield", "consteval", "constinit", "concept", "requires", "char8_t", "__int128", "_Complex",
}  # fmt: skip
STAGES = {"kernel", "vertex", "fragment", "visible", "mesh", "object", "intersection", "stitchable"}
SCALARS = ["bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "half", "float", "bfloat"]
VECTORS = {f"{packed}{s}{n}" for s in SCALARS for n in (2, 3, 4) for packed in ("", "packed_")}

_TOKEN = re.compile(
    r"""(?P<line>(?m:^)[ \t]*\#[^\n]*)
    |(?P<space>\s+)
    |(?P<string>(?:u8|[uUL])?"(?:\\.|[^"\\\n])*")
    |(?P<char>'(?:\\.|[^'\\\n])+')
    |(?P<name>[A-Za-z_$]\w*)
    |(?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)
    |(?P<punct>->\*|<<=|>>=|\.\.\.|::|->|\+\+|--|<<|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|.)""",
    re.X | re.S,
)
_OPEN, _CLOSE = {"(": ")", "[": "]", "{": "}"}, {")", "]", "}"}


@dataclass(slots=True)
class Token:
    """One token: its kind, its text (empty once removed), its line from 1 and the white space before it."""

    kind: str
    text: str
    line: int
    space: str = ""
    column: int = 0


def tokenize(text: str) -> list[Token]:
    """Split a text; `>>` comes as two tokens, as template arguments need it."""
    tokens, line, start, space = [], 1, 0, ""
    for match in _TOKEN.finditer(text):
        kind, piece = str(match.lastgroup), match[0]
        if kind == "space":
            space += piece
        else:
            tokens.append(Token(kind, piece, line, space, match.start() - start + 1))
            space = ""
        if "\n" in piece:
            line += piece.count("\n")
            start = match.start() + piece.rindex("\n") + 1
    return tokens


def join(tokens: list[Token]) -> str:
    return "".join(t.space + t.text for t in tokens) + "\n"


class Source:
    """A text's tokens with brackets matched, to be looked up by line and column."""

    def __init__(self, text: str) -> None:
        self.tokens = [t for t in tokenize(text) if t.kind != "line"]
        self.match = brackets(self.tokens)
        self._places = [(t.line, t.column) for t in self.tokens]

    def at(self, line: int, column: int) -> int:
        """The index of the token at or before a place."""
        return max(bisect_right(self._places, (line, column)) - 1, 0)


def brackets(tokens: list[Token]) -> dict[int, int]:
    """The index of the other bracket for each of ( [ { and their ends."""
    found: dict[int, int] = {}
    stack: list[int] = []
    for i, token in enumerate(tokens):
        if token.kind != "punct":
            continue
        if token.text in _OPEN:
            stack.append(i)
        elif token.text in _CLOSE and stack:
            found[i] = stack.pop()
            found[found[i]] = i
    return found


@dataclass(slots=True)
class _Scope:
    kind: str  # "space", "class", "function", "values"
    name: str = ""


class Rewriter:
    """One pass over the tokens of a preprocessed text. `errors` holds (line, message)."""

    def __init__(self, text: str) -> None:
        self.all = tokenize(text)
        self.tokens = [t for t in self.all if t.kind != "line"]
        self.match = brackets(self.tokens)
        self.errors: list[tuple[int, str]] = []
        self.types = VECTORS | self._aliases()
        self.calls = self.types | self._type_parameters()
        self.made: set[str] = set()  # heads of constructors, to keep one of those that differ in the space only

    def run(self) -> str:
        """The text as C++."""
        for token in self.all:
            if token.kind == "line":
                token.text = ""  # #pragma
        self._words()
        self._attributes()
        self._keywords()
        self._constructors()
        self._statements()
        return join(self.all)

    # ---- looking around
    def text(self, i: int) -> str:
        return self.tokens[i].text if 0 <= i < len(self.tokens) else ""

    def is_name(self, i: int) -> bool:
        return 0 <= i < len(self.tokens) and self.tokens[i].kind == "name"

    def end_of_arguments(self, i: int) -> int:
        """The index of the `>` that ends the template arguments beginning at `i`, or 0."""
        depth = 0
        while i < len(self.tokens):
            text = self.text(i)
            if text in "([{" and text and i in self.match:
                i = self.match[i]
            elif text == "<":
                depth += 1
            elif text == ">":
                depth -= 1
                if not depth:
                    return i
            elif text == ";":
                return 0
            i += 1
        return 0

    def instances(self) -> list[tuple[str, int, int]]:
        """Explicit instances: the template's name, the first and the last token."""
        found = []
        for i, token in enumerate(self.tokens):
            if token.text == "template" and self.text(i + 1) != "<" and self.text(i - 1) in (";", "}", ""):
                end = i
                while end < len(self.tokens) and self.text(end) != ";":
                    end += 1
                names = [
                    t.text for t in self.tokens[i + 1 : end] if t.kind == "name" and t.text not in ("void", "decltype")
                ]
                found.append((names[0] if names else "", i, end))
        return found

    def without_instances(self) -> str:
        """The text after `run` with one explicit instance of each template."""
        seen = set()
        for name, start, end in self.instances():
            if name in seen:
                for token in self.tokens[start : end + 1]:
                    token.text = ""
            seen.add(name)
        return join(self.all)

    def _aliases(self) -> set[str]:
        found = set()
        for i, token in enumerate(self.tokens):
            if token.text not in ("using", "typedef"):
                continue
            end = i
            while end < len(self.tokens) and self.text(end) != ";":
                end += 1
            words = {t.text for t in self.tokens[i + 1 : end]}
            if words & (VECTORS | {"vec", "typename"}) and not words & {"*", "&"}:
                found.add(self.text(i + 1) if token.text == "using" else self.text(end - 1))
        return found

    def _type_parameters(self) -> set[str]:
        here = enumerate(self.tokens)
        return {
            self.text(i + 1)
            for i, t in here
            if t.text in ("typename", "class") and self.text(i - 1) in "<," and self.text(i + 2) in (",", ">", "=")
        }

    # ---- words
    def _words(self) -> None:
        for i, token in enumerate(self.tokens):
            text, line = token.text, token.line
            if token.kind == "number":
                literal = re.fullmatch(r"([\d.]+(?:[eE][-+]?\d+)?|0[xX][\da-fA-F.]+[pP][-+]?\d+)(bf|BF|H)", text)
                if literal:
                    value = literal[1] if literal[1].isdigit() else literal[1] + "f"
                    token.text = literal[1] + "h" if literal[2] == "H" else f"bfloat({value})"
                elif re.fullmatch(r"(?=\w*[.eE])[\d.]+(?:[eE][-+]?\d+)?|0[xX][\da-fA-F.]+[pP][-+]?\d+", text):
                    token.text += "f"  # no double in Metal; clang's own option for that forgets it in templates
            elif text == "long" and self.text(i + 1) in ("long", "double"):
                self.errors.append((line, f"'long {self.text(i + 1)}' is not supported in Metal"))
            elif text == "this" and self.is_name(i + 1):
                self.errors.append((line, "explicit object parameters are C++23"))
            elif text in FORBIDDEN and token.kind == "name":
                deleted = text == "delete" and self.text(i - 1) == "="
                method = text == "noexcept" and self.text(i - 1) in SPACES  # MLX has it there: integral_constant.h
                if not deleted and not method:
                    self.errors.append((line, f"'{text}' is not supported in Metal"))

    def _keywords(self) -> None:
        """Words of Metal's that stand where a name must stand."""
        for i, token in enumerate(self.tokens):
            stage = token.text in ("kernel", "vertex", "fragment") and not self.is_name(i + 1)
            named = token.text in SPACES and self.text(i - 1) in ("namespace", "struct", "class", "enum", "union")
            if stage or named:
                self.errors.append((token.line, f"'{token.text}' is a keyword of Metal, not a name"))

    # ---- attributes
    def _attributes(self) -> None:
        i = 0
        while i < len(self.tokens):
            text = self.text(i)
            if text == "[" and self.text(i + 1) == "[" and self.match.get(i, 0) > i + 1:
                end = self.match[i]
                self._attribute(i, end)
                i = end
            elif text == "kernel" and self._instantiates(i):
                self.tokens[i].text = ""
            i += 1

    def _instantiates(self, i: int) -> bool:
        """Whether only `template` and removed tokens stand before token `i`: an explicit instance."""
        i -= 1
        while i > 0 and not self.text(i):
            i -= 1
        return self.text(i) == "template"

    def _attribute(self, start: int, end: int) -> None:
        entries, depth = [""], 0
        for token in self.tokens[start + 2 : end - 1]:
            depth += (token.text in "([") - (token.text in ")]")
            if token.text == "," and not depth:
                entries.append("")
            else:
                entries[-1] += token.text
        follows, instance = self.text(end + 1), self._instantiates(start)
        first = self.tokens[start]
        for token in self.tokens[start : end + 1]:
            token.text = ""
        if instance:
            return
        if entries[0].startswith("function_constant") and follows in (";", "="):
            if follows == "=":
                self.errors.append((first.line, "a function constant takes no value in the text"))
            begin = self._statement_start(start)
            for token in self.tokens[begin:start]:
                token.text = "" if token.text in ("static", "constexpr") else token.text
            self.tokens[begin].text = "extern " + self.tokens[begin].text
        elif follows in (",", ")") or {re.split(r"\W", e)[0] for e in entries} & STAGES:
            notes = (e.replace("\\", "\\\\").replace('"', '\\"') for e in entries)
            first.text = " " + "".join(f'__attribute__((annotate("{n}")))' for n in notes)

    def _statement_start(self, i: int) -> int:
        i -= 1
        while i >= 0 and self.text(i) not in (";", "{", "}"):
            if self.text(i) in _CLOSE and i in self.match and self.match[i] < i:
                i = self.match[i]
            i -= 1
        return i + 1

    # ---- constructors of vectors
    def _constructors(self) -> None:
        for i, token in enumerate(self.tokens):
            if token.kind != "name":
                continue
            start, end = i, i
            if token.text == "vec" and self.text(i + 1) == "<":
                end = self.end_of_arguments(i + 1)
            elif token.text == "typename" and self.text(i - 1) not in ("<", ","):
                end = self._qualified(i + 1)
                if self.text(end - 1) != "::":
                    continue
            elif token.text in self.types and self.text(i + 1) == "<":
                end = self.end_of_arguments(i + 1)
            elif token.text not in self.calls:
                continue
            while self.text(start - 1) == "::" and self.text(start - 2) == "metal":
                start -= 2
            if end and self.text(end + 1) == "(":
                self._call(start, end)
            elif end and self.is_name(end + 1) and self.text(end + 2) == "(":
                self._variable(start, end)

    def _qualified(self, i: int) -> int:
        """The last token of the qualified name that begins at `i`."""
        while True:
            if self.text(i + 1) == "<":
                i = self.end_of_arguments(i + 1)
                if not i:
                    return 0
            if self.text(i + 1) != "::":
                return i
            i += 3 if self.text(i + 2) == "template" else 2
        return i

    def _call(self, start: int, end: int) -> None:
        before, first = self.text(start - 1), self.text(end + 2)
        if before in ("operator", "::", ".", "->", "~", "struct", "class") or (before == "<" and end == start):
            return
        if first == "*" and self.text(start) not in VECTORS | {"vec", "metal"}:
            return
        if first == "&" and self.text(end + 4) == ")":
            return  # a reference to an array
        self.tokens[start].text = "msl::make<" + self.tokens[start].text
        self.tokens[end].text += ">"

    def _variable(self, start: int, end: int) -> None:
        """`float4 v(a, b, c, d);` in a function."""
        before, close = self.text(start - 1), self.match.get(end + 2, 0)
        plain = self.text(start) in self.types | {"vec", "metal"}
        if not (plain and close > end + 3 and before in (";", "{", "}", ")", "const", "constexpr", "thread", ":")):
            return
        if self.text(close + 1) not in (";", ",") or not self._in_function(start):
            return
        made = "".join(t.text if t.kind == "punct" else " " + t.text for t in self.tokens[start : end + 1])
        self.tokens[end + 2].text = f" = msl::make<{made}>("

    def _in_function(self, i: int) -> bool:
        depth = 0
        for j in range(i - 1, -1, -1):
            text = self.text(j)
            if text == "}":
                depth += 1
            elif text == "{":
                if not depth and self.text(j - 1) == ")":
                    return True
                depth -= depth > 0
        return False

    # ---- statements: threadgroup variables, methods by space, arrays as arguments
    def _statements(self) -> None:
        scopes = [_Scope("space")]
        start = 0  # of the statement
        i = 0
        while i < len(self.tokens):
            text = self.text(i)
            if text == "{":
                scopes.append(self._opened(start, i, scopes[-1]))
                start = i + 1 if scopes[-1].kind != "values" else start
            elif text == "}":
                closed = scopes.pop() if len(scopes) > 1 else scopes[-1]
                start = i + 1 if closed.kind != "values" else start
            elif text == ";" or (text == ":" and self.text(i - 1) in ("public", "private", "protected")):
                start = i + 1
            elif text == "threadgroup" and scopes[-1].kind == "function":
                self._threadgroup(start, i)
            elif text == ")" and scopes[-1].kind == "class" and self._space_after(i):
                self._method(start, i, scopes[-1].name)
            elif text == "[" and self.is_name(i - 1) and scopes[-1].kind != "values":
                self._array_argument(i)
            i += 1

    def _opened(self, start: int, i: int, outer: _Scope) -> _Scope:
        head = [t.text for t in self.tokens[start:i]]
        before = self.text(i - 1)
        if outer.kind in ("function", "values"):
            local = "struct" in head and before != ")" and "(" not in head and "=" not in head
            if not local:
                values = outer.kind == "values" or before in ("=", "(", ",", "return", ">") or self.is_name(i - 1)
                values = values and before not in ("else", "do", "const")
                return _Scope("values" if values else "function")
        if "namespace" in head or before.startswith('"'):
            return _Scope("space")
        for word in ("struct", "class", "union", "enum"):
            if word in head and before != ")":
                at = len(head) - 1 - head[::-1].index(word)
                if word == "class" and at and head[at - 1] == "enum":
                    return _Scope("values")
                parameters = head[at - 1] in ("<", ",") if at else False
                if parameters:
                    continue
                return _Scope("values" if word == "enum" else "class", head[at + 1] if at + 1 < len(head) else "")
        if before == "=" or (self.is_name(i - 1) and "(" not in head):
            return _Scope("values")
        return _Scope("function")

    def _threadgroup(self, start: int, i: int) -> None:
        head = [t.text for t in self.tokens[start:i]]
        if any(t not in ("const", "volatile", "static", "constexpr", "") for t in head):
            return
        j, name = i + 1, ""
        while j < len(self.tokens) and self.text(j) not in ("=", ";", "[", "(", ",", "{"):
            if self.text(j) in ("*", "&", "&&"):
                return
            if self.text(j) == "<":
                j = self.end_of_arguments(j) or j
            name = self.text(j)
            j += 1
        if not name or (self.text(j) == "(" and self.text(j + 1) in ("*", "&")):
            return
        if "static" in head:
            self.errors.append((self.tokens[i].line, "variables in function scope cannot be declared static"))
        else:
            self.tokens[start].text = "static " + self.tokens[start].text

    def _space_after(self, i: int) -> str:
        """device, constant or threadgroup after the parameters of a method that end at `i`, or nothing."""
        j, found = i + 1, ""
        while self.text(j) in SPACES | {"const", "volatile", "noexcept"}:
            found = self.text(j) if self.text(j) in SPACES - {"thread"} else found
            j += 1
        return found if self.text(j) in ("{", ":", ";", "=") else ""

    def _method(self, start: int, close: int, name: str) -> None:
        opened = self.match.get(close, 0)
        space, last, cv = self._space_after(close), close + 1, []
        while self.text(last) in SPACES | {"const", "volatile", "noexcept"}:
            cv += [self.text(last)] if self.text(last) in ("const", "volatile") else []
            self.tokens[last].text = "" if self.text(last) in SPACES else self.text(last)
            last += 1
        body = last
        while self.text(body) not in ("{", ";", ""):
            body = self.match[body] if self.text(body) == "(" and body in self.match else body
            body += 1
            if self.text(body) == "{" and self.is_name(body - 1) and ":" in [t.text for t in self.tokens[last:body]]:
                body = self.match.get(body, body) + 1  # member{value}
        end = self.match.get(body, body) if self.text(body) == "{" else body
        head = [t.text for t in self.tokens[start:opened]]
        if self.text(opened - 1) == name and "operator" not in head:  # a constructor
            key = name + " ".join(t.text for t in self.tokens[start : close + 1])
            if key in self.made or self._other_constructor(start, opened, close, end, name):
                for token in self.tokens[start : end + 1]:
                    token.text = ""
            self.made.add(key)
            return
        parameters = " ".join(t.text for t in self.tokens[opened + 1 : close])
        attribute = {"device": "device", "constant": "constant", "threadgroup": "threadgroup"}[space]
        this = f"this {' '.join(cv)} {attribute} {name}&" + (", " + parameters if parameters else "")
        declared = " ".join(h for h in head if h not in ("constexpr", "inline"))
        copy = f"{declared}({this}); "
        at = head.index("operator") + start if "operator" in head else opened - 1
        if "operator" in head and self.is_name(at + 1):  # a conversion: its type becomes the result
            self.tokens[at].text = ""
            self.tokens[opened - 1].text += f" msl_{space}_conversion"
            for token in self.tokens[start:at]:
                token.text = "" if token.text == "explicit" else token.text
        else:
            for token in self.tokens[at + 1 : opened]:
                token.text = ""
            self.tokens[at].text = f"msl_{space}_" + (self.text(at) if self.text(at) != "operator" else "operation")
        self.tokens[start].text = copy + self.tokens[start].text

    def _other_constructor(self, start: int, opened: int, close: int, end: int, name: str) -> bool:
        """Whether the class has a constructor with these parameters for objects in thread memory."""
        wanted = [t.text for t in self.tokens[opened : close + 1]]
        size = len(wanted)
        for j in range(len(self.tokens) - size):
            called = j != opened and self.text(j - 1) == name and self.text(j) == "("
            here = self.text(j + size) in ("thread", "{", ":")
            if called and here and [t.text for t in self.tokens[j : j + size]] == wanted:
                return True
        return False

    def _array_argument(self, i: int) -> None:
        """`const device float x[4]` as an argument: a pointer."""
        end = i
        while self.text(end) == "[" and end in self.match:
            end = self.match[end] + 1
        if self.text(end) not in (",", ")") or end == i:
            return
        j, space = i - 2, False
        while j >= 0 and self.text(j) not in ("(", ",", ";", "{", "}", "*", "&", "=", "]"):
            space |= self.text(j) in SPACES - {"thread"}
            if self.text(j) == ">":
                return
            j -= 1
        if not space or self.text(j) not in ("(", ","):
            return
        first = self.match[i]
        more = first + 1 < end
        self.tokens[i - 1].text = f"(*{self.text(i - 1)})" if more else f"* {self.text(i - 1)}"
        for token in self.tokens[i : first + 1]:
            token.text = ""
