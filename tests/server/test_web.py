"""The page to chat in a browser, as far as that needs none: what it computes runs in a bare V8."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import time
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from py_mini_racer import MiniRacer

from mlx_gemma4.server.page import page

SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
RELEASED = {
    "markdown-it.min.js": "391f2aa638e75e6c7859d0a5c5650ef0956722a45998f17e05b83bc655778e1e",
    "purify.min.js": "f69a46022ab1f53e969c8ebbca98172c8995785a9b3be72ea4a12d25b1a1bf67",
    "highlight.min.js": "8ab71eb09c51f501e5e25157d9cff100e46cc29bcbfc744d0b746d451fca7f53",
    "katex.min.js": "fa140498b8cfc8302cbe5e7cb1bdbc1f952bc38b3fa258ede09e73edbf9a74bc",
    "katex.min.css": "00e0b094171b07f58422075f469b4feac2b2f7bce1aeec943c08da4d697f4dcf",
}
FONTS = "bb4b3971fe8e356601a7506cf405f02567169d6b8756084d756411c6adbc5ce4"  # one after the other
COLLECT = "function sse(pieces) { const got = []; pieces.forEach(sseParser(x => got.push(x))); return got; }"


@pytest.fixture(scope="module")
def js() -> Iterator[MiniRacer]:
    library, _, _, _, ours, *_ = SCRIPT.findall(
        page()[1].decode()
    )  # four of others', of which three need a DOM; text.js
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
            '<table><thead><tr><th>a</th><th class="center">b</th></tr></thead>'
            '<tbody><tr><td>1</td><td class="center">x|y</td></tr></tbody></table>',
        ),
        (
            "- [x] a\n- [ ] b\n- [y] c",
            '<ul><li class="task"><span class="task done"></span>a</li>'
            '<li class="task"><span class="task"></span>b</li><li>[y] c</li></ul>',
        ),
        ("---\n* * *", "<hr><hr>"),
    ],
)
def test_markdown(js: MiniRacer, text: str, expected: str) -> None:
    assert html(js, text) == expected


BLOCKS = "p h1 h2 h3 h4 h5 h6 ul ol li blockquote pre table thead tbody tr th td hr"
TAGS = {*BLOCKS.split(), *"code br strong em s a span".split()}  # noqa: SIM905


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
@example("[]() [a]() ![]() ![b]() [c *d*]() [](<>) [e](http://)")
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
    [
        "*",
        "**a ",
        "[",
        "`a ",
        "> ",
        "- ",
        "_a",
        "*a **b ",
        "![a](",
        "\n- a",
        "*a_b~~c",
        "https://",
        "- a\n\n",
        "|-",
        "$a ",
        "$$a",
        "\\(",
        "\\[\n",
        "$$\n",
        "- [ ] ",
    ],
)
def test_long_odd_text_takes_no_time(js: MiniRacer, piece: str) -> None:
    start = time.process_time()  # all threads' of this process: others' work doesn't count
    call(js, "markdown", piece * (20_000 // len(piece)))
    assert time.process_time() - start < 4


# Formulas


def formulas(js: MiniRacer, text: str) -> list[str]:
    """What would be drawn, as the text spells it; display ones begin with '! '."""
    found = re.findall(r'<code class="math( display)?">(.*?)</code>', "".join(call(js, "markdown", text)), re.DOTALL)
    return [("! " if display else "") + unescape(source) for display, source in found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a $x_1*y*z_2$ b", ["$x_1*y*z_2$"]),
        (r"$$\int_0^1 x\,dx$$", [r"! $$\int_0^1 x\,dx$$"]),
        ("$$\n\\a\\\\\n\n*b*\n$$", ["! $$\n\\a\\\\\n\n*b*\n$$"]),
        (r"so \(a\_b\) and \[c\,d\]", [r"\(a\_b\)", r"! \[c\,d\]"]),
        ("\\[\nx\n\\]\nafter", ["! \\[\nx\n\\]"]),
        ("- a\n  $$\n  x\n  $$\n- $y$", ["! $$\nx\n$$", "$y$"]),
        ("> $$x$$\n\n| $a$ |\n|--|\n| $b$ |", ["! $$x$$", "$a$", "$b$"]),
        ("**$a$**($b$), $c$.", ["$a$", "$b$", "$c$"]),
        (r"$\text{it costs \$5}$", [r"$\text{it costs \$5}$"]),
        (r"$a\\$", [r"$a\\$"]),
        ("$<b>&$", ["$<b>&$"]),
        # None of these is one
        ("costs $5, or $10 for two; 3 $", []),
        ("US$5 and US$6, $HOME/$USER, $ a $, a$b$", []),
        ("`$x$` and ``$y$``", []),
        ("```\n$$x\\,y$$\n```", []),
        ("    $$\n    x\n    $$", []),
        ("[a](http://b.c/$d$e$) <http://f.g/$h$>", []),
        (r"\$5\$ and \\(a\\)", []),
        ("$$$$, $", []),
        ("$$\nopen", []),
        ("$5 and `$x$`", []),
    ],
)
def test_formulas(js: MiniRacer, text: str, expected: list[str]) -> None:
    assert formulas(js, text) == expected


@given(st.text(alphabet="ab\\,{}^_*[]()`<&! ~|#-", min_size=1, max_size=40))
@settings(max_examples=300, deadline=None)
def test_a_formula_keeps_every_sign(js: MiniRacer, text: str) -> None:
    """Markdown's escapes and emphasis are none within a formula."""
    if text.strip() and not text.endswith("\\"):
        assert formulas(js, f"a\n\n$${text}$$")[:1] == [f"! $${text}$$"]


@pytest.mark.parametrize(
    "text", [r"http://a.b/c\_d", r"[e](http://f.g/h\\i)", r"`\_\,`", "```\n\\_\\,\n```", r"<http://a.b/\_>"]
)
def test_a_backslash_stays_where_it_is_no_escape(js: MiniRacer, text: str) -> None:
    """In code, in addresses that stand by themselves; what a link's brackets hold has CommonMark's escapes."""
    assert "\\" in unescape(html(js, text)) or "%5C" in html(js, text)


# Chats as files

LINES = st.sampled_from(["", "a", "## You", "## You <!-- user -->", "\\## Reply <!-- assistant -->", "# b", " ", "```"])
TEXTS = st.lists(st.lists(LINES, max_size=5).map("\n".join), min_size=1, max_size=5)


@given(TEXTS, st.text(alphabet="ab #", min_size=1, max_size=9))
@settings(max_examples=300, deadline=None)
def test_a_chat_in_markdown_is_read_back(js: MiniRacer, texts: list[str], title: str) -> None:
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]
    (chat,) = call(js, "readChats", "a.md", call(js, "toMarkdown", title, messages), [])
    assert [{"role": m["role"], "content": m["content"]} for m in chat["messages"]] == messages
    assert [m["parent"] for m in chat["messages"]] == [None, *(m["id"] for m in chat["messages"][:-1])]


def test_markdown_of_others_and_llama_servers_export_are_read(js: MiniRacer) -> None:
    text = "## User\n\nHi\n\n## Assistant:\n\nHello\n\n## constructor\n"
    (chat,) = call(js, "readChats", "a.md", text, [])
    assert [m["content"] for m in chat["messages"]] == ["Hi", "Hello\n\n## constructor"]
    root = {"id": "r", "parent": None, "role": "system", "type": "root", "content": ""}
    one = {"id": "a", "parent": "r", "role": "user", "content": "Hi", "timestamp": 5}
    two = {"id": "b", "parent": "a", "role": "assistant", "content": "Hello", "reasoningContent": "Hm"}
    conv = {"name": "N", "currNode": "b"}
    lines = [{"harness": "llama.app", "type": "session", **conv}]
    lines += [{"type": "message", "message": each} for each in (root, one, two)]
    for text in (json.dumps([{"conv": conv, "messages": [root, one, two]}]), "\n".join(map(json.dumps, lines))):
        (chat,) = call(js, "readChats", "a.json", text, [])
        assert chat["title"] == "N" and chat["leaf"] == "b" and chat["messages"][1]["thinking"] == "Hm"
        assert [m["parent"] for m in chat["messages"]] == [None, "a"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.sampled_from(["a", "b", "user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["chats", "messages", "id", "parent", "role", "content", "leaf", "settings", "title"]),
            inner,
        )
    ),
    max_leaves=20,
)
MESSAGE = st.fixed_dictionaries(
    {"id": st.sampled_from("abc"), "parent": st.sampled_from("abcd"), "role": st.just("user"), "content": st.just("x")}
)


@given(st.lists(JSON | st.fixed_dictionaries({"messages": st.lists(MESSAGE | JSON, max_size=6)}), max_size=3))
@settings(max_examples=300, deadline=None)
def test_any_file_is_refused_in_words_or_gives_trees(js: MiniRacer, chats: Any) -> None:
    js.eval("function tried(t) { try { return readChats('a.json', t, ['think']); } catch (e) { return String(e); } }")
    got = call(js, "tried", json.dumps({"format": "mlx-gemma4-chats", "chats": chats}))
    if isinstance(got, str):
        assert got.startswith("Error: ")
        return
    for chat in got:
        parents = {m["id"]: m["parent"] for m in chat["messages"]}
        assert chat["leaf"] in parents and isinstance(chat["title"], str) and chat["title"]
        for each in parents:
            for _ in range(len(parents) + 1):
                each = parents[each] if each else None
            assert each is None


# The file


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    text = page()[1].decode()
    *others, _, _, _, _, _, _, _, _ = scripts = SCRIPT.findall(text)
    names = ["markdownit", "DOMPurify", "Highlight.js", "katex"]
    assert len(others) == 4 and all(name in each[:600] for name, each in zip(names, others, strict=True))
    katex_css, *styles = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert sum(map(len, others)) < 550_000 and len(katex_css) < 400_000 and "url(fonts" not in katex_css
    own = "".join([SCRIPT.sub("", text).replace(katex_css, ""), *scripts[4:], *styles])
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//", own)
    assert "innerHTML" not in own and "insertAdjacentHTML" not in own and "eval(" not in own
    assert not re.search(r"\sstyle=|\son\w+=", text.split("<script")[0])  # the policy would block them


def test_the_policy_allows_the_pages_own_scripts_only() -> None:
    policy = page()[2]["Content-Security-Policy"]
    assert policy.count("'sha256-") == 15 and "unsafe" not in policy and policy.startswith("default-src 'none'")


def test_the_page_is_packed_and_sent_once() -> None:
    status, body, headers = page()
    assert status == 200
    _, packed, more = page({"accept-encoding": "br, gzip", "if-none-match": '"old"'})
    assert gzip.decompress(packed) == body and len(packed) < len(body) / 2
    assert more == headers | {"Content-Encoding": "gzip"}
    assert page({"if-none-match": headers["ETag"]}) == (304, b"", headers)


def test_the_libraries_are_as_they_were_released() -> None:
    """Versions and licences stand in vendor/LICENSES.txt."""
    folder = files("mlx_gemma4.server.page") / "vendor"
    found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in RELEASED}
    assert found == RELEASED
    fonts = sorted((each for each in (folder / "fonts").iterdir()), key=lambda each: each.name)
    assert hashlib.sha256(b"".join(each.read_bytes() for each in fonts)).hexdigest() == FONTS
    licences = (folder / "LICENSES.txt").read_text()
    assert all(
        name in licences
        for name in (*RELEASED, "markdown-it 15.0.3", "DOMPurify 3.5.0", "KaTeX 0.19.1", "highlight.js 11.12.0")
    )
