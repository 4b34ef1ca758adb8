"""The server against its own OpenAPI document: whatever a client sends, the answer is one that the document names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving import Serving, serving

from mlx_gemma4.conversation.language_model import load
from mlx_gemma4.model.model import Model
from mlx_gemma4.server.app import ENDPOINTS
from mlx_gemma4.server.openapi import document
from mlx_gemma4.server.settings import Settings

pytestmark = pytest.mark.slow

DOCUMENT = document(ENDPOINTS, vocab=4096, with_key=False)


def without_long_lists(part: Any) -> Any:
    """Return a document without bounds on lists that only bodies over 8 MB, refused as such, would come to."""
    if isinstance(part, dict):
        kept = {k: v for k, v in part.items() if k != "maxItems" or not isinstance(v, int) or v <= 100}
        return {k: without_long_lists(v) for k, v in kept.items()}
    return [without_long_lists(v) for v in part] if isinstance(part, list) else part


schema = schemathesis.openapi.from_dict(without_long_lists(DOCUMENT))
# What can be wrong in ways that a JSON Schema can't tell: pictures where no projector is, schemas, grammars, JSON in
# strings, 0.0 as a token's id or a count, prompts over the context, messages of which nothing is left, lengths of time;
# of Anthropic's messages the last one's role, and the ids of calls.
UNKNOWABLE = ("response_format", "text.format", "tools", "arguments", "prompt", "context")
UNKNOWABLE += ("calls wait for their results", "max_tokens", "at least one message of the user", "the id of no call")
UNKNOWABLE += ("the one model that it was started with", "input[", "tokens", "text only")
UNKNOWABLE += ("no messages to reply to", "keep_alive", "dimensions", "without an mmproj file")
UNKNOWABLE += ("can't go with raw or context",)
# What makes a reply take long, with the most that is allowed; the test asks for one.
LENGTHS = {"max_tokens": 2**31, "max_completion_tokens": 2**31, "max_output_tokens": 2**31, "n": 16}


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    """A server whose context is short, so that no reply takes long."""
    lm = load(mmproj=None)  # it refuses pictures before it opens them
    config = replace(lm.config, context=200)
    lm = replace(lm, config=config, model=Model(config, lm.model.weights))
    with serving(lm, Settings(max_tokens=2)) as running:
        yield running


@schema.parametrize()
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_answers_are_those_of_the_document(case: Case, server: Serving) -> None:
    """No 5xx, no status, type or field that the document does not name; wrong requests are refused."""
    if isinstance(case.body, dict):
        for name, most in LENGTHS.items():
            if isinstance(value := case.body.get(name), int | float) and (value == -1 or 1 < value <= most):
                case.body[name] = 1
    response = case.call(base_url=server.url, timeout=60)
    case.validate_response(response, excluded_checks=[positive_data_acceptance])
    if case.meta and case.meta.generation.mode.is_positive and response.status_code == 400:
        error = response.json()["error"]
        where = error if isinstance(error, str) else error["message"] + str(error.get("param"))  # a string: Ollama's
        assert any(name in where for name in UNKNOWABLE), error


def test_the_document_is_served_and_names_every_path(server: Serving) -> None:
    assert httpx.get(f"{server.url}/openapi.json").json() == DOCUMENT
    served = {route.path for route in server.app.routes} - {"/", "/openapi.json"}
    assert set(DOCUMENT["paths"]) == {
        path.replace(":path", "").rstrip("/") for path in served
    }  # with a slash at the end too
