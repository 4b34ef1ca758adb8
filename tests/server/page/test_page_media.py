"""Pictures and sounds on the page: attached, pasted, dropped, spoken; shown, kept, sent again; or none are taken."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from browsing import answer, done, replies, send, shot, windows
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, BrowserContext, Page, expect
from serving import Serving, serving

from mlx_gemma4.conversation.language_model import load
from mlx_gemma4.server.settings import Settings

pytestmark = pytest.mark.browser

PAIRS = Path(__file__).parents[2] / "fixtures" / "media"
NAME = "a pair"


def drawing() -> bytes:
    made = Image.new("RGB", (320, 240), "white")
    draw = ImageDraw.Draw(made)
    draw.ellipse((40, 40, 180, 180), fill="crimson")
    draw.rectangle((190, 110, 290, 210), fill="royalblue")
    file = io.BytesIO()
    made.save(file, "PNG")
    return file.getvalue()


PNG = drawing()
FILE: Any = {"name": "shapes.png", "mimeType": "image/png", "buffer": PNG}
URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
# A DataTransfer with the picture, as a paste or a drop brings it.
HELD = """url => {
  const data = new DataTransfer(), bytes = Uint8Array.from(atob(url.split(",")[1]), c => c.charCodeAt(0));
  data.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
  return data;
}"""


@pytest.fixture(scope="module", params=["uv"])
def seeing(request: pytest.FixtureRequest) -> Iterator[Serving]:
    with serving(load(PAIRS / request.param / "model.gguf"), Settings(model_name=NAME, max_tokens=4)) as running:
        yield running


@pytest.fixture(scope="module")
def hearing() -> Iterator[Serving]:
    with serving(load(PAIRS / "ua" / "model.gguf"), Settings(model_name=NAME, max_tokens=4)) as running:
        yield running


def opened(window: BrowserContext, server: Serving) -> Page:
    page = window.new_page()
    page.goto(server.url)
    expect(page.locator("#model")).to_have_text(NAME)
    return page


@pytest.fixture
def sees(browser: Browser, seeing: Serving) -> Iterator[Page]:
    with windows(browser) as window:
        yield opened(window, seeing)


def attach(page: Page) -> None:
    page.set_input_files("#pick", FILE)
    expect(page.locator("#attached li")).to_have_count(1)


def said(asked: list[Any]) -> Any:
    """Content of the last message of the last request."""
    return asked[-1]["messages"][-1]["content"]


def test_a_picture_is_sent_shown_and_kept(sees: Page) -> None:
    page = sees
    expect(page.locator("#speak")).to_be_hidden()
    attach(page)
    expect(page.locator("#attached .name")).to_have_text("shapes.png")
    send(page, "What is it?")
    done(page)
    expect(replies(page)).to_have_count(1)
    assert page.locator(".error").count() == 0
    expect(page.locator("#attached li")).to_have_count(0)
    picture = page.locator("article.user .media img")
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.naturalWidth") == 320
    page.reload()
    expect(page.locator("article.user .media img")).to_be_visible()
    assert page.locator("article.user .media img").get_attribute("src") == URL


def test_requests_have_the_picture_each_time_and_on_each_branch(sees: Page) -> None:
    page, asked = sees, answer(sees, {"content": "A circle."})
    attach(page)
    send(page, "What is it?")
    done(page)
    parts = [{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": "What is it?"}]
    assert said(asked) == parts
    page.get_by_role("button", name="Regenerate").click()
    done(page)
    assert len(asked) == 2 and said(asked) == parts
    page.locator("article.user").hover()
    page.locator("article.user").get_by_role("button", name="Edit").click()
    page.locator(".editor textarea").fill("Which colour?")
    page.get_by_role("button", name="Send again").click()
    done(page)
    assert said(asked) == [parts[0], {"type": "text", "text": "Which colour?"}]
    expect(page.locator("article.user .media img")).to_have_count(1)
    send(page, "And now?")
    done(page)
    assert said(asked) == "And now?" and asked[-1]["messages"][0]["content"][0] == parts[0]


def test_a_picture_alone_is_a_message(sees: Page) -> None:
    asked = answer(sees, {"content": "A circle."})
    attach(sees)
    sees.click("#send")
    done(sees)
    assert said(asked) == [{"type": "image_url", "image_url": {"url": URL}}]
    expect(sees.locator("#chats li .name")).to_have_text("shapes.png")


def test_paste_drop_and_remove(sees: Page) -> None:
    page = sees
    held = page.evaluate_handle(HELD, URL)
    page.evaluate(
        "data => document.getElementById('input').dispatchEvent(new ClipboardEvent('paste', { clipboardData: data }))",
        held,
    )
    expect(page.locator("#attached li")).to_have_count(1)
    for name in ("dragover", "drop"):
        page.dispatch_event("#log", name, {"dataTransfer": held})
    expect(page.locator("#attached li")).to_have_count(2)
    page.get_by_role("button", name="Remove dropped.png").first.click()
    expect(page.locator("#attached li")).to_have_count(1)
    expect(page.locator("#input")).to_be_focused()


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("a.wav", "audio/wav", "takes image, video and text"),
        ("a.svg", "image/svg+xml", "SVG"),
        ("a.pdf", "application/pdf", "takes"),
    ],
)
def test_what_is_not_taken_is_said(sees: Page, name: str, kind: str, says: str) -> None:
    sees.set_input_files("#pick", {"name": name, "mimeType": kind, "buffer": b"x"})
    expect(sees.locator("#status")).to_contain_text(says)
    expect(sees.locator("#attached li")).to_have_count(0)


def test_nothing_of_it_shows_where_none_is_taken(browser: Browser) -> None:
    with serving(load(mmproj=None), Settings(model_name=NAME)) as blind, windows(browser) as window:
        page = opened(window, blind)
        for name in ("#attach", "#speak", "#attached", "#pick"):
            expect(page.locator(name)).to_be_hidden()
        held = page.evaluate_handle(HELD, URL)
        page.dispatch_event("#log", "drop", {"dataTransfer": held})
        expect(page.locator("#attached li")).to_have_count(0)


def test_the_built_in_model_takes_pictures_alone(page: Page) -> None:
    expect(page.locator("#attach")).to_be_visible()
    expect(page.locator("#speak")).to_be_hidden()
    assert page.locator("#pick").get_attribute("accept") == "image/*"


def test_exports_have_pictures_and_imports_check_them(sees: Page, tmp_path: Path) -> None:
    page = sees
    answer(page, {"content": "A circle."})
    attach(page)
    send(page, "What is it?")
    done(page)
    with page.expect_download() as download:
        page.click("#export")
    path = tmp_path / "chats.json"
    download.value.save_as(path)
    file = json.loads(path.read_text())
    message = file["chats"][0]["messages"][0]
    assert message["media"] == [{"kind": "image", "name": "shapes.png", "url": URL}]
    message["media"] += [
        {"kind": "image", "name": "evil", "url": "https://example.com/a.png"},
        {"kind": "image", "url": 5},
    ]
    path.write_text(json.dumps(file))
    page.set_input_files("#file", path)
    expect(page.locator("#status")).to_have_text("Imported.")
    expect(page.locator("article.user .media img")).to_have_count(1)


def test_the_microphone_is_heard(browser: Browser, hearing: Serving) -> None:
    with windows(browser, permissions=["microphone"]) as window:
        page = opened(window, hearing)
        # A tone in place of a microphone, which a machine for tests has not.
        page.evaluate("""() => { navigator.mediaDevices.getUserMedia = async () => {
            const context = new AudioContext(), tone = context.createOscillator();
            const end = context.createMediaStreamDestination();
            tone.connect(end); tone.start();
            return end.stream;
        }; }""")
        speak = page.get_by_role("button", name="Speak")
        speak.click()
        expect(speak).to_have_attribute("aria-pressed", "true")
        page.wait_for_timeout(1500)
        speak.click()
        expect(page.locator("#attached audio")).to_have_count(1)
        with page.expect_request("**/v1/chat/completions") as request:
            send(page, "What is said?")
        part = request.value.post_data_json["messages"][-1]["content"][0]
        assert part["type"] == "input_audio" and len(part["input_audio"]["data"]) > 100
        done(page)
        expect(replies(page)).to_have_count(1)
        assert page.locator(".error").count() == 0


@pytest.mark.parametrize(("scheme", "width", "height"), [("light", 1280, 800), ("dark", 360, 740)])
def test_axe_finds_nothing_about_it(browser: Browser, seeing: Serving, scheme: Any, width: int, height: int) -> None:
    with windows(
        browser, viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce"
    ) as window:
        page = opened(window, seeing)
        answer(page, {"content": "A red circle, and a blue square beside it."})
        attach(page)
        send(page, "What is there?")
        done(page)
        attach(page)
        page.fill("#input", "And in this one?")
        found = Axe().run(page).response["violations"]
        assert [f"{each['id']}: {[node['html'][:150] for node in each['nodes'][:3]]}" for each in found] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if width == 1280:
            shot(page, "page-media")
