"""Where this program keeps files of its own on a machine, and how it writes a file: whole or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


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


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file open for writing that takes its name once it is complete; else nothing is left of it.

    Raises:
        OSError: it can't be written; what was there is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()
