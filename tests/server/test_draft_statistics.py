"""What drafts did, as people and programs are told: the command line, chat, the API's usage, the metrics."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import httpx
import pytest
from click.testing import CliRunner
from serving import serving, settled

from mlx_gemma4 import LanguageModel
from mlx_gemma4.cli.main import main
from mlx_gemma4.conversation import language_model
from mlx_gemma4.generation.drafting import Drafts

AGAIN = "The goose went to the mill, the goose went to the mill, the goose went to the mill, the"


def test_the_api_counts_them(lm: LanguageModel) -> None:
    body = {"messages": [{"role": "user", "content": AGAIN}], "max_tokens": 24, "temperature": 0}
    with serving(replace(lm, drafts=Drafts(depth=4))) as server, serving(replace(lm, drafts=None)) as plain:
        made, want = (httpx.post(f"{s.url}/v1/chat/completions", json=body, timeout=60).json() for s in (server, plain))
        assert settled(server.engine)
        metrics = httpx.get(f"{server.url}/metrics").text
    assert made["choices"][0]["message"] == want["choices"][0]["message"]
    told, none = (reply["usage"]["completion_tokens_details"] for reply in (made, want))
    accepted, refused = told["accepted_prediction_tokens"], told["rejected_prediction_tokens"]
    assert accepted > 0 and none["accepted_prediction_tokens"] == none["rejected_prediction_tokens"] == 0
    assert f"mlx_gemma4_accepted_tokens_total {accepted}.0" in metrics
    assert f"mlx_gemma4_drafted_tokens_total {accepted + refused}.0" in metrics


def test_generate_and_chat_tell_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "Drafts", partial(Drafts, depth=3))
    args = ["generate", "--prompt", AGAIN, "-n", "20", "--temperature", "0"]
    drafted = CliRunner().invoke(main, [*args, "--json"])
    plain = CliRunner().invoke(main, [*args, "--json", "--no-draft"])
    told, none = json.loads(drafted.stdout), json.loads(plain.stdout)
    assert told["text"] == none["text"] and none["drafted_tokens"] == 0 and none["tokens_per_step"] == 1
    assert told["drafted_tokens"] >= told["accepted_tokens"] > 0
    assert told["tokens_per_step"] == told["reply_tokens"] / (told["reply_tokens"] - told["accepted_tokens"])
    shown = CliRunner().invoke(main, args)
    assert f"Drafts: {told['accepted_tokens']} of {told['drafted_tokens']} accepted" in shown.stderr
    talk = CliRunner().invoke(main, ["chat", "-n", "40", "--temperature", "0"], input=f"{AGAIN}\n/stats\n")
    assert "tokens a step" in talk.output
