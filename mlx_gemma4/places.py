"""Where this program keeps files of its own on a machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """For what can be made again: verdicts on kernels, compiled ones. It may not exist yet.

    Raises:
        RuntimeError: this user has no home.
    """
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx-gemma4"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-gemma4"


def state_folder() -> Path:
    """For what is worth keeping but not worth a backup: the history of `chat`. It may not exist yet.

    Raises:
        RuntimeError: this user has no home.
    """
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mlx-gemma4"
