"""Request bodies: the pydantic models that endpoints share, and errors that name the field that is wrong.

In: a JSON object. Out: a `Body`, or an ApiError (400) whose `param` is the field's path, as `messages[0].content`.
Null is the same as absent. Fields that no model declares are kept, and the log names them.
"""

import logging
import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails

from .wire import ApiError

log = logging.getLogger(__name__)

# Fields of OpenAI's endpoints without effect here.
IGNORED = ("user", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
MAX_CHOICES = 16
_CODES = {
    "missing": "missing_required_parameter",
    "too_short": "missing_required_parameter",
    "literal_error": "unsupported_value",
    "union_tag_invalid": "unsupported_value",
}


class Body(BaseModel):
    """A JSON object of a request. Strict: "1" and true are no numbers, 1 is no boolean."""

    model_config = ConfigDict(extra="allow", strict=True)
    ignored: ClassVar[tuple[str, ...]] = ()  # of the original API, without effect here
    unsupported: ClassVar[tuple[str, ...]] = ()  # of the original API, refused here unless empty or false


# Types of fields


def _whole(value: Any) -> Any:
    """JSON may write a whole number as 3.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_stops(stops: list[str]) -> list[str]:
    if not all(0 < len(stop) <= 1000 for stop in stops):
        raise ValueError("must have strings of 1 to 1000 characters each")
    return stops


B = TypeVar("B", bound=Body)
T = TypeVar("T")
Items = Annotated[list[T], Field(fail_fast=True)]  # the first wrong item is enough: a body may hold millions
Object = dict[str, Any]
Whole = BeforeValidator(_whole)
Length = Annotated[int, Field(ge=1, le=2**31), Whole]
Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES), Whole]
TopLogprobs = Annotated[int, Field(ge=0, le=20), Whole]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Stops = Annotated[
    list[Annotated[str, WithJsonSchema({"type": "string", "minLength": 1, "maxLength": 1000})]],
    Field(max_length=16, fail_fast=True),
    AfterValidator(_check_stops),
]
ToolChoice = Literal["auto", "none", "required"]
Arguments = Object | str | None  # of a call: an object, or JSON in a string


# Objects that several endpoints have


class TextPart(Body):
    type: Literal["text", "input_text", "output_text"] | None = "text"
    text: str


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: str


Content = str | Items[TextPart | RefusalPart]


class Function(Body):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None


class SchemaHolder(Body):
    ignored = ("name", "description", "strict")
    schema_: Object | None = Field(None, alias="schema")


class Format(SchemaHolder):
    """The form of the reply. "regex" and "lark" are ours; /v1/chat/completions nests `schema` in `json_schema`."""

    type: Literal["text", "json_object", "json_schema", "regex", "lark"]
    json_schema: SchemaHolder | None = None
    regex: str | None = None
    grammar: str | None = None


class TemplateVariables(Body):
    enable_thinking: bool | None = None


# Whole bodies


class SamplingRequest(Body):
    """How tokens are chosen; what is absent is as the model's file recommends."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: Annotated[int, Field(ge=-1, le=2**31), Whole] | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0, le=100)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1), Whole] | None = None
    logit_bias: Object | None = None  # checked where the vocabulary is known: options
    stream: bool | None = None


class OpenAIRequest(SamplingRequest):
    """What all of OpenAI's endpoints take."""

    model: str | None = None
    stop: Stop | Stops | None = None
    service_tier: Literal["auto", "default"] | None = None


class ConversationRequest(OpenAIRequest):
    """What OpenAI's endpoints for conversations take."""

    reasoning_effort: Effort | None = None
    chat_template_kwargs: TemplateVariables | None = None
    parallel_tool_calls: bool | None = None


# A body, or what is wrong with it


def parse(model: type[B], values: dict[str, Any]) -> B:
    """Return the body as the model has it. Raises ApiError (400), naming the field that is wrong."""
    try:
        body = model.model_validate(values)
    except ValidationError as error:
        raise _first_error(error, values) from None
    for name in model.unsupported:
        if values.get(name):
            raise wrong(name, "isn't supported", "unsupported_value")
    if unknown := list(_unknown(body)):
        shown = ", ".join(f"{name!r:.60}" for name in unknown[:10])
        log.warning("Ignored %d unknown field(s) of a request: %s", len(unknown), shown)
    return body


def wrong(path: str, message: str, code: str | None = None) -> ApiError:
    """An error about a field; `message` follows its path."""
    return ApiError(400, f"{path} {message}", path, code)


def prompts(value: Any, vocab: int, most: int = MAX_CHOICES, name: str = "prompt") -> list[str | list[int]]:
    """The prompts of a field: a text, texts, ids, or lists of ids. Raises ApiError."""
    several = isinstance(value, list) and not (value and all(type(item) is int for item in value))
    found = value if several else [value]
    if not 0 < len(found) <= most:
        raise wrong(name, f"must be 1 to {most} of them, not {len(found)}")
    for i, prompt in enumerate(found):
        ids = isinstance(prompt, list) and prompt and all(type(item) is int and 0 <= item < vocab for item in prompt)
        if not ids and not (isinstance(prompt, str) and prompt):
            path = f"{name}[{i}]" if several else name
            raise wrong(path, f"must be a string or a list of token ids from 0 to {vocab - 1}, and not empty")
    return found


def _unknown(body: Body, path: str = "") -> Iterator[str]:
    """Paths of fields that no model declares, in the body and in the objects right in it."""
    yield from (path + name for name in body.model_extra or () if name not in body.ignored + body.unsupported)
    for name, value in body:
        if isinstance(value, Body):
            yield from _unknown(value, f"{path}{name}.")


def _first_error(error: ValidationError, values: dict[str, Any]) -> ApiError:
    """The first field that is wrong. Of a union, pydantic tells what each member lacks: the deepest says most."""
    errors = error.errors(include_url=False)
    first_type = (*errors[0]["loc"][:-1], "type")  # goes first: it decides which other fields there must be
    found = [(_path(each, values), each) for each in sorted(errors, key=lambda each: each["loc"] != first_type)]
    first = found[0][0]
    path = max((path for path, _ in found if path[: len(first)] == first), key=len)
    same = [each for other, each in found if other == path]
    name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")
    kind, value = same[0]["type"], same[0]["input"]
    if value is None or kind in ("missing", "union_tag_not_found"):
        return wrong(name, "is missing", _CODES["missing"])
    says = " or ".join(dict.fromkeys(map(_says, same)))
    value = same[0].get("ctx", {}).get("tag", value)
    return wrong(name, f"must {says}" + ("" if kind.startswith("too_") else f", not {_shown(value)}"), _CODES.get(kind))


def _path(error: ErrorDetails, values: Any) -> tuple[str | int, ...]:
    """Where in the body an error is: pydantic's location, without the names of union members in it."""
    path: list[str | int] = []
    for step in error["loc"]:
        if step in values if isinstance(values, dict) else isinstance(values, list) and isinstance(step, int):
            path.append(step)
            values = values[step]
    if error["type"] == "missing":
        path.append(error["loc"][-1])
    elif error["type"].startswith("union_tag"):
        path.append(error["ctx"]["discriminator"].strip("'"))
    return tuple(path)


def _says(error: ErrorDetails) -> str:
    """What must be so, in words that follow "must"."""
    if error["type"] in ("dict_type", "model_type", "model_attributes_type"):
        return "be an object"
    if error["type"] == "union_tag_invalid":
        return f"be one of {error['ctx']['expected_tags']}"
    return re.sub(r"^(\w+ should|Value error, must) ", "", error["msg"]).replace(" after validation", "")


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) > 1e15:
        return "a number that large"
    return f"{value!r:.60}"
