"""The page to chat in a browser, as far as that needs none: what it computes runs in a bare V8."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from py_mini_racer import MiniRacer

from mlx_gemma4.server.page import page

SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
COLLECT = "function sse(pieces) { const got = []; pieces.forEach(sseParser(x => got.push(x))); return got; }"


@pytest.fixture(scope="module")
def js() -> Iterator[MiniRacer]:
    found = SCRIPT.search(page()[0].decode())  # the first is markdown.js
    assert found and "function markdown" in found[1]
    with MiniRacer() as engine:
        engine.eval(found[1] + COLLECT)
        yield engine


def call(js: MiniRacer, name: str, *args: Any) -> Any:
    """The function's value, as JSON has it."""
    return json.loads(js.eval(f"JSON.stringify({name}(...{json.dumps(args)}))"))


def html(tree: Any) -> str:
    """A tree of the page's Markdown in a short form: p(a strong(b))."""
    if isinstance(tree, str):
        return tree
    if isinstance(tree, list):
        return "".join(map(html, tree))
    more = "".join(f" {name}={tree[name]}" for name in ("href", "start", "lang") if tree.get(name))
    return f"<{tree['tag']}{more}>{html(tree['kids'])}</{tree['tag']}>"


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
        ("a **b** *c* `d` ~~e~~", "<p>a <strong>b</strong> <em>c</em> <code>d</code> <del>e</del></p>"),
        ("***a*** __b__ _c_", "<p><em><strong>a</strong></em> <strong>b</strong> <em>c</em></p>"),
        ("*a **b** c* **d *e***", "<p><em>a <strong>b</strong> c</em> <strong>d <em>e</em></strong></p>"),
        ("2 * 3 * 4, snake_case_name, **open", "<p>2 * 3 * 4, snake_case_name, **open</p>"),
        (r"\*a\* \_", "<p>*a* _</p>"),
        ("a\nb", "<p>a<br></br>b</p>"),
        ("``a`b`` `c", "<p><code>a`b</code> `c</p>"),
        ("[a](https://b.c/d_e) ![f](http://g.h)", "<p><a href=https://b.c/d_e>a</a> <a href=http://g.h>f</a></p>"),
        ("see https://a.b/c.", "<p>see <a href=https://a.b/c>https://a.b/c</a>.</p>"),
        ("# A `b` #\ntext", "<h1>A <code>b</code></h1><p>text</p>"),
        ("#hashtag", "<p>#hashtag</p>"),
        ("```py\nif a:\n    b\n```\nc", "<pre lang=py>if a:\n    b</pre><p>c</p>"),
        ("```\n<b>", "<pre><b></pre>"),
        ("- a\n- b\n  - c\n    d\n- e", "<ul><li>a</li><li><p>b</p><ul><li>c<br></br>d</li></ul></li><li>e</li></ul>"),
        ("3. a\n4. b\n\n   c\n\nd", "<ol start=3><li>a</li><li><p>b</p><p>c</p></li></ol><p>d</p>"),
        ("1. a\n   ```\n     x\n   ```\n2. b", "<ol start=1><li><p>a</p><pre>  x</pre></li><li>b</li></ol>"),
        ("> a\n> - b\n\nc", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote><p>c</p>"),
        (
            "| a | b |\n|--|:-:|\n| 1 | x\\|y |",
            "<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>x|y</td></tr></table>",
        ),
        ("---\n* * *", "<hr></hr><hr></hr>"),
    ],
)
def test_markdown(js: MiniRacer, text: str, expected: str) -> None:
    assert html(call(js, "markdown", text)) == expected


TAGS = set("p h1 h2 h3 h4 h5 h6 ul ol li blockquote pre code table tr th td hr br strong em del a".split())  # noqa: SIM905


def nodes(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, list):
        for kid in tree:
            yield from nodes(kid)
    elif isinstance(tree, dict):
        yield tree
        yield from nodes(tree["kids"])


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
    for node in nodes(call(js, "markdown", text)):
        assert node["tag"] in TAGS
        assert node.get("href", "http://").startswith(("http://", "https://", "mailto:"))


@given(st.text(alphabet="abc \n.,é", max_size=200))
@settings(deadline=None)
def test_plain_words_stay(js: MiniRacer, text: str) -> None:
    said = re.sub(r"<[^>]*>", " ", html(call(js, "markdown", text)))
    assert said.split() == text.split()


@pytest.mark.parametrize(
    "link",
    ["javascript:alert(1)", "JaVaScRiPt:alert(1)", "data:text/html,x", "//a.b", "vbscript:x", "file:///etc/passwd"],
)
def test_a_link_to_anything_but_the_web_is_text(js: MiniRacer, link: str) -> None:
    assert all(node["tag"] != "a" for node in nodes(call(js, "markdown", f"[x]({link}) ![y]({link}) <{link}>")))


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
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//", text)
    assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "eval(" not in text
    assert not re.search(r"\sstyle=|\son\w+=", text.split("<script")[0])  # the policy would block them


def test_the_policy_allows_the_pages_own_scripts_only() -> None:
    policy = page()[1]["Content-Security-Policy"]
    assert policy.count("'sha256-") == 3 and "unsafe" not in policy and policy.startswith("default-src 'none'")
