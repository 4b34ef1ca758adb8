"""The page to chat in a browser, as far as that needs none: what it computes runs in a bare V8."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from py_mini_racer import MiniRacer

from mlx_gemma4.server.page import page

SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
RELEASED = {
    "markdown-it.min.js": "391f2aa638e75e6c7859d0a5c5650ef0956722a45998f17e05b83bc655778e1e",
    "purify.min.js": "f69a46022ab1f53e969c8ebbca98172c8995785a9b3be72ea4a12d25b1a1bf67",
}
COLLECT = "function sse(pieces) { const got = []; pieces.forEach(sseParser(x => got.push(x))); return got; }"


@pytest.fixture(scope="module")
def js() -> Iterator[MiniRacer]:
    library, _, ours, _ = SCRIPT.findall(
        page()[0].decode()
    )  # markdown-it, DOMPurify (which needs a DOM), ours, chat.js
    assert "function markdown" in ours
    with MiniRacer() as engine:
        engine.eval(library)
        engine.eval(ours + COLLECT)
        yield engine


def call(js: MiniRacer, name: str, *args: Any) -> Any:
    """The function's value, as JSON has it."""
    return json.loads(js.eval(f"JSON.stringify({name}(...{json.dumps(args)}))"))


def html(js: MiniRacer, text: str) -> str:
    """The HTML of a text in Markdown, without the newlines between its elements."""
    return re.sub(r"(?<=>)\n|\n(?=</?(ul|ol|li|p|pre)\b)", "", "".join(call(js, "markdown", text)))


# Server-sent events

EVENTS = 'data: {"a": "é\\n"}\n\n: read 5 of 9\ndata:two\ndata: lines\n\nevent: ping\n\ndata: [DONE]\n\n'
PARSED = ['{"a": "é\\n"}', "two\nlines", "[DONE]"]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_events_are_the_same_however_they_are_cut(js: MiniRacer, newline: str) -> None:
    text = EVENTS.replace("\n", newline)
    assert call(js, "sse", [text, ""] if newline != "\r" else [text, "\n"]) == PARSED
    for i in range(len(text) + 1):
        assert call(js, "sse", [text[:i], text[i:], "\n"]) == PARSED
    assert call(js, "sse", [*text, "\n"]) == PARSED


def test_comments_come_apart(js: MiniRacer) -> None:
    js.eval("function comments(text) { const got = []; sseParser(() => {}, x => got.push(x))(text); return got; }")
    assert call(js, "comments", EVENTS) == ["read 5 of 9"]


def test_an_event_without_its_empty_line_is_not_given(js: MiniRacer) -> None:
    assert call(js, "sse", ["data: half\n"]) == []


# Markdown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a **b** *c* `d` ~~e~~", "<p>a <strong>b</strong> <em>c</em> <code>d</code> <s>e</s></p>"),
        ("***a*** __b__ _c_", "<p><em><strong>a</strong></em> <strong>b</strong> <em>c</em></p>"),
        ("*a **b** c* **d *e***", "<p><em>a <strong>b</strong> c</em> <strong>d <em>e</em></strong></p>"),
        ("2 * 3 * 4, snake_case_name, **open", "<p>2 * 3 * 4, snake_case_name, **open</p>"),
        (r"\*a\* \_", "<p>*a* _</p>"),
        ("a\nb", "<p>a<br>b</p>"),
        ("``a`b`` `c", "<p><code>a`b</code> `c</p>"),
        ("[a](https://b.c/d_e) ![f](http://g.h)", '<p><a href="https://b.c/d_e">a</a> <a href="http://g.h">f</a></p>'),
        ("see https://a.b/c.", '<p>see <a href="https://a.b/c">https://a.b/c</a>.</p>'),
        ("# A `b` #\ntext", "<h1>A <code>b</code></h1><p>text</p>"),
        ("#hashtag", "<p>#hashtag</p>"),
        ("```py\nif a:\n    b\n```\nc", '<pre><code class="language-py">if a:\n    b\n</code></pre><p>c</p>'),
        ("```\n<b>", "<pre><code>&lt;b&gt;</code></pre>"),
        ("- a\n- b\n  - c\n    d\n- e", "<ul><li>a</li><li>b<ul><li>c<br>d</li></ul></li><li>e</li></ul>"),
        ("3. a\n4. b\n\n   c\n\nd", '<ol start="3"><li><p>a</p></li><li><p>b</p><p>c</p></li></ol><p>d</p>'),
        ("1. a\n   ```\n     x\n   ```\n2. b", "<ol><li>a<pre><code>  x\n</code></pre></li><li>b</li></ol>"),
        ("> a\n> - b\n\nc", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote><p>c</p>"),
        (
            "| a | b |\n|--|:-:|\n| 1 | x\\|y |",
            "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>x|y</td></tr></tbody></table>",
        ),
        ("---\n* * *", "<hr><hr>"),
    ],
)
def test_markdown(js: MiniRacer, text: str, expected: str) -> None:
    assert html(js, text) == expected


TAGS = set("p h1 h2 h3 h4 h5 h6 ul ol li blockquote pre code table thead tbody tr th td hr br strong em s a".split())  # noqa: SIM905


def elements(js: MiniRacer, text: str) -> list[tuple[str, dict[str, str | None]]]:
    """Tags and attributes of the HTML of a text in Markdown."""
    found: list[tuple[str, dict[str, str | None]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            found.append((tag, dict(attributes)))

    Reader().feed("".join(call(js, "markdown", text)))
    return found


PIECES = [
    *"*_~`[]()!<>|\\#-+>\n \t12.:ab",
    "**",
    "```\n",
    "\n- ",
    "\n> ",
    "](",
    "http://",
    "javascript:",
    "|-|\n",
    "    ",
]


@given(st.lists(st.sampled_from(PIECES), max_size=60).map("".join))
@settings(max_examples=300, deadline=None)
def test_any_text_gives_known_tags_and_safe_links(js: MiniRacer, text: str) -> None:
    for tag, attributes in elements(js, text):
        assert tag in TAGS and set(attributes) <= {"href", "start", "class"}
        assert str(attributes.get("href", "http://")).startswith(("http://", "https://", "mailto:"))


@given(st.text(alphabet="abc \n.,é", max_size=200))
@settings(deadline=None)
def test_plain_words_stay(js: MiniRacer, text: str) -> None:
    said = re.sub(r"<[^>]*>", " ", html(js, text))
    assert said.split() == text.split()


@pytest.mark.parametrize(
    "link",
    ["javascript:alert(1)", "JaVaScRiPt:alert(1)", "data:text/html,x", "//a.b", "vbscript:x", "file:///etc/passwd"],
)
def test_a_link_to_anything_but_the_web_is_text(js: MiniRacer, link: str) -> None:
    assert all(tag != "a" for tag, _ in elements(js, f"[x]({link}) ![y]({link}) <{link}>"))


def test_blocks_before_the_end_stay_the_same_while_a_text_grows(js: MiniRacer) -> None:
    text = "# A\n\nb *c*\n\n- d\n- e\n\n```py\nf\n```\n\n| g |\n|---|\n| h |\n\ni"
    last: list[str] = []
    for i in range(len(text) + 1):
        blocks = call(js, "markdown", text[:i])
        assert blocks[: len(last) - 1] == last[:-1]
        last = blocks
    assert len(last) == 6


@pytest.mark.parametrize(
    "piece",
    ["*", "**a ", "[", "`a ", "> ", "- ", "_a", "*a **b ", "![a](", "\n- a", "*a_b~~c", "https://", "- a\n\n", "|-"],
)
def test_long_odd_text_takes_no_time(js: MiniRacer, piece: str) -> None:
    start = time.perf_counter()
    call(js, "markdown", piece * (20_000 // len(piece)))
    assert time.perf_counter() - start < 2


# The file


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    text = page()[0].decode()
    markdown_it, purify, *ours = SCRIPT.findall(text)
    assert "markdownit" in markdown_it[:300] and "DOMPurify" in purify[:300]
    own = text.replace(markdown_it, "").replace(purify, "")
    assert len(ours) == 2 and len(markdown_it + purify) < 150_000
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//", own)
    assert "innerHTML" not in own and "insertAdjacentHTML" not in own and "eval(" not in own
    assert not re.search(r"\sstyle=|\son\w+=", text.split("<script")[0])  # the policy would block them


def test_the_policy_allows_the_pages_own_scripts_only() -> None:
    policy = page()[1]["Content-Security-Policy"]
    assert policy.count("'sha256-") == 5 and "unsafe" not in policy and policy.startswith("default-src 'none'")


def test_the_libraries_are_as_they_were_released() -> None:
    """Versions and licences stand in vendor/LICENSES.txt."""
    folder = files("mlx_gemma4.server.page") / "vendor"
    found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in RELEASED}
    assert found == RELEASED
    licences = (folder / "LICENSES.txt").read_text()
    assert all(name in licences for name in (*RELEASED, "markdown-it 15.0.3", "DOMPurify 3.5.0"))
