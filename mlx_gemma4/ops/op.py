"""Operations as typed values: a kernel beside its reference in stock MLX, and the keys that switch kernels off.

In: two functions of the same arguments. Out: an `Op` that `dispatch.Kernels` runs and the doctor checks. Each module of
this folder declares its own. Knows no backend.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class OpKey(NamedTuple):
    """An operation or one variant of it, as verdicts and `Kernels.off` name it; printed as "matvec Q4_K"."""

    op: str
    variant: str = ""  # a weight's format, or the name of one kernel among several; "": all of them

    def __str__(self) -> str:
        return f"{self.op} {self.variant}".rstrip()

    @classmethod
    def parse(cls, text: str) -> "OpKey":
        """The key that prints as `text`."""
        op, _, variant = text.partition(" ")
        return cls(op, variant)


@dataclass(frozen=True, eq=False)
class Op(Generic[P, R]):
    """An operation: `kernel(launcher, ...)` computes what `reference(...)` does of the same arguments.

    A kernel may take keywords beyond those, such as a launch configuration. Its results are of whatever kind the
    launcher makes: MLX arrays, or the buffers of a recorded step.
    """

    name: str
    kernel: Callable[..., Any]
    reference: Callable[P, R]
    variant: str = ""

    @cached_property
    def key(self) -> OpKey:
        return OpKey(self.name, self.variant)
