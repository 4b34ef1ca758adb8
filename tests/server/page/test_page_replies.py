"""Replies in the page: versions, edits, going on; and what is said where one fails or the context is full."""

from __future__ import annotations

from typing import Any

import pytest
from browsing import answer, chats, done, ready, replies, say, send, settle_sampling, tab, texts, windows
from playwright.sync_api import Browser, Page, expect
from serving import Serving, serving

from mlx_gemma4.conversation.language_model import LanguageModel
from mlx_gemma4.server.settings import Settings

pytestmark = pytest.mark.browser


def at_reply(page: Page, text: str) -> None:
    """Wait until the last reply is this one, and done."""
    expect(replies(page).last.locator(".text")).to_have_text(text)
    done(page)


def test_versions_of_a_reply(page: Page) -> None:
    answer(page, {"content": "First."})
    say(page, "One")
    for version, text in ((2, "Second."), (3, "Third.")):
        answer(page, {"content": text})
        page.get_by_role("button", name="Regenerate").click()
        at_reply(page, text)
        expect(page.get_by_role("group", name=f"Version {version} of {version}")).to_be_visible()
    page.get_by_role("button", name="Earlier version").click()
    at_reply(page, "Second.")
    asked = answer(page, {"content": "After the second."})
    say(page, "Two")
    assert [m["content"] for m in asked[0]["messages"]] == ["One", "Second.", "Two"]
    page.get_by_role("button", name="Earlier version").click()
    assert texts(page) == ["One", "First."]
    expect(page.get_by_role("button", name="Earlier version")).to_be_disabled()
    page.get_by_role("button", name="Later version").click()
    assert texts(page) == ["One", "Second.", "Two", "After the second."]
    page.reload()
    ready(page)
    assert texts(page) == ["One", "Second.", "Two", "After the second."]


def test_any_message_can_be_edited(page: Page) -> None:
    answer(page, {"content": "Yes."})
    for text in ("One", "Two"):
        say(page, text)
    asked = answer(page, {"content": "No."})
    page.get_by_label("You", exact=True).first.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the message").fill("Uno")
    page.get_by_role("button", name="Send again").click()
    at_reply(page, "No.")
    assert texts(page) == ["Uno", "No."] and [m["content"] for m in asked[0]["messages"]] == ["Uno"]
    page.get_by_role("button", name="Earlier version").click()
    assert texts(page) == ["One", "Yes.", "Two", "Yes."]
    page.get_by_label("Reply", exact=True).first.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the message").fill("Perhaps.")
    page.get_by_label("Edit the message").press("Control+Enter")
    expect(page.locator("article")).to_have_count(2)
    assert texts(page) == ["One", "Perhaps."] and len(asked) == 1
    say(page, "Three")
    assert [m["content"] for m in asked[1]["messages"]] == ["One", "Perhaps.", "Three"]


def test_a_cut_reply_goes_on(page: Page) -> None:
    answer(page, {"content": "Once upon"}, finish="length")
    say(page, "A tale")
    expect(replies(page).locator(".below")).to_contain_text("Cut off: no more tokens allowed.")
    asked = answer(page, {"content": " a time."}, usage={"prompt_tokens": 9, "completion_tokens": 3})
    page.get_by_role("button", name="Continue").click()
    at_reply(page, "Once upon a time.")
    assert asked[0]["continue_final_message"] is True and asked[0]["messages"][-1] == {
        "role": "assistant",
        "content": "Once upon",
    }
    expect(page.get_by_role("button", name="Continue")).to_have_count(0)
    page.reload()
    ready(page)
    assert texts(page) == ["A tale", "Once upon a time."]


def test_speed_and_size_are_told(page: Page) -> None:
    settle_sampling(page, max_tokens=20, temperature=0)
    send(page, "Tell me a story about a king.")
    expect(replies(page).locator(".stats")).to_contain_text(" tokens/s", timeout=60_000)
    stats = replies(page).locator(".stats").inner_text()
    assert " tokens · " in stats and "first after " in stats and "of 2,048 tokens of context" in stats
    expect(page.locator("#context")).to_have_text("2,048 tokens")


TOO_LONG = {"error": {"message": "the prompt has 9 tokens", "code": "context_length_exceeded"}}


def full_chat(page: Page) -> None:
    """Three turns whose third doesn't fit."""
    answer(page, {"content": "a" * 200})
    for text in ("One " + "b" * 200, "Two"):
        say(page, text)
    answer(page, status=400, json=TOO_LONG, body=None, content_type=None)
    say(page, "Three")
    expect(page.get_by_role("group", name="The context is full")).to_contain_text("the model reads 2,048 tokens")
    expect(page.locator("#log [role=alert]")).to_have_text("The conversation is longer than the model can read.")


def sent(asked: list[Any]) -> list[str]:
    return [m["content"] for m in asked[-1]["messages"]]


def test_where_the_context_is_full_the_oldest_can_be_dropped(page: Page) -> None:
    full_chat(page)
    asked = answer(page, {"content": "Fine."})
    page.get_by_role("button", name="Drop the oldest messages").click()
    at_reply(page, "Fine.")
    assert sent(asked) == ["Two", "a" * 200, "Three"] and len(texts(page)) == 6
    expect(page.get_by_role("note")).to_contain_text("not sent to the model any more")
    page.reload()
    ready(page)
    asked = answer(page, {"content": "Good."})
    say(page, "Four")
    assert sent(asked) == ["Two", "a" * 200, "Three", "Fine.", "Four"]
    page.get_by_role("button", name="Send it again").click()
    say(page, "Five")
    assert len(sent(asked)) == 9
    expect(page.get_by_role("note")).to_have_count(0)


def test_where_the_context_is_full_a_new_chat_takes_the_last_turns(page: Page) -> None:
    full_chat(page)
    asked = answer(page, {"content": "Fine."})
    page.get_by_role("button", name="New chat with the last turns").click()
    at_reply(page, "Fine.")
    assert sent(asked) == ["Two", "a" * 200, "Three"]
    assert texts(page) == ["Two", "a" * 200, "Three", "Fine."]
    expect(chats(page)).to_have_count(2)
    assert "(2)" in page.title()


def test_the_real_server_says_when_the_context_is_full(page: Page) -> None:
    """A reply that ends where the context does, and a prompt that is longer than it."""
    answer(page, {"content": "Fine."})
    say(page, "the king " * 900)
    page.unroute_all()
    send(page, "and the fox " * 700)
    done(page)
    expect(page.get_by_role("group", name="The context is full")).to_be_visible()
    settle_sampling(page, max_tokens=4)
    page.get_by_role("button", name="Drop the oldest messages").click()
    expect(page.get_by_role("group", name="The context is full")).to_be_visible()  # this message alone is too long
    page.get_by_role("button", name="Drop the oldest messages").click()
    expect(page.locator("#status")).to_have_text("One message alone is too long for the model: edit it.")


def test_a_reply_cut_by_the_context(page: Page) -> None:
    answer(page, {"content": "Once"}, finish="length", usage={"prompt_tokens": 2000, "completion_tokens": 48})
    say(page, "One")
    expect(page.get_by_role("group", name="The context is full")).to_be_visible()
    expect(page.get_by_role("button", name="Continue")).to_have_count(0)


GONE_WRONG = "Something went wrong in the server; its log says what."
REFUSED = "The server refuses requests from this address. Open the page under the address that the server printed."


ERRORS: list[tuple[int, Any, str]] = [
    (500, {"message": "unexpected TypeError; the server's log has the details"}, GONE_WRONG),
    (413, {"message": "the body is over 9 bytes"}, "That is more than the server takes at once. Start a new chat, or "),
    (403, {"message": "pages of 'x' may not use this server"}, REFUSED),
    (503, {"message": "the server is shutting down", "code": "shutting_down"}, "The server is shutting down."),
    (400, {"message": "temperature must be at most 2"}, "Temperature must be at most 2."),
    (502, None, GONE_WRONG),
    (404, None, "The server answered 404."),
]


def test_errors_are_told_in_words(page: Page) -> None:
    answer(page, {"content": ""}, finish="")
    say(page, "One")
    expect(page.locator("#log [role=alert]")).to_have_text("The server broke off.")
    for status, error, words in ERRORS:
        body = {"json": {"error": error}, "body": None} if error else {"body": "<html>"}
        answer(page, status=status, **body, content_type=None)
        page.get_by_role("button", name="Try again").click()
        expect(page.locator("#log [role=alert]")).to_contain_text(words)
        done(page)
    expect(replies(page)).to_have_count(1)


def test_a_server_that_is_gone(page: Page) -> None:
    page.route("**/v1/chat/completions", lambda route: route.abort())
    say(page, "One")
    expect(page.locator("#log [role=alert]")).to_have_text("The server can't be reached.")


def test_a_wrong_key_is_called_wrong(browser: Browser, lm: LanguageModel) -> None:
    with (
        serving(lm, Settings(model_name="gemma4-demo", api_key="sesame")) as locked,
        windows(browser, viewport={"width": 360, "height": 640}) as window,
    ):
        page = window.new_page()
        page.goto(locked.url)
        expect(page.locator("#asked")).to_have_text("This server asks for its API key.")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        expect(page.locator("#asked")).to_have_text("That key is wrong.")
        expect(page.locator("#key")).to_be_focused()
        box, composer = page.locator("#unlock").bounding_box(), page.locator("#composer").bounding_box()
        assert box and composer and box["x"] >= 0 and box["x"] + box["width"] <= 360
        assert box["y"] + box["height"] < composer["y"]
        page.fill("#key", "sesame")
        page.press("#key", "Enter")
        expect(page.locator("#unlock")).to_be_hidden()
        ready(page)


def test_a_key_that_is_asked_for_in_the_middle(browser: Browser, lm: LanguageModel) -> None:
    with serving(lm, Settings(model_name="gemma4-demo")) as running, windows(browser) as window:
        page = tab(window, running.url)
        answer(page, status=401, json={"error": {"message": "the key"}}, body=None, content_type=None)
        send(page, "One")
        expect(page.locator("#asked")).to_have_text("This server asks for its API key.")
        answer(page, {"content": "Yes."})
        page.fill("#key", "sesame")
        page.press("#key", "Enter")
        at_reply(page, "Yes.")
        assert texts(page) == ["One", "Yes."]


def test_the_keyboard_alone(page: Page, server: Serving) -> None:
    """Tab reaches everything, in the order of the page; nothing holds it."""
    answer(page, {"content": "```py\nx = 1\n```"})
    say(page, "One")
    page.locator("#side #new").focus()
    names = []
    for _ in range(40):
        names.append(
            page.evaluate(
                "() => { const at = document.activeElement;"
                " return at.id || at.getAttribute('aria-label') || at.textContent.trim() || at.tagName; }"
            )
        )
        page.keyboard.press("Tab")
    wanted = ["new", "search", "One", "More for One", "import", "export", "sides", "settings", "new2", "scroll",
              "Copy", "Edit", "Copy code", "Code, py", "Regenerate", "input", "think", "send"]  # fmt: skip
    at = -1
    for name in wanted:
        assert name in names[at + 1 :], (name, names)
        at = names.index(name, at + 1)
