"""The page in a real browser, before the real server with the built-in model: pytest -m browser. See browsing.py."""

from __future__ import annotations

from typing import Any

import pytest
from browsing import answer, chats, done, events, ready, replies, send, settle_sampling, tab, windows
from playwright.sync_api import Browser, Page, expect
from serving import Serving, serving, settled

from mlx_gemma4.conversation.language_model import LanguageModel
from mlx_gemma4.server.settings import Settings

pytestmark = pytest.mark.browser


def test_send_and_go_on(page: Page) -> None:
    settle_sampling(page, max_tokens=95, seed=4)
    send(page, "Who are you?")
    expect(page.locator("article.user .text")).to_have_text("Who are you?")
    done(page)
    assert len(replies(page).locator(".text").inner_text().split()) > 5
    expect(replies(page).locator(".stats")).to_contain_text("of 2,048 tokens of context")
    send(page, "Tell me a story about a king.")
    done(page)
    expect(replies(page)).to_have_count(2)
    expect(replies(page).last.locator(".stats")).to_contain_text("not read again")


def test_stop_keeps_what_came_and_frees_the_server(page: Page, server: Serving) -> None:
    send(page, "Tell me a long story about the sea.")
    expect(replies(page).locator(".text")).not_to_be_empty(timeout=30_000)
    page.keyboard.press("Escape")
    expect(replies(page).locator(".below")).to_contain_text("Stopped.")
    assert settled(server.engine, 5)
    text = replies(page).locator(".text").inner_text()
    page.wait_for_timeout(300)
    assert text and replies(page).locator(".text").inner_text() == text


def test_retry_asks_again(page: Page) -> None:
    settle_sampling(page, max_tokens=20, temperature=2)
    send(page, "Tell me a story.")
    done(page)
    first = replies(page).locator(".text").inner_text()
    replies(page).get_by_role("button", name="Regenerate").click()
    expect(replies(page).get_by_text("2/2")).to_be_visible()
    done(page)
    expect(replies(page)).to_have_count(1)
    assert replies(page).locator(".text").inner_text() != first
    page.keyboard.press("Alt+r")
    expect(page.locator("#send")).to_have_text("Stop")
    done(page)


def test_reload_keeps_the_conversation(page: Page) -> None:
    page.click("#settings")
    page.fill("[name=system]", "Speak of foxes.")
    page.keyboard.press("Escape")
    settle_sampling(page, max_tokens=10)
    send(page, "Hello\n<b>there</b>")
    done(page)
    before = page.locator("#log").inner_text()
    page.reload()
    expect(page.locator("#model")).to_have_text("gemma4-demo")
    assert page.locator("#log").inner_text() == before and "<b>there</b>" in before
    assert page.input_value("[name=system]") == "Speak of foxes." and page.input_value("[name=max_tokens]") == "10"


@pytest.mark.parametrize("kept", ["{", "null", "[]", '{"messages": [null]}', '{"messages": [{"role": "user"}]}'])
def test_what_cannot_be_a_conversation_is_left(page: Page, kept: str) -> None:
    page.evaluate("kept => localStorage.setItem('mlx-gemma4', kept)", kept)
    page.reload()
    ready(page)
    expect(page.locator("#empty")).to_be_visible()
    expect(chats(page)).to_have_count(0)


def test_reload_in_the_middle_of_a_reply(page: Page, server: Serving) -> None:
    send(page, "Tell me a long story about a mill.")
    expect(replies(page).locator(".text")).not_to_be_empty(timeout=30_000)
    page.reload()
    expect(replies(page).locator(".below")).to_contain_text("Stopped.")
    expect(replies(page).locator(".text")).not_to_be_empty()
    assert settled(server.engine, 5)


def test_thinking_folds(page: Page) -> None:
    answer(
        page, {"reasoning_content": "The user asks\n"}, {"reasoning_content": "for **tea**."}, {"content": "Tea it is."}
    )
    send(page, "Tea or coffee?")
    done(page)
    thinking = replies(page).locator("details")
    expect(thinking).not_to_have_attribute("open", "")
    expect(replies(page).locator(".text")).to_have_text("Tea it is.")
    thinking.locator("summary").click()
    expect(thinking.locator("div")).to_have_text("The user asks\nfor **tea**.", use_inner_text=True)


def test_the_model_thinks_when_asked_to(page: Page) -> None:
    page.click("#settings")
    page.check("[name=think]")
    page.keyboard.press("Escape")
    settle_sampling(page, max_tokens=150, temperature=0)
    send(page, "Tell me a story about a king.")
    done(page)
    expect(replies(page).locator("details")).to_be_visible()
    assert replies(page).locator("details div").text_content()
    expect(replies(page).locator(".text")).not_to_be_empty()


def test_edit_last(page: Page) -> None:
    answer(page, {"content": "Yes."})
    for text in ("One", "Two"):
        send(page, text)
        done(page)
        expect(page.locator("article.user .text").last).to_have_text(text)
    page.press("#input", "ArrowUp")
    editor = page.get_by_label("Edit the message")
    expect(editor).to_have_value("Two")
    page.keyboard.press("Escape")
    expect(page.locator("article")).to_have_count(4)
    expect(page.locator("article.user .text")).to_have_text(["One", "Two"])
    page.get_by_role("button", name="Edit").nth(2).click()
    editor.fill("Three")
    editor.press("Enter")
    done(page)
    expect(page.locator("article.user .text")).to_have_text(["One", "Three"])


def test_new_chat_can_be_undone(page: Page) -> None:
    answer(page, {"content": "Yes."})
    send(page, "One")
    done(page)
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("article")).to_have_count(0)
    chats(page).get_by_text("One").click()
    expect(page.locator("article")).to_have_count(2)


def test_a_new_chat_between_a_reply_and_the_frame_that_draws_it(page: Page) -> None:
    expect(page.locator("#none")).to_be_visible()
    page.evaluate("() => { window.held = []; window.requestAnimationFrame = draw => held.push(draw); }")
    answer(page, {"content": "Yes."})
    send(page, "One")
    done(page)
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("article")).to_have_count(0)
    assert page.evaluate("held.map(draw => draw(0)).length") == 1
    expect(page.locator("article")).to_have_count(0)


def test_what_a_model_writes_never_becomes_markup(page: Page) -> None:
    evil = "<img src=x onerror='document.title=1'> <script>document.title=1</script> [x](javascript:document.title=1)"
    answer(page, {"content": f"{evil}\n\n```html\n{evil}\n```\n\n| {evil} |\n|---|\n| {evil} |"})
    send(page, evil)
    done(page)
    expect(chats(page)).to_contain_text("<img src=x")
    assert page.locator("#log img, #log script, #log a, #side img, #side script, #side a").count() == 0
    assert (
        page.title().startswith("<img src=x")
        and page.title().endswith("gemma4-demo")
        and evil in page.locator("article.user .text").inner_text()
    )


def test_the_sanitizer_drops_what_no_markdown_makes(browser: Browser, server: Serving) -> None:
    """`build` gets HTML that the Markdown parser would never give. The policy blocks it too, and logs it."""
    page = browser.new_page()
    page.goto(server.url)
    ready(page)
    found = page.evaluate(
        """() => {
          const made = build(`<p id="a" onclick="document.title = 1">b<script>document.title = 1</script>
            <img src="x" onerror="document.title = 1"><svg onload="document.title = 1"></svg><input>
            <a href="javascript:document.title = 1">c</a><a href="https://d.e/f">g</a></p>`);
          document.body.append(made);
          return [...made.querySelectorAll("*"), made].map(x => [x.tagName, ...x.getAttributeNames()].join(" "));
        }"""
    )
    assert sorted(found) == ["A href target rel", "A target rel", "P dir"]
    expect(page).to_have_title("gemma4-demo")
    page.close()


TEA = """## Tea for two
1. Boil *half a litre* of water
2. Wait **three minutes**
   - not five

| leaf | degrees |
| --- | --- |
| green | 75 |
| black | 95 |

```python
for cup in cups:
    pour(tea, into=cup)
```
"""


@pytest.mark.parametrize(("scheme", "width"), [("light", 900), ("dark", 360), ("dark", 1400), ("light", 3840)])
def test_both_themes_and_widths(browser: Browser, server: Serving, scheme: Any, width: int) -> None:
    with windows(browser, viewport={"width": width, "height": 640}, color_scheme=scheme) as window:
        page = tab(window, server.url)
        answer(page, {"reasoning_content": "Two cups."}, {"content": TEA})
        send(page, "How do I make tea?")
        done(page)
        wide = "|" + "leaf|" * 40 + "\n" + "|-" * 40 + "|\n\n```\n" + "water, " * 40 + "\n```\n" + "y" * 300
        answer(page, {"content": wide})
        send(page, "z" * 300)
        done(page)
        page.click("#settings")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.keyboard.press("Escape")


def test_errors_are_said_and_can_be_retried(page: Page) -> None:
    answer(page, status=429, headers={"retry-after": "7"}, json={"error": {"message": "Too many."}}, body=None)
    send(page, "Hello")
    expect(page.locator("#log [role=alert]")).to_have_text("Too many. Try again in 7 s.")
    page.unroute_all()
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, body=events({"content": "a"})[:60]))
    page.keyboard.press("Alt+r")
    expect(page.locator("#log [role=alert]")).to_contain_text("broke off")
    page.unroute_all()
    settle_sampling(page, max_tokens=3)
    page.keyboard.press("Alt+r")
    done(page)
    expect(page.locator("#log [role=alert]")).to_have_count(0)
    expect(page.locator("article")).to_have_count(2)


def test_the_key_is_asked_for(browser: Browser, lm: LanguageModel) -> None:
    with serving(lm, Settings(model_name="gemma4-demo", api_key="sesame")) as locked:
        window = browser.new_context()
        page = window.new_page()
        page.goto(locked.url)
        expect(page.locator("#key")).to_be_focused()
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        expect(page.locator("#unlock")).to_be_visible()
        page.fill("#key", "sesame")
        page.press("#key", "Enter")
        expect(page.locator("#unlock")).to_be_hidden()
        settle_sampling(page, max_tokens=3)
        send(page, "Hello")
        done(page)
        assert replies(page).locator(".error").count() == 0
        assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")
        window.close()
