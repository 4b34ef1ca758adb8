"""Many chats in the page: kept by record, the same in all tabs, found, named, deleted, and as files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from browsing import answer, chats, done, ready, replies, say, send, settle_sampling, tab, texts
from playwright.sync_api import BrowserContext, Download, Page, expect
from serving import Serving, settled

pytestmark = pytest.mark.browser


def menu(page: Page, title: str, item: str) -> None:
    page.get_by_role("button", name=f"More for {title}", exact=True).click()
    page.get_by_role("menuitem", name=item).click()


def download(page: Page, title: str, item: str, folder: Path) -> Path:
    with page.expect_download() as started:
        menu(page, title, item)
    return kept(started.value, folder)


def kept(download: Download, folder: Path) -> Path:
    path = folder / download.suggested_filename
    download.save_as(path)
    return path


def bring(page: Page, *files: Path | dict[str, Any]) -> None:
    page.locator("#file").set_input_files(list(files))


def test_two_tabs_keep_each_others_messages(window: BrowserContext, server: Serving) -> None:
    first = tab(window, server.url)
    answer(first, {"content": "From the first."})
    say(first, "One")
    second = tab(window, server.url)  # it shows the chat that was last
    assert texts(second) == ["One", "From the first."]
    answer(second, {"content": "From the second."})
    say(second, "Two")
    expect(first.locator("article")).to_have_count(4)  # without a reload
    say(first, "Three")
    for page in (first, second):
        page.reload()
        ready(page)
        assert texts(page) == ["One", "From the first.", "Two", "From the second.", "Three", "From the first."]
        expect(chats(page)).to_have_count(1)


def test_tabs_that_were_empty_make_chats_of_their_own(window: BrowserContext, server: Serving) -> None:
    first, second = tab(window, server.url), tab(window, server.url)
    for page, text in ((second, "Two"), (first, "One")):
        answer(page, {"content": f"Yes, {text}."})
        say(page, text)
    for page, text in ((first, "One"), (second, "Two")):
        expect(chats(page)).to_have_text(["One", "Two"])
        page.reload()
        ready(page)
        assert texts(page) == [text, f"Yes, {text}."]


def test_tabs_that_write_at_the_same_time_lose_nothing(window: BrowserContext, server: Serving) -> None:
    """Neither tab has heard of the other's message when it sends its own: both stay, as two branches."""
    first = tab(window, server.url)
    answer(first, {"content": "Yes."})
    say(first, "Hello")
    second = tab(window, server.url)
    for page in (first, second):
        answer(page, {"content": "Yes."})
        page.evaluate("() => { store.listen(() => {}); }")
    say(first, "One")
    say(second, "Two")
    first.reload()
    ready(first)
    assert texts(first) == ["Hello", "Yes.", "Two", "Yes."]
    first.get_by_role("button", name="Earlier version").click()
    assert texts(first) == ["Hello", "Yes.", "One", "Yes."]


def test_a_reply_in_another_tab_is_seen_as_it_is_written(window: BrowserContext, server: Serving) -> None:
    first = tab(window, server.url)
    answer(first, {"content": "Yes."})
    say(first, "Hello")
    second = tab(window, server.url)
    first.unroute_all()
    settle_sampling(first, max_tokens=400)
    send(first, "Tell me a long story about a mill.")
    expect(replies(second)).to_have_count(2)
    expect(replies(second).last.locator(".text")).not_to_be_empty()
    expect(second.get_by_label("A reply is being written:")).to_have_count(0)  # it is not this tab's
    first.keyboard.press("Escape")
    expect(replies(second).last.locator(".below")).to_contain_text("Stopped.")
    assert texts(second) == texts(first)


def test_a_chat_deleted_in_one_tab_is_left_in_the_other(window: BrowserContext, server: Serving) -> None:
    first = tab(window, server.url)
    answer(first, {"content": "Yes."})
    say(first, "One")
    second = tab(window, server.url)
    menu(second, "One", "Delete")
    expect(first.locator("#status")).to_contain_text("deleted in another tab")
    expect(first.locator("article")).to_have_count(0)
    second.get_by_role("button", name="Undo").click()
    expect(chats(first)).to_have_text(["One"])
    assert texts(second) == ["One", "Yes."]


def test_a_chat_deleted_while_its_reply_is_written_stays_deleted(window: BrowserContext, server: Serving) -> None:
    first, second = tab(window, server.url), tab(window, server.url)
    for page, other in ((first, first), (first, second)):  # in the tab that writes, and in another one
        send(page, "Tell me a long story about the sea.")
        expect(replies(page).locator(".text")).not_to_be_empty()
        menu(other, "Tell me a long story about the sea.", "Delete")
        expect(first.locator("article")).to_have_count(0)
        assert settled(server.engine)
        for each in (first, second):
            each.reload()
            ready(each)
            expect(each.locator("#none")).to_have_text("No chats yet.")


def test_chats_are_listed_and_found_by_name_and_text(page: Page) -> None:
    answer(page, {"content": "Kings and *foxes*."})
    say(page, "What is in a tale?")
    page.keyboard.press("Control+Shift+O")
    answer(page, {"content": "Three minutes."})
    say(page, "How long does tea take?\nIn a pot.")
    expect(chats(page)).to_have_text(["How long does tea take?", "What is in a tale?"])
    page.keyboard.press("Control+k")
    expect(page.locator("#search")).to_be_focused()
    for words, titles in {
        "foxes": ["What is in a tale?"],
        "TEA long": ["How long does tea take?"],
        "pot": ["How long does tea take?"],
        "fox tea": [],
    }.items():
        page.fill("#search", words)
        expect(chats(page)).to_have_text(titles)
    expect(page.locator("#none")).to_have_text("Nothing found.")
    page.keyboard.press("Escape")
    expect(chats(page)).to_have_count(2)
    chats(page).last.click()
    expect(replies(page).locator(".text")).to_have_text("Kings and foxes.")
    page.go_back()
    expect(replies(page).locator(".text")).to_have_text("Three minutes.")


def test_rename_and_delete_by_keyboard(page: Page) -> None:
    answer(page, {"content": "Yes."})
    say(page, "One")
    page.get_by_role("button", name="More for One").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("menuitem", name="Rename")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Name of the chat")).to_be_focused()
    page.keyboard.type("<b>Tea</b>")
    page.keyboard.press("Enter")
    expect(chats(page)).to_have_text(["<b>Tea</b>"])
    expect(page).to_have_title("<b>Tea</b> · gemma4-demo")
    page.reload()
    expect(chats(page)).to_have_text(["<b>Tea</b>"])
    page.get_by_role("button", name="More for <b>Tea</b>").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("menuitem", name="Rename")).to_be_focused()
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    expect(chats(page)).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()


def test_drafts_are_kept_for_each_chat(page: Page) -> None:
    answer(page, {"content": "Yes."})
    say(page, "One")
    page.fill("#input", "half a thought")
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("#input")).to_have_value("")
    page.fill("#input", "another")
    page.reload()
    ready(page)
    expect(page.locator("#input")).to_have_value("another")
    chats(page).click()
    expect(page.locator("#input")).to_have_value("half a thought")
    page.press("#input", "Enter")
    done(page)
    page.reload()
    ready(page)
    expect(page.locator("#input")).to_have_value("")


def test_the_one_conversation_of_older_versions_becomes_a_chat(page: Page) -> None:
    old = {
        "messages": [{"role": "user", "content": "Old"}, {"role": "assistant", "content": "Gold", "thinking": "Hm"}],
        "settings": {"system": "Speak of foxes.", "max_tokens": 9},
    }
    page.evaluate("old => localStorage.setItem('mlx-gemma4', old)", json.dumps(old))
    page.goto("about:blank")
    page.go_back()
    ready(page)
    chats(page).get_by_text("Old").click()
    expect(page.locator("article")).to_have_count(2)
    assert texts(page) == ["Old", "Gold"]
    expect(page.locator("[name=system]")).to_have_value("Speak of foxes.")
    page.reload()
    ready(page)
    expect(chats(page)).to_have_count(1)


def test_a_reply_goes_on_while_another_chat_is_shown(page: Page) -> None:
    settle_sampling(page, max_tokens=60)
    send(page, "Tell me a story about a king.")
    expect(replies(page).locator(".text")).not_to_be_empty()
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("#send")).to_have_text("Send")
    expect(page.get_by_label("A reply is being written:")).to_have_count(0, timeout=60_000)
    chats(page).click()
    expect(replies(page).locator(".stats")).to_be_visible()
    assert texts(page)[1]


TRICKY = "A\n\n## You <!-- user -->\n\\## Reply <!-- assistant -->\n\n```\n# x\n```\n\n"


@pytest.mark.parametrize("item", ["Export as JSON", "Export as Markdown"])
def test_a_chat_as_a_file_and_back(page: Page, tmp_path: Path, item: str) -> None:
    answer(page, {"content": TRICKY})
    say(page, "Name: 1/2?")
    say(page, "<i>Two</i>")
    before = texts(page)
    path = download(page, "Name: 1/2?", item, tmp_path)
    assert re.fullmatch(r"Name- 1-2-\.(json|md)", path.name)
    menu(page, "Name: 1/2?", "Delete")
    expect(chats(page)).to_have_count(0)
    bring(page, path)
    expect(page.locator("#status")).to_have_text("Imported.")
    expect(chats(page)).to_have_text(["Name: 1/2?"])
    assert texts(page) == before
    page.reload()
    ready(page)
    assert texts(page) == before


def test_all_chats_with_their_branches_as_one_file(page: Page, tmp_path: Path) -> None:
    answer(page, {"content": "First."})
    say(page, "One")
    answer(page, {"content": "Second."})
    replies(page).get_by_role("button", name="Regenerate").click()
    expect(replies(page).locator(".text")).to_have_text("Second.")
    done(page)
    page.keyboard.press("Control+Shift+O")
    say(page, "Two")
    with page.expect_download() as started:
        page.get_by_role("button", name="Export all").click()
    path = kept(started.value, tmp_path)
    bring(page, path)
    expect(chats(page)).to_have_count(4)
    expect(page.locator("#status")).to_have_text("Imported 2 chats.")
    chats(page).filter(has_text="One").first.click()
    expect(page.get_by_text("2/2")).to_be_visible()
    page.get_by_role("button", name="Earlier version").click()
    expect(replies(page).locator(".text")).to_have_text("First.")


EVIL = "<img src=x onerror='document.title=1'>"


def test_imports_are_never_markup(page: Page) -> None:
    message = {"role": "user", "content": EVIL, "note": EVIL, "error": EVIL, "thinking": EVIL, "stats": {"tokens": 1}}
    messages = [{**message, "id": "a"}, {**message, "id": "b", "parent": "a", "role": "assistant"}]
    chat = {"title": EVIL, "settings": {"system": EVIL, "evil": 1}, "leaf": "b", "messages": messages}
    text = json.dumps({"format": "mlx-gemma4-chats", "chats": [chat]})
    bring(page, {"name": "x.json", "mimeType": "text/plain", "buffer": text.encode()})
    expect(page.locator("#status")).to_have_text("Imported.")
    assert page.locator("#page img, #side img").count() == 0 and EVIL in page.title()
    expect(page.locator("[name=system]")).to_have_value(EVIL)


NO_CHATS = [
    ("a.json", "{", "neither JSON nor Markdown"),
    ("b.json", '{"format": "mlx-gemma4-chats", "chats": []}', "holds no chats"),
    ("c.json", '{"format": "mlx-gemma4-chats", "chats": [null]}', "no messages"),
    ("d.json", "[1, null]", "holds no chats"),
    ("e.md", "only words", "no chat is in it"),
]


def test_files_that_are_no_chats_are_refused(page: Page) -> None:
    for name, text, why in NO_CHATS:
        bring(page, {"name": name, "mimeType": "text/plain", "buffer": text.encode()})
        expect(page.locator("#status")).to_contain_text(f"{name} can't be imported")
        expect(page.locator("#status")).to_contain_text(why)
    expect(chats(page)).to_have_count(0)


def test_a_browser_that_keeps_nothing_still_chats(window: BrowserContext, server: Serving) -> None:
    window.add_init_script("Object.defineProperty(window, 'indexedDB', {value: {open() { throw new Error('no'); }}})")
    page = tab(window, server.url)
    answer(page, {"content": "Yes."})
    say(page, "One")
    expect(page.locator("article")).to_have_count(2)
    say(page, "Two")
    assert texts(page) == ["One", "Yes.", "Two", "Yes."]
