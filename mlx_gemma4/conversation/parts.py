"""Pictures and sounds in prompts: content parts of messages as soft tokens, and what a saved session keeps of them.

In: a part, as {"type": "image", "image": bytes, a path or a PIL image}. Out: ids, in place of the token that the chat
template writes for it. Knows no files: a `Media` reads them (media/projector.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..chat_format.messages import MEDIA, media_parts
from ..chat_format.template import Message
from ..config import Kind
from ..errors import InputError
from ..media.projector import Media
from ..model.soft import Encoded, SoftTokens, soft_ids
from ..tokens.tokenizer import Tokenizer

_MARK = re.compile(r"\{(image|audio|video)\}")


class PromptIds(list[int]):
    """Token ids of a prompt. Whoever holds them holds what their soft tokens stand for."""

    media: Sequence[Encoded] = ()


def with_soft_tokens(
    ids: list[int], messages: Sequence[Message], tokenizer: Tokenizer, media: Media | None, soft: SoftTokens
) -> PromptIds:
    """Put soft tokens in place of those that the template wrote for the pictures and sounds of messages.

    Args:
        ids: of the messages, as the template has them.
        messages: from `for_template`.
        soft: of the model: comes to know what is encoded.

    Raises:
        InputError: the template has no place for one, or it can't be read.
    """
    parts, made, held = iter(media_parts(messages)), PromptIds(), []
    places = {tokenizer.token_id(f"<|{kind}|>"): kind for kind in MEDIA}
    for id in ids:
        kind = places.get(id)
        part = next(parts, None) if kind else None
        if part is None:
            made.append(id)
            continue
        if part["type"] != kind:
            raise InputError(
                f"the model's chat template has another place for {MEDIA[part['type']]}; give it text alone"
            )
        for piece in _pieces(part, media):
            if isinstance(piece, Encoded):
                held.append(soft.add(piece))
                made += piece.ids
            elif isinstance(piece, str):
                made += tokenizer.encode(piece, add_bos=False, parse_special=True)
            else:
                made += piece
    if (left := next(parts, None)) is not None:
        raise InputError(f"the model's chat template has no place for {MEDIA[left['type']]} there; give it text alone")
    made.media = held
    return made


def content_of(text: str, parts: Sequence[Mapping[str, Any]]) -> str | list[Mapping[str, Any]]:
    """Return a message's content: text with parts where it has {image}, {audio}, {video}, or else before it, in order.

    Raises:
        InputError: it has other marks of a kind than there are parts.

    >>> content_of("What is {image}?", [{"type": "image", "image": "a.png"}])[1]
    {'type': 'image', 'image': 'a.png'}
    """
    if not parts:
        return text
    pieces = _MARK.split(text)  # text, kind, text, kind, .., text
    marked = {kind: [part for part in parts if part["type"] == kind] for kind in pieces[1::2]}
    for kind, those in marked.items():
        if len(those) != (times := pieces[1::2].count(kind)):
            raise InputError(f"the prompt has {{{kind}}} {times} times, and {len(those)} of that kind are given")
    content = [part for part in parts if part["type"] not in marked]
    for i, piece in enumerate(pieces):
        if i % 2:
            content.append(marked[piece].pop(0))
        elif piece:
            content.append({"type": "text", "text": piece})
    return content


def parts_of(images: Sequence[Any], audio: Sequence[Any]) -> list[Mapping[str, Any]]:
    """Return pictures and sounds, each bytes, a path or a PIL image, as parts of a message."""
    return [
        {"type": kind, kind: content}
        for kind, given in (("image", images), ("audio", audio))
        for content in (given if isinstance(given, list | tuple) else [given])
    ]


def remembered(messages: Sequence[Message], media: Media | None) -> list[dict[str, Any]]:
    """Return messages as JSON can hold them: of a picture its name and what its soft tokens' ids are made of."""
    kept = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list | tuple):
            message = {**message, "content": [_remembered(part, media) for part in content]}
        kept.append(dict(message))
    return kept


def name_of(part: Mapping[str, Any]) -> str:
    """Return what to call a picture or sound: its file's name, or what it is."""
    content = part.get(part["type"])
    name = Path(content).name if isinstance(content, str | Path) else part.get("name")
    return str(name or MEDIA[part["type"]])


def _remembered(part: Any, media: Media | None) -> Any:
    if not isinstance(part, Mapping) or part.get("type") not in MEDIA or "pieces" in part:
        return part
    pieces = [
        {"kind": piece.kind, "digest": piece.digest.hex(), "rows": piece.rows.shape[0]}
        if isinstance(piece, Encoded)
        else piece
        for piece in _pieces(part, media)
    ]
    return {"type": part["type"], "name": name_of(part), "pieces": pieces}


def _pieces(part: Mapping[str, Any], media: Media | None) -> Sequence[Encoded | str | list[int]]:
    """Return what stands in place of a part: of one that a session has saved, the ids that it had."""
    if "pieces" not in part:
        if media is None:
            raise InputError(
                f"{MEDIA[part['type']]} is given, and no mmproj file is loaded; give it with --mmproj FILE"
            )
        return media.encode(part)
    try:
        return [piece if isinstance(piece, str) else _saved_ids(**piece) for piece in part["pieces"]]
    except (TypeError, ValueError) as error:
        raise InputError("the saved conversation has a picture or sound that can't be; start a new one") from error


def _saved_ids(kind: Kind, digest: str, rows: int) -> list[int]:
    if kind not in MEDIA or not 0 < rows <= 1 << 20:
        raise ValueError(kind)
    return soft_ids(kind, bytes.fromhex(digest), rows)
