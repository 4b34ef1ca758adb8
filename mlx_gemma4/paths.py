"""The folders for this program's own files, writing a file whole or not at all, and JSON files."""

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import InputError, reason


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


def check_target(path: Path, mark: str = "", what: str = "file of ours") -> None:
    """Raise InputError unless a file can be written there, in place of none or of a regular one that is ours.

    `mark` stands within the first 400 bytes of each such file; without it, any regular file may be replaced.
    """
    problem = ""
    try:
        if path.exists():
            if not path.is_file():
                problem = "is no regular file"
            elif mark:
                with path.open("rb") as file:
                    problem = "" if mark.encode() in file.read(400) else f"something is there and is no {what}"
        elif not path.resolve().parent.is_dir():
            problem = f"there is no folder {path.parent}"
        if not problem and not os.access(path.resolve().parent, os.W_OK):
            problem = f"its folder {path.parent} can't be written to"
    except (OSError, ValueError, RuntimeError) as error:
        problem = f"can't be written: {reason(error)}"
    if problem:
        raise InputError(f"{path}: can't be saved: {problem}; choose another name or place")


def check_source(path: Path, what: str) -> None:
    """Raise InputError unless this is a regular file: others may have no end, or never begin."""
    if not path.is_file():
        raise InputError(f"{path}: {'is no regular file' if path.exists() else 'no such file'}; give {what}")


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name once complete; if anything fails, it is removed.

    Raises:
        OSError: it can't be written, or something else than a file has its name; an older file is unchanged.
    """
    path = path.resolve()  # a link stays one
    if path.exists() and not path.is_file():
        raise OSError(None, "is no regular file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # never through a link that lies there
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
        raise InputError(f"{path}: can't be written: {reason(error)}") from None


def keep(file: Path, key: str, value: dict[str, Any], most: int) -> None:
    """Write what was learned under a key into a file, behind the latest `most` - 1 other keys. Raises OSError."""
    values = kept(file)
    values.pop(key, None)
    values = {**dict(list(values.items())[1 - most :]), key: value}
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as out:
        out.write(json.dumps(values, indent=1).encode())


def kept(file: Path) -> dict[str, Any]:
    """Return what `keep` wrote, by key; {} where nothing can be read."""
    try:
        values = json.loads(file.read_text()) if file.is_file() else {}
    except (OSError, ValueError, RuntimeError):  # RuntimeError: nested too deeply
        return {}
    return values if isinstance(values, dict) else {}


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a model's JSON file. Raises InputError."""
    check_source(path, "the folder of a whole model")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: can't be read as JSON ({reason(error)}); download the model again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object; download the model again")
    return value
