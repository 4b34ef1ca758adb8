"""A model whose replies are scripted, for tests of conversations, and what such tests read of replies."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import vocabs

import mlx_gemma4
from mlx_gemma4 import LanguageModel, Reply, ReplyOptions, Sampling, Text
from mlx_gemma4.kv.state import KVState
from mlx_gemma4.model.model import Model
from mlx_gemma4.model.soft import SoftRows
from mlx_gemma4.model.step import LazyStep, NextToken, Step
from mlx_gemma4.ops.sample import LIKELIEST, Draw

GREEDY = Sampling(temperature=0)
SHORT = ReplyOptions(max_tokens=6, sampling=GREEDY)
REAL = vocabs.templates()["google-gemma-4-31B-it"]
TALE = "Tell me a tale of a goose and a miller, and do not make it too short. " * 7 + "Go on."
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}


class Scripted(Model):
    """The demo, which reads prompts as usual and replies with the tokens of its script."""

    script: list[int]
    asked: int  # forward passes that gave logits, since `say`

    def forward(
        self, ids: mx.array, state: KVState, *, all_logits: bool = False, soft: SoftRows | None = None
    ) -> mx.array:
        return self._scripted(super().forward(ids, state, soft=soft))

    def step(self, token: NextToken, state: KVState, draw: Draw = LIKELIEST) -> Step:
        return LazyStep(self._scripted(super().step(token, state).logits()), draw)

    def _scripted(self, logits: mx.array) -> mx.array:
        token = self.script[min(self.asked, len(self.script) - 1)]
        self.asked += 1
        return mx.where(mx.arange(self.config.vocab) == token, 100.0, logits)  # over the softcap of 30


class Actor:
    """A model with a script, and a chat template of choice."""

    def __init__(self, lm: LanguageModel, template: str | None) -> None:
        model = Scripted(lm.model.config, lm.model.weights)
        tokenizer = copy.copy(lm.tokenizer)
        tokenizer.chat_template = template or lm.tokenizer.chat_template
        self.model = model
        self.lm = replace(lm, model=model, tokenizer=tokenizer, sampling=GREEDY, drafts=None)

    def say(self, text: str, end: str = "<turn|>") -> Actor:
        self.tell(self.lm.tokenizer.encode(text + end, add_bos=False, parse_special=True))
        return self

    def tell(self, tokens: list[int]) -> None:
        self.model.script, self.model.asked = tokens, 0


def said(events: Iterator[mlx_gemma4.Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


def spelled(lm: LanguageModel, ids: list[int]) -> str:
    return lm.tokenizer.decode(ids, skip_special=False)


def ids_of(reply: Reply) -> list[int]:
    return [token.id for token in reply.tokens]


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]
