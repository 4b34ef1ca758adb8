"""llama.cpp's endpoints about text and the model: /tokenize, /detokenize, /apply-template, /props.

In: requests as llama.cpp's server takes them, or vLLM's (by these, and /tokenizer_info, lm-evaluation-harness has a
tokenizer). Out: the same form.
"""

import asyncio
import re

from pydantic import AliasChoices, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .. import __version__
from ..conversation.reply import prompt_ids
from ..media.projector import kinds_of
from . import fields
from .completions import ChatRequest, read_chat
from .endpoint import Endpoint
from .engine import Engine
from .fields import Body, wrong
from .models import Models
from .wire import json_response


class TokenizeRequest(Body):
    """The body of /tokenize."""

    model: str | None = None
    content: str = Field(validation_alias=AliasChoices("content", "prompt"))
    add_special: bool | None = Field(None, validation_alias=AliasChoices("add_special", "add_special_tokens"))  # BOS
    parse_special: bool | None = None  # control tokens in it are read as such, unless false
    with_pieces: bool | None = None


class DetokenizeRequest(Body):
    """The body of /detokenize."""

    model: str | None = None
    tokens: fields.Items[int]


async def tokenize(body: TokenizeRequest, engine: Engine) -> Response:
    """Give a text's tokens."""
    tokenizer, special = engine.lm.tokenizer, body.parse_special is not False
    ids = await asyncio.to_thread(tokenizer.encode, body.content, add_bos=bool(body.add_special), parse_special=special)
    if not body.with_pieces:
        return json_response({"tokens": ids})
    return json_response({"tokens": [{"id": id, "piece": _piece(engine, id)} for id in ids]})


def _piece(engine: Engine, id: int) -> str | list[int]:
    """A token's text; its bytes where they are a part of a character."""
    piece = engine.lm.tokenizer.piece(id, skip_special=False)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


async def detokenize(body: DetokenizeRequest, engine: Engine) -> Response:
    """Give the text of tokens."""
    vocab = engine.lm.config.vocab
    if not all(0 <= id < vocab for id in body.tokens):
        raise wrong("tokens", f"must be ids from 0 to {vocab - 1}")
    text = engine.lm.tokenizer.decode(body.tokens, skip_special=False)
    return json_response({"content": text, "prompt": text})


async def apply_template(body: ChatRequest, engine: Engine) -> Response:
    """Give the prompt that the model reads for a conversation, as text."""
    messages, options, _ = await read_chat(body, engine)
    ids = await asyncio.to_thread(prompt_ids, engine.lm, messages, options)
    return json_response({"prompt": engine.lm.tokenizer.decode(ids, skip_special=False)})


async def _props(request: Request) -> Response:
    """What the model is and how it is served; under /tokenizer_info, its tokenizer alone."""
    models: Models = request.app.state.models
    held = await models.hold(request.query_params.get("model"))
    try:
        lm, settings, sampling = held.engine.lm, held.engine.settings, held.engine.lm.sampling
        names = ("temperature", "top_k", "top_p", "min_p")
        template, takes = lm.tokenizer.chat_template or "", kinds_of(lm.media)
        tokenizer = {
            "bos_token": lm.tokenizer.decode([lm.tokenizer.bos_id], skip_special=False),
            "eos_token": lm.tokenizer.decode(sorted(lm.tokenizer.stop_ids)[:1], skip_special=False),
            "chat_template": template,
        }
        if request.url.path == "/tokenizer_info":
            return json_response({"tokenizer_class": "GemmaTokenizer", "pad_token": None, **tokenizer})
        return json_response(
            {
                **tokenizer,
                "default_generation_settings": {
                    "n_ctx": lm.config.context,
                    "params": {
                        **{name: getattr(sampling, name) for name in names},
                        "repeat_penalty": sampling.repetition_penalty,
                        "n_predict": settings.max_tokens or -1,
                    },
                },
                "total_slots": settings.parallel,
                "model_alias": held.name,
                "model_path": lm.path.name,
                "chat_template_caps": {"supports_tools": bool(re.search(r"\btools\b", template))},
                "modalities": {"vision": "image" in takes, "audio": "audio" in takes, "video": "video" in takes},
                "build_info": f"mlx-gemma4 {__version__}",
            }
        )
    finally:
        models.release(held)


ROUTES = [Route("/props", _props), Route("/tokenizer_info", _props)]
ENDPOINTS = (
    Endpoint("/tokenize", "llama.cpp: a text's tokens", TokenizeRequest, {"tokens": [(int, dict)]}, tokenize, ""),
    Endpoint("/detokenize", "llama.cpp: the text of tokens", DetokenizeRequest, {"content": str}, detokenize, ""),
    Endpoint("/apply-template", "llama.cpp: a prompt as text", ChatRequest, {"prompt": str}, apply_template, ""),
)
