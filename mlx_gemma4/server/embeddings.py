"""OpenAI's embeddings: the mean of a text's last hidden states (after the model's last norm), of length 1.

In: texts, or token ids. Out: vectors, as numbers or as base64 of little-endian fp32. A Gemma 4 is trained to write, not
to embed: see docs/server.md.
"""

import base64
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic.json_schema import SkipJsonSchema
from starlette.responses import Response

from ..generation.scoring import embed
from . import fields
from .endpoint import Endpoint
from .engine import Engine
from .fields import Body, wrong
from .wire import json_response

MAX_INPUTS = 2048  # as OpenAI's


class EmbeddingsRequest(Body):
    """The body of /v1/embeddings."""

    ignored = ("user",)
    model: str | None = None
    input: Any  # its schema depends on the vocabulary: see openapi
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: SkipJsonSchema[int | None] = None


async def embeddings(body: EmbeddingsRequest, engine: Engine) -> Response:
    """Embed texts."""
    hidden = engine.lm.config.hidden
    if body.dimensions not in (None, hidden):
        raise wrong("dimensions", f"must be {hidden}, the model's own: its vectors can't be cut", "unsupported_value")
    prompts = fields.prompts(body.input, engine.lm.config.vocab, MAX_INPUTS, "input")
    vectors, tokens = await embedded(engine, prompts)
    data = [
        {"object": "embedding", "index": i, "embedding": _encoded(vector, body.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json_response(
        {"object": "list", "data": data, "model": body.model or engine.settings.model_name, "usage": usage}
    )


def _encoded(vector: np.ndarray, form: str | None) -> str | list[float]:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if form == "base64" else vector.tolist()


async def embedded(
    engine: Engine, prompts: Sequence[str | list[int]], truncate: bool = False
) -> tuple[list[np.ndarray], int]:
    """Return the prompts' vectors, and how many tokens they have together. Raises TooLong, unless `truncate`."""
    made = await engine.read(prompts, lambda ids, state, check: embed(engine.lm.model, ids, state, check), truncate)
    return [vector for _, vector in made], sum(len(ids) for ids, _ in made)


_REPLY = {
    "object": "list",
    "data": [{"object": "embedding", "index": int}],
    "model": str,
    "usage": {"prompt_tokens": int},
}
EMBEDDINGS = Endpoint("/v1/embeddings", "Embed texts", EmbeddingsRequest, _REPLY, embeddings, "")
