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
    """A launcher first, then the same; beyond that, a launch configuration at most. A reference may be more general."""
    kernel, reference = (dict(inspect.signature(f).parameters) for f in (op.kernel, op.reference))
    assert next(iter(kernel)) == "launcher"
    del kernel["launcher"]
    kernel.pop("config", None)
    shared = [name for name in reference if name in kernel]
    assert list(kernel) == shared
    for name in shared:
        assert (kernel[name].kind, kernel[name].default) == (reference[name].kind, reference[name].default)
    assert all(p.default is not p.empty for name, p in reference.items() if name not in kernel)


def test_every_kernel_of_a_step_is_an_operation() -> None:
    assert {str(key) for key in OPS} >= {"embed", "rotations", "qkv_post", "attention", "long_attention", "merge"}
    assert {str(key) for key in OPS} >= {
        "matvec",
        "dense",
        "top_k",
        "sample",
        "halve",
        "expand",
        "grouped",
        "few_rows",
        "route",
        "quantize_kv",
    }


@pytest.mark.parametrize(("text", "key"), [("halve", OpKey("halve")), ("matvec Q4_K", OpKey("matvec", "Q4_K"))])
def test_keys_print_and_parse(text: str, key: OpKey) -> None:
    assert str(key) == text and OpKey.parse(text) == key
