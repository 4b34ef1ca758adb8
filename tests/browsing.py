"""The page in a Chromium: what its tests share. The server is real, with the built-in model; replies may be made up.

Needs a Chromium or Chrome on this machine (Debian: apt install chromium; macOS: Chrome as it is), or the path of one in
MLX_GEMMA4_CHROMIUM. With MLX_GEMMA4_SCREENSHOTS=docs/images the pictures of docs/page.md are taken again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Locator, Page, Route, expect

TIMEOUT = 30_000  # ms: the machine may be busy
PLACES = [
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
]


@contextmanager
def windows(browser: Browser, **context: Any) -> Iterator[BrowserContext]:
    """A profile in which no tab may log an error or ask for anything from elsewhere."""
    made = browser.new_context(**({"viewport": {"width": 900, "height": 640}, "accept_downloads": True} | context))
    made.set_default_timeout(TIMEOUT)
    errors: list[str] = []
    made.on("weberror", lambda error: errors.append(str(error.error)))
    made.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    made.on("request", lambda request: None if local(request.url) else errors.append(request.url))
    yield made
    made.close()
    assert [error for error in errors if not re.search("status of [45]|ERR_FAILED", error)] == []


def local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "blob:http://127.0.0.1:", "data:"))


def tab(window: BrowserContext, url: str) -> Page:
    page = window.new_page()
    page.goto(url)
    ready(page)
    return page


def ready(page: Page) -> None:
    """Wait until the page has read what it keeps and has asked the server."""
    expect(page.locator("#model")).to_have_text("gemma4-demo")


def settle_sampling(page: Page, **numbers: float) -> None:
    page.click("#settings")
    for name, value in numbers.items():
        page.fill(f"#panel [name={name}]", str(value))
    page.keyboard.press("Escape")


def send(page: Page, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def done(page: Page) -> None:
    expect(page.locator("#send")).to_have_text("Send", timeout=60_000)


def say(page: Page, text: str) -> None:
    send(page, text)
    expect(page.locator("article.user .text").last).to_have_text(text)
    done(page)


def shot(page: Page, name: str) -> None:
    """A picture for the docs, where they are asked for."""
    if folder := os.environ.get("MLX_GEMMA4_SCREENSHOTS"):
        Path(folder).mkdir(exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png")


def events(*deltas: dict[str, str], finish: str = "stop", usage: dict[str, int] | None = None) -> str:
    """What the server would stream."""
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": finish})
    lines = [json.dumps({"choices": [choice]}) for choice in choices]
    lines += [json.dumps({"choices": [], "usage": usage})] if usage else []
    return "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])


def answer(page: Page, *deltas: dict[str, str], finish: str = "stop", usage: Any = None, **more: Any) -> list[Any]:
    """Let the next replies be these, whatever is asked; the bodies of the requests, as they come."""
    asked: list[Any] = []
    body = events(*deltas, finish=finish, usage=usage)

    def fulfil(route: Route) -> None:
        asked.append(route.request.post_data_json)
        route.fulfill(**({"status": 200, "content_type": "text/event-stream", "body": body} | more))

    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", fulfil)
    return asked


def replies(page: Page) -> Locator:
    return page.locator("article.assistant")


def texts(page: Page) -> list[str]:
    """What is shown of all messages."""
    return page.locator("article > .text").all_inner_texts()


def chats(page: Page) -> Locator:
    return page.locator("#chats li .name")
