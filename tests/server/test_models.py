"""Several models from one folder: lists, loading by name, letting go, pulling and deleting."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import hub_server
import mlx.core as mx
import pytest
from openai import NotFoundError, OpenAI
from serving import Serving, endless, serving, serving_folder, started, until

from mlx_gemma4 import LanguageModel, load
from mlx_gemma4.conversation.language_model import demo_path
from mlx_gemma4.errors import InputError
from mlx_gemma4.files.folder import delete_model, find_models, look_up, repository
from mlx_gemma4.server.engine import Engine
from mlx_gemma4.server.models import Models
from mlx_gemma4.server.settings import Settings, seconds

HI = [{"role": "user", "content": "Hello!"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "models"
    (made / "owner" / "repo").mkdir(parents=True)
    for name in ("one.gguf", "owner/repo/two-Q4_K_M.gguf"):
        shutil.copy(demo_path(), made / name)
    (made / "damaged.gguf").write_bytes(b"no model")
    (made / "mmproj-one.gguf").write_bytes(b"a projector")
    return made


@pytest.fixture
def models(folder: Path) -> Models:
    def start(name: str, path: Path, promised: int) -> Engine:
        if made.loaded and not roomy:
            raise InputError("too little memory", exit_code=3)
        return Engine(load(path), Settings(model_name=name, parallel=1))

    roomy: list[bool] = []
    made = Models(Settings(parallel=1), folder, start, keep=300)
    made.roomy = roomy  # type: ignore[attr-defined]
    return made


@pytest.fixture
def server(models: Models) -> Iterator[Serving]:
    with serving(models) as running:
        yield running


def chat(url: str, model: str | None, **more: Any) -> httpx.Response:
    body = {"model": model, "messages": HI, "max_tokens": 3, "temperature": 0, **more}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def loaded(url: str) -> list[str]:
    return [model["name"] for model in httpx.get(f"{url}/api/ps").json()["models"]]


def test_lists_in_the_form_of_each_client(server: Serving) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    assert [model.id for model in client.models.list()] == ["one", "owner/repo/two-Q4_K_M"]
    assert client.models.retrieve("owner/repo/two-Q4_K_M").id == "owner/repo/two-Q4_K_M"
    with pytest.raises(NotFoundError, match="'three' not found"):
        client.models.retrieve("three")
    theirs = anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0)
    page = theirs.models.list(limit=1)
    assert (page.first_id, page.last_id, page.has_more) == ("one", "one", True)
    assert [model.id for model in page] == ["one", "owner/repo/two-Q4_K_M"], "the client turns the pages"
    assert theirs.models.retrieve("one").type == "model"
    with pytest.raises(anthropic.NotFoundError):
        theirs.models.retrieve("three")
    studio = httpx.get(f"{server.url}/api/v0/models").json()["data"]
    assert [(one["publisher"], one["quantization"], one["state"]) for one in studio][1] == (
        "owner",
        "Q4_K_M",
        "not-loaded",
    )
    tags = httpx.get(f"{server.url}/api/tags").json()["models"]
    assert [tag["name"] for tag in tags] == ["one", "owner/repo/two-Q4_K_M"] and tags[0]["size"] > 7_000_000


def test_names_that_nobody_has(server: Serving) -> None:
    assert chat(server.url, "three").json()["error"]["code"] == "model_not_found"
    body = {"model": "three", "max_tokens": 1, "messages": HI}
    refused = httpx.post(f"{server.url}/v1/messages", json=body)
    assert (refused.status_code, refused.json()["error"]["type"]) == (404, "not_found_error")
    refused = httpx.post(f"{server.url}/api/show", json={"model": "../one"})
    assert refused.status_code == 404 and refused.json()["error"].startswith("model '../one' not found")
    assert loaded(server.url) == []


def test_one_makes_room_for_another_and_cuts_no_reply(server: Serving, models: Models, lm: LanguageModel) -> None:
    second: list[httpx.Response] = []
    with httpx.Client(base_url=server.url, timeout=60) as http:
        with started(http, endless(lm, 60) | {"model": "one"}) as lines:
            asking = threading.Thread(target=lambda: second.append(chat(server.url, "two-q4_k_m:latest")))
            asking.start()
            assert until(lambda: models.loaded["one"].going)
            assert httpx.get(f"{server.url}/health").json()["running"] == 1
            assert list(lines)[-2] == "data: [DONE]"
        asking.join(30)
    assert second[0].status_code == 200 and second[0].json()["choices"][0]["message"]["content"]
    assert loaded(server.url) == ["owner/repo/two-Q4_K_M"]
    models.roomy.append(True)  # type: ignore[attr-defined]
    assert chat(server.url, "one").status_code == 200
    assert loaded(server.url) == ["one", "owner/repo/two-Q4_K_M"]
    assert chat(server.url, None).json()["model"] == "one", "without a name: the one used last"
    assert "mlx_gemma4_running 0.0" in httpx.get(f"{server.url}/metrics").text


def test_idle_models_go_and_their_memory_with_them(server: Serving, models: Models) -> None:
    before = mx.get_active_memory()
    models.keep = 0.3
    assert chat(server.url, "one").status_code == 200
    assert mx.get_active_memory() > before + 10_000_000
    assert until(lambda: not models.loaded)
    assert until(lambda: mx.get_active_memory() < before + 1_000_000)
    models.keep = 300
    assert chat(server.url, "one").status_code == 200
    time.sleep(0.6)
    assert loaded(server.url) == ["one"]


def test_delete(server: Serving, folder: Path) -> None:
    assert chat(server.url, "two-q4_k_m").status_code == 200
    gone = httpx.request("DELETE", f"{server.url}/api/delete", json={"model": "owner/repo/two-Q4_K_M"}, timeout=30)
    assert gone.status_code == 200 and loaded(server.url) == []
    assert not (folder / "owner").exists() and (folder / "one.gguf").exists()
    again = httpx.request("DELETE", f"{server.url}/api/delete", json={"model": "owner/repo/two-Q4_K_M"})
    assert again.status_code == 404


def test_a_single_model_takes_any_name_and_stays(lm: LanguageModel) -> None:
    with serving(lm, Settings(model_name="demo")) as running:
        assert chat(running.url, "whatever").status_code == 200
        assert loaded(running.url) == ["demo"]
        for method, path in (("DELETE", "delete"), ("POST", "pull")):
            refused = httpx.request(method, f"{running.url}/api/{path}", json={"model": "demo/demo"})
            assert refused.status_code == 400 and "--models" in refused.json()["error"]


def test_paths_without_v1(lm: LanguageModel) -> None:
    with serving(lm, Settings(model_name="demo")) as running:
        body = {"model": "demo", "messages": HI, "max_tokens": 2}
        for path in ("/chat/completions", "/api/v0/chat/completions", "/messages"):
            assert httpx.post(running.url + path, json=body).status_code == 200
        assert httpx.get(f"{running.url}/models/demo").json()["id"] == "demo"
        assert httpx.post(f"{running.url}/messages", json={}).json()["type"] == "error", "Anthropic's shape"


def test_a_link_of_the_users_own_is_deleted_alone(tmp_path: Path) -> None:
    kept, folder = tmp_path / "kept.gguf", tmp_path / "models"
    kept.write_bytes(b"mine")
    folder.mkdir()
    (folder / "link.gguf").symlink_to(kept)
    delete_model(folder, find_models(folder)["link"])
    assert kept.exists() and not list(folder.iterdir())


def test_names() -> None:
    names = ["a/b/b-Q4_K_M", "a/b/b-Q8_0", "c", "d/c2"]
    for name, right in (
        ("a/b:q8_0", "a/b/b-Q8_0"),
        ("hf.co/a/b:Q4_K_M", "a/b/b-Q4_K_M"),
        ("C2:latest", "d/c2"),
        ("c.gguf", "c"),
        ("a/b", None),
        ("", None),
    ):
        assert look_up(name, names) == right, name
    assert repository("hf.co/a/b:Q8_0") == ("a/b", "Q8_0")
    for name in ("gemma", "../../etc/passwd", "a/b/c", "/etc/passwd"):
        with pytest.raises(InputError):
            repository(name)


def test_lengths_of_time() -> None:
    assert [seconds(x) for x in ("10m", "1h30m", "-1", 0, 2.5, "300ms")] == [600, 5400, float("inf"), 0, 2.5, 0.3]
    for wrong in ("soon", "5 m", "1x"):
        with pytest.raises(ValueError):
            seconds(wrong)


@pytest.mark.slow
def test_pull_chat_and_delete(tmp_path: Path) -> None:
    """The whole way, with `serve --models` as a process and a hub on this machine."""
    content, repo, folder = demo_path().read_bytes(), "owner/tales-GGUF", tmp_path / "models"
    folder.mkdir()
    with (
        hub_server.serving(hub_server.Hub({repo: {"tales-Q4_K_M.gguf": content}})) as hub,
        serving_folder(folder, hub.url, tmp_path / "hf") as url,
    ):
        pulled = httpx.post(f"{url}/api/pull", json={"model": f"hf.co/{repo}:Q4_K_M"}, timeout=60)
        lines = [json.loads(line) for line in pulled.text.splitlines()]
        assert lines[0] == {"status": "pulling manifest"} and lines[-1] == {"status": "success"}
        assert any(line.get("completed") == line.get("total") == len(content) for line in lines)
        assert chat(url, f"{repo}:Q4_K_M").status_code == 200
        assert loaded(url) == [f"{repo}/tales-Q4_K_M"]
        failed = httpx.post(f"{url}/api/pull", json={"name": "owner/nothing", "stream": False}, timeout=60)
        assert failed.status_code == 400 and "owner/nothing" in failed.json()["error"]
        gone = httpx.request("DELETE", f"{url}/api/delete", json={"name": f"{repo}:Q4_K_M"}, timeout=60)
        assert gone.status_code == 200
        assert not list(folder.iterdir())
        left = [p for p in (tmp_path / "hf").rglob("*") if p.is_file() and p.stat().st_size > 1_000_000]
        assert not left, "nothing of it stays on disk"
