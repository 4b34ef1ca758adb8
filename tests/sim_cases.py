"""One dispatch on the Metal simulator, and how far its result is off."""

from __future__ import annotations

from typing import Any

import metal_sim
import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float": np.dtype(np.float32), "half": np.dtype(np.float16), "bfloat": BF16}
TOLERANCE = {"float": 1e-5, "half": 1e-3, "bfloat": 5e-3}  # of the largest value; a bfloat has 8 bits


def launch(
    source: str,
    inputs: dict[str, Any],
    outputs: dict[str, tuple[Any, Any]],
    grid: Any,
    threadgroup: Any,
    **options: Any,
) -> Any:
    """One dispatch of `source`; `outputs` maps a name to (shape, dtype). A single output comes back alone."""
    launcher = {k: options.pop(k) for k in ("header", "atomic_outputs", "ensure_row_contiguous") if k in options}
    run = metal_sim.kernel("test", list(inputs), list(outputs), source, **launcher)
    made = run(
        inputs=list(inputs.values()),
        output_shapes=[s for s, _ in outputs.values()],
        output_dtypes=[d for _, d in outputs.values()],
        grid=grid,
        threadgroup=threadgroup,
        **options,
    )
    return made[0] if len(made) == 1 else made


def error(got: Any, want: Any) -> float:
    """Largest difference over largest value; NaN counts as infinite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.nan_to_num(np.abs(got - want).max() / np.abs(want).max(), nan=np.inf))
