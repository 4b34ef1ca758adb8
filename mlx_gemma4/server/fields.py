"""Request bodies: the pydantic models that endpoints share, and errors that name the field that is wrong.

In: a JSON object. Out: a `Body`, or an ApiError (400) whose `param` is the field's path, as `messages[0].content`.
Null is the same as absent. Fields that no model declares are kept, and the log names them. Parts of a conversation, and
tools, that can't be used are left out or become a text that says so, and the log names those.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    WithJsonSchema,
)
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import CoreSchema, ErrorDetails
from pydantic_core.core_schema import no_info_before_validator_function

from .wire import ApiError, request_id

log = logging.getLogger(__name__)

# Fields of OpenAI's endpoints without effect here.
IGNORED = ("user", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
MAX_CHOICES = 16
MAX_ITEMS = 10_000  # of a list
MAX_TOOLS = 1000
_OTHER_NAMES = {"repeat_penalty": "repetition_penalty", "n_predict": "max_tokens", "max_new_tokens": "max_tokens"}
# Unknown fields that `forms` reads, and what the value of each is: of vLLM (guided_*, structured_outputs), SGLang,
# llama.cpp, Ollama, tabbyAPI and others.
FORM_KINDS = {
    **dict.fromkeys(("guided_json", "json_schema", "json", "output_schema", "response_schema"), "json"),
    **dict.fromkeys(("guided_regex", "regex", "regex_pattern", "pattern"), "regex"),
    **dict.fromkeys(("guided_choice", "choice"), "choice"),
    **dict.fromkeys(("guided_grammar", "grammar", "grammar_string", "ebnf", "gbnf"), "grammar"),
    **dict.fromkeys(("guided_json_object", "json_object", "json_mode"), "object"),
    "format": "json",
}
FORM_HOLDERS = (
    "structured_outputs",
    "nvext",
    "extra_body",
    "guided_decoding",
    "guided_params",
)  # objects with such fields
_THOUGHTS = ("thinking", "redacted_thinking", "reasoning", "reasoning_text", "summary_text", "encrypted_content")
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


def _check_length(length: int) -> int:
    if length < 1 and length != -1:
        raise ValueError("must be 1 or more, or -1 for no limit")
    return length


_left_out: ContextVar[Counter[str]] = ContextVar("left_out")  # of the request that is being parsed


def leave_out(what: str) -> None:
    """Note for the log that something of a request isn't used."""
    _left_out.get()[what[:40]] += 1


def _kind(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return kind if isinstance(kind, str) else None


@dataclass(frozen=True)
class Others:
    """For lists: what becomes of objects whose type is none of `known`. Each keeps its place, for errors."""

    known: tuple[str, ...]
    become: Callable[[str, dict[str, Any]], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_before_validator_function(self._replaced, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        made = handler(schema)
        kind = {"type": "string", "not": {"enum": list(self.known)}}
        other = {"type": "object", "properties": {"type": kind}, "required": ["type"]}
        return {**made, "items": {"anyOf": [made["items"], other]}}

    def _replaced(self, values: Any) -> Any:
        if not isinstance(values, list):
            return values
        return [one if (kind := _kind(one)) is None or kind in self.known else self.become(kind, one) for one in values]


def _as_text(kind: str, part: dict[str, Any]) -> dict[str, str]:
    """A part as a text, which says so where it holds none. Thoughts are left out."""
    if kind in _THOUGHTS:
        return {"type": "text", "text": ""}
    leave_out(kind)
    source = part.get("source")  # of Anthropic's documents
    holder = part if kind == "search_result" else source if isinstance(source, dict) else {}
    held = holder.get("data" if holder.get("type") == "text" else "content")
    texts = [one.get("text") for one in held if _kind(one) == "text"] if isinstance(held, list) else [held]
    said = "\n".join(text for text in texts if isinstance(text, str))
    return {"type": "text", "text": said or f"[{kind:.40}: left out, only text can be read here]"}


def _without_tool(kind: str, tool: dict[str, Any]) -> None:
    """Leave out a tool that would run at a provider of the API."""
    leave_out(f"tool {kind}")


def readable(*known: str) -> Others:
    """Parts that aren't known become texts."""
    return Others(known, _as_text)


def usable(*known: str) -> Others:
    """Tools that aren't known become None."""
    return Others(known, _without_tool)


def _check_stops(stops: list[str]) -> list[str]:
    if not all(0 < len(stop) <= 1000 for stop in stops):
        raise ValueError("must have strings of 1 to 1000 characters each")
    return stops


B = TypeVar("B", bound=Body)
T = TypeVar("T")
Items = Annotated[list[T], Field(fail_fast=True, max_length=MAX_ITEMS)]  # the first wrong item is enough
Tools = Annotated[list[T | None], Field(fail_fast=True, max_length=MAX_TOOLS)]
Object = dict[str, Any]
Whole = BeforeValidator(_whole)
_LENGTHS = WithJsonSchema({"type": "integer", "minimum": -1, "maximum": 2**31, "not": {"const": 0}})
Length = Annotated[int, Field(le=2**31), AfterValidator(_check_length), Whole, _LENGTHS]
LengthOrNone = Annotated[int, Field(ge=-1, le=2**31), Whole, _LENGTHS]  # where an endpoint knows what 0 is for
Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES), Whole]
TopLogprobs = Annotated[int, Field(ge=0, le=20), Whole]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
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
    ignored = ("annotations", "logprobs", "citations", "cache_control")
    type: Literal["text", "input_text", "output_text"] | None = "text"
    text: str


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: str


class MediaPart(Body):
    """A picture, sound, video or file in the form of any API: `media` reads it, for what is taken is the model's."""

    ignored = ("cache_control", "file_id", "title", "context", "citations", "prompt_cache_breakpoint")
    type: Literal[
        "image_url", "input_image", "image", "input_audio", "audio_url", "audio", "video_url", "video",
        "file", "input_file",
    ]  # fmt: skip
    image_url: Object | str | None = None
    input_audio: Object | None = None
    audio_url: Object | str | None = None
    video_url: Object | str | None = None
    source: Object | None = None  # of Anthropic's
    file: Object | None = None
    file_data: str | None = None
    filename: str | None = None
    detail: str | None = None
    tokens: Annotated[int, Whole] | None = None  # of a picture


MEDIA: tuple[str, ...] = get_args(MediaPart.model_fields["type"].annotation)
PARTS = "text", "input_text", "output_text", "refusal", *MEDIA
Content = str | Annotated[Items[TextPart | RefusalPart | MediaPart], readable(*PARTS)]


def text_of(part: TextPart | RefusalPart | MediaPart) -> str:
    """A part's text. What was left out is empty."""
    if isinstance(part, MediaPart):
        return f"({part.type})"
    return part.refusal if isinstance(part, RefusalPart) else part.text


class Function(Body):
    """A function that the model may call."""

    ignored = ("cache_control", "defer_loading", "eager_input_streaming", "allowed_callers", "input_examples")
    name: Name
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None


class SchemaHolder(Body):
    ignored = ("name", "description", "strict")
    schema_: Object | None = Field(None, alias="schema")


class Format(SchemaHolder):
    """The form of the reply: see `forms`. /v1/chat/completions nests `schema` in `json_schema`."""

    type: Literal["text", "json_object", "json_schema", "regex", "lark", "json", "grammar"]
    json_schema: SchemaHolder | None = None
    regex: str | None = None
    pattern: str | None = None
    grammar: str | None = None
    value: SkipJsonSchema[Any] = None


Budget = Annotated[int, Field(ge=-1, le=2**31), Whole]  # tokens of thinking; -1: no bound


class TemplateVariables(Body):
    enable_thinking: bool | None = None
    thinking: bool | None = None
    thinking_budget: Budget | None = None


class Reasoning(Body):
    """OpenAI's in responses, OpenRouter's in chats."""

    ignored = ("summary", "generate_summary", "exclude", "context")
    effort: Effort | None = None
    enabled: bool | None = None
    max_tokens: Budget | None = None


class ThinkingOptions(Body):
    """Anthropic's, which others take too."""

    ignored = ("display", "clear_thinking")
    type: Literal["enabled", "disabled", "adaptive", "between_tools", "auto"]
    budget_tokens: Budget | None = None


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
    reasoning: Reasoning | None = None
    thinking: ThinkingOptions | None = None
    enable_thinking: bool | None = None
    thinking_budget: Budget | None = None
    chat_template_kwargs: TemplateVariables | None = None
    parallel_tool_calls: bool | None = None


# A body, or what is wrong with it


def parse(model: type[B], values: dict[str, Any]) -> B:
    """Return the body as the model has it. Raises ApiError (400), naming the field that is wrong."""
    left: Counter[str] = Counter()
    _left_out.set(left)
    for other, name in _OTHER_NAMES.items():
        if other in values and name in model.model_fields and values.get(name) is None:
            values = {**values, name: values[other]}
    try:
        body = model.model_validate(values)
    except ValidationError as error:
        raise _first_error(error, values) from None
    for name in model.unsupported:
        if values.get(name):
            raise wrong(name, "isn't supported", "unsupported_value")
    known = {*_OTHER_NAMES, *FORM_KINDS, *FORM_HOLDERS}
    unknown = dict.fromkeys(name for name in _unknown(body) if name not in known)
    for what, names in (("Ignored %d unknown field(s) of a request", unknown), ("Left out %d kind(s) of parts", left)):
        if names:
            shown = ", ".join(f"{name!r:.60}" for name in list(names)[:10])
            log.warning(f"%s: {what}: %s", request_id.get(), len(names), shown)
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


def _unknown(value: Any, path: str = "") -> Iterator[str]:
    """Paths of fields that no model declares, in the body and in the objects and lists in it."""
    if isinstance(value, list):
        for one in value:
            yield from _unknown(one, path.removesuffix(".") + "[].")
    elif isinstance(value, Body):
        yield from (path + name for name in value.model_extra or () if name not in value.ignored + value.unsupported)
        for name, inner in value:
            if isinstance(inner, Body | list):
                yield from _unknown(inner, f"{path}{name}.")


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
