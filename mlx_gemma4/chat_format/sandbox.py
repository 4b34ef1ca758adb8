"""Renders chat templates in a process of its own, which `renderer.py` starts by this file's path and bounds.

In: as arguments, the most bytes of memory, then the paths of modules; on standard input, frames of a template, its
variables and stand-ins for control characters, each behind its length and seconds of CPU. Out: on standard output, for
each a letter, a length and a text: T the prompt, R what `raise_exception` says, N nesting is too deep, M memory is
short, F any other failure. A template is untrusted code: Jinja's sandbox keeps it from Python, the limits
set here from time and memory, whatever it does. It imports nothing of this package: a start takes a tenth of a second.
"""

import functools
import json
import marshal
import re
import resource
import signal
import struct
import sys
from contextlib import suppress
from datetime import datetime
from typing import Any

if __name__ == "__main__":
    sys.path[:] = sys.argv[2:]

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

HEAD = struct.Struct("<Qd")  # of a frame
LONGEST = 1 << 24  # characters of a prompt; four times what the longest context holds


class Refused(Exception):
    """The template doesn't take these messages."""


class _Generation(jinja2.ext.Extension):
    """The block {% generation %}, which marks a reply for training: it is rendered as its contents."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, where strings compare with text of messages."""

    there: dict[int, str] = {}  # noqa: RUF012 - ordinal of a character -> its stand-in, in this rendering

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation])
        marked = jinja2.pass_context(lambda _context, value: _marked(value))  # so that no result is compiled in
        self.filters.update(tojson=_tojson, _marked=marked)
        self.globals.update(raise_exception=_raise_exception, strftime_now=lambda form: datetime.now().strftime(form))

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        """Parse, and have strings compared with stand-ins."""
        tree = super()._parse(source, name, filename)
        for compare in tree.find_all(jinja2.nodes.Compare):
            compare.expr = self._with_stand_ins(compare.expr)
            for operand in compare.ops:
                operand.expr = self._with_stand_ins(operand.expr)
        return tree

    def _with_stand_ins(self, node: jinja2.nodes.Node) -> jinja2.nodes.Expr:
        made = jinja2.nodes.Filter(node, "_marked", [], [], None, None, lineno=node.lineno)
        made.set_environment(self)
        return made

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # Jinja's names of them
        text = getattr(__obj, "__self__", None)  # of which this is a method
        if isinstance(text, str) and any(stand_in in text for stand_in in _Sandbox.there.values()):
            args, kwargs = tuple(map(_marked, args)), {name: _marked(x) for name, x in kwargs.items()}
        return super().call(__context, __obj, *args, **kwargs)


def _marked(value: Any) -> Any:
    """Write a string with stand-ins, so that it compares with text of messages; leave any other value alone."""
    return value.translate(_Sandbox.there) if isinstance(value, str) else value


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Write JSON as transformers does, without HTML escapes. Stand-ins stay as they are."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if ensure_ascii:
        text = re.sub(f"[^\\x00-\\x7f{''.join(_Sandbox.there.values())}]", lambda c: json.dumps(c[0])[1:-1], text)
    return text


def _raise_exception(message: Any) -> None:
    raise Refused(str(message))


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    return _Sandbox().from_string(source)


def _render(source: str, variables: dict[str, Any], there: dict[int, str]) -> tuple[bytes, str]:
    """Return a letter and a text."""
    _Sandbox.there = there
    try:
        text = _compile(source).render(variables)
        if len(text) > LONGEST:
            return b"F", f"it makes over {LONGEST} characters"
        return b"T", text
    except Refused as error:
        return b"R", str(error)[:1000]
    except RecursionError:
        return b"N", ""
    except MemoryError:
        return b"M", ""
    except Exception as error:  # a template is a program: it may raise anything
        return b"F", (str(error) or type(error).__name__)[:1000]


def main() -> None:
    """Answer frames until there are no more."""
    for kind, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_AS, int(sys.argv[1]))):
        with suppress(ValueError, OSError):  # not every system has each; the memory is watched from outside too
            resource.setrlimit(kind, (most, most))
    frames, answers = sys.stdin.buffer, sys.stdout.buffer
    while head := frames.read(HEAD.size):
        size, seconds = HEAD.unpack(head)
        try:
            signal.setitimer(signal.ITIMER_PROF, seconds)  # ends the process: no handler would run inside an operation
            letter, text = _render(*marshal.loads(frames.read(size)))
            data = text.encode("utf-8", "surrogatepass")
        except MemoryError:
            letter, data = b"M", b""
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(letter + len(data).to_bytes(8, "little") + data)
        answers.flush()
        if letter == b"M":
            return


if __name__ == "__main__":
    main()
