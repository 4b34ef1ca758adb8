"""How the page shows what models write: formulas, code, tables, directions; and that axe-core finds nothing wrong."""

from __future__ import annotations

from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from browsing import answer, replies, say, send, shot, tab, windows
from playwright.sync_api import Browser, Page, expect
from serving import Serving

pytestmark = pytest.mark.browser

SAMPLE = r"""The area under a line is $\int_0^1 x\,dx = \frac12$, and for a turn by $\theta$:

$$R(\theta) = \begin{pmatrix} \cos\theta & -\sin\theta \\ \sin\theta & \cos\theta \end{pmatrix}$$

A cup costs $3, two cost $5.

| leaf | degrees | minutes |
| :--- | ---: | :---: |
| green | 75 | 2 |
| black | 95 | 4 |

- [x] boil the water
- [ ] warm the pot

```python
def pour(tea: str, cups: int = 2) -> list[str]:
    # never five minutes
    return [f"{tea} {i}" for i in range(cups)]
```
"""


def shown(page: Page, text: str, question: str = "One") -> Any:
    answer(page, {"content": text})
    say(page, question)
    return replies(page).last.locator(".text")


def test_formulas_are_drawn(page: Page) -> None:
    text = shown(
        page,
        "Eul $e^{i\\pi}$ and\n\n$$\\int_0^1 x\\,dx$$\n\n\\[\\boxed{\\textcolor{red}{\\pmb{x}}}\\]\n\n```math\ny\n```",
    )
    expect(text.locator(".katex")).to_have_count(4)
    expect(text.locator(".formula.display")).to_have_count(3)
    assert text.locator("annotation").all_text_contents() == [
        "e^{i\\pi}", "\\int_0^1 x\\,dx", "\\boxed{\\textcolor{red}{\\pmb{x}}}", "y",
    ]  # fmt: skip
    fonts = page.evaluate(
        "document.fonts.ready.then(() => [...document.fonts].filter(f => f.status === 'loaded').map(f => f.family))"
    )
    assert "KaTeX_Math" in fonts


NO_FORMULAS = (
    r"`$$\int x\,dx$$`",
    "```\n$$\\int x\\,dx$$\n```",
    r"$\nonesuch{x\,dx}$",
    r"$$\int x\,dx",
    "costs $5 to $10\\,",
)


def test_what_is_no_formula_keeps_its_signs(page: Page) -> None:
    for i, text in enumerate(NO_FORMULAS):
        made = shown(page, text, f"Number {i}")
        expect(made.locator(".katex")).to_have_count(0)
        said = made.inner_text()
        assert said.count("$") == text.count("$") and ("\\int" in said) == ("\\int" in text)


def test_a_formula_can_do_nothing_else(page: Page) -> None:
    evil = r"$\href{javascript:alert(1)}{x}$ $\includegraphics{https://a.b/c.png}$ $\htmlStyle{color:red}{x}$ $\url{https://a.b}$"
    made = shown(page, evil + r" $\def\x{\x\x}\x$ $\rule{9999em}{9999em}$")
    assert made.locator("a, img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 900


def test_code_has_its_language_colours_and_a_button(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    text = shown(page, "```python\ndef f():\n    return '<b>'\n```\n\n```nonesuch\n<i>\n```\n\n```\nplain\n```")
    heads = text.locator(".code .head")
    expect(heads).to_have_text(["python", "nonesuch", "text"])
    expect(text.locator(".code").first.locator(".hljs-keyword")).to_have_text(["def", "return"])
    expect(text.locator(".code").nth(1).locator("code > *")).to_have_count(0)
    heads.first.get_by_role("button", name="Copy code").click()
    expect(page.locator("#status")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == "def f():\n    return '<b>'"


def test_tables_tasks_and_directions(page: Page) -> None:
    text = shown(page, SAMPLE + "\nשלום עולם\n\n- مرحبا\n- hello\n\n> שלום")
    sides = "cells => cells.map(cell => getComputedStyle(cell).textAlign)"
    assert text.locator("tbody tr").first.locator("td").evaluate_all(sides) == ["left", "right", "center"]
    boxes = text.get_by_role("checkbox")
    assert [box.is_checked() for box in boxes.all()] == [True, False]
    expect(boxes.first).to_be_disabled()
    directions = "parts => parts.map(part => getComputedStyle(part).direction)"
    assert text.locator("> p").evaluate_all(directions) == ["ltr", "ltr", "ltr", "rtl"]
    assert text.locator("ul").last.locator("li").evaluate_all(directions) == ["rtl", "ltr"]
    assert text.locator("blockquote p").evaluate_all(directions) == ["rtl"]


def faults(page: Page) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [f"{each['id']}: {[node['html'][:150] for node in each['nodes'][:3]]}" for each in found]


@pytest.mark.parametrize(
    ("scheme", "width", "height"),
    [("light", 1280, 800), ("dark", 1280, 800), ("light", 360, 740)],
)
def test_axe_finds_nothing(browser: Browser, server: Serving, scheme: Any, width: int, height: int) -> None:
    size, still = {"width": width, "height": height}, "reduce"
    with windows(browser, viewport=size, color_scheme=scheme, reduced_motion=still) as window:
        page = tab(window, server.url)
        assert faults(page) == []
        shown(page, "Green tea: two minutes.", "How long does green tea take?")
        page.keyboard.press("Control+Shift+O")
        shown(page, SAMPLE, "How do I make tea for two?")
        page.evaluate("document.getElementById('scroll').scrollTop = 0")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert faults(page) == []
        if width <= 1280:
            shot(page, f"page-{scheme}" if width == 1280 else f"page-{width}")
        if width == 360:
            page.click("#sides")
            assert faults(page) == []
            page.keyboard.press("Escape")
        page.get_by_role("button", name="Regenerate").click()
        expect(page.get_by_text("2/2")).to_be_visible()
        page.get_by_label("Reply", exact=True).get_by_role("button", name="Edit").click()
        page.click("#settings")
        assert faults(page) == []
        page.keyboard.press("Escape")
        answer(page, status=400, json={"error": {"message": "x", "code": "context_length_exceeded"}}, body=None)
        send(page, "And now?")
        expect(page.get_by_role("group", name="The context is full")).to_be_visible()
        if width < 800:
            page.click("#sides")
        page.get_by_role("button", name="More for How do I make tea").click()
        assert faults(page) == []
        page.keyboard.press("Escape")
        page.keyboard.press("Escape")
        page.click("#models-open")
        expect(page.get_by_role("button", name="Use gemma4-demo")).to_be_visible()
        assert faults(page) == []
