"""Pictures, sounds and videos in requests: what any API's clients send becomes content parts with their bytes.

In: messages whose content may be a list of texts and `Given` parts. Out: messages as `prompt_ids` takes them. What the
model can't take is refused where the user asks about it, in the last message, so that it is no surprise; in what was
said before, and with `serve --skip-media` everywhere, a few words stand for it. Decodes no pictures.
"""

import asyncio
import base64
import logging
import mimetypes
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from ..config import Kind
from ..conversation.language_model import LanguageModel
from ..media.kind import BUDGETS, HEAD, kind_of
from ..media.projector import kinds_of
from . import fields
from .engine import Engine
from .fields import wrong
from .remote import Refused, fetch
from .settings import Settings
from .wire import request_id

log = logging.getLogger(__name__)

MOST = 32_000_000  # bytes of one
MOST_REMOTE = 64_000_000, 30.0  # bytes and seconds for all pictures of a request that are on the web
_DETAIL = {"low": 70, "high": 1120, "original": 1120}
WORDS: dict[Kind, str] = {  # types of parts, and the words for them
    "image": "pictures",
    "audio": "sounds",
    "video": "videos",
}
_TYPES: dict[str, Kind] = {
    **dict.fromkeys(("image_url", "input_image", "image"), "image"),
    **dict.fromkeys(("input_audio", "audio_url", "audio"), "audio"),
    **dict.fromkeys(("video_url", "video"), "video"),
}
# Fields that hold what is given, where they aren't called as the part's type.
_HOLDERS = {"input_image": "image_url", "image": "source", "audio": "source", "video": "source", "input_file": ""}
_threads = ThreadPoolExecutor(4, "media")  # of their own: those that parse requests shall not wait for the web


class Source(NamedTuple):
    """Where a part's bytes are."""

    value: Any
    path: str
    bare: bool  # base64 without "data:" is taken too
    more: Mapping[str, Any]  # that may hold `detail` and `tokens`


class Given(NamedTuple):
    """A part as a client sent it, and where it is in the request, for errors."""

    part: fields.MediaPart
    path: str
    source: Source


def content_of(content: Any, path: str) -> Any:
    """A message's content: its text, or where there is more, a list of its texts and `Given` parts, in their order.

    None among its parts is left out.
    """
    if content is None or isinstance(content, str):
        return content or ""
    found: list[Any] = [
        given(part, f"{path}[{i}]") if isinstance(part, fields.MediaPart) else fields.text_of(part)
        for i, part in enumerate(content)
        if part is not None
    ]
    if not any(isinstance(part, Given) for part in found):
        return "\n".join(filter(None, found))
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in found if part != ""]


def of_base64(data: str, path: str) -> Given:
    """A part whose kind only its bytes tell, as Ollama's clients send them."""
    kind = _sniffed(data) or "image"
    return Given(fields.MediaPart(type=kind), path, Source(data, path, True, {}))


async def received(messages: Any, engine: Engine) -> list[dict[str, Any]]:
    """Return messages with the bytes of what was given in them. Raises ApiError (400), naming the part."""
    if not any(isinstance(message["content"], list) for message in messages):
        return list(messages)
    reader = _Reader(engine.lm, engine.settings)
    made = await asyncio.get_running_loop().run_in_executor(_threads, reader.messages, messages)
    if reader.left:
        names = ", ".join(map(repr, reader.left))
        log.warning("%s: Left out %d kind(s) of parts: %s", request_id.get(), len(reader.left), names)
    return made


class _Reader:
    """Reads one request's parts."""

    def __init__(self, lm: LanguageModel, settings: Settings) -> None:
        self.lm, self.settings, self.kinds = lm, settings, kinds_of(lm.media)
        self.left: Counter[str] = Counter()
        self.room, self.end = MOST_REMOTE[0], time.monotonic() + MOST_REMOTE[1]

    def messages(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        for i, message in enumerate(messages):
            role, content = message["role"], message["content"]
            if isinstance(content, list):
                asked = role == "user" and i == len(messages) - 1
                parts = [self.part(part, role in ("user", "tool"), asked) for part in content]
                plain = all(part["type"] == "text" for part in parts)
                content = "\n".join(filter(None, (part["text"] for part in parts))) if plain else parts
            made.append({**message, "content": content})
        return made

    def part(self, part: Any, may: bool, asked: bool) -> dict[str, Any]:
        """A part as `prompt_ids` takes it. may: it can be other than text; asked: it is what the user asks about."""
        if not isinstance(part, Given):  # a text, or what an earlier request brought
            return dict(part)
        given, path, source = part
        kind = _TYPES.get(given.type) or _kind_of_file(source)
        if kind is None:
            self.left[given.type] += 1
            return _text(f"[{given.type}: left out, only text can be read here]")
        if self.settings.skip_media or kind not in self.kinds or not may:
            if asked and not self.settings.skip_media:
                raise wrong(path, _refusal(self.lm, kind), "unsupported_value")
            self.left[given.type] += 1
            return _text(f"({kind})")
        tokens = {"tokens": n} if kind == "image" and (n := self._tokens(given, source, path)) else {}
        return {"type": kind, kind: self._bytes(source, kind), **tokens}

    def _tokens(self, given: fields.MediaPart, source: Source, path: str) -> int | None:
        tokens = source.more.get("tokens", given.tokens)
        if tokens is None:
            detail = source.more.get("detail") or given.detail
            return _DETAIL.get(str(detail)) or self.settings.image_tokens
        if tokens not in BUDGETS or isinstance(tokens, bool):
            raise wrong(f"{path}.tokens", f"must be one of {', '.join(map(str, BUDGETS))}, not {tokens!r:.40}")
        return int(tokens)

    def _bytes(self, source: Source, kind: Kind) -> bytes:
        value, path = source.value, source.path
        if not isinstance(value, str) or not value:
            raise wrong(path, f"is missing: it holds the {kind}, as a data: URL with base64")
        if re.match("https?://", value[:8], re.IGNORECASE):
            return self._fetched(value, path, kind)
        head = re.match(r"data:([\w.+/-]*)(?:;[\w.+=-]+)*?(;base64)?,", value[:200], re.IGNORECASE)
        if head and not head[2]:
            raise wrong(path, "is a data: URL without base64: write data:image/png;base64,...")
        if not head and (value[:5].lower() == "data:" or not source.bare):
            raise wrong(path, f"is {value[:40]!r}: give a data: URL with base64; files of this machine are not read")
        if head and "svg" in head[1].lower():
            raise wrong(path, "is an SVG, which is a drawing and no picture: send it as PNG")
        return _decoded(value[head.end() if head else 0 :], path)

    def _fetched(self, address: str, path: str, kind: Kind) -> bytes:
        if not self.settings.allow_remote_images or kind != "image":
            flag = " (serve --allow-remote-images)" if kind == "image" else ""
            raise wrong(path, f"is an address on the web, from which this server reads nothing{flag}: send a data: URL")
        try:
            found = fetch(address, min(MOST, self.room), self.end)
        except Refused as error:
            raise wrong(path, f"{address[:80]!r} {error}") from None
        self.room -= len(found)
        return found


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def given(part: fields.MediaPart, path: str) -> Given:
    """A part of the request at `path`: its bytes are where its type has them."""
    at = path
    name = _HOLDERS.get(part.type, part.type)
    held = getattr(part, name) if name else {"file_data": part.file_data, "filename": part.filename}
    path = f"{path}.{name}" if name else path
    if not isinstance(held, dict):
        return Given(part, at, Source(held, path, False, {}))
    key = {"input_audio": "data", "file": "file_data", "": "file_data"}.get(name, "url")
    if name == "source":
        key = "url" if held.get("type") == "url" else "data"
    return Given(part, at, Source(held.get(key), f"{path}.{key}", key in ("data", "file_data"), held))


def _kind_of_file(source: Source) -> Kind | None:
    """What a file is: by its first bytes, else by its data: URL or its name."""
    value, name = source.value, source.more.get("filename")
    if not isinstance(value, str):
        return None
    named = re.match(r"data:([\w.+/-]*)", value[:200])
    guess = named[1] if named else mimetypes.guess_type(name)[0] if isinstance(name, str) else None
    kind = (guess or "").partition("/")[0]
    return _sniffed(value[:200].partition(",")[2] if named else value) or next((k for k in WORDS if k == kind), None)


def _sniffed(data: str) -> Kind | None:
    try:
        return kind_of(base64.b64decode(data[: HEAD // 3 * 4 + 4]))
    except ValueError:
        return None


def _decoded(text: str, path: str) -> bytes:
    if len(text) // 4 * 3 > MOST:
        raise wrong(path, f"holds over {MOST // 10**6} MB, the most for one; send a smaller one")
    try:
        found = base64.b64decode("".join(text.split()) if re.search(r"\s", text) else text, validate=True)
    except ValueError:
        raise wrong(path, "is not base64") from None
    if not found:
        raise wrong(path, "is empty")
    return found


def _refusal(lm: LanguageModel, kind: Kind) -> str:
    """Why a model can't take one, in words that follow its path."""
    what = WORDS[kind]
    if lm.media is not None:
        return f"can't be read: this model takes {' and '.join(WORDS[x] for x in kinds_of(lm.media))}, no {what}"
    skip = "with --skip-media it is left out"
    return f"can't be read: this model is served without an mmproj file, so it takes no {what} (--mmproj FILE; {skip})"
