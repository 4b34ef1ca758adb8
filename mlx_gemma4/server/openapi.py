"""What the server takes and sends, as an OpenAPI 3.1 document: schemas come from the endpoints' models.

In: the endpoints. Out: `document`. Requests may hold more than it says: unknown fields are ignored.
"""

from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from .. import __version__
from .endpoint import Endpoint
from .fields import MAX_CHOICES

Schema = dict[str, Any]

_TYPES = {str: "string", dict: "object", float: "number", True: "boolean", None: "null"}
_ERROR = {"error": {"message": str, "type": str, "param": (str, None), "code": (str, None)}}
_OLLAMA_ERROR = {"error": str}
_MESSAGES_ERROR = {"type": "error", "error": {"type": str, "message": str}}
_MODEL = {"id": str, "object": "model", "created": int, "owned_by": str}
_MODELS = {"object": "list", "data": [_MODEL]}
_STUDIO_MODEL = {"id": str, "object": "model", "state": ("loaded", "not-loaded"), "max_context_length": int}
_STUDIO_MODELS = {"object": "list", "data": [_STUDIO_MODEL]}
_OLLAMA_MODELS = {"models": [{"name": str, "model": str, "size": int, "digest": str, "details": dict}]}
VOCAB = 262_144  # tokens, where no model is loaded
_HEALTH = {"status": ("ok", "draining"), "running": int, "waiting": int}
_REFUSALS = {
    400: "The request is wrong: `param` names the field, where it is one.",
    401: "No API key, or a wrong one.",
    403: "Not from this machine, or from a page of another site.",
    404: "No such model.",
    408: "The body took too long.",
    413: "The body is too long.",
    429: "The queue is full: try again after Retry-After seconds.",
    503: "The server is shutting down.",
}


def document(endpoints: Sequence[Endpoint], vocab: int, with_key: bool) -> dict[str, Any]:
    """Return the document. `vocab`: the number of tokens; `with_key`: the server asks for an API key."""
    _, found = models_json_schema(
        [(endpoint.request, "validation") for endpoint in endpoints], ref_template="#/components/schemas/{model}"
    )
    components: dict[str, Any] = {"schemas": _with_ids(found["$defs"], vocab)}
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "mlx-gemma4", "version": __version__},
        "paths": {
            **{endpoint.path: _post(endpoint) for endpoint in endpoints},
            "/v1/models": _get("The models", _json(_MODELS), 401, 403),
            "/v1/models/{model}": _named("model", "A model, by its name", get=_MODEL),
            "/api/v0/models": _get("LM Studio: the models", _json(_STUDIO_MODELS), 401, 403),
            "/api/v0/models/{model}": _named("model", "LM Studio: a model", get=_STUDIO_MODEL),
            "/api/tags": _get("Ollama: the models", _json(_OLLAMA_MODELS), 401, 403),
            "/api/ps": _get("Ollama: the models that are loaded", _json(_OLLAMA_MODELS), 401, 403),
            "/api/version": _get("Ollama: its version", _json({"version": str}), 401, 403),
            "/v1/responses/{id}": _named(
                "id", "A response that is kept", get={"object": "response"}, delete={"deleted": True}
            ),
            "/props": _get("llama.cpp: the model", _json({"default_generation_settings": dict}), 401, 403, 404),
            "/tokenizer_info": _get("vLLM: the tokenizer", _json({"eos_token": str}), 401, 403, 404),
            "/metrics": _get("Counters for Prometheus", {"text/plain": {"schema": {"type": "string"}}}, 401, 403),
            "/health": _get("Says that the server answers", _json(_HEALTH), 403),
        },
        "components": components,
    }
    if with_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
    return made


def _with_ids(schemas: dict[str, Schema], vocab: int) -> dict[str, Schema]:
    """The schemas, with those of fields that hold ids of tokens."""
    text, digits = {"type": "string", "minLength": 1}, len(str(vocab)) - 2
    ids = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": vocab - 1}, "minItems": 1}
    several = [{"type": "array", "items": one, "minItems": 1, "maxItems": MAX_CHOICES} for one in (text, ids)]
    schemas["Bias"] = {
        "type": "object",
        "propertyNames": {"pattern": f"^(0|[1-9][0-9]{{0,{digits}}})$"},  # not the largest: all of these are ids
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    }
    for schema in schemas.values():
        properties = schema.get("properties", {})
        if "logit_bias" in properties:
            properties["logit_bias"] = {"anyOf": [{"$ref": "#/components/schemas/Bias"}, {"type": "null"}]}
        if properties.get("tokens", {}).get("type") == "array":
            properties["tokens"] = {key: value for key, value in ids.items() if key != "minItems"}
        for name in (one for one in ("prompt", "input") if properties.get(one, {"type": ""}).keys() == {"title"}):
            properties[name] = {"anyOf": [text, ids, *several]}
    return schemas


def schema(sample: Any) -> Schema:
    """The JSON schema of what looks like a sample: an object with all of its keys, a list of items like its
    first, a string or a type as they are, any of several.
    """
    if isinstance(sample, dict):
        properties = {name: schema(value) for name, value in sample.items()}
        return {"type": "object", "properties": properties, "required": list(sample)}
    if isinstance(sample, list):
        return {"type": "array", "items": schema(sample[0])}
    if isinstance(sample, tuple):
        return {"anyOf": [schema(one) for one in sample]}
    if sample is int:
        return {"type": "integer", "minimum": 0}
    return {"const": sample} if isinstance(sample, str) else {"type": _TYPES[sample]}


def _json(sample: dict[str, Any]) -> Schema:
    return {"application/json": {"schema": schema(sample)}}


def _refusals(error: dict[str, Any], *codes: int) -> dict[str, Any]:
    return {str(code): {"description": _REFUSALS[code], "content": _json(error)} for code in codes}


def _post(endpoint: Endpoint) -> dict[str, Any]:
    content = _json(endpoint.reply) if endpoint.reply else {}
    content |= {endpoint.streams: {}} if endpoint.streams else {}
    anthropic, ollama = endpoint.path.startswith("/v1/messages"), endpoint.path.startswith("/api/")
    answers = {"200": {"description": endpoint.summary} | ({"content": content} if content else {})}
    answers |= _refusals(_MESSAGES_ERROR if anthropic else _OLLAMA_ERROR if ollama else _ERROR, *_REFUSALS)
    if anthropic:  # 529 is what Anthropic's clients know for 503
        answers["529"] = answers.pop("503")
    schema = {"$ref": f"#/components/schemas/{endpoint.request.__name__}"}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {endpoint.method.lower(): {"summary": endpoint.summary, "requestBody": body, "responses": answers}}


def _get(summary: str, content: Schema, *codes: int) -> dict[str, Any]:
    answers = {"200": {"description": summary, "content": content}, **_refusals(_ERROR, *codes)}
    return {"get": {"summary": summary, "responses": answers} | ({} if 401 in codes else {"security": []})}


def _named(name: str, summary: str, **samples: dict[str, Any]) -> dict[str, Any]:
    """Methods, by their samples, of a path that ends in a name."""
    made: dict[str, Any] = {
        "parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]
    }
    return made | {method: _get(summary, _json(sample), 401, 403, 404)["get"] for method, sample in samples.items()}
