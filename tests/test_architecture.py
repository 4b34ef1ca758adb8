"""The shape of the package: layers, no import circles, no private names across modules, files that can be read."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlx_gemma4"
LINES = 500  # of a file, at most
BUDGET = 33_550
MODULES_IN_THE_ROOT = 12
# Lowest first: a folder imports only what stands before it, and itself. "": the modules in the package's root.
LAYERS = (
    "",
    "files",
    "tokens",
    "quant",
    "chat_format",
    "grammar",
    "gpu",
    "kv",
    "ops",
    "model",
    "loading",
    "media",
    "generation",
    "doctor",
    "demo",
    "distributed",
    "conversation",
    "measure",
    "server",
    "cli",
)
FACADE = {"__init__", "__main__"}  # of the root: they name what the highest layers offer

Module = tuple[str, ...]  # ("ops", "matvec"); a folder's own __init__ is ("ops",)


def modules() -> dict[Module, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts] = path
    return found


def imported(path: Path, module: Module) -> Iterator[tuple[Module, str]]:
    """(module, name) of every import of ours, those under TYPE_CHECKING and inside functions included."""
    package = module if path.name == "__init__.py" and module != ("__init__",) else module[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            parts = tuple((node.module or "").split(".")) if node.module else ()
            if node.level:
                base = package[: len(package) - node.level + 1] + parts
            elif parts[:1] == ("mlx_gemma4",):
                base = parts[1:]
            else:
                continue
            for alias in node.names:
                whole = (*base, alias.name)
                yield (whole, "") if whole in modules_known() else (base or ("__init__",), alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = tuple(alias.name.split("."))
                if parts[0] == "mlx_gemma4":
                    yield parts[1:] or ("__init__",), ""


@functools.cache
def modules_known() -> frozenset[Module]:
    return frozenset(modules())


def test_no_import_circles() -> None:
    graph = {m: {to for to, _ in imported(path, m) if to != m} for m, path in modules().items() if m[0] not in FACADE}
    done: set[Module] = set()

    def visit(module: Module, trail: tuple[Module, ...]) -> None:
        assert module not in trail, " -> ".join(".".join(m) for m in (*trail[trail.index(module) :], module))
        if module in done or module not in graph:
            return
        for to in sorted(graph[module]):
            visit(to, (*trail, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


def layer(module: Module) -> int:
    return LAYERS.index(module[0] if len(module) > 1 or module[0] in LAYERS else "")


def test_no_layer_reaches_up() -> None:
    wrong = [
        f"{'.'.join(m)} imports {'.'.join(to)}"
        for m, path in modules().items()
        if m[0] not in FACADE
        for to, name in imported(path, m)
        if layer(to) > layer(m) or (to == ("__init__",) and name != "__version__")
    ]
    assert not wrong


def test_every_folder_is_a_layer() -> None:
    assert {p.parent.name for p in PACKAGE.glob("*/__init__.py")} == set(LAYERS) - {""}


SOURCES = [p for d in ("mlx_gemma4", "benchmarks", "examples", "tests") for p in sorted((ROOT / d).rglob("*.py"))]


def test_no_private_name_across_modules() -> None:
    """Neither by import nor as an attribute of an imported module. Tests may look inside what they test."""
    wrong = []
    for path in (p for p in SOURCES if ROOT / "tests" not in p.parents):
        tree = ast.parse(path.read_text())
        ours = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("mlx_gemma4")):
                wrong += [f"{path.name}: {a.name}" for a in node.names if re.match("_[a-z]", a.name)]
                ours |= {a.asname or a.name for a in node.names}
        names = {m[-1] for m in modules_known()} & ours
        wrong += [
            f"{path.name}: {node.value.id}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            if node.value.id in names and re.match("_[A-Za-z]", node.attr)
        ]
    assert not wrong


@pytest.mark.parametrize("folder", ["mlx_gemma4", "kernels", "tests", "benchmarks", "examples"])
def test_no_file_is_too_long(folder: str) -> None:
    files = [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".metal", ".h", ".js", ".cpp")]
    files = [p for p in files if not {"vendor", "node_modules"} & set(p.parts)]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files}
    assert {name: n for name, n in lengths.items() if n > LINES} == {}


def test_the_package_keeps_to_its_budget() -> None:
    assert sum(len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")) <= BUDGET
    assert len(list(PACKAGE.glob("*.py"))) <= MODULES_IN_THE_ROOT


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(p.relative_to(ROOT)) for p in PACKAGE.rglob("*.py") if not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert not silent


def test_tests_mirror_the_folders() -> None:
    folders = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and list(p.glob("test_*.py"))}
    assert folders <= set(LAYERS)


def test_every_kernel_stands_beside_its_reference() -> None:
    """kernels/X.metal that declares kernels has its launcher in ops/X.py."""
    declaring = {p.stem for p in (ROOT / "kernels").glob("*.metal") if "// kernel: " in p.read_text()}
    assert declaring <= {p.stem for p in (PACKAGE / "ops").glob("*.py")}


def test_the_architecture_page_names_every_module() -> None:
    """docs/architecture.md has one line for each module, and none for a module that is gone."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"^\| `([a-z_0-9/]+\.py)` \|", text, re.M))
    there = {str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"}
    assert named == there


def test_no_macro_declares_threadgroup_arrays() -> None:
    """Both the translation to CUDA and the simulator look for them in the text, and would make one for each thread."""
    for path in sorted((ROOT / "kernels").glob("*.metal")):
        logical = path.read_text().replace("\\\n", " ")
        found = re.findall(r"^ *# *define[^\n]*\bthreadgroup\b[^\n;(]*\[[^\n]*", logical, re.MULTILINE)
        assert not found, (path.name, found)
