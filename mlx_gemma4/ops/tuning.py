"""Numbers that launch configurations are fitted to."""

from __future__ import annotations

CORES = 132  # of a large GPU, an H100
