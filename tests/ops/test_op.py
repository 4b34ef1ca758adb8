"""Operations: kernel and reference take the same arguments, and keys print as verdicts remember them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

from mlx_gemma4 import ops
from mlx_gemma4.ops.op import Op, OpKey

MODULES = [importlib.import_module(f"{ops.__name__}.{m.name}") for m in pkgutil.iter_modules(ops.__path__)]
OPS = {op.key: op for module in MODULES for op in vars(module).values() if isinstance(op, Op)}


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: str(op.key))
def test_a_kernel_takes_what_its_reference_takes(op: Op[..., object]) -> None:
    """A launcher first, then the same; after it perhaps keywords of its own."""
    (first, _), *rest = inspect.signature(op.kernel).parameters.items()
    reference = inspect.signature(op.reference).parameters
    assert first == "launcher"
    own = [name for name, _ in rest if name not in reference]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is None for name, p in rest if name in own), own
    taken = [(name, p.kind, p.default) for name, p in rest if name not in own]
    wanted = [(name, p.kind, p.default) for name, p in reference.items()]
    assert [t for t in wanted if t in taken] == taken
    # What a kernel does not take, no caller hands to it.
    assert all(t in taken or t[0] in {"window", "glu", "ids"} for t in wanted)


@pytest.mark.parametrize(("text", "key"), [("halve", OpKey("halve")), ("matvec Q4_K", OpKey("matvec", "Q4_K"))])
def test_keys_print_and_parse(text: str, key: OpKey) -> None:
    assert str(key) == text and OpKey.parse(text) == key
