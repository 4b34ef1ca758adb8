"""The folders for this program's own files, writing a file whole or not at all, and JSON files."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import InputError


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


def write_object(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all. Raises InputError."""
    try:
        with whole_file(path) as file:
            file.write((json.dumps(value, indent=1) + "\n").encode())
    except OSError as error:
        raise InputError(f"{path}: can't be written: {error.strerror or error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a model's JSON file. Raises InputError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read as JSON ({error}); download the model again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object; download the model again")
    return value
