"""A Chromium, the server with the built-in model, and the page in a tab: fixtures of the page's tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from browsing import PLACES, TIMEOUT, tab, windows
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from serving import Serving, serving

from mlx_gemma4.conversation.language_model import LanguageModel
from mlx_gemma4.server.settings import Settings


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    named = os.environ.get("MLX_GEMMA4_CHROMIUM")
    found = next(filter(None, map(shutil.which, [named] if named else PLACES)), None)
    assert found, "no Chromium here: install one, or name it in MLX_GEMMA4_CHROMIUM"
    expect.set_options(timeout=TIMEOUT)
    with sync_playwright() as playwright:
        # Root, as in CI's container, can't have Chromium's sandbox.
        running = playwright.chromium.launch(executable_path=found, chromium_sandbox=os.getuid() != 0)
        yield running
        running.close()


@pytest.fixture(scope="module")
def server(lm: LanguageModel) -> Iterator[Serving]:
    with serving(lm, Settings(model_name="gemma4-demo")) as running:
        yield running


@pytest.fixture
def window(browser: Browser, server: Serving) -> Iterator[BrowserContext]:
    """A browser's profile of its own, whose tabs share what they keep."""
    with windows(browser) as made:
        yield made


@pytest.fixture
def page(window: BrowserContext, server: Serving) -> Page:
    """The page in a tab; what it logs as an error, a blocked script say, fails the test."""
    return tab(window, server.url)
