"""The page's models: a person can find, load, chat with and delete one without leaving the page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import hub_server
import pytest
from browsing import done, replies, send, settle_sampling, windows
from playwright.sync_api import Browser, Page, expect
from serving import Serving, serving, serving_folder

from mlx_gemma4 import load
from mlx_gemma4.conversation.language_model import demo_path
from mlx_gemma4.server.engine import Engine
from mlx_gemma4.server.models import Models
from mlx_gemma4.server.settings import Settings

pytestmark = pytest.mark.browser


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "models"
    made.mkdir()
    return made


@pytest.fixture
def several(folder: Path) -> Iterator[Serving]:
    def start(name: str, path: Path, promised: int) -> Engine:
        return Engine(load(path), Settings(model_name=name, parallel=1))

    for name in ("one.gguf", "two.gguf"):
        shutil.copy(demo_path(), folder / name)
    with serving(Models(Settings(parallel=1), folder, start)) as running:
        yield running


def item(page: Page, name: str) -> str:
    return f"#models-list li:has-text('{name}')"


def test_choose_load_and_delete(browser: Browser, several: Serving) -> None:
    with windows(browser) as window:
        page = window.new_page()
        page.goto(several.url)
        expect(page.locator("#model")).to_have_text("one")
        page.click("#models-open")
        expect(page.locator("#models-list li")).to_have_count(2)
        expect(page.locator(item(page, "two"))).to_contain_text("MB")
        page.get_by_role("button", name="Use two").click()
        expect(page.locator("#models-said")).to_have_text("two is ready.")
        expect(page.locator(item(page, "two"))).to_contain_text("loaded")
        expect(page.locator("#model")).to_have_text("two")
        page.keyboard.press("Escape")
        settle_sampling(page, max_tokens=3)
        with page.expect_request("**/v1/chat/completions") as asked:
            send(page, "Hello")
        assert asked.value.post_data_json["model"] == "two"
        done(page)
        page.reload()
        expect(page.locator("#model")).to_have_text("two")
        page.click("#models-open")
        page.get_by_role("button", name="Delete two").click()
        sure = page.get_by_role("button", name="Delete for good")
        expect(sure).to_be_focused()
        page.keyboard.press("Tab")  # thought better of it
        expect(sure).to_have_count(0)
        page.get_by_role("button", name="Delete two").click()
        sure.click()
        expect(page.locator("#models-said")).to_have_text("two is deleted.")
        expect(page.locator("#models-list li")).to_have_count(1)
        expect(page.locator("#model")).to_have_text("one")
        page.keyboard.press("Escape")
        expect(replies(page).locator(".below")).to_contain_text("two")  # which model it was


def test_downloads_that_fail_or_are_stopped(browser: Browser, several: Serving) -> None:
    with windows(browser) as window:
        page = window.new_page()
        page.goto(several.url)
        expect(page.locator("#model")).to_have_text("one")
        page.click("#models-open")
        said = page.locator("#models-said")
        page.fill("#pull-name", "no name")
        page.press("#pull-name", "Enter")
        expect(said).to_contain_text("no name of a repository on Hugging Face")
        lines = '{"status": "pulling manifest"}\n{"status": "pulling 0", "total": 8000000, "completed": 2000000}\n'
        page.route("**/api/pull", lambda route: route.fulfill(body=lines + '{"error": "<b>the disk is full</b>"}\n'))
        page.fill("#pull-name", "owner/name")
        page.click("#pull-go")
        expect(said).to_have_text("<b>the disk is full</b>.")
        page.unroute_all()
        page.route("**/api/pull", lambda route: None)  # which never answers
        page.click("#pull-go")
        expect(page.locator("#pull-go")).to_have_text("Stop")
        page.click("#pull-go")
        expect(said).to_have_text("Stopped: what has come is kept.")
        page.unroute_all(behavior="ignoreErrors")


def test_one_model_alone(page: Page) -> None:
    page.click("#models-open")
    expect(page.locator("#models-list li")).to_have_count(1)
    page.get_by_role("button", name="Gemma 4 E2B").click()
    expect(page.locator("#pull-name")).to_have_value("ggml-org/gemma-4-E2B-it-GGUF:Q4_K_M")
    page.keyboard.press("Enter")
    expect(page.locator("#models-said")).to_contain_text("serve --models DIR")


@pytest.mark.slow
def test_find_load_chat_and_delete_without_leaving_the_page(browser: Browser, folder: Path, tmp_path: Path) -> None:
    """`serve --models` as a process, with an empty folder, and a hub on this machine."""
    repo = "owner/tales-GGUF"
    files = {repo: {"tales-Q4_K_M.gguf": demo_path().read_bytes()}}
    with (
        hub_server.serving(hub_server.Hub(files)) as hub,
        windows(browser) as window,
        serving_folder(folder, hub.url, tmp_path / "hf") as url,
    ):
        page = window.new_page()
        page.goto(url)
        expect(page.locator("#model")).to_have_text("No model")
        page.get_by_role("button", name="Download one").click()
        page.fill("#pull-name", f"{repo}:Q4_K_M")
        page.click("#pull-go")
        expect(page.locator("#models-said")).to_have_text(f"{repo}:Q4_K_M is here.", timeout=60_000)
        page.get_by_role("button", name="Use owner/tales-GGUF/tales-Q4_K_M").click()
        expect(page.locator("#models-said")).to_contain_text("is ready.", timeout=60_000)
        page.click("#models-close")
        settle_sampling(page, max_tokens=30)
        send(page, "Tell me a story about a king.")
        done(page)
        expect(replies(page).locator(".stats").last).to_contain_text("30 tokens")
        page.get_by_role("button", name="Continue").click()
        expect(replies(page).locator(".stats").last).to_contain_text("60 tokens")
        page.click("#models-open")
        page.get_by_role("button", name="Delete owner").click()
        page.get_by_role("button", name="Delete for good").click()
        expect(page.locator("#models-said")).to_contain_text("is deleted.")
        expect(page.locator("#model")).to_have_text("No model")
        assert not list(folder.iterdir())
