"""The lists of models: OpenAI's and Anthropic's at /v1/models, LM Studio's at /api/v0/models, Ollama's tags and ps.

In: GET requests. Out: what `Models` has, each list in the form that its clients know.
"""

import math
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .cards import Card, page_of, timestamp
from .models import Models
from .wire import ApiError, error_response, json_response

OLLAMA_VERSION = "0.13.0"  # of Ollama's API that this follows: clients ask for a lowest one


async def _models(request: Request) -> Response:
    cards = await _of(request).cards()
    if "anthropic-version" in request.headers:
        return json_response(page_of([card.anthropic() for card in cards], request.query_params))
    return json_response({"object": "list", "data": [card.openai() for card in cards]})


async def _model(request: Request) -> Response:
    for_anthropic = "anthropic-version" in request.headers
    try:
        card = await _of(request).card(request.path_params["model"])
    except ApiError as error:
        return error_response(error, "/v1/messages" if for_anthropic else "/v1/models")
    return json_response(card.anthropic() if for_anthropic else card.openai())


async def _lm_studio(request: Request) -> Response:
    models = _of(request)
    data = [card.lm_studio(card.name in models.loaded) for card in await models.cards()]
    return json_response({"object": "list", "data": data})


async def _lm_studio_model(request: Request) -> Response:
    models = _of(request)
    card = await models.card(request.path_params["model"])
    return json_response(card.lm_studio(card.name in models.loaded))


async def _tags(request: Request) -> Response:
    cards = await _of(request).cards()
    return json_response({"models": [{**tag(card), "modified_at": timestamp(card.changed)} for card in cards]})


async def _ps(request: Request) -> Response:
    models = _of(request)
    found = []
    for card in await models.cards():
        held = models.loaded.get(card.name)
        if held:
            until = timestamp(held.until if math.isfinite(held.until) else 253e9)  # the year 9987: for ever
            memory = held.engine.lm.plan.weights + held.engine.store.nbytes
            found.append(tag(card) | {"expires_at": until, "size_vram": memory, "context_length": card.config.context})
    return json_response({"models": found})


async def _version(request: Request) -> Response:
    return json_response({"version": OLLAMA_VERSION})


def tag(card: Card) -> dict[str, Any]:
    """A model in Ollama's lists."""
    head = {"name": card.name, "model": card.name, "size": card.n_bytes, "digest": card.digest}
    return head | {"details": details(card), "capabilities": capabilities(card)}


def capabilities(card: Card) -> list[str]:
    """What a model can do, in Ollama's words, as its chat template and its mmproj show."""
    able = {"vision": "image" in card.media, "audio": "audio" in card.media}
    able |= {"tools": "tools" in card.template, "thinking": "enable_thinking" in card.template}
    return ["completion", *(name for name, can in able.items() if can)]


def details(card: Card) -> dict[str, Any]:
    family = card.config.architecture
    return {
        "parent_model": "",
        "format": card.form,
        "family": family,
        "families": [family],
        "parameter_size": card.parameter_size,
        "quantization_level": card.quant,
    }


def _of(request: Request) -> Models:
    models: Models = request.app.state.models
    return models


ROUTES = [
    *(Route(path, _models) for path in ("/v1/models", "/v1/models/")),
    Route("/v1/models/{model:path}", _model),
    *(Route(path, _lm_studio) for path in ("/api/v0/models", "/api/v0/models/")),
    Route("/api/v0/models/{model:path}", _lm_studio_model),
    Route("/api/tags", _tags),
    Route("/api/ps", _ps),
    Route("/api/version", _version),
]
