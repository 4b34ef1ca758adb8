"""What lists of models say of each: read from a file's header once, without loading it.

In: a path. Out: a `Card`, and its forms in OpenAI's and Anthropic's lists and LM Studio's.
"""

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from ..config import Config, Kind
from ..errors import InputError
from ..files.repository import QUANT
from ..loading.loader import open_model
from ..media.projector import kinds_of, media_beside

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Card:
    """A model as lists show it."""

    name: str
    path: Path
    changed: float  # seconds since 1970
    config: Config
    n_bytes: int  # of its tensors
    parameters: int
    quant: str  # "Q4_K_M", or the type of most of its bytes
    template: str
    metadata: Mapping[str, Any]  # numbers and strings of a GGUF
    media: tuple[Kind, ...] = ()  # what it takes beside text: "image", "audio", "video"

    @property
    def digest(self) -> str:
        """64 hex digits that change with the file; no hash of its contents, which would take a minute."""
        return hashlib.sha256(f"{self.path} {self.n_bytes} {self.changed}".encode()).hexdigest()

    @property
    def form(self) -> str:
        return "gguf" if self.path.suffix == ".gguf" else "safetensors"

    @property
    def parameter_size(self) -> str:
        n = self.parameters
        return f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.2f}M"

    def openai(self) -> dict[str, Any]:
        head = {"id": self.name, "object": "model", "created": int(self.changed), "owned_by": "mlx-gemma4"}
        takes = {"input_modalities": ["text", *self.media], "output_modalities": ["text"]}  # as OpenRouter has it
        return {**head, "context_length": self.config.context, "architecture": takes}

    def anthropic(self) -> dict[str, Any]:
        created = timestamp(self.changed)
        return {"type": "model", "id": self.name, "display_name": self.name, "created_at": created}

    def lm_studio(self, loaded: bool) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "type": "vlm" if "image" in self.media else "llm",
            "publisher": self.name.rpartition("/")[0].split("/")[0],
            "arch": self.config.architecture,
            "compatibility_type": self.form,
            "quantization": self.quant,
            "state": "loaded" if loaded else "not-loaded",
            "max_context_length": self.config.context,
            **({"loaded_context_length": self.config.context} if loaded else {}),
        }


def timestamp(seconds: float) -> str:
    """A time as RFC 3339 has it, in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")


def cards(models: Mapping[str, Path]) -> list[Card]:
    """Return the cards of models, without those that can't be read."""
    return [card for name, path in models.items() if (card := card_of(name, path))]


def card_of(name: str, path: Path) -> Card | None:
    try:
        return _read(name, path, path.stat().st_mtime)
    except OSError:  # it is gone
        return None


@lru_cache(1000)
def _read(name: str, path: Path, changed: float) -> Card | None:
    try:
        with open_model(path) as (config, source, metadata):
            entries = source.entries.values()
            sizes: dict[str, int] = {}
            for entry in entries:
                sizes[entry.type] = sizes.get(entry.type, 0) + entry.n_bytes
            template = metadata.get("tokenizer.chat_template") or _template_file(path)
            return Card(
                name,
                path,
                changed,
                config,
                sum(sizes.values()),
                sum(prod(entry.shape) for entry in entries),
                next(reversed(QUANT.findall(path.name.upper())), None) or max(sizes, key=lambda type: sizes[type]),
                template if isinstance(template, str) else "",
                {key: x for key, x in metadata.items() if isinstance(x, bool | int | float | str)},
                kinds_of(media_beside(path, config)),
            )
    except InputError as error:
        log.warning("Left out of the list of models: %s", error)
        return None


def _template_file(path: Path) -> str:
    file = path / "chat_template.jinja"
    return file.read_text(errors="replace") if file.is_file() else ""


def page_of(data: Iterable[dict[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """Anthropic's list of models, by its parameters `limit`, `after_id` and `before_id`."""
    items = list(data)
    ids = [item["id"] for item in items]
    after, before, limit = query.get("after_id"), query.get("before_id"), query.get("limit", "20")
    size = min(max(int(limit), 1), 1000) if re.fullmatch("[0-9]{1,9}", limit) else 20
    some = items[ids.index(after) + 1 if after in ids else 0 : ids.index(before) if before in ids else len(ids)]
    kept = some[-size:] if before in ids else some[:size]
    first, last = (kept[0]["id"], kept[-1]["id"]) if kept else (None, None)
    return {"data": kept, "has_more": len(some) > size, "first_id": first, "last_id": last}
