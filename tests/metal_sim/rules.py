"""What Apple's compiler refuses and clang lets pass, found in clang's dump of the syntax tree.

In: the dump of C++ from `language.py` and that text's tokens. Out: (line of the C++, message) pairs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from .language import SPACES, Source

_NODE = re.compile(r"([ |`-]*)(\w+) 0x[0-9a-f]+ (?:(?:parent|prev) 0x[0-9a-f]+ )*(?:<([^>]*(?:<[^>]*>[^>]*)*?)>)?(.*)")
_PLACE = re.compile(r"(?:([^\s<>:,][^<>:,]*?):)?(\d+):(\d+)|col:(\d+)")
_TYPE = re.compile(r"'((?:[^'\\]|\\.)*)'")
_SPACE = re.compile(r"address_space\((\d)\)|\b(device|constant|threadgroup)\b")
_NUMBER = {"device": "1", "constant": "2", "threadgroup": "3"}
_INTEGERS = r"(?:signed |unsigned )?(?:char|short|int|long)"
_MASK = re.compile(rf"{_INTEGERS} __attribute__\(\(ext_vector_type\(\d\)\)\)")
_NAMED_INTEGERS = re.compile(r"\b(?:const )?u?(?:char|short|int|long)[234]\b")
_OBJECT = re.compile(r"texture|sampler|array_ref|depth|<|::|type-parameter|\bT\b")  # by value, or not yet known
_COUNTS = re.compile(
    r"(?:unsigned (?:int|short)|u(?:int|short)|uint(?:16|32)_t)(?: __attribute__\(\(ext_vector_type\((\d)\)\)\))?"
)
_COMPARES = re.compile(r"'(?:==|!=|<|>|<=|>=|&&|\|\|)'$")
_ARITHMETIC = re.compile(r"'(?:[-+*/%]|<<|>>|[-+*/%&|^]?=|<<=|>>=)'$| '[-+*/%&|^<>]+='")
_BFLOAT = r"'(?:bfloat|bfloat16_t|__bf16)'"
_TO_BFLOAT = re.compile(
    rf"ImplicitCastExpr .* {_BFLOAT}(?::'\S+')? <FloatingCast>$"
    rf"|CompoundAssignOperator .* {_BFLOAT}.*ComputeResultTy='float'"
)
_FUNCTIONS = {"FunctionDecl", "CXXMethodDecl", "CXXConstructorDecl", "CXXDestructorDecl", "CXXConversionDecl"}
_NAMED = _FUNCTIONS | {
    "VarDecl", "ParmVarDecl", "FieldDecl", "TypedefDecl", "TypeAliasDecl", "NonTypeTemplateParmDecl",
}  # fmt: skip
_CASTS = {"CStyleCastExpr", "CXXStaticCastExpr", "CXXReinterpretCastExpr", "CXXConstCastExpr"}
_POSITIONS = {
    "thread_position_in_grid", "thread_position_in_threadgroup", "threadgroup_position_in_grid", "threads_per_grid",
    "threads_per_threadgroup", "threadgroups_per_grid", "dispatch_threads_per_threadgroup", "grid_size", "grid_origin",
    "thread_execution_width_in_grid",
}  # fmt: skip
_INDICES = {
    "thread_index_in_threadgroup", "thread_index_in_simdgroup", "thread_index_in_quadgroup", "threads_per_simdgroup",
    "simdgroup_index_in_threadgroup", "simdgroups_per_threadgroup", "dispatch_simdgroups_per_threadgroup",
    "quadgroup_index_in_threadgroup", "quadgroups_per_threadgroup", "dispatch_quadgroups_per_threadgroup",
    "thread_execution_width",
}  # fmt: skip
_RESOURCES = {"buffer": 31, "threadgroup": 31, "texture": 128, "sampler": 16}
_OTHERS = {"function_constant", "stage_in", "payload", "id", "maybe_unused", "user", "raster_order_group", "access"}


@dataclass(slots=True)
class Node:
    """One node of the tree: where it begins, where its name stands, and the rest of its line."""

    depth: int
    kind: str
    begin: tuple[int, int] | None
    place: tuple[int, int] | None
    rest: str
    children: int = 0
    first: str = ""  # the first child's type

    @property
    def type(self) -> str:
        """The type as written, without what it stands for."""
        found = _TYPE.search(self.rest)
        return found[1] if found else ""

    @property
    def whole_type(self) -> str:
        """The type that the written one stands for."""
        found = re.search(r"'((?:[^'\\]|\\.)*)'(?::'((?:[^'\\]|\\.)*)')?", self.rest)
        return (found[2] or found[1]) if found else ""


@dataclass(slots=True)
class _Written:
    """Pointers and references in a declaration outside of template arguments, spaces there, and what is inside."""

    levels: int = 0
    spaces: int = 0
    deduced: bool = False
    bare: bool = False  # a template argument points somewhere without a space


def _class(type_: str) -> str:
    """A type without const, volatile and its address space."""
    bare = re.sub(r"__attribute__\(\(.*?\)\)|\b(?:const|volatile|device|constant|threadgroup)\b", "", type_)
    return " ".join(bare.split())


def _outside(type_: str) -> str:
    """A type without its template arguments."""
    while True:
        shorter = re.sub(r"<[^<>]*>", "", type_)
        if shorter == type_:
            return type_
        type_ = shorter


@dataclass(slots=True)
class _Parameter:
    node: Node
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Function:
    node: Node
    notes: list[str] = field(default_factory=list)
    parameters: list[_Parameter] = field(default_factory=list)
    shared: list[Node] = field(default_factory=list)  # threadgroup variables


def _nodes(dump: str, file: str) -> Iterator[Node]:
    """The nodes of a dump. Places that are not in `file` are None."""
    line, inside = 0, False
    for text in dump.splitlines():
        match = _NODE.match(text)
        if not match:
            continue
        prefix, kind, span, rest = match.groups()
        begin = place = None
        parts = [span] if span else []
        after = re.match(r" (?:(?:\S[^<>:, ]*?:)?\d+:\d+|col:\d+)(?= |$)", rest) if span else None
        if after:
            parts.append(after[0].strip())
            rest = rest[after.end() :]
        for n, part in enumerate(parts):
            for at in _PLACE.finditer(part):
                if at[4] is None:
                    inside = inside if at[1] == "line" else at[1] == file
                    line = int(at[2])
                spot = (line, int(at[4] or at[3])) if inside else None
                if n == 0 and at.start() == 0:
                    begin = spot
                place = spot
        yield Node(len(prefix), kind, begin, place, rest)


class Rules:
    """One pass over a dump."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.found: list[tuple[int, str]] = []
        self.path: list[Node] = []
        self.functions: list[_Function] = []
        self.conversions: set[int] = set()  # lines where something that clang refuses takes two different types

    def run(self, dump: str, file: str) -> list[tuple[int, str]]:
        """Everything that is wrong, in order of appearance."""
        for node in _nodes(dump, file):
            while self.path and self.path[-1].depth >= node.depth:
                self._left(self.path.pop())
            if self.path:
                parent = self.path[-1]
                parent.children += 1
                if parent.children == 1:
                    parent.first = node.type
                elif parent.kind == "RecoveryExpr" and parent.place and _class(parent.first) != _class(node.type):
                    self.conversions.add(parent.place[0])
            self._node(node)
            self.path.append(node)
        while self.path:
            self._left(self.path.pop())
        return list(dict.fromkeys(self.found))

    def _error(self, node: Node, message: str) -> None:
        place = node.place or node.begin or next((p.place for p in reversed(self.path) if p.place), None)
        self.found.append((place[0] if place else 0, message))

    def _left(self, node: Node) -> None:
        if self.functions and self.functions[-1].node is node:
            self._function(self.functions.pop())

    def _node(self, node: Node) -> None:
        kind, rest = node.kind, node.rest
        if kind in _FUNCTIONS:
            self.functions.append(_Function(node))
        if kind == "AnnotateAttr":
            self._annotation(rest)
        elif " implicit " in rest and kind.endswith("Decl"):
            return
        elif kind in _NAMED:
            self._declaration(node)
        elif kind in _CASTS:
            self._cast(node)
        elif kind == "LambdaExpr":
            self._error(node, "lambda expressions are not supported before Metal 3.2 (macOS 15)")
        if "<AddressSpaceConversion>" in rest:
            self._error(node, "cast between address spaces")
        if "bf" in rest and _TO_BFLOAT.search(f"{kind} {rest}"):
            self._error(node, "implicit conversion to bfloat")
        if kind in ("BinaryOperator", "UnaryOperator", "ParenExpr") and "ext_vector_type" in rest:
            self._mask(node)
        parent = self.path[-1] if self.path else None
        if (
            parent
            and parent.kind == "ConditionalOperator"
            and parent.children == 1
            and "ext_vector_type" in node.whole_type
        ):
            self._error(node, "the condition of ?: must be a scalar, not a vector")

    # ---- declarations
    def _declaration(self, node: Node) -> None:
        if node.kind == "VarDecl":
            self._variable(node)
        if node.kind == "ParmVarDecl" and self.functions and self.path[-1] is self.functions[-1].node:
            self.functions[-1].parameters.append(_Parameter(node))
        self._spaced(node, self._written(node), self._own_type(node))

    def _spaced(self, node: Node, written: _Written | None, type_: str) -> None:
        """Every pointer and reference names a space, on its innermost level at least: MLX writes `device T*& x`."""
        if not written or written.deduced:
            return
        if written.bare or (written.levels and not written.spaces and not _SPACE.search(_outside(type_))):
            kind = "reference" if written.levels == 1 and node.type.rstrip().endswith("&") else "pointer"
            self._error(node, f"{kind} type must have explicit address space qualifier")

    def _own_type(self, node: Node) -> str:
        if node.kind in _FUNCTIONS:
            return (
                node.type.split("(", 1)[0]
                if "__attribute__" not in node.type.split(" (", 1)[0]
                else node.type.rsplit(" (", 1)[0]
            )
        return node.whole_type

    def _written(self, node: Node) -> _Written | None:
        """The pointers and references that a declaration writes, and the spaces."""
        if not node.place or "(*)" in node.type:
            return None
        name = self.source.at(*node.place)
        tokens, match = self.source.tokens, self.source.match
        if node.kind == "CXXConversionDecl":
            end = name
            while end < len(tokens) and tokens[end].text != "(":
                end += 1
            return self._count(name + 1, end)
        if node.kind == "TypeAliasDecl":
            end = name
            while end < len(tokens) and tokens[end].text != ";":
                end += 1
            return self._count(name + 1, end)
        if (node.kind == "ParmVarDecl" and tokens[name].text in ("*", "&", "&&", ">")) or tokens[name].text in SPACES:
            name += 1  # without a name, the place is that of the last token
        i, angle = name - 1, 0
        while i >= 0:
            text = tokens[i].text
            if text in ("(", "[", "{", ";", "}") or (text == "," and not angle):
                only = all(t.text in ("*", "&", "&&", "const") or t.text in SPACES for t in tokens[i + 1 : name])
                if text == "(" and name - i > 1 and only and tokens[name + 1].text == ")":
                    i -= 1
                    continue
                break
            if text in (")", "]") and i in match:
                i = match[i]
            elif text == ">":
                angle += 1
            elif text == "<":
                if not angle:
                    break
                angle -= 1
            elif text == "operator":
                name = i
            i -= 1
        written = self._count(i + 1, name)
        if i >= 0 and tokens[i].text == "," and node.kind != "ParmVarDecl" and node.kind != "NonTypeTemplateParmDecl":
            written.spaces += self._specifier_spaces(i)
        return written

    def _specifier_spaces(self, i: int) -> int:
        """Address spaces before the first declarator of the statement that token `i` is in."""
        tokens, match = self.source.tokens, self.source.match
        while i > 0 and tokens[i].text not in (";", "{", "}"):
            i = match[i] if tokens[i].text in (")", "]") and i in match else i
            i -= 1
        count = 0
        for token in tokens[i + 1 :]:
            if token.text in ("*", "&", "&&", "=", ",", ";"):
                break
            count += token.text in SPACES
        return count

    def _count(self, start: int, end: int) -> _Written:
        tokens, match = self.source.tokens, self.source.match
        stack = [_Written()]  # one for each level of template arguments
        i = start
        while i < end:
            text = tokens[i].text
            if text in ("(", "[") and match.get(i, end) < end:
                i = match[i]
            elif text == "<":
                stack.append(_Written())
            elif text in (">", ",") and len(stack) > 1:
                inner = stack.pop()
                stack[-1].bare |= inner.bare or (inner.levels > 0 and not inner.spaces and not inner.deduced)
                if text == ",":
                    stack.append(_Written())
            elif text in ("*", "&", "&&"):
                after = tokens[i + 1].text
                abstract = after in ("*", "&", "&&", ",", ">", ")", "const") or after in SPACES
                stack[-1].levels += len(stack) == 1 or abstract
            elif text in SPACES:
                stack[-1].spaces += 1
            elif text in ("auto", "decltype"):
                stack[-1].deduced = True
            i += 1
        return stack[0]

    def _cast(self, node: Node) -> None:
        if not node.begin:
            return
        start = self.source.at(*node.begin)
        tokens = self.source.tokens
        if tokens[start].text == "(":
            end = self.source.match.get(start, start)
        else:
            end, depth = start + 1, 0
            while end < len(tokens):
                depth += (tokens[end].text == "<") - (tokens[end].text == ">")
                if not depth:
                    break
                end += 1
            start += 1
        if "(*)" not in node.type:
            self._spaced(node, self._count(start + 1, end), node.whole_type)

    def _variable(self, node: Node) -> None:
        type_ = node.whole_type + " " + node.type
        pointer = re.search(
            r"[*&](?!.*(?:address_space|device|constant|threadgroup))", re.sub(r"\[.*\]", "", node.whole_type)
        )
        space = [] if pointer else [a or _NUMBER[b] for a, b in _SPACE.findall(type_)]
        static = re.search(r"' static\b", node.rest)
        if self.functions:
            if static and "3" in space:
                self.functions[-1].shared.append(node)
                if self._initialized(node):
                    self._error(node, "a variable in the threadgroup address space can't be initialized")
            elif static:
                self._error(node, "variables in function scope cannot be declared static")
        elif "2" not in space and not re.fullmatch(r"const (?:metal::)?sampler", node.type):
            self._error(node, "program scope variable must reside in constant address space")

    def _initialized(self, node: Node) -> bool:
        """Whether a variable is declared with a value. {} and {0} do not count: Apple's compiler takes them."""
        if not node.place:
            return False
        tokens, match = self.source.tokens, self.source.match
        i = self.source.at(*node.place) + 1
        while tokens[i].text == "[" and i in match:
            i = match[i] + 1
        words = [t.text for t in tokens[i : i + 4]]
        words = words[1:] if words[0] == "=" and words[1] == "{" else words
        return words[0] in ("=", "{", "(") and words[:2] != ["{", "}"] and words[:3] != ["{", "0", "}"]

    def _annotation(self, rest: str) -> None:
        note = re.search(r'"(.*)"', rest)
        parent = self.path[-1] if self.path else None
        if not (note and parent and self.functions):
            return
        function = self.functions[-1]
        text = note[1].replace('\\"', '"').replace("\\\\", "\\")
        if parent is function.node:
            function.notes.append(text)
        elif function.parameters and parent is function.parameters[-1].node:
            function.parameters[-1].notes.append(text)

    # ---- functions
    def _function(self, function: _Function) -> None:
        node = function.node
        if "kernel" not in function.notes:
            for variable in function.shared:
                self._error(variable, "threadgroup variable outside a kernel function")
            return
        if not re.match(r"(?:\S+ )?'void \(", node.rest[node.rest.find("'") :]):
            self._error(node, "a kernel function must return void")
        if re.search(r"(?:^| )main '", node.rest):
            self._error(node, "a function cannot be called main")
        used: dict[str, int] = {}
        sizes: set[int] = set()
        for parameter in function.parameters:
            self._parameter(parameter, used, sizes)
        if len(sizes) > 1:
            self._error(node, "position attributes of one kernel must have the same number of components")

    def _parameter(self, parameter: _Parameter, used: dict[str, int], sizes: set[int]) -> None:
        node = parameter.node
        type_ = node.whole_type
        bare = re.sub(r"__attribute__\(\(ext_vector_type\(\d\)\)\)", "", type_)  # `float * __attribute__((..` points
        bare = re.sub(r"\(([*&])\)(?:\[.*\])*$", r"\1", bare)  # to an array
        name = re.match(r" (?:used |referenced |invalid |implicit )*(\w+) '", node.rest)
        what = f"the argument `{name[1]}`" if name else "an argument"
        points = bool(re.search(r"[*&]\s*(?:const|restrict|__restrict|\s)*$", bare))
        space = [a or _NUMBER[b] for a, b in _SPACE.findall(type_ + " " + node.type)]
        placed = False
        for note in parameter.notes:
            attribute = re.fullmatch(r"(\w+(?:::\w+)?)(?:\((.*)\))?", note)
            kind, value = (attribute[1], attribute[2]) if attribute else (note, None)
            if kind in _RESOURCES:
                placed = True
                self._resource(node, what, kind, value, points, space, used)
            elif kind in _POSITIONS | _INDICES:
                placed = True
                self._position(node, what, kind, type_, sizes)
            elif kind in ("stage_in", "payload"):
                placed = True
            elif kind not in _OTHERS and "::" not in kind:
                self._error(node, f"unknown attribute '{kind}' of {what}")
        if not placed and not points and not _OBJECT.search(type_):
            self._error(node, f"{what} has no attribute, and its type '{node.type}' is no pointer or reference")
        if not placed and points and "3" not in space and not set(space) & {"1", "2"} and "&" not in bare[:-1]:
            self._error(node, f"{what} must point to device, constant or threadgroup memory")

    def _resource(
        self, node: Node, what: str, kind: str, value: str | None, points: bool, space: list[str], used: dict[str, int]
    ) -> None:
        limit = _RESOURCES[kind]
        if value is None:
            self._error(node, f"'{kind}' attribute needs an index")
        elif re.fullmatch(r"(?:\d+|0[xX][\da-fA-F]+)[uU]?", value):
            index = int(value.rstrip("uU"), 0 if value[:2] in ("0x", "0X") else 10)
            if index >= limit:
                self._error(node, f"'{kind}' attribute parameter is out of bounds: must be between 0 and {limit - 1}")
            if used.setdefault(f"{kind} {index}", id(node)) != id(node):
                self._error(node, f"'{kind}' index {index} is used twice")
        elif re.fullmatch(r"-.*|.*\.\d.*", value):
            self._error(node, f"'{kind}' attribute parameter is out of bounds: must be between 0 and {limit - 1}")
        must = f"{what} with a {kind} attribute must be a pointer or reference to"
        if kind == "buffer" and not (points and set(space) & {"1", "2"}) and (points or not _OBJECT.search(node.type)):
            self._error(node, f"{must} device or constant memory")
        if kind == "threadgroup" and not (points and "3" in space):
            self._error(node, f"{must} threadgroup memory")

    def _position(self, node: Node, what: str, kind: str, type_: str, sizes: set[int]) -> None:
        plain = re.sub(r"\bconst\b|\bvolatile\b", "", type_).strip()
        match = _COUNTS.fullmatch(plain)
        if not match:
            self._error(
                node, f"invalid type '{node.type}' of {what} for attribute '{kind}': ushort, uint or vectors of them"
            )
            return
        size = int(match[1] or 1)
        if size > (1 if kind in _INDICES else 3):
            self._error(node, f"invalid type '{node.type}' of {what} for attribute '{kind}': too many components")
        elif kind in _POSITIONS:
            sizes.add(size)

    # ---- comparisons of vectors: bool vectors in Metal, vectors of int for clang
    def _mask(self, node: Node) -> None:
        if not self.path or not _MASK.fullmatch(node.type) or node.kind == "ParenExpr":
            return
        if not (_COMPARES.search(node.rest) or (node.kind == "UnaryOperator" and "'!'" in node.rest)):
            return
        parent = next(p for p in reversed(self.path) if p.kind != "ParenExpr")
        integers = re.search(rf"{_INTEGERS} __attribute__", parent.whole_type)
        wrong = False
        if parent.kind == "VarDecl":
            wrong = bool(integers) and not _MASK.fullmatch(parent.type)
        elif parent.kind == "ReturnStmt" and self.functions:
            wrong = bool(_NAMED_INTEGERS.match(self.functions[-1].node.type))
        elif parent.kind == "CallExpr":
            wrong = bool(_NAMED_INTEGERS.search(parent.first.split("(")[-1])) and not _MASK.search(parent.first)
        elif parent.kind in ("BinaryOperator", "CompoundAssignOperator"):
            wrong = bool(integers and _ARITHMETIC.search(parent.rest))
        if wrong:
            self._error(node, "a comparison of vectors is a vector of bool: it becomes no integers by itself")
