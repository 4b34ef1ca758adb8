"""Chat templates may do what they like: time and memory are bounded, and the next one renders as ever."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mlx_gemma4.chat_format import renderer
from mlx_gemma4.chat_format.template import render_chat
from mlx_gemma4.errors import InputError

HELLO = [{"role": "user", "content": "Hello"}]
BIG = "{% set ns = namespace(x=['ab' * 1000]) %}{% for i in range(40) %}{% set ns.x = "


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renderer, "SECONDS", 0.3)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' | center(3000000000) | length }}",
        "{{ 'a'.center(3000000000) }}",
        "{{ '%3000000000d' | format(1) }}",
        "{{ '{:>3000000000}'.format(1) }}",
        "{{ 'a' | indent(2000000000, true) }}",
        "{{ [1, 2] | tojson(indent=2000000000) }}",
        "{{ ('a' * 100000).replace('', 'b' * 100000) | length }}",
        "{{ ('a,' * 1000000).split(',') | map('center', 10000) | list | length }}",
        "{{ range(99999) | batch(1000000000, 0) | list }}",
        "{{ range(99999) | map('string') | map('center', 99999) | join | length }}",
        "{{ lipsum(n=100000) }}",
        BIG + "ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
        BIG + "[ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson | length }}",
        BIG + "(ns.x, ns.x) %}{% endfor %}{{ ns.x ~ '' }}",
        BIG + "dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x | string }}",
        "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(9) %}{% set ns.x = ns.x.replace('a', ns.x*9) %}{% endfor %}",
        "{% set s = 'a' * 10000000 %}{% for i in range(99999) %}{% if 'b' in s %}{% endif %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set l = range(99999) | list %}{% for i in l %}{{ l | sum }}{% endfor %}",
        "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
        "{{ " + "[" * 100_000 + "]" * 100_000 + " }}",
        "{{ " + "-" * 100_000 + "1 }}",
        "{{ " + "not " * 100_000 + "1 }}",
        "{{ 1" + " + 1" * 100_000 + " }}",
        "{{ x" + ".x" * 100_000 + " }}",
        "{{ x" + "|e" * 100_000 + " }}",
        "{% if 1 %}" * 100_000,
        "{#" * 100_000,
        "{% raw %}" * 50_000,
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{{ caller.__globals__ }}{{ raise_exception('\x1b[2J' * 100000) }}",
    ],
    ids=lambda template: template[:40],
)
def test_a_bomb_is_refused_soon(template: str) -> None:
    begin = time.monotonic()
    with pytest.raises(InputError) as error:
        render_chat(template, HELLO)
    assert time.monotonic() - begin < 20
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600
    assert render_chat("{{ messages[0].content }}", HELLO) == "Hello"


def test_memory_is_watched_where_no_limit_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Mac: what a process holds is looked at while it renders."""
    monkeypatch.setattr(renderer, "MEMORY", 1 << 40)
    renderer.close()
    render_chat("", HELLO)
    monkeypatch.setattr(renderer, "MEMORY", 100 << 20)
    monkeypatch.setattr(renderer, "LOOK", 5)
    monkeypatch.setattr(renderer, "SECONDS", 60.0)
    with pytest.raises(InputError, match="too much memory"):
        render_chat("{% set x = 'a' * 300000000 %}{% for i in range(99999) %}{{ 'b' in x }}{% endfor %}", HELLO)
    renderer.close()


def test_no_answer_is_another_conversations() -> None:
    def say(i: int) -> bool:
        messages = [{"role": "user", "content": f"{i} " * 10_000}]
        template = (
            "{{ messages[0].content }}"
            if i % 13
            else "{% for i in range(99999) %}{% for j in range(999) %}{% endfor %}{% endfor %}"
        )
        try:
            return render_chat(template, messages) == messages[0]["content"] and i % 13 > 0
        except InputError:
            return i % 13 == 0

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(say, range(1, 30)))


def test_an_interrupted_rendering_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(renderer, "LOOK", 5)
    with monkeypatch.context() as patch:
        patch.setattr(renderer, "memory_of", interrupt)
        with pytest.raises(KeyboardInterrupt):
            render_chat("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", HELLO)
    assert render_chat("{{ messages[0].content }}", HELLO) == "Hello"


def test_a_fork_renders_by_itself() -> None:
    assert render_chat("a", HELLO) == "a"
    if (child := os.fork()) == 0:
        os._exit(render_chat("b", HELLO) != "b")
    assert os.waitpid(child, 0)[1] == 0
    assert render_chat("c", HELLO) == "c"


def test_values_of_all_kinds_arrive() -> None:
    """Numbers, keys and surrogates as they were; what is no JSON by its type's name."""
    content = {"t": (1, 2), "n": None, 3: 1 << 80, "x": 1e300, "s": "\ud800é\U0002a6d6", "o": threading}
    shown = render_chat("{{ messages[0].c.s }}{{ messages[0].c }}", [{"c": content}])
    assert shown.startswith("\ud800é\U0002a6d6{'t': (1, 2), 'n': None, 3: 1208925819614629174706176, 'x': 1e+300,")
    assert "(module)" in shown
