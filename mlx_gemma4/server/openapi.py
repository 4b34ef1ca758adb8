"""What the endpoints take and give, as an OpenAPI 3.1 document.

In: nothing. Out: `document`. Requests may hold more than it says: unknown fields are ignored.
"""

from __future__ import annotations

from typing import Any

from .. import __version__
from .options import EFFORTS, MAX_CHOICES, MAX_STOPS, MAX_TOP_LOGPROBS, NAME, ROLES

Schema = dict[str, Any]


def _number(low: float, high: float) -> Schema:
    return {"type": ["number", "null"], "minimum": low, "maximum": high}


def _integer(low: int, high: int) -> Schema:
    return {"type": ["integer", "null"], "minimum": low, "maximum": high}


def _list(item: Schema, low: int = 0, high: int | None = None) -> Schema:
    return {"type": "array", "items": item, "minItems": low, **({} if high is None else {"maxItems": high})}


def _object(needed: dict[str, Schema], **optional: Schema) -> Schema:
    made: Schema = {"type": "object", "properties": {**needed, **optional}}
    return made | ({"required": list(needed)} if needed else {})


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _one_of(*values: str | None) -> Schema:
    return {"enum": list(values)}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_TEXT: Schema = {"type": "string"}
_MAY_TEXT: Schema = {"type": ["string", "null"]}
_FLAG: Schema = {"type": ["boolean", "null"]}
_ANY_OBJECT: Schema = {"type": "object"}
_MAY_OBJECT: Schema = {"type": ["object", "null"]}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_LENGTH = _integer(1, 2**31)
_NAME: Schema = {"type": "string", "pattern": f"^{NAME.pattern}$"}
_STOP: Schema = {"type": "string", "minLength": 1, "maxLength": 1000}
_STOPS: Schema = {"anyOf": [_STOP, _list(_STOP, 0, MAX_STOPS), {"type": "null"}]}
_SAMPLING: dict[str, Schema] = {
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": _integer(-1, 2**31),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0, 100),
    "frequency_penalty": _number(-2, 2),
    "presence_penalty": _number(-2, 2),
    "seed": _integer(-(2**63), 2**64 - 1),
    "logit_bias": _or_null(_ref("Bias")),
}
_CONTENT: Schema = {"anyOf": [_TEXT, _list(_ref("Part"))]}
_BLOCKS: Schema = {"anyOf": [_TEXT, _list(_ref("Block"), 1)]}
_FORMAT: Schema = {
    "description": 'Also {"type": "regex", "regex": "..."} and {"type": "lark", "grammar": "..."}.',
    "anyOf": [
        _object({"type": _one_of("text", "json_object")}),
        _object({"type": _one_of("json_schema"), "json_schema": _object({"schema": _ANY_OBJECT})}),
        {"type": "null"},
    ],
}
_FUNCTION = _object({"name": _NAME}, description=_MAY_TEXT, parameters=_MAY_OBJECT, strict=_FLAG)
_FLAT_FUNCTION = _object({"type": _one_of("function"), **_FUNCTION["properties"]})
_FLAT_FUNCTION["required"] = ["type", "name"]
_CALL = _object({"id": _TEXT, "type": _one_of("function"), "function": _object({"name": _TEXT, "arguments": _TEXT})})
_USAGE = _object(
    {"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT},
    prompt_tokens_details=_object({"cached_tokens": _COUNT}),
    completion_tokens_details=_object({"reasoning_tokens": _COUNT}),
)
_FINISH = _one_of("stop", "length", "tool_calls")
_OTHERS = ("system", "developer", "user")

_SCHEMAS: dict[str, Schema] = {
    "Error": _object(
        {"error": _object({"message": _TEXT, "type": _TEXT, "param": _MAY_TEXT, "code": _MAY_TEXT})},
    ),
    "Part": _object({"text": _TEXT}, type=_one_of("text", None)),
    "Block": _object({"type": _one_of("text"), "text": _TEXT}),
    "Call": _object(
        {"function": _object({"name": _NAME}, arguments={"type": ["object", "string", "null"]})}, id=_MAY_TEXT
    ),
    "Message": {
        "anyOf": [
            _object({"role": _one_of(*_OTHERS), "content": _CONTENT}),
            _object({"role": _one_of("tool"), "content": _CONTENT}, tool_call_id=_MAY_TEXT, name=_MAY_TEXT),
            _object(
                {"role": _one_of("assistant")},
                content=_or_null(_CONTENT),
                reasoning_content=_MAY_TEXT,
                tool_calls=_or_null(_list(_ref("Call"))),
            ),
        ]
    },
    "ChatRequest": _object(
        {"messages": _list(_ref("Message"), 1)},
        model=_MAY_TEXT,
        n=_integer(1, MAX_CHOICES),
        max_tokens=_LENGTH,
        max_completion_tokens=_LENGTH,
        stop=_STOPS,
        stream=_FLAG,
        logprobs=_FLAG,
        response_format=_FORMAT,
        reasoning_effort=_one_of(*EFFORTS, None),
        chat_template_kwargs=_or_null(_object({}, enable_thinking=_FLAG)),
        tools=_or_null(_list(_object({"type": _one_of("function"), "function": _FUNCTION}), 0, 1)),
        parallel_tool_calls=_FLAG,
        **_SAMPLING,
    ),
    "ChatReply": _object(
        {
            "id": _TEXT,
            "object": _one_of("chat.completion"),
            "created": _COUNT,
            "model": _TEXT,
            "choices": _list(
                _object(
                    {
                        "index": _COUNT,
                        "finish_reason": _FINISH,
                        "logprobs": _MAY_OBJECT,
                        "message": _object(
                            {"role": _one_of("assistant"), "content": _MAY_TEXT},
                            reasoning_content=_TEXT,
                            tool_calls=_list(_CALL),
                        ),
                    }
                ),
                1,
            ),
            "usage": _USAGE,
        }
    ),
    "CompletionRequest": _object(
        {
            "prompt": {
                "anyOf": [
                    {"type": "string", "minLength": 1},
                    _list({"type": "string", "minLength": 1}, 1, MAX_CHOICES),
                    _ref("Ids"),
                    _list(_ref("Ids"), 1, MAX_CHOICES),
                ]
            }
        },
        model=_MAY_TEXT,
        n=_integer(1, MAX_CHOICES),
        max_tokens=_LENGTH,
        stop=_STOPS,
        stream=_FLAG,
        logprobs=_integer(0, MAX_TOP_LOGPROBS),
        response_format=_FORMAT,
        **_SAMPLING,
    ),
    "CompletionReply": _object(
        {
            "id": _TEXT,
            "object": _one_of("text_completion"),
            "created": _COUNT,
            "model": _TEXT,
            "choices": _list(
                _object({"index": _COUNT, "text": _TEXT, "finish_reason": _FINISH, "logprobs": _MAY_OBJECT}), 1
            ),
            "usage": _USAGE,
        }
    ),
    "ResponsesRequest": _object(
        {
            "input": {
                "anyOf": [
                    _TEXT,
                    _list(
                        _object({"role": _one_of(*ROLES[:-1]), "content": _CONTENT}, type=_one_of("message", None)), 1
                    ),
                ]
            }
        },
        model=_MAY_TEXT,
        instructions=_MAY_TEXT,
        max_output_tokens=_LENGTH,
        stream=_FLAG,
        reasoning=_or_null(_object({}, effort=_one_of(*EFFORTS, None))),
        text=_or_null(_object({}, format=_or_null(_object({"type": _one_of("text", "json_object")})))),
        tools=_or_null(_list(_FLAT_FUNCTION, 0, 1)),
        parallel_tool_calls=_FLAG,
        metadata=_MAY_OBJECT,
        top_logprobs=_integer(0, MAX_TOP_LOGPROBS),
        **_SAMPLING,
    ),
    "ResponsesReply": _object(
        {
            "id": _TEXT,
            "object": _one_of("response"),
            "created_at": _COUNT,
            "model": _TEXT,
            "status": _one_of("completed", "incomplete"),
            "output": _list(_object({"id": _TEXT, "type": _one_of("message", "reasoning", "function_call")})),
            "usage": _object({"input_tokens": _COUNT, "output_tokens": _COUNT, "total_tokens": _COUNT}),
        }
    ),
    "MessagesError": _object({"type": _one_of("error"), "error": _object({"type": _TEXT, "message": _TEXT})}),
    "MessagesRequest": _object(
        {
            "model": _TEXT,
            "max_tokens": {"type": "integer", "minimum": 1, "maximum": 2**31},
            "messages": _list(_object({"role": _one_of("user"), "content": _BLOCKS}), 1),
        },
        system={"anyOf": [_TEXT, _list(_ref("Block")), {"type": "null"}]},
        stop_sequences=_or_null(_list(_STOP, 0, MAX_STOPS)),
        stream=_FLAG,
        temperature=_SAMPLING["temperature"],
        top_p=_SAMPLING["top_p"],
        top_k=_SAMPLING["top_k"],
        thinking=_or_null(_object({"type": _one_of("enabled", "disabled")})),
        tools=_or_null(_list(_object({"name": _NAME, "input_schema": _ANY_OBJECT}, description=_MAY_TEXT), 0, 1)),
    ),
    "MessagesReply": _object(
        {
            "id": _TEXT,
            "type": _one_of("message"),
            "role": _one_of("assistant"),
            "model": _TEXT,
            "content": _list(_object({"type": _one_of("text", "thinking", "tool_use")})),
            "stop_reason": _TEXT,
            "usage": _object({"input_tokens": _COUNT, "output_tokens": _COUNT}),
        }
    ),
    "CountRequest": _object(
        {"model": _TEXT, "messages": _list(_object({"role": _one_of("user"), "content": _BLOCKS}), 1)}
    ),
    "Count": _object({"input_tokens": _COUNT}),
    "Model": _object({"id": _TEXT, "object": _one_of("model"), "created": _COUNT, "owned_by": _TEXT}),
    "Models": _object({"object": _one_of("list"), "data": _list(_ref("Model"), 1)}),
    "Health": _object({"status": _one_of("ok", "draining"), "running": _COUNT, "waiting": _COUNT}),
}

_REFUSALS = {
    400: "The request is wrong: `param` names the field, where it is one.",
    401: "No API key, or another.",
    403: "Not from this machine, or from a page of another site.",
    408: "The body took too long.",
    413: "The body is too long.",
    429: "The queue is full: try again after Retry-After seconds.",
    503: "The server is shutting down.",
}


def _json(name: str) -> Schema:
    return {"application/json": {"schema": _ref(name)}}


def _refusals(name: str, *codes: int) -> dict[str, Any]:
    return {str(code): {"description": _REFUSALS[code], "content": _json(name)} for code in codes}


def _post(summary: str, request: str, reply: str, error: str = "Error", streams: bool = True) -> dict[str, Any]:
    content = _json(reply) | ({"text/event-stream": {}} if streams else {})
    operation: dict[str, Any] = {
        "summary": summary,
        "requestBody": {"required": True, "content": _json(request)},
        "responses": {"200": {"description": summary, "content": content}, **_refusals(error, *_REFUSALS)},
    }
    if error != "Error":  # what Anthropic's clients know for 503
        operation["responses"]["529"] = operation["responses"].pop("503")
    return {"post": operation}


def _get(summary: str, content: Schema, *codes: int) -> dict[str, Any]:
    answers = {"200": {"description": summary, "content": content}, **_refusals("Error", *codes)}
    return {"get": {"summary": summary, "responses": answers} | ({} if 401 in codes else {"security": []})}


def _below(n: int) -> str:
    """A pattern of the whole numbers from 0 to n - 1, without leading zeros."""
    digits = str(n)
    patterns = [f"[1-9][0-9]{{0,{len(digits) - 2}}}"] if len(digits) > 1 else []
    for i, digit in enumerate(digits):
        first = 1 if i == 0 and len(digits) > 1 else 0
        if int(digit) > first:
            patterns.append(f"{digits[:i]}[{first}-{int(digit) - 1}][0-9]{{{len(digits) - i - 1}}}")
    return f"^({'|'.join(['0', *patterns])})$"


def document(vocab: int, with_key: bool) -> dict[str, Any]:
    """The document. `vocab`: how many tokens there are; `with_key`: the server asks for one."""
    bias = {"type": "object", "propertyNames": {"pattern": _below(vocab)}, "additionalProperties": _number(-100, 100)}
    ids = _list({"type": "integer", "minimum": 0, "maximum": vocab - 1}, 1)
    model = _get("The model, if this is its name", _json("Model"), 401, 403)
    model["get"]["responses"]["404"] = {"description": "No such model.", "content": _json("Error")}
    model["get"]["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    ]
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "mlx-gemma4", "version": __version__},
        "paths": {
            "/v1/chat/completions": _post("Reply to a conversation", "ChatRequest", "ChatReply"),
            "/v1/completions": _post("Go on with a text", "CompletionRequest", "CompletionReply"),
            "/v1/responses": _post("Respond to a conversation", "ResponsesRequest", "ResponsesReply"),
            "/v1/messages": _post("Anthropic's messages", "MessagesRequest", "MessagesReply", "MessagesError"),
            "/v1/messages/count_tokens": _post(
                "Tokens of a conversation", "CountRequest", "Count", "MessagesError", streams=False
            ),
            "/v1/models": _get("The model", _json("Models"), 401, 403),
            "/v1/models/{model}": model,
            "/metrics": _get("Counters for Prometheus", {"text/plain": {"schema": _TEXT}}, 401, 403),
            "/health": _get("Whether the server answers", _json("Health"), 403),
        },
        "components": {"schemas": {**_SCHEMAS, "Bias": bias, "Ids": ids}},
    }
    if with_key:
        made["components"] = {**made["components"], "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        made["security"] = [{"key": []}]
    return made
