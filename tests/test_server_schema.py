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
from schemathesis.schemas import BaseSchema
from serving import Serving, serving

from mlx_gemma4.model import Model
from mlx_gemma4.server.app import Settings
from mlx_gemma4.text import load

LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    """A server whose context is short, so that no reply takes long."""
    lm = load()
    config = replace(lm.config, context=200)
    lm = replace(lm, config=config, model=Model(config, lm.model.weights))
    with serving(lm, Settings(max_tokens=2)) as running:
        yield running


@pytest.fixture(scope="module")
def document(server: Serving) -> BaseSchema:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("document")


@schema.parametrize()
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_answers_are_those_of_the_document(case: Case) -> None:
    """No 5xx, no status, type or field that the document does not name; wrong requests are refused."""
    if isinstance(case.body, dict):
        for name in LENGTHS:
            if isinstance(length := case.body.get(name), int) and length > 3:
                case.body[name] = 3
    case.call_and_validate(timeout=60)


def test_the_document_names_every_path(server: Serving) -> None:
    paths: dict[str, Any] = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    served = {route.path for route in server.app.routes} - {"/", "/openapi.json"}
    assert set(paths) >= {path.replace(":path", "") for path in served}
