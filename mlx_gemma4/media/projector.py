"""Projector files: the towers that make soft tokens of pictures, videos and sounds, for one text model.

In: an mmproj GGUF, or a folder of safetensors whose config.json has a tower, and the text model's `Config`. Out: a
`Media`, which encodes content parts of messages. Every tensor is accounted for when the file is opened, and read when
the first picture or sound comes. Knows no prompts: what a part stands for is a list of texts and soft tokens.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import mlx.core as mx
import numpy as np

from ..config import Config, Kind, Reader
from ..errors import InputError
from ..execution import execution
from ..files.gguf import open_gguf
from ..files.repository import best_projectors, files_beside
from ..loading.from_gguf import GGUFSource
from ..loading.loader import check_present
from ..loading.tensors import Entry, Source, Spec
from ..memory import on_cpu
from ..model.soft import Encoded
from . import frames, hearing, patches, video, vision
from .content import Content, content_of
from .folder import read_folder
from .kind import KINDS
from .layers import Weights, by_layers
from .picture import budget
from .picture import inputs as picture_inputs

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("mlx_gemma4")

WIDE = ("F32", "mlx.core.float32")  # types of 4 bytes; others are held in 2 on a GPU
KEPT = 256 << 20  # bytes of rows kept for content that comes again

Pieces = list[Encoded | str]


@dataclass(frozen=True)
class Tower:
    """What there is to a projector type: a row of TOWERS."""

    kind: Literal["image", "audio"]
    projection: str  # the tensor whose rows are as many as the text model's hidden size
    # Tensors by GGUF name, of the metadata, the text model's hidden size and the tensors that the file has.
    specs: Callable[[Reader, int, Mapping[str, Entry]], dict[str, Spec]]
    inputs: Callable[[Content, Mapping[str, Any]], list[np.ndarray]]  # what `rows` reads of a content part, in pieces
    # What it makes of a piece, layer by layer, under `execution`; at last the soft tokens, fp32 [n, hidden].
    rows: Callable[[Reader, Weights, np.ndarray], Iterator[mx.array]]


SOUND = re.compile(r"(mm\.)?a\.")  # how names of tensors begin that hear
IMAGE, AUDIO = "mm.input_projection.weight", "mm.a.input_projection.weight"
TOWERS = {
    "gemma4uv": Tower("image", IMAGE, patches.specs, picture_inputs, patches.rows),
    "gemma4v": Tower("image", IMAGE, vision.specs, picture_inputs, vision.rows),
    "gemma4ua": Tower("audio", AUDIO, frames.specs, frames.inputs, frames.rows),
    "gemma4a": Tower("audio", AUDIO, hearing.specs, hearing.inputs, hearing.rows),
}


@dataclass(frozen=True)
class OpenTower:
    """A tower of a file: its type, and the metadata that it is read by."""

    type: str
    read: Reader

    @property
    def tower(self) -> Tower:
        return TOWERS[self.type]


class Media:
    """The towers of one file, for one text model; read when first needed. Any thread may call it."""

    def __init__(self, path: Path, config: Config, towers: list[OpenTower], n_bytes: int) -> None:
        self.path, self._n_bytes = path, n_bytes
        self._config, self._mark = config, b""  # of the weights, once they are read
        self._towers = {each.tower.kind: each for each in towers}
        images = {"image", "video"} if "image" in self._towers else set()
        self.kinds = frozenset(images | ({"audio"} & self._towers.keys()))
        self._weights: Weights | None = None
        self._kept: OrderedDict[bytes, Pieces] = OrderedDict()
        self._guard = threading.Lock()  # of _kept
        self._encoding = threading.Lock()  # one thread encodes at a time

    def encode(self, part: Mapping[str, Any], picture: Image.Image | None = None) -> Pieces:
        """Return what stands for a content part in a prompt: texts, control tokens among them, and soft tokens.

        Args:
            part: {"type": "image" | "audio" | "video", and under that name bytes or a path, or a Pillow image;
                "tokens" of an image: one of `kind.BUDGETS`}.
            picture: what that image is decoded, where somebody has done so.

        Raises:
            InputError: there is no tower for it, it can't be decoded, or it is too large.
        """
        kind = part["type"]
        if kind not in self.kinds:
            takes = " and ".join(sorted(self.kinds))
            hint = "; of Gemma 4 E2B, E4B and 12B hear" if kind == "audio" else ""
            raise InputError(f"{self.path}: this projector takes {takes}, no {kind}{hint}; leave it out")
        content = content_of(part)
        self.load()
        asked = f" {kind} {budget(part) if kind == 'image' else ''} ".encode()
        key = hashlib.sha256(self._mark + asked + content.digest()).digest()
        if picture is not None:
            content = replace(content, source=picture)
        return self._found(key) or self._encoded(kind, content, part, key)

    @property
    def unread(self) -> int:
        """Bytes that the weights will take; 0 once they are read."""
        return self._n_bytes if self._weights is None else 0

    def load(self) -> None:
        """Read the towers' weights now. Raises InputError."""
        with execution():
            if self._weights is None:
                weights = read_towers(self.path, self._config)
                shapes = sorted((name, array.shape) for name, array in weights.items())
                some = [weights[each.tower.projection][:16].astype(mx.float32) for each in self._towers.values()]
                self._mark = repr(shapes).encode() + b"".join(np.array(each).tobytes() for each in some)
                self._weights = weights

    def _found(self, key: bytes) -> Pieces | None:
        with self._guard:
            if key in self._kept:
                self._kept.move_to_end(key)
                return list(self._kept[key])
        return None

    def _encoded(self, kind: str, content: Content, part: Mapping[str, Any], key: bytes) -> Pieces:
        open_tower = self._towers["audio" if kind == "audio" else "image"]
        stamps: list[str] = []
        if kind == "video":
            stamps, inputs = map(list, zip(*video.frames(content), strict=True))
        else:
            inputs = open_tower.tower.inputs(content, part)
        assert self._weights is not None
        found: list[Encoded] = []
        with self._encoding:
            if kept := self._found(key):  # another thread was faster
                return kept
            for i, each in enumerate(inputs):
                rows = by_layers(open_tower.tower.rows(open_tower.read, self._weights, each))
                digest = hashlib.sha256(key + i.to_bytes(4, "little")).digest()
                found.append(Encoded(cast("Any", kind), digest, rows))
            pieces = _pieces(kind, found, stamps)
            self._keep(key, pieces)
        return list(pieces)

    def _keep(self, key: bytes, pieces: Pieces) -> None:
        with self._guard:
            self._kept[key] = pieces
            size = sum(map(_size, self._kept.values()))
            while size > KEPT and len(self._kept) > 1:
                size -= _size(self._kept.popitem(last=False)[1])


def _pieces(kind: str, found: list[Encoded], stamps: list[str]) -> Pieces:
    """Return soft tokens with the control tokens around them, and of a video the times of its frames."""
    if kind == "audio":
        return ["<|audio>", *found, "<audio|>"]
    pieces: Pieces = []
    for i, each in enumerate(found):
        pieces += [f"{' ' * (i > 0)}{stamps[i]} "] if stamps else []
        pieces += ["<|image>", each, "<image|>"]
    return pieces


def _size(pieces: Pieces) -> int:
    return sum(0 if isinstance(piece, str) else piece.rows.nbytes for piece in pieces)


def is_projector(path: Path) -> bool:
    """Return True if a file is an mmproj GGUF. Raises InputError if it can't be read."""
    if not path.is_file():
        return False
    with open_gguf(path) as gguf:
        return gguf.metadata.get("general.architecture") == "clip"


@contextmanager
def open_towers(path: Path) -> Iterator[tuple[list[OpenTower], Source]]:
    """Yield a file's or folder's towers and its tensors, unread. Raises InputError."""
    if path.is_dir():
        forms, tensors = read_folder(path)
        yield [OpenTower(form.type, Reader(metadata, "", str(path))) for form, metadata in forms], tensors
        return
    with open_gguf(path) as gguf:
        metadata = gguf.metadata
        architecture = metadata.get("general.architecture")
        if architecture != "clip":
            raise InputError(
                f"{path}: is a model of architecture {str(architecture)[:40]!r}, no projector for images or sound; "
                "give --mmproj an mmproj file, or --no-mmproj"
            )
        towers = []
        for kind in ("vision", "audio"):
            if not metadata.get(f"clip.has_{kind}_encoder"):
                continue
            type = str(metadata.get(f"clip.{kind}.projector_type", metadata.get("clip.projector_type")))
            if type not in TOWERS:
                raise InputError(
                    f"{path}: is a projector of type {type[:40]!r}, which is none of Gemma 4's "
                    f"({', '.join(TOWERS)}); give --mmproj the model's own, or --no-mmproj"
                )
            towers.append(OpenTower(type, Reader(metadata, f"clip.{kind}.", str(path))))
        if not towers:
            raise InputError(f"{path}: is a projector without a tower for images or sound; download it again")
        yield towers, GGUFSource(gguf)


def check_tensors(path: Path, towers: list[OpenTower], source: Source, hidden: int) -> dict[str, Spec]:
    """Return the specs of all tensors of a file for a text model of this hidden size. Raises InputError."""
    wanted: dict[str, Spec] = {}
    for each in towers:
        made = source.entries.get(each.tower.projection)
        if made and made.shape[:1] != (hidden,):
            raise InputError(
                f"{path}: this projector is for a model of hidden size {[*made.shape, 0][0]}, and the model's is "
                f"{hidden}; give --mmproj the model's own, or --no-mmproj"
            )
        wanted |= each.tower.specs(each.read, hidden, source.entries)
    if odd := [name for name in source.entries if name not in wanted]:
        raise InputError(
            f"{path}: has tensor {odd[0]}{f' and {len(odd) - 1} more' if odd[1:] else ''}, which nothing here knows "
            "how to use; update mlx-gemma4, or take another file of this projector"
        )
    return check_present(source, wanted)


def open_media(path: Path, config: Config) -> Media:
    """Open a projector for a text model: its metadata and directory alone are read.

    Raises:
        InputError: it is no projector of Gemma 4, or that of another model; a tensor is missing, has another shape or a
            type that can't be read, or is none that its towers have.
    """
    if config.architecture != "gemma4":
        raise InputError(f"{path}: projectors are for Gemma 4, and the model is {config.architecture}; use --no-mmproj")
    with open_towers(path) as (towers, source):
        wanted = check_tensors(path, towers, source, config.hidden)
        low = sorted({source.entries[n].type for n in wanted if SOUND.match(n) and source.entries[n].quantized})
        if low:
            log.warning("%s: what hears is quantized (%s) and mishears; take the file in BF16", path, ", ".join(low))
        narrow = {n for n, spec in wanted.items() if spec.role != "vector" and source.entries[n].type not in WIDE}
        n_bytes = sum(prod(s.shape) * (2 if n in narrow and not on_cpu() else 4) for n, s in wanted.items())
        return Media(path, config, towers, n_bytes)


def read_towers(path: Path, config: Config) -> Weights:
    """Read all weights of a file: matrices in their own float type, or fp32 on a CPU, and others fp32."""
    with open_towers(path) as (towers, source):
        found: dict[str, mx.array] = {}
        for name, spec in check_tensors(path, towers, source, config.hidden).items():
            quantized = source.entries[name].quantized
            read = cast("mx.array", source.read([name], spec, "dense" if quantized else "packed", None)).reshape(
                spec.shape
            )
            found[name] = read.astype(mx.bfloat16) if quantized and not on_cpu() else read
        mx.eval(found)
    return found


def kinds_of(media: Media | None) -> tuple[Kind, ...]:
    """Return what a model takes beside text, in the order of KINDS."""
    return tuple(kind for kind in KINDS if media and kind in media.kinds)


def media_beside(path: Path, config: Config) -> Media | None:
    """Open the projector that lies beside a model's file and fits it, or the model's folder if that has towers.

    If there is none, one level up is looked: repositories have folders for the parts of a split file.
    """
    near = [files_beside(path), files_beside(path, ".")]
    for file in [str(path)] if path.is_dir() else [each for some in near for each in best_projectors(some, path.name)]:
        try:
            return open_media(Path(file), config)
        except (InputError, OSError) as error:
            log.info("%s", error)
    return None
