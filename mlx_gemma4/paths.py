"""The folders for this program's own files, and writing a file whole or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def cache_folder() -> Path:
    """Return the folder of files that can be made again: kernels' verdicts, compiled kernels. It may not exist yet.

    Raises:
        RuntimeError: this user has no home folder.
    """
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx-gemma4"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-gemma4"


def state_folder() -> Path:
    """Return the folder of files worth keeping but no backup: the history of `chat`. It may not exist yet.

    Raises:
        RuntimeError: this user has no home folder.
    """
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mlx-gemma4"


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name once complete; if anything fails, it is removed.

    Raises:
        OSError: it can't be written; an older file of this name is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()
