"""Open a model's file or folder, of whichever format: its configuration and its tensors, nothing loaded yet.

In: the path of a GGUF file or of a folder of safetensors. Out: a `Config` and a `Source` for `load_model`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config import Config, config_from_gguf, config_from_json
from ..errors import InputError
from ..files.gguf import open_gguf
from ..paths import read_object
from .from_gguf import GGUFSource
from .from_safetensors import FolderSource
from .tensors import Source


@contextmanager
def open_model(path: Path) -> Iterator[tuple[Config, Source, Mapping[str, Any]]]:
    """Yield the configuration, the tensors, and a GGUF's metadata ({} for a folder). Raises InputError."""
    if path.is_dir():
        file = path / "config.json"
        if not file.is_file():
            raise InputError(f"{path}: this folder has no config.json; give a .gguf file or a model's folder")
        contents = read_object(file)
        config = config_from_json(contents, str(file))
        yield config, FolderSource(path, config, contents.get("quantization") or {}), {}
    else:
        with open_gguf(path) as gguf:
            yield config_from_gguf(gguf.metadata, str(path)), GGUFSource(gguf), gguf.metadata
